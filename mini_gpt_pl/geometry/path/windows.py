r"""Parts of a path: windows of steps, thinner paths, and windows that grow.

PC1 says first of all where a path was cut and how densely it was recorded. So runs are compared over the same steps
with the same number of snapshots, and every part here is again a path: a Gram matrix over (theta_a, d'_1, ..., d'_m),
where theta_a are the weights at the part's first snapshot and d'_j the increments between the chosen snapshots. All of
`pca`, `centred` and the nulls apply to it unchanged.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.path import pca
from mini_gpt_pl.geometry.path.trajectory import Trajectory


def part(gram: Float[Tensor, "*batch n n"], chosen: Sequence[int]) -> Float[Tensor, "*batch m m"]:
    """Gram matrix of the path (or of several) through some of the snapshots only; the first becomes the new theta_0.

    Raises:
        ValueError: The indices of the snapshots do not ascend.
    """
    if not chosen or any(b <= a for a, b in itertools.pairwise(chosen)):
        raise ValueError(f"expected ascending indices of snapshots, got {list(chosen)}")
    basis = pca.weights(gram.shape[-1])[list(chosen)]
    basis = torch.cat([basis[:1], basis.diff(dim=0)])
    return pca.inner_products(gram, basis)


def window(
    trajectory: Trajectory,
    first: int = 0,
    last: int | None = None,
    every: int | None = None,
    steps: Collection[int] | None = None,
) -> Trajectory:
    """Cut a trajectory to a window of steps and thin it to a cadence, or to the snapshots that other runs have too.

    Its survival starts at 1 again: decay pulls on the weights that the window starts from. Of weights that decay at
    several rates the lengths of the window's own increments are not recorded: its decay is not known.

    Args:
        trajectory: Of a run.
        first: Step that the window starts at.
        last: Step that it ends at; the run's last for None.
        every: Keep the snapshots whose step is a multiple of this, beside the first one; all of them for None.
        steps: Keep the snapshots at these steps only; all of them for None.

    Raises:
        UserError: Fewer than three snapshots are left.

    Example:
        window(run.trajectory, 0, 3000, every=100)  # what runs of any length and cadence can be compared by
    """
    end = trajectory.steps[-1] if last is None and trajectory.steps else last or 0
    inside = [k for k, step in enumerate(trajectory.steps) if first <= step <= end and (steps is None or step in steps)]
    chosen = [k for k in inside if every is None or k == inside[0] or trajectory.steps[k] % every == 0]
    if len(chosen) < 3:
        raise UserError(
            f"steps {first} to {end} hold {len(chosen)} snapshots of this run, a principal direction takes 3: "
            "widen the window or record more often"
        )
    start = trajectory.survival[chosen[0]] if trajectory.rates is None else math.nan
    return replace(
        trajectory,
        steps=[trajectory.steps[k] for k in chosen],
        grams=part(trajectory.grams, chosen),
        survival=[0.0 if start <= 0 else trajectory.survival[k] / start for k in chosen],
        rates=None,
    )


def growing_ends(n: int, count: int = 20) -> list[int]:
    """Numbers of snapshots of growing windows: at most `count`, evenly from max(5, n / 15) to n (arXiv 2602.16746)."""
    return sorted(set(np.linspace(min(max(5, n // 15), n), n, count).round().astype(int).tolist()))
