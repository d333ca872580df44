"""What a report on runs of modular arithmetic is made of."""

from __future__ import annotations

from mini_gpt_pl.arithmetic.study.claims import findings
from mini_gpt_pl.arithmetic.study.comparison import comparison_tables
from mini_gpt_pl.arithmetic.study.facts import residue_facts
from mini_gpt_pl.arithmetic.study.figures import FIGURES
from mini_gpt_pl.arithmetic.study.runs import generalised
from mini_gpt_pl.arithmetic.study.sections import (
    COMPARISON_SECTIONS,
    RUN_SECTIONS,
    more_of_run,
    more_of_runs,
)
from mini_gpt_pl.arithmetic.study.tables import run_tables
from mini_gpt_pl.report.contents import Contents, Plate
from mini_gpt_pl.report.general import general_tables

CONTENTS = Contents(
    RUN_SECTIONS,
    lambda run: run_tables(run) + more_of_run(run) + general_tables(run),
    COMPARISON_SECTIONS,
    lambda runs: comparison_tables(runs) + more_of_runs(runs),
    findings,
    Plate("learning", FIGURES["grokking_learning"], "accuracies and ‖θ‖, and below its commutators."),
    facts=residue_facts,
    learned=generalised,
    closing={},
)
