"""Metrics from the device to every logger, and the CSV that every run writes."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from mini_gpt_pl.atomic import replacing
from mini_gpt_pl.errors import UserError

STEP = "step"


def to_host(metrics: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Turn device scalars into floats with one transfer for all of them."""
    tensors = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
    numbers = {name: float(value) for name, value in metrics.items() if not isinstance(value, Tensor)}
    if tensors:
        stacked = torch.stack([value.detach().double().reshape(()) for value in tensors.values()])
        numbers.update(zip(tensors, stacked.tolist(), strict=True))
    return {name: numbers[name] for name in metrics}


def log_now(trainer: Trainer, metrics: Mapping[str, Tensor | float], step: int) -> dict[str, float]:
    """Hand metrics to every logger at the step that they belong to, and return them as floats.

    `self.log` would average them over, and stamp them with, the next multiple of `log_every_n_steps`. As after
    `self.log`, their last values are in `trainer.callback_metrics`, where other callbacks (a progress bar, a
    `ModelCheckpoint(monitor="backbone/trunk/pc1_excess")`) find them.
    """
    numbers = to_host(metrics)
    # One tensor for all and views of it: a row may have fifty numbers, and come at every step.
    trainer.callback_metrics.update(zip(numbers, torch.tensor(list(numbers.values())).unbind(), strict=True))
    for logger in trainer.loggers:
        logger.log_metrics(numbers, step=step)
    return numbers


def logging_due(trainer: Trainer, step: int) -> bool:
    """Whether the trainer's `log_every_n_steps` asks for values at this optimizer step."""
    every = int(getattr(trainer, "log_every_n_steps", 1))
    return step % max(1, every) == 0


# Times the last write's length that pass before the next one.
_PATIENCE = 200


class _Resume(Callback):
    """Lets a table begin, or take up its file, once the trainer knows the step that it starts from."""

    def __init__(self, table: MetricsCSV) -> None:
        super().__init__()
        self.table = table

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not earlier: where the ranks share the weights, Lightning names the checkpoint once they have been laid out.
        if trainer.ckpt_path is None:
            self.table.begin(trainer.global_step)
        else:
            self.table.resume(trainer.global_step)


