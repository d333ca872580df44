r"""A trajectory as inner products: the Gram matrix of the initial weights and of the increments.

Let theta_0 be the initial weights and d_k = theta_k - theta_{k-1} the increments between snapshots. The basis
(theta_0, d_1, ..., d_T) spans every quantity of the study, so the (T+1) x (T+1) matrix H of its inner products is the
trajectory: a direction is a vector of T+1 coefficients, and <u, w> = u' H w. Increments rather than drifts, as late
ones are a hundredth of the drift and would drown: a Gram of float32 drifts loses ||d_k||^2 altogether.

Grams of disjoint parameter groups add, so one per group is stored and their sum is the whole selection. Methods that
take a group mean the whole selection by None, and raise `UserError` where there is no group of that name.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
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
        """Return H of one group, or of the whole selection: the sum over groups."""
        return self._of(self.grams, group)

    def decay_known(self, group: str | None = None) -> bool:
        """Whether it is known what weight decay took; else nothing has an excess over the decaying walk."""
        return bool(torch.isfinite(self.decaying_walk(group)).all())

    def decaying_walk(self, group: str | None = None) -> Float[Tensor, "n n"]:
        """Return the null of `nulls.decaying_walk`; NaN where the decay is unknown."""
        if self.rates is None:
            return nulls.decaying_walk(self.gram(group), self.survival)
        return nulls.decaying_walk_of_parts(self._of(self.rates.squares, group), self.rates.curves)

    def survival_of(self, group: str | None = None) -> list[float]:
        """Return the share that decay leaves of every weight of a group at each snapshot; NaN where they differ."""
        if self.rates is None:
            return self.survival
        present = (self._of(self.rates.squares, group) > 0).any(-1)
        return self.rates.curves[present][0].tolist() if int(present.sum()) == 1 else [math.nan] * len(self)

    def dim_of(self, group: str | None = None) -> int:
        """Return the number of values in one group, or in the whole selection."""
        return int(self._of(torch.tensor(self.dims), group))

    def _of(self, per_group: Tensor, group: str | None) -> Tensor:
        if group is not None and group not in self.groups:
            raise UserError(f"the trajectory has no group {group!r}; it has {', '.join(self.groups)}")
        return per_group.sum(0) if group is None else per_group[self.groups.index(group)]

    def until(self, step: int) -> Trajectory:
        """Return the part of the trajectory up to a step, inclusive."""
        n = sum(s <= step for s in self.steps)
        return replace(
            self,
            steps=self.steps[:n],
            grams=self.grams[:, :n, :n],
            survival=self.survival[:n],
            rates=self.rates and Rates(self.rates.curves[:, :n], self.rates.squares[..., :n]),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and primitives only, for a checkpoint."""
        state = {
            "fingerprint": self.fingerprint,
            "groups": list(self.groups),
            "dims": list(self.dims),
            "steps": list(self.steps),
            "grams": self.grams.clone(),
            "survival": list(self.survival),
        }
        if self.rates is None:
            return state
        rates = {"decay_curves": self.rates.curves.contiguous(), "decay_squares": self.rates.squares.contiguous()}
        return state | rates

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
            Rates(state["decay_curves"], state["decay_squares"]) if "decay_curves" in state else None,
        )

    def save(self, path: Path) -> None:
        """Write the trajectory to one small safetensors file, atomically."""
        state = self.state_dict()
        meta = {"format": _FORMAT, "fingerprint": state.pop("fingerprint")}
        meta |= {name: json.dumps(state.pop(name)) for name in ("groups", "dims")}
        state["steps"] = torch.tensor(self.steps, dtype=torch.int64)
        state["survival"] = torch.tensor(self.survival, dtype=torch.float64)
        write_tensors(path, {name: tensor.contiguous() for name, tensor in state.items()}, meta)

    @classmethod
    def load(cls, path: Path) -> Trajectory:
        """Read a trajectory file.

        Raises:
            UserError: The file is missing, corrupt, or no trajectory.
        """
        tensors, meta = read_tensors(path, "trajectory (Gram) file")
        if meta.get("format") != _FORMAT:
            raise UserError(f"{path} is no trajectory file: give the trajectory.safetensors of a run folder")
        lists = {name: tensors[name].tolist() for name in ("steps", "survival")}
        lists |= {name: json.loads(meta[name]) for name in ("groups", "dims")}
        return cls.from_state({**tensors, **lists, "fingerprint": meta["fingerprint"]})
