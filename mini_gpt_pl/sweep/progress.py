"""What a sweep shows: its running points while they run, and one table of all points."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.runs.folder import METRICS
from mini_gpt_pl.sweep.points import PointRun, State

VAL_LOSS, P_OOD = "val/loss", "probe/p_ood"
_STYLE: dict[str, str] = {"finished": "green", "diverged": "yellow", "failed": "red", "running": "cyan"}


@dataclass(frozen=True)
class Reading:
    """Where a run is, by its table of metrics.

    Args:
        step: Last optimizer step that it told of; 0 before.
        val_loss: Last validation loss, in nats per token; NaN before one.
        p_ood: Last probe accuracy at long gaps; NaN before one.
        best: Best probe accuracy at long gaps.
    """

    step: int = 0
    val_loss: float = math.nan
    p_ood: float = math.nan
    best: float = math.nan

    @classmethod
    def of(cls, folder: Path) -> Reading:
        """Read the few columns that are shown; a run that told of nothing yet is at step 0."""
        try:
            wanted = ("step", VAL_LOSS, P_OOD)
            table = pd.read_csv(folder / METRICS, usecols=lambda name: name in wanted, index_col="step")
        except (OSError, ValueError):
            return cls()
        loss, accuracy = (table[name].dropna() if name in table else pd.Series(dtype=float) for name in wanted[1:])
        return cls(
            step=int(table.index.max()) if len(table) else 0,
            val_loss=float(loss.iloc[-1]) if len(loss) else math.nan,
            p_ood=float(accuracy.iloc[-1]) if len(accuracy) else math.nan,
            best=float(accuracy.max()) if len(accuracy) else math.nan,
        )


def planned_steps(run: PointRun) -> int | None:
    """Return the optimizer steps that a begun run is to take; None before it has begun, or without a limit."""
    try:
        config = run.run.config
    except UserError:
        return None
    steps = config.get("steps") or (config.get("trainer") or {}).get("max_steps")
    return steps if isinstance(steps, int) and steps > 0 else None


class Display:
    """A line for each point begun and ended; on a terminal, a bar for each running point instead.

    Args:
        console: Where to.
        total: Points to run.
    """

    def __init__(self, console: Console, total: int) -> None:
        self.console = console
        self.total = total
        self._done = 0
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[told]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._all = self._bars.add_task("all points", total=total, told=f"0/{total}")
        self._running: dict[str, tuple[PointRun, TaskID]] = {}
        self._seen: dict[Path, float] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        for _, task in self._running.values():
            self._bars.remove_task(task)
        self._bars.stop()

    def begun(self, run: PointRun, device: str | None = None, *, resumed: bool = False) -> None:
        """A run has begun, or goes on."""
        where = "" if device is None else f" on GPU {device}"
        if self._bars.disable:
            self._say(f"{'resumed' if resumed else 'begun':<9} {run.name}{where}: {run.folder}")
        task = self._bars.add_task(escape(f"{run.name}{where}"), total=None, told="starting")
        self._running[run.name] = (run, task)

    def ended(self, run: PointRun, state: State) -> None:
        """A run has ended."""
        self._bars.remove_task(self._running.pop(run.name)[1])
        self._advance()
        record = run.record
        failure = f": {record.failure}" if record is not None and record.failure else ""
        seconds = f", {record.seconds:.0f} s" if record is not None else ""
        self._say(f"{state:<9} {run.name}: {_told(Reading.of(run.folder), None)}{seconds}{failure}")

    def passed(self, run: PointRun) -> None:
        """A run is another process's work."""
        self._advance()
        self._say(f"{run.state:<9} {run.name}: passed over, another process took it")

    def update(self) -> None:
        """Move the bars of the runs that wrote something."""
        if self._bars.disable:
            return
        for run, task in self._running.values():
            file = run.folder / METRICS
            written = file.stat().st_mtime if file.is_file() else 0.0
            if written and written != self._seen.get(file):
                self._seen[file] = written
                reading, steps = Reading.of(run.folder), planned_steps(run)
                self._bars.update(task, completed=reading.step, total=steps, told=_told(reading, steps))

    def _advance(self) -> None:
        self._done += 1
        self._bars.update(self._all, completed=self._done, told=f"{self._done}/{self.total}")

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _told(reading: Reading, steps: int | None) -> str:
    parts = [f"step {reading.step}{f'/{steps}' if steps else ''}"]
    parts += [f"val/loss {reading.val_loss:.3f}"] if reading.val_loss == reading.val_loss else []
    parts += [f"p_ood {reading.p_ood:.3f}"] if reading.p_ood == reading.p_ood else []
    return ", ".join(parts)


def table(runs: Sequence[PointRun], title: str) -> Table:
    """Return the table of all points: state, last step and validation loss, best p_ood, seconds."""
    shown = Table(title=escape(title), title_justify="left")
    shown.add_column("point", overflow="fold")
    shown.add_column("state")
    for column in ("step", VAL_LOSS, "best p_ood", "seconds"):
        shown.add_column(column, justify="right")
    for run in runs:
        reading, record, state = Reading.of(run.folder), run.record, run.state
        shown.add_row(
            escape(run.name),
            f"[{_STYLE[state]}]{state}" if state in _STYLE else state,
            str(reading.step) if reading.step else "-",
            _number(reading.val_loss),
            _number(reading.best),
            f"{record.seconds:.0f}" if record is not None and record.seconds else "-",
        )
    return shown


def counts(states: Iterable[State]) -> str:
    """Return how many points are in which state, in words."""
    known: Callable[[State], int] = list(states).count
    order: tuple[State, ...] = ("finished", "diverged", "running", "broken off", "failed", "new")
    return ", ".join(f"{n} {state}" for state in order if (n := known(state)))


def _number(value: float) -> str:
    return f"{value:.3f}" if value == value else "-"
