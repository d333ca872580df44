"""What a report on runs of stories is made of."""

from __future__ import annotations

from mini_gpt_pl.report.contents import Contents
from mini_gpt_pl.report.findings import findings
from mini_gpt_pl.report.sections import Plate
from mini_gpt_pl.stories.study.comparison import comparison_tables
from mini_gpt_pl.stories.study.sections import COMPARISON_SECTIONS, RUN_FIGURES, RUN_SECTIONS
from mini_gpt_pl.stories.study.tables import run_tables

CONTENTS = Contents(
    RUN_SECTIONS,
    run_tables,
    COMPARISON_SECTIONS,
    comparison_tables,
    findings,
    Plate("backbone", RUN_FIGURES["backbone"], "backbone and residual, with p_ood behind."),
)
