"""Batches as nests of tensors, whatever containers a data module makes them of."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from mini_gpt_pl.callbacks.measuring import TakesSamples


def take_sample(batch: Any, index: int) -> Any:
    """Cut one sample out of a batch: every tensor whose first dimension is the batch size keeps one entry of it.

    The batch size is the first dimension of the first tensor that has one; scalars and other tensors stay whole.
    """
    size = first_length(batch)
    return map_tensors(batch, lambda leaf: leaf[index : index + 1] if leaf.ndim and len(leaf) == size else leaf)


def take_samples(batch: Any, index: Tensor) -> Any:
    """Cut several samples out of a batch: by its own `take_samples`, if it has one, else as `take_sample` does.

    Args:
        batch: Left as it is.
        index: Of the samples, on any device.
    """
    if isinstance(batch, TakesSamples):
        return batch.take_samples(index)
    size = first_length(batch)
    return map_tensors(batch, lambda leaf: leaf[index.to(leaf.device)] if leaf.ndim and len(leaf) == size else leaf)


def first_length(batch: Any) -> int:
    """Number of samples in a batch: the first dimension of its first tensor that has one; 0 without any."""
    return next((len(leaf) for leaf in leaves_of(batch) if leaf.ndim), 0)


def map_tensors(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to each tensor of a nest of containers, in a fixed order."""
    return apply_to_collection(batch, Tensor, function)


def leaves_of(batch: Any) -> list[Tensor]:
    """List the tensors of a nest, in the order of `map_tensors`."""
    found: list[Tensor] = []
    map_tensors(batch, lambda leaf: found.append(leaf) or leaf)  # type: ignore[func-returns-value]
    return found


def filled(like: Any, leaves: Sequence[Tensor]) -> Any:
    """Put tensors in the places of a batch's own, in the order of `leaves_of`."""
    rest = iter(leaves)
    return map_tensors(like, lambda leaf: next(rest))


def digest_of(batches: Sequence[Any]) -> str:
    """SHA-256 of the types, shapes and bytes of all tensors, which lie on the host."""
    digest = hashlib.sha256()
    for batch in batches:
        for leaf in leaves_of(batch):
            digest.update(f"{leaf.dtype} {tuple(leaf.shape)} ".encode())
            digest.update(leaf.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
