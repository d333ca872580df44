"""The nulls: simulated walks, planted drifts, and the figures that follow from the paper's own step lengths."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import bent_path, gram_of
from torch import Tensor

from mini_gpt_pl.geometry.path import nulls, pca
from mini_gpt_pl.training.optimizers import ClippedCosine

# ||theta_t - theta_(t-200)|| of the paper's seed 42, whole trunk: sqrt(a_dot^2 + r_dot^2) dt of the authors' published
# backbone_timeseries_seed42.csv (arXiv 2602.23696, repository mini_gpt), steps 1, 200, 400, ..., 10000.
PUBLISHED_STEPS = (
    5.70,
    12.21,
    18.49,
    24.61,
    31.76,
    39.58,
    47.49,
    50.80,
    50.16,
    50.43,
    48.87,
    48.80,
    47.18,
    46.92,
    45.78,
    45.71,
    43.95,
    42.91,
    41.92,
    39.78,
    39.49,
    37.88,
    35.96,
    33.52,
    32.25,
    29.91,
    27.19,
    26.31,
    23.93,
    22.25,
    20.33,
    18.51,
    16.58,
    14.85,
    13.29,
    11.94,
    10.50,
    9.23,
    7.94,
    6.64,
    5.62,
    4.88,
    4.75,
    4.72,
    4.72,
    4.70,
    4.66,
    4.51,
    4.54,
    4.53,
)
INITIAL_NORM = 100.33  # 0.02 sqrt(25,165,824)


def simulate(snapshots: int, dim: int, keep: float, drift: float = 0.0, seed: int = 0) -> tuple[Tensor, list[float]]:
    """Weights of a walk that decays by `keep` a snapshot, with a constant push of length `drift` a step."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    push = rng.standard_normal(dim)
    push *= drift / np.linalg.norm(push)
    path = [rng.standard_normal(dim)]
    for _ in range(snapshots):
        step = rng.standard_normal(dim) * 0.2 + push
        path.append(keep * path[-1] + step)
    return torch.from_numpy(np.stack(path)), [keep**k for k in range(snapshots + 1)]


@pytest.mark.parametrize("keep", [1.0, 0.97, 0.9])
def test_simulated_walks_have_no_excess(keep: float) -> None:
    weights, survival = simulate(40, 60_000, keep)
    found = nulls.calibrate(gram_of(weights), survival, curves=True)
    for name in ("pc1", "pc2", "pc1_unit", "pc2_unit", "pc1_corrected", "persistence", "cos_theta0"):
        assert abs(found[name].excess) < 0.0125, name
    for name in ("pc1", "pc2", "pc1_unit", "pc2_unit"):
        assert abs(found[name].excess) < 0.005, name  # half a point
    for name in ("windows_origin_anchored", "windows_self_anchored", "windows_against_global"):
        assert abs(found[name].excess) < 0.005, name
    assert abs(found["autocorrelation"].excess) < 0.005
    assert abs(found["update_alignment_past"].excess) < 0.01
    assert abs(found["k95"].excess) <= 1  # a count: a cumulative share near 95 % may fall on either side
    if keep == 1.0:
        assert found["pc1"].walk == pytest.approx(found["pc1"].decay, rel=1e-12)
        assert abs(found["autocorrelation"].value) < 0.005
        assert abs(found["persistence"].value - 1) < 0.02
    else:
        assert abs(found["pc1"].value - found["pc1"].walk) > 0.01  # the free walk alone would have misled


def test_planted_drift_is_recovered_monotonically() -> None:
    excess = []
    for drift in (0.0, 10.0, 20.0, 40.0, 80.0):
        weights, survival = simulate(30, 20_000, 0.98, drift)
        excess.append(nulls.calibrate(gram_of(weights), survival)["pc1"].excess)
    assert abs(excess[0]) < 0.005
    assert all(a < b for a, b in pairwise(excess)), excess
    assert excess[-1] > 0.05


def test_decaying_walk_by_explicit_vectors() -> None:
    """Build the null's weights in so many dimensions that every innovation has one of its own."""
    gram = gram_of(bent_path(8, 40))
    survival = [0.9**k for k in range(8)]
    theta = torch.zeros(8, dtype=torch.float64)
    theta[0] = gram[0, 0].sqrt()
    path = [theta]
    for k in range(1, 8):
        fresh = torch.zeros(8, dtype=torch.float64)
        fresh[k] = (gram[k, k] - (0.1 * path[-1]).square().sum()).clamp_min(0).sqrt()
        path.append(0.9 * path[-1] + fresh)
    expected = gram_of(torch.stack(path))
    torch.testing.assert_close(nulls.decaying_walk(gram, survival), expected, rtol=1e-12, atol=1e-12)


