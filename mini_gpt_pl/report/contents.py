"""What a report is made of, by the task that its runs were trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mini_gpt_pl.report.comparison import comparison_tables
from mini_gpt_pl.report.findings import Finding, findings
from mini_gpt_pl.report.grokking_claims import grokking_findings
from mini_gpt_pl.report.grokking_comparison import grokking_comparison
from mini_gpt_pl.report.grokking_figures import GROKKING_FIGURES
from mini_gpt_pl.report.grokking_sections import (
    GROKKING_COMPARISON_SECTIONS,
    GROKKING_RUN_SECTIONS,
    more_of_run,
    more_of_runs,
)
from mini_gpt_pl.report.grokking_tables import grokking_tables
from mini_gpt_pl.report.sections import COMPARISON_SECTIONS, RUN_FIGURES, RUN_SECTIONS, Plate, Section
from mini_gpt_pl.report.tables import Table, run_tables
from mini_gpt_pl.runs import Run


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


_STORIES = Contents(
    RUN_SECTIONS,
    run_tables,
    COMPARISON_SECTIONS,
    comparison_tables,
    findings,
    Plate("backbone", RUN_FIGURES["backbone"], "backbone and residual, with p_ood behind."),
)
_RESIDUES = Contents(
    GROKKING_RUN_SECTIONS,
    lambda run: grokking_tables(run) + more_of_run(run) + run_tables(run),
    GROKKING_COMPARISON_SECTIONS,
    lambda runs: grokking_comparison(runs) + more_of_runs(runs),
    grokking_findings,
    Plate("learning", GROKKING_FIGURES["grokking_learning"], "accuracies and ‖θ‖, and below its commutators."),
)


def contents_of(runs: Sequence[Run]) -> Contents:
    """Contents for runs of one task."""
    return _STORIES if runs[0].task == "stories" else _RESIDUES
