r"""A trajectory as inner products: the Gram matrix of the initial weights and of the increments.

Let theta_0 be the initial weights and d_k = theta_k - theta_{k-1} the increments between snapshots. The basis
(theta_0, d_1, ..., d_T) spans every quantity of the study, so the (T+1) x (T+1) matrix H of its inner products is the
trajectory: a direction is a vector of T+1 coefficients, and <u, w> = u' H w. Increments rather than drifts, as late
ones are a hundredth of the drift and would drown: a Gram of float32 drifts loses ||d_k||^2 altogether.

Grams of disjoint parameter groups add, so one per group is stored and their sum is the whole selection.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.path import nulls
from mini_gpt_pl.geometry.vectors.files import read_tensors, write_tensors
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection

_FORMAT = "mini_gpt_pl trajectory 1"


@dataclass(frozen=True)
class Rates:
    """Decay of a selection whose weights do not all decay alike.

    Args:
        curves: Share that decay alone leaves at each snapshot, for each rate; NaN where it is not known.
        squares: Squared length of theta_0 and of each increment, of the weights of each group that have each rate.
    """

    curves: Float[Tensor, "R n"]
    squares: Float[Tensor, "G R n"]

    def until(self, n: int) -> Rates:
        """Return the first n snapshots."""
        return Rates(self.curves[:, :n], self.squares[..., :n])

    @property
    def survival(self) -> list[float]:
        """Length that decay alone leaves of all weights together, in units of theta_0's."""
        start = self.squares.sum(0)[:, 0]
        weights = start / start.sum() if float(start.sum()) > 0 else torch.full_like(start, 1.0 / len(start))
        left = torch.where(weights[:, None] > 0, self.curves.square(), 0.0)
        return [float(value) for value in (weights @ left).sqrt()]


