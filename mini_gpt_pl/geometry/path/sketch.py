r"""Sketched snapshots: a random projection of the weights whose inner products stand in for the exact ones.

A trajectory needs inner products only, and a linear map S from D values to few keeps them on average (Johnson and
Lindenstrauss 1984). With the rows S theta_0, S d_1, ..., S d_T a snapshot is kept in m values for each group instead
of D, and as S is linear, the sketch of an increment is the difference of two sketches: no earlier weights are needed.
Nulls, PCA and everything else work on the Gram matrix of the sketches as on the exact one.

The map is a CountSketch (Charikar, Chen and Farach-Colton 2002) whose buckets are rotations instead of hashes, so that
it reads the weights in order and scatters nothing. Cut the D values of a group into blocks of m; with signs s_i = +-1
and one rotation h_b for each block, all independent and uniform,

    (S x)_{(j + h_b) mod m} += s_i x_i    for the value i = b m + j.

Two values of different blocks meet with probability 1/m, two of one block never. Therefore

    E <Sx, Sy> = <x, y>,
    Var <Sx, Sy> = 1/m sum_{b != c} (|x_b|^2 |y_c|^2 + <x_b, y_b> <x_c, y_c>)
                <= (|x|^2 |y|^2 + <x, y>^2) / m,

and D <= m makes the sketch exact. Groups have maps of their own, and so have the ranks that share the weights: their
Gram matrices add up, and no cross term between them ever enters, so that the variance of a sum over R equal parts is
that of a sketch of R m values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.path.leading import LeadingDirections
from mini_gpt_pl.geometry.path.rows import IncrementRows
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector

# Blocks that share a table of sign bits: one bit of a 32-bit word each.
_BITS = 32
# Values folded at a time: few enough for a CPU's cache, enough to keep a GPU busy. Temporaries take about 30 B each.
_CPU_VALUES, _GPU_VALUES = 1 << 17, 1 << 22
_SIGN = -(1 << 31)  # the sign bit of a 32-bit number


class Sketch:
    """A linear map of the selected weights to m (`width`) values for each group, on each rank that shares them.

    Signs and rotations are functions of (seed, rank's share, group, position), drawn by Philox: a run that is resumed
    with the same sharding goes on with the same map, on a CPU as on a GPU. They take one bit for each value.
    `selection` has names, order and groups of the sketched values; vectors of it and of the weights do not mix.

    Raises:
        UserError: The width is below 1.

    Example:
        >>> weights = ParameterSelection(("w",), ((100_000,),), ("all",))
        >>> sketch = Sketch(weights, width=4096)
        >>> x = sketch(Vector(torch.ones(100_000), weights))
        >>> x.values.shape, bool(abs(x.dots(x) / 100_000 - 1) < 0.1)
        (torch.Size([4096]), True)
    """

    def __init__(self, selection: ParameterSelection, width: int, seed: int = 0) -> None:
        if width < 1:
            raise UserError(f"a sketch of {width} values holds nothing: give sketch 1 or more, such as 4096")
        self.weights = selection
        self.width = width
        self.seed = seed
        groups, shards = selection.groups, selection.shards
        ranks = 1 if shards is None else shards.count
        # Another fingerprint for each map.
        names = tuple(
            f"sketch of {group} of {selection.fingerprint[:16]} over {ranks}, seed {seed}" for group in groups
        )
        if shards is not None:
            shards = replace(shards, shapes=((width,),) * len(groups), owned=(True,) * len(groups))
        self.selection = ParameterSelection(names, ((width * ranks,),) * len(groups), groups, shards)
        self._tables = [self._draw(group, span.stop - span.start) for group, span in enumerate(selection.slices)]

    def __call__(self, vector: Vector) -> Vector:
        """Sketch a vector of weights, a gradient or an update, wherever it lies.

        Sums run in float64, so that the difference of two sketches is the sketch of the difference to 1e-12 of them. Of
        float64 values the two halves are sketched one after the other.

        Raises:
            FingerprintError: The vector is of other weights than the sketch.
        """
        self.weights.accept(vector.selection)
        device = vector.values.device
        self._tables = [(signs.to(device), turns.to(device)) for signs, turns in self._tables]
        halves = [vector.values.float()]
        if vector.values.dtype == torch.float64:
            halves.append((vector.values - halves[0]).float())
        spans = list(zip(self._tables, self.weights.slices, strict=True))
        folded = [torch.cat([self._fold(half[span], *table) for table, span in spans]) for half in halves]
        return Vector(sum(folded[1:], folded[0]), self.selection)

    @property
    def table_bytes(self) -> int:
        """Memory of signs and rotations."""
        return sum(table.numel() * table.element_size() for pair in self._tables for table in pair)

    def _draw(self, group: int, size: int) -> tuple[Int[Tensor, "W m"], Int[Tensor, " N"]]:
        """Sign bits, bit k of word (w, j) for block 32 w + k and place j in it, and a rotation for each block."""
        shards = self.weights.shards
        share = 0 if shards is None else shards.index
        words = -(-size // (_BITS * self.width))
        rng = np.random.Generator(
            np.random.Philox(key=np.array([self.seed % 2**64, (share << 32) + group], dtype=np.uint64))
        )
        turns = rng.integers(0, self.width, words * _BITS)
        signs = rng.integers(0, 1 << _BITS, (words, self.width), dtype=np.uint32)
        return torch.from_numpy(signs.view(np.int32)), torch.from_numpy(turns)

    def _fold(
        self, values: Float[Tensor, " n"], signs: Int[Tensor, "W m"], turns: Int[Tensor, " N"]
    ) -> Float[Tensor, " m"]:
        """Sum signed blocks, each turned by its own rotation."""
        width, device = self.width, values.device
        bits = torch.arange(_BITS, dtype=torch.int32, device=device)[:, None]
        place = torch.arange(width, device=device)
        total = torch.zeros(width, dtype=torch.float64, device=device)
        step = max(1, (_CPU_VALUES if device.type == "cpu" else _GPU_VALUES) // (_BITS * width))
        for word in range(0, len(signs), step):
            some = signs[word : word + step]
            part = values[word * _BITS * width : (word + step) * _BITS * width].float()
            part = F.pad(part, (0, some.numel() * _BITS - len(part))).view(-1, _BITS, width)
            flips = (some[:, None] << bits) & _SIGN
            signed = (part.view(torch.int32) ^ flips).view(torch.float32).view(-1, width)
            turn = turns[word * _BITS : word * _BITS + len(signed), None]
            total += signed.gather(1, (place - turn) % width).sum(0, dtype=torch.float64)
        return total


class SketchedRows:
    """The basis (theta_0, d_1, ..., d_T) as sketches, and a few directions of the path as they are.

    It stands in for `IncrementRows`: inner products are estimates, and T rows of D values become T rows of m. A
    direction with which a gradient can be compared needs D values; theta_0 and the leading principal directions are
    kept for that (`LeadingDirections`), and any other direction is given as the nearest that they span. These
    `directions` of each group lie on `device`, where the weights are for None; sketches are small and stay there.
    """

    def __init__(
        self,
        selection: ParameterSelection,
        width: int,
        device: torch.device | None = None,
        directions: int = 2,
        seed: int = 0,
    ) -> None:
        self.selection = selection
        self.sketch = Sketch(selection, width, seed)
        self.device = device
        self.leading = LeadingDirections(selection, directions)
        self.grams: Float[Tensor, "G n n"] = torch.zeros(len(selection.groups), 0, 0, dtype=torch.float64)
        self._rows = IncrementRows(self.sketch.selection, torch.float64)
        self._weights: Vector | None = None
        self._place: torch.device | None = None

    @property
    def stored(self) -> ParameterSelection:
        """What the rows are vectors of: the sketched values."""
        return self.sketch.selection

    def __len__(self) -> int:
        """Number of rows, theta_0 included."""
        return len(self._rows)

    def increment(self, weights: Vector) -> Vector:
        """Return the next sketched row for these weights: that of theta_0 at first, then that of the increment."""
        self._weights = weights if self.device is None else weights.to(self.device)
        sketched = self.sketch(weights)
        self._place = sketched.values.device if self._place is None else self._place
        return self._rows.increment(sketched.to(self._place))

    def dots(self, new: Vector) -> Float[Tensor, "G n"]:
        """Estimate what `IncrementRows.dots` gives; every rank must call it where the ranks share the weights."""
        return self._rows.dots(new)

    def push(self, row: Vector) -> None:
        """Add a row made by `increment`, or read back from disk; every rank must call it, as `dots`."""
        self._place = row.values.device if self._place is None else self._place
        products = self.dots(row).cpu()
        n = len(self)
        self.grams = F.pad(self.grams, (0, 1, 0, 1))
        self.grams[:, n], self.grams[:, :, n] = products, products
        self._rows.push(row)
        if self._weights is not None:
            self.leading.grow(self.grams, self._weights)
        self._weights = None

    def combine(self, coefficients: Float[Tensor, "G n"]) -> Vector:
        """Give the kept vector nearest to directions given by coefficients, one set per group, in float32.

        Raises:
            ValueError: There are more columns than rows.
        """
        if coefficients.shape[1] > len(self):
            raise ValueError(f"{coefficients.shape[1]} coefficients for {len(self)} rows")
        return self.leading.nearest(self.grams, coefficients)

    def combine_all(self, coefficients: Sequence[Float[Tensor, "G n"]]) -> Float[Tensor, "N D"]:
        """Give several vectors as `combine` does."""
        return torch.stack([self.combine(parts).values for parts in coefficients])

    def kept(self, coefficients: Float[Tensor, "G n"]) -> float:
        """Cosine of a direction of the whole selection with what `combine` gives for it, by the sketched Gram."""
        return self.leading.kept(self.grams, coefficients)

    def bytes(self, snapshots: int) -> int:
        """Memory at the end of a run: sketches in float64, signs and rotations, and the kept directions in float32."""
        sketches = 8 * snapshots * len(self.selection.groups) * self.sketch.width
        return sketches + self.sketch.table_bytes + 4 * (1 + self.leading.count) * self.selection.local_dim


def cosine_error(cosine: float, width: int) -> float:
    """Standard deviation of a cosine taken from sketches, (1 - c^2) / sqrt(m) to first order.

    It is 1/sqrt(m) for the increments of a walk, whose true cosines are 0; a cosine resolves from 0 only beyond that.
    """
    return (1.0 - cosine**2) / width**0.5


def share_error(ratios: Float[Tensor, " R"], width: int) -> float:
    """Standard deviation of PC1 from sketches, to first order in 1/sqrt(m).

    An eigenvalue moves by lambda_k (|S u_k|^2 - 1), independently for each k with a variance of 2/m, and so does the
    trace: dp_1 = p_1 (z_1 - sum_k p_k z_k). The bias is smaller by another 1/sqrt(m) where PC1 stands apart:
    (p_1 / m) sum_{k > 1} p_k / (p_1 - p_k), as a sketch mixes a little of every component into the first. The width m
    is that of a sketch of the whole, or R m where R equal groups or ranks have sketches of m.
    """
    first, rest = ratios[0], ratios[1:]
    return float(first * (2.0 / width * ((1.0 - first) ** 2 + rest.square().sum())).sqrt())
