"""The terminal while training runs: how far it is, and the latest numbers of the module and of the probes."""

from __future__ import annotations

import math
import time
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
from mini_gpt_pl.metrics.registry import Metric, about, beside, data, find, metrics
from mini_gpt_pl.runs.logs import logging_due

# Seconds between two drawings on a terminal, and between two lines where there is none.
_REDRAW, _LINE = 0.25, 60.0


class LiveNumbers(ProgressBar):
    """Progress on one line, and below it what the module shows on its progress bar and the probes' latest numbers.

    The probes' part are the metrics that have a column in the registry: PC1 of the recorded weights with its excess
    over the decaying walk, and the cosines of the latest gradient and of the latest increment with the past's backbone,
    each beside what chance gives. A legend says once, at the start, what they are. Where the output is no terminal, the
    numbers are plain lines, one after each evaluation and otherwise one a minute.

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

    def __getstate__(self) -> dict[str, Any]:
        """All but what belongs to the terminal, which no other process has."""
        return {**self.__dict__, "_console": None, "_live": None, "_bar": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _console=_terminal())

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

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._enabled:
            return
        self._begun = self._drawn = time.monotonic()
        for line in legend(trainer):
            self._console.print(line, highlight=False, soft_wrap=True)
        if self._console.is_terminal:
            parts = (TextColumn("step"), MofNCompleteColumn(), BarColumn(None, table_column=Column(ratio=1)))
            self._bar = Progress(*parts, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), expand=True)
            total = _total_steps(trainer)
            self._bar.add_task("fit", total=None if math.isinf(total) else total, completed=trainer.global_step)
            # Drawn by hand: a thread that redraws would take the interpreter from training at its own times.
            self._live = Live(self._bar, console=self._console, auto_refresh=False)
            self._live.start()

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
            self._draw(trainer, read=True)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._enabled and self._live is not None:
            self._draw(trainer, read=True)
        self._close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _read(self, trainer: Trainer) -> None:
        module = {_short(name): f"{value:.3f}" for name, value in trainer.progress_bar_metrics.items()}
        self._shown = {**module, **columns(trainer)}

    def _draw(self, trainer: Trainer, read: bool = False) -> None:
        if read:
            self._read(trainer)
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


def columns(trainer: Trainer) -> dict[str, str]:
    """Write the latest values of the metrics that have a column in the terminal, each beside its null, by header.

    What has not been measured is left out, and all of it where nothing is recorded.
    """
    logged = trainer.callback_metrics
    cells: dict[str, str] = {}
    for metric, name in _with_column(trainer):
        other = beside(name, logged, in_column=True)
        entry = None if other is None else find(other)
        if name not in logged or entry is None or other is None:
            continue
        value, null = float(logged[name]), float(logged[other])
        # The legend says that a difference of shares is in points.
        is_difference = entry.unit == "the quantity's"
        text = metric.write_difference(null).removesuffix(" pt") if is_difference else entry.write(null)
        if not math.isnan(value + null):
            cells[metric.column] = f"{metric.write(value)} ({entry.column.format(text)})"
    return cells


def legend(trainer: Trainer) -> list[str]:
    """Say what the columns of this trainer's probes are, one line each, in the registry's words."""
    lines = []
    for metric, name in _with_column(trainer):
        other = about(metric.column_beside or metric.beside, name)
        entry = find(other)
        unit = ", in points" if "%" in metric.format else ""
        more = "" if entry is None else f" In brackets, {entry.column.format('…')}{unit}: {entry.describe(other)}"
        lines.append(f"{metric.column}: {metric.describe(name)}{more}")
    return [*lines, f"v_b: {data()['symbols']['v_b']}."] if lines else []


def _with_column(trainer: Trainer) -> list[tuple[Metric, str]]:
    """The metrics with a column that one of the trainer's callbacks logs, and their names for the whole selection."""
    listed: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    recorder = next((callback for callback in listed if isinstance(callback, TrajectoryRecorder)), None)
    if recorder is None:
        return []
    sources = {kind.__name__ for callback in listed for kind in type(callback).__mro__}
    own = [metric for metric in metrics() if metric.column and metric.beside and "{}" not in metric.column]
    logged = [metric for metric in own if metric.source.rpartition(".")[2] in sources]
    return [(metric, metric.name.replace("{group}", recorder.name)) for metric in logged]


def _short(name: str) -> str:
    """Leave out a metric's family where that leaves no doubt: a loss is one of several."""
    family, _, quantity = name.rpartition("/")
    return quantity if family and quantity != "loss" else name


def _total_steps(trainer: Trainer) -> float:
    return trainer.max_steps if trainer.max_steps > 0 else float(trainer.estimated_stepping_batches)
