"""What a sweep shows: its running points while they run, and one table of all points."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.metrics.registry import Metric, data, find
from mini_gpt_pl.runs.folder import METRICS, Run
from mini_gpt_pl.sweep.points import PointRun, State

_STYLE: dict[str, str] = {"finished": "green", "diverged": "yellow", "failed": "red", "running": "cyan"}


@dataclass(frozen=True)
class Reading:
    """Where a run is, by its table of metrics.

    Args:
        step: Last optimizer step in it; 0 before.
        last: Last value of each outcome that was logged, by its name.
        best: Best value of those whose best is the largest.
    """

    step: int = 0
    last: Mapping[str, float] = field(default_factory=dict)
    best: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> Reading:
        """Read the table; a run without any row is at step 0."""
        run = Run(folder)
        try:
            table = run.metrics
        except UserError:
            return cls()
        last = {name: run.last(name) for name in outcomes() if len(run.series(name))}
        best = {name: float(run.series(name).max()) for name in last if outcomes()[name].best == "max"}
        return cls(int(table.index.max()) if len(table) else 0, last, best)

    def write(self, steps: int | None) -> str:
        """Step, of so many `steps` if that is on record, and last values on one line."""
        values = [f"{_label(name)} {outcomes()[name].write(value)}" for name, value in self.last.items()]
        return ", ".join([f"step {self.step}{f'/{steps}' if steps else ''}", *values])


@cache
def outcomes() -> dict[str, Metric]:
    """The metrics that a sweep compares its runs by, by name: those that any run may have without a probe."""
    listed = [name for name in data()["sweep"]["outcomes"] if "{" not in name]
    return {name: metric for name in listed if (metric := find(name)) is not None}


def _label(name: str) -> str:
    return outcomes()[name].column or name


def planned_steps(run: PointRun) -> int | None:
    """Optimizer steps that a run is to take; None before it has begun, or without a limit."""
    try:
        config = run.run.config
    except UserError:
        return None
    steps = config.get("steps") or (config.get("trainer") or {}).get("max_steps")
    return steps if isinstance(steps, int) and steps > 0 else None


class Display:
    """A line for each of `total` points that begins or ends; on a terminal, a bar for each running point instead."""

    def __init__(self, console: Console, total: int) -> None:
        self.console = console
        self.total = total
        self._done = 0
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[numbers]}"))
        self._bars = Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal)
        self._all = self._bars.add_task("all points", total=total, numbers=f"0/{total}")
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
        """Show that a run has begun, or goes on."""
        where = "" if device is None else f" on GPU {device}"
        if self._bars.disable:
            self._say(f"{'resumed' if resumed else 'begun':<9} {run.name}{where}: {run.folder}")
        task = self._bars.add_task(escape(f"{run.name}{where}"), total=None, numbers="starting")
        self._running[run.name] = (run, task)

    def ended(self, run: PointRun, state: State) -> None:
        """Show that a run has ended."""
        self._bars.remove_task(self._running.pop(run.name)[1])
        record = run.record
        failure = f": {record.failure}" if record is not None and record.failure else ""
        seconds = f", {record.seconds:.0f} s" if record is not None else ""
        self._one_less(f"{state:<9} {run.name}: {Reading.of(run.folder).write(None)}{seconds}{failure}")

    def passed(self, run: PointRun) -> None:
        """Show that another process runs a point."""
        self._one_less(f"{run.state:<9} {run.name}: passed over, another process took it")

    def update(self) -> None:
        """Move the bars of the runs that wrote something."""
        for run, task in () if self._bars.disable else self._running.values():
            file = run.folder / METRICS
            written = file.stat().st_mtime if file.is_file() else 0.0
            if written and written != self._seen.get(file):
                self._seen[file] = written
                reading, steps = Reading.of(run.folder), planned_steps(run)
                self._bars.update(task, completed=reading.step, total=steps, numbers=reading.write(steps))

    def _one_less(self, line: str) -> None:
        self._done += 1
        self._bars.update(self._all, completed=self._done, numbers=f"{self._done}/{self.total}")
        self._say(line)

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def table(runs: Sequence[PointRun], title: str) -> Table:
    """Return the table of all points: state, last step, last value or largest of each outcome, seconds."""
    readings = [Reading.of(run.folder) for run in runs]
    logged = {name: metric for name, metric in outcomes().items() if any(name in one.last for one in readings)}
    headers = [f"best {_label(name)}" if metric.best == "max" else _label(name) for name, metric in logged.items()]
    shown = Table(title=Text(title), title_justify="left")
    shown.add_column("point", overflow="fold")
    shown.add_column("state")
    for column in ("step", *headers, "seconds"):
        shown.add_column(column, justify="right")
    for run, reading in zip(runs, readings, strict=True):
        record, state, values = run.record, run.state, {**reading.last, **reading.best}
        shown.add_row(
            Text(run.name),
            Text(state, style=_STYLE.get(state, "")),
            str(reading.step) if reading.step else "-",
            *(metric.write(values[name]) if name in values else "-" for name, metric in logged.items()),
            f"{record.seconds:.0f}" if record is not None and record.seconds else "-",
        )
    return shown


def counts(states: Iterable[State]) -> str:
    """Return how many points are in which state, in words."""
    every = list(states)
    order: tuple[State, ...] = ("finished", "diverged", "running", "broken off", "failed", "new")
    return ", ".join(f"{n} {state}" for state in order if (n := every.count(state)))
