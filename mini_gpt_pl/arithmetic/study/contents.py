"""What a report on runs of modular arithmetic is made of."""

from __future__ import annotations

from mini_gpt_pl.arithmetic.study.claims import grokking_findings
from mini_gpt_pl.arithmetic.study.comparison import grokking_comparison
from mini_gpt_pl.arithmetic.study.facts import residue_facts
from mini_gpt_pl.arithmetic.study.figures import GROKKING_FIGURES
from mini_gpt_pl.arithmetic.study.runs import generalised
from mini_gpt_pl.arithmetic.study.sections import (
    GROKKING_COMPARISON_SECTIONS,
    GROKKING_RUN_SECTIONS,
    more_of_run,
    more_of_runs,
)
from mini_gpt_pl.arithmetic.study.tables import grokking_tables
from mini_gpt_pl.report.contents import Contents, Plate
from mini_gpt_pl.report.general import general_tables

CONTENTS = Contents(
    GROKKING_RUN_SECTIONS,
    lambda run: grokking_tables(run) + more_of_run(run) + general_tables(run),
    GROKKING_COMPARISON_SECTIONS,
    lambda runs: grokking_comparison(runs) + more_of_runs(runs),
    grokking_findings,
    Plate("learning", GROKKING_FIGURES["grokking_learning"], "accuracies and ‖θ‖, and below its commutators."),
    facts=residue_facts,
    learned=generalised,
    closing={},
)
