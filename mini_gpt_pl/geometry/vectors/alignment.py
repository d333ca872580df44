"""Cosines with a direction, and how large they are by chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mini_gpt_pl.geometry.vectors.products import gram_at_once
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector

# Values of each vector converted to float64 at a time.
_CHUNK = 1 << 20


def noise_floor(dim: int) -> float:
    """Mean |cos| of two independent isotropic vectors in `dim` dimensions, sqrt(2 / (pi D)) (paper, eq. 11)."""
    return math.sqrt(2.0 / (math.pi * dim))


def with_total(per_group: Float[Tensor, "*batch G"]) -> Float[Tensor, "*batch G1"]:
    """Append the whole selection's value to those of its groups, where they add up."""
    return torch.cat([per_group, per_group.sum(-1, keepdim=True)], -1)


def cosines(vector: Vector, direction: Vector) -> Float[Tensor, " G1"]:
    """Cosine with a direction of any length per group, then for the whole, in float64.

    Zero where either part vanishes, NaN where one is not finite. The whole sees how the direction's length is shared by
    groups.
    """
    pairs = ((vector, direction), (vector, vector), (direction, direction))
    inner, own, other = (with_total(a.dots(b)) for a, b in pairs)
    scale = (own * other).sqrt()
    return torch.where(scale == 0, 0.0, inner / scale)


class Products:
    """All inner products of a few named vectors, per group and over the whole selection, in float64.

    One pass over the coordinates serves every cosine between them.
    """

    def __init__(self, vectors: Mapping[str, Vector]) -> None:
        self.names = list(vectors)
        self.selection = next(iter(vectors.values())).selection
        for vector in vectors.values():
            self.selection.require(vector.selection.fingerprint)
        rows = [vector.values for vector in vectors.values()]
        groups = gram_at_once(rows, self.selection)
        groups = _grams_in_chunks(rows, self.selection) if groups is None else groups
        self.grams: Float[Tensor, "G1 K K"] = torch.cat([groups, groups.sum(0, keepdim=True)])

    def dot(self, a: str, b: str) -> Float[Tensor, " G1"]:
        """Inner product in each group, then of the whole."""
        return self.grams[:, self.names.index(a), self.names.index(b)]

    def cosine(self, a: str, b: str) -> Float[Tensor, " G1"]:
        """Cosine in each group, then of the whole; zero where either vanishes."""
        scale = (self.dot(a, a) * self.dot(b, b)).sqrt()
        return torch.where(scale == 0, 0.0, self.dot(a, b) / scale)


def _grams_in_chunks(rows: Sequence[Tensor], selection: ParameterSelection) -> Float[Tensor, "G K K"]:
    totals = []
    for span in selection.slices:
        total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows[0].device)
        for lo in range(span.start, span.stop, _CHUNK):
            stacked = torch.stack([row[lo : min(lo + _CHUNK, span.stop)].double() for row in rows])
            total += stacked @ stacked.T
        totals.append(total)
    return selection.total(torch.stack(totals))
