"""What a report on runs of the second task shows, in which order."""

from __future__ import annotations

from collections.abc import Sequence

from mini_gpt_pl.arithmetic.study.attention import attention_tables
from mini_gpt_pl.arithmetic.study.decay import decay_table
from mini_gpt_pl.arithmetic.study.figures import COMPARISON_FIGURES, FIGURES
from mini_gpt_pl.arithmetic.study.fourier import fourier_runs, fourier_table
from mini_gpt_pl.arithmetic.study.markers import marker_runs, marker_table
from mini_gpt_pl.arithmetic.study.multitask import multitask_tables, tasks_table
from mini_gpt_pl.arithmetic.study.multitask_claims import multitask_claims
from mini_gpt_pl.arithmetic.study.overlaps import overlap_sections
from mini_gpt_pl.arithmetic.study.ranks import rank_tables
from mini_gpt_pl.report.contents import Section, plates
from mini_gpt_pl.report.general import PATH_SECTIONS
from mini_gpt_pl.report.sheet import Table
from mini_gpt_pl.runs.folder import Run

_OVERLAPS = (
    "One subspace, or many?",
    "Principal angles between the paths of layers and of runs, beside decaying walks from the same weights.",
)
_TASKS = (
    "Tasks and weight decay",
    "When each task on a shared trunk generalises, what their batches do to one another, and what decay changes.",
)
_FOURIER = (
    "Which frequencies the weights hold",
    "Fourier power over the residues of the embedding, of its products with attention matrices, and of the head.",
)


def more_of_run(run: Run) -> list[Table]:
    """Tables of one run that its probes, its snapshots or its task add to those of every run."""
    tables = marker_table(run) + multitask_tables(run) + rank_tables(run) + overlap_sections([run])
    return tables + fourier_table(run) + attention_tables(run)


def more_of_runs(runs: Sequence[Run]) -> list[Table]:
    """The same over several runs."""
    tables = multitask_claims(runs) + tasks_table(runs) + decay_table(runs) + marker_runs(runs)
    return tables + overlap_sections(runs) + fourier_runs(runs)


RUN_SECTIONS: tuple[Section[Run], ...] = (
    Section(
        "generalisation",
        "Memorisation and generalisation",
        "When the training set was learned and when the test set followed; the studies call four different steps the "
        "grok step.",
        plates(
            FIGURES,
            grokking_learning="Accuracies and ‖θ‖; below, the defect D, the gradient's length and the forms of the "
            "defect without it. Dotted: where the phases end.",
        ),
        ("grokking_milestones", "grokking_markers"),
    ),
    Section(
        "paths",
        "PC1, and where the run was cut",
        "Centred PCA of each attention matrix, as published, over the run to its stop and over each phase, beside five "
        "nulls; an excess names the null that it is over.",
        plates(
            FIGURES,
            grokking_pc1="Centred PC1 of every matrix (filled) beside its nulls.",
            grokking_growing_pc1="Centred PC1 of the path so far against the step at which it is cut, and of its "
            "nulls cut there. Dotted: 99 % of the training set, 90 % of the test set, and the stop.",
        ),
        (
            "grokking_pc1",
            "grokking_quantiles",
            "grokking_components",
            "grokking_theta0",
            "grokking_ranks",
            "grokking_turnover",
        ),
    ),
    Section("overlaps", *_OVERLAPS, (), ("grokking_overlaps",)),
    Section(
        "persistence",
        "Do successive steps agree?",
        "Correlations at lag 1 of increments and of innovations: unlike PC1 these are zero for every walk.",
        (),
        ("grokking_persistence",),
    ),
    Section(
        "commutators",
        "What the order of two batches changes",
        "The commutator defect in float64 beside the gradient's length, and where the commutator points.",
        (),
        ("grokking_defect", "grokking_projections"),
    ),
    Section("tasks", *_TASKS, (), ("grokking_tasks", "grokking_cross_task")),
    Section("fourier", *_FOURIER, (), ("grokking_fourier",)),
    Section(
        "attention",
        "Attention, and what steers it",
        "How concentrated attention is beside even attention, how little of it the answers need, and whether the "
        "path's directions move it more than random ones do.",
        (),
        ("grokking_attention*", "grokking_routing*"),
    ),
    *PATH_SECTIONS,
)

COMPARISON_SECTIONS: tuple[Section[Sequence[Run]], ...] = (
    Section(
        "claims",
        "What the studies say",
        "Each claim beside the same number of these runs and its null; the readings are computed.",
        (),
        ("grokking_claims",),
    ),
    Section(
        "runs",
        "The runs side by side",
        "When each run memorised and generalised, how far its PC1 then lies from decay, and its commutators.",
        plates(
            COMPARISON_FIGURES,
            grokking_curves="By operation; runs without weight decay are dashed. D has 1/‖g‖ in it, c has not.",
        ),
        ("grokking_runs", "grokking_seeds", "grokking_markers*"),
    ),
    Section(
        "paths",
        "PC1 of every matrix",
        "Up to each run's stop, as published, and over the same steps for all.",
        (),
        ("grokking_pc1*",),
    ),
    Section("overlaps", *_OVERLAPS, (), ("grokking_overlaps",)),
    Section(
        "persistence",
        "Do successive steps agree?",
        "Correlations at lag 1, over the same steps for all runs.",
        (),
        ("grokking_persistence*",),
    ),
    Section(
        "onset",
        "Onset and lead",
        "Onset of the defect by the published rule, beside rules on other series and placebo clocks.",
        (),
        ("grokking_onset*", "grokking_rates", "grokking_discrimination"),
    ),
    Section(
        "commutators",
        "Commutators",
        "The defect before and after generalisation, at the end, and where it points.",
        (),
        ("grokking_defect*", "grokking_last*", "grokking_projections*"),
    ),
    Section("tasks", *_TASKS, (), ("grokking_multitask_claims", "grokking_tasks*", "grokking_decay")),
    Section("fourier", *_FOURIER, (), ("grokking_fourier*",)),
)
