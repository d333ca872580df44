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
    """Where weights lie, seen from a point of a run's basis, in parameter units.

    Args:
        coordinate: a = <theta - origin, v_b>, signed; the origin is theta_0 unless another is named.
        residual_norm: ||theta - origin - a v_b||.
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
        n = len(part)
        wanted = {"theta0": pca.theta0(n), "backbone": pca.pca(part.gram(), pca.drifts(n)[1:]).backbone}
        coefficients = {name: direction.expand(len(part.groups), n) for name, direction in wanted.items()}
        files = SnapshotFolder(folder, selection)
        vectors = combine(part.steps, files.read, coefficients, selection, torch.device("cpu"))
        return cls(vectors["theta0"], vectors["backbone"], part.steps[-1])

    def to(self, device: torch.device) -> FrozenBasis:
        """Move both vectors."""
        selection = self.theta0.selection
        theta0, backbone = (Vector(v.values.to(device), selection) for v in (self.theta0, self.backbone))
        return FrozenBasis(theta0, backbone, self.step)

    def place(self, weights: Vector, origin: Vector | None = None) -> Placement:
        """Split the displacement of selected weights into its part along the backbone and across it.

        Args:
            weights: The weights.
            origin: Where the displacement begins; theta_0 for None.

        Raises:
            FingerprintError: They are of another selection.
        """
        moved = weights - (self.theta0 if origin is None else origin)
        along = float(moved.dots(self.backbone).sum())
        across = Vector(moved.values - along * self.backbone.values, moved.selection)
        return Placement(along, float(across.dots(across).sum().clamp_min(0).sqrt()))
