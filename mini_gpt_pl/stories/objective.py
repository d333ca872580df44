"""The objective L = L_LM + lambda(t) L_probe: two means over disjoint sets of target positions.

Both means belong to the whole optimizer batch. A micro-batch contributes its sum divided by the counts of the
whole batch, so adding micro-batches gives exactly the large batch; a mean of per-micro-batch means would not,
because the number of probe positions differs between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mini_gpt_pl.errors import UserError

IGNORE = -100
"""The target id that counts in no mean (``ignore_index`` of the cross-entropy)."""


@dataclass(frozen=True)
class ProbeWeight:
    """The weight lambda(t) of the probe loss: ``first`` for t < ``switch_step``, ``second`` from there on.

    Args:
        first: Weight before the switch.
        second: Weight from the switch on.
        switch_step: The first optimizer step, counted from 1, that uses ``second``.

    Raises:
        UserError: A weight is negative.

    Example:
        >>> weight = ProbeWeight()
        >>> weight(3999), weight(4000)
        (2.0, 4.0)
    """

    first: float = 2.0
    second: float = 4.0
    switch_step: int = 4000

    def __post_init__(self) -> None:
        if self.first < 0 or self.second < 0:
            raise UserError(f"probe weight: first {self.first}, second {self.second}; give 0 or more")

    def __call__(self, step: int) -> float:
        """Give lambda(t) for the optimizer step t that is about to be taken; the first one is 1."""
        return self.first if step < self.switch_step else self.second


class LossTerms(NamedTuple):
    """Mean over the ordinary targets and over the probe's, in nats per position, or a micro-batch's shares of them."""

    lm: Float[Tensor, ""]
    probe: Float[Tensor, ""]


class TargetCounts(NamedTuple):
    """How many ordinary and probe targets each mean is taken over; counts of micro-batches add."""

    lm: Int[Tensor, ""]
    probe: Int[Tensor, ""]


def count_targets(targets: Int[Tensor, "B T"], probe_mask: Bool[Tensor, "B T"]) -> TargetCounts:
    """Count ordinary and probe targets; ignored ones (-100) are neither, whatever the mask says."""
    valid = targets != IGNORE
    return TargetCounts((valid & ~probe_mask).sum(), (valid & probe_mask).sum())


def loss_terms(
    nll: Float[Tensor, "B T"],
    targets: Int[Tensor, "B T"],
    probe_mask: Bool[Tensor, "B T"],
    counts: TargetCounts,
) -> LossTerms:
    """A micro-batch's share of the two means: (1/n) * sum of nll over its positions, n from the whole batch.

    A mean with count 0 is 0 and has gradient 0.

    Args:
        nll: Negative log-likelihood of each target.
        targets: Target ids, -100 where ignored.
        probe_mask: True at the probe's answer.
        counts: The n of all micro-batches of the optimizer step together.
    """
    valid = targets != IGNORE
    return LossTerms(_share(nll, valid & ~probe_mask, counts.lm), _share(nll, valid & probe_mask, counts.probe))


def composite(terms: LossTerms, weight: float) -> Float[Tensor, ""]:
    """Give L = L_LM + lambda L_probe."""
    return terms.lm + weight * terms.probe


def combine(terms: LossTerms, counts: TargetCounts, weight: float) -> Float[Tensor, ""]:
    """The training loss: ``composite``, or the plain cross-entropy when the probe has no weight.

    With lambda = 0 the probe's positions are targets like any other: the loss is the mean over both sets,
    (n_LM L_LM + n_probe L_probe) / (n_LM + n_probe). It is not the limit of small lambda, which would
    leave those positions out. Linear in ``terms``, which were divided by ``counts``.
    """
    if weight != 0:
        return composite(terms, weight)
    total = (counts.lm + counts.probe).clamp(min=1)
    return (counts.lm * terms.lm + counts.probe * terms.probe) / total


def _share(nll: Float[Tensor, "B T"], member: Bool[Tensor, "B T"], count: Int[Tensor, ""]) -> Float[Tensor, ""]:
    # The clamp stands in for `if count == 0`, which would make the host wait for the device.
    return torch.where(member, nll, 0.0).sum() / count.clamp(min=1)
