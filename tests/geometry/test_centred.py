"""Centred PCA, windows and innovations against float64 weights, closed forms of walks and decay, and their nulls."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import bent_path, flat_selection, gram_of, normal, one_line_error, record, walk_gram
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mini_gpt_pl.geometry.path import centred, innovations, nulls, pca, windows
from mini_gpt_pl.geometry.path.centred import centred_statistics

N, D = 16, 2000
KEEP = [1.0, 0.9, 0.85, *np.geomspace(0.8, 0.1, N - 3)]  # uneven decay


def decayed(weights: Tensor) -> Tensor:
    """A bent path whose theta_0 is large and shrinks, so that every part of the algebra has something to do."""
    return weights + 20 * torch.tensor(KEEP, dtype=torch.float64)[:, None] * normal(D, seed=9)


WEIGHTS = decayed(bent_path(N, D))
H = gram_of(WEIGHTS)


def share(rows: Tensor) -> Tensor:
    energy = torch.linalg.svdvals(rows).square()
    return energy / energy.sum()


def first(rows: Tensor) -> Tensor:
    """First right singular vector, last row's coordinate positive."""
    v = torch.linalg.svd(rows, full_matrices=False)[2][0]
    return v if rows[-1] @ v >= 0 else -v


def innovations_of(weights: Tensor) -> Tensor:
    rho = torch.from_numpy(np.array(KEEP[1:]) / np.array(KEEP[:-1]))
    return weights[1:] - rho[:, None] * weights[:-1]


def lag1(steps: Tensor) -> float:
    lengths = steps.norm(dim=1)
    return float((steps[1:] * steps[:-1]).sum() / (lengths[1:] * lengths[:-1]).sum())


def test_statistics_are_those_of_the_weights_themselves() -> None:
    found = {name: float(values[0]) for name, values in centred_statistics(H[None], KEEP).items()}
    rows, x = WEIGHTS - WEIGHTS.mean(0), WEIGHTS[1:] - WEIGHTS[0]
    unit, axis = x / x.norm(dim=1, keepdim=True), WEIGHTS[0] / WEIGHTS[0].norm()
    shares, innovation = share(rows), innovations_of(WEIGHTS)
    start = WEIGHTS[:-1] / WEIGHTS[:-1].norm(dim=1, keepdim=True)
    singular = shares.sqrt() / shares.sqrt().sum()
    expected = {
        "pc1_centred": float(shares[0]),
        "pc2_centred": float(shares[1]),
        **{f"k{p}_centred": float((shares.cumsum(0) < p / 100).sum() + 1) for p in (90, 95, 99)},
        "rank_variances": math.exp(-sum(float(p * p.log()) for p in shares if p > 1e-20)),
        "rank_singular_values": math.exp(-sum(float(p * p.log()) for p in singular[:-1])),
        "pc1_centred_off": float(share(rows - (rows @ axis)[:, None] * axis)[0]),
        "pc1": float(share(x)[0]),
        "cos_theta0_centred": float(first(rows) @ axis),
        "cos_theta0": float(first(x) @ axis),
        "cos_theta0_unit": float(first(unit) @ axis),
        "energy_theta0": float((x @ axis).square().sum() / x.square().sum()),
        "autocorrelation": lag1(WEIGHTS.diff(dim=0)),
        "autocorrelation_innovations": lag1(innovation),
        "autocorrelation_tangential": lag1(innovation - (innovation * start).sum(1, keepdim=True) * start),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6 if name.startswith("rank") else 1e-9), name
    assert abs(expected["pc1_centred"] - expected["pc1_centred_off"]) > 0.01  # the axis matters on this path
    assert min(abs(expected[f"cos_theta0{kind}"]) for kind in ("", "_centred", "_unit")) > 0.1


def test_several_paths_at_once_are_each_by_itself() -> None:
    paths = [H, nulls.walk(H), nulls.decaying_walk(H, KEEP)]
    together = centred_statistics(torch.stack(paths), KEEP)
    for k, path in enumerate(paths):
        for name, values in centred_statistics(path[None], KEEP).items():
            torch.testing.assert_close(together[name][k], values[0], rtol=1e-6, atol=1e-9, msg=name)


@given(st.integers(0, N - 1))
def test_the_origin_of_the_rows_does_not_matter(anchor: int) -> None:
    rows = centred.centred(pca.drifts(N, anchor))
    torch.testing.assert_close(pca.energies(H[None], rows), pca.energies(H[None], centred.centred(pca.weights(N))))


