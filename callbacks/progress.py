"""The terminal while training runs: how far it is, and what the probes have found so far."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text
from typing_extensions import override

from mini_gpt_pl.callbacks.trajectory import TrajectoryRecorder
from mini_gpt_pl.runs.logs import logging_due

# Seconds between two drawings on a terminal, and between two lines where there is none.
_REDRAW, _LINE = 0.25, 60.0


class LiveNumbers(ProgressBar):
    """Progress on one line, and below it what the module shows on its progress bar and what the probes found last.

    The probes' part: PC1 of the recorded weights with its excess over the decaying walk, and the cosines of the latest
    gradient and of the latest increment with the past's backbone, each beside what chance gives. Where the output is no
    terminal, the same as plain lines, one after each evaluation and otherwise one a minute.

    The bar never waits for the device: numbers change when the trainer logs or evaluates, which waits anyway.

    Args:
        console: Where to; the terminal for None.

    Example:
        >>> trainer = Trainer(callbacks=[LiveNumbers()])
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._console = console or _terminal()
        self._enabled = True
        self._shown: dict[str, str] = {}
        self._live: Live | None = None
        self._bar: Progress | None = None
        self._drawn = self._begun = 0.0

    @override
    def disable(self) -> None:
        self._enabled = False

    @override
    def enable(self) -> None:
        self._enabled = True

    @override
    def print(self, *args: Any, **kwargs: Any) -> None:
        if self._enabled:
            self._console.print(*args, **kwargs)

    # ------------------------------------------------------------------------------------------------ hooks

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._enabled:
            return
        self._begun = self._drawn = time.monotonic()
        if self._console.is_terminal:
            self._open(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._enabled:
            return
        if trainer.global_step and logging_due(trainer, trainer.global_step):
            self._read(trainer)
        if time.monotonic() - self._drawn >= (_REDRAW if self._live else _LINE):
            self._draw(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._enabled and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._read(trainer)
            self._draw(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._enabled and self._live is not None:
            self._read(trainer)
            self._draw(trainer)
        self._close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    # ---------------------------------------------------------------------------------------------- drawing

    def _open(self, trainer: Trainer) -> None:
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(None, table_column=Column(ratio=1)))
        self._bar = Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), expand=True)
        total = _total_steps(trainer)
        self._bar.add_task("fit", total=None if math.isinf(total) else total, completed=trainer.global_step)
        # Drawn by hand: a thread that redraws would take the interpreter from training at its own times.
        self._live = Live(self._bar, console=self._console, auto_refresh=False)
        self._live.start()

    def _read(self, trainer: Trainer) -> None:
        module = {_short(name): f"{value:.3f}" for name, value in trainer.progress_bar_metrics.items()}
        self._shown = {**module, **found(trainer)}

    def _draw(self, trainer: Trainer) -> None:
        self._drawn = time.monotonic()
        numbers = "  ".join(f"{name} {value}" for name, value in self._shown.items())
        if self._live is None or self._bar is None:
            spent = time.strftime("%H:%M:%S", time.gmtime(self._drawn - self._begun))
            line = f"step {trainer.global_step}/{_total_steps(trainer):.0f}  {spent}  {numbers}"
            self._console.print(line, highlight=False, soft_wrap=True)
            return
        self._bar.update(self._bar.task_ids[0], completed=trainer.global_step)
        self._live.update(Group(self._bar, Text(numbers)), refresh=True)

    def _close(self) -> None:
        if self._live is not None:
            self._live.stop()
        self._live = self._bar = None


def _terminal() -> Console:
    """The terminal; in a notebook plain lines, as a cell cannot be redrawn line by line."""
    console = Console()
    return Console(force_jupyter=False, force_terminal=False) if console.is_jupyter else console


def found(trainer: Trainer) -> dict[str, str]:
    """Write what the probes have found last, as short as it goes, each number beside its null.

    Returns:
        By label; what has not been measured is left out, and all of it where nothing is recorded.
    """
    recorder = next((c for c in trainer.callbacks if isinstance(c, TrajectoryRecorder)), None)  # type: ignore[attr-defined]
    if recorder is None:
        return {}
    numbers = trainer.callback_metrics
    shown: dict[str, str] = {}
    pc1 = _values(numbers, f"backbone/{recorder.name}/pc1", f"backbone/{recorder.name}/pc1_excess")
    if pc1 is not None:
        shown["PC1"] = f"{pc1[0]:.1%} ({100 * pc1[1]:+.1f} over its null)"
    gradient = _values(numbers, f"alignment/{recorder.name}/gradient", f"alignment/{recorder.name}/gradient_z")
    if gradient is not None:
        shown["cos(g,v_b)"] = f"{gradient[0]:+.4f} ({gradient[1]:.1f} x chance)"
    update = _values(numbers, f"alignment/{recorder.name}/update", f"alignment/{recorder.name}/update_null")
    if update is not None:
        shown["cos(d,v_b)"] = f"{update[0]:+.3f} (null {update[1]:+.3f})"
    return shown


def _values(numbers: Mapping[str, Any], *names: str) -> tuple[float, ...] | None:
    values = tuple(float(numbers[name]) for name in names if name in numbers)
    return values if len(values) == len(names) and not any(map(math.isnan, values)) else None


def _short(name: str) -> str:
    """Leave out a metric's family where that leaves no doubt: a loss is one of several."""
    family, _, quantity = name.rpartition("/")
    return quantity if family and quantity != "loss" else name


def _total_steps(trainer: Trainer) -> float:
    return trainer.max_steps if trainer.max_steps > 0 else float(trainer.estimated_stepping_batches)
