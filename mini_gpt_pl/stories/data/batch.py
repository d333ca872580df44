"""A batch, and how it comes from the process that builds it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mini_gpt_pl.stories.data.probe import Example
from mini_gpt_pl.stories.objective import count_targets
from mini_gpt_pl.stories.packing import Packing, pack


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
    """A batch that a worker sends through its pipe as two arrays, and that arrives as an ``Arrived``.

    Tensors would go by shared memory, each of the seven as a file to be handed over, opened and mapped: for half a
    megabyte that takes longer than to copy it.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __reduce__(self) -> tuple[object, ...]:
        long = [getattr(self.batch, name) for name in _LONG]
        # Ids, counts and positions are all below 2^31; half of the bytes are half of the time in the pipe.
        ids = torch.cat([column.reshape(-1) for column in long]).int()
        rest = torch.cat([self.batch.offsets.view(torch.uint8), self.batch.probe_mask.view(torch.uint8).reshape(-1)])
        return Arrived, (ids.numpy(), rest.numpy(), tuple(self.batch.tokens.shape))


_LONG = ("lm_count", "probe_count", "tokens", "targets", "rows")


class Arrived:
    """What came through the pipe: a batch as soon as it is known where it is to lie.

    A thread of the process that trains receives batches, and takes the interpreter from it as long as it computes: two
    blocks are pinned sooner than seven tensors.

    ``ids`` are the int64 columns one behind the other, as int32, ``rest`` the bytes of the offsets and of the mask.
    """

    def __init__(self, ids: np.ndarray, rest: np.ndarray, shape: tuple[int, int]) -> None:
        self.ids, self.rest, self.shape = torch.from_numpy(ids), torch.from_numpy(rest), shape

    def pin_memory(self) -> Batch:
        """Copy to page-locked memory, from where a copy to the device makes nobody wait."""
        return self.batch(pinned=True)

    def batch(self, *, pinned: bool = False) -> Batch:
        """Copy to memory of its own; the tensors are views of two blocks."""
        ids = torch.empty(self.ids.shape, dtype=torch.int64, pin_memory=pinned).copy_(self.ids)
        rest = torch.empty(self.rest.shape, dtype=torch.uint8, pin_memory=pinned).copy_(self.rest)
        size = self.shape[0] * self.shape[1]
        lm_count, probe_count, tokens, targets, rows = ids.split([1, 1, size, size, len(ids) - 2 - 2 * size])
        offsets, mask = rest.split([len(rest) - size, size])
        columns = (tokens.view(self.shape), targets.view(self.shape), mask.view(torch.bool).view(self.shape))
        return Batch(*columns, lm_count.view(()), probe_count.view(()), rows, offsets.view(torch.int32))
