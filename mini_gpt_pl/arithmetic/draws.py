"""Which examples a step sees: a pure function of (seed, step), made a block of steps at a time, on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mini_gpt_pl.errors import UserError

BLOCK = 64
"""Steps whose batches are made at once: one copy to the device serves them all."""


class Purpose(IntEnum):
    """Independent families of random numbers under one seed."""

    SPLIT = 0
    TRAIN = 1
    EVALUATION = 2


def generator(seed: int, purpose: int, index: int) -> np.random.Generator:
    """A generator at its beginning, a pure function of its arguments (Philox, a keyed permutation of a counter).

    The seed is taken modulo 2^64; the purpose and the index, a step or a block, count from 0.
    """
    key = np.array([seed % 2**64, purpose], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, index, 0, 0], dtype=np.uint64)))


def with_replacement(size: int, count: int, seed: int, purpose: int, block: int) -> Int[Tensor, "BLOCK count"]:
    """Positions among `size` examples of `BLOCK` batches of `count`, drawn uniformly and with replacement.

    The batches are those of the steps from `block * BLOCK` on.
    """
    return torch.from_numpy(generator(seed, purpose, block).integers(0, size, (BLOCK, count)))


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy to the device, without making the host wait for what the device still has to do."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


class BatchStream:
    """Batches without end; its state is the number of batches handed out.

    Args:
        block: Makes the batches of `BLOCK` steps, stacked along a new first dimension, on the device.
        what: What is drawn from, kept with the position: a resumed run must have the same.
    """

    def __init__(self, block: Callable[[int], tuple[Tensor, ...]], what: Mapping[str, int | str]) -> None:
        self._make = block
        self._what = what
        self._next = 0
        self._held: tuple[int, tuple[Tensor, ...]] | None = None

    def __len__(self) -> int:
        """Practically without end. With a length Lightning reads no batch ahead, so that the position is exact."""
        return 2**53  # the largest count that is exact as a float, which Lightning makes of it

    def __iter__(self) -> Iterator[Any]:
        while True:
            self._next += 1
            yield self.batch(self._next - 1)

    def batch(self, step: int) -> Any:
        """The batch of a step, from 0."""
        block, row = divmod(step, BLOCK)
        if self._held is None or self._held[0] != block:
            self._held = (block, self._make(block))
        stacked = self._held[1]
        return type(stacked)(*(part[row] for part in stacked))  # views

    def state_dict(self) -> dict[str, int | str]:
        """The position, and what it is a position in."""
        return {"batches": self._next, **self._what}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position.

        Raises:
            UserError: It is one in other data.
        """
        for name, here in self._what.items():
            if state.get(name) != here:
                raise UserError(
                    f"the checkpoint's training data has {name}={state.get(name)} and this one {here}: resume with the "
                    "same data and seed"
                )
        self._next = state["batches"]
