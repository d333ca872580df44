"""Metrics from the device to every logger, and the CSV that every run writes."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from typing_extensions import override

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


def resume_tables(trainer: Trainer) -> None:
    """Let the trainer's CSVs go on with the rows before the checkpoint that it resumes from."""
    for logger in trainer.loggers:
        if isinstance(logger, MetricsCSV):
            logger.resume(trainer.global_step)


# Times the last write's length that pass before the next one.
_PATIENCE = 200


class MetricsCSV(Logger):
    """One row per step, one column per metric; survives a crash, and a resumed run continues it.

    The file is rewritten whole and atomically, at most every few seconds, because columns appear as probes speak for
    the first time, and because a probe may report a step after later ones have been reported. A long table takes
    longer to write, and is written less often: writing takes half a percent of the time at most.

    Args:
        path: The file, `metrics.csv` in a run folder.
        seconds: Least time between two writes; the end of a run, however it ends, and checkpoints always write.
    """

    def __init__(self, path: Path | str, seconds: float = 5.0) -> None:
        super().__init__()
        self.path = Path(path)
        self.seconds = seconds
        self.rows: dict[int, dict[str, float]] = {}
        self._columns: dict[str, None] = {}
        self._written = 0.0
        self._took = 0.0
        self._dirty = False
        self._checkpointed = -1
        self._resumed = False

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

    @override
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the resolved config lies beside the CSV."""

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if step is None:
            raise ValueError("every row of the CSV belongs to a step")
        self._add(step, {name: float(value) for name, value in metrics.items() if name != "epoch"})
        self._dirty = True
        if step <= self._checkpointed:
            self._write()
        else:
            self.save()  # Lightning itself asks for it only when training is about to stop

    def _add(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.setdefault(step, {}).update(values)
        self._columns.update(dict.fromkeys(values))

    def resume(self, step: int) -> None:
        """Take up the file of an interrupted run, without the rows after `step`: those are about to be redone.

        Once is enough: whatever has been logged by then stands.
        """
        if self._resumed or not self.path.is_file():
            return
        self._resumed = True
        try:
            with self.path.open(newline="") as handle:
                for row in csv.DictReader(handle):
                    values = {name: float(value) for name, value in row.items() if name != STEP and value != ""}
                    if int(row[STEP]) <= step:
                        self._add(int(row[STEP]), values)  # not written: until something new is said, the file stands
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(
                f"{self.path} is no table of metrics ({error!r}): restore it, or move it away and resume without it"
            ) from None

    @override
    @rank_zero_only
    def save(self) -> None:
        if self._dirty and time.monotonic() - self._written >= max(self.seconds, _PATIENCE * self._took):
            self._write()

    @override
    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Write at once, and whatever is still said about the checkpoint's step: no resumed run will say it again."""
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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.partial")
        columns = sorted(self._columns)
        with partial.open("w", newline="") as handle:
            writer = csv.writer(handle)
            writer.writerow([STEP, *columns])
            writer.writerows(
                [step, *(row.get(name, "") for name in columns)] for step, row in sorted(self.rows.items())
            )
        os.replace(partial, self.path)
        self._written = time.monotonic()
        self._took = self._written - begun
        self._dirty = False
