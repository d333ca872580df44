"""Triton kernels over many rows in weight space that are tensors of their own: each value is read once.

A table holds the rows' addresses. Programs own a block of columns that lies in one group, and go through the rows. A
block's columns begin at a multiple of its width, so that loads are aligned wherever the group begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

_COLUMNS, _WARPS = 4096, 4
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


# The number of rows grows: kernels for numbers that 16 divides would be compiled in the middle of a run.
@triton.jit(do_not_specialize=["rows", "width"])
def _dot_rows(table, new, blocks, lows, highs, partial, dim, rows, width, KIND: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    program = tl.program_id(0).to(tl.int64)
    column = tl.load(blocks + program) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (column >= tl.load(lows + program)) & (column < tl.load(highs + program))
    against = tl.load(new + column, mask=inside, other=0.0).to(tl.float64)
    for row in range(rows):
        start = tl.multiple_of(tl.load(table + row).to(tl.pointer_type(KIND)), 16)
        # Whole blocks: a mask by group would split the loads into single values, and `against` is zero there.
        value = tl.load(start + column, mask=column < dim, other=0.0).to(tl.float64)
        tl.store(partial + program * width + row, tl.sum(value * against, 0))


@triton.jit(do_not_specialize=["rows", "G"])
def _add_rows(  # type: ignore[no-untyped-def]
    table, weights, out, blocks, lows, highs, groups, dim, rows, G,
    KIND: tl.constexpr, N: tl.constexpr, M: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.load(blocks + program) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (column >= tl.load(lows + program)) & (column < tl.load(highs + program))
    direction = tl.arange(0, M)
    own = weights + (direction * G + tl.load(groups + program)) * rows
    place = out + direction[:, None].to(tl.int64) * dim + column[None, :]
    present = (direction < N)[:, None] & inside[None, :]
    total = tl.load(place, mask=present, other=0.0)
    for row in range(rows):
        start = tl.multiple_of(tl.load(table + row).to(tl.pointer_type(KIND)), 16)
        value = tl.load(start + column, mask=column < dim, other=0.0).to(tl.float32)
        weight = tl.load(own + row, mask=direction < N, other=0.0)
        total += weight[:, None] * value[None, :]
    tl.store(place, total, mask=present)


def inner_products(
    rows: Sequence[Float[Tensor, " D"]], new: Float[Tensor, " D"], spans: Sequence[tuple[int, int]]
) -> Float[Tensor, "G n"]:
    """Inner products of a vector with rows that `takes` takes, per group, in float64; those of float32 are exact.

    Spans are first and last-plus-one column of each group.
    """
    blocks, lows, highs, _, edges = _blocks(tuple(spans), new.device, _COLUMNS)
    partial = torch.empty(len(blocks), len(rows), dtype=torch.float64, device=new.device)
    for first, last, dtype in _runs(rows):
        table = addresses(rows[first:last], new.device)
        _dot_rows[(len(blocks),)](
            table, new, blocks, lows, highs, partial[:, first:], len(new), last - first, len(rows),
            KIND=_TYPES[dtype], COLUMNS=_COLUMNS, num_warps=_WARPS,
        )  # fmt: skip
    counts = {hi - lo for lo, hi in pairwise(edges)}
    if len(counts) == 1:  # groups of one size, as the blocks of a transformer are
        return partial.view(len(spans), counts.pop(), len(rows)).sum(1)
    return torch.stack([partial[lo:hi].sum(0) for lo, hi in pairwise(edges)])


def combine(
    rows: Sequence[Float[Tensor, " D"]], weights: Float[Tensor, "N G n"], spans: Sequence[tuple[int, int]]
) -> Float[Tensor, "N D"]:
    """Sums of rows that `takes` takes, several in one pass, with a weight for each row and group, in float32.

    Spans as for `inner_products`; together they are all columns.
    """
    device, dim, count = rows[0].device, len(rows[0]), len(weights)
    out = torch.zeros(count, dim, dtype=torch.float32, device=device)
    blocks, lows, highs, groups, _ = _blocks(tuple(spans), device, _COLUMNS)
    moved = weights.float().to(device)
    for first, last, dtype in _runs(rows):
        _add_rows[(len(blocks),)](
            addresses(rows[first:last], device), moved[:, :, first:last].contiguous(), out, blocks, lows, highs, groups,
            dim, last - first, len(spans), KIND=_TYPES[dtype], N=count, M=triton.next_power_of_2(count),
            COLUMNS=_COLUMNS, num_warps=_WARPS,
        )  # fmt: skip
    return out


def takes(rows: Sequence[Tensor]) -> bool:
    """Whether the kernels can read these rows: contiguous, on one GPU, float32 or bfloat16, aligned."""
    return all(
        row.is_cuda
        and row.device == rows[0].device
        and row.dtype in _TYPES
        and row.is_contiguous()
        and row.data_ptr() % 16 == 0
        for row in rows
    )


def _runs(rows: Sequence[Tensor]) -> list[tuple[int, int, torch.dtype]]:
    """Neighbouring rows of one dtype: theta_0 is float32 where the increments are bfloat16."""
    edges = [k for k, row in enumerate(rows) if k == 0 or row.dtype != rows[k - 1].dtype]
    return [(lo, hi, rows[lo].dtype) for lo, hi in pairwise([*edges, len(rows)])]


def addresses(tensors: Sequence[Tensor], device: torch.device) -> Int[Tensor, " n"]:
    """Where tensors lie, in a table for kernels; they must be kept until the kernels have run."""
    return address_table(tuple(tensor.data_ptr() for tensor in tensors), device)


# Most tensors lie where they lay at the step before, and a table takes longer to send than to look up.
@lru_cache(maxsize=32)
def address_table(starts: tuple[int, ...], device: torch.device) -> Int[Tensor, " n"]:
    """Put addresses where kernels read them; not to be changed."""
    return to_device(torch.tensor(starts, dtype=torch.int64), device)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Move to where kernels read it, without waiting for the device."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


@lru_cache(maxsize=8)
def _blocks(
    spans: tuple[tuple[int, int], ...], device: torch.device, columns: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
    """Cut spans into blocks: number, first column, end and group of each, and where each group's blocks begin."""
    numbers = [torch.arange(lo // columns, -(-hi // columns) if hi > lo else lo // columns) for lo, hi in spans]
    counts = torch.tensor([len(part) for part in numbers])
    ends = torch.tensor(spans, dtype=torch.int64).repeat_interleave(counts, 0)
    groups = torch.arange(len(spans)).repeat_interleave(counts)
    tables = [to_device(part, device) for part in (torch.cat(numbers), ends[:, 0].clone(), ends[:, 1].clone(), groups)]
    return tables[0], tables[1], tables[2], tables[3], [0, *counts.cumsum(0).tolist()]
