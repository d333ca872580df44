"""Batches of probed stories: an exactly resumable training stream and fixed evaluation sets."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.stories.data.batch import Batch, collate
from mini_gpt_pl.stories.data.corpus import CorpusConfig, Split, TokenizedStories, load_texts, require_rows, tokenize
from mini_gpt_pl.stories.data.probe import Example, Probe, ProbeConfig, Stream, choose_codewords, sample_rng
from mini_gpt_pl.stories.data.stream import TrainStream
from mini_gpt_pl.stories.data.tokenizer import eos_id, load_tokenizer

EVALUATION_SETS = ("lm", "probe_in", "probe_ood")
"""The validation data loaders, in their order."""


class ProbedStories(LightningDataModule):
    """Stories with a key-retrieval probe hidden in some of them.

    Training batches come from a ``TrainStream``. Validation and test are the same three fixed sets: "lm" (stories
    without probe), "probe_in" (gaps as in training) and "probe_ood" (longer gaps). They are built once from their own
    random numbers, so every evaluation, of any checkpoint, sees the same bytes; ``validation_hashes`` shows it.

    Args:
        corpus: Which stories.
        tokenizer: "builtin", the path of a rank file, or a name that tiktoken knows, e.g. gpt2.
        probe: How the probe is hidden.
        context: Tokens that the model sees.
        batch_size: Stories in a micro-batch of one device.
        val_batches: Batches of stories in the "lm" set; fewer if the corpus is smaller.
        eval_batch_size: Examples in a batch of the probe sets.
        num_workers: Processes that build training batches.
        seed: Seed of the order, of the samples and of the evaluation sets.
        cache_dir: Where Hugging Face datasets keeps its files; null for its own default.

    Attributes:
        encoding: The tokenizer.
        vocab_size: Number of ids, end of text included.
        eos_id: The id of end of text, which pads.
        codewords: The probe's words.
        start: Where the training stream is to begin, as `TrainStream.state_dict` gives it; None at the beginning.

    Raises:
        UserError: The tokenizer cannot be had, has too few codewords, or the context is too short for the gaps.

    Example:
        >>> data = ProbedStories(context=256, batch_size=32)  # doctest: +SKIP
        >>> trainer.fit(model, datamodule=data)  # doctest: +SKIP
    """

    def __init__(
        self,
        corpus: CorpusConfig = CorpusConfig(),  # noqa: B008  (frozen)
        tokenizer: str = "builtin",
        probe: ProbeConfig = ProbeConfig(),  # noqa: B008  (frozen)
        context: int = 256,
        batch_size: int = 64,
        val_batches: int = 20,
        eval_batch_size: int = 250,
        num_workers: int = 0,
        seed: int = 42,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        sizes = {"context": context, "batch_size": batch_size, "val_batches": val_batches}
        for option, value in {**sizes, "eval_batch_size": eval_batch_size}.items():
            if value < 1:
                raise UserError(f"--data.{option}={value}: give 1 or more")
        if num_workers < 0:
            raise UserError(f"--data.num_workers={num_workers}: give 0 or more")
        self.corpus = corpus
        self.batch_size = batch_size
        self.val_batches = val_batches
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.cache_dir = cache_dir
        self.context = context
        self.encoding = load_tokenizer(tokenizer)
        self.vocab_size: int = self.encoding.n_vocab
        self.eos_id = eos_id(self.encoding)
        self.codewords = choose_codewords(self.encoding, probe.n_codewords, probe.codeword_seed)
        self.probe = Probe(self.encoding, self.codewords, probe, context)
        self.start: dict[str, int] | None = None
        self._splits: dict[Split, TokenizedStories] = {}
        self._train: TokenizedStories | None = None
        self._stream: TrainStream | None = None
        self._evaluation: dict[str, FixedExamples] = {}

    def prepare_data(self) -> None:
        """Download or write, and tokenize, both splits: fills the cache that the other processes read."""
        self._read("train")
        self._read("val")

    def setup(self, stage: str | None = None) -> None:
        """Load the splits that ``stage`` needs and build the evaluation sets; a second call does nothing.

        Raises:
            UserError: The corpus has fewer stories than one global batch, or none to validate on.
        """
        if self._train is None and stage in (None, "fit"):
            train = self._read("train")
            require_rows(train, self.batch_size * self._world()[1], "training stories")
            self._train = train
        if not self._evaluation:
            stories = self._read("val")
            require_rows(stories, 1, "validation stories")
            self._evaluation = self._build_evaluation(stories)

    def train_dataloader(self) -> TrainStream:
        """A fresh training stream at the trainer's epoch.

        Raises:
            UserError: The trainer is to overfit some batches, which a stream that reshuffles them cannot do.
        """
        trainer = self.trainer
        if self._train is None:
            raise RuntimeError("call setup('fit') before train_dataloader()")
        if trainer is not None and getattr(trainer, "overfit_batches", False):
            raise UserError("overfit_batches is not supported; overfit with --data.corpus.train_rows=N instead")
        rank, world_size = self._world()
        self._stream = TrainStream(
            self._train,
            self.probe,
            self.batch_size,
            self.seed,
            rank,
            world_size,
            self.num_workers,
            window=lambda: 1 if trainer is None else trainer.accumulate_grad_batches,
            limit=lambda: float("inf") if trainer is None else trainer.num_training_batches,
            epoch=0 if trainer is None else trainer.current_epoch,
        )
        if self.start is not None:
            self._stream.load_state_dict(self.start)
        return self._stream

    def draw_batch(self, generator: np.random.Generator, size: int | None = None) -> Batch:
        """Draw training stories with replacement, their crops, codewords and gaps drawn too; needs `setup("fit")`.

        Args:
            generator: The one source of randomness.
            size: Stories; None for `batch_size`.
        """
        if self._train is None:
            raise RuntimeError("call setup('fit') before draw_batch()")
        drawn = generator.integers(len(self._train), size=size or self.batch_size)
        return collate([self.probe.training_example(self._train[int(index)], generator) for index in drawn])

    def teardown(self, stage: str | None = None) -> None:
        """Stop the training stream's workers."""
        if self._stream is not None:
            self._stream.close()

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """The fixed sets in the order of ``EVALUATION_SETS``."""
        sizes = (self.batch_size, self.eval_batch_size, self.eval_batch_size)
        return [
            DataLoader(self._sets()[name], batch_size=size, collate_fn=_identity, generator=torch.Generator())
            for name, size in zip(EVALUATION_SETS, sizes, strict=True)
        ]

    test_dataloader = val_dataloader

    @property
    def validation_hashes(self) -> dict[str, str]:
        """SHA-256 of each evaluation set's bytes (tokens, targets, mask), by its name; needs ``setup``."""
        return {name: examples.sha256() for name, examples in self._sets().items()}

    def _sets(self) -> dict[str, FixedExamples]:
        if not self._evaluation:
            raise RuntimeError("call setup() before asking for the evaluation sets")
        return self._evaluation

    def _read(self, split: Split) -> TokenizedStories:
        # Once a process: the one that prepares the data also loads them.
        if split not in self._splits:
            texts = load_texts(self.corpus, split, self.cache_dir)
            self._splits[split] = tokenize(texts, self.encoding, self.corpus.num_proc)
        return self._splits[split]

    def _world(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _build_evaluation(self, stories: TokenizedStories) -> dict[str, FixedExamples]:
        probe, config = self.probe, self.probe.config
        count = min(len(stories), self.val_batches * self.batch_size)
        rngs = (sample_rng(self.seed, Stream.VAL_LM, 0, i) for i in range(count))
        sets = {"lm": [probe.lm_example(stories[i], rng) for i, rng in enumerate(rngs)]}
        for name, stream, gaps in (
            ("probe_in", Stream.PROBE_IN, probe.train_gap),
            ("probe_ood", Stream.PROBE_OOD, probe.ood_gap),
        ):
            sets[name] = [
                probe.evaluation_example(
                    sample_rng(self.seed, stream, 0, i),
                    gaps,
                    _running_text(stories, i, probe.length) if config.filler == "story" else None,
                )
                for i in range(config.eval_examples)
            ]
        return {name: FixedExamples(examples) for name, examples in sets.items()}


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
        key = tuple(indices)
        if key not in self._batches:
            tokens, targets, mask = (column[indices] for column in self.columns)
            batch = Batch.of(tokens, targets, mask)
            pinned = torch.cuda.is_available()
            self._batches[key] = Batch(*(column.pin_memory() for column in batch)) if pinned else batch
        return self._batches[key]

    def sha256(self) -> str:
        """Of the examples' bytes: tokens, targets, mask."""
        digest = hashlib.sha256()
        for column in self.columns:
            digest.update(column.numpy().tobytes())
        return digest.hexdigest()


def _identity(batch: Any) -> Any:
    return batch


def _running_text(stories: TokenizedStories, index: int, length: int) -> np.ndarray:
    """Take ``length`` tokens of text from the start of story ``index`` on, round the end of the corpus if need be."""
    start = stories.offsets[index % len(stories)]
    return stories.tokens.take(np.arange(start, start + length), mode="wrap")
