"""A finished run's backbone as vectors: a fixed basis in which other weights can be placed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mini_gpt_pl.geometry.path import pca
from mini_gpt_pl.geometry.path.snapshots import SnapshotFolder, combine
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector


@dataclass(frozen=True)
class Placement:
    """Where weights lie, seen from theta_0 or another origin, in parameter units.

    Args:
        coordinate: a = <theta - origin, v_b>, signed.
        residual_norm: ||theta - origin - a v_b||.
    """

    coordinate: float
    residual_norm: float


@dataclass(frozen=True, eq=False)
class FrozenBasis:
    """Initial weights of a run, and the unit vector v_b of its drifts up to a step, that of the last snapshot."""

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
        n = len(part)
        directions = {"theta0": pca.theta0(n), "backbone": pca.pca(part.gram(), pca.drifts(n)[1:]).backbone}
        coefficients = {name: direction.expand(len(part.groups), n) for name, direction in directions.items()}
        files = SnapshotFolder(folder, selection)
        vectors = combine(part.steps, files.read, coefficients, selection, torch.device("cpu"))
        return cls(vectors["theta0"], vectors["backbone"], part.steps[-1])

    def to(self, device: torch.device) -> FrozenBasis:
        """Move both vectors."""
        return FrozenBasis(self.theta0.to(device), self.backbone.to(device), self.step)

    def place(self, weights: Vector, origin: Vector | None = None) -> Placement:
        """Split the displacement of weights from an origin (theta_0 for None) along the backbone and across it.

        Raises:
            FingerprintError: They are of another selection.
        """
        moved = weights - (self.theta0 if origin is None else origin)
        along = float(moved.dots(self.backbone).sum())
        across = Vector(moved.values - along * self.backbone.values, moved.selection)
        return Placement(along, float(across.dots(across).sum().clamp_min(0).sqrt()))
