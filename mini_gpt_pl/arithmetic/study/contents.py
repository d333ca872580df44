"""What a report on runs of modular arithmetic is made of."""

from __future__ import annotations

from mini_gpt_pl.arithmetic.study.claims import grokking_findings
from mini_gpt_pl.arithmetic.study.comparison import grokking_comparison
from mini_gpt_pl.arithmetic.study.figures import GROKKING_FIGURES
from mini_gpt_pl.arithmetic.study.sections import (
    GROKKING_COMPARISON_SECTIONS,
    GROKKING_RUN_SECTIONS,
    more_of_run,
    more_of_runs,
)
from mini_gpt_pl.arithmetic.study.tables import grokking_tables
from mini_gpt_pl.report.contents import Contents
from mini_gpt_pl.report.sections import Plate
from mini_gpt_pl.stories.study.tables import run_tables

CONTENTS = Contents(
    GROKKING_RUN_SECTIONS,
    lambda run: grokking_tables(run) + more_of_run(run) + run_tables(run),
    GROKKING_COMPARISON_SECTIONS,
    lambda runs: grokking_comparison(runs) + more_of_runs(runs),
    grokking_findings,
    Plate("learning", GROKKING_FIGURES["grokking_learning"], "accuracies and ‖θ‖, and below its commutators."),
)
