r"""Whether paths of other seeds, and of other layers, run through the same subspace, beside what decay alone shares.

Compared are the first k centred principal directions of each attention matrix's path, from the snapshots of finished
runs. All blocks of a run start from the same theta_0, and runs of one seed do: two paths that merely decay move along
that one axis, and their subspaces overlap although nothing was learned. So beside each overlap stand that of random
directions, those of two decaying walks with independent innovations from such starts, and the overlap of the same two
paths with the axis theta_0 taken out, for which chance is the null again.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mini_gpt_pl.arithmetic.nulls import DECAYING, walks
from mini_gpt_pl.arithmetic.routing import chosen_groups
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.directions import subspace
from mini_gpt_pl.geometry.directions.subspace import Basis, Block
from mini_gpt_pl.geometry.path import pca
from mini_gpt_pl.geometry.path.centred import centred
from mini_gpt_pl.geometry.path.rebuild import recorded_selection
from mini_gpt_pl.geometry.path.snapshots import SnapshotFolder, steps_in
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection
from mini_gpt_pl.runs.folder import Run

ATTENTION = r"attn\.w_[qkvo]$"
LAYERS = "two layers of one run"
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_DRAWS = 4000
_SAME_START = 0.999  # cosine of two theta_0 that are one


@dataclass(frozen=True)
class Angles:
    """Two subspaces of one space against one another.

    Args:
        overlap: Mean squared cosine of the principal angles.
        chance: Its expectation for random directions.
        cosines: Of the principal angles, descending.
        level: 95 % of the largest cosines by chance stay under it.
    """

    overlap: float
    chance: float
    cosines: tuple[float, ...]
    level: float

    @property
    def largest(self) -> float:
        """Cosine of the smallest angle."""
        return self.cosines[0]

    @classmethod
    def between(cls, a: Basis, b: Basis) -> Angles:
        """Compare two bases of the same weights."""
        return cls(
            subspace.overlap(a, b),
            subspace.expected_overlap(a, b),
            tuple(subspace.principal_cosines(a, b).tolist()),
            _largest_by_chance(a.size, b.size, a.selection.dim),
        )


@dataclass(frozen=True)
class Overlap:
    """The paths of two matrices, of one run or of two.

    Args:
        kind: What sets them apart.
        run: Name of the first's run, and so on.
        other_run: Of the second's.
        weights: Group of the first.
        other_weights: Of the second.
        cos_theta0: Cosine of the weights that they start from.
        path: Of the centred directions.
        decaying_walk: Expected overlap of two decaying walks from such starts, as long as the measured increments.
        innovation_walk: The same with innovations as long as the measured ones.
        rest: Of the directions with the axis theta_0 taken out.
    """

    kind: str
    run: str
    other_run: str
    weights: str
    other_weights: str
    cos_theta0: float
    path: Angles
    decaying_walk: float
    innovation_walk: float
    rest: Angles


@dataclass(frozen=True, eq=False)
class _Matrix:
    """Path of one matrix: its start, its directions, and how much of theta_0 lies in those of each decaying walk."""

    run: str
    group: str
    theta0: Float[Tensor, " d"]
    path: Basis
    rest: Basis
    held: Mapping[str, float]
    setting: Mapping[str, Any]


def overlaps(
    runs: Sequence[Run], names: Sequence[str], k: int = 2, until: int | None = None, pattern: str = ATTENTION
) -> list[Overlap]:
    """Compare the paths of every matrix over layers of each run, and over runs.

    Args:
        runs: With their snapshots, of one model.
        names: What they are called.
        k: Directions of each path.
        until: Last step that counts; that of the shortest run for None, so that all are cut alike.
        pattern: Which recorded groups, searched in their names.

    Raises:
        UserError: A run has no snapshots or too few, no group matches, or the runs are of different models.
    """
    if k < 1:
        raise UserError(f"--k {k}: give 1 direction or more")
    if bare := [run for run in runs if not steps_in(run.snapshot_folder)]:
        raise UserError(
            f"{bare[0].path} has no snapshots, which the directions of a path are rebuilt from: give the run's own "
            "folder, as training left it"
        )
    last = min(run.trajectory.steps[-1] for run in runs) if until is None else until
    paths = [list(_matrices(run, name, k, last, pattern)) for run, name in zip(runs, names, strict=True)]
    compared = [
        _compare(a, b, LAYERS)
        for path in paths
        for a, b in itertools.combinations(path, 2)
        if _role(a.group) == _role(b.group) and a.path.selection.dim == b.path.selection.dim
    ]
    for one, other in itertools.combinations(paths, 2):
        if {m.group: m.path.selection.dim for m in one} != {m.group: m.path.selection.dim for m in other}:
            raise UserError(f"{one[0].run} and {other[0].run} recorded different weights: compare runs of one model")
        compared += [_compare(a, b, None) for a, b in zip(one, other, strict=True)]
    return compared


def _matrices(run: Run, name: str, k: int, until: int, pattern: str) -> Iterator[_Matrix]:
    """Paths of the chosen groups of one run up to a step."""
    selection, trajectory = recorded_selection(run.snapshot_folder), run.trajectory.until(until)
    if len(trajectory) < 3:
        raise UserError(f"{run.path} has {len(trajectory)} snapshot(s) up to step {until}: a path takes 3")
    folder, device = SnapshotFolder(run.snapshot_folder, selection), torch.device("cpu")
    theta0 = folder.read(trajectory.steps[0]).values.double()
    path, rest = (subspace.of_run(folder, trajectory, k, device, without_theta0=out) for out in (False, True))
    held = _held_by_decay(trajectory, k)
    for position in chosen_groups(trajectory, pattern):
        group, span = selection.groups[position], selection.slices[position]
        # In a space of its own, which is that of the same matrix in another layer.
        role, dim = _role(group), span.stop - span.start
        own = ParameterSelection((role,), ((dim,),), (role,))
        rows = (next(block.rows for block in basis.blocks if block.label == group) for basis in (path, rest))
        bases = [Basis(own, (Block(role, slice(0, dim), part),)) for part in rows]
        shares = {null: float(values[position]) for null, values in held.items()}
        yield _Matrix(name, group, theta0[span], bases[0], bases[1], shares, _setting(run))


def _role(group: str) -> str:
    """Name of a matrix without its layer."""
    return match[2] if (match := _BLOCK.fullmatch(group)) else group


def _held_by_decay(trajectory: Trajectory, k: int) -> dict[str, Float[Tensor, " G"]]:
    """Share of theta_0 inside the first k centred directions of each decaying walk, group by group."""
    rows, held = centred(pca.drifts(len(trajectory))), {}
    paths = walks(trajectory.grams, trajectory.survival)
    for name, grams in ((null, paths[null]) for null in DECAYING):
        along = (pca.spectra(grams, rows).directions[:, :k] @ grams)[..., 0]
        held[name] = along.square().sum(-1) / grams[:, 0, 0].clamp_min(1e-300)
    return held


def _compare(a: _Matrix, b: _Matrix, kind: str | None) -> Overlap:
    cosine = float(torch.nn.functional.cosine_similarity(a.theta0, b.theta0, dim=0))
    path, shared = Angles.between(a.path, b.path), cosine**2
    sizes, dim = (a.path.size, b.path.size), a.path.selection.dim

    def expected(null: str) -> float:
        # Along the axis that both start on, and by chance across it; by chance alone where the starts have none.
        one, other = a.held[null], b.held[null]
        common = one * other + (sizes[0] - one) * (sizes[1] - other) / max(dim - 1, 1)
        return (shared * common + (1 - shared) * sizes[0] * sizes[1] / dim) / min(sizes)

    if kind is None:
        setting = "one setting" if a.setting == b.setting else "two settings"
        kind = f"{setting}, {'same' if cosine > _SAME_START else 'other'} initial weights"
    decaying = (expected("decaying_walk"), expected("innovation_walk"))
    return Overlap(kind, a.run, b.run, a.group, b.group, cosine, path, *decaying, Angles.between(a.rest, b.rest))


def _setting(run: Run) -> dict[str, Any]:
    """What a run was, its seeds left out."""
    parts = {name: dict(run.settings.get(name) or {}) for name in ("model", "data")}
    seeds = ("seed", "split_seed")
    return {name: {key: value for key, value in part.items() if key not in seeds} for name, part in parts.items()}


@lru_cache(maxsize=64)
def _largest_by_chance(ka: int, kb: int, dim: int) -> float:
    """95 % of the largest principal cosines of random subspaces stay under it."""
    if ka + kb > dim:
        return 1.0  # they meet
    # Squared cosines of random subspaces are the eigenvalues of (A + B)^-1 A for Wishart matrices A and B of ka and
    # dim - ka degrees of freedom in kb dimensions; B by its Bartlett factor, so that nothing of size dim is drawn.
    draw = np.random.Generator(np.random.Philox(key=0))
    rows = draw.standard_normal((_DRAWS, ka, kb))
    factor = np.tril(draw.standard_normal((_DRAWS, kb, kb)), -1)
    factor[:, range(kb), range(kb)] = np.sqrt(draw.chisquare(dim - ka - np.arange(kb), (_DRAWS, kb)))
    a = rows.transpose(0, 2, 1) @ rows
    both = a + factor @ factor.transpose(0, 2, 1)
    squares = np.linalg.eigvals(np.linalg.solve(both, a)).real.max(-1)
    return float(np.quantile(np.sqrt(np.clip(squares, 0.0, 1.0)), 0.95))
