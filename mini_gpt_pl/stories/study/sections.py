"""What a report on runs of stories shows, in which order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from matplotlib.figure import Figure

from mini_gpt_pl.report import general
from mini_gpt_pl.report.contents import Section, plates
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.experiments.figures import EXPERIMENT_FIGURES
from mini_gpt_pl.stories.study.beside import BOOK
from mini_gpt_pl.stories.study.comparison_figures import COMPARISON_FIGURES
from mini_gpt_pl.stories.study.story_figures import STORY_FIGURES

RUN_FIGURES: Mapping[str, Callable[[Run], Figure]] = {**general.RUN_FIGURES, **STORY_FIGURES, **EXPERIMENT_FIGURES}


def _with_own_names(section: Section[Run]) -> Section[Run]:
    """Let a section of the core claim its tables under the study's names, and show what a replay adds to it."""
    own = [table for name, (table, _) in BOOK.tables.items() if section.claims(name)]
    more = _BIAS if section.anchor == "gradients" else ()
    return replace(section, tables=(*section.tables, *own), plates=(*section.plates, *more))


_BIAS = plates(
    STORY_FIGURES,
    signed_bias="Signed projection of gradients on each block's own backbone at the replayed checkpoints, bands of one "
    "standard deviation over batches, and its sum over those checkpoints.",
)


RUN_SECTIONS: tuple[Section[Run], ...] = (
    Section(
        "learning",
        "What it learned",
        "Loss in nats per token on training batches and on held-out stories, and the share of codewords that the model "
        "retrieves exactly at short and at long gaps.",
        plates(
            RUN_FIGURES,
            learning="Loss and key retrieval; the star marks the lowest validation loss; what lies behind it is "
            "shaded where the loss has risen again, which is over-fitting.",
        ),
        ("learning",),
    ),
    *map(_with_own_names, general.PATH_SECTIONS),
    Section(
        "switching",
        "Switches of the probe",
        "Displacements between a peak of p_ood and the trough after it, beside stretches of the same length in which "
        "nothing switched.",
        plates(
            RUN_FIGURES,
            switching="Peaks and troughs; below, |cos| of each switch with the backbone (filled) and the mean over its "
            "controls (open).",
            significance="p_ood with its binomial error at every evaluation, and below the height of each switch in "
            "units of its error; the lines are the borders of the tiers.",
        ),
        ("switching*",),
    ),
    Section(
        "experiments",
        "Training again from checkpoints",
        "What a fresh optimizer makes of the weights at peaks and troughs of p_ood, and of weights disturbed by noise "
        "or by a move of one block.",
        plates(
            RUN_FIGURES,
            recovery="p_ood while the probe's loss weighs eightfold, from peaks, troughs, and their nulls.",
            depth="p_ood restored after noise in every matrix, mean and standard deviation over trials.",
            blocks="p_ood when one block moves from the peak towards the trough (filled), beside moves as long in "
            "random directions (open).",
        ),
        ("recovery*", "depth*", "blocks*"),
    ),
    Section(
        "theory",
        "The theory beside the measurement",
        "What the paper's account of the backbone predicts, the pull along it, and the memory of the steps along it "
        "and across it.",
        (),
        ("theory*", "restoring_force*", "time_scales*"),
    ),
    Section(
        "logit-lens",
        "Where in the network the key is",
        "Exact-match accuracy when the final norm and the head read the residual stream after each block.",
        plates(RUN_FIGURES, logit_lens="Accuracy after each block at peaks (solid) and troughs (dashed) of p_ood."),
        ("logit_lens*",),
    ),
    Section(
        "reheating",
        "Reheating",
        "p_ood after a late checkpoint is started again at a higher learning rate; G is the highest value minus that "
        "of the checkpoint.",
        plates(RUN_FIGURES, reheating="p_ood at the end of the parent (grey) and in this run (paper, Figure 4)."),
        ("table11*", "reheat*"),
    ),
)

COMPARISON_SECTIONS: tuple[Section[Sequence[Run]], ...] = (
    Section(
        "runs",
        "The runs side by side",
        "Loss, retrieval, and the path along and across each run's own backbone.",
        plates(
            COMPARISON_FIGURES,
            overview="All runs from scratch by name, the decaying walk of each dotted; a run that diverged is clipped.",
        ),
        ("runs*",),
    ),
    Section(
        "optimizers",
        "Optimizers",
        "Runs that differ in their optimizer and its settings; under plain weight decay and small gradients a path is "
        "a straight line towards zero, and cos(v_b, theta_0) tells.",
        plates(
            COMPARISON_FIGURES,
            optimizers="PC1 beside both walks', validation loss, p_ood, and cos(v_b, theta_0) of the path so far, each "
            "run to its own end.",
        ),
        ("table9*", "optimizer*"),
    ),
    Section(
        "matched",
        "At equal loss",
        "The same numbers at the same validation loss rather than at the same step.",
        plates(
            COMPARISON_FIGURES,
            matched_loss="p_ood and PC1 of the path so far against validation loss, which falls to the right, of each "
            "run to its lowest one; runs that diverged are left out.",
        ),
        ("table10*", "matched*"),
    ),
    Section(
        "beta2",
        "The memory of the second moment, beta2",
        "Runs that differ in beta2 only: PC1 beside its null, and the excess over it.",
        plates(
            COMPARISON_FIGURES,
            beta2_pc1="PC1 by beta2, raw and with unit rows; on the right its excess over the decaying walk.",
            beta2_curves="Coordinate, residual, loss and p_ood by beta2; a run that diverged is clipped.",
        ),
        ("beta2*",),
    ),
    Section(
        "seeds",
        "Seeds",
        "Runs that differ in their seed only: what one run's interval cannot know.",
        plates(COMPARISON_FIGURES, seeds="Coordinate, residual, backbone fraction and p_ood of each seed."),
        ("seeds*",),
    ),
    Section(
        "reheating",
        "Reheating",
        "p_ood after a late checkpoint is started again; G is the highest value minus that of the checkpoint.",
        plates(
            COMPARISON_FIGURES,
            reheating="The ends of the parents (grey) and reheated runs by learning rate, a star at each maximum, "
            "controls dashed.",
        ),
        ("table11*", "reheat*"),
    ),
)
