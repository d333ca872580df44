"""What a report is made of, by the task that its runs were trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mini_gpt_pl.report.findings import Finding
from mini_gpt_pl.report.sections import Plate, Section
from mini_gpt_pl.report.sheet import Table
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.tasks import tasks


@dataclass(frozen=True)
class Contents:
    """Sections, and what makes their tables.

    Args:
        of_run: Sections of a report on one run.
        run_tables: Tables of one run.
        of_runs: Sections of a report on several.
        comparison: Tables over several runs.
        findings: Sentences over several runs.
        entry: Figure of each of several runs.
    """

    of_run: tuple[Section[Run], ...]
    run_tables: Callable[[Run], list[Table]]
    of_runs: tuple[Section[Sequence[Run]], ...]
    comparison: Callable[[Sequence[Run]], list[Table]]
    findings: Callable[[Sequence[Run]], list[Finding]]
    entry: Plate[Run]


def contents_of(runs: Sequence[Run]) -> Contents:
    """Contents for runs of one task."""
    contents: Contents = tasks()[runs[0].task].report_contents
    return contents
