"""Gradients of fixed batches at the weights of the moment, one for each rank-one part of a Fisher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from mini_gpt_pl.callbacks.measuring import (
    Mode,
    SamplesItsLabels,
    SplitsItsLoss,
    gradient_of,
    measuring,
    seed_everything,
    training_loss,
)
from mini_gpt_pl.callbacks.nests import moved, take_sample
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector

Kind = Literal["batch_mean", "per_sample", "monte_carlo"]


@dataclass(frozen=True)
class FixedGradients:
    """Gives gradient i of one kind of Fisher, the same whenever it is asked as long as the weights stay.

    Args:
        trainer: Knows the precision.
        module: Has the losses that the kind needs.
        selection: By which weights.
        batches: Anywhere; those in pinned memory are copied to a GPU without waiting for it.
        kind: Which Fisher, as in `FisherProbe`.
        samples_per_batch: Samples taken from each batch by `per_sample`.
        seed: Of the labels that `monte_carlo` draws, and of all that a forward draws in the modes of training.
        mode: As in `FisherProbe`.
    """

    trainer: Trainer
    module: LightningModule
    selection: ParameterSelection
    batches: Sequence[Any]
    kind: Kind
    samples_per_batch: int = 1
    seed: int = 0
    mode: Mode = "eval"

    def __len__(self) -> int:
        """Number of gradients, M."""
        return count_of(self.kind, len(self.batches), self.samples_per_batch)

    def __call__(self, index: int) -> Vector:
        """Gradient i: for `monte_carlo` times the root of the number of labels, as E[g g'] is the Fisher per label."""
        labels: Tensor | None = None

        def evaluate() -> Tensor:
            nonlocal labels
            if self.mode == "train":
                seed_everything(self.module, self.seed, index)
            loss, labels = self.loss(index)
            return loss

        with measuring(self.trainer, self.module, self.mode):
            found = gradient_of(evaluate, self.selection, self.module, self.kind)
        return found if labels is None else Vector(found.values * labels.sqrt(), self.selection)

    def loss(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Loss with a graph whose gradient is the i-th, and the number of labels where they are drawn."""
        if self.kind == "per_sample":
            position, sample = divmod(index, self.samples_per_batch)
            batch = moved(self.batches[position], self.module.device)
            if isinstance(self.module, SplitsItsLoss):
                return self.module.sample_loss(batch, sample), None
            return training_loss(self.module, take_sample(batch, sample)), None
        batch = moved(self.batches[index], self.module.device)
        if self.kind == "batch_mean":
            return training_loss(self.module, batch), None
        assert isinstance(self.module, SamplesItsLabels)
        generator = torch.Generator(self.module.device).manual_seed((self.seed << 16) + index)
        return self.module.sampled_loss(batch, generator)


def count_of(kind: Kind, batches: int, samples_per_batch: int) -> int:
    """Number of gradients that a kind takes from some batches, M."""
    return batches * samples_per_batch if kind == "per_sample" else batches
