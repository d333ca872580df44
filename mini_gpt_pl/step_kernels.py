"""Triton kernels that read AdamW's step off its state: each value of a weight is met once, whatever is made of it.

A step of training leaves some microseconds for every pass over the weights, and for every kernel that is started. As
plain operations the account of a step is some forty passes; here it is a kernel for a weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

_COLUMNS, _WARPS = 2048, 4


# Scalars that change from step to step would each be compiled for where they are 1.
@triton.jit(do_not_specialize=["keep", "size", "bias1", "step_size", "inverse_root", "eps", "shrink"])
def _account(  # type: ignore[no-untyped-def]
    raw, gradient, momentum, square, weights, by_gradient, by_decay, by_clipping,
    size, keep, bias1, step_size, inverse_root, eps, shrink, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < size
    old = tl.load(raw + column, mask=inside)
    average = old + (1.0 - keep) * (tl.load(gradient + column, mask=inside) - old)
    tl.store(raw + column, average, mask=inside)
    scale = step_size / (tl.sqrt(tl.load(square + column, mask=inside)) * inverse_root + eps)
    moved = tl.load(by_gradient + column, mask=inside) - average / bias1 * scale
    tl.store(by_gradient + column, moved, mask=inside)
    rest = tl.load(momentum + column, mask=inside) - average
    moved = tl.load(by_clipping + column, mask=inside) - rest / bias1 * scale
    tl.store(by_clipping + column, moved, mask=inside)
    moved = tl.load(by_decay + column, mask=inside) - shrink * tl.load(weights + column, mask=inside)
    tl.store(by_decay + column, moved, mask=inside)


@triton.jit(do_not_specialize=["size", "stride"])
def _feed(values, gradient, betas, size, stride, COUNT: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < size
    found = tl.load(gradient + column, mask=inside)
    square = found * found
    for k in tl.static_range(COUNT):
        place = values + k * stride + column
        beta = tl.load(betas + k)
        tl.store(place, beta * tl.load(place, mask=inside) + (1.0 - beta) * square, mask=inside)


def account(
    raw: Float[Tensor, "*shape"],
    gradient: Float[Tensor, "*shape"],
    momentum: Float[Tensor, "*shape"],
    square: Float[Tensor, "*shape"],
    weights: Float[Tensor, "*shape"],
    moved: Sequence[Float[Tensor, "*shape"]],
    *,
    beta1: float,
    bias1: float,
    bias2: float,
    lr: float,
    eps: float,
    decay: float,
) -> None:
    """Add one step of AdamW on one weight to what gradient, decay and clipping have moved; all in place.

    Args:
        raw: First moment of the unclipped gradients; it takes in this step's.
        gradient: This step's unclipped gradient.
        momentum: The optimizer's first moment after the step, before its bias correction.
        square: Its second moment, likewise.
        weights: Before the step.
        moved: By the gradient, by decay and by clipping, so far.
        beta1: Of the first moment.
        bias1: 1 - beta1^t.
        bias2: 1 - beta2^t.
        lr: Learning rate.
        eps: Beside the root.
        decay: Decoupled weight decay.
    """
    grid = (triton.cdiv(raw.numel(), _COLUMNS),)
    _account[grid](
        raw, gradient, momentum, square, weights, *moved,
        raw.numel(), beta1, bias1, lr, bias2**-0.5, eps, lr * decay, COLUMNS=_COLUMNS, num_warps=_WARPS,
    )  # fmt: skip


def feed(values: Float[Tensor, "K n"], gradient: Float[Tensor, "*shape"], betas: Float[Tensor, " K"]) -> None:
    """Take a gradient's squares into K averages, each of another memory, in place.

    Args:
        values: The averages; rows may lie apart, a row is contiguous.
        gradient: Of n values.
        betas: What each average keeps, on the same device.
    """
    grid = (triton.cdiv(gradient.numel(), _COLUMNS),)
    _feed[grid](
        values, gradient, betas, gradient.numel(), values.stride(0),
        COUNT=len(betas), COLUMNS=_COLUMNS, num_warps=_WARPS,
    )  # fmt: skip


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