def test_nulls_keep_the_measured_lengths_and_agree_without_decay() -> None:
    gram = gram_of(bent_path(12, 50))
    for null in (nulls.walk(gram), nulls.decaying_walk(gram, [1.0] * 12)):
        torch.testing.assert_close(null.diag(), gram.diag())
        assert float((null - null.diag().diag()).abs().max()) == 0.0
    decayed = nulls.decaying_walk(gram, [0.99**k for k in range(12)])
    torch.testing.assert_close(decayed.diag(), gram.diag())
    with pytest.raises(ValueError, match="one surviving share per snapshot"):
        nulls.decaying_walk(gram, [1.0])


def test_decay_faster_than_the_measured_step_gets_no_innovation() -> None:
    gram = torch.diag(torch.tensor([100.0, 0.01, 0.01], dtype=torch.float64))
    null = nulls.decaying_walk(gram, [1.0, 0.5, 0.25])
    assert null[1, 1] == pytest.approx(25.0) and null[2, 2] == pytest.approx(6.25)


def test_pure_decay_is_a_line_along_theta0_and_nothing_once_corrected() -> None:
    survival = [0.8**k for k in range(6)]
    theta0 = torch.ones(1, 30, dtype=torch.float64)
    gram = gram_of(torch.cat([s * theta0 for s in survival]))
    found = nulls.statistics(gram, survival)
    assert found["pc1"] == pytest.approx(1.0) and found["cos_theta0"] == pytest.approx(-1.0)
    assert found["drift_corrected"] == pytest.approx(0.0, abs=1e-7)
    assert np.isnan(found["pc1_corrected"])
    assert found["autocorrelation"] == pytest.approx(1.0)


def test_decay_corrected_rows_by_explicit_vectors() -> None:
    weights, survival = simulate(6, 25, 0.9)
    gram = gram_of(weights)
    corrected = weights[1:] - weights[0] + (1 - torch.tensor(survival[1:])[:, None]) * weights[0]
    rows = nulls.decay_corrected(survival)
    torch.testing.assert_close(rows @ gram @ rows.T, corrected @ corrected.T)


def test_autocorrelation_and_participation_by_explicit_vectors() -> None:
    weights = bent_path(9, 30)
    gram, d = gram_of(weights), weights.diff(dim=0)
    off = d - (d @ weights[0])[:, None] * weights[0] / weights[0].dot(weights[0])
    for vectors, flag in ((d, False), (off, True)):
        lengths = vectors.norm(dim=1)
        expected = [
            float((vectors[:-lag] * vectors[lag:]).sum() / (lengths[:-lag] * lengths[lag:]).sum()) for lag in (1, 2, 3)
        ]
        np.testing.assert_allclose(nulls.autocorrelation(gram, 3, off_theta0=flag), expected, atol=1e-12)
    assert nulls.autocorrelation(gram, 12)[8:].isnan().all()
    energy = torch.linalg.svdvals(d).square()
    expected_ratio = float(energy.sum() ** 2 / energy.square().sum())
    updates = torch.eye(9, dtype=torch.float64)[1:]
    assert nulls.participation(gram, updates) == pytest.approx(expected_ratio)
    x = (weights[1:] - weights[0]).norm(dim=1)
    np.testing.assert_allclose(nulls.persistence(gram), x / d.norm(dim=1).square().cumsum(0).sqrt())


def published() -> tuple[Tensor, list[float]]:
    gram = torch.tensor([INITIAL_NORM, *PUBLISHED_STEPS], dtype=torch.float64).square().diag()
    factor = ClippedCosine(1500, 10_000)
    steps, shares, share = {1, *range(200, 10_001, 200)}, [], 1.0
    for step in range(1, 10_001):
        share *= 1 - 1e-3 * factor(step) * 0.5
        if step in steps:
            shares.append(share)
    return gram, shares


