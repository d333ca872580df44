"""The data of the second task: whole sets and training batches, on the device from the start."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from mini_gpt_pl.arithmetic.draws import BLOCK, BatchStream, Purpose, generator, to_device, with_replacement
from mini_gpt_pl.arithmetic.markers import MarkerTask
from mini_gpt_pl.arithmetic.operations import Examples, OperationName, all_pairs, split_pairs
from mini_gpt_pl.errors import UserError


class ResidueData(LightningDataModule, ABC):
    """Sequences of tokens with a class each.

    Attributes:
        causal: Whether sequences are read at their last position, under a causal mask, or at the first without one.
        sets: The whole sets that accuracy is measured on, by name, on the device; filled by `setup`.
    """

    vocab_size: int
    classes: int
    length: int
    causal: bool

    def __init__(self) -> None:
        super().__init__()
        self.sets: dict[str, Examples] = {}
        self.device = torch.device("cpu")

    @abstractmethod
    def build_sets(self) -> dict[str, Examples]:
        """Make the whole sets on the host."""

    @abstractmethod
    def batches(self) -> BatchStream:
        """The training batches without end, on the device. Needs `setup`."""

    @abstractmethod
    def draw_batch(self, generator: np.random.Generator, size: int | None = None) -> Examples:
        """Draw a batch like those of training, of as many examples for None, for whatever measures. Needs `setup`."""

    def draw_kinds(self, generator: np.random.Generator, size: int) -> dict[str, Examples]:
        """Draw up to `size` examples of each whole set, without replacement, for whatever measures. Needs `setup`."""
        return {
            name: self._chosen(examples, torch.from_numpy(generator.permutation(len(examples.labels))[:size]))
            for name, examples in self.sets.items()
        }

    @override
    def setup(self, stage: str | None = None) -> None:
        """Put the whole sets on the device; a second call does nothing.

        Raises:
            UserError: There is more than one device.
        """
        if self.trainer is not None:
            if self.trainer.world_size > 1:
                raise UserError(
                    f"this task runs on one device, not on {self.trainer.world_size}: give --trainer.devices 1"
                )
            self.device = self.trainer.strategy.root_device
        if not self.sets:
            self.sets = {name: self._moved(examples) for name, examples in self.build_sets().items()}

    @override
    def train_dataloader(self) -> BatchStream:
        return self.batches()

    @override
    def val_dataloader(self) -> list[DataLoader[Examples]]:
        # A generator of its own: each iteration of a DataLoader draws a number, from the global one by default.
        return [
            DataLoader([examples], batch_size=None, generator=torch.Generator())  # type: ignore[arg-type]
            for examples in self.sets.values()
        ]

    @override
    def test_dataloader(self) -> list[DataLoader[Examples]]:
        return self.val_dataloader()

    @override
    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # it is there already

    def _moved(self, examples: Examples) -> Examples:
        return Examples(*(to_device(part, self.device) for part in examples))

    def _chosen(self, examples: Examples, positions: Tensor) -> Examples:
        """Some of the examples of a whole set, on the device."""
        where = to_device(positions, self.device)
        return Examples(examples.tokens[where], examples.labels[where])


class ModularArithmetic(ResidueData):
    """A binary operation modulo p: train on half of all pairs, test on the other half.

    A batch is drawn uniformly and with replacement from the training pairs, a function of the seed and the step.

    Args:
        operation: a + b, a - b, a b, a^2 + b^2, a^2 + a b + b^2 or a^3 + a b. The last two do not generalise.
        modulus: p, number of tokens and of classes.
        train_fraction: Share of the pairs to train on.
        mirror_together: Keep (a, b) and (b, a) on the same side of the split. Else about half of the test pairs of a
            symmetric operation have their mirror image among the training pairs.
        batch_size: Pairs in a batch; null for all training pairs in every step.
        seed: Of the batches, and of the split unless that has its own. On the command line it is `seed_everything`.
        split_seed: Of the split; null for that of the batches.

    Raises:
        UserError: A number is out of range.

    Example:
        >>> data = ModularArithmetic("add", modulus=59)
        >>> data.setup()
        >>> {name: len(examples.labels) for name, examples in data.sets.items()}
        {'train': 1740, 'test': 1741}
    """

    causal = False
    length = 2

    def __init__(
        self,
        operation: OperationName = "add",
        modulus: int = 97,
        train_fraction: float = 0.5,
        mirror_together: bool = False,
        batch_size: int | None = 512,
        seed: int = 42,
        split_seed: int | None = None,
    ) -> None:
        super().__init__()
        if batch_size is not None and batch_size < 1:
            raise UserError(f"--data.batch_size={batch_size}: give 1 or more, or null for all pairs")
        self.operation: OperationName = operation
        self.vocab_size = self.classes = modulus
        self.train_fraction = train_fraction
        self.mirror_together = mirror_together
        self.batch_size = batch_size
        self.seed = seed
        self.split_seed = seed if split_seed is None else split_seed

    @override
    def build_sets(self) -> dict[str, Examples]:
        return self._split(all_pairs(self.operation, self.classes))

    def _split(self, pairs: Examples) -> dict[str, Examples]:
        train, test = split_pairs(
            pairs.tokens, self.train_fraction, self.split_seed, mirror_together=self.mirror_together
        )
        return {
            "train": Examples(pairs.tokens[train], pairs.labels[train]),
            "test": Examples(pairs.tokens[test], pairs.labels[test]),
        }

    @override
    def batches(self) -> BatchStream:
        train = self.sets["train"]
        size, count = len(train.labels), self.batch_size

        def block(number: int) -> Examples:
            if count is None:
                return Examples(train.tokens.expand(BLOCK, -1, -1), train.labels.expand(BLOCK, *train.labels.shape))
            return self._chosen(train, with_replacement(size, count, self.seed, Purpose.TRAIN, number))

        what = {"pairs": size, "batch_size": count or size, "seed": self.seed, "training set": fingerprint(train)}
        return BatchStream(block, what)

    @override
    def draw_batch(self, generator: np.random.Generator, size: int | None = None) -> Examples:
        train = self.sets["train"]
        pairs = len(train.labels)
        drawn = generator.integers(0, pairs, size or self.batch_size or pairs)
        return self._chosen(train, torch.from_numpy(drawn))


class MarkerSums(ResidueData):
    """Sums of marked values among noise: fresh examples in every batch, so nothing can be memorised.

    The whole sets are `eval_examples` fixed examples for each number of markers, each with positions of its own:
    `m1`, `m2` and so on.

    Args:
        task: What the sequences look like.
        batch_size: Examples in a batch.
        eval_examples: Examples in each whole set.
        seed: Of everything. On the command line it is `seed_everything`.

    Raises:
        UserError: A number is out of range.
    """

    causal = True

    def __init__(
        self,
        task: MarkerTask = MarkerTask(),  # noqa: B008 (frozen)
        batch_size: int = 128,
        eval_examples: int = 512,
        seed: int = 42,
    ) -> None:
        super().__init__()
        if min(batch_size, eval_examples) < 1:
            raise UserError(f"--data: batch_size {batch_size}, eval_examples {eval_examples}: give 1 or more")
        self.task = task
        self.vocab_size, self.classes, self.length = task.vocab_size, task.classes, task.length
        self.batch_size = batch_size
        self.eval_examples = eval_examples
        self.seed = seed

    @override
    def build_sets(self) -> dict[str, Examples]:
        def drawn(m: int) -> Examples:
            return _examples(*self.task.per_number(self.eval_examples, m, generator(self.seed, Purpose.EVALUATION, m)))

        return {f"m{m}": drawn(m) for m in self.task.markers}

    @override
    def batches(self) -> BatchStream:
        def block(number: int) -> Examples:
            steps = range(number * BLOCK, (number + 1) * BLOCK)
            drawn = (
                self.task.batch(self.batch_size, step, generator(self.seed, Purpose.TRAIN, step)) for step in steps
            )
            tokens, labels = zip(*drawn, strict=True)
            return self._moved(_examples(np.stack(tokens), np.stack(labels)))

        return BatchStream(block, {"batch_size": self.batch_size, "seed": self.seed, "task": str(self.task)})

    @override
    def draw_batch(self, generator: np.random.Generator, size: int | None = None) -> Examples:
        step = 0 if self.trainer is None else self.trainer.global_step
        return self._moved(_examples(*self.task.batch(size or self.batch_size, step, generator)))


def fingerprint(examples: Examples) -> int:
    """A number that says which examples these are, in their order."""
    return zlib.crc32(b"".join(part.cpu().numpy().tobytes() for part in examples))


def _examples(tokens: np.ndarray, labels: np.ndarray) -> Examples:
    return Examples(torch.from_numpy(tokens), torch.from_numpy(labels))