@dataclass
class Trajectory:
    """Steps and per-group Gram matrices of (theta_0, d_1, ..., d_T).

    Args:
        fingerprint: Of the parameter selection.
        groups: Names of the parameter groups.
        dims: Number of values in each group.
        steps: Optimizer step of each snapshot; the first is theta_0's.
        grams: One H per group, stacked.
        survival: Share of theta_0 that weight decay alone would have left at each snapshot, such as prod(1 - lr wd); 1
            where there is no decay, NaN where its share is not known. Of the length where there are several rates.
        rates: Of weights that do not all decay alike; None where one rate is that of all.
    """

    fingerprint: str
    groups: tuple[str, ...]
    dims: tuple[int, ...]
    steps: list[int]
    grams: Float[Tensor, "G n n"]
    survival: list[float]
    rates: Rates | None = None

    @classmethod
    def empty(cls, selection: ParameterSelection) -> Trajectory:
        """Start a trajectory that holds nothing yet."""
        grams = torch.zeros(len(selection.groups), 0, 0, dtype=torch.float64)
        return cls(selection.fingerprint, selection.groups, selection.dims, [], grams, [])

    def __len__(self) -> int:
        """Number of snapshots, theta_0 included."""
        return len(self.steps)

    @property
    def dim(self) -> int:
        """Number of selected values, D."""
        return sum(self.dims)

    def append(self, step: int, row: Float[Tensor, "G n"], survival: float = 1.0) -> None:
        """Add a snapshot by its inner products with the basis so far and with itself.

        Args:
            step: Optimizer step of the snapshot.
            row: Per group, <b, new> for each earlier basis vector b, then <new, new>.
            survival: Share of theta_0 that weight decay alone would have left.

        Raises:
            ValueError: The row's length or the step does not continue the trajectory, or a value is not finite.
        """
        n = len(self)
        if tuple(row.shape) != (len(self.groups), n + 1):
            raise ValueError(f"expected a row of shape {(len(self.groups), n + 1)}, got {tuple(row.shape)}")
        if self.steps and step <= self.steps[-1]:
            raise ValueError(f"step {step} does not come after step {self.steps[-1]}")
        if not torch.isfinite(row).all():
            raise ValueError(f"the snapshot at step {step} holds values that are not finite")
        grown = torch.zeros(len(self.groups), n + 1, n + 1, dtype=torch.float64)
        grown[:, :n, :n] = self.grams
        grown[:, n, :] = row.double().cpu()
        grown[:, :, n] = grown[:, n, :]
        self.grams = grown
        self.steps.append(step)
        self.survival.append(survival)

    def gram(self, group: str | None = None) -> Float[Tensor, "n n"]:
        """Return H of one group, or of the whole selection (the sum over groups) for None.

        Raises:
            UserError: There is no group of that name.
        """
        return self.grams.sum(0) if group is None else self.grams[self._position(group)]

    def decay_known(self, group: str | None = None) -> bool:
        """Whether it is known what weight decay took of one group, or of the whole selection for None.

        Where it is not, the decaying walk is not known either, and nothing has an excess over it.
        """
        return bool(torch.isfinite(self.decaying_walk(group)).all())

    def decaying_walk(self, group: str | None = None) -> Float[Tensor, "n n"]:
        """Return the null of `nulls.decaying_walk` for one group, or for the whole selection; NaN where it is unknown.

        Raises:
            UserError: There is no group of that name.
        """
        if self.rates is None:
            return nulls.decaying_walk(self.gram(group), self.survival)
        squares = self.rates.squares.sum(0) if group is None else self.rates.squares[self._position(group)]
        return nulls.decaying_walk_of_parts(squares, self.rates.curves)

    def survival_of(self, group: str | None = None) -> list[float]:
        """Return the share that decay leaves of every weight of a group at each snapshot; NaN where they differ.

        Raises:
            UserError: There is no group of that name.
        """
        if self.rates is None:
            return self.survival
        squares = self.rates.squares.sum(0) if group is None else self.rates.squares[self._position(group)]
        there = (squares > 0).any(-1)
        return self.rates.curves[there][0].tolist() if int(there.sum()) == 1 else [math.nan] * len(self)

    def dim_of(self, group: str | None = None) -> int:
        """Return the number of values in one group, or in the whole selection for None.

        Raises:
            UserError: There is no group of that name.
        """
        return self.dim if group is None else self.dims[self._position(group)]

    def _position(self, group: str) -> int:
        if group not in self.groups:
            raise UserError(f"the trajectory has no group {group!r}; it has {', '.join(self.groups)}")
        return self.groups.index(group)

    def until(self, step: int) -> Trajectory:
        """Return the part of the trajectory up to a step, inclusive."""
        n = sum(s <= step for s in self.steps)
        return Trajectory(
            self.fingerprint,
            self.groups,
            self.dims,
            self.steps[:n],
            self.grams[:, :n, :n],
            self.survival[:n],
            None if self.rates is None else self.rates.until(n),
        )

    def merge(self, other: Trajectory) -> Trajectory:
        """Join trajectories of disjoint parameter groups of one run.

        Raises:
            ValueError: The snapshots differ, or a group is in both.
        """
        if self.steps != other.steps:
            raise ValueError("the trajectories have snapshots at different steps")
        if set(self.groups) & set(other.groups):
            raise ValueError("the trajectories share a parameter group: its inner products would count twice")
        return Trajectory(
            f"{self.fingerprint}+{other.fingerprint}",
            self.groups + other.groups,
            self.dims + other.dims,
            list(self.steps),
            torch.cat([self.grams, other.grams]),
            list(self.survival),
            _joined(self, other),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and primitives only, for a checkpoint."""
        return {
            "fingerprint": self.fingerprint,
            "groups": list(self.groups),
            "dims": list(self.dims),
            "steps": list(self.steps),
            "grams": self.grams.clone(),
            "survival": list(self.survival),
            **self._rate_tensors(),
        }

    def _rate_tensors(self) -> dict[str, Tensor]:
        if self.rates is None:
            return {}
        return {"decay_curves": self.rates.curves.contiguous(), "decay_squares": self.rates.squares.contiguous()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Trajectory:
        """Rebuild a trajectory from `state_dict`."""
        return cls(
            state["fingerprint"],
            tuple(state["groups"]),
            tuple(state["dims"]),
            list(state["steps"]),
            state["grams"].clone(),
            list(state["survival"]),
            _rates_of(state),
        )

    def save(self, path: Path) -> None:
        """Write the trajectory to one small safetensors file, atomically."""
        meta = {
            "format": _FORMAT,
            "fingerprint": self.fingerprint,
            "groups": json.dumps(list(self.groups)),
            "dims": json.dumps(list(self.dims)),
        }
        tensors = {
            "steps": torch.tensor(self.steps, dtype=torch.int64),
            "grams": self.grams.contiguous(),
            "survival": torch.tensor(self.survival, dtype=torch.float64),
            **self._rate_tensors(),
        }
        write_tensors(path, tensors, meta)

    @classmethod
    def load(cls, path: Path) -> Trajectory:
        """Read a trajectory file.

        Raises:
            UserError: The file is missing, corrupt, or no trajectory.
        """
        tensors, meta = read_tensors(path, "trajectory (Gram) file")
        if meta.get("format") != _FORMAT:
            raise UserError(f"{path} is no trajectory file: give the trajectory.safetensors of a run folder")
        return cls(
            meta["fingerprint"],
            tuple(json.loads(meta["groups"])),
            tuple(json.loads(meta["dims"])),
            tensors["steps"].tolist(),
            tensors["grams"],
            tensors["survival"].tolist(),
            _rates_of(tensors),
        )


def _rates_of(tensors: Mapping[str, Any]) -> Rates | None:
    return Rates(tensors["decay_curves"], tensors["decay_squares"]) if "decay_curves" in tensors else None


def _joined(first: Trajectory, second: Trajectory) -> Rates | None:
    """Rates of two trajectories of disjoint groups."""
    if first.rates is None and second.rates is None and first.survival == second.survival:
        return None
    both = [one.rates or Rates(torch.tensor([one.survival]).double(), _diagonals(one)) for one in (first, second)]
    wide = [torch.zeros(len(r.squares), sum(len(b.curves) for b in both), len(first)).double() for r in both]
    wide[0][:, : len(both[0].curves)], wide[1][:, len(both[0].curves) :] = both[0].squares, both[1].squares
    return Rates(torch.cat([r.curves for r in both]), torch.cat(wide))


def _diagonals(trajectory: Trajectory) -> Float[Tensor, "G 1 n"]:
    return trajectory.grams.diagonal(dim1=-2, dim2=-1)[:, None]
