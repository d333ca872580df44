"""How well logits predict their targets: cross entropy and exact hits, on a GPU in one pass over the logits.

The vocabulary makes the head the dearest part of a small model: 128 sequences of 256 tokens have 3.3 GB of bfloat16
logits, and every pass over them counts. The fused head writes them once, and one kernel turns them into losses, hits
and, in their own place, the derivative of each loss by its logits, softmax - one-hot. The upstream gradient of a loss
scales a row, so it can wait until the matrix products of the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from mini_gpt_pl.stories.objective import IGNORE

try:
    from mini_gpt_pl.stories.scoring_kernel import score_in_place
except ImportError:  # builds of torch for CPUs have no Triton
    score_in_place = None  # type: ignore[assignment]


class Scores(NamedTuple):
    """What the model says about each target, position by position.

    Attributes:
        nll: Negative log-likelihood in nats, at least float32; 0 where the target is ignored (-100).
        hit: Whether the target alone is the most likely token; False where it is ignored. A tie is no hit: bfloat16
            logits have many, and which of two equal ones comes first says nothing.
    """

    nll: Float[Tensor, "*positions"]
    hit: Bool[Tensor, "*positions"]


# Overwrites logits (N, Vp) with softmax - one-hot, if that is wanted, and returns losses and hits.
Kernel = Callable[[Tensor, Tensor, int, bool], tuple[Tensor, Tensor]]


def score(
    features: Float[Tensor, "N d"], table: Float[Tensor, "Vp d"], targets: Int[Tensor, " N"], vocab_size: int
) -> Scores:
    """Score targets against the logits features @ table^T.

    On a GPU with Triton in the fused way, whose derivative has no derivative of its own; else, and in float64,
    which the kernel does not know, as plain operations.

    Args:
        features: What the head sees.
        table: One row a token.
        targets: Token ids, -100 where nothing is asked.
        vocab_size: Number of rows of the table that are tokens; the others only pad it.
    """
    if not features.is_cuda or score_in_place is None or features.dtype == torch.float64:
        return score_logits(F.linear(features, table), targets, vocab_size)
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        features, table = features.to(dtype), table.to(dtype)
    return fused_score(features, table, targets, vocab_size, score_in_place)


def score_logits(logits: Float[Tensor, "N Vp"], targets: Int[Tensor, " N"], vocab_size: int) -> Scores:
    """Score targets against logits by plain operations, which can be differentiated any number of times."""
    # bfloat16 has 8 bits: a log-sum-exp over the vocabulary needs float32. float64 stays (reference runs).
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ids = torch.arange(logits.shape[-1], device=logits.device)
    if vocab_size < logits.shape[-1]:
        # Masked, not cut: a slice of padded rows costs the backward a copy of all logits.
        logits = torch.where(ids < vocab_size, logits, -torch.inf)
    nll = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE)
    with torch.no_grad():  # two maxima fuse with the softmax; an argmax would take a pass of its own
        chosen = ids == targets[:, None]
        own = torch.where(chosen, logits, -torch.inf).amax(-1)
        others = torch.where(chosen, -torch.inf, logits).amax(-1)
    return Scores(nll, own > others)


@torch.compiler.disable
def fused_score(
    features: Float[Tensor, "N d"],
    table: Float[Tensor, "Vp d"],
    targets: Int[Tensor, " N"],
    vocab_size: int,
    kernel: Kernel,
) -> Scores:
    """Score targets with a kernel that works in the logits' place."""
    differentiate = torch.is_grad_enabled() and (features.requires_grad or table.requires_grad)
    return Scores(*_FusedScore.apply(features, table, targets, vocab_size, kernel, differentiate))


class _FusedScore(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        table: Tensor,
        targets: Tensor,
        vocab_size: int,
        kernel: Kernel,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor]:
        logits = features @ table.T
        nll, hit = kernel(logits, targets, vocab_size, differentiate)
        if differentiate:
            ctx.save_for_backward(features, table, logits)  # by now the derivative of nll by the logits
        ctx.mark_non_differentiable(hit)
        return nll, hit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        features, table, slope = ctx.saved_tensors
        grad = grad[:, None].to(features.dtype)
        return (slope @ table) * grad, slope.T @ (features * grad), None, None, None, None
