"""How far a long command is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Steps:
    """Count the steps of a command, one after the other.

    Args:
        console: Where to; a bar if it is a terminal, else a line for each step.

    Example:
        >>> with Steps(Console()) as steps:
        ...     steps.expect(1)
        ...     steps.begin("figure backbone")
        1/1 figure backbone
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._total = self._begun = 0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self._task = None if self._bar is None else self._bar.add_task("report", total=None)

    def __enter__(self) -> Steps:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def expect(self, total: int) -> None:
        """Say how many steps there are."""
        self._total = total

    def begin(self, what: str) -> None:
        """Begin the next step; the ones before are done."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=what, completed=self._begun, total=self._total)
        self._begun += 1
        if self._bar is None:
            self._console.print(f"{self._begun}/{self._total} {what}", highlight=False, soft_wrap=True)
