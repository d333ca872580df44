"""A batch, and how it comes from the process that builds it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mini_gpt_pl.data.probe import Example
from mini_gpt_pl.objective import count_targets
from mini_gpt_pl.packing import Packing, pack


class Batch(NamedTuple):
    """One micro-batch.

    Attributes:
        tokens: Input ids, int64.
        targets: Ids to predict, -100 where nothing is asked.
        probe_mask: True at the probe's answers.
        lm_count: Ordinary targets of this process's whole optimizer batch: all micro-batches of the accumulation
            window, not only this one. Of an evaluation batch, its own.
        probe_count: The probe's targets, likewise.
        rows: The positions that have to be computed, as in `Packing`.
        offsets: Where each sequence begins among them.
    """

    tokens: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]
    probe_mask: Bool[Tensor, "B T"]
    lm_count: Int[Tensor, ""]
    probe_count: Int[Tensor, ""]
    rows: Int[Tensor, " N"]
    offsets: Int[Tensor, " B1"]

    @classmethod
    def of(cls, tokens: Int[Tensor, "B T"], targets: Int[Tensor, "B T"], probe_mask: Bool[Tensor, "B T"]) -> Batch:
        """Count and pack the targets of a batch that is an optimizer batch of its own."""
        return cls(tokens, targets, probe_mask, *count_targets(targets, probe_mask), *pack(targets))

    def take_samples(self, index: Int[Tensor, " n"]) -> Batch:
        """The batch of some of its sequences, counted and packed anew."""
        index = index.to(self.tokens.device)
        return Batch.of(self.tokens[index], self.targets[index], self.probe_mask[index])

    @property
    def packing(self) -> Packing:
        """The positions that have to be computed."""
        return Packing(self.rows, self.offsets)


def collate(examples: list[Example]) -> Batch:
    """Stack examples; the counts are those of this batch."""
    tokens, targets, mask = (torch.from_numpy(np.stack(column)) for column in zip(*examples, strict=True))
    return Batch.of(tokens, targets, mask)


class Piped:
    """A batch that a worker sends through its pipe, and that arrives as a ``Batch``.

    Tensors would go by shared memory, each of the seven as a file to be handed over, opened and mapped: for half a
    megabyte that takes longer than to copy it.

    Args:
        batch: On the CPU.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __reduce__(self) -> tuple[object, ...]:
        return _arrived, tuple(_narrow(column).numpy() for column in self.batch)


def _narrow(column: Tensor) -> Tensor:
    # Ids, counts and positions are all below 2^31; half of the bytes are half of the time in the pipe.
    return column.int() if column.dtype == torch.int64 else column


def _arrived(*columns: np.ndarray) -> Batch:
    batch = Batch(*map(torch.from_numpy, columns))
    long = {name: getattr(batch, name).long() for name in ("tokens", "targets", "lm_count", "probe_count", "rows")}
    return batch._replace(**long)
