"""What a report on any run shows: what it logged under its own names, its settings, and its path beside the nulls."""

from __future__ import annotations

from collections.abc import Sequence

from mini_gpt_pl.report.comparison import general_comparison
from mini_gpt_pl.report.contents import Contents, Plate, Section, sections
from mini_gpt_pl.report.figures import RUN_FIGURES
from mini_gpt_pl.report.findings import findings
from mini_gpt_pl.report.learning import learned, learning_table
from mini_gpt_pl.report.overlays import overview
from mini_gpt_pl.report.path_tables import path_tables
from mini_gpt_pl.report.probe_tables import probe_tables
from mini_gpt_pl.report.published import NOTHING, Beside
from mini_gpt_pl.report.sheet import Table
from mini_gpt_pl.report.subject import Subject
from mini_gpt_pl.runs.folder import Run

_PACKAGE = "mini_gpt_pl.report.assets"
PATH_SECTIONS: tuple[Section[Run], ...] = sections(_PACKAGE, "path", RUN_FIGURES)
"""Sections of any run's path and probes."""
COMPARISON_SECTIONS: tuple[Section[Sequence[Run]], ...] = sections(_PACKAGE, "runs", {"overview": overview})


def general_tables(run: Run, beside: Beside = NOTHING) -> list[Table]:
    """Make every table of a run's path and probes that its data allow, beside a published run if there is one."""
    subject = Subject.of(run)
    return path_tables(subject, beside) + probe_tables(subject, beside)


GENERAL = Contents(
    of_run=(*sections(_PACKAGE, "learning", RUN_FIGURES), *PATH_SECTIONS),
    run_tables=lambda run: learning_table(Subject.of(run)) + general_tables(run),
    of_runs=COMPARISON_SECTIONS,
    comparison=general_comparison,
    findings=findings,
    entry=Plate("backbone", RUN_FIGURES["backbone"], "backbone and residual."),
    learned=learned,
)
"""Of a run of no listed task, such as one of a Trainer of somebody's own."""
