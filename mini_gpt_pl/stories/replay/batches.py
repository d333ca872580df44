"""The fixed batches of a replay: from the training distribution, and none of those that the run trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import count, islice

from mini_gpt_pl.stories.data.batch import Batch, collate
from mini_gpt_pl.stories.data.corpus import load_texts, require_rows, tokenize
from mini_gpt_pl.stories.data.datamodule import ProbedStories
from mini_gpt_pl.stories.data.probe import Stream, sample_rng


def fixed_batches(data: ProbedStories, number: int) -> list[Batch]:
    """Make batches of training stories with crops, codewords and gaps of their own.

    A function of the data's settings and seed alone: every checkpoint sees the same bytes, and the first batches of
    many are those of few. Stories come in an order of their own, each once before one comes again, and a probe is
    injected with the run's own probability.

    Args:
        data: Of the run; its batch size is that of a micro-batch.
        number: Of batches.

    Raises:
        UserError: The corpus cannot be read or is too small for one batch.
    """
    stories = tokenize(load_texts(data.corpus, "train", data.cache_dir), data.encoding, data.corpus.num_proc)
    require_rows(stories, data.batch_size, "training stories")
    wanted = islice(_order(data.seed, len(stories)), number * data.batch_size)
    examples = [
        data.probe.training_example(stories[index], sample_rng(data.seed, Stream.REPLAY_SAMPLES, 0, position))
        for position, index in enumerate(wanted)
    ]
    size = data.batch_size
    return [collate(examples[first : first + size]) for first in range(0, len(examples), size)]


def _order(seed: int, stories: int) -> Iterator[int]:
    for epoch in count():
        yield from map(int, sample_rng(seed, Stream.REPLAY_ORDER, epoch, 0).permutation(stories))


def sha256(batches: Iterable[Batch]) -> str:
    """Hash the bytes of tokens, targets and masks, in order."""
    digest = hashlib.sha256()
    for batch in batches:
        for column in (batch.tokens, batch.targets, batch.probe_mask):
            digest.update(f"{column.dtype} {tuple(column.shape)} ".encode())
            digest.update(column.contiguous().numpy().tobytes())
    return digest.hexdigest()
