"""Leave out the positions that no target needs: everything behind the last target of each sequence.

Stories are shorter than the context, and with causal attention what follows the last target changes nothing. Of the
256 positions of a TinyStories batch about a quarter are such padding. A packed batch holds the other positions as N
rows, one sequence after the other; the result is that of the whole batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mini_gpt_pl.stories.objective import IGNORE

_ROUND = 256
_HALF = (torch.bfloat16, torch.float16)


class Packing(NamedTuple):
    """The positions of a batch that are computed.

    Attributes:
        rows: Position b T + t of each row, ascending.
        offsets: Number of rows before each sequence, and of all of them, int32.
    """

    rows: Int[Tensor, " N"]
    offsets: Int[Tensor, " B1"]


def pack(targets: Int[Tensor, "B T"]) -> Packing:
    """Keep the positions up to each sequence's last target that is not ignored.

    Their number is rounded up, with positions that would have been left out, to a multiple of 256 if there are as many:
    kernels like it, and compilers see fewer different numbers.
    """
    count, length = targets.shape
    position = torch.arange(length, device=targets.device)
    needed = torch.where(targets != IGNORE, position + 1, 0).amax(-1)  # (B,)
    total = int(needed.sum())
    spare = min(-(-max(total, 1) // _ROUND) * _ROUND, count * length) - total
    room = length - needed
    lengths = needed + (spare - (room.cumsum(0) - room)).clamp_min(0).minimum(room)
    rows = (position < lengths[:, None]).flatten().nonzero().flatten()
    return Packing(rows, F.pad(lengths.cumsum(0), (1, 0)).int())


def take_rows(values: Float[Tensor, M * rest], rows: Int[Tensor, " N"]) -> Float[Tensor, N * rest]:
    """Take rows, each at most once."""
    chosen: Tensor = _TakeRows.apply(values, rows)
    return chosen


def spread_rows(values: Float[Tensor, N * rest], rows: Int[Tensor, " N"], total: int) -> Float[Tensor, M * rest]:
    """Put rows back in their places among `total`; the others are zero."""
    spread: Tensor = _SpreadRows.apply(values, rows, total)
    return spread


def packed_attention(qkv: Float[Tensor, "N 3 nh hs"], packing: Packing, length: int) -> Float[Tensor, "N nh hs"]:
    """Causal attention inside each sequence of at most T = `length` rows: softmax(q k^T / sqrt(hs) + causal mask) v."""
    if qkv.is_cuda and qkv.dtype in _HALF:
        # What `torch.nn.attention.varlen` wraps in two custom operators, whose Python takes the host 0.2 ms a call:
        # with 16 calls a step it would be the host that decides how fast a small model trains.
        q, k, v = qkv.unbind(1)
        ends = packing.offsets
        out = torch.ops.aten._flash_attention_forward(q, k, v, ends, ends, length, length, 0.0, True, False)
        attended: Tensor = out[0]
        return attended
    sequences = len(packing.offsets) - 1
    whole = spread_rows(qkv, packing.rows, sequences * length).view(sequences, length, *qkv.shape[1:])
    q, k, v = whole.permute(2, 0, 3, 1, 4).unbind(0)  # 3 x (B, nh, T, hs)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return take_rows(mixed.transpose(1, 2).flatten(0, 1), packing.rows)


# The derivatives of indexing add up, for rows that occur twice; on a GPU that takes atomics, whose order is chance.


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.total = len(values)
        return values.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return spread_rows(grad, ctx.saved_tensors[0], ctx.total), None


class _SpreadRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: Tensor, total: int) -> Tensor:
        ctx.save_for_backward(rows)
        return values.new_zeros(total, *values.shape[1:]).index_copy(0, rows, values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return take_rows(grad, ctx.saved_tensors[0]), None, None
