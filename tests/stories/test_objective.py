"""The objective: means of the whole batch, whatever the micro-batches; the switch of lambda."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.stories.gpt import GPT, GPTSize
from mini_gpt_pl.stories.objective import (
    IGNORE,
    LossTerms,
    ProbeWeight,
    TargetCounts,
    combine,
    composite,
    count_targets,
    loss_terms,
)

B, T, V = 6, 8, 11


def make_batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets with ignored ones, and a mask that is uneven over rows and covers an ignored target."""
    g = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(V, (B, T), generator=g), torch.randint(V, (B, T), generator=g)
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[0, 2:6] = mask[1, 3] = mask[4, 6:] = True
    targets[2, 5:] = targets[4, 7] = IGNORE
    return tokens, targets, mask


def brute_force(nll: Tensor, targets: Tensor, mask: Tensor, weight: float) -> Tensor:
    """The loss of the whole batch, position by position."""
    lm: list[Tensor] = []
    probe: list[Tensor] = []
    for b in range(targets.shape[0]):
        for t in range(targets.shape[1]):
            if targets[b, t] != -100:
                (probe if mask[b, t] else lm).append(nll[b, t])
    if weight == 0:
        return torch.stack(lm + probe).mean()
    loss = torch.stack(lm).mean()
    return loss + weight * torch.stack(probe).mean() if probe else loss


def add_counts(parts: Sequence[TargetCounts]) -> TargetCounts:
    return TargetCounts(torch.stack([p.lm for p in parts]).sum(), torch.stack([p.probe for p in parts]).sum())


def test_counts() -> None:
    _, targets, mask = make_batch()
    counts = count_targets(targets, mask)
    assert (int(counts.lm), int(counts.probe)) == (B * T - 4 - 6, 6)
    assert counts.lm.ndim == 0 and not counts.lm.is_floating_point()


@pytest.mark.parametrize("weight", [0.0, 2.0, 4.0])
@pytest.mark.parametrize("split", [[6], [3, 3], [1, 2, 3], [1] * 6])
def test_micro_batches_add_up_to_the_whole_batch(weight: float, split: list[int]) -> None:
    torch.manual_seed(0)
    gpt = GPT(GPTSize(1, 2, 8, 16, T), V).double()
    tokens, targets, mask = make_batch()
    whole = brute_force(gpt(tokens, targets).nll, targets, mask, weight)
    expected = torch.autograd.grad(whole, list(gpt.parameters()))

    micro = list(zip(tokens.split(split), targets.split(split), mask.split(split), strict=True))
    counts = add_counts([count_targets(y, m) for _, y, m in micro])
    total = 0.0
    for x, y, m in micro:
        loss = combine(loss_terms(gpt(x, y).nll, y, m, counts), counts, weight)
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole.item(), abs=1e-12)
    for p, g in zip(gpt.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=1e-12)


def test_mean_of_micro_batch_means_would_differ() -> None:
    """The reason for counting first: the shortcut is a different number on this very batch."""
    _, targets, mask = make_batch()
    nll = torch.rand(B, T, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    halves = zip(nll.split(3), targets.split(3), mask.split(3), strict=True)
    shortcut = sum(brute_force(n, y, m, 2.0).item() for n, y, m in halves) / 2
    assert abs(shortcut - brute_force(nll, targets, mask, 2.0).item()) > 1e-3


@pytest.mark.parametrize("weight", [0.0, 2.0])
@pytest.mark.parametrize("case", ["no probe", "all probe", "all ignored"])
def test_empty_sets_give_zero_and_no_nan(case: str, weight: float) -> None:
    _, targets, mask = make_batch()
    mask = torch.full_like(mask, case == "all probe")
    if case == "all ignored":
        targets = torch.full_like(targets, IGNORE)
    nll = torch.rand(B, T, dtype=torch.float64).requires_grad_()
    counts = count_targets(targets, mask)
    terms = loss_terms(nll, targets, mask, counts)
    (lm_grad,) = torch.autograd.grad(terms.lm, nll, retain_graph=True)
    (probe_grad,) = torch.autograd.grad(terms.probe, nll, retain_graph=True)
    (grad,) = torch.autograd.grad(combine(terms, counts, weight), nll)
    assert grad.isfinite().all()
    if case != "all probe":
        assert terms.probe == 0 and not probe_grad.any()
    if case != "no probe":
        assert terms.lm == 0 and not lm_grad.any()
    valid = (targets != IGNORE).double()
    scale = weight if case == "all probe" and weight else 1.0
    torch.testing.assert_close(grad, scale * valid / max(1.0, valid.sum().item()), rtol=1e-12, atol=0)


def test_ignored_positions_never_count_even_when_masked() -> None:
    _, targets, mask = make_batch()
    nll = torch.rand(B, T, dtype=torch.float64).requires_grad_()
    counts = count_targets(targets, mask)
    (grad,) = torch.autograd.grad(composite(loss_terms(nll, targets, mask, counts), 3.0), nll)
    assert torch.equal(grad == 0, targets == IGNORE)


@settings(max_examples=50, deadline=None)
@given(lm=st.integers(0, 50), probe=st.integers(0, 50), weight=st.floats(0, 8), nll=st.tuples(*[st.floats(0, 20)] * 2))
def test_combine_closed_form(lm: int, probe: int, weight: float, nll: tuple[float, float]) -> None:
    counts = TargetCounts(torch.tensor(lm), torch.tensor(probe))
    means = [value if n else 0.0 for value, n in zip(nll, (lm, probe), strict=True)]
    terms = LossTerms(*(torch.tensor(value, dtype=torch.float64) for value in means))
    pooled = (lm * means[0] + probe * means[1]) / max(1, lm + probe)
    expected = pooled if weight == 0 else means[0] + weight * means[1]
    assert combine(terms, counts, weight).item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(("step", "expected"), [(1, 2.0), (3999, 2.0), (4000, 4.0), (4001, 4.0), (10**6, 4.0)])
def test_probe_weight_switches_at_4000_inclusive(step: int, expected: float) -> None:
    assert ProbeWeight()(step) == expected


def test_probe_weight_takes_its_arguments() -> None:
    weight = ProbeWeight(first=0.0, second=1.5, switch_step=3)
    assert [weight(t) for t in (1, 2, 3, 4)] == [0.0, 0.0, 1.5, 1.5]


@pytest.mark.parametrize("weights", [(-1.0, 4.0), (2.0, -0.1)])
def test_negative_probe_weight_is_a_user_error(weights: tuple[float, float]) -> None:
    with pytest.raises(UserError, match="probe weight"):
        ProbeWeight(*weights)
