r"""How long the projection of a vector on a subspace is by chance.

K random directions of P dimensions hold a share of |v|^2 that is distributed as Beta(K/2, (P-K)/2), with mean K/P. For
16 of 290,401 dimensions that is 5.5e-5: the part across the subspace is 99.997 % of ANY vector, and finding it is no
finding.

The null that is matched to a basis in blocks has its random directions inside the same blocks, as many in each. The
share is then a sum over blocks of (the vector's energy there) x Beta(k/2, (d-k)/2), so mean and variance are known
without sampling:

    mean = sum_g e_g k_g / d_g,   e_g = energy of the vector in block g as a share of the whole.

Its quantiles are those of the Beta distribution with this mean and variance, which for one block is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

# Points of the grid on which a Beta distribution is summed up.
_POINTS = 20001


@dataclass(frozen=True, eq=False)
class Projection:
    """Squared lengths of a vector (or of several, in leading axes) in and out of a basis.

    `along` is inside the subspace and `energy` in the stretch of each block, which has `sizes` directions of `dims`
    values; `total` is over all weights that the vector has, `dim` = P.
    """

    along: Float[Tensor, "*batch blocks"]
    energy: Float[Tensor, "*batch blocks"]
    total: Float[Tensor, "*batch"]
    sizes: tuple[int, ...]
    dims: tuple[int, ...]
    dim: int

    @classmethod
    def stack(cls, parts: Sequence[Projection]) -> Projection:
        """Put projections on one basis together, along a new first axis."""
        along, energy, total = (torch.stack([getattr(p, name) for p in parts]) for name in ("along", "energy", "total"))
        return replace(parts[0], along=along, energy=energy, total=total)

    def cpu(self) -> Projection:
        """Move to the host."""
        return replace(self, along=self.along.cpu(), energy=self.energy.cpu(), total=self.total.cpu())

    @property
    def share(self) -> Float[Tensor, "*batch"]:
        """Share of the squared length inside the subspace; NaN for a zero vector."""
        return self._over_total(self.along.sum(-1))

    @property
    def ratio(self) -> Float[Tensor, "*batch"]:
        """Length inside the subspace over the whole length, |proj| / |v|."""
        return self.share.sqrt()

    @property
    def residual(self) -> Float[Tensor, "*batch"]:
        """Length across the subspace over the whole length: the published "integrability" rho, 1 for any vector."""
        return (1.0 - self.share).clamp_min(0.0).sqrt()

    @property
    def isotropic(self) -> float:
        """Expected share if the directions were random in all weights, K/P."""
        return sum(self.sizes) / self.dim

    @property
    def matched(self) -> Float[Tensor, "*batch"]:
        """Expected share if they were random in the same blocks."""
        return self._over_total((self.energy * self._means()).sum(-1))

    def null(self) -> list[ShareNull]:
        """Distribution of the share, for the directions random in the same blocks, one for each vector of a batch."""
        weights = (self.energy / self.total[..., None]).reshape(-1, len(self.sizes)).cpu()
        means = self._means().cpu()
        spreads = means * (1 - means) / (torch.tensor(self.dims, dtype=torch.float64) / 2 + 1)
        pairs = zip((weights * means).sum(-1).tolist(), (weights.square() * spreads).sum(-1).tolist(), strict=True)
        return [ShareNull(mean, variance) for mean, variance in pairs]

    def _means(self) -> Float[Tensor, " blocks"]:
        shares = [k / d for k, d in zip(self.sizes, self.dims, strict=True)]
        return torch.tensor(shares, dtype=torch.float64, device=self.along.device)

    def _over_total(self, part: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        return torch.where(self.total > 0, part / self.total, torch.nan)


@dataclass(frozen=True)
class ShareNull:
    """Beta distribution of a share by its mean and variance."""

    mean: float
    variance: float

    @cached_property
    def parameters(self) -> tuple[float, float]:
        """The a and b of Beta(a, b); NaN where there is no spread."""
        if not (0 < self.mean < 1 and self.variance > 0):
            return math.nan, math.nan
        both = self.mean * (1 - self.mean) / self.variance - 1
        return self.mean * both, (1 - self.mean) * both

    def quantile(self, q: float) -> float:
        """Share below which a fraction q of random subspaces lies."""
        x, below = self._distribution
        return float(np.interp(q, below, x))

    def below(self, share: float) -> float:
        """Fraction of random subspaces that hold less than a share: where a measured one stands in its null."""
        x, below = self._distribution
        return float(np.interp(share, x, below)) if share == share else math.nan

    @cached_property
    def _distribution(self) -> tuple[np.ndarray, np.ndarray]:
        """Shares and the probability below each.

        With x = sin^2 phi the density is sin^(2a-1) cos^(2b-1): bounded for a, b >= 1/2, with a width of about
        1 / sqrt(2a + 2b), so an even grid over a dozen widths around its peak sums it up.
        """
        a, b = self.parameters
        if a != a:
            return np.array([self.mean, self.mean]), np.array([0.5, 0.5])
        power = max(2 * a - 1, 0.0), max(2 * b - 1, 0.0)
        peak, width = math.atan2(math.sqrt(power[0]), math.sqrt(power[1])), 12 / math.sqrt(2 * a + 2 * b)
        phi = np.linspace(max(0.0, peak - width), min(math.pi / 2, peak + width), _POINTS)
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = [
                p * np.log(f(phi)) if p else np.zeros_like(phi) for p, f in zip(power, (np.sin, np.cos), strict=True)
            ]
        density = np.exp(logs[0] + logs[1] - np.nanmax(logs[0] + logs[1]))
        steps = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
        return np.sin(phi) ** 2, steps / steps[-1]


def flipped_cosine(u: Float[Tensor, " D"], v: Float[Tensor, " D"]) -> Float[Tensor, ""]:
    """Standard deviation of cos(u, v) if the signs of one vector's coordinates were coins.

    sqrt(sum_i u_i^2 v_i^2) / (|u| |v|). Two vectors that concentrate in the same few coordinates have larger cosines by
    chance than the 1/sqrt(D) of isotropic ones; this null knows it. Its mean is 0.
    """
    scale = torch.linalg.vector_norm(u, dtype=torch.float64) * torch.linalg.vector_norm(v, dtype=torch.float64)
    return torch.linalg.vector_norm(u.double() * v.double()) / scale
