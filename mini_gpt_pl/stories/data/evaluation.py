"""Evaluation sets: examples that are fixed, and so are the batches cut from them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from mini_gpt_pl.stories.data.batch import Batch
from mini_gpt_pl.stories.data.probe import Example


class FixedExamples(Dataset[Batch]):
    """Examples in memory; a list of indices gives a ``Batch``.

    Every evaluation asks for the same lists, so that a batch is cut and packed the first time and kept: with a GPU in
    pinned memory, from which the device fetches it while it still computes the one before.

    Args:
        examples: At least one.
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        self.columns = tuple(torch.from_numpy(np.stack(column)) for column in zip(*examples, strict=True))
        self._batches: dict[tuple[int, ...], Batch] = {}

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Batch:
        wanted = tuple(indices)
        if wanted not in self._batches:
            self._batches[wanted] = self._cut(indices)
        return self._batches[wanted]

    def _cut(self, indices: list[int]) -> Batch:
        tokens, targets, mask = (column[indices] for column in self.columns)
        batch = Batch.of(tokens, targets, mask)
        return Batch(*(column.pin_memory() for column in batch)) if torch.cuda.is_available() else batch

    def sha256(self) -> str:
        """Of the examples' bytes: tokens, targets, mask."""
        digest = hashlib.sha256()
        for column in self.columns:
            digest.update(column.numpy().tobytes())
        return digest.hexdigest()
