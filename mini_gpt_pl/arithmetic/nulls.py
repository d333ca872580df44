"""The nulls of a path that the study compares with, in closed form: walks as long as it, with and without decay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from mini_gpt_pl.geometry.path import innovations, nulls

DECAYING = ("decaying_walk", "innovation_walk")
"""The two that keep lengths under the run's own decay, of increments or of innovations; an excess names its null."""


def walks(gram: Float[Tensor, "*batch n n"], survival: Sequence[float]) -> Mapping[str, Float[Tensor, "*batch n n"]]:
    """Gram matrices of a path's nulls by name; see `geometry.path.nulls` and `geometry.path.innovations`.

    Args:
        gram: H of one path or of several.
        survival: Share of theta_0 that decay alone leaves at each snapshot.
    """
    return {
        "walk": nulls.walk(gram),
        "decaying_walk": nulls.decaying_walk(gram, survival),
        "innovation_walk": innovations.innovation_walk(gram, survival),
        "autoregressive_walk": innovations.autoregressive_walk(gram, survival),
    }
