"""Directions in weight space to measure gradients along: those of the path so far, given ones, and random ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from mini_gpt_pl.geometry.path import pca
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.geometry.vectors.alignment import with_total
from mini_gpt_pl.geometry.vectors.products import inner_products, products_at_once, squared_norms
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector

BACKBONE = "backbone"


@dataclass(frozen=True)
class Axis:
    """A direction to measure along: the groups' own ones, end to end, and that of the whole selection.

    Both are of any length: `lengths` has those of the groups' directions, then that of the whole's.
    """

    own: Vector
    whole: Vector
    lengths: Float[Tensor, " G1"]

    @classmethod
    def of(cls, own: Vector, whole: Vector) -> Axis:
        """Measure the lengths; FingerprintError where the two order their coordinates differently."""
        own.selection.require(whole.selection.fingerprint)
        squares = torch.cat([own.dots(own), whole.dots(whole).sum()[None]])
        return cls(own, whole, squares.sqrt())

    def project(self, vector: Vector) -> Float[Tensor, " G1"]:
        """Coordinates of a vector of the same order along the unit directions; zero along one that vanishes."""
        own = vector.dots(self.own)
        total = own.sum() if self.whole is self.own else vector.dots(self.whole).sum()
        return _over(torch.cat([own, total[None]]), self.lengths)


def _over(inner: Float[Tensor, "*batch G1"], lengths: Float[Tensor, "*#batch G1"]) -> Float[Tensor, "*batch G1"]:
    return torch.where(lengths > 0, inner / lengths, 0.0)


@dataclass(frozen=True, eq=False)
class Axes(Mapping[str, Axis]):
    """Named axes in one matrix, so that a few gradients meet all of them in one product that reads each once.

    `places` has for each name the row of the groups' directions and that of the whole's, which may be the same.
    """

    rows: Float[Tensor, "K D"]
    places: Mapping[str, tuple[int, int]]
    selection: ParameterSelection

    @classmethod
    def of(cls, axes: Mapping[str, Axis]) -> Axes:
        """Copy axes, at least one, of the same order into a matrix; what is such a matrix already stays as it is."""
        if isinstance(axes, Axes):
            return axes
        vectors: list[Vector] = []
        places = {}
        for name, axis in axes.items():
            first = len(vectors)
            vectors += [axis.own] if axis.whole is axis.own else [axis.own, axis.whole]
            places[name] = (first, len(vectors) - 1)
        for vector in vectors:
            vectors[0].selection.accept(vector.selection)
        return cls(torch.stack([vector.values for vector in vectors]), places, vectors[0].selection)

    @classmethod
    def along(
        cls,
        coefficients: Mapping[str, Float[Tensor, "G1 n"]],
        directions: Callable[[Sequence[Float[Tensor, "G n"]]], Float[Tensor, "K D"]],
        selection: ParameterSelection,
    ) -> Axes:
        """Materialise named directions from their coefficients, a row per group, then the whole's.

        `directions` makes vectors of the selection, each of one set of coefficients per group, in one pass.
        """
        sets: list[Float[Tensor, "G n"]] = []
        places = {}
        for name, rows in coefficients.items():
            own, whole = rows[:-1], rows[-1:].expand(len(rows) - 1, -1)
            first = len(sets)
            sets += [own] if bool((own == whole).all()) else [own, whole]
            places[name] = (first, len(sets) - 1)
        return cls(directions(sets) if sets else torch.empty(0, selection.local_dim), places, selection)

    def __getitem__(self, name: str) -> Axis:
        first, second = self.places[name]
        own = Vector(self.rows[first], self.selection)
        whole = own if second == first else Vector(self.rows[second], self.selection)
        return Axis(own, whole, self._lengths[self.index(name)])

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def index(self, name: str) -> int:
        """Where a name's coordinates stand among the N that `project` and `meet` give; ValueError without it."""
        return list(self.places).index(name)

    def project(self, vectors: Float[Tensor, "M D"]) -> Float[Tensor, "M N G1"]:
        """Coordinates of vectors of the selection along all unit directions; zero along one that vanishes."""
        return _over(self._of_places(inner_products(vectors, self.rows, self.selection)), self._lengths)

    def meet(self, vector: Vector) -> tuple[Float[Tensor, " G1"], Float[Tensor, "N G1"]]:
        """Squared length of one vector of the same order, and its coordinates as of `project`, in one pass on a GPU."""
        self.selection.accept(vector.selection)
        row = vector.values[None]
        products = products_at_once([*self.rows, vector.values], vector.values, self.selection)
        if products is None:
            return with_total(squared_norms(row, self.selection)[:, 0]), self.project(row)[0]
        return with_total(products[:, -1]), _over(self._of_places(products[:, None, :-1]), self._lengths)[0]

    @cached_property
    def _lengths(self) -> Float[Tensor, "N G1"]:
        return self._of_places(squared_norms(self.rows, self.selection)[:, None])[0].sqrt()

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """Rows of the groups' directions and of the wholes', on the device: a list would wait for it at every use."""
        own, whole = zip(*self.places.values(), strict=True)
        return torch.tensor(own, device=self.rows.device), torch.tensor(whole, device=self.rows.device)

    def _of_places(self, of_rows: Float[Tensor, "G M K"]) -> Float[Tensor, "M N G1"]:
        """Take what belongs to each name from what belongs to each row and group."""
        own, whole = self._places
        return torch.cat([of_rows[..., own].permute(1, 2, 0), of_rows[..., whole].sum(0)[..., None]], -1)


