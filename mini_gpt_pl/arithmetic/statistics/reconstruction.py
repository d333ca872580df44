r"""A final point rebuilt from few directions of a path, theta_0 + P_k (theta_T - theta_0), beside what chance rebuilds.

P_k projects on the first k of some orthonormal directions. If these are principal directions of a path that ends in
theta_T, k = T of them rebuild it exactly, and a few do nearly: that says how many snapshots' worth of directions the
path takes, not how many the solution needs. Directions that do not know the end (of the first part of the path, or of
another run) say something; random ones in the path's own span, and the same shortening of the true drift, say what a
share of the drift is worth by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mini_gpt_pl.geometry.path import pca

Coefficients = Float[Tensor, "K n"]
"""Directions over (theta_0, d_1, ..., d_T), the same in every group."""


def principal(gram: Float[Tensor, "n n"], k: int, until: int | None = None) -> Coefficients:
    """First k uncentred principal directions of the drift from theta_0, unit vectors over the whole selection.

    Args:
        gram: H of the whole selection.
        k: How many; fewer where the path has fewer.
        until: Index of the last snapshot that they may know; the last one for None.

    Raises:
        ValueError: Nothing has moved until then.
    """
    rows = pca.drifts(len(gram))[1:]
    return pca.pca(gram, rows[: until if until is not None else len(rows)]).directions[:k]


def in_span(gram: Float[Tensor, "n n"], k: int, generator: torch.Generator) -> Coefficients:
    """Random orthonormal directions of the space that the drifts span: what any k of its directions hold.

    Args:
        gram: H of the whole selection.
        k: How many; fewer where the span has fewer dimensions.
        generator: The one source of randomness.
    """
    whole = principal(gram, len(gram))
    turn = torch.randn(len(whole), len(whole), generator=generator, dtype=torch.float64)
    return torch.linalg.qr(turn)[0][:k] @ whole


@dataclass(frozen=True, eq=False)
class Rebuilt:
    """A final point from the first k directions.

    Args:
        k: Number of directions.
        share: Of ||theta_T - theta_0||^2 that they hold.
        drift: The part of theta_T - theta_0 that they hold.
    """

    k: int
    share: float
    drift: Float[Tensor, " D"]


def rebuilt(directions: Float[Tensor, "K D"], drift: Float[Tensor, " D"]) -> Iterator[Rebuilt]:
    """Project a drift on the first k = 1 .. K directions.

    Args:
        directions: Independent, orthonormal up to rounding; made orthonormal here, in their order.
        drift: theta_T - theta_0.
    """
    basis = torch.linalg.qr(directions.double().T)[0]
    wanted = drift.double()
    along, total = basis.T @ wanted, float(wanted.square().sum())
    held = torch.zeros_like(wanted)
    for k, part in enumerate(along, 1):
        held = held + part * basis[:, k - 1]
        yield Rebuilt(k, float(held.square().sum()) / total if total else float("nan"), held.to(drift.dtype))


def shortened(drift: Float[Tensor, " D"], shares: Sequence[float]) -> Iterator[Rebuilt]:
    """The drift itself, scaled to hold a share of its squared length: what the loss of length alone does."""
    for k, share in enumerate(shares, 1):
        yield Rebuilt(k, share, drift * share**0.5)


def fewest(scores: Sequence[tuple[int, float]], level: float) -> int | None:
    """Smallest k from which on a score stays at or above a level; None if the last one does not reach it.

    Args:
        scores: k and score, ascending in k.
        level: Such as 0.98 of accuracy.

    Example:
        >>> fewest([(1, 0.1), (2, 0.99), (3, 0.5), (4, 0.99)], 0.98)
        4
    """
    below = [k for k, score in scores if score < level]
    if not below:
        return scores[0][0] if scores else None
    return next((k for k, _ in scores if k > below[-1]), None)
