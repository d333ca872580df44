"""What a report on any run shows: what it logged under its own names, its settings, and its path beside the nulls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from matplotlib.figure import Figure

from mini_gpt_pl.report.comparison import general_comparison
from mini_gpt_pl.report.contents import Contents, Plate, Section, plates
from mini_gpt_pl.report.figures import FIGURE_FUNCTIONS
from mini_gpt_pl.report.findings import findings
from mini_gpt_pl.report.learning import learned, learning_table
from mini_gpt_pl.report.null_figures import NULL_FIGURES
from mini_gpt_pl.report.overlays import OVERLAYS
from mini_gpt_pl.report.path_tables import path_tables
from mini_gpt_pl.report.probe_figures import PROBE_FIGURES
from mini_gpt_pl.report.probe_tables import probe_tables
from mini_gpt_pl.report.published import NOTHING, Beside
from mini_gpt_pl.report.sheet import Table
from mini_gpt_pl.report.subject import Subject
from mini_gpt_pl.runs.folder import Run

RUN_FIGURES: Mapping[str, Callable[[Run], Figure]] = {**FIGURE_FUNCTIONS, **NULL_FIGURES, **PROBE_FIGURES}


def general_tables(run: Run, beside: Beside = NOTHING) -> list[Table]:
    """Make every table of a run's path and probes that its data allow.

    Args:
        run: Of any task.
        beside: The published run that it is shown beside; none by default.
    """
    subject = Subject.of(run)
    return path_tables(subject, beside) + probe_tables(subject, beside)


LEARNING: Section[Run] = Section(
    "learning",
    "What it learned",
    "Every metric that the run logged under its own name, against the optimizer step.",
    plates(RUN_FIGURES, learning="The run's own metrics; those of one quantity share a panel."),
    ("learning",),
)

PATH_SECTIONS: tuple[Section[Run], ...] = (
    Section(
        "nulls",
        "Every number against its nulls",
        "The single numbers of the whole path beside those of two walks with the same step lengths, in random "
        "directions and under weight decay.",
        plates(
            RUN_FIGURES,
            against_nulls="Each calibrated number as measured and as both walks have it, and its excess over the "
            "decaying walk; bars are 95 % intervals of the excess, where there is one.",
        ),
        ("overview",),
    ),
    Section(
        "backbone",
        "Backbone and residual",
        "The drift x(t) from the initial weights, split along the first direction of the whole run, v_b, whose sign is "
        "such that the last coordinate is positive, and across it.",
        plates(
            RUN_FIGURES,
            backbone="Coordinate and residual of the whole selection, the decaying walk's dotted, and the distance "
            "that weight decay alone goes.",
            initial_weights="Cosine of the backbone with the initial weights, towards which decay pulls, and how much "
            "of them is left.",
        ),
        ("backbone_fraction*",),
    ),
    Section(
        "spectrum",
        "How many directions",
        "Shares of the principal components of the drift, uncentred, for raw rows and for rows of unit length, whole "
        "and group by group.",
        plates(
            RUN_FIGURES,
            spectrum="Share of each component, whole selection, groups and both walks.",
            blocks="Share of the first component in each group, beside both walks' in the same group.",
        ),
        ("pc1_groups*",),
    ),
    Section(
        "updates",
        "Where updates go",
        "Cosines of the updates between snapshots with the backbone and with one another; a direction that was fitted "
        "to an update aligns with it by chance.",
        plates(
            RUN_FIGURES,
            alignment="Updates and gradients against the backbone: with the whole run's direction and with that of "
            "their past; the band is what both walks show against their own whole-run direction.",
            update_cosines="Cosines of all pairs of updates, measured and of the decaying walk.",
        ),
        ("updates", "sign_flip", "autocorrelation"),
    ),
    Section(
        "growth",
        "Growth and turning",
        "Power laws of coordinate and residual, and how the first direction of a window of snapshots turns.",
        plates(
            RUN_FIGURES,
            growth="Left: |a| and ||r|| with their exponents. Right: a window's first direction with that of the early "
            "phase, of the late phase and of the window before. The decaying walk is dotted.",
        ),
        ("growth*", "windows*"),
    ),
    Section(
        "gradients",
        "Gradients",
        "Cosines of single-batch gradients with the backbone, beside those of isotropic noise, and their signed bias "
        "along it.",
        plates(
            RUN_FIGURES,
            gradients="|cos| of batch gradients with the backbone; isotropic noise is dotted.",
        ),
        ("gradient_alignment*", "interference*", "signed_bias*"),
    ),
    Section(
        "fisher",
        "Fisher curvature",
        "Rayleigh quotients of the second moment of batch-mean gradients along named directions, over the mean across "
        "all directions, and the anisotropy along the backbone; bars are standard errors.",
        plates(RUN_FIGURES, fisher="Curvature along the backbone and other directions; 1 is a random direction."),
        ("fisher*",),
    ),
    Section("probes", "Live probes", "What the probes logged, in units of its null.", (), ("live_probes",)),
)
"""Sections of any run's path and probes."""

COMPARISON_SECTIONS: tuple[Section[Sequence[Run]], ...] = (
    Section(
        "runs",
        "The runs side by side",
        "The path of each run along and across its own backbone.",
        plates(OVERLAYS, overview="All runs from scratch by name, the decaying walk of each dotted."),
        ("runs*",),
    ),
    Section(
        "seeds", "Seeds", "Runs that differ in their seed only: what one run's interval cannot know.", (), ("seeds*",)
    ),
)

GENERAL = Contents(
    of_run=(LEARNING, *PATH_SECTIONS),
    run_tables=lambda run: learning_table(Subject.of(run)) + general_tables(run),
    of_runs=COMPARISON_SECTIONS,
    comparison=general_comparison,
    findings=findings,
    entry=Plate("backbone", RUN_FIGURES["backbone"], "backbone and residual."),
    learned=learned,
)
"""Of a run of no listed task, such as one of a Trainer of somebody's own."""
