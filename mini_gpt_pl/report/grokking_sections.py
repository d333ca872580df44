"""What a report on runs of the second task shows, in which order."""

from __future__ import annotations

from collections.abc import Sequence

from mini_gpt_pl.report.grokking_figures import GROKKING_COMPARISON_FIGURES, GROKKING_FIGURES
from mini_gpt_pl.report.sections import RUN_SECTIONS, Section, plates
from mini_gpt_pl.runs import Run

_OF_STORIES = ("learning", "switching", "logit-lens", "reheating")

GROKKING_RUN_SECTIONS: tuple[Section[Run], ...] = (
    Section(
        "generalisation",
        "Memorisation and generalisation",
        "When the training set was learned and when the test set followed; the studies call four different steps the "
        "grok step.",
        plates(
            GROKKING_FIGURES,
            grokking_learning="Accuracies and ‖θ‖; below, the defect D, the gradient's length and the forms of the "
            "defect without it. Dotted: where the phases end.",
        ),
        ("grokking_milestones",),
    ),
    Section(
        "paths",
        "PC1, and where the run was cut",
        "Centred PCA of each attention matrix, as published, over the run to its stop and over each phase, beside five "
        "nulls; an excess names the null that it is over.",
        plates(
            GROKKING_FIGURES,
            grokking_pc1="Centred PC1 of every matrix (filled) beside its nulls.",
            grokking_growing_pc1="Centred PC1 of the path so far against the step at which it is cut, and of its "
            "nulls cut there. Dotted: 99 % of the training set, 90 % of the test set, and the stop.",
        ),
        ("grokking_pc1", "grokking_quantiles", "grokking_components", "grokking_theta0"),
    ),
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
    *(section for section in RUN_SECTIONS if section.anchor not in _OF_STORIES),
)

GROKKING_COMPARISON_SECTIONS: tuple[Section[Sequence[Run]], ...] = (
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
        "When each run memorised and generalised, and its commutators.",
        plates(
            GROKKING_COMPARISON_FIGURES,
            grokking_curves="By operation; runs without weight decay are dashed. D has 1/‖g‖ in it, c has not.",
        ),
        ("grokking_runs",),
    ),
    Section(
        "paths",
        "PC1 of every matrix",
        "Up to each run's stop, as published, and over the same steps for all.",
        (),
        ("grokking_pc1*",),
    ),
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
)
