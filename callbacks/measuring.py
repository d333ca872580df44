"""Measure without a trace: modes, random state and gradients are afterwards as they were before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from mini_gpt_pl.errors import UserError


@runtime_checkable
class NamesItsLosses(Protocol):
    """A module that can give the parts of its loss for one batch, by name."""

    def named_losses(self, batch: Any) -> Mapping[str, Tensor]:
        """Return scalars with a graph, one per part; a mapping may compute each when it is asked for."""
        ...


@runtime_checkable
class KnowsItsLoss(Protocol):
    """A module that can give its training loss for one batch taken alone."""

    def batch_loss(self, batch: Any) -> Tensor:
        """Return a scalar with a graph; logs nothing and changes nothing."""
        ...


@runtime_checkable
class SplitsItsLoss(Protocol):
    """A module that can say what one sample of a batch adds to the batch's loss.

    It matters where the loss is no plain mean over samples: a sample alone would then be normalised otherwise.
    """

    def sample_loss(self, batch: Any, index: int) -> Tensor:
        """Return the sample's share of `batch_loss` times the number of samples: their mean is `batch_loss`."""
        ...


@runtime_checkable
class SamplesItsLabels(Protocol):
    """A module that can answer for itself, for the true Fisher."""

    def sampled_loss(self, batch: Any, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw every label of a batch from the module's own prediction.

        Args:
            batch: Its true labels only say where labels are asked for.
            generator: The one source of randomness, on the module's device.

        Returns:
            Mean negative log-likelihood of the drawn labels, a scalar with a graph, and their number.
        """
        ...


@runtime_checkable
class DrawsBatches(Protocol):
    """A module or a data module that can draw batches like those of training, as many as are asked for."""

    def draw_batch(self, generator: np.random.Generator, size: int | None = None) -> Any:
        """Draw a batch, independent of all others and of those of training.

        Args:
            generator: The one source of randomness.
            size: Samples in it; None for as many as a training batch has.
        """
        ...


@runtime_checkable
class DrawsKinds(Protocol):
    """A module or a data module whose examples are of several kinds, each to be looked at by itself."""

    def draw_kinds(self, generator: np.random.Generator, size: int) -> Mapping[str, Any]:
        """Draw a batch of each kind, by name: training and test examples, easy and hard ones.

        Args:
            generator: The one source of randomness.
            size: Samples in each; fewer where there are not as many.
        """
        ...


@runtime_checkable
class ShowsItsAttention(Protocol):
    """A module that can give the attention weights that its output is made of."""

    def attention(self, batch: Any) -> Sequence[Tensor]:
        """Return a tensor (B, heads, T, T) for each layer, whose rows sum to 1."""
        ...


@runtime_checkable
class ChangesItsAttention(Protocol):
    """A module that can answer with other attention weights than its own."""

    def accuracy_through(self, batch: Any, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the share of right answers with `change` behind the softmax of every layer; changes nothing."""
        ...


@runtime_checkable
class TakesSamples(Protocol):
    """A batch that can be cut, where that takes more than an index into its tensors."""

    def take_samples(self, index: Tensor) -> Any:
        """Return the batch of these samples."""
        ...


def training_loss(module: LightningModule, batch: Any) -> Tensor:
    """Training loss of one batch taken alone: `batch_loss`, else the sum of `named_losses`.

    Raises:
        UserError: The module has neither. `training_step` cannot stand in: it may log, and change state.
    """
    if isinstance(module, KnowsItsLoss):
        return module.batch_loss(batch)
    if isinstance(module, NamesItsLosses):
        return torch.stack([loss.reshape(()) for loss in module.named_losses(batch).values()]).sum()
    raise UserError(
        f"{type(module).__name__} has no batch_loss(batch) that returns the training loss of one batch, "
        "which measuring its gradients needs: add one"
    )


def named_loss(module: LightningModule, batch: Any, name: str) -> Tensor:
    """One part of the loss of one batch, by its name.

    Raises:
        UserError: The module has no part of that name.
    """
    assert isinstance(module, NamesItsLosses)
    losses = module.named_losses(batch)
    if name not in losses:
        raise UserError(f"{type(module).__name__} has no loss {name!r}: its named_losses are {', '.join(losses)}")
    return losses[name]


@contextmanager
def measuring(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Evaluate the module inside training: dropout and batch statistics off, everything restored afterwards.

    Take gradients inside with `ParameterSelection.gradient_of`: `.grad` belongs to training.
    """
    device = module.device
    forked = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with forked, torch.enable_grad(), evaluating(module), trainer.precision_plugin.forward_context():
        yield


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode, and each part back into its own mode afterwards.

    Who measures many times enters it once around all of them, and `measuring` then finds nothing to set: while the host
    sets the modes of every part a GPU may run out of work.
    """
    modes = [(part, part.training) for part in _parts(module)]
    try:
        if any(mode for _, mode in modes):
            module.eval()
        yield
    finally:
        for part, mode in modes:
            if part.training != mode:
                part.training = mode


def _parts(module: nn.Module) -> list[nn.Module]:
    """A module and all below it, each once; `modules()`, a generator inside of another, takes twice as long."""
    parts, met = [module], {module}
    for part in parts:
        for child in part._modules.values():
            if child is not None and child not in met:
                met.add(child)
                parts.append(child)
    return parts