def test_limits_of_a_walk_of_pure_decay_and_of_noise() -> None:
    n = 1501
    walk = pca.pca(walk_gram(n - 1), centred.centred(pca.drifts(n)))
    # A Brownian motion minus its mean has the spectrum 1 / (k pi)^2 (Karhunen and Loeve).
    expected = 6 / (math.pi * torch.arange(1, 6)).square()
    torch.testing.assert_close(walk.ratios[:5], expected.double(), rtol=2e-3, atol=0)
    uncentred = pca.pca(walk_gram(n - 1), pca.drifts(n)[1:])
    assert uncentred.pc1 == pytest.approx(8 / math.pi**2, rel=1e-3)
    keep = [0.9**k for k in range(30)]
    decay = centred_statistics(gram_of(torch.tensor(keep, dtype=torch.float64)[:, None] * normal(40))[None], keep)
    for name in ("pc1_centred", "pc1", "k99_centred", "rank_variances", "energy_theta0"):
        assert float(decay[name]) == pytest.approx(1.0), name
    for name in ("cos_theta0_centred", "cos_theta0"):
        assert float(decay[name]) == pytest.approx(-1.0), name
    for name in ("pc1_centred_off", "autocorrelation_innovations", "autocorrelation_tangential"):
        assert math.isnan(float(decay[name])), name  # nothing is left, and rounding is not something
    noise = centred_statistics(gram_of(normal(50, 20_000))[None], [1.0] * 50)
    assert float(noise["pc1_centred"]) == pytest.approx(1 / 49, rel=0.15)
    assert float(noise["k95_centred"]) > 40


def test_growing_windows_and_where_their_curve_turns() -> None:
    ends = windows.growing_ends(N, 6)
    assert ends[0] == 5 and ends[-1] == N and len(ends) <= 6
    assert windows.growing_ends(300)[0] == 20 and len(windows.growing_ends(300)) == 20
    assert windows.growing_ends(4) == [4]
    curve = centred.growing_pc1(H, ends)
    expected = [float(share(WEIGHTS[:t] - WEIGHTS[:t].mean(0))[0]) for t in ends]
    np.testing.assert_allclose(curve, expected, rtol=1e-9)
    both = centred.growing_pc1(torch.stack([nulls.walk(H), H]), ends)
    torch.testing.assert_close(both[1], curve)
    assert both[0, 0] != both[1, 0]

    def turn(*values: float) -> int | None:
        return centred.turnover(torch.tensor(values, dtype=torch.float64))

    assert turn(0.8, 0.5, 0.6, 0.9, 0.7, 0.6) == 3
    assert turn(0.9, 0.8, 0.7, 0.5, 0.6, 0.7) is None  # falls before the minimum are none after it
    assert turn(0.5, 0.9, 0.8, 0.85, 0.7, 0.6) == 3  # one fall is not a turn
    assert turn(0.9, 0.8, 0.7) is None


def test_a_part_of_a_path_is_the_path_of_those_snapshots() -> None:
    chosen = [2, 3, 7, 15]
    torch.testing.assert_close(windows.part(H, chosen), gram_of(WEIGHTS[chosen]))
    with pytest.raises(ValueError, match="ascending"):
        windows.part(H, [3, 3])
    _, trajectory = record(flat_selection(D), WEIGHTS)  # a snapshot every 100 steps, survival 0.9^k
    cut = windows.window(trajectory, 250, 1200, every=200)
    assert cut.steps == [300, 400, 600, 800, 1000, 1200]
    torch.testing.assert_close(cut.gram(), gram_of(WEIGHTS[[3, 4, 6, 8, 10, 12]]))
    assert cut.survival == pytest.approx([1.0, 0.9, 0.9**3, 0.9**5, 0.9**7, 0.9**9])
    assert windows.window(trajectory).steps == trajectory.steps
    with one_line_error("steps 0 to 100 hold 2 snapshots"):
        windows.window(trajectory, last=100)


# ------------------------------------------------------------------------------------------------- innovations


