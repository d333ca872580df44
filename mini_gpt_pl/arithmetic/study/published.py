"""Published numbers of the studies of grokking, each with its source and what is known against it.

Values are those of arXiv 2602.16746 ("paper") and of the result files of its authors' repository, for p = 97, two
layers and AdamW. Runs without weight decay, and operations that do not generalise, were recorded over other lengths and
cadences there. They stand beside runs that repeat `SETTING`, and beside no others; seeds are draws, so values of
several seeds are shown as a range.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mini_gpt_pl.arithmetic.study.facts import OWN_SEED

SETTING: dict[str, Any] = {
    "model": "2 blocks, 4 heads, width 128, MLP 256",
    "optimizer": "AdamW",
    "learning rate": 1e-3,
    "beta1": 0.9,
    "beta2": 0.98,
    "sequences a step": 512,
    "clipping": 1.0,
    "modulus": 97,
    "training fraction": 0.5,
    "mirror pairs together": False,
    "split": OWN_SEED,
    "identical blocks": True,
    "eps": 1e-8,
    "steps a snapshot": 100,
}
"""Facts of the paper's runs, but for operation, seed, length and weight decay (1, or none)."""


PC1_NOTE = (
    "Published: centred PCA of one matrix, snapshots every 100 steps from step 0 to the stop (result files). The "
    "operations that do not generalise have 2,001 snapshots over 200,000 steps there, the others 26 to 40, and the "
    "abstract's 68 to 83 % is the range of layer 0 alone. Without decay: snapshots every 500 of 50,000 steps, mean of "
    "the four matrices."
)
ONSET_NOTE = (
    "Published defects were differences of float32 weights: the first ones, which set the baseline, are rounding "
    "(about 2.0 where float64 has 0.22), and so is every exact zero. Their largest defect includes the time after the "
    "grok step. Paper: the least and the greatest of its three seeds, 42, 137 and 2024. The same seed draws another "
    "split and other weights here, so no run is beside one of its own. Its control without decay has one spike in "
    "50,000 steps."
)
LAST_DEFECT_NOTE = (
    "Without decay nothing is published by run: 0 to 724 over all of 378 records, 90 of them exactly 0, which is no "
    "defect but one that float32 did not resolve."
)
NOT_REPEATED = (
    "Not repeated here: the slow regime (lr 5e-5, weight decay 0.1, three layers, 572,000 and 612,000 steps, onset "
    "10,000 in both and in the control), alignments by learning rate (0.18 to 2.2 times random), and all of the "
    "study of marker sums but its presets."
)
PROJECTION_NOTE = (
    "Published: over isotropic directions of all weights. Its trajectory basis has two directions of each matrix, of "
    "the whole run, later snapshots included; its other basis has three singular directions of each. Here the path's "
    "directions are those of the past, two of each matrix in both bases."
)

# Layer and operation -> W_Q, W_K, W_V, W_O, mean of three seeds, weight decay 1.
PC1: Mapping[tuple[int, str], tuple[float, float, float, float]] = {
    (0, "add"): (0.690, 0.687, 0.815, 0.730),
    (0, "sub"): (0.684, 0.684, 0.798, 0.714),
    (0, "mul"): (0.694, 0.693, 0.808, 0.723),
    (0, "x2_y2"): (0.730, 0.730, 0.824, 0.747),
    (0, "x2_xy_y2"): (0.467, 0.468, 0.378, 0.383),
    (0, "x3_xy"): (0.532, 0.530, 0.445, 0.444),
    (1, "add"): (0.665, 0.674, 0.780, 0.638),
    (1, "sub"): (0.663, 0.674, 0.787, 0.671),
    (1, "mul"): (0.669, 0.681, 0.777, 0.635),
    (1, "x2_y2"): (0.705, 0.719, 0.788, 0.667),
    (1, "x2_xy_y2"): (0.459, 0.485, 0.425, 0.441),
    (1, "x3_xy"): (0.514, 0.532, 0.439, 0.447),
}
# The same without weight decay, mean over the four matrices.
PC1_NO_DECAY: Mapping[tuple[int, str], float] = {
    (0, "add"): 0.654,
    (0, "sub"): 0.588,
    (0, "mul"): 0.649,
    (0, "x2_y2"): 0.647,
    (0, "x2_xy_y2"): 0.623,
    (0, "x3_xy"): 0.688,
    (1, "add"): 0.650,
    (1, "sub"): 0.559,
    (1, "mul"): 0.628,
    (1, "x2_y2"): 0.688,
    (1, "x2_xy_y2"): 0.617,
    (1, "x3_xy"): 0.656,
}


