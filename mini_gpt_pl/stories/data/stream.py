"""The training stream: every epoch a permutation of the stories, every sample a function of (seed, epoch, story)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.stories.data.batch import Arrived, Batch, Piped
from mini_gpt_pl.stories.data.corpus import TokenizedStories
from mini_gpt_pl.stories.data.probe import Example, Probe, Stream, sample_rng
from mini_gpt_pl.stories.objective import IGNORE

# Batches that a worker sends at once: each message is handed over between three threads of the process that trains.
_TOGETHER = 4

_Key = tuple[int, np.ndarray]  # an epoch and the stories of a batch; as an array they take a worker's pipe at once


class TrainStream:
    """An endless sequence of epochs; each ``iter`` gives the rest of an epoch, and the state is a position in it.

    An epoch is a permutation of the stories, a function of (seed, epoch), cut into global batches of
    ``batch_size * world_size`` stories, of which rank r takes its slice of ``batch_size``; stories left over at the end
    are dropped. Two ranks of 32 therefore see together exactly what one rank of 64 sees. A sample is a function of
    (seed, epoch, story), so workers, restarts and validation cannot change it.

    The first iteration after construction or ``load_state_dict`` continues at the position; each later one starts
    the next epoch, whether the one before was exhausted or abandoned. Nothing happens before the first batch is
    asked for: Lightning calls ``iter`` to look whether it can. Only one iteration may be in use at a time.

    Args:
        stories: The training stories.
        probe: Makes the examples.
        batch_size: Stories in a micro-batch of one rank.
        seed: Seed of order and samples.
        rank: This process.
        world_size: Number of processes.
        num_workers: Worker processes; they live as long as the stream.
        window: Gives the number of micro-batches of an optimizer step. It is asked at the start of each window, so it
            may change between epochs.
        limit: Gives the number of micro-batches after which an epoch is broken off (``limit_train_batches``).
        epoch: Where to start.
    """

    def __init__(
        self,
        stories: TokenizedStories,
        probe: Probe,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        window: Callable[[], int] = lambda: 1,
        limit: Callable[[], float] = lambda: float("inf"),
        epoch: int = 0,
    ) -> None:
        self._window, self._limit = window, limit
        self._epoch, self._batches, self._begun = epoch, 0, False
        self._sampler = _StorySampler(len(stories), batch_size, seed, rank, world_size)
        # What reads ahead, and the micro-batch since the first epoch's that it gives next.
        self._reader: Iterator[Batch | Arrived] | None = None
        self._next = 0
        self._loader: DataLoader[Any] = DataLoader(
            TrainingBatches(stories, probe, seed),
            sampler=self._sampler,
            batch_size=_TOGETHER if num_workers else 1,  # of batches: a key is that of a whole one
            collate_fn=_send,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            # Its own generator: each iteration of a DataLoader draws a number, from the global one by default.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        # Whole optimizer batches only: a short last one would be noisier than the others, and would let the count of
        # micro-batches, by which Lightning validates, run away from the count of optimizer steps.
        batches = len(self._sampler)
        return batches - batches % self._window() if batches >= self._window() else batches

    def __iter__(self) -> Iterator[Batch]:
        if self._begun or self._batches >= self._epoch_length():
            self._epoch, self._batches = self._epoch + 1, 0
        self._begun = True
        window = self._window()
        # A window that was left in its middle is read again from its start: all of it counts for the rest of it.
        position = self._batches - self._batches % window
        while position < self._epoch_length():
            # Lightning steps when the batch index is divisible by the window, and on the last batch.
            size = min(window - position % window, self._epoch_length() - position)
            held = _as_one(self._read(position, size))
            for batch in held[self._batches - position :]:
                self._batches += 1
                yield batch
            position += size
            window = self._window()

    def state_dict(self) -> dict[str, int]:
        """The position: ``epoch`` and the ``batches`` handed out in it, without those read ahead; and what it is in."""
        return {"epoch": self._epoch, "batches": self._batches, **self._sampler.layout()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at a position; at the end of an epoch this is the start of the next.

        Args:
            state: From ``state_dict``, perhaps of a run with another number of ranks and the same global batch.

        Raises:
            UserError: The number of stories or the global batch is another, so that the position means nothing.
        """
        for name, here in self._sampler.layout().items():
            if state[name] != here:
                raise UserError(
                    f"the checkpoint's training stream has {name}={state[name]} and this one {here}: resume with the "
                    "same corpus, batch size times devices, or start a new run from the weights alone"
                )
        self._epoch, self._batches, self._begun = state["epoch"], state["batches"], False

    def close(self) -> None:
        """Stop the worker processes; a later iteration starts new ones."""
        # A persistent iterator ends its workers when the last reference to it goes.
        self._loader._iterator = self._reader = None

    def _read(self, position: int, size: int) -> list[Batch]:
        """Take ``size`` micro-batches of the epoch from ``position`` on."""
        start = self._epoch * len(self._sampler) + position
        # One reader goes through all epochs: to begin one anew, it would have to wait for workers with nothing ahead.
        # It passes over the few micro-batches that make no whole window at an epoch's end.
        if self._reader is None or not 0 <= start - self._next < self._window():
            self._sampler.epoch, self._sampler.first = self._epoch, position
            self._reader, self._next = chain.from_iterable(self._loader), start
        batches = list(islice(self._reader, start - self._next, start - self._next + size))
        self._next = start + size
        return [batch.batch() if isinstance(batch, Arrived) else batch for batch in batches]

    def _epoch_length(self) -> int:
        return int(min(len(self), self._limit()))