def test_innovations_and_back() -> None:
    own = innovations.innovations(H, KEEP)
    expected = torch.cat([WEIGHTS[:1], innovations_of(WEIGHTS)])
    torch.testing.assert_close(own, expected @ expected.T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(innovations.path_of(own, KEEP), H, rtol=1e-9, atol=1e-8)
    torch.testing.assert_close(innovations.innovations(H, [1.0] * N), H)
    with pytest.raises(ValueError, match="one surviving share per snapshot"):
        innovations.innovations(H, KEEP[:-1])


def test_innovation_walk_by_explicit_vectors_and_where_it_leaves_the_other_null() -> None:
    null = innovations.innovation_walk(H, KEEP)
    theta = torch.zeros(N, dtype=torch.float64)
    theta[0] = WEIGHTS[0].norm()
    path, lengths = [theta], innovations_of(WEIGHTS).norm(dim=1)
    for k in range(1, N):
        theta = theta * (KEEP[k] / KEEP[k - 1])
        theta[k] = lengths[k - 1]
        path.append(theta)
    torch.testing.assert_close(null, gram_of(torch.stack(path)), rtol=1e-9, atol=1e-8)
    # Innovations that are orthogonal to the weights: both nulls are the path itself.
    for other in (innovations.innovation_walk(null, KEEP), nulls.decaying_walk(null, KEEP)):
        torch.testing.assert_close(other, null, rtol=1e-9, atol=1e-8)
    # At rest against decay, the run takes no step; this null does, and the other keeps only decay's.
    resting = gram_of(torch.ones(N, 1, dtype=torch.float64) * normal(50) + 1e-6 * normal(N, 50, seed=2))
    steps = innovations.innovation_walk(resting, KEEP).diag()[1:]
    assert bool((steps > 1e6 * resting.diag()[1:]).all())
    assert bool((steps[1:] > nulls.decaying_walk(resting, KEEP).diag()[2:]).all())
    torch.testing.assert_close(innovations.innovation_walk(H, [1.0] * N), nulls.walk(H))


def test_autoregressive_walk_has_the_measured_lengths_and_correlation() -> None:
    for survival in (None, KEEP):
        null = innovations.autoregressive_walk(H, survival)
        ours, theirs = (innovations.innovations(h, survival or [1.0] * N) for h in (H, null))
        torch.testing.assert_close(theirs.diag(), ours.diag(), rtol=1e-9, atol=1e-8)
        expected = nulls.autocorrelation(ours, 1)
        torch.testing.assert_close(nulls.autocorrelation(theirs, 1), expected, rtol=1e-8, atol=0)
        cosines = theirs / theirs.diag().sqrt()[:, None] / theirs.diag().sqrt()
        torch.testing.assert_close(cosines[1:, 1:].diagonal(3), (expected**3).expand(N - 4), rtol=1e-6, atol=1e-9)
        assert float(cosines[0, 1:].abs().max()) < 1e-9
    line = gram_of(torch.arange(6.0, dtype=torch.float64)[:, None] * normal(9) + normal(9, seed=1))
    assert float(torch.linalg.eigvalsh(innovations.autoregressive_walk(line)).min()) > -1e-6


def simulated(phi: float, dim: int, snapshots: int, keep: float, seed: int, push: float = 0.0) -> Tensor:
    """Gram of decaying weights with autoregressive innovations of uneven length."""
    noise = normal(snapshots, dim, seed=seed) / math.sqrt(dim)
    direction, theta, out = noise[0], 3 * normal(dim, seed=seed + 1) / math.sqrt(dim), []
    for k in range(snapshots):
        out.append(theta)
        direction = phi * direction + math.sqrt(1 - phi**2) * noise[k]
        theta = keep * theta + (1 + k % 3) * direction + push
    return gram_of(torch.stack(out))


def test_persistence_finds_what_was_put_in_and_says_how_sure_it_is() -> None:
    for phi in (0.0, 0.4):
        found = [innovations.correlation(simulated(phi, 60, 40, 0.9, s), [0.9**k for k in range(40)], 60)
                 for s in range(0, 400, 2)]  # fmt: skip
        values, errors = np.array([f.value for f in found]), np.array([f.error for f in found])
        assert values.mean() == pytest.approx(phi, abs=0.01)
        assert errors.mean() == pytest.approx(values.std(), rel=0.25)
        if phi == 0:
            assert np.mean([f.chance for f in found]) == pytest.approx(values.std(), rel=0.15)
            covered = np.abs(values) < 1.96 * errors
            assert 0.9 < covered.mean() < 0.99


def test_rest_against_decay_looks_persistent_but_not_tangentially() -> None:
    keep = [0.9**k for k in range(30)]
    resting = gram_of(torch.ones(30, 1, dtype=torch.float64) * normal(500) + 0.01 * normal(30, 500, seed=2))
    assert innovations.correlation(resting, keep, 500).value > 0.95
    assert innovations.correlation(resting, keep, 500, tangential=True).value < 0.1
    nothing = innovations.correlation(torch.diag(torch.tensor([1.0, 0, 0, 0]).double()), [1.0] * 4, 5)
    assert math.isnan(nothing.value) and math.isnan(nothing.chance)
