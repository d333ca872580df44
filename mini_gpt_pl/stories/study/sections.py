"""What a report on runs of stories shows, in which order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from matplotlib.figure import Figure

from mini_gpt_pl.report.figures import FIGURE_FUNCTIONS
from mini_gpt_pl.report.null_figures import NULL_FIGURES
from mini_gpt_pl.report.sections import Section, plates
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.study.comparison_figures import COMPARISON_FIGURES
from mini_gpt_pl.stories.study.probe_figures import PROBE_FIGURES

RUN_FIGURES: Mapping[str, Callable[[Run], Figure]] = {**FIGURE_FUNCTIONS, **NULL_FIGURES, **PROBE_FIGURES}

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
            backbone="Coordinate and residual of the whole trunk with p_ood behind (paper, Figure 1), the decaying "
            "walk's dotted, and the distance that weight decay alone goes.",
            initial_weights="Cosine of the backbone with the initial weights, towards which decay pulls, and how much "
            "of them is left.",
        ),
        ("backbone_fraction*",),
    ),
    Section(
        "spectrum",
        "How many directions",
        "Shares of the principal components of the drift, uncentred, for raw rows and for rows of unit length, whole "
        "and block by block.",
        plates(
            RUN_FIGURES,
            spectrum="Share of each component, whole trunk, blocks and both walks.",
            blocks="Share of the first component in each block, beside both walks' in the same block.",
        ),
        ("table2*",),
    ),
    Section(
        "updates",
        "Where updates go",
        "Cosines of the updates between snapshots with the backbone and with one another; a direction that was fitted "
        "to an update aligns with it by chance.",
        plates(
            RUN_FIGURES,
            alignment="Updates and gradients against the backbone (paper, Figure 2): with the whole run's direction "
            "and with that of their past; the band is what both walks show against their own whole-run direction.",
            update_cosines="Cosines of all pairs of updates, measured and of the decaying walk.",
        ),
        ("table3*", "table4*", "autocorrelation"),
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
            gradients="|cos| of batch gradients of the objective and of its two parts; isotropic noise is dotted.",
            signed_bias="Signed projection of gradients on each block's own backbone at the replayed checkpoints, "
            "bands of one standard deviation over batches, and its sum over those checkpoints.",
        ),
        ("gradient_alignment*", "interference*", "table5*"),
    ),
    Section(
        "fisher",
        "Fisher curvature",
        "Rayleigh quotients of the second moment of batch-mean gradients along named directions, over the mean across "
        "all directions, and the anisotropy along the backbone; bars are standard errors.",
        plates(
            RUN_FIGURES,
            fisher="Curvature along the backbone and other directions; 1 is a random direction (paper, Figure 3).",
        ),
        ("table6*", "table7*", "fisher*"),
    ),
    Section(
        "switching",
        "Switches of the probe",
        "Displacements between a peak of p_ood and the trough after it, beside stretches of the same length in which "
        "nothing switched.",
        plates(
            RUN_FIGURES,
            switching="Peaks and troughs; below, |cos| of each switch with the backbone (filled) and the mean over its "
            "controls (open).",
        ),
        ("switching*",),
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
