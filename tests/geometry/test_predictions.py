"""What the paper predicts of moments and growth, against simulated gradients and the written equations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import gram_of, normal
from torch import Tensor

from mini_gpt_pl.geometry.optimizer.predictions import (
    averaging,
    averaging_metrics,
    backbone_growth,
    memory,
    memory_metrics,
    spread,
    white_noise,
)
from mini_gpt_pl.geometry.path import pca


def test_memory_and_averaging() -> None:
    assert memory(0.95) == pytest.approx(19.4957, abs=1e-4)
    assert (memory(0.0), memory(1.0)) == (0.0, math.inf)
    assert averaging(0.9) == pytest.approx(1 / 19)


def test_white_noise() -> None:
    first = white_noise(0.9, 0.95, 1)
    assert (first.coherence, first.coherence_median, first.size) == pytest.approx((1, 1, 1))  # the sign of the gradient
    long = white_noise(0.9, 0.999, 10**6)  # v is sigma^2, m is normal
    assert long.coherence == pytest.approx(1 / 19, rel=0.05)
    assert long.size == pytest.approx(math.sqrt(2 / math.pi / 19), rel=0.05)
    assert long.coherence_median == pytest.approx(0.4549 / 19, rel=0.1)
    assert white_noise(0.0, 0.0, 50).coherence == pytest.approx(1.0)
    forgetful = white_noise(0.9, 0.0, 500)  # m / |g|: a ratio of normals, Cauchy to a good part
    assert not forgetful.has_means and long.has_means
    assert set(memory_metrics(torch.ones(5), forgetful)) == {"coherence_median"}


@pytest.mark.parametrize(("beta2", "steps"), [(0.95, 30), (0.9, 4), (0.5, 100)])
def test_white_noise_is_that_of_the_recursion(beta2: float, steps: int) -> None:
    m, _, v = _moments(0.0, 0.9, beta2, steps)
    null, square = white_noise(0.9, beta2, steps), m.square() / v
    assert null.coherence == pytest.approx(float(square.mean()), rel=0.06)
    assert null.coherence_median == pytest.approx(float(square.median()), rel=0.06)
    assert null.size == pytest.approx(float(square.sqrt().mean()), rel=0.06)


def _moments(signal: float, beta1: float, beta2: float, steps: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """m_hat, the m_hat of seven steps before and v_hat of gradients with mean +-signal and deviation 1."""
    random = np.random.Generator(np.random.Philox(key=5))
    size = 20000
    mean = signal * np.where(np.arange(size) % 2, 1.0, -1.0)
    m, v, earlier = np.zeros(size), np.zeros(size), np.zeros(size)
    for t in range(1, steps + 1):
        grad = mean + random.standard_normal(size)
        m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad**2
        if t == steps - 7:
            earlier = m / (1 - beta1**t)
    done = (m / (1 - beta1**steps), earlier, v / (1 - beta2**steps))
    return tuple(torch.from_numpy(x) for x in done)  # type: ignore[return-value]


@pytest.mark.parametrize("signal", [0.0, 0.3, 1.0, 3.0])
def test_the_signal_to_noise_ratio_is_found(signal: float) -> None:
    m, _, v = _moments(signal, 0.9, 0.99)
    found = memory_metrics(m / v.sqrt(), white_noise(0.9, 0.99, 200))
    assert float(found["snr"]) == pytest.approx(signal, rel=0.05, abs=0.06)
    if signal >= 1.0:  # eq. 19, where noise no longer makes the size
        predicted = signal / math.sqrt(1 + signal**2)
        assert float(found["update_size_predicted"]) == pytest.approx(predicted, rel=0.03)
        assert float(found["update_size"]) == pytest.approx(predicted, rel=0.05)
    if signal == 0.0:
        assert float(found["update_size"]) == pytest.approx(white_noise(0.9, 0.99, 200).size, rel=0.03)


def test_white_gradients_obey_equations_17_and_18() -> None:
    m, earlier, v = _moments(0.3, 0.9, 0.99)
    found = averaging_metrics(m, earlier, v, 0.9, 7)
    assert float(found["momentum_variance"]) == pytest.approx(1 / 19, rel=0.03)
    assert float(found["momentum_variance_predicted"]) == pytest.approx(1 / 19, rel=0.03)
    assert float(found["amplification"]) == pytest.approx(math.sqrt(19), rel=0.03)
    assert float(found["amplification_predicted"]) == pytest.approx(math.sqrt(19))


def test_spread_in_decades() -> None:
    assert float(spread(torch.logspace(-6, -2, 1001, dtype=torch.float64))) == pytest.approx(3.2)


def test_growth_along_a_line_and_of_a_walk() -> None:
    line = torch.arange(5)[:, None] * normal(40)[None] + 1.0
    grown = backbone_growth(gram_of(line))
    assert grown is not None
    assert (grown.predicted, grown.measured) == pytest.approx((1, 1))
    assert backbone_growth(gram_of(torch.ones(3, 40, dtype=torch.float64))) is None


def test_growth_is_equation_21() -> None:
    weights = normal(9, 30, seed=3).cumsum(0)
    gram = gram_of(weights)
    found = backbone_growth(gram)
    rows = (weights - weights[0])[1:].numpy()
    direction = np.linalg.svd(rows)[2][0]
    steps = np.diff(weights.numpy(), axis=0)
    along = steps @ direction
    across = ((steps - along[:, None] * direction) ** 2).sum(1).mean()
    top = 8**2 * along.mean() ** 2
    assert found is not None
    assert found.predicted == pytest.approx(top / (top + 8 * across))
    assert found.measured == pytest.approx((rows[-1] @ direction) ** 2 / (rows[-1] @ rows[-1]))
    assert pca.drifts(9).shape == gram.shape
