"""The Triton kernel of the fused head: one program a row, two passes over it, the second out of the cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

# The fastest on an H100 of 1,024 to 8,192 columns and 4 to 16 warps.
_COLUMNS, _WARPS = 2048, 4


@triton.jit
def _score_row(logits, targets, nll, hit, vocab, width, DIFFERENTIATE: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * width
    target = tl.load(targets + row)
    asked = target >= 0
    largest = float("-inf")  # running maximum, and sum of exponentials below it
    total = 0.0
    other = float("-inf")  # maximum over all tokens but the target
    for first in range(0, vocab, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        value = tl.load(start + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(largest, tl.max(value, 0))
        total = total * tl.exp(largest - higher) + tl.sum(tl.exp(value - higher), 0)
        largest = higher
        other = tl.maximum(other, tl.max(tl.where(column == target, float("-inf"), value), 0))
    own = tl.load(start + tl.where(asked, target, 0)).to(tl.float32)
    norm = largest + tl.log(total)
    tl.store(nll + row, tl.where(asked, norm - own, 0.0))
    tl.store(hit + row, asked & (own > other))
    if DIFFERENTIATE:
        for first in range(0, width, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            value = tl.load(start + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
            slope = tl.exp(value - norm) - tl.where(column == target, 1.0, 0.0)
            tl.store(start + column, tl.where(asked, slope, 0.0).to(logits.dtype.element_ty), mask=column < width)


def score_in_place(
    logits: Float[Tensor, "N Vp"], targets: Int[Tensor, " N"], vocab_size: int, differentiate: bool
) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
    """Score targets against logits and, if asked to, put softmax - one-hot in the logits' place.

    Args:
        logits: Contiguous, on a GPU.
        targets: -100 where nothing is asked: no loss, no hit, and a derivative of zero.
        vocab_size: Columns from here on are padding; they have no probability.
        differentiate: Whether to overwrite the logits.

    Returns:
        Losses in nats, and whether the target alone is the most likely token.
    """
    count, width = logits.shape
    nll = torch.empty(count, dtype=torch.float32, device=logits.device)
    hit = torch.empty(count, dtype=torch.bool, device=logits.device)
    if count:
        _score_row[(count,)](
            logits,
            targets,
            nll,
            hit,
            vocab_size,
            width,
            DIFFERENTIATE=differentiate,
            COLUMNS=_COLUMNS,
            num_warps=_WARPS,
        )
    return nll, hit
