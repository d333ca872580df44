r"""Subspaces of weight space: orthonormal vectors, each supported in one stretch of the weights.

A `Basis` is cut into blocks. Each block has rows that are zero outside of its stretch, so it keeps (k, d) numbers and
not (k, D), and blocks are orthogonal to one another. One block over everything is a subspace of the whole space; a
block for each group is what "the leading directions of every matrix" means.

A vector may belong to more weights than a basis does: a gradient of all weights is projected on directions of some.
How long the projection is by chance is in `subspace_nulls`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.directions.subspace_nulls import Projection
from mini_gpt_pl.geometry.path import centred as centring
from mini_gpt_pl.geometry.path import pca
from mini_gpt_pl.geometry.path.snapshots import SnapshotFolder, combine
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.geometry.vectors.products import squared_length
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector

Combine = Callable[[Sequence[Float[Tensor, "G n"]]], Float[Tensor, "N D"]]
"""Turns coefficients over (theta_0, d_1, ...), one set per group, into vectors: `IncrementRows.combine_all`."""


@dataclass(frozen=True, eq=False)
class Block:
    """Orthonormal directions, `rows`, within one stretch of the weights: a group or a weight, named by `label`.

    `span` is where the stretch lies in the flat vectors of the basis' selection.
    """

    label: str
    span: slice
    rows: Float[Tensor, "k d"]


@dataclass(frozen=True, eq=False)
class Basis:
    """Orthonormal vectors of a subspace of the selected weights, in blocks of disjoint stretches.

    Example:
        >>> selection = ParameterSelection(("w",), ((3,),), ("all",))
        >>> basis = Basis.of(selection, [("w", slice(0, 3), torch.tensor([[2.0, 0, 0], [1, 1, 0]]))])
        >>> basis.parallel(Vector(torch.tensor([3.0, 4, 5]), selection)).values
        tensor([3., 4., 0.])
    """

    selection: ParameterSelection
    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, selection: ParameterSelection, blocks: Sequence[tuple[str, slice, Tensor]]) -> Basis:
        """Orthonormalise independent rows, in float64; a block is a label, a stretch and rows (k, d).

        Blocks without rows are left out.

        Raises:
            UserError: The ranks share the weights, or there are more rows than values in a block, or none at all.
            ValueError: Two blocks overlap, or rows depend on one another (to 1e-7 of their length).
        """
        if selection.shards is not None:
            raise UserError("a basis needs whole weights, and here the ranks share them: use one device or DDP")
        filled = [(label, span, rows) for label, span, rows in blocks if len(rows)]
        spans = sorted((span.start, span.stop) for _, span, _ in filled)
        if any(stop > start for (_, stop), (start, _) in itertools.pairwise(spans)):
            raise ValueError("blocks of a basis overlap: their rows need not be orthogonal")
        for label, span, rows in filled:
            if len(rows) > span.stop - span.start:
                raise UserError(
                    f"a basis of {len(rows)} directions in {label}, which has {span.stop - span.start} values"
                )
        if not filled:
            raise UserError("a basis without directions: nothing has moved yet, or no direction was asked for")
        return cls(selection, tuple(Block(label, span, _orthonormal(rows)) for label, span, rows in filled))

    @property
    def size(self) -> int:
        """Number of directions, K."""
        return sum(len(block.rows) for block in self.blocks)

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Basis:
        """Move or convert the rows; float32 ones are orthonormal to 1e-7."""
        moved = [Block(block.label, block.span, block.rows.to(device=device, dtype=dtype)) for block in self.blocks]
        return Basis(self.selection, tuple(moved))

    def coefficients(self, vector: Vector) -> Float[Tensor, " K"]:
        """Inner products of a vector with the directions, block by block, in the rows' dtype."""
        values = restrict(vector, self.selection).values
        return torch.cat([block.rows @ values[block.span].to(block.rows.dtype) for block in self.blocks])

    def combine(self, coefficients: Float[Tensor, " K"]) -> Vector:
        """Vector of the subspace with these coefficients."""
        rows = self.blocks[0].rows
        out = torch.zeros(self.selection.dim, dtype=rows.dtype, device=rows.device)
        parts = coefficients.to(rows.dtype).split([len(block.rows) for block in self.blocks])
        for block, part in zip(self.blocks, parts, strict=True):
            out[block.span] = part @ block.rows
        return Vector(out, self.selection)

    def parallel(self, vector: Vector) -> Vector:
        """The part of a vector inside the subspace, over the basis' weights, in the vector's dtype."""
        inside = self.combine(self.coefficients(vector))
        return Vector(inside.values.to(vector.values.dtype), self.selection)

    def project(self, vector: Vector) -> Projection:
        """Split a vector's squared length, of the basis' weights or of more, by the blocks, inside and outside."""
        values = restrict(vector, self.selection).values
        inside = self.coefficients(vector).double().square().split([len(block.rows) for block in self.blocks])
        return Projection(
            along=torch.stack([part.sum() for part in inside]),
            energy=torch.stack([squared_length(values[block.span]) for block in self.blocks]),
            total=squared_length(vector.values),
            sizes=tuple(len(block.rows) for block in self.blocks),
            dims=tuple(block.span.stop - block.span.start for block in self.blocks),
            dim=vector.selection.dim,
        )