def _as_one(window: list[Batch]) -> list[Batch]:
    """Give the micro-batches of an optimizer step the counts of all of them."""
    if len(window) == 1:
        return window
    lm_count = torch.stack([batch.lm_count for batch in window]).sum()
    probe_count = torch.stack([batch.probe_count for batch in window]).sum()
    return [batch._replace(lm_count=lm_count, probe_count=probe_count) for batch in window]


def _send(batches: list[Any]) -> list[Any]:
    return batches if get_worker_info() is None else [Piped(batch) for batch in batches]


class _StorySampler(Sampler[_Key]):
    """One rank's batches, without end, from the micro-batch ``first`` of ``epoch`` on."""

    def __init__(self, stories: int, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        self.stories = stories
        self.batch_size = batch_size
        self.global_batch = batch_size * world_size
        self.offset = batch_size * rank
        self.seed = seed
        self.epoch = self.first = 0

    def __len__(self) -> int:
        """Micro-batches of an epoch."""
        return self.stories // self.global_batch

    def __iter__(self) -> Iterator[_Key]:
        # Bound here: another iteration may move them while workers still read ahead in this one.
        epoch, first = self.epoch, self.first
        while True:
            order = sample_rng(self.seed, Stream.ORDER, epoch, 0).permutation(self.stories)
            for batch in range(first, len(self)):
                start = batch * self.global_batch + self.offset
                yield epoch, order[start : start + self.batch_size]
            epoch, first = epoch + 1, 0

    def layout(self) -> dict[str, int]:
        return {"global_batch": self.global_batch, "stories": self.stories}


class TrainingBatches(Dataset[Batch]):
    """Batches of training examples by their epoch and the stories of their rows.

    Each row is what ``Probe.training_example`` makes of the story and ``sample_rng(seed, Stream.TRAIN, epoch, story)``.
    Only the draws and the rows that carry a probe are made one by one; inputs and targets are cut for all together.
    """

    def __init__(self, stories: TokenizedStories, probe: Probe, seed: int) -> None:
        self.stories = stories
        self.probe = probe
        self._generator = sample_rng(seed, Stream.TRAIN, 0, 0)
        self._state = self._generator.bit_generator.state

    def __getitem__(self, key: _Key) -> Batch:
        epoch, stories = key
        probe, length = self.probe, self.probe.length
        sequences = np.full((len(stories), length), probe.eos, dtype=self.stories.tokens.dtype)
        ends = np.zeros(len(stories), dtype=np.int64)
        probed: dict[int, Example] = {}
        rng = self._generator
        for row, index in enumerate(stories.tolist()):
            # One object is put to the beginning of each sample's generator: to make one each takes longer.
            self._state["state"]["counter"][1:3] = index, epoch
            rng.bit_generator.state = self._state
            story = self.stories[index]
            if probe.asks(rng):
                probed[row] = probe.inject(story, rng)
                continue
            start = probe.crop(len(story), rng)
            ends[row] = end = min(len(story) - start, length)
            sequences[row, :end] = story[start : start + end]
        # Rows of T + 1 tokens, end of text from `ends` on, become inputs and targets.
        tokens, targets = sequences[:, :-1].astype(np.int64), sequences[:, 1:].astype(np.int64)
        targets[np.arange(1, length) >= ends[:, None]] = IGNORE
        mask = np.zeros(tokens.shape, dtype=bool)
        for row, example in probed.items():
            tokens[row], targets[row], mask[row] = example
        return Batch.of(torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(mask))
