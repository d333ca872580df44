r"""How concentrated attention is, and what becomes of it when few positions are kept.

Rows of attention weights are distributions over positions: entropy H = -sum_j A_j ln A_j, in nats, between 0 and ln n
for n visible positions, and the mass of the k largest weights, between k/n and 1. Both limits are those of even
attention, so a value is read against them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Change = Callable[[Float[Tensor, "*rows T"]], Float[Tensor, "*rows T"]]
"""Takes attention weights, gives other ones: rows that sum to 1 in both."""


def entropy(weights: Float[Tensor, "*rows T"]) -> Float[Tensor, "*rows"]:
    """-sum_j A_j ln A_j of each row, in nats; positions of weight 0 add nothing.

    Example:
        >>> round(float(entropy(torch.full((16,), 1 / 16)).exp()), 3)
        16.0
    """
    return torch.special.entr(weights).sum(-1)


def top_mass(weights: Float[Tensor, "*rows T"], ks: Sequence[int]) -> Float[Tensor, "*rows k"]:
    """Sum of the k largest weights of each row, for several k; all of it where a row has no more than k."""
    reached = weights.sort(-1, descending=True).values.cumsum(-1)
    return torch.stack([reached[..., min(k, weights.shape[-1]) - 1] for k in ks], -1)


def visible(weights: Float[Tensor, "*rows T"]) -> Float[Tensor, ""]:
    """Number of positions that any of the rows gives a weight: n, those that the mask leaves."""
    return (weights.reshape(-1, weights.shape[-1]) > 0).any(0).sum().double()


def keep_top(k: int) -> Change:
    """Keep the k largest weights of each row, scaled to sum to 1; of equal ones the first."""

    def change(weights: Float[Tensor, "*rows T"]) -> Float[Tensor, "*rows T"]:
        return _kept(weights, weights, k)

    return change


def keep_random(k: int, generator: torch.Generator) -> Change:
    """Keep k visible positions of each row drawn by chance, scaled to sum to 1: what `keep_top` is to be better than.

    Rows with fewer visible positions keep them all. The generator is on the weights' device.
    """

    def change(weights: Float[Tensor, "*rows T"]) -> Float[Tensor, "*rows T"]:
        ranks = torch.rand(weights.shape, generator=generator, device=weights.device)
        return _kept(weights, ranks + (weights > 0), k)

    return change


def _kept(weights: Tensor, order: Tensor, k: int) -> Tensor:
    """Weights at the k positions that come first in an order, at a sum of 1."""
    if k >= weights.shape[-1]:
        return weights
    chosen = torch.zeros_like(weights).scatter(-1, order.topk(k, -1).indices, 1.0)
    left = weights * chosen
    total = left.sum(-1, keepdim=True)
    # Nothing that was drawn had a weight to speak of: then they count alike.
    even = chosen * (weights > 0)
    even = torch.where(even.sum(-1, keepdim=True) > 0, even, chosen)
    tiny = torch.finfo(weights.dtype).tiny
    return torch.where(total > tiny, left / total.clamp_min(tiny), even / even.sum(-1, keepdim=True))