class MetricsCSV(Logger):
    """One row per step, one column per metric; survives a crash, and a resumed run continues it.

    The file is rewritten whole and atomically, at most every few seconds: probes add columns when they first report,
    and may report a step after later ones. A long table takes longer to write and is written less often, so that
    writing takes half a percent of the time at most. Recorded rows are never lost: those that are not in memory are
    read before the file is written, a run that begins anew is refused, and an evaluation outside of training adds
    nothing to another process's table.

    Args:
        path: The file, `metrics.csv` in a run folder.
        seconds: Least time between two writes; the end of a run, however it ends, and checkpoints always write.
        overwrite: Whether a run that begins anew may replace the table of another.

    Raises:
        UserError: The file holds the rows of a run, and another one begins (`Trainer.fit` without `ckpt_path`).
    """

    def __init__(self, path: Path | str, seconds: float = 5.0, overwrite: bool = False) -> None:
        super().__init__()
        self.path = Path(path)
        self.seconds = seconds
        self.overwrite = overwrite
        self.rows: dict[int, dict[str, float]] = {}
        self._columns: dict[str, None] = {}
        self._written = 0.0
        self._took = 0.0
        self._dirty = False
        self._checkpointed = -1
        self._resumed = False
        self._closed = False
        self._warned = False
        self._trainer: Trainer | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_trainer": None}

    @property
    @override
    def name(self) -> str:
        return "csv"

    @property
    @override
    def version(self) -> str:
        return ""

    @property
    @override
    def save_dir(self) -> str:
        return str(self.path.parent)

    @property
    @override
    def log_dir(self) -> str:
        return self.save_dir

    @property
    @rank_zero_experiment
    def experiment(self) -> MetricsCSV:
        """The table itself, for a module that asks its first logger for one."""
        return self

    @override
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the resolved config lies beside the CSV."""

    @override
    def log_graph(self, model: Any, input_array: Tensor | None = None) -> None:
        """Meet the trainer, as Lightning calls this before it trains or evaluates."""
        trainer: Trainer | None = getattr(model, "_trainer", None)
        if trainer is None:
            return
        self._trainer, fits = trainer, trainer.state.fn == TrainerFn.FITTING
        self._closed = not fits and not self.rows and self.path.is_file()
        if self._closed:
            rank_zero_info(f"{self.path} holds another process's run: this evaluation is not added to it")
        if not fits:
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, _Resume) and callback.table is self for callback in callbacks):
            callbacks.insert(0, _Resume(self))

    @rank_zero_only
    def begin(self, step: int) -> None:
        """Begin a run that is not resumed.

        Raises:
            UserError: The file holds the rows of a longer run, and `overwrite` does not say that they may go.
        """
        if self._resumed:
            return
        last = max(self.rows or self._read(math.inf), default=0)
        if self.overwrite and last > step:
            self.rows, self._columns, self._resumed = {}, {}, True
        elif last > step:
            raise UserError(
                f"{self.path} holds a run of {last} steps: resume it with ckpt_path, give another folder, or replace "
                "it with MetricsCSV(..., overwrite=True)"
            )

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if self._closed:
            return
        if step is None:
            step = max(self.rows, default=0) if self._trainer is None else self._trainer.global_step
        numbers = {name: number for name, value in metrics.items() if (number := _number(value)) is not None}
        if len(numbers) < len(metrics) and not self._warned:
            self._warned = True
            left = next(name for name in metrics if name not in numbers)
            rank_zero_warn(f"{self.path} holds numbers: {left!r}, and what else is none, is left out of it")
        numbers.pop("epoch", None)
        self._add(step, numbers)
        self._dirty = True
        if step <= self._checkpointed:
            self._write()
        else:
            self.save()  # Lightning itself asks for it only when training is about to stop

    def _add(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.setdefault(step, {}).update(values)
        self._columns.update(dict.fromkeys(values))

    def resume(self, step: float) -> None:
        """Take up the file of an interrupted run, up to `step`: the rows behind it are about to be redone.

        Only the first call counts; what has been logged by then stays. The file itself is not touched.
        """
        if self._resumed or not self.path.is_file():
            return
        self._resumed, logged = True, self.rows
        self.rows = {}
        for source in (self._read(step), logged):
            for at, values in source.items():
                self._add(at, values)

    def _read(self, until: float) -> dict[int, dict[str, float]]:
        """The rows of the file up to a step; none without a file."""
        if not self.path.is_file():
            return {}
        rows: dict[int, dict[str, float]] = {}
        try:
            with self.path.open(newline="") as handle:
                for row in csv.DictReader(handle):
                    values = {name: float(value) for name, value in row.items() if name != STEP and value != ""}
                    if int(row[STEP]) <= until:
                        rows[int(row[STEP])] = values
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(
                f"{self.path} is no table of metrics ({error!r}): restore it, or move it away and resume without it"
            ) from None
        return rows

    @override
    @rank_zero_only
    def save(self) -> None:
        if self._dirty and time.monotonic() - self._written >= max(self.seconds, _PATIENCE * self._took):
            self._write()

    @override
    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Write at once, and so whatever is still logged at the checkpoint's step: no resumed run logs it again."""
        self._checkpointed = getattr(checkpoint_callback, "_last_global_step_saved", -1)
        if self._dirty:
            self._write()

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._dirty:
            self._write()

    def _write(self) -> None:
        begun = time.monotonic()
        self.resume(math.inf)  # nothing is written from an empty memory
        self._resumed = True
        columns = sorted(self._columns)
        # Unsynchronised: a write must not wait for the disk.
        with replacing(self.path, sync=False) as partial, partial.open("w", newline="") as handle:
            writer = csv.writer(handle)
            writer.writerow([STEP, *columns])
            writer.writerows(
                [step, *(row.get(name, "") for name in columns)] for step, row in sorted(self.rows.items())
            )
        self._written = time.monotonic()
        self._took = self._written - begun
        self._dirty = False


def _number(value: Any) -> float | None:
    """A value as a number; None for a text, a picture, a tensor of several."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return None
