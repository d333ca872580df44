"""Triton kernels that read AdamW's step off its state, in one pass over the weights, however many outputs.

A step of training leaves some microseconds for every pass over the weights, and for every kernel that is started. As
plain operations the account of a step is some forty passes in a thousand kernels; here it is one kernel for all weights
that were stepped alike. A table holds where they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from mini_gpt_pl.geometry.kernels.rows import address_table, to_device

_COLUMNS, _WARPS = 2048, 4


@triton.jit
def _place(table, owners, firsts, sizes, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Say which weight a program works on, which of its values, and which of those there are."""
    program = tl.program_id(0)
    weight = tl.load(owners + program)
    size = tl.load(sizes + weight)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    column = tl.multiple_of(tl.load(firsts + program), 16) + tl.arange(0, COLUMNS)
    return table + weight, column, column < size


@triton.jit
def _row(table, index, COUNT, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Read the address of one of a weight's tensors."""
    start = tl.load(table + index * COUNT).to(tl.pointer_type(tl.float32))
    return tl.multiple_of(start, 16) if ALIGNED else start


# Scalars that change from step to step would each be compiled for where they are 1.
@triton.jit(do_not_specialize=["count", "keep", "bias1", "step_size", "inverse_root", "eps", "shrink"])
def _account(  # type: ignore[no-untyped-def]
    table, owners, firsts, sizes, count, keep, bias1, step_size, inverse_root, eps, shrink,
    COLUMNS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    own, column, inside = _place(table, owners, firsts, sizes, COLUMNS, ALIGNED)
    raw = _row(own, 0, count, ALIGNED) + column
    by_gradient = _row(own, 5, count, ALIGNED) + column
    by_decay = _row(own, 6, count, ALIGNED) + column
    by_clipping = _row(own, 7, count, ALIGNED) + column
    old = tl.load(raw, mask=inside)
    average = old + (1.0 - keep) * (tl.load(_row(own, 1, count, ALIGNED) + column, mask=inside) - old)
    tl.store(raw, average, mask=inside)
    square = tl.load(_row(own, 3, count, ALIGNED) + column, mask=inside)
    scale = step_size / (tl.sqrt_rn(square) * inverse_root + eps)
    tl.store(by_gradient, tl.load(by_gradient, mask=inside) - average / bias1 * scale, mask=inside)
    rest = tl.load(_row(own, 2, count, ALIGNED) + column, mask=inside) - average
    tl.store(by_clipping, tl.load(by_clipping, mask=inside) - rest / bias1 * scale, mask=inside)
    weights = tl.load(_row(own, 4, count, ALIGNED) + column, mask=inside)
    tl.store(by_decay, tl.load(by_decay, mask=inside) - shrink * weights, mask=inside)


@triton.jit(do_not_specialize=["count"])
def _feed(  # type: ignore[no-untyped-def]
    table, owners, firsts, sizes, count, betas, MEMORIES: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr
):
    own, column, inside = _place(table, owners, firsts, sizes, COLUMNS, ALIGNED)
    gradient = tl.load(_row(own, 0, count, ALIGNED) + column, mask=inside)
    square = gradient * gradient
    for k in tl.static_range(MEMORIES):
        place = _row(own, 1 + k, count, ALIGNED) + column
        beta = tl.load(betas + k)
        tl.store(place, beta * tl.load(place, mask=inside) + (1.0 - beta) * square, mask=inside)


def account(
    weights: Sequence[Sequence[Tensor]],
    *,
    beta1: float,
    bias1: float,
    bias2: float,
    lr: float,
    eps: float,
    decay: float,
) -> None:
    """Add one step of AdamW to what gradient, decay and clipping have moved, all in place.

    Args:
        weights: For each weight eight tensors of its shape: the first moment of the unclipped gradients, which takes in
            this step's; this step's unclipped gradient; the optimizer's first and second moment after the step, before
            their bias corrections; the weight before the step; and what the gradient, decay and clipping moved so far.
        beta1: Of the first moment.
        bias1: 1 - beta1^t.
        bias2: 1 - beta2^t.
        lr: Learning rate.
        eps: Beside the root.
        decay: Decoupled weight decay.
    """
    layout, aligned = _layout(weights)
    _account[(len(layout[1]),)](
        *layout, len(weights), beta1, bias1, lr, bias2**-0.5, eps, lr * decay,
        COLUMNS=_COLUMNS, ALIGNED=aligned, num_warps=_WARPS,
    )  # fmt: skip


def feed(weights: Sequence[Sequence[Tensor]], betas: Float[Tensor, " K"]) -> None:
    """Take gradients' squares into K averages, each of another memory, in place.

    Each weight has its gradient, then its averages; `betas` is what each average keeps, on the same device.
    """
    layout, aligned = _layout(weights)
    _feed[(len(layout[1]),)](
        *layout, len(weights), betas, MEMORIES=len(betas), COLUMNS=_COLUMNS, ALIGNED=aligned, num_warps=_WARPS
    )


def takes(tensors: Sequence[Tensor]) -> bool:
    """Whether the kernels can read these: float32, contiguous, on one GPU, no shards."""
    first = tensors[0].device
    return all(
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.is_cuda
        and tensor.device == first
        and tensor.dtype == torch.float32
        and tensor.is_contiguous()
        for tensor in tensors
    )


def _layout(weights: Sequence[Sequence[Tensor]]) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], bool]:
    """Give the table, each program's weight and first value, the weights' sizes, and whether all begin at 16 bytes."""
    starts = [tensor.data_ptr() for column in zip(*weights, strict=True) for tensor in column]
    device, sizes = weights[0][0].device, tuple(first.numel() for first, *_ in weights)
    aligned = all(place % 16 == 0 for place in (*sizes, *starts))
    return (address_table(tuple(starts), device), *_programs(sizes, device)), aligned


@lru_cache(maxsize=16)
def _programs(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    counts = torch.tensor([triton.cdiv(size, _COLUMNS) for size in sizes])
    owners = torch.arange(len(sizes)).repeat_interleave(counts)
    firsts = torch.cat([_COLUMNS * torch.arange(int(count)) for count in counts])
    return to_device(owners, device), to_device(firsts, device), to_device(torch.tensor(sizes), device)
