"""What a report on runs of residues shows: its sections, as `sections.yaml` has them, and every table."""

from __future__ import annotations

from collections.abc import Sequence

from mini_gpt_pl.arithmetic.study.claims import claims_table, findings
from mini_gpt_pl.arithmetic.study.commutators import commutator_comparison, commutator_tables
from mini_gpt_pl.arithmetic.study.figures import COMPARISON_FIGURES, FIGURES
from mini_gpt_pl.arithmetic.study.moments import fourier_runs, marker_runs, marker_table, moment_tables
from mini_gpt_pl.arithmetic.study.multitask import multitask_comparison, multitask_tables
from mini_gpt_pl.arithmetic.study.onsets import onset_comparison
from mini_gpt_pl.arithmetic.study.overlaps import overlap_sections
from mini_gpt_pl.arithmetic.study.paths import overview, path_comparison, path_tables, rank_tables
from mini_gpt_pl.arithmetic.study.runs import distinct, generalised, residue_facts, residue_runs
from mini_gpt_pl.report.contents import Contents, Plate, sections
from mini_gpt_pl.report.general import PATH_SECTIONS, general_tables
from mini_gpt_pl.report.sheet import Table
from mini_gpt_pl.runs.folder import Run


def run_tables(run: Run) -> list[Table]:
    """Every table of one run that its data allow; the first ones are of runs that were evaluated on both sets."""
    tables = [table for one in residue_runs([run]) for table in (*path_tables(one), *commutator_tables(one))]
    tables += [*marker_table(run), *multitask_tables(run), *rank_tables(run), *overlap_sections([run])]
    return [table for table in (*tables, *moment_tables(run)) if not table.frame.empty]


def comparison_tables(runs: Sequence[Run]) -> list[Table]:
    """Every table that several runs allow."""
    everything = residue_runs(runs)
    tables: list[Table] = []
    if draws := distinct(everything):
        tables = [claims_table(runs), overview(everything), *path_comparison(draws)]
        tables += [*onset_comparison(draws), *commutator_comparison(draws)]
    tables += [*multitask_comparison(runs), *marker_runs(runs), *overlap_sections(runs), *fourier_runs(runs)]
    return [table for table in tables if not table.frame.empty]


CONTENTS = Contents(
    sections(__package__, "run", FIGURES) + PATH_SECTIONS,
    lambda run: run_tables(run) + general_tables(run),
    sections(__package__, "comparison", COMPARISON_FIGURES),
    comparison_tables,
    findings,
    Plate("learning", FIGURES["grokking_learning"], "accuracies and ‖θ‖, and below its commutators."),
    facts=residue_facts,
    learned=generalised,
    closing={},
)
