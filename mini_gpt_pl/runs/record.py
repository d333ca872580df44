"""The settings of a run as its trainer had them, and its end, for folders without a configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from mini_gpt_pl.atomic import write_text
from mini_gpt_pl.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

RECORD = "run.json"
AnyRecord = TypeVar("AnyRecord")


@dataclass(frozen=True)
class Record:
    """The settings of any Lightning run, as its trainer had them; None for what it does not say.

    Args:
        model: Class of the module.
        weights: Number of its values.
        optimizers: Class and settings of each optimizer; a setting that its parameter groups differ in is a list.
        batch_size: Examples of a batch, of one process.
        accumulation: Batches of a step.
        processes: That train together.
        precision: As Lightning names it.
        max_steps: Optimizer steps asked for; None for no limit.
        max_epochs: Epochs asked for; None for no limit.
        clipping: Of gradients.
        ended: Steps taken when training ended by itself; None for a run that broke off or is still going.
    """

    model: str
    weights: int
    optimizers: Sequence[Mapping[str, Any]] = ()
    batch_size: int | None = None
    accumulation: int = 1
    processes: int = 1
    precision: str | None = None
    max_steps: int | None = None
    max_epochs: int | None = None
    clipping: float | None = None
    ended: int | None = None

    @classmethod
    def of(cls, trainer: Trainer, module: LightningModule) -> Self:
        """Read the settings of a run from its trainer, once the fit has begun."""
        return cls(
            type(module).__name__,
            sum(parameter.numel() for parameter in module.parameters()),
            [_settings(optimizer) for optimizer in trainer.optimizers],
            _batch_size(trainer.train_dataloader),
            trainer.accumulate_grad_batches,
            trainer.world_size,
            str(trainer.precision),
            trainer.max_steps if trainer.max_steps > 0 else None,
            trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else None,
            trainer.gradient_clip_val,
        )

    def write(self, folder: Path) -> None:
        """Write the record into a run folder, atomically."""
        write_text(folder / RECORD, json.dumps(asdict(self), indent=1) + "\n")


def read_record(kind: type[AnyRecord], file: Path) -> AnyRecord | None:
    """Read a JSON object as a dataclass, or as a dictionary; None without the file.

    Raises:
        UserError: The file is damaged.
    """
    if not file.is_file():
        return None
    try:
        return kind(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}): restore or delete it") from None


def record_run(trainer: Trainer, module: LightningModule, folder: Path, *, ended: bool = False) -> None:
    """Record a run's settings when training begins, and once more when it has `ended` by itself; rank 0 writes."""
    if trainer.is_global_zero:
        record = Record.of(trainer, module)
        (replace(record, ended=trainer.global_step) if ended else record).write(folder)


def _settings(optimizer: Any) -> dict[str, Any]:
    """Class and settings of an optimizer as its parameter groups have them, the learning rate before any schedule."""
    groups: Sequence[Mapping[str, Any]] = optimizer.param_groups
    settings: dict[str, Any] = {"class": type(optimizer).__name__}
    for name in dict.fromkeys(name for group in groups for name in group):
        if name in ("params", "initial_lr"):
            continue
        values = [group.get("initial_lr", group["lr"]) if name == "lr" else group.get(name) for group in groups]
        try:
            plain = json.loads(json.dumps(values, default=lambda value: value.item()))  # a rate may be a tensor
        except (TypeError, ValueError, AttributeError, RuntimeError):
            continue  # nothing that a record can hold
        settings[name] = plain[0] if all(value == plain[0] for value in plain) else plain
    return settings


def _batch_size(loader: Any) -> int | None:
    size = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) else None
