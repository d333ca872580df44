r"""What arXiv 2602.23696 predicts of Adam (eqs. 17 to 21), beside what white noise alone would give.

Gradients of mean mu and standard deviation sigma, averaged with memories beta1 and beta2: how much noise the first
moment keeps (eqs. 17 and 18), how long an update is (eq. 19), and how the backbone's share of the drift grows over the
intervals (eqs. 20 and 21).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mini_gpt_pl.geometry.path import pca
from mini_gpt_pl.geometry.path.pca import Gram

# Normal deviates behind one `white_noise`.
_DEVIATES = 1 << 17

Array = np.ndarray[Any, np.dtype[np.float64]]
Spectrum = np.ndarray[Any, np.dtype[np.complex128]]


def memory(beta: float) -> float:
    """Steps after which a moment has forgotten all but 1/e, -1 / ln(beta)."""
    return 0.0 if beta <= 0.0 else math.inf if beta >= 1.0 else -1.0 / math.log(beta)


def averaging(beta1: float) -> float:
    """Var[m_i] / sigma_i^2 of white gradient noise, (1 - beta1) / (1 + beta1) (eq. 17)."""
    return (1.0 - beta1) / (1.0 + beta1)


@dataclass(frozen=True)
class WhiteNoise:
    """What gradients without any mean make of u = m_hat / sqrt(v_hat).

    Args:
        coherence: Mean of u^2; its limit for beta2 -> 1 is (1 - beta1) / (1 + beta1).
        coherence_median: Median of u^2.
        size: Mean of |u|.
    """

    coherence: float
    coherence_median: float
    size: float

    @property
    def has_means(self) -> bool:
        """Whether the two means say anything: at step 1 |u| is 1, and for beta2 = 0 both means are infinite."""
        return self.coherence < 0.999


@cache
def _transforms() -> tuple[Spectrum, Spectrum]:
    """Fourier transforms of the null's deviates and of their squares: the same for every beta and step."""
    draws = np.random.Generator(np.random.Philox(key=0)).standard_normal(_DEVIATES)
    return np.fft.rfft(draws), np.fft.rfft(draws**2)


def _average_on_ring(transform: Spectrum, beta: float, reach: int) -> Array:
    """Bias-corrected exponential average over the last `reach` values, at every place of a ring."""
    weights = np.zeros(_DEVIATES)
    weights[:reach] = np.power(beta, np.arange(reach))
    averaged: Array = np.fft.irfft(transform * np.fft.rfft(weights / weights.sum()), _DEVIATES)
    return averaged


@lru_cache(maxsize=64)
def white_noise(beta1: float, beta2: float, steps: int) -> WhiteNoise:
    """Draw the null of the update's size: standard normal gradients through both moments, after some steps.

    The draw is fixed: 131,072 steps of one coordinate on a ring, along which both moments are averaged with their
    weights after `steps` steps. That leaves an error of about 2 % at beta1 = 0.9.
    """
    # Beyond sixteen memories nothing changes: callers then share one cached answer.
    reach = max(1, int(min(steps, _DEVIATES, 16 * max(memory(beta1), memory(beta2), 1.0))))
    if reach < steps:
        return white_noise(beta1, beta2, reach)
    noise, squares = _transforms()
    first, second = _average_on_ring(noise, beta1, reach), _average_on_ring(squares, beta2, reach)
    square = first**2 / second
    return WhiteNoise(float(square.mean()), float(np.median(square)), float(np.sqrt(square).mean()))


