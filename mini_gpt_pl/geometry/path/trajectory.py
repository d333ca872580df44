r"""A trajectory as inner products: the Gram matrix of the initial weights and of the increments.

Let theta_0 be the initial weights and d_k = theta_k - theta_{k-1} the increments between snapshots. The basis
(theta_0, d_1, ..., d_T) spans every quantity of the study, so the (T+1) x (T+1) matrix H of its inner products is the
trajectory: a direction is a vector of T+1 coefficients, and <u, w> = u' H w. Increments rather than drifts, as late
ones are a hundredth of the drift and would drown: a Gram of float32 drifts loses ||d_k||^2 altogether.

Grams of disjoint parameter groups add, so one per group is stored and their sum is the whole selection.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.vectors.files import read_tensors, write_tensors
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection

_FORMAT = "mini_gpt_pl trajectory 1"


@dataclass
class Trajectory:
    """Steps and per-group Gram matrices of (theta_0, d_1, ..., d_T).

    Args:
        fingerprint: Of the parameter selection.
        groups: Names of the parameter groups.
        dims: Number of values in each group.
        steps: Optimizer step of each snapshot; the first is theta_0's.
        grams: One H per group, stacked.
        survival: Share of theta_0 that decoupled weight decay alone would have left at each snapshot,
            prod(1 - lr wd); 1 where there is no decay.
    """

    fingerprint: str
    groups: tuple[str, ...]
    dims: tuple[int, ...]
    steps: list[int]
    grams: Float[Tensor, "G n n"]
    survival: list[float]

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
            self.fingerprint, self.groups, self.dims, self.steps[:n], self.grams[:, :n, :n], self.survival[:n]
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
        }

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
        )
