"""Two independent batches for each sample of a measurement, from random numbers that training never sees."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer

from mini_gpt_pl.callbacks.measuring import DrawsBatches
from mini_gpt_pl.callbacks.nests import first_length, map_tensors, take_samples
from mini_gpt_pl.errors import UserError


class BatchPairs:
    """Gives the batches A and B of a sample: a function of (seed, step, sample) and of the data.

    Where the module or its data module has `draw_batch`, both are drawn by it. Else they are the halves of a random cut
    of the training batch that is passing by; such halves share no example, so they are a little less alike than
    independent ones.

    Args:
        trainer: Knows the data module and the device.
        module: Perhaps it draws batches.
        seed: Of the draws.
        size: Samples in each batch; None for the drawer's own, or for half of the passing batch.
        dtype: Of the batches' floating numbers.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, seed: int, size: int | None, dtype: torch.dtype
    ) -> None:
        sources = (module, getattr(trainer, "datamodule", None))
        self.drawer = next((source for source in sources if isinstance(source, DrawsBatches)), None)
        self._trainer = trainer
        self._module = module
        self._seed = seed
        self._size = size
        self._dtype = dtype

    def __call__(self, step: int, sample: int, passing: Any) -> tuple[Any, Any]:
        """Make both batches of one sample.

        Args:
            step: Optimizer steps taken so far.
            sample: Number of the sample.
            passing: The training batch that is about to be used, on the device; left as it is.

        Raises:
            UserError: The passing batch has fewer samples than two halves need.
        """
        if self.drawer is None:
            pair = self._halves(passing, self._generator(step, sample, 0))
        else:
            draws = [self.drawer.draw_batch(self._generator(step, sample, which), self._size) for which in (0, 1)]
            pair = tuple(self._trainer.strategy.batch_to_device(batch, self._module.device) for batch in draws)
        first, second = (map_tensors(b, lambda t: t.to(self._dtype) if t.is_floating_point() else t) for b in pair)
        return first, second

    def _halves(self, batch: Any, generator: np.random.Generator) -> tuple[Any, Any]:
        count = first_length(batch)
        size = count // 2 if self._size is None else self._size
        if count and not 1 <= size <= count // 2:  # where there are no samples that can be told, cutting says so
            raise UserError(
                f"a training batch of {count} cannot be cut into two of {max(size, 1)} samples: give a smaller size, "
                "or the data module a draw_batch(generator, size)"
            )
        order = torch.from_numpy(generator.permutation(count)[: 2 * size])
        return take_samples(batch, order[:size]), take_samples(batch, order[size:])

    def _generator(self, step: int, sample: int, which: int) -> np.random.Generator:
        counter = np.array([0, which, sample, step], dtype=np.uint64)
        key = np.array([self._seed % 2**64, 0xC033], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))
