"""A finished run's backbone as vectors: a fixed basis in which other weights can be placed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mini_gpt_pl.geometry import pca
from mini_gpt_pl.geometry.selection import ParameterSelection, Vector
from mini_gpt_pl.geometry.snapshots import SnapshotFolder
from mini_gpt_pl.geometry.trajectory import IncrementRows, Trajectory


@dataclass(frozen=True)
class Placement:
    """Where weights lie in a run's basis, in parameter units.

    Args:
        coordinate: a = <theta - theta_0, v_b>.
        residual_norm: ||theta - theta_0 - a v_b||.
    """

    coordinate: float
    residual_norm: float


@dataclass(frozen=True, eq=False)
class FrozenBasis:
    """Initial weights and whole-run backbone of a run, up to one of its steps.

    Args:
        theta0: Initial weights.
        backbone: Unit vector v_b of the drifts up to `step`.
        step: Last snapshot that entered.
    """

    theta0: Vector
    backbone: Vector
    step: int

    @classmethod
    def read(cls, folder: Path, trajectory: Trajectory, selection: ParameterSelection, step: int) -> FrozenBasis:
        """Build the basis from a run's snapshot files.

        Raises:
            UserError: A snapshot is missing, corrupt or of another model.
            FingerprintError: The trajectory is of another selection.
        """
        selection.require(trajectory.fingerprint)
        part = trajectory.until(step)
        rows = IncrementRows(selection)
        files = SnapshotFolder(folder, selection)
        for snapshot in part.steps:
            rows.push(files.read(snapshot))
        direction = pca.pca(part.gram(), pca.drifts(len(part))[1:]).backbone
        backbone = rows.combine(direction.expand(len(part.groups), len(part)))
        return cls(Vector(rows.rows[0], selection), backbone, part.steps[-1])

    def to(self, device: torch.device) -> FrozenBasis:
        """Move both vectors."""
        selection = self.theta0.selection
        theta0, backbone = (Vector(v.values.to(device), selection) for v in (self.theta0, self.backbone))
        return FrozenBasis(theta0, backbone, self.step)

    def place(self, module: nn.Module) -> Placement:
        """Place a module's weights."""
        return self.place_weights(self.theta0.selection.weights(module))

    def place_weights(self, weights: Vector) -> Placement:
        """Place selected weights."""
        drift = weights - self.theta0
        coordinate = float(drift.dots(self.backbone).sum())
        residual = Vector(drift.values - coordinate * self.backbone.values, drift.selection)
        return Placement(coordinate, float(residual.dots(residual).sum().clamp_min(0).sqrt()))

    def split(self, start: Vector, module: nn.Module) -> tuple[float, float]:
        """Split the displacement from some start into its part along the backbone (signed) and across it."""
        moved = start.selection.weights(module) - start
        along = float(moved.dots(self.backbone).sum())
        across = Vector(moved.values - along * self.backbone.values, moved.selection)
        return along, float(across.dots(across).sum().clamp_min(0).sqrt())
