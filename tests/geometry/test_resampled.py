"""Ensembles of nulls against walks simulated weight by weight, and surrogates of two series."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import bent_path, gram_of, normal
from torch import Tensor

from mini_gpt_pl.geometry.path import innovations, nulls, phases, resampled
from mini_gpt_pl.geometry.path.centred import centred_statistics

N, DIM, DRAWS = 10, 200, 400
KEEP = [0.85**k for k in range(N)]
H = gram_of(bent_path(N, DIM) + 10 * torch.tensor(KEEP, dtype=torch.float64)[:, None] * normal(DIM, seed=9))
NAMES = ("pc1_centred", "pc2_centred", "pc1", "cos_theta0_centred", "autocorrelation_innovations")


def simulate(survival: list[float], phi: float) -> Tensor:
    """Gram matrices of walks of DIM weights, each step drawn as a DIM-vector of the measured length."""
    rng = np.random.Generator(np.random.Philox(key=99))
    lengths = innovations.innovations(H, survival).diag().sqrt().numpy()
    grams = []
    for _ in range(DRAWS):
        draw = rng.standard_normal((N, DIM))
        for k in range(2, N):
            draw[k] = phi * draw[k - 1] + math.sqrt(1 - phi**2) * draw[k]
        draw *= (lengths / np.linalg.norm(draw, axis=1))[:, None]
        path = [draw[0]]
        for k in range(1, N):
            path.append(survival[k] / survival[k - 1] * path[-1] + draw[k])
        grams.append(gram_of(torch.from_numpy(np.stack(path))))
    return torch.stack(grams)


@pytest.mark.parametrize(("decays", "phi"), [(False, 0.0), (True, 0.0), (True, 0.5)])
def test_drawn_gram_matrices_are_those_of_simulated_weights(decays: bool, phi: float) -> None:
    survival = KEEP if decays else [1.0] * N
    drawn = resampled.sampled_walk(H, DIM, DRAWS, seed=3, survival=survival if decays else None, phi=phi)
    ours, theirs = (centred_statistics(grams, KEEP) for grams in (drawn, simulate(survival, phi)))
    for name in NAMES:
        scatter = float(theirs[name].std())
        assert abs(float(ours[name].mean() - theirs[name].mean())) < 4 * scatter * math.sqrt(2 / DRAWS), name
        assert float(ours[name].std()) == pytest.approx(scatter, rel=0.2), name
    lengths = innovations.innovations(H, survival).diag()
    for gram in drawn[:3]:
        torch.testing.assert_close(innovations.innovations(gram, survival).diag(), lengths)


def test_few_dimensions_are_drawn_as_they_are() -> None:
    drawn = resampled.sampled_walk(H, 4, 20)
    assert bool((torch.linalg.matrix_rank(drawn, rtol=1e-9) == 4).all())
    torch.testing.assert_close(drawn[7].diag(), H.diag())
    for dim in (4, N, 30):  # no direction is preferred, on either side of the number of steps
        unit = resampled.sampled_walk(torch.eye(N, dtype=torch.float64), dim, 4000)
        torch.testing.assert_close(
            unit.square().mean(0)[N - 1, : N - 1].mean() * dim, torch.ones(()).double(), rtol=0.03, atol=0
        )


def test_many_dimensions_give_the_closed_forms() -> None:
    for survival, phi, closed in (
        (None, 0.0, nulls.walk(H)),
        (KEEP, 0.0, innovations.innovation_walk(H, KEEP)),
        (KEEP, float(innovations.lag1(innovations.innovations(H, KEEP))), innovations.autoregressive_walk(H, KEEP)),
    ):
        drawn = resampled.sampled_walk(H, 10**12, 2, survival=survival, phi=phi)
        torch.testing.assert_close(drawn[0], closed, rtol=1e-4, atol=1e-4 * float(H.diag().max()))


def test_decaying_walks_keep_the_lengths_of_increments() -> None:
    drawn = resampled.sampled_decaying_walk(H, KEEP, DIM, 50)
    closed = nulls.decaying_walk(H, KEEP)
    torch.testing.assert_close(drawn.diagonal(dim1=1, dim2=2), closed.diag().expand(50, -1))
    many = resampled.sampled_decaying_walk(H, KEEP, 10**12, 2)
    torch.testing.assert_close(many[0], closed, rtol=1e-4, atol=1e-4 * float(H.diag().max()))
    cosines = drawn / drawn.diagonal(dim1=1, dim2=2).sqrt()[:, :, None] / drawn.diagonal(dim1=1, dim2=2).sqrt()[:, None]
    expected = closed / closed.diag().sqrt()[:, None] / closed.diag().sqrt()
    assert float((cosines.mean(0) - expected).abs().max()) < 5 / math.sqrt(50 * DIM)
    assert float(cosines.std(0)[4, 2]) == pytest.approx(1 / math.sqrt(DIM), rel=0.4)
    # Decay faster than the measured steps: no innovation, so theta_0 shrinks and nothing else happens.
    short = torch.diag(torch.tensor([100.0, 0.01, 0.01], dtype=torch.float64))
    null = resampled.sampled_decaying_walk(short, [1.0, 0.5, 0.25], 7, 3)
    torch.testing.assert_close(null, nulls.decaying_walk(short, [1.0, 0.5, 0.25]).expand(3, 3, 3))


def test_permuted_steps_are_the_measured_ones_in_other_orders() -> None:
    weights = bent_path(6, 30)
    d = weights.diff(dim=0)
    drawn = resampled.permuted(gram_of(weights), 50, seed=1)
    assert len({tuple(gram.diag()[1:].tolist()) for gram in drawn}) > 30  # of 120
    for gram in drawn[:5]:
        order = [int((gram[k, k] - d.square().sum(1)).abs().argmin()) for k in range(1, 6)]
        assert sorted(order) == list(range(5))
        torch.testing.assert_close(gram, gram_of(torch.cat([weights[:1], weights[0] + d[order].cumsum(0)])))
    for gram in resampled.permuted(H, 5, survival=KEEP):
        own, measured = (innovations.innovations(h, KEEP) for h in (gram, H))
        torch.testing.assert_close(own.diag().sort().values, measured.diag().sort().values)
        torch.testing.assert_close(torch.linalg.eigvalsh(own), torch.linalg.eigvalsh(measured))
    assert torch.equal(resampled.permuted(H, 5, seed=2), resampled.permuted(H, 5, seed=2))
    assert not torch.equal(resampled.permuted(H, 5, seed=2), resampled.permuted(H, 5, seed=3))


def test_numbers_are_placed_among_their_nulls() -> None:
    found = resampled.place(H, KEEP, DIM, draws=60)
    drawn = resampled.ensembles(H, KEEP, DIM, draws=60)
    pc1 = found["pc1_centred"]
    walks = {"walk", "decaying_walk", "innovation_walk", "autoregressive_walk"}
    assert set(pc1.bands) == set(drawn) == walks | {"permuted", "permuted_innovations"}
    for name, grams in drawn.items():
        values = centred_statistics(grams, KEEP)["pc1_centred"]
        band = pc1.bands[name]
        assert (band.low, band.median, band.high) == pytest.approx(np.quantile(values, (0.025, 0.5, 0.975)))
        assert band.below == pytest.approx(float((values < pc1.value).double().mean()))
        assert pc1.excess(name) == pytest.approx(pc1.value - float(np.median(values)))
    persistent = found["autocorrelation_innovations"].bands
    assert persistent["innovation_walk"].below == 1.0  # the path has a drift
    assert 0.01 < persistent["autoregressive_walk"].below < 0.99  # and this null was given as much of one


def test_a_walk_lies_anywhere_among_walks() -> None:
    """Measured paths that are walks: the share of draws below them is uniform."""
    own = resampled.sampled_walk(H, DIM, 40, seed=11, survival=KEEP)
    shares = [resampled.place(gram, KEEP, DIM, draws=50)["pc1_centred"].bands["innovation_walk"].below for gram in own]
    assert 0.35 < float(np.mean(shares)) < 0.65 and float(np.std(shares)) > 0.2


def test_a_value_among_equal_draws_is_in_the_middle() -> None:
    band = resampled.band(torch.tensor(2.0), torch.tensor([1.0, 2.0, 2.0, math.nan, 3.0]))
    assert (band.median, band.below) == (2.0, 0.5)
    assert math.isnan(resampled.band(torch.tensor(2.0), torch.tensor([math.nan])).below)
    assert math.isnan(resampled.band(torch.tensor(math.nan), torch.tensor([1.0])).below)


# --------------------------------------------------------------------------------------------------- two series


def smooth(n: int, seed: int) -> Tensor:
    """A first-order autoregression with correlation 0.9, from its stationary state."""
    noise, out = normal(n + 100, seed=seed), [torch.zeros(())]
    for value in noise:
        out.append(0.9 * out[-1] + value)
    return torch.stack(out)[-n:].double()


@pytest.mark.parametrize("n", [40, 41])
def test_surrogates_keep_mean_and_power_spectrum(n: int) -> None:
    series = smooth(n, 1) + 5
    drawn = phases.phase_randomised(series, 30, seed=2)
    torch.testing.assert_close(drawn.mean(1), series.mean().expand(30))
    torch.testing.assert_close(torch.fft.rfft(drawn).abs(), torch.fft.rfft(series).abs().expand(30, -1))
    assert float(torch.corrcoef(drawn).fill_diagonal_(0).abs().max()) < 0.99  # and are not one another
    assert torch.equal(drawn, phases.phase_randomised(series, 30, seed=2))
    assert not torch.equal(drawn, phases.phase_randomised(series, 30, seed=3))


def test_smooth_series_correlate_by_chance_and_surrogates_know() -> None:
    pairs = [(smooth(64, 2 * k), smooth(64, 2 * k + 1)) for k in range(150)]
    found = [phases.correlate(x, y, draws=199) for x, y in pairs]
    naive = 1.96 / math.sqrt(64)  # of 64 independent values
    assert np.mean([abs(f.value) > naive for f in found]) > 0.3
    assert np.mean([f.p <= 0.05 for f in found]) < 0.12
    assert np.mean([abs(f.value) > f.level for f in found]) < 0.12


def test_related_series_are_found() -> None:
    x = smooth(64, 1)
    found = phases.correlate(x, -x + 0.5 * smooth(64, 2), draws=199)
    assert found.value == pytest.approx(float(np.corrcoef(x, -x + 0.5 * smooth(64, 2))[0, 1]))
    assert found.value < -0.8 and found.p <= 0.01 and found.level < abs(found.value)
    assert math.isnan(phases.correlate(x, torch.full((64,), 3.0)).p)
