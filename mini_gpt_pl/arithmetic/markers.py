"""Marker sums: add up the values that stand behind a few marker tokens, among noise (arXiv 2602.10496)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int

from mini_gpt_pl.errors import UserError


@dataclass(frozen=True)
class MarkerTask:
    """Sequences of noise with m markers, each followed by its value; the class is the sum of the values modulo C.

    Marker i, from 0, is the token `first_marker + i`, and the markers stand in the order of their numbers. Their
    positions are from 1 to T - 2 and at least two apart, every such set equally likely, so that each value follows its
    marker and is overwritten by no other. A value is a token from 0 to C - 1. All other tokens are independent and
    uniform over the vocabulary without the values and without the m markers in use.

    Args:
        length: T, tokens in a sequence.
        vocab_size: Tokens that there are.
        classes: C, number of values and of classes.
        markers: The numbers m that occur.
        first_marker: Token of marker 0.
        schedule: `mixed` draws m anew for every batch; `curriculum` goes through `markers`, and stays with the last.
        steps_each: Steps of the curriculum for each m.
        per_example: Draw positions and m (of a mixed schedule) for each example. The original draws them once for a
            batch, so that two batches differ in the task and not only in the examples.

    Raises:
        UserError: The numbers do not fit one another.
    """

    length: int = 16
    vocab_size: int = 256
    classes: int = 8
    markers: Sequence[int] = (1, 2, 3, 4)
    first_marker: int = 100
    schedule: Literal["mixed", "curriculum"] = "mixed"
    steps_each: int = 5000
    per_example: bool = False

    def __post_init__(self) -> None:
        if not self.markers or min(self.markers) < 1:
            raise UserError(f"--data.task.markers={list(self.markers)}: give numbers of 1 or more")
        if min(self.classes - 1, self.steps_each) < 1:
            raise UserError(
                f"--data.task: classes {self.classes}, steps_each {self.steps_each}: give 2 or more, and 1 or more"
            )
        most = max(self.markers)
        if self.length < 2 * most + 1:
            raise UserError(f"--data.task.length={self.length}: {most} markers need {2 * most + 1} tokens or more")
        if not self.classes <= self.first_marker <= self.vocab_size - most:
            raise UserError(
                f"--data.task.first_marker={self.first_marker}: give {self.classes} to {self.vocab_size - most}, "
                "behind the values and inside the vocabulary"
            )
        if self.vocab_size <= self.classes + most:
            raise UserError(f"--data.task.vocab_size={self.vocab_size}: no token is left for noise; give more")

    def markers_at(self, step: int, rng: np.random.Generator, examples: int) -> Int[np.ndarray, " B"]:
        """How many markers each example of a step's batch has."""
        if self.schedule == "curriculum":
            return np.full(examples, self.markers[min(step // self.steps_each, len(self.markers) - 1)])
        drawn = rng.choice(np.asarray(self.markers), examples if self.per_example else 1)
        return np.broadcast_to(drawn, examples)

    def batch(
        self, examples: int, step: int, rng: np.random.Generator
    ) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
        """Tokens and classes of one batch, drawn with a generator of its own; the step is for the curriculum."""
        number = self.markers_at(step, rng, examples)
        if self.per_example:
            return self._join([self._example(int(m), rng) for m in number])
        return self.with_layout(examples, self._layout(int(number[0]), rng), rng)

    def per_number(self, examples: int, m: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Examples of one number of markers, each with positions of its own."""
        return self._join([self._example(m, rng) for _ in range(examples)])

    def _example(self, m: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return self.with_layout(1, self._layout(m, rng), rng)

    @staticmethod
    def _join(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        tokens, labels = zip(*parts, strict=True)
        return np.concatenate(tokens), np.concatenate(labels)

    def _layout(self, m: int, rng: np.random.Generator) -> Int[np.ndarray, " m"]:
        """Positions of m markers: m of T - 2 - (m - 1) places, then one free place put behind each."""
        return np.sort(rng.choice(self.length - 1 - m, m, replace=False)) + np.arange(1, m + 1)

    def with_layout(
        self, examples: int, positions: Int[np.ndarray, " m"], rng: np.random.Generator
    ) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
        """Tokens and classes of examples whose markers all stand at the same positions, ascending."""
        m = len(positions)
        noise = np.delete(np.arange(self.vocab_size), [*range(self.classes), *self.first_marker + np.arange(m)])
        tokens = rng.choice(noise, (examples, self.length))
        values = rng.integers(0, self.classes, (examples, m))
        tokens[:, positions] = self.first_marker + np.arange(m)
        tokens[:, positions + 1] = values
        return tokens, values.sum(1) % self.classes