def memory_metrics(u: Float[Tensor, " C"], null: WhiteNoise) -> dict[str, Float[Tensor, ""]]:
    r"""Effective signal-to-noise ratio of the gradients, and eq. 19 beside what is measured.

    With mean mu and variance sigma^2 of a coordinate's gradient and SNR = mu / sigma, eq. 19 has
    |u| = SNR / sqrt(1 + SNR^2). But u^2 is c > 0 on noise alone, so the share f = SNR^2 / (1 + SNR^2) of the signal is
    read from mean(u^2) = c + (1 - c) f, right at both ends.

    Args:
        u: m_hat / (sqrt(v_hat) + eps) of some coordinates.
        null: Of the same optimizer.

    Returns:
        coherence_median of u^2; where the null has means, too, coherence = mean(u^2), snr = sqrt(f / (1 - f)),
        update_size = mean |u| and update_size_predicted = sqrt(f).
    """
    square = u.double().square()
    found = {"coherence_median": torch.quantile(square, 0.5)}
    if not null.has_means:
        return found
    signal = ((square.mean() - null.coherence) / (1.0 - null.coherence)).clamp(0.0, 1.0 - 1e-12)
    return found | {
        "coherence": square.mean(),
        "snr": (signal / (1.0 - signal)).sqrt(),
        "update_size": u.double().abs().mean(),
        "update_size_predicted": signal.sqrt(),
    }


def averaging_metrics(
    moment: Float[Tensor, " C"],
    earlier: Float[Tensor, " C"],
    second: Float[Tensor, " C"],
    beta1: float,
    lag: int,
) -> dict[str, Float[Tensor, ""]]:
    r"""Variance of the first moment, measured between two steps, beside eqs. 17 and 18.

    For white noise around a mean that has not moved, E (m_t - m_{t-k})^2 = 2 Var[m] (1 - beta1^k). The noise of single
    gradients is sigma^2 = (v_hat - m_hat^2) / (1 - c), c = (1 - beta1) / (1 + beta1). Noise that is correlated from
    step to step shows as more variance, and less amplification, than predicted.

    Args:
        moment: m_hat of some coordinates.
        earlier: The same, `lag` steps ago.
        second: v_hat.
        beta1: Of the first moment.
        lag: Steps between the two, 1 or more.

    Returns:
        momentum_variance and momentum_variance_predicted = c sigma^2 (eq. 17), amplification = sigma / sqrt(Var[m])
        and amplification_predicted = sqrt((1 + beta1) / (1 - beta1)) (eq. 18); sums over the coordinates come first.
    """
    share = averaging(beta1)
    measured = (moment.double() - earlier.double()).square().mean() / (2.0 * (1.0 - beta1**lag))
    noise = ((second.double() - moment.double().square()).mean() / (1.0 - share)).clamp_min(0.0)
    return {
        "momentum_variance": measured,
        "momentum_variance_predicted": share * noise,
        "amplification": (noise / measured).sqrt(),
        "amplification_predicted": torch.full_like(noise, share**-0.5),
    }


def spread(denominator: Float[Tensor, " C"]) -> Float[Tensor, ""]:
    """Decades between the 10 % and the 90 % quantile of sqrt(v_hat) + eps."""
    decades = denominator.double().clamp_min(1e-300).log10()
    return torch.quantile(decades, 0.9) - torch.quantile(decades, 0.1)


@dataclass(frozen=True)
class BackboneGrowth:
    """The backbone's share of the squared drift after T intervals.

    Args:
        predicted: T^2 d^2 / (T^2 d^2 + T s^2) for a mean displacement d along the backbone and a mean square s^2 across
            it in each interval (eqs. 20 and 21): what lies across cancels as a random walk does.
        measured: a(T)^2 / ||x(T)||^2.
    """

    predicted: float
    measured: float


def backbone_growth(gram: Gram) -> BackboneGrowth | None:
    """Compare how the backbone fraction has grown with eqs. 20 and 21; None where nothing has moved.

    Args:
        gram: H over (theta_0, d_1, ..., d_T), measured or of a null.
    """
    n = len(gram)
    if n < 2 or float(gram.diagonal()[1:].max()) <= 0.0:
        return None
    rows = pca.drifts(n)[1:]
    direction = pca.pca(gram, rows).backbone
    along = pca.inner(gram, torch.eye(n, dtype=torch.float64)[1:], direction)
    across = (gram.diagonal()[1:] - along.square()).clamp_min(0.0)
    linear, walk = ((n - 1) * along.mean()).square(), (n - 1) * across.mean()
    measured = pca.decompose(gram, rows[-1:], direction).fraction
    return BackboneGrowth(float(linear / (linear + walk)), float(measured))
