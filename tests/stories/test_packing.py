"""Leaving out what no target needs changes nothing, and the fused head scores as plain operations do."""

from __future__ import annotations

import pytest
import torch
from conftest import normal
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mini_gpt_pl.stories.gpt import GPT, GPTSize
from mini_gpt_pl.stories.objective import IGNORE
from mini_gpt_pl.stories.packing import pack, spread_rows, take_rows
from mini_gpt_pl.stories.scoring import fused_score, score, score_logits

SIZE = GPTSize(n_layer=2, n_head=2, d_model=8, d_ff=16, context=160)
VOCAB = 11
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def plain_kernel(logits: Tensor, targets: Tensor, vocab_size: int, differentiate: bool) -> tuple[Tensor, Tensor]:
    """What a kernel computes, in plain operations."""
    scores = score_logits(logits, targets, vocab_size)
    if differentiate:
        own = torch.arange(logits.shape[-1], device=logits.device) == targets[:, None]
        logits[:, vocab_size:] = -torch.inf
        logits.copy_(torch.where((targets != IGNORE)[:, None], logits.softmax(-1) - own.to(logits.dtype), 0.0))
    return scores


def targets_of(lengths: list[int], context: int = SIZE.context) -> Tensor:
    """Targets whose last one in each sequence is at `length` - 1, with a hole in their middle."""
    targets = torch.full((len(lengths), context), IGNORE)
    for row, length in enumerate(lengths):
        targets[row, :length] = torch.arange(length) % VOCAB
        targets[row, : length // 2 : 3] = IGNORE
    return targets


@given(st.lists(st.integers(0, 96), min_size=1, max_size=9))
def test_packed_rows_are_prefixes_that_hold_every_target(lengths: list[int]) -> None:
    targets = targets_of(lengths, 96)
    rows, offsets = pack(targets)
    kept = torch.zeros(targets.numel(), dtype=torch.bool)
    kept[rows] = True
    kept = kept.view_as(targets)
    assert bool(kept[targets != IGNORE].all())
    assert bool((kept[:, :-1] | ~kept[:, 1:]).all())  # nothing behind a gap
    assert offsets.tolist() == [0, *kept.sum(1).cumsum(0).tolist()]
    assert len(rows) % 256 == 0 or len(rows) == targets.numel()
    needed = sum(lengths)
    assert len(rows) - needed < 256
    assert bool((rows.diff() > 0).all()) and offsets.dtype == torch.int32


@pytest.mark.parametrize("lengths", [[160, 160], [3, 90, 160, 0, 41], [1], [0, 0]])
def test_a_packed_batch_has_the_scores_and_gradients_of_the_whole(lengths: list[int]) -> None:
    torch.manual_seed(0)
    gpt = GPT(SIZE, VOCAB, vocab_multiple=4).double()
    targets = targets_of(lengths)
    tokens = torch.randint(VOCAB, targets.shape, generator=torch.Generator().manual_seed(1))
    weights = normal(*targets.shape, seed=2)
    found = []
    for packing in (None, pack(targets)):
        scores = gpt(tokens, targets, packing)
        gradient = torch.autograd.grad((scores.nll * weights).sum(), list(gpt.parameters()))
        found.append((scores, gradient))
    (whole, slopes), (packed, packed_slopes) = found
    torch.testing.assert_close(packed.nll, whole.nll, rtol=1e-12, atol=1e-12)
    assert torch.equal(packed.hit, whole.hit)
    for ours, theirs in zip(packed_slopes, slopes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_rows_come_back_with_their_gradients() -> None:
    values, rows = normal(7, 3).requires_grad_(), torch.tensor([1, 4, 6])
    weights = normal(3, 3, seed=1)
    (ours,) = torch.autograd.grad((take_rows(values, rows) * weights).sum(), values)
    (plain,) = torch.autograd.grad((values[rows] * weights).sum(), values)
    assert torch.equal(ours, plain)
    back = spread_rows(take_rows(values, rows), rows, 7)
    assert torch.equal(back[rows], values[rows]) and not back[[0, 2, 3, 5]].any()
    assert torch.autograd.gradcheck(lambda x: spread_rows(x, rows, 7), normal(3, 2).requires_grad_())


def problem(dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, table with one padded row, targets with ignored ones and a tie, upstream gradients."""
    features, table = normal(40, 6, seed=3), normal(12, 6, seed=4)
    table[5] = table[2]
    targets = torch.arange(40) % VOCAB
    targets[::7] = IGNORE
    made = (features.to(device, dtype), table.to(device, dtype), targets.to(device), normal(40, seed=5).to(device))
    return made[0].requires_grad_(), made[1].requires_grad_(), made[2], made[3]


def test_the_fused_head_scores_and_differentiates_as_plain_operations() -> None:
    features, table, targets, upstream = problem()
    plain = score_logits(features @ table.T, targets, VOCAB)
    fused = fused_score(features, table, targets, VOCAB, plain_kernel)
    torch.testing.assert_close(fused.nll, plain.nll)
    assert torch.equal(fused.hit, plain.hit)
    assert not fused.nll[targets == IGNORE].any() and not fused.hit[targets == IGNORE].any()
    for ours, theirs in zip(
        torch.autograd.grad((fused.nll * upstream).sum(), (features, table)),
        torch.autograd.grad((plain.nll * upstream).sum(), (features, table)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_without_gradients_the_fused_head_leaves_the_derivative_out() -> None:
    features, table, targets, _ = problem()
    asked: list[bool] = []

    def kernel(logits: Tensor, targets: Tensor, vocab_size: int, differentiate: bool) -> tuple[Tensor, Tensor]:
        asked.append(differentiate)
        return plain_kernel(logits, targets, vocab_size, differentiate)

    with torch.no_grad():
        fused_score(features, table, targets, VOCAB, kernel)
    fused_score(features, table, targets, VOCAB, kernel)
    assert asked == [False, True]


def test_on_a_cpu_the_head_can_be_differentiated_twice() -> None:
    features, table, targets, upstream = problem()
    (slope,) = torch.autograd.grad(
        (score(features, table, targets, VOCAB).nll * upstream).sum(), features, create_graph=True
    )
    (curved,) = torch.autograd.grad(slope.square().sum(), table)
    assert curved.abs().sum() > 0


@needs_gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_the_kernel_is_the_plain_one(dtype: torch.dtype, tolerance: float) -> None:
    from mini_gpt_pl.stories.scoring_kernel import score_in_place

    logits = (4 * normal(300, 5056, seed=6)).to("cuda", dtype)
    targets = torch.arange(300, device="cuda") * 16
    targets[::7] = IGNORE
    ours, theirs = logits.clone(), logits.clone()
    nll, hit = score_in_place(ours, targets, 5003, True)
    expected, hits = plain_kernel(theirs, targets, 5003, True)
    torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(hit, hits)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    untouched = logits.clone()
    score_in_place(untouched, targets, 5003, False)
    assert torch.equal(untouched, logits)


@needs_gpu
def test_a_packed_batch_on_a_gpu_has_the_scores_of_the_whole() -> None:
    torch.manual_seed(0)
    gpt = GPT(GPTSize(n_layer=2, n_head=2, d_model=64, d_ff=128, context=160), 500, vocab_multiple=64).cuda()
    targets = targets_of([3, 90, 160, 41]).cuda()
    tokens = torch.randint(500, targets.shape, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        whole, packed = gpt(tokens, targets), gpt(tokens, targets, pack(targets))
    torch.testing.assert_close(packed.nll, whole.nll, rtol=0, atol=3e-2)
    for ours, theirs in zip(
        torch.autograd.grad(packed.nll.sum(), list(gpt.parameters())),
        torch.autograd.grad(whole.nll.sum(), list(gpt.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.03 * float(theirs.abs().max()))
