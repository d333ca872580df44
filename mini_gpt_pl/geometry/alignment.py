"""Cosines with a direction, and how large they are by chance."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from mini_gpt_pl.geometry.selection import Vector


def noise_floor(dim: int) -> float:
    """Mean |cos| of two independent isotropic vectors in `dim` dimensions, sqrt(2 / (pi D)) (paper, eq. 11)."""
    return math.sqrt(2.0 / (math.pi * dim))


def cosines(vector: Vector, direction: Vector, *, norms: Float[Tensor, " G"] | None = None) -> Float[Tensor, " G1"]:
    """Cosine with a direction per group, then for the whole selection.

    Args:
        vector: For instance a gradient.
        direction: Of any length: a cosine does not see it (but the whole sees how the length is shared by groups).
        norms: Squared norms of `vector` per group, if they are at hand.

    Returns:
        G + 1 cosines in float64; zero where either part vanishes, NaN where one is not finite.
    """
    inner = vector.dots(direction)
    own = vector.dots(vector) if norms is None else norms
    other = direction.dots(direction)
    inner, own, other = (torch.cat([x, x.sum()[None]]) for x in (inner, own, other))
    scale = (own * other).sqrt()
    return torch.where(scale == 0, 0.0, inner / scale)