def test_published_figures_follow_from_the_published_step_lengths() -> None:
    """What the paper reads as stability of AdamW's backbone is what orthogonal steps of these lengths give."""
    gram, survival = published()
    free = nulls.statistics(gram, survival)
    assert free["pc1"] == pytest.approx(0.901, abs=1e-3)
    assert free["pc1_unit"] == pytest.approx(0.742, abs=1e-3)
    curves = nulls.profile_statistics(gram)
    assert curves["windows_origin_anchored"] == pytest.approx(0.9980, abs=5e-5)  # published: 0.997 to 0.998
    turning = pca.rolling_self_anchored(gram).cosines
    assert float(turning.mean()) == pytest.approx(0.793, abs=5e-4)  # published: 0.800
    assert (round(float(turning.min()), 2), round(float(turning.max()), 2)) == (0.72, 0.93)
    walked = gram.diag()[1:].cumsum(0).sqrt()
    for step, norm, ratio in ((2000, 119.3, 1.02), (4000, 149.2, 0.81), (10_000, 137.0, 0.64)):
        assert norm / float(walked[step // 200 - 1]) == pytest.approx(ratio, abs=6e-3)


def test_with_the_run_s_decay_little_of_the_published_pc1_is_left_to_explain() -> None:
    gram, survival = published()
    assert survival[-1] == pytest.approx(0.077, abs=1e-3)
    decay = nulls.statistics(nulls.decaying_walk(gram, survival), survival)
    assert 0.7914 - decay["pc1"] == pytest.approx(0.009, abs=1e-3)  # published raw PC1, whole trunk: 79.14 %
    assert 0.6926 - decay["pc1_unit"] == pytest.approx(0.009, abs=1e-3)  # published, full trace: 69.26 %
    assert decay["cos_theta0"] == pytest.approx(-0.75, abs=0.01)


def test_window_of_the_published_run_a_from_its_learning_rate_alone() -> None:
    """Steps proportional to the learning rate over [600, 2000]: published 61.5 %, k95 9, k99 19."""
    factor = ClippedCosine(1500, 4000)
    lengths = [0.0] + [sum(factor(t) for t in range(s + 1, s + 51)) for s in range(600, 2000, 50)]
    gram = torch.tensor(lengths, dtype=torch.float64).square().diag()
    unit = pca.pca(gram, pca.drifts(len(gram))[1:], normalise=True)
    assert unit.pc1 == pytest.approx(0.599, abs=5e-4)
    assert (unit.components_for(0.95), unit.components_for(0.99)) == (9, 19)


def test_block_bootstrap_brackets_the_excess_and_depends_on_its_seed_alone() -> None:
    weights, survival = simulate(30, 5_000, 0.97)
    gram = gram_of(weights)
    found = nulls.calibrate(gram, survival, bootstrap=50)
    for name in ("pc1", "pc1_unit"):
        assert found[name].low < 0.0 < found[name].high  # a walk exceeds its null by nothing
        assert found[name].high - found[name].low < 0.05
    planted, survival = simulate(30, 5_000, 0.97, drift=20.0)
    assert nulls.calibrate(gram_of(planted), survival, bootstrap=50)["pc1"].low > 0.01
    null = nulls.walk(gram)
    assert nulls.block_bootstrap(gram, null, 20, seed=1) == nulls.block_bootstrap(gram, null, 20, seed=1)
    assert nulls.block_bootstrap(gram, null, 20, seed=1) != nulls.block_bootstrap(gram, null, 20, seed=2)
    assert np.isnan(found["drift"].low)


def test_bootstrap_equals_one_pca_a_draw() -> None:
    """The batch of eigenvalue problems against the library's own PCA of the same resampled rows."""
    gram = gram_of(bent_path(24, 60))
    null = nulls.decaying_walk(gram, [0.97**k for k in range(24)])
    rows, draws, length = pca.drifts(24)[1:], 40, 3
    starts = np.random.Generator(np.random.Philox(key=5)).integers(0, 23 - length + 1, size=(draws, 8))
    found: dict[str, list[float]] = {"pc1": [], "pc1_unit": [], "k95": [], "k95_unit": []}
    for draw in starts:
        taken = rows[torch.from_numpy(np.concatenate([np.arange(s, s + length) for s in draw])[:23])]
        for suffix, unit in (("", False), ("_unit", True)):
            ours, theirs = (pca.pca(path, taken, normalise=unit) for path in (gram, null))
            found[f"pc1{suffix}"].append(ours.pc1 - theirs.pc1)
            found[f"k95{suffix}"].append(ours.components_for(0.95) - theirs.components_for(0.95))
    intervals = nulls.block_bootstrap(gram, null, draws, seed=5)
    assert intervals.keys() == found.keys()
    for name, values in found.items():
        assert intervals[name] == pytest.approx(tuple(np.quantile(values, (0.025, 0.975))), abs=1e-9)
