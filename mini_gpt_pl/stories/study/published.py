"""The published numbers that the tables show, each with its definition, its source and what is known against it.

Values are those of arXiv 2602.23696 ("paper") and of its authors' repository. A run's numbers go beside those of the
setting that it repeats: the two main runs (`seed42`, `seed271`), the optimizer controls (`A`, `B`, `C`, `C'`), the
beta2 runs (`beta2/0.95`, ...) and the reheats (`reheat/42/0.0006`, ...).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

CSV, README = "original repository, published CSV", "original repository, README"

NOTES = {
    "pc1": "Published shares of blocks include the blocks' LayerNorms; here a block is its four matrices.",
    "pc1_unit": (
        "The original repository's newer README gives 71.4 and 71.7 % for unit rows, dividing by the ten leading "
        "components only; its own singular values over all rows give 69.3 and 69.4 %, which are shown."
    ),
    "pc1_definitions": (
        "The paper's 78 to 81 % are raw rows from the start, its 61.5 % unit rows inside steps 600 to 2,000, and the "
        "repository's 68 to 69 % unit rows: numbers of different definitions cannot be compared."
    ),
    "fisher": (
        "The published quotients, anisotropies and overlaps multiply gradients and directions whose coordinates were "
        "in different orders, so they carry no information about the backbone."
    ),
    "windows": (
        "The published 0.997 to 0.998 compares adjacent windows, which share nine of their ten rows and their origin, "
        "and not each window with the whole run's direction as the paper's equation 5 has it."
    ),
    "fraction": (
        "The paper gives 68 to 72 % for the last checkpoint; its repository's CSV has 86.5 and 87.2 % there, and 69.3 "
        "and 69.4 % as the mean over checkpoints."
    ),
    "monotone": (
        "The paper calls a(t) monotone; in its repository's CSV it is largest at step 5,800 (seed 42) or 5,600 "
        "(seed 271) and falls afterwards."
    ),
    "sign": (
        "The sign of a principal direction is arbitrary and was not fixed in the paper, whose early cosine is "
        "therefore negative; here the last coordinate a(T) is positive."
    ),
    "gradient": (
        "The paper calls |cos| of 0.008 to 0.012 the noise floor, which is 4.5e-4 for a block by its own equation 11."
    ),
    "bias": (
        "The published projections are not divided by the gradient's length, each checkpoint had other batches, and "
        "their running sum is over about eight selected checkpoints; their sign is that of an arbitrary direction. "
        "From step 9,600 on all are below 0.001."
    ),
    "switching": (
        "The published cosines are of one pair a seed, 200 steps long for seed 42 and 800 for seed 271, with no "
        "stretch of equal length without a switch beside them."
    ),
    "pairs": "Any few vectors in 25 million dimensions are nearly orthogonal, switches or not.",
    "correlation": (
        "The original README's correlation of -0.91 between p_ood and ||r|| is not in its CSV: that has +0.61 and "
        "+0.45 over the whole run, and other signs before and after step 6,000."
    ),
    "reheating": (
        "The paper starts from p_ood 0.16 and evaluates every 100 steps, the repository's README starts from 0.07 for "
        "the same seed 42; the paper speaks of a doubled probe weight, but training had ended with that weight."
    ),
    "beta2": (
        "The published beta2 runs had the probe in 20 % of the sequences, the paper's other runs in 10 %: at beta2 "
        "0.95 they reach p_ood 0.939 and loss 1.21 where the other has 0.433 and 1.59."
    ),
    "beta2_rows": (
        "The repository's README has PC1, k95 and drift of steps 600 to 2,000, its CSV those of the whole run, in "
        "which the densely stored steps 600 to 2,000 weigh more than the rest."
    ),
    "sgd": (
        "The published drift of SGD over steps 600 to 2,000 is that of weight decay alone, 40.35 for the 40.2 without "
        "momentum and 54.8 for the 54.2 with it: its PC1 of 100 % shows weights shrinking towards zero."
    ),
    "few_rows": "With two unit rows PC1 is (1 + |cos|) / 2 and k95 at most 2, whatever the optimizer did.",
    "walk": "The walk in brackets has the step lengths of the original's CSV in mutually orthogonal directions.",
    "seed42": (
        "The repository's README and CSV disagree on p_ood of the seed-42 run at step 10,000 (0.077 and 0.166), so its "
        "probe accuracies are less certain than those of seed 271."
    ),
}
"""What is known of a published number, by topic."""


@dataclass(frozen=True)
class Published:
    """A published number.

    Args:
        value: The number, or the ends of a range.
        definition: What was measured.
        source: Where it was published.
        note: Key of a footnote in `NOTES`; None if there is nothing to say.
        walk: What a walk with the step lengths of the original's CSV gives; None where nobody can tell.
    """

    value: float | tuple[float, float]
    definition: str
    source: str
    note: str | None = None
    walk: float | None = None


PUBLISHED: dict[tuple[str, str], Published] = {}
"""By setting and quantity; a quantity of one parameter group ends with `/<group>`."""


# -------------------------------------------------------------------------------------------------- main runs


def _add(
    setting: str,
    definition: str,
    source: str,
    note: str | None,
    values: Mapping[str, float | tuple[float, float]],
    walks: Mapping[str, float] | None = None,
) -> None:
    for key, value in values.items():
        PUBLISHED[setting, key] = Published(value, definition, source, note, (walks or {}).get(key))


def _by_block(quantity: str, values: tuple[float, ...]) -> dict[str, float | tuple[float, float]]:
    return {f"{quantity}/blocks.{index}": value for index, value in enumerate(values)}


def _main_runs() -> None:
    raw = "share of PC1, uncentred, raw drifts from step 1, one block with its LayerNorms"
    _add(
        "seed42",
        raw,
        "paper, Table 2",
        "pc1",
        _by_block("pc1", (0.805, 0.812, 0.807, 0.802, 0.797, 0.79, 0.788, 0.779)),
    )
    _add(
        "seed271",
        raw,
        "paper, Table 2",
        "pc1",
        _by_block("pc1", (0.786, 0.806, 0.804, 0.804, 0.801, 0.791, 0.793, 0.783)),
    )
    for seed, pc1, pc2, unit, unit2, drift, walk in (
        ("seed42", 0.7914, 0.1070, 0.6926, 0.1168, 137.0, {"pc1": 0.901, "pc1_unit": 0.742, "drift": 214.6}),
        ("seed271", 0.7927, 0.1032, 0.6942, 0.1138, 137.5, {"pc1": 0.901, "pc1_unit": 0.738, "drift": 224.6}),
    ):
        json = "original repository, published singular values"
        _add(seed, "whole trunk, raw drifts from step 1", json, "pc1_definitions", {"pc1": pc1, "pc2": pc2}, walk)
        _add(
            seed,
            "whole trunk, unit rows, all 50 of them",
            json,
            "pc1_unit",
            {"pc1_unit": unit, "pc2_unit": unit2},
            walk,
        )
        _add(
            seed,
            "|cos| of v_E (to step 4,000) and v_L (after it)",
            README,
            None,
            {"early_late": 0.323},
            {"early_late": 0.0},
        )
        _add(seed, "||theta(10000) - theta(1)||, whole trunk", CSV, None, {"drift": drift}, walk)
        origin = "windows_origin_anchored"
        windows = "|cos| of adjacent windows of 10 drifts from step 1, single blocks"
        _add(seed, windows, "paper, section 3.2", "windows", {origin: (0.997, 0.998)}, {origin: 0.998})
    own, rolling = "windows_self_anchored", "|cos| of adjacent windows, each from its own first snapshot, unit rows"
    _add("seed42", rolling, README, None, {own: 0.800}, {own: 0.793})
    _add("seed271", rolling, README, None, {own: 0.793}, {own: 0.794})
    share, ends = "share of PC1 in windows of 10, lowest and highest", {"pc1_low": 0.61, "pc1_high": 0.87}
    _add("seed42", share, README, None, ends, {"pc1_low": 0.596, "pc1_high": 0.834})


def _alignment() -> None:
    updates = "mean |cos| of 200-step updates with the whole run's raw v_b, one block"
    for phase, first, others in (
        ("early", 0.27, (0.20, 0.21)),
        ("middle", 0.054, (0.054, 0.076)),
        ("late", 0.110, (0.061, 0.143)),
    ):
        _add("seed42", updates, "paper, Table 3", None, {f"{phase}/blocks.0": first})
        rest = {f"{phase}/blocks.{index}": others for index in range(1, 8)}
        _add("seed42", updates + ", range over blocks 1 to 7", "paper, Table 3", None, rest)
    trunk = "mean |cos| of 200-step updates, whole trunk, v_b of unit rows, from the speeds along and across"
    phases = ("early/trunk", "middle/trunk", "late/trunk")
    for seed, values, of_walk in (
        ("seed42", (0.222, 0.070, 0.085), (0.194, 0.153, 0.015)),
        ("seed271", (0.219, 0.069, 0.086), (0.192, 0.154, 0.015)),
    ):
        _add(seed, trunk, CSV, None, dict(zip(phases, values, strict=True)), dict(zip(phases, of_walk, strict=True)))
    flips = "first step at which the signed cosine of block 0 crosses zero"
    for seed, flip, early, late, ends in (("seed42", 5200, -0.27, 0.11, 6000), ("seed271", 5000, -0.29, 0.07, 5800)):
        _add(seed, flips, "paper, Table 4", "sign", {"flip/blocks.0": flip})
        signed = "mean signed cosine of block 0, sign of v_b arbitrary"
        _add(seed, signed, "paper, Table 4", "sign", {"early_signed/blocks.0": early, "late_signed/blocks.0": late})
        _add(seed, "end of the first interval with a negative cosine, a(T) > 0", CSV, None, {"flip/trunk": ends})
        gradients = "|cos| of single-batch gradients with v_b, one block, 16 batches a checkpoint"
        _add(seed, gradients, "paper, equation 10", "gradient", {"gradient/combined": (0.008, 0.012)})
        split = "a^2 / ||x||^2 at step 10,000, whole trunk, v_b of unit rows"
        fraction = 0.865 if seed == "seed42" else 0.872
        _add(seed, split, CSV, "fraction", {"fraction_last": fraction}, {"fraction_last": 0.944})
        mean = 0.693 if seed == "seed42" else 0.694
        walks = {"fraction_mean": 0.742 if seed == "seed42" else 0.738}
        _add(seed, "mean of a^2 / ||x||^2 over checkpoints", CSV, "fraction", {"fraction_mean": mean}, walks)
        top = "step at which |a| is largest"
        _add(seed, top, CSV, "monotone", {"highest_coordinate": 5800 if seed == "seed42" else 5600})
        _add(seed, "step at which ||r|| first peaks", CSV, None, {"highest_residual": 2400})


def _growth() -> None:
    windows = ("0_2000", "2000_4000", "0_4000", "4000_6000", "4000_10000", "6000_10000")
    fits = {
        "seed42": ((2.074, 0.674, 1.740, 0.153, -0.076, -0.187), (1.239, -0.394, 0.841, -1.331, -0.294, 0.364)),
        "seed271": ((2.067, 0.667, 1.750, 0.122, -0.100, -0.197), (1.256, -0.431, 0.850, -1.383, -0.348, 0.322)),
    }
    walks = {
        "seed42": ((2.604, 1.066, 2.251, 0.385, 0.141, 0.024), (1.225, -0.462, 0.829, -0.898, -0.128, 0.178)),
        "seed271": ((2.618, 1.066, 2.289, 0.391, 0.143, 0.025), (1.239, -0.431, 0.855, -0.916, -0.133, 0.179)),
    }
    for seed in fits:
        for index, name in enumerate(("a", "r")):
            keys = [f"exponent_{name}_{window}" for window in windows]
            values, nulls = (dict(zip(keys, found[seed][index], strict=True)) for found in (fits, walks))
            law = "slope of a least-squares line in ln-ln, whole trunk, v_b of unit rows"
            _add(seed, law, "original repository, regime fits", None, values, nulls)
    pearson = "Pearson correlation of p_ood and ||r|| over checkpoints"
    for seed, whole, early, late in (("seed42", 0.61, 0.848, -0.734), ("seed271", 0.45, 0.760, -0.790)):
        found = {"correlation_0_10000": whole, "correlation_0_4000": early, "correlation_6000_10000": late}
        _add(seed, pearson, CSV, "correlation", found)


def _gradients() -> None:
    bias = "mean <g, v_b> of 16 single-batch gradients, lambda 2, not normalised"
    for step, blocks in (
        (200, (0.014, 0.003, 0.001, 0.001, 0.001, 0.001, 0.000, 0.002)),
        (1800, (0.019, 0.001, 0.001, 0.001, 0.001, 0.001, 0.003, 0.004)),
        (2000, (0.029, 0.001, 0.001, 0.001, 0.001, 0.001, 0.005, 0.005)),
    ):
        _add("seed42", bias, "paper, Table 5", "bias", _by_block(f"bias/{step}", blocks))
    total = "sum of b over about eight selected checkpoints"
    _add("seed42", total, "paper, section 4.4", "bias", _by_block("bias_sum", (0.12, *[0.01] * 7)))
    quotients = "mean squared projection of 32 mini-batch gradients, coordinates out of order"
    for seed, source, rows in (
        ("seed42", "paper, Table 6", _FISHER_42),
        ("seed271", "paper, Table 7", _FISHER_271),
    ):
        for step, *values in rows:
            names = ("backbone", "switch", "pc2", "anisotropy")
            keyed = {f"fisher/{step:.0f}/{name}": value for name, value in zip(names, values, strict=True)}
            _add(seed, quotients, source, "fisher", dict(keyed))
        _add(seed, "|<u_1, v_b>|, coordinates out of order", "paper, section 4.5", "fisher", {"overlap": 0.001})


_FISHER_42 = (
    (200, 2.4e-6, 2.9e-6, 3.2e-6, 1.3),
    (1800, 2.5e-6, 2.2e-6, 5.2e-6, 1.9),
    (4800, 1.6e-4, 8.2e-5, 4.6e-5, 12.4),
    (9600, 8.1e-3, 1.8e-3, 7.0e-4, 4.8),
)
_FISHER_271 = (
    (200, 2.0e-6, 1.1e-6, 1.4e-6, 1.6),
    (2200, 1.4e-5, 1.1e-5, 2.5e-5, 5.9),
    (4400, 9.5e-5, 5.1e-5, 5.2e-5, 40.8),
    (9200, 1.0e-4, 4.2e-5, 7.6e-5, 8.3),
)


def _switching_and_learning() -> None:
    section = "paper, section 7"
    for seed, cosine, energy in (("seed42", (0.20, 0.25), (0.15, 0.22)), ("seed271", (0.28, 0.31), (0.60, 0.67))):
        _add(seed, "|<v_sw, v_b>|, range over blocks", section, "switching", {"switch_cosine": cosine})
        across = "energy in PCs 2 to 6 of v_sw off v_b, range over blocks"
        _add(seed, across, section, "switching", {"switch_energy": energy})
        _add(seed, "largest |cos| of two switches", section, "pairs", {"switch_pairs": 0.08})
    for seed, loss, best, best_step, last, note in (
        ("seed42", 1.216, 0.777, 5000, 0.166, "seed42"),
        ("seed271", 1.252, 0.6655, 2200, 0.197, None),
    ):
        _add(seed, "validation loss at step 10,000, its lowest", CSV, None, {"loss_last": loss, "loss_best": loss})
        probe = {"p_ood_best": best, "p_ood_last": last}
        definition = f"exact match at long gaps, highest at step {best_step:,} and at step 10,000"
        _add(seed, definition, CSV, note, probe)


# ---------------------------------------------------------------------------------------------- several runs


def _optimizers() -> None:
    window = "unit rows from step 600, snapshots every 50 steps to 2,000"
    for run, loss, p_ood, *geometry in (
        ("A", 1.59, 0.433, 0.615, 9, 19, 113.7),
        ("B", 8.12, 0.000, 1.0, 1, None, 40.2),
        ("C", 5.10, 0.015, 1.0, 1, 1, 54.2),
        ("C'", 5.25, 0.013),
    ):
        note = None if run == "A" else "sgd"
        _add(run, "at the run's end", "paper, Table 9", None, {"loss_last": loss, "p_ood_best": p_ood})
        names = ("pc1/600_2000", "k95/600_2000", "k99/600_2000", "drift/600_2000")
        found = {name: value for name, value in zip(names, geometry, strict=False) if value is not None}
        walks = dict(zip(names, (0.599, 9, 19), strict=False)) if run == "A" else {}
        _add(run, window, "paper, Tables 9 and 10", note, found, walks)
    for run, name, *values in (
        ("A", "0_400", 0.774, 2, 2),
        ("A", "0_600", 0.692, 3, 3, 24.9),
        ("A", "200_600", 0.819, 2, 2),
        ("A", "200_1000", 0.778, 4, 8, 50.7),
        ("C", "2000_2400", 0.981, 1, 2, 0.26),
        ("C", "1800_2600", 0.977, 1, 2, 0.60),
    ):
        keys = (f"{quantity}/{name}" for quantity in ("pc1", "k95", "k99", "drift"))
        note = "sgd" if run == "C" else "few_rows"
        _add(
            run,
            "unit rows from the window's first step",
            "paper, Table 10",
            note,
            dict(zip(keys, values, strict=False)),
        )


def _beta2() -> None:
    readme = ("loss_last", "p_ood_best", "window_pc1", "window_k95", "window_drift", "window_cos", "interference")
    csv = ("pc1_unit", "pc1", "drift", "cos", *(f"exponent_{name}_{half}" for half in _HALVES for name in "ar"))
    for beta2, of_window, of_run, of_walk in _BETA2:
        values = {key: value for key, value in zip(readme, of_window, strict=True) if not math.isnan(value)}
        nulls = dict(zip(("window_pc1", "window_k95", "pc1_unit", "pc1"), of_walk, strict=True))
        definition = "4,000 steps; geometry of steps 600 to 2,000, unit rows"
        _add(f"beta2/{beta2}", definition, README, "beta2", values, nulls)
        all_rows = dict(zip(csv, of_run, strict=True))
        _add(f"beta2/{beta2}", "4,000 steps, all 51 snapshots", CSV, "beta2_rows", all_rows, nulls)


_HALVES = ("0_2000", "2000_4000")
# beta2, README, CSV, and walks with the CSV's step lengths
_BETA2: tuple[tuple[str, tuple[float, ...], tuple[float, ...], tuple[float, ...]], ...] = (
    (
        "0.99",
        (1.16, 0.951, 0.681, 6, 106, 0.226, 0.022),
        (0.6875, 0.8315, 120.01, 0.2428, 1.975, 0.778, -0.007, 0.358),
        (0.604, 8, 0.624, 0.831),
    ),
    (
        "0.95",
        (1.21, 0.939, 0.684, 6, 109, 0.225, 0.011),
        (0.6834, 0.8250, 123.07, 0.2443, 1.941, 0.784, -0.025, 0.351),
        (0.611, 8, 0.622, 0.829),
    ),
    (
        "0.9",
        (1.37, 0.814, 0.663, 7, 113, 0.220, 0.040),
        (0.6666, 0.8083, 127.97, 0.2340, 1.933, 0.841, -0.031, 0.315),
        (0.600, 8, 0.620, 0.832),
    ),
    (
        "0.8",
        (1.47, 0.682, 0.634, 8, 128, 0.214, 0.048),
        (0.6385, 0.7898, 141.34, 0.2269, 1.984, 0.912, -0.050, 0.211),
        (0.592, 9, 0.612, 0.832),
    ),
    (
        "0",
        (math.nan, 0.005, 0.516, 7, 211_694, 0.099, 0.273),
        (0.5248, 0.8127, 161_931, 0.2378, 2.452, 1.084, -0.355, -0.442),
        (0.544, 7, 0.571, 0.886),
    ),
)


def _reheats() -> None:
    for lr, peak, at, reached, last in (
        ("0.001", 0.705, 900, 600, 0.221),
        ("0.0006", 0.782, 1000, 700, 0.279),
        ("0.0003", 0.578, 1500, None, 0.421),
    ):
        found = {"peak": peak, "peak_step": at, "final": last} | (
            {} if reached is None else {"steps_to_threshold": reached}
        )
        _add(f"reheat/42/{lr}", "p_ood, 2,000 steps from step 10,000", "paper, Table 11", "reheating", found)
    for seed, lr, p0, peak, gain in (
        (42, "0.0006", 0.077, 0.782, 0.705),
        (42, "0.001", 0.073, 0.697, 0.625),
        (42, "0.0003", 0.072, 0.578, 0.506),
        (271, "0.0006", 0.197, 0.689, 0.492),
        (271, "0.001", 0.197, 0.421, 0.224),
        (271, "0.0003", 0.196, 0.402, 0.206),
    ):
        found = {"p0": p0, "gain": gain} | ({} if seed == 42 else {"peak": peak})
        _add(f"reheat/{seed}/{lr}", "p_ood before the first step, and gain over it", README, "reheating", found)


_main_runs()
_alignment()
_growth()
_gradients()
_switching_and_learning()
_optimizers()
_beta2()
_reheats()
