"""The basis vectors themselves, (theta_0, d_1, ..., d_T), in memory or on disk: what the Gram matrix is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from mini_gpt_pl.geometry.kernels import row_kernels as kernels
from mini_gpt_pl.geometry.path.snapshots import StoredRow
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector
from mini_gpt_pl.geometry.vectors.staging import Staging

# Columns converted to float64 at a time: two tiles stay in a core's second-level cache; a GPU wants few launches.
_TILE, _GPU_TILE = 1 << 16, 1 << 22
# Columns read at a time of rows that are not in memory: 2 MiB a row, twice.
_PART = 1 << 19

Place = Literal["model", "cpu", "disk"]
"""Where rows stay: on the model's device, in memory of the host, or in their files."""

Row: TypeAlias = Tensor | StoredRow
"""A vector of which parts can be had: a tensor, or what reads them from a snapshot's file."""


class IncrementRows:
    """The basis vectors (theta_0, d_1, ..., d_T), each of D values.

    Increments are taken against the weights as rebuilt from the rows, so that rounding (of bfloat16 rows above all) is
    fed back into the next increment and never adds up.

    Args:
        selection: Owner of the coordinates' order; where the ranks share the weights, each keeps rows of its own.
        dtype: Of the increments; that of the weights' vectors for None, in which theta_0 always stays.
        device: Where the rows are kept and multiplied; None for where the weights are.
    """

    def __init__(
        self,
        selection: ParameterSelection,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.selection = selection
        self.dtype = dtype
        self.device = device
        self.rows: list[Row] = []
        self._rebuilt: Float[Tensor, " D"] | None = None
        self._staging = Staging()

    def __len__(self) -> int:
        """Number of rows, theta_0 included."""
        return len(self.rows)

    def increment(self, weights: Vector) -> Vector:
        """Return the next row for these weights: theta_0 itself at first, then the rounded increment."""
        self.selection.accept(weights.selection)
        values = weights.values
        if self.device is not None:
            values = self._staging.fetch(values) if self.device.type == "cpu" else values.to(self.device)
        if self._rebuilt is None:
            return Vector(values.clone(), self.selection)
        increment = values - self._rebuilt
        return Vector(increment if self.dtype is None else increment.to(self.dtype), self.selection)

    def push(self, row: Vector, kept: Row | None = None) -> None:
        """Add a row made by `increment`, or read back from disk; `kept` is what to keep of it instead of its values."""
        self.selection.accept(row.selection)
        self.rows.append(row.values if kept is None else kept)
        self._rebuilt = row.values.clone() if self._rebuilt is None else self._rebuilt + row.values

    def dots(self, new: Vector) -> Float[Tensor, "G n"]:
        """Inner products of a new row with every row and with itself, per group, in float64.

        The result lies on the rows' device: moving it to the host is the snapshot's one synchronisation. Rows that are
        not in memory are read, and the caller waits for that. Where the ranks share the weights, it is over all
        coordinates: every rank must call it.
        """
        self.selection.accept(new.selection)
        rows = [*self.rows, new.values]
        tensors = _in_kernels_reach(rows)
        spans = self.selection.spans
        if tensors is not None:
            return self.selection.total(kernels.inner_products(tensors, new.values, spans))
        return self.selection.total(inner_products(rows, new.values, spans))

    def combine(self, coefficients: Float[Tensor, "G n"]) -> Vector:
        """Turn directions given by coefficients, one set per group, into one flat float32 vector.

        Coefficients of fewer columns than there are rows name the first rows.

        Raises:
            ValueError: There are more columns than rows.
        """
        return Vector(self.combine_all([coefficients])[0], self.selection)

    def combine_all(self, coefficients: Sequence[Float[Tensor, "G n"]]) -> Float[Tensor, "N D"]:
        """Make several directions in one pass over the rows; each as `combine` has it."""
        weights = torch.stack([row.double().cpu() for row in coefficients])
        count = weights.shape[-1]
        if count > len(self.rows):
            raise ValueError(f"{count} coefficients for {len(self.rows)} rows")
        tensors = _in_kernels_reach(self.rows[:count])
        if tensors is not None:
            return kernels.combine(tensors, weights, self.selection.spans)
        assert self._rebuilt is not None
        size, device = self.selection.local_dim, self._rebuilt.device
        sums = torch.zeros(len(coefficients), size, dtype=torch.float32, device=device)
        for row, of_row in zip(self.rows, weights.unbind(-1), strict=False):
            if bool(of_row.any()):  # a row that no direction holds is not read
                values = row[:size].to(device).float()
                for out, of_group in zip(sums, of_row.tolist(), strict=True):
                    for span, weight in zip(self.selection.slices, of_group, strict=True):
                        out[span].add_(values[span], alpha=weight)
        return sums


def inner_products(
    rows: Sequence[Row], new: Float[Tensor, " D"], spans: Sequence[tuple[int, int]]
) -> Float[Tensor, "G n"]:
    """Inner products of a vector with rows, per span of columns, in float64, in tiles that stay in the cache.

    Of rows that are no tensors one part is read while another is multiplied. A span is a group's first and
    last-plus-one column. The result lies on the vector's device.
    """
    in_memory = all(isinstance(row, Tensor) for row in rows)
    tile = _GPU_TILE if new.is_cuda and in_memory else min(_TILE * torch.get_num_threads(), _PART)
    total = torch.zeros(len(spans), len(rows), dtype=torch.float64, device=new.device)
    for group, lo, parts in _read_ahead(rows, spans, max(tile, _PART), in_memory):
        for at in range(0, len(parts[0]), tile):
            against = new[lo + at : lo + min(at + tile, len(parts[0]))].double()
            total[group] += torch.stack(
                [torch.dot(part[at : at + tile].to(new.device).double(), against) for part in parts]
            )
    return total


def _read_ahead(
    rows: Sequence[Row], spans: Sequence[tuple[int, int]], columns: int, in_memory: bool
) -> Iterator[tuple[int, int, list[Tensor]]]:
    """Cut rows into parts that lie in one span: its number, the part's first column, and each row's values."""
    cuts = [
        (group, lo, min(lo + columns, last))
        for group, (first, last) in enumerate(spans)
        for lo in range(first, last, columns)
    ]

    def read(lo: int, hi: int) -> list[Tensor]:
        return [row[lo:hi] for row in rows]

    if in_memory:
        yield from ((group, lo, read(lo, hi)) for group, lo, hi in cuts)
        return
    with ThreadPoolExecutor(1) as reader:
        coming = [reader.submit(read, lo, hi) for _, lo, hi in cuts[:1]]
        for number, (group, lo, _) in enumerate(cuts):
            coming += [reader.submit(read, first, last) for _, first, last in cuts[number + 1 : number + 2]]
            yield group, lo, coming.pop(0).result()


def _in_kernels_reach(rows: Sequence[Row]) -> list[Tensor] | None:
    """Return rows as tensors where the kernels can read them."""
    tensors = [row for row in rows if isinstance(row, Tensor)]
    return tensors if kernels is not None and len(tensors) == len(rows) and kernels.takes(tensors) else None


class Memory(NamedTuple):
    """Bytes that a recorder takes at its peak, on each rank that holds all of the weights.

    Where the model is, on the host (on a CPU both are one memory), and in snapshot files.
    """

    device: int
    host: int
    disk: int


def memory_of(
    keep_on: Place, snapshots: int, dim: int, itemsize: int = 4, writes: bool = True, max_pending: int = 2
) -> Memory:
    """Say what recording takes.

    Let R = 4 D + (snapshots - 1) D itemsize be the bytes of all rows: D weights, theta_0 among the snapshots, itemsize
    bytes a value of an increment. The rebuilt weights, copies of them while a snapshot is taken, and the two directions
    of the past that probes ask for are 20 D on the model's device, and a row on its way to the disk, where files are
    written, is at most 8 D on the host, as page-locked memory comes in powers of two; there `model` adds R to the
    device. With `cpu` the host has R and 24 D, the device a copy of the weights and the directions (12 D). With `disk`
    the device has the rows that may wait for the disk (`max_pending`) beside the 20 D, and the host one row more, and
    4 MiB for each snapshot while they are read.
    """
    rows = (4 + itemsize * (snapshots - 1)) * dim
    files = rows if writes else 0
    if keep_on == "cpu":
        return Memory(12 * dim, rows + 24 * dim, files)
    if keep_on == "disk":
        return Memory((20 + 4 * max_pending) * dim, 12 * dim + (snapshots << 22), files)
    return Memory(rows + 20 * dim, 8 * dim if writes else 0, files)
