r"""Directions of a path that are said to steer something else, and two tests of that.

A "routing coordinate" is here the score r_k(t) = <theta_t, v_k> of the weights on the k-th centred principal direction
of the path of some groups together, such as all query and key matrices. That it steers a quantity needs more than two
curves that fall in the same period: changes of the score have to go with changes of the quantity (beside
phase-randomised surrogates, `phases`), and moving the weights along v_k has to change it more than moving them as far
in a random direction does (`mini_gpt_pl.arithmetic.routing_probe`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.path import centred, pca, phases
from mini_gpt_pl.geometry.path.phases import Correlated
from mini_gpt_pl.geometry.path.trajectory import Trajectory


def chosen_groups(trajectory: Trajectory, pattern: str) -> list[int]:
    """Positions of the groups whose names a pattern matches (`re.search`).

    Raises:
        UserError: None does.
    """
    positions = [k for k, name in enumerate(trajectory.groups) if re.search(pattern, name)]
    if not positions:
        raise UserError(f"no recorded group matches {pattern!r}: there are {', '.join(trajectory.groups)}")
    return positions


def joint_directions(trajectory: Trajectory, pattern: str, k: int) -> list[Float[Tensor, "G n"]]:
    """First k centred principal directions of several groups' path taken together, as coefficients.

    Unit vectors over all recorded weights, zero outside of the groups. Fewer where the path has fewer.

    Args:
        trajectory: Up to now; past only while training runs.
        pattern: Which groups.
        k: How many.

    Raises:
        UserError: No group matches.
    """
    groups = chosen_groups(trajectory, pattern)
    rows = _principal(trajectory.grams[groups].sum(0), k)
    directions = []
    for row in rows:
        coefficients = torch.zeros(len(trajectory.groups), len(trajectory), dtype=torch.float64)
        coefficients[groups] = row
        directions.append(coefficients)
    return directions


def score_changes(gram: Float[Tensor, "n n"], k: int) -> Float[Tensor, "K T"]:
    """Changes r_k(t) - r_k(t-1) of the scores between snapshots, <d_t, v_k>; the directions are the whole path's."""
    return _principal(gram, k) @ gram[:, 1:]


def _principal(gram: Float[Tensor, "n n"], k: int) -> Float[Tensor, "K n"]:
    rows = centred.centred(pca.drifts(len(gram)))
    if not bool((gram.diagonal()[1:] > 0).any()):
        return rows[:0]
    return pca.pca(gram, rows).directions[:k]


@dataclass(frozen=True)
class Steered:
    """How the changes of one score go with the changes of one quantity.

    Args:
        component: k, from 1.
        quantity: Its name.
        intervals: Number of changes that were compared.
        correlated: r, what 95 % of the surrogates stay under, and p.
        adjusted: p for the whole family of pairs that were tried (Holm), 1 at most.
    """

    component: int
    quantity: str
    intervals: int
    correlated: Correlated
    adjusted: float


def steered(
    trajectory: Trajectory,
    pattern: str,
    quantities: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    k: int = 3,
    *,
    start: int = 0,
    draws: int = 1999,
    seed: int = 0,
) -> list[Steered]:
    """Correlate the changes of the first k scores with the changes of some quantities, at the steps that they share.

    Surrogates take a series as stationary: leave out the start of training, where everything changes fast at once.

    Args:
        trajectory: Of a finished run.
        pattern: Which groups' path.
        quantities: Steps and values of each, by name; only evenly spaced steps that are snapshots count.
        k: Number of scores.
        start: First step that counts.
        draws: Surrogates for each pair.
        seed: Of their phases.

    Raises:
        UserError: No group matches, or fewer than eight changes are shared.
    """
    gram = trajectory.grams[chosen_groups(trajectory, pattern)].sum(0)
    scores = torch.cat([torch.zeros(len(changes := score_changes(gram, k)), 1).double(), changes.cumsum(1)], 1)
    pairs: list[tuple[int, str, int, Correlated]] = []
    for name, (steps, values) in quantities.items():
        by_step = dict(zip(steps, values, strict=True))
        shared = _even([step for step in trajectory.steps if step in by_step and step >= start])
        if len(shared) < 9:
            raise UserError(
                f"{name} was recorded at {len(shared)} evenly spaced snapshots from step {start} on: 9 are needed, so "
                "give its probe and the recorder one schedule"
            )
        series = torch.tensor([by_step[step] for step in shared], dtype=torch.float64).diff()
        places = [trajectory.steps.index(step) for step in shared]
        for number, score in enumerate(scores[:, places].diff(dim=1), 1):
            pairs.append((number, name, len(series), phases.correlate(score, series, draws, seed)))
    adjusted = holm([pair[-1].p for pair in pairs])
    return [Steered(*pair, p) for pair, p in zip(pairs, adjusted, strict=True)]


def _even(steps: list[int]) -> list[int]:
    """The steps as long as they go on at their first distance."""
    if len(steps) < 3:
        return steps
    gap = steps[1] - steps[0]
    return [step for k, step in enumerate(steps) if step == steps[0] + k * gap]


def holm(p: Sequence[float]) -> list[float]:
    """Adjust p-values for having tried all of them (Holm 1979): the k-th smallest of n times n - k + 1, not falling.

    A pair without a p-value (NaN: one of its series never changes) was not tried, and has none.

    Example:
        >>> holm([0.01, 0.5, 0.03])
        [0.03, 0.5, 0.06]
    """
    order = sorted((i for i in range(len(p)) if not math.isnan(p[i])), key=lambda i: p[i])
    adjusted, highest = [math.nan] * len(p), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, p[i] * (len(order) - rank)))
        adjusted[i] = highest
    return adjusted