def restrict(vector: Vector, to: ParameterSelection) -> Vector:
    """Cut a vector of some weights down to a selection of fewer, in that selection's order.

    Raises:
        UserError: The vector does not have all of the selection's weights, or has them in other shapes.
    """
    if vector.selection.fingerprint == to.fingerprint:
        return vector
    parts = vector.selection.unflatten(vector)
    for name, shape in zip(to.names, to.shapes, strict=True):
        if name not in parts or tuple(parts[name].shape) != shape:
            raise UserError(f"the vector has no weight {name!r} of shape {shape}: select it too, or leave it out there")
    return Vector(torch.cat([parts[name].reshape(-1) for name in to.names]), to)


# ------------------------------------------------------------------------------------------------ which subspace


def principal(
    trajectory: Trajectory,
    combine_rows: Combine,
    selection: ParameterSelection,
    k: int,
    *,
    centred: bool = True,
    without_theta0: bool = False,
) -> Basis:
    """Top k principal directions of each group's path so far.

    Centred: PCA of the weights themselves, the snapshot of theta_0 included. Uncentred: of the drift from theta_0, as
    the backbone is. Without theta_0: of the path with each group's own theta_0 projected out, to which all directions
    are then orthogonal, as paths that only decay share it. A group that has moved in fewer directions gives fewer.
    `combine_rows` is asked once.

    Raises:
        UserError: Nothing has moved yet.
    """
    n = len(trajectory)
    rows = centring.centred(pca.drifts(n)) if centred else pca.drifts(n)[1:]
    if not len(rows):
        raise UserError("a path of one snapshot has no principal direction: take another")
    if without_theta0:
        rows = centring.off_theta0(trajectory.grams, rows)
    spectra = pca.spectra(trajectory.grams, rows)
    counts = torch.where(spectra.moved > 0, spectra.ranks, 0).clamp_max(k)
    top = spectra.directions[:, :k].clone()
    top[torch.arange(top.shape[1]) >= counts[:, None]] = 0.0
    vectors = combine_rows([top[:, j] for j in range(int(counts.max()))]) if counts.any() else top[:0]
    parts = zip(selection.items(), counts.tolist(), strict=True)
    return Basis.of(selection, [(group, span, vectors[:count, span]) for (group, span), count in parts])


def of_run(
    folder: SnapshotFolder,
    trajectory: Trajectory,
    k: int,
    device: torch.device,
    *,
    centred: bool = True,
    without_theta0: bool = False,
) -> Basis:
    """`principal` directions of another run's path, from its snapshot files: the wrong subspace, as a control.

    Raises:
        UserError: A snapshot is missing, or of another model.
    """
    folder.selection.require(trajectory.fingerprint)

    def read(coefficients: Sequence[Float[Tensor, "G n"]]) -> Float[Tensor, "N D"]:
        named = {str(position): rows for position, rows in enumerate(coefficients)}
        vectors = combine(trajectory.steps, folder.read, named, folder.selection, device)
        return torch.stack([vector.values for vector in vectors.values()])

    return principal(trajectory, read, folder.selection, k, centred=centred, without_theta0=without_theta0)


def own_directions(vector: Vector) -> Basis:
    """Each group's own part of a vector as a direction, such as that of theta_0; groups where it is zero have none."""
    parts = [(group, span, vector.values[span][None]) for group, span in vector.selection.items()]
    return Basis.of(vector.selection, [(group, span, rows[: int(rows.any())]) for group, span, rows in parts])


def singular(weights: Vector, k: int) -> Basis:
    """Leading singular directions u_i v_i' of each weight matrix as it is: they follow the weights, not the path.

    Weights of more than two axes count as matrices of their first; vectors and zero matrices have none.
    """
    blocks = []
    for name, span, shape in _matrices(weights.selection):
        matrix = weights.values[span].double().view(shape)
        wide = shape[0] <= shape[1]
        # Through the smaller product: a decomposition of the matrix itself takes many times as long on a GPU.
        squares, vectors = torch.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)
        one = vectors.T.flip(0)[: int((squares[-k:] > 1e-12 * squares[-1]).sum())]
        other = one @ matrix if wide else one @ matrix.T
        other = other / torch.linalg.vector_norm(other, dim=1, keepdim=True)
        blocks.append((name, span, _outer(one, other) if wide else _outer(other, one)))
    return Basis.of(weights.selection, blocks)


