r"""The leading principal directions of a growing path, kept as vectors without its snapshots.

The backbone v_b of T snapshots is a sum over all of them, with other coefficients at each T. But from one snapshot to
the next it stays close to the plane of the direction before and the new drift x_T, so that it can be followed: keep K
directions, take the new drift to them, and of these K + 1 vectors keep the K combinations that hold most of the energy
of the *whole* path. Which combinations these are follows from inner products alone; so does how well any direction of
the path is kept. For the recorded paths of this repository and for a free walk of 500 steps, K = 1 keeps the backbone
with a cosine above 0.999 at every step.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mini_gpt_pl.geometry.path import pca
from mini_gpt_pl.geometry.path.snapshots import SnapshotFolder
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector

# Values of a group combined at a time: few enough for a CPU's cache, enough to keep a GPU busy.
_CPU_VALUES, _GPU_VALUES = 1 << 14, 1 << 24
# Eigenvalues below this share of the largest are rounding.
_RANK = 1e-12


class LeadingDirections:
    """theta_0 and, for each group, K (`count`) principal directions of the path so far: (K + 1) D values for any T.

    Attributes:
        theta0: The initial weights; None before the first snapshot.
        values: Unit vectors in each group (to the Gram matrix's precision), zero where the path has fewer directions.
        coefficients: Theirs over (theta_0, d_1, ..., d_T), by group.
    """

    def __init__(self, selection: ParameterSelection, count: int) -> None:
        self.selection = selection
        self.count = count
        self.theta0: Vector | None = None
        self.values: Float[Tensor, "K D"] = torch.zeros(count, 0)
        self.coefficients: Float[Tensor, "G K n"] = torch.zeros(len(selection.groups), count, 0, dtype=torch.float64)

    def grow(self, grams: Float[Tensor, "G n n"], weights: Vector) -> None:
        """Take up the weights of a new snapshot, whose increment the Gram matrices of the basis include.

        Raises:
            FingerprintError: The weights are others.
        """
        self.selection.accept(weights.selection)
        n = grams.shape[-1]
        self.coefficients = F.pad(self.coefficients, (0, n - self.coefficients.shape[-1]))
        if self.theta0 is None:
            self.theta0 = Vector(weights.values.float().clone(), self.selection)
            self.values = torch.zeros(self.count, len(weights.values), device=weights.values.device)
            return
        path, theta0 = pca.drifts(n)[1:], self.theta0.values
        step = _CPU_VALUES if theta0.device.type == "cpu" else _GPU_VALUES
        for group, span in enumerate(self.selection.slices):
            rows = torch.cat([self.coefficients[group], path[-1:]])
            mix = leading_mix(grams[group], rows, path, self.count)
            self.coefficients[group] = mix @ rows
            mix = mix.float().to(self.values.device)
            for lo in range(span.start, span.stop, step):
                part = slice(lo, min(lo + step, span.stop))
                drift = weights.values[part].float() - theta0[part]
                self.values[:, part] = mix[:, :-1] @ self.values[:, part] + mix[:, -1:] * drift

    def nearest(self, grams: Float[Tensor, "G n n"], coefficients: Float[Tensor, "G n"]) -> Vector:
        """Give, group by group, the vector of the kept span that is nearest to a direction, in float32.

        Coefficients of fewer columns than there are snapshots name the first.
        """
        if self.theta0 is None:
            raise ValueError("there is no snapshot yet")
        out = torch.empty_like(self.theta0.values)
        for group, span in enumerate(self.selection.slices):
            first, *rest = self._project(grams, group, coefficients[group])[1].tolist()
            out[span] = first * self.theta0.values[span]
            for weight, direction in zip(rest, self.values, strict=True):
                out[span].add_(direction[span], alpha=weight)
        return Vector(out, self.selection)

    def kept(self, grams: Float[Tensor, "G n n"], coefficients: Float[Tensor, "G n"]) -> float:
        """Cosine of a direction of the whole selection with its nearest kept vector, by the Gram matrices."""
        inside = whole = 0.0
        for group in range(len(grams)):
            target, weights, basis = self._project(grams, group, coefficients[group])
            inside += float(pca.norms(grams[group], (weights @ basis)[None])) ** 2
            whole += float(pca.norms(grams[group], target[None])) ** 2
        return (inside / whole) ** 0.5 if whole > 0 else 1.0

    def _project(
        self, grams: Float[Tensor, "G n n"], group: int, direction: Float[Tensor, " c"]
    ) -> tuple[pca.Direction, Float[Tensor, " K1"], pca.Rows]:
        """Orthogonal projection of a direction on theta_0 and the kept ones: it, its weights, and what they are of."""
        n = grams.shape[-1]
        target = F.pad(direction.double(), (0, n - len(direction)))
        basis = torch.cat([pca.theta0(n)[None], self.coefficients[group]])
        products = basis @ grams[group] @ basis.T
        weights = torch.linalg.pinv(products, rtol=_RANK, hermitian=True) @ (basis @ (grams[group] @ target))
        return target, weights, basis


def leading_mix(gram: pca.Gram, vectors: Float[Tensor, "F n"], path: pca.Rows, count: int) -> Float[Tensor, "K F"]:
    """Weights of the `count` combinations of vectors that hold most of a path's energy: orthonormal, best first.

    The vectors and the path's rows are given by their coefficients; where the vectors span less than `count`, the last
    combinations are zero.
    """
    lengths = pca.norms(gram, vectors)
    # At unit length, so that a short vector is not taken for rounding.
    scaled = vectors / torch.where(lengths > 0, lengths, 1.0)[:, None]
    energy, turn = torch.linalg.eigh(scaled @ gram @ scaled.T)
    used = (energy > _RANK * energy.max()) & (lengths.max() > 0)
    frame = (turn[:, used] / energy[used].sqrt()).T  # weights of an orthonormal frame of their span
    inside = path @ gram @ (frame @ scaled).T
    _, axes = torch.linalg.eigh(inside.T @ inside)
    mix = axes.flip(1).T[:count] @ frame / torch.where(lengths > 0, lengths, 1.0)
    return F.pad(mix, (0, 0, 0, count - len(mix)))


class LeadingFiles:
    """The `count` kept directions on disk, for a run to be resumed: one folder for theta_0 and one for each of them."""

    def __init__(self, path: Path, selection: ParameterSelection, count: int) -> None:
        self._theta0 = SnapshotFolder(path / "theta_0", selection)
        self._directions = [SnapshotFolder(path / f"direction_{k + 1}", selection) for k in range(count)]

    def save(self, step: int, leading: LeadingDirections) -> None:
        """Write the directions as they are at a snapshot, and theta_0 if it is not there yet; waits for the disk."""
        if leading.theta0 is None:
            return
        if not self._theta0.steps():
            self._theta0.write(0, leading.theta0)
        for folder, values in zip(self._directions, leading.values, strict=True):
            folder.write(step, Vector(values, leading.selection))
        for folder in (self._theta0, *self._directions):
            folder.close()

    def load(self, step: int, leading: LeadingDirections, device: torch.device) -> None:
        """Take up the directions of a snapshot; `leading.coefficients` are the caller's to restore.

        Raises:
            UserError: A file is missing, corrupt or of another model.
        """
        leading.theta0 = self._theta0.read(0).to(device)
        leading.values = torch.stack([folder.read(step).values.to(device) for folder in self._directions])
