r"""Whether a run's path steers its attention: changes of path scores against changes of entropy.

mini_gpt_pl routing runs/grokking/markers --start 1000

A "routing coordinate" is here the score r_k(t) = <theta_t, v_k> of the weights on the k-th centred principal direction
of the path of some groups together, such as all query and key matrices. That it steers a quantity needs more than two
curves that fall in the same period: changes of the score have to go with changes of the quantity (beside
phase-randomised surrogates, `phases`), and moving the weights along v_k has to change it more than moving them as far
in a random direction does (`mini_gpt_pl.arithmetic.routing_probe`).

The run's `AttentionProbe` and recorder have one schedule, as configs/grokking/attention.yaml gives them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mini_gpt_pl.command_line import CommandParser
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.path import centred, pca, phases
from mini_gpt_pl.geometry.path.phases import Correlated
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.runs.folder import Run

QUERY_KEY = r"w_[qk]$"
"""Groups whose path is taken together, unless others are named."""


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

    Unit vectors over all recorded weights, zero outside of the groups; fewer where the path has fewer. While training
    runs, the trajectory is the one up to now.

    Raises:
        UserError: No group matches.
    """
    groups = chosen_groups(trajectory, pattern)
    directions = []
    for row in _principal(trajectory.grams[groups].sum(0), k):
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
    """How the changes of the score of a component, from 1, go with the changes of one quantity.

    Intervals is the number of changes that were compared; `adjusted` the p for all pairs that were tried (Holm).
    """

    component: int
    quantity: str
    intervals: int
    correlated: Correlated
    adjusted: float


def steered(
    trajectory: Trajectory,
    pattern: str,
    quantities: Mapping[str, pd.Series[float]],
    k: int = 3,
    *,
    start: int = 0,
    draws: int = 1999,
) -> list[Steered]:
    """Correlate the changes of the first k scores with the changes of some quantities, at the steps that they share.

    Surrogates take a series as stationary: leave out the start of training, where everything changes fast at once.

    Args:
        trajectory: Of a finished run.
        pattern: Which groups' path, taken together.
        quantities: Series by step; only evenly spaced steps that are snapshots count.
        k: Number of scores.
        start: First step that counts.
        draws: Phase-randomised surrogates for each pair.

    Raises:
        UserError: No group matches, or fewer than eight changes are shared.
    """
    gram = trajectory.grams[chosen_groups(trajectory, pattern)].sum(0)
    scores = torch.nn.functional.pad(score_changes(gram, k).cumsum(1), (1, 0))  # 0 at the first snapshot
    pairs: list[tuple[int, str, int, Correlated]] = []
    for name, values in quantities.items():
        by_step = values.to_dict()
        shared = [step for step in trajectory.steps if step in by_step and step >= start]
        gap = shared[1] - shared[0] if len(shared) > 1 else 0
        shared = [step for place, step in enumerate(shared) if step == shared[0] + place * gap]
        if len(shared) < 9:
            raise UserError(
                f"{name} was recorded at {len(shared)} evenly spaced snapshots from step {start} on: 9 are needed, so "
                "give its probe and the recorder one schedule"
            )
        series = torch.tensor([by_step[step] for step in shared], dtype=torch.float64).diff()
        places = [trajectory.steps.index(step) for step in shared]
        for number, score in enumerate(scores[:, places].diff(dim=1), 1):
            pairs.append((number, name, len(series), phases.correlate(score, series, draws)))
    adjusted = holm([pair[-1].p for pair in pairs])
    return [Steered(*pair, p) for pair, p in zip(pairs, adjusted, strict=True)]


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


def routing(run: Run, pattern: str = QUERY_KEY, k: int = 3, start: int = 0, draws: int = 1999) -> pd.DataFrame:
    """Correlate score changes with entropy changes of all batches and layers of a run; arguments as in `steered`.

    Returns:
        Columns component, quantity, intervals, r, level (95 % of the surrogates' |r| stay under it), p, and adjusted,
        the p for all pairs tried together (Holm).

    Raises:
        UserError: The run recorded no entropy, no group matches, or too few steps are shared.
    """
    if not run.exists:
        raise UserError(f"there is no run folder {run.path}: give one that holds a config.yaml")
    named = [str(name) for name in run.metrics if re.fullmatch(r"attention/\w+/layer\d+/entropy", str(name))]
    if not named:
        raise UserError(f"{run.path} recorded no entropy of attention: add an AttentionProbe to its callbacks")
    pairs = steered(run.trajectory, pattern, {name: run.series(name) for name in named}, k, start=start, draws=draws)
    rows = [
        (s.component, s.quantity, s.intervals, s.correlated.value, s.correlated.level, s.correlated.p, s.adjusted)
        for s in pairs
    ]
    return pd.DataFrame(rows, columns=["component", "quantity", "intervals", "r", "level", "p", "adjusted"])


def main(args: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = CommandParser("routing", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run with an AttentionProbe")
    parser.add_argument("--groups", default=QUERY_KEY, help="which recorded groups, searched in their names")
    parser.add_argument("--k", type=int, default=3, help="number of principal directions")
    parser.add_argument("--start", type=int, default=0, help="first step that counts")
    options = parser.parse_args(args)
    table = routing(Run(options.run), options.groups, options.k, options.start)
    print(table.to_string(index=False, float_format="{:.4f}".format))
