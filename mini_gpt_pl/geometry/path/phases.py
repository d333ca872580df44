r"""Whether two series of one run move together: correlation against phase-randomised surrogates.

Two smooth series that have nothing to do with each other correlate, because each has few independent values. A
surrogate of a series keeps its power spectrum, hence its autocorrelation, and draws the Fourier phases anew (Theiler et
al. 1992). Series must be evenly spaced and have no trend: take changes between records, not levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def phase_randomised(series: Float[Tensor, " n"], draws: int, seed: int = 0) -> Float[Tensor, "draws n"]:
    """Draw series of the same mean and power spectrum with independent uniform phases."""
    n = len(series)
    spectrum = torch.fft.rfft(series.double())
    rng = np.random.Generator(np.random.Philox(key=seed))
    angles = torch.from_numpy(rng.uniform(0, 2 * np.pi, (draws, len(spectrum))))
    turns = torch.polar(torch.ones_like(angles), angles)
    turns[:, 0] = 1.0  # the mean
    if n % 2 == 0:
        # The last frequency of an even number of values is real: its phase is a sign.
        turns[:, -1] = torch.from_numpy(rng.choice([-1.0, 1.0], draws)).to(turns.dtype)
    return torch.fft.irfft(spectrum * turns, n=n)


@dataclass(frozen=True)
class Correlated:
    """A correlation of two series beside that of surrogates.

    Args:
        value: Pearson's r.
        level: |r| that 95 % of the surrogates stay under.
        p: Share of surrogates whose |r| is at least as large, the measured one counted among them.
    """

    value: float
    level: float
    p: float


def correlate(x: Float[Tensor, " n"], y: Float[Tensor, " n"], draws: int = 999, seed: int = 0) -> Correlated:
    """Correlate changes of two quantities at the same steps, and compare with surrogates of the second.

    NaN throughout if a series is constant.
    """
    drawn = _unit(torch.cat([y.double()[None], phase_randomised(y, draws, seed)])) @ _unit(x.double()[None])[0]
    value, others = float(drawn[0]), drawn[1:].abs()
    if not torch.isfinite(drawn).all():
        return Correlated(*[float("nan")] * 3)
    # Rounding must not make a surrogate that equals the series (at two or three values) smaller than it.
    reached = int((others >= abs(value) - 1e-12).sum())
    return Correlated(value, float(torch.quantile(others, 0.95)), (1 + reached) / (1 + draws))


def _unit(rows: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
    """Rows without their mean, at length 1; NaN for rows that are constant."""
    off = rows - rows.mean(-1, keepdim=True)
    return off / torch.where(
        off.abs().amax(-1, keepdim=True) > 1e-12 * rows.abs().amax(), off.norm(dim=-1, keepdim=True), torch.nan
    )