@dataclass(frozen=True)
class Onsets:
    """Steps of one operation at learning rate 1e-3, a value for each of the seeds 42, 137 and 2024.

    Args:
        onset: Of the defect: ten baselines and 20.
        t90: First evaluation with 90 % test accuracy; empty for an operation that does not generalise.
        stop: Third evaluation in a row with 98 %.
        ratio: Largest defect over the baseline.
    """

    onset: tuple[int, ...]
    t90: tuple[int, ...] = ()
    stop: tuple[int, ...] = ()
    ratio: tuple[float, ...] = ()


ONSETS: Mapping[str, Onsets] = {
    "add": Onsets((1800, 1800, 1900), (3100, 3200, 2500), (3300, 3400, 2800), (2047, 1690, 920)),
    "sub": Onsets((2100, 2000, 2000), (3200, 3600, 3500), (3500, 3800, 3700), (1003, 1453, 1060)),
    "mul": Onsets((1900, 1900, 1900), (2500, 2800, 2600), (2800, 3100, 2800), (1242, 2141, 1782)),
    "x2_y2": Onsets((500, 700, 700), (1900, 1900, 1800), (2700, 2600, 2500), (513, 712, 675)),
    "x2_xy_y2": Onsets((2000, 1800, 1900), ratio=(47,)),
    "x3_xy": Onsets((2000, 2300, 2100), ratio=(31,)),
}

# The control without weight decay, 50,000 steps, one seed.
ONSETS_NO_DECAY: Mapping[str, Onsets] = {"add": Onsets((3400,), ratio=(29,))}

LAST_DEFECT: Mapping[str, tuple[float, float, float]] = {
    "add": (1920, 955, 1206),
    "sub": (397, 219, 513),
    "mul": (1034, 749, 727),
    "x2_y2": (489, 376, 377),
    "x2_xy_y2": (66, 67, 56),
    "x3_xy": (36, 43, 37),
}
"""Defect at the last checkpoint, a value for each of the three seeds."""


@dataclass(frozen=True)
class Rate:
    """Means over the runs of one learning rate that generalise.

    Args:
        t90: Mean step.
        onset: Mean over the runs that have one.
        train_99: Mean step of 99 % training accuracy.
        lead: Mean of t90 - onset over the runs that have an onset.
        ahead: Runs with a positive lead.
        runs: Of all.
        onsets: First and last onset; empty where none is published.
        largest: Least and greatest of the largest defects of the runs.
        others_onsets: First and last onset of the operations that do not generalise.
        others_largest: Least and greatest of their largest defects.
    """

    t90: float
    onset: float
    train_99: float
    lead: float
    ahead: int
    runs: int
    onsets: tuple[float, ...] = ()
    largest: tuple[float, ...] = ()
    others_onsets: tuple[float, ...] = ()
    others_largest: tuple[float, ...] = ()


RATES: Mapping[float, Rate] = {
    1e-4: Rate(31_733, 2_392, 3_100, 29_342, 12, 12, (2200, 2600), (3.7e3, 1.8e4), (2300, 2600), (1.8e4, 4.3e4)),
    1e-3: Rate(2_717, 1_600, 475, 1_117, 12, 12, (500, 2100), (1.2e3, 4.5e3), (1800, 2300), (52, 112)),
    1e-2: Rate(217, 1_186, 600, -971, 0, 12, (), (16, 122)),
}
RATES_NOTE = (
    "Published: over add, sub, mul and x2_y2, three seeds each; onset and lead at lr 1e-2 over the seven runs that "
    "have an onset. Of the operations that do not generalise only ranges are."
)

# Length of the projected defect over that of isotropic directions, by operation: seed 42, median of the checkpoints.
ON_PATH: Mapping[str, float] = {"add": 0.83, "sub": 1.01, "mul": 1.01, "x2_y2": 1.07}
# The same for singular directions of the weights: mean of the plateau, and after the grok step.
ON_SINGULAR: Mapping[str, Mapping[str, float]] = {
    "plateau": {"add": 2.01, "sub": 1.70, "mul": 2.20, "x2_y2": 1.40},
    "after": {"add": 1.17, "sub": 0.77, "mul": 0.93, "x2_y2": 0.92},
}