def isotropic(selection: ParameterSelection, k: int, generator: torch.Generator) -> Basis:
    """Draw k random directions of the whole space; the generator's device is the basis'."""
    return Basis.of(selection, [("all", slice(0, selection.dim), _gaussian(k, selection.dim, generator))])


def random_like(basis: Basis, generator: torch.Generator) -> Basis:
    """Random directions in the same blocks, as many in each: what a basis is to be compared with."""
    drawn = [(b.label, b.span, _gaussian(len(b.rows), b.rows.shape[1], generator)) for b in basis.blocks]
    return Basis.of(basis.selection, drawn)


def rank_one(selection: ParameterSelection, k: int, generator: torch.Generator) -> Basis:
    """Random directions u_i v_i' of each weight matrix, u_i and v_i orthonormal: concentrated as singular ones are."""
    blocks = []
    for name, span, (m, n) in _matrices(selection):
        count = min(k, m, n)
        u, v = (_orthonormal(_gaussian(count, size, generator)) for size in (m, n))
        blocks.append((name, span, _outer(u, v)))
    return Basis.of(selection, blocks)


# --------------------------------------------------------------------------------------------- two of them


def cross(a: Basis, b: Basis) -> Float[Tensor, "Ka Kb"]:
    """Inner products of the directions of two bases of the same weights.

    Raises:
        FingerprintError: They are of other weights, or in another order.
    """
    a.selection.accept(b.selection)
    lines = []
    for one in a.blocks:
        parts = [_shared(one, other) for other in b.blocks]
        lines.append(torch.cat([mine.double() @ theirs.double().T for mine, theirs in parts], 1))
    return torch.cat(lines)


def principal_cosines(a: Basis, b: Basis) -> Float[Tensor, " k"]:
    """Cosines of the principal angles between two subspaces, descending; as many as the smaller has directions."""
    return torch.linalg.svdvals(cross(a, b)).clamp_max(1.0)


def overlap(a: Basis, b: Basis) -> float:
    """Mean squared cosine of the principal angles: 1 where one subspace holds the other, 0 across it."""
    return float(cross(a, b).square().sum()) / min(a.size, b.size)


def expected_overlap(a: Basis, b: Basis) -> float:
    """Overlap if the second basis were random in its blocks: each of its rows spreads evenly over its stretch."""
    total = 0.0
    for other in b.blocks:
        share = sum(float(squared_length(_shared(one, other)[0].reshape(-1))) for one in a.blocks)
        total += len(other.rows) * share / (other.span.stop - other.span.start)
    return total / min(a.size, b.size)


def _shared(a: Block, b: Block) -> tuple[Float[Tensor, "ka d"], Float[Tensor, "kb d"]]:
    """Rows of two blocks over the stretch that both have; it may be empty."""
    lo = max(a.span.start, b.span.start)
    hi = max(lo, min(a.span.stop, b.span.stop))
    mine, theirs = (block.rows[:, lo - block.span.start : hi - block.span.start] for block in (a, b))
    return mine, theirs


def _orthonormal(rows: Tensor) -> Float[Tensor, "k d"]:
    """Orthonormal rows of the same span, in float64; the first keeps its direction and sign."""
    q, r = torch.linalg.qr(rows.double().T)
    sizes = r.diagonal().abs()
    if not bool((sizes > 1e-7 * torch.linalg.vector_norm(rows, dim=1).double()).all()):
        raise ValueError("the rows of a basis depend on one another: fewer directions span the same")
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).T.contiguous()


def _gaussian(k: int, d: int, generator: torch.Generator) -> Float[Tensor, "k d"]:
    return torch.randn(k, d, generator=generator, device=generator.device, dtype=torch.float64)


def _outer(u: Float[Tensor, "k m"], v: Float[Tensor, "k n"]) -> Float[Tensor, "k mn"]:
    return (u[:, :, None] * v[:, None, :]).flatten(1)


def _matrices(selection: ParameterSelection) -> list[tuple[str, slice, tuple[int, int]]]:
    """Name, stretch and shape of every weight of two axes or more."""
    stops = itertools.accumulate(selection.sizes)
    weights = zip(selection.names, selection.shapes, selection.sizes, stops, strict=True)
    return [
        (name, slice(stop - size, stop), (shape[0], size // shape[0]))
        for name, shape, size, stop in weights
        if len(shape) >= 2
    ]
