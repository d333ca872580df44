"""What a report on runs of residues shows: its sections, as `sections.yaml` has them, and every table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mini_gpt_pl.arithmetic.study import commutators, multitask, onsets, paths
from mini_gpt_pl.arithmetic.study.claims import claims_table, findings
from mini_gpt_pl.arithmetic.study.figures import COMPARISON_FIGURES, FIGURES
from mini_gpt_pl.arithmetic.study.moments import fourier_runs, marker_runs, marker_table, moment_tables
from mini_gpt_pl.arithmetic.study.overlaps import overlap_sections
from mini_gpt_pl.arithmetic.study.runs import ResidueRun, distinct, generalised, residue_facts, residue_runs
from mini_gpt_pl.report.contents import Contents, Plate, sections
from mini_gpt_pl.report.general import PATH_SECTIONS, general_tables
from mini_gpt_pl.report.sheet import Table
from mini_gpt_pl.runs.folder import Run

_OF_RUN: tuple[Callable[[ResidueRun], Table], ...] = (
    *(paths.milestones, paths.pc1, paths.quantiles, paths.components, paths.initial_weights, paths.persistence),
    *(commutators.defect, commutators.projections),
)
"""Tables of a run that was evaluated on both sets."""
_OF_DRAWS: tuple[Callable[[Sequence[ResidueRun]], Table], ...] = (
    *(paths.seed_by_seed, paths.pc1_to_the_stop, paths.pc1_in_windows, paths.persistence_of_runs),
    *(onsets.onsets, onsets.rules, onsets.rates, onsets.discrimination),
    *(commutators.defect_at_grok, commutators.last_defects, commutators.projections_of_runs),
)
"""Tables over such runs, one of each setting and seed."""


def run_tables(run: Run) -> list[Table]:
    """Every table of one run that its data allow."""
    tables = [table(one) for one in residue_runs([run]) for table in _OF_RUN]
    tables += [*marker_table(run), *multitask.multitask_tables(run), *paths.rank_tables(run), *overlap_sections([run])]
    return [table for table in (*tables, *moment_tables(run)) if not table.frame.empty]


def comparison_tables(runs: Sequence[Run]) -> list[Table]:
    """Every table that several runs allow."""
    everything = residue_runs(runs)
    tables: list[Table] = []
    if draws := distinct(everything):
        tables = [claims_table(runs), paths.overview(everything), *(table(draws) for table in _OF_DRAWS)]
    tables += [*multitask.multitask_claims(runs), *multitask.tasks_table(runs), *multitask.decay_table(runs)]
    tables += [*marker_runs(runs), *overlap_sections(runs), *fourier_runs(runs)]
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
