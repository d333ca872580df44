r"""Principal directions of a trajectory, from inner products alone.

A direction, a drift or any row is a vector of coefficients over the basis (theta_0, d_1, ..., d_T) of
`trajectory.Trajectory`, whose Gram matrix is H: inner products are u' H w, and nothing here ever sees D numbers.
All PCA is uncentred: the mean of the drift is the very thing looked for.

Rows x_t = theta_t - theta_0 are those of `drifts`; other anchors, windows and corrected drifts are other coefficient
matrices, so one function, `pca`, serves them all.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

Gram = Float[Tensor, "n n"]
Rows = Float[Tensor, "R n"]
Direction = Float[Tensor, " n"]


def drifts(n: int, anchor: int = 0) -> Rows:
    """Coefficients of the drifts x_t = theta_t - theta_anchor of all n snapshots t = 0 .. n-1; row `anchor` is zero.

    Example:
        >>> drifts(3)
        tensor([[0., 0., 0.],
                [0., 1., 0.],
                [0., 1., 1.]], dtype=torch.float64)
    """
    path = weights(n)
    return path - path[anchor]


def weights(n: int) -> Rows:
    """Coefficients of the weights theta_t themselves, of all n snapshots: theta_0 plus the drift."""
    return torch.tril(torch.ones(n, n, dtype=torch.float64))


def theta0(n: int) -> Direction:
    """Coefficients of the initial weights themselves."""
    return torch.eye(n, dtype=torch.float64)[0]


def inner(gram: Gram, u: Float[Tensor, "*batch n"], w: Direction) -> Float[Tensor, "*batch"]:
    """Inner products <u, w> of vectors given by coefficients."""
    return u @ (gram @ w)


def norms(gram: Float[Tensor, "*batch n n"], rows: Float[Tensor, "*#batch R n"]) -> Float[Tensor, "*batch R"]:
    """Lengths of vectors given by coefficients, in one path or in several."""
    return (rows @ gram).mul(rows).sum(-1).clamp_min(0.0).sqrt()


def inner_products(
    gram: Float[Tensor, "*batch n n"], rows: Float[Tensor, "*#batch R n"]
) -> Float[Tensor, "*batch R R"]:
    """Inner products of vectors given by coefficients, symmetric to the last bit."""
    products = rows @ gram @ rows.mT
    return (products + products.mT) / 2


def rounding(gram: Float[Tensor, "*batch n n"], rows: Float[Tensor, "*#batch R n"]) -> Float[Tensor, "*batch R"]:
    """Largest squared length that rounding alone can give each row.

    Where a row's parts cancel (as in a corrected drift), float64 cannot tell a small length from zero.
    """
    reach = (rows.abs() @ gram.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()[..., None]).squeeze(-1)
    return gram.shape[-1] * torch.finfo(torch.float64).eps * reach.square()


def cosine(gram: Gram, u: Direction, w: Direction) -> float:
    """Cosine of two vectors given by coefficients; zero where either vanishes."""
    scale = float(norms(gram, torch.stack([u, w])).prod())
    return float(inner(gram, u, w)) / scale if scale > 0 else 0.0


@dataclass(frozen=True)
class PCA:
    """Uncentred principal components: singular values of the matrix of rows, descending, and unit directions.

    Directions are coefficients of the right singular vectors with a non-zero singular value.
    """

    singular_values: Float[Tensor, " R"]
    directions: Float[Tensor, "K n"]

    @property
    def ratios(self) -> Float[Tensor, " R"]:
        """Share of the total sum of squares on each component; they sum to 1."""
        energy = self.singular_values.square()
        return energy / energy.sum().clamp_min(torch.finfo(torch.float64).tiny)

    @property
    def pc1(self) -> float:
        """Share of the first component."""
        return float(self.ratios[0])

    @property
    def backbone(self) -> Direction:
        """Coefficients of the first direction, v_b."""
        return self.directions[0]

    def components_for(self, share: float) -> int:
        """Fewest leading components that hold a share of the total: k95 for 0.95, k99 for 0.99."""
        reached = torch.cumsum(self.ratios, 0) >= share - 1e-12
        return int(reached.to(torch.int8).argmax()) + 1


def pca(gram: Gram, rows: Rows, *, normalise: bool = False) -> PCA:
    """Uncentred PCA of rows, scaled to unit length with `normalise`, through their Gram matrix.

    Rows of length zero (to rounding) are ignored. Signs are fixed so that the last row's coordinate is positive.

    Raises:
        ValueError: No row has a length.
    """
    parts = spectra(gram[None], rows, normalise=normalise) if len(rows) else None
    unknown = bool(gram.isnan().any())
    if parts is None or not (parts.moved[0] or unknown):
        raise ValueError("every row is zero: a trajectory without movement has no principal direction")
    count = len(rows) if unknown else int(parts.moved[0])
    return PCA(parts.energy[0, :count].sqrt(), parts.directions[0, : int(parts.ranks[0])])


@dataclass(frozen=True)
class Spectra:
    """Uncentred principal components of the same rows in several paths: squared singular values and unit directions.

    `ranks` is the number of singular values that are not rounding, 1 at least; directions are zero from it on. `moved`
    is the number of rows that have a length; with none, the rest means nothing.
    """

    energy: Float[Tensor, "B R"]
    directions: Float[Tensor, "B R n"]
    ranks: Int[Tensor, " B"]
    moved: Int[Tensor, " B"]


def spectra(grams: Float[Tensor, "B n n"], rows: Float[Tensor, "*#B R n"], *, normalise: bool = False) -> Spectra:
    """`pca` of several paths at once (single eigenvalue problems of this size are all overhead), NaN for NaN paths."""
    rows, products, noise = _products(grams, rows, normalise)
    energy, left = torch.linalg.eigh(products)
    energy, left = energy.flip(-1).clamp_min(0.0), left.flip(-1)
    energy = torch.where(noise.isnan().any(-1, keepdim=True), torch.nan, energy)
    # Below this an eigenvalue is rounding, and its direction would be noise divided by noise.
    ranks = (energy > noise.sum(-1, keepdim=True)).sum(-1).clamp_min(1)
    present = torch.arange(energy.shape[-1]) < ranks[:, None]
    directions = (left.mT @ rows) * torch.where(present, energy, torch.inf).rsqrt()[..., None]
    lengths = products.diagonal(dim1=-2, dim2=-1)
    # The last row that has a length gets a positive coordinate on each component: sigma times `left`.
    last = (torch.arange(lengths.shape[-1]) * (lengths > 0)).amax(-1)
    sign = torch.where(left[torch.arange(len(left)), last] < 0, -1.0, 1.0)
    return Spectra(energy, directions * sign[..., None], ranks, (lengths > 0).sum(-1))


def energies(
    grams: Float[Tensor, "B n n"], rows: Float[Tensor, "*#B R n"], *, normalise: bool = False
) -> Float[Tensor, "B R"]:
    """Squared singular values as in `spectra`, where no direction is asked for: half the work."""
    _, products, noise = _products(grams, rows, normalise)
    energy = torch.linalg.eigvalsh(products).flip(-1).clamp_min(0.0)
    return torch.where(noise.isnan().any(-1, keepdim=True), torch.nan, energy)


def _products(
    grams: Float[Tensor, "B n n"], rows: Float[Tensor, "*#B R n"], normalise: bool
) -> tuple[Float[Tensor, "B R n"], Float[Tensor, "B R R"], Float[Tensor, "B R"]]:
    """Rows without those whose length is rounding, their inner products, and the rounding of their squared lengths.

    A path that is not known is no eigenvalue problem: its products are zero and its rounding NaN.
    """
    rows = rows.expand(len(grams), *rows.shape[-2:])
    lengths, noise = norms(grams, rows), rounding(grams, rows)
    unit = lengths if normalise else torch.ones_like(lengths)
    scale = torch.where(lengths.square() > noise, 1.0 / unit, 0.0)
    rows = rows * scale[..., None]
    products = inner_products(grams, rows)
    unknown = products.isnan().any(-1).any(-1)[:, None]
    noise = torch.where(unknown, torch.nan, noise * scale.square())
    return rows, torch.where(unknown[..., None], 0.0, products), noise


@dataclass(frozen=True)
class Decomposition:
    """Drift split along a direction and across it (arXiv 2602.23696, eqs. 6 to 9), in parameter units.

    Args:
        coordinate: a(t) = <x(t), v>.
        residual_norm: ||x(t) - a(t) v||.
        drift_norm: ||x(t)||.
    """

    coordinate: Float[Tensor, " R"]
    residual_norm: Float[Tensor, " R"]
    drift_norm: Float[Tensor, " R"]

    @property
    def fraction(self) -> Float[Tensor, " R"]:
        """Backbone fraction a^2 / ||x||^2; zero where there is no drift."""
        square = self.drift_norm.square()
        return torch.where(square > 0, self.coordinate.square() / square.clamp_min(1e-300), 0.0)


def decompose(gram: Gram, rows: Rows, direction: Direction) -> Decomposition:
    """Split rows along a unit direction and across it."""
    coordinate = inner(gram, rows, direction)
    residual = rows - coordinate[:, None] * direction
    return Decomposition(coordinate, norms(gram, residual), norms(gram, rows))


def update_alignment(gram: Gram, direction: Direction) -> Float[Tensor, " T"]:
    """Cosines of the increments d_1 .. d_T with a direction that knows them all (arXiv 2602.23696, eq. 23).

    The direction lies in the span of the increments, so even a random walk shows about 1/sqrt(T) here.
    """
    increments = torch.eye(len(gram), dtype=torch.float64)[1:]
    lengths = norms(gram, increments) * norms(gram, direction[None])
    return torch.where(lengths > 0, inner(gram, increments, direction) / lengths.clamp_min(1e-300), 0.0)


def latest_update_alignment(gram: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch"]:
    """Cosine of the last increment with the backbone of the snapshots before it, in one path or in several.

    Chance gives zero. NaN where there is no past, that is before the third snapshot, or where nothing had moved yet.
    """
    n = gram.shape[-1]
    if n < 3:
        return torch.full(gram.shape[:-2], torch.nan, dtype=torch.float64)
    grams = gram.reshape(-1, n, n)
    past = spectra(grams, drifts(n)[1 : n - 1])
    along = (past.directions[:, 0] * grams[:, -1]).sum(-1)
    length = grams[:, -1, -1].clamp_min(0.0).sqrt()
    cosines = torch.where(length > 0, along / length.clamp_min(1e-300), 0.0)
    return torch.where(past.moved > 0, cosines, torch.nan).reshape(gram.shape[:-2])


def past_update_alignment(gram: Gram) -> Float[Tensor, " T"]:
    """`latest_update_alignment` of every increment d_1 .. d_T in turn, as it was while the run went on."""
    return torch.stack([latest_update_alignment(gram[:k, :k]) for k in range(2, len(gram) + 1)])


@dataclass(frozen=True)
class RollingBackbone:
    """|cos| of the first directions of windows of consecutive snapshots among 1 .. T along the run.

    `ends` has the index of the last snapshot of each window (of the later one of two), and `pc1` its first share.
    """

    ends: list[int]
    cosines: Float[Tensor, " W"]
    pc1: Float[Tensor, " W"]


def _rolling(gram: Gram, width: int, *, own_anchor: bool = False, against: Direction | None = None) -> RollingBackbone:
    """Compare each window with the one before it, or with a direction; rows from an own anchor are of unit length."""
    n = len(gram)
    windows = [
        pca(gram, drifts(n, first if own_anchor else 0)[first : first + width], normalise=own_anchor)
        for first in range(1, n - width + 1)
    ]
    directions = [window.backbone for window in windows]
    pairs = itertools.pairwise(directions) if against is None else ((window, against) for window in directions)
    cosines = torch.tensor([abs(cosine(gram, *pair)) for pair in pairs], dtype=torch.float64)
    shares = torch.tensor([window.pc1 for window in windows], dtype=torch.float64)
    without = 1 if against is None else 0
    return RollingBackbone(list(range(width + without, n)), cosines, shares[without:])


def rolling_origin_anchored(gram: Gram, width: int = 10) -> RollingBackbone:
    """|cos| of adjacent windows of drifts from theta_0, raw rows: what the 0.997 of arXiv 2602.23696 is.

    Windows that share all but one row and the common origin are nearly parallel on any path: a random walk gives 0.998.
    """
    return _rolling(gram, width)


def rolling_self_anchored(gram: Gram, width: int = 10) -> RollingBackbone:
    """|cos| of adjacent windows of drifts from the window's own first snapshot, unit rows (rotation curve)."""
    return _rolling(gram, width, own_anchor=True)


def rolling_against_global(gram: Gram, width: int = 10) -> RollingBackbone:
    """|cos| of each window's first direction with the whole run's v_b, raw rows (arXiv 2602.23696, eq. 5)."""
    return _rolling(gram, width, against=pca(gram, drifts(len(gram))).backbone)
