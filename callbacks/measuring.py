"""Measure without a trace: modes, random state and gradients are afterwards as they were before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from mini_gpt_pl.geometry.selection import ParameterSelection, Vector


@runtime_checkable
class NamesItsLosses(Protocol):
    """A module that can give the parts of its loss for one batch, by name."""

    def named_losses(self, batch: Any) -> Mapping[str, Tensor]:
        """Return scalars with a graph, one per part."""
        ...


@contextmanager
def measuring(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Evaluate the module inside training: dropout and batch statistics off, everything restored afterwards.

    Use `torch.autograd.grad` inside, never `backward`: `.grad` belongs to training.
    """
    modes = [(part, part.training) for part in module.modules()]
    device = module.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        module.eval()
        try:
            with trainer.precision_plugin.forward_context():
                yield
        finally:
            for part, mode in modes:
                part.training = mode


def gradient(loss: Tensor, module: LightningModule, selection: ParameterSelection) -> Vector:
    """Gradient of a loss by the selected weights, as a new vector.

    Args:
        loss: A scalar with a graph.
        module: Owner of the weights.
        selection: Which weights, in which order.
    """
    parameters = selection.parameters(module)
    parts = torch.autograd.grad(loss, parameters, allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, parts, strict=True)]
    return selection.flatten(filled)