def path_coefficients(
    trajectory: Trajectory, segments: Mapping[str, tuple[int, int]]
) -> dict[str, Float[Tensor, "G1 n"]]:
    """Name the directions that the snapshots so far offer, as coefficients over (theta_0, d_1, ..., d_T).

    `backbone`, `pc2` (where the path has a second component in every group), `theta0` (the initial weights, with which
    weight decay aligns any backbone) and the segments, each with a row per group, then the whole's; none where nothing
    has moved. Segments are displacements theta(second step) - theta(first step), such as a switch from peak to trough;
    one whose snapshots have not both been taken is left out.
    """
    n = len(trajectory)
    if n < 2:
        return {}
    rows = pca.drifts(n)[1:]
    grams = [*(trajectory.gram(group) for group in trajectory.groups), trajectory.gram()]
    if min(float(pca.norms(gram, rows).max()) for gram in grams) == 0.0:
        return {}  # nothing has moved yet
    parts = [pca.pca(gram, rows).directions for gram in grams]
    coefficients = {BACKBONE: torch.stack([part[0] for part in parts])}
    if min(len(part) for part in parts) > 1:
        coefficients["pc2"] = torch.stack([part[1] for part in parts])
    coefficients["theta0"] = pca.theta0(n).expand(len(grams), n)
    path = pca.drifts(n)
    for name, (first, last) in segments.items():
        if first in trajectory.steps and last in trajectory.steps:
            line = path[trajectory.steps.index(last)] - path[trajectory.steps.index(first)]
            coefficients[name] = line.expand(len(grams), n)
    return coefficients


class RandomDirections:
    """K (`count`) Gaussian directions made orthogonal to an axis, group by group and as a whole.

    They are the denominator of the anisotropy of arXiv 2602.23696; `fisher.anisotropy` knows their mean exactly and
    costs nothing: this is for comparison. Direction k is a function of (seed, k) on one kind of device, drawn again for
    every few gradients rather than stored, so they take D values and not K x D.
    """

    def __init__(self, axis: Axis, count: int, seed: int = 0) -> None:
        self.axis = axis
        self.count = count
        self.seed = seed
        self._along: list[tuple[Float[Tensor, " G1"], Float[Tensor, " G1"]]] = []

    def project(self, vectors: Float[Tensor, "M D"]) -> Float[Tensor, "M K G1"]:
        """Coordinates of vectors of the axis' selection along each of the unit directions."""
        selection = self.axis.own.selection
        along = Axes.of({"": self.axis}).project(vectors)[:, 0]
        coordinates = []
        for k in range(self.count):
            generator = torch.Generator(vectors.device).manual_seed((self.seed << 16) + k)
            draw = Vector(torch.randn(vectors.shape[1], generator=generator, device=vectors.device), selection)
            if k == len(self._along):
                self._along.append((self.axis.project(draw), with_total(draw.dots(draw))))
            shared, square = self._along[k]
            across = (square - shared.square()).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
            inner = inner_products(vectors, draw.values[None], selection)[..., 0]  # (G, M)
            inner = torch.cat([inner, inner.sum(0, keepdim=True)]).T
            coordinates.append((inner - shared * along) / across)
        return torch.stack(coordinates, 1)
