"""Batches as nests of tensors, whatever a data module makes them of.

A nest is opened down to its leaves: mappings, lists, tuples and named tuples, dataclasses (frozen ones too), and
objects that Lightning can move as they have a `to`, such as those of graph libraries, by their attributes. Strings,
numbers and None are leaves beside the tensors.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from mini_gpt_pl.callbacks.measuring import TakesSamples
from mini_gpt_pl.errors import UserError

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device)
# A nest as tensors and primitives that a checkpoint can hold: the kind of a container, its keys, its parts.
Packed: TypeAlias = Any


def _parts_of(nest: Any) -> dict[Any, Any] | None:
    """What a container holds, by key, position or attribute; None for a leaf."""
    if isinstance(nest, Mapping):
        return dict(nest)
    if isinstance(nest, list | tuple) and not isinstance(nest, torch.Size):
        return dict(enumerate(nest))
    if isinstance(nest, Tensor | nn.Module | type | np.ndarray | np.generic | torch.device):
        return None
    if dataclasses.is_dataclass(nest) or callable(getattr(nest, "to", None)):
        slots = [name for kind in type(nest).__mro__ for name in _slots(kind) if hasattr(nest, name)]
        return {**{name: getattr(nest, name) for name in slots}, **getattr(nest, "__dict__", {})}
    return None


def _slots(kind: type) -> Sequence[str]:
    slots = vars(kind).get("__slots__", ())
    return [slots] if isinstance(slots, str) else [name for name in slots if not name.startswith("__")]


def _made_like(nest: Any, parts: Mapping[Any, Any]) -> Any:
    """Another container of the kind of one, which is left as it is."""
    kind = type(nest)
    if isinstance(nest, tuple) and hasattr(nest, "_make"):
        return nest._make(parts.values())
    if isinstance(nest, list | tuple) or (isinstance(nest, Mapping) and not isinstance(nest, MutableMapping)):
        return kind(parts if isinstance(nest, Mapping) else parts.values())
    made = copy.copy(nest)
    if isinstance(nest, MutableMapping):
        for key in [key for key in made if key not in parts]:
            del made[key]
        made.update(parts)
        return made
    for name, value in parts.items():
        if getattr(made, name, None) is not value:
            object.__setattr__(made, name, value)
    return made


def map_tensors(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to each tensor of a nest, in a fixed order."""
    if (parts := _parts_of(batch)) is None:
        return function(batch) if isinstance(batch, Tensor) else batch
    return _made_like(batch, {key: map_tensors(part, function) for key, part in parts.items()})


def leaves_of(batch: Any) -> list[Tensor]:
    """List the tensors of a nest, in the order of `map_tensors`."""
    if (parts := _parts_of(batch)) is None:
        return [batch] if isinstance(batch, Tensor) else []
    return [leaf for part in parts.values() for leaf in leaves_of(part)]


def moved(batch: Any, device: torch.device) -> Any:
    """Put a nest on a device: what has a `to` by that, as it may know better, the rest part by part."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if callable(getattr(batch, "to", None)) and not isinstance(batch, Mapping):
        return batch.to(device)
    parts = _parts_of(batch)
    return batch if parts is None else _made_like(batch, {key: moved(part, device) for key, part in parts.items()})


# ----------------------------------------------------------------------------------------------------------- samples


def _columns(nest: Any, named: bool = False) -> Iterator[Any]:
    """What has an entry for each sample: arrays with a dimension, lists of primitives, any list below a name."""
    if isinstance(nest, Tensor | np.ndarray):
        yield from [nest] if nest.ndim else []
    elif _is_column(nest, named):
        yield nest
    elif (parts := _parts_of(nest)) is not None:
        for part in parts.values():
            yield from _columns(part, _names(nest))


def _is_column(nest: Any, named: bool) -> bool:
    if not isinstance(nest, list | tuple) or hasattr(nest, "_fields") or not nest:
        return False
    if named and isinstance(nest, list):
        return not _are_columns(nest)
    return all(isinstance(part, int | float | str | bytes) for part in nest)


def _are_columns(parts: Sequence[Any]) -> bool:
    """Whether a list is a batch such as [inputs, labels]: tensors of one length, of several kinds or dimensions."""
    if not all(isinstance(part, Tensor | np.ndarray) and part.ndim for part in parts):
        return False
    return len({len(part) for part in parts}) == 1 and len({(part.ndim, part.dtype) for part in parts}) > 1


def first_length(batch: Any) -> int:
    """Number of samples in a batch: the entries of its first column, 0 without any.

    A column is a tensor's or an array's first dimension, a list of numbers or strings, or a list that has a name (the
    value of a key or an attribute), whose entries may then be tensors of different shapes; it is a batch itself where
    they are of one length, and of several dtypes or dimensions. An object that is no plain container and has columns of
    different lengths, such as a graph with its edges, has no samples that could be told: 0.
    """
    return 0 if _is_mixed(batch) else next((len(column) for column in _columns(batch)), 0)


def _is_mixed(nest: Any) -> bool:
    """Whether an object in a nest, other than a plain container, has columns of different lengths."""
    if (parts := _parts_of(nest)) is None:
        return False
    plain = isinstance(nest, Mapping | list | tuple) or dataclasses.is_dataclass(nest)
    plain = plain and not isinstance(nest, PackedSequence)  # which has its samples' lengths beside their elements
    return (not plain and len({len(column) for column in _columns(nest)}) > 1) or any(map(_is_mixed, parts.values()))


def take_sample(batch: Any, index: int) -> Any:
    """Cut one sample out of a batch, as `take_samples` does, as a batch of one."""
    return batch.take_samples(torch.tensor([index])) if isinstance(batch, TakesSamples) else _cut(batch, [index])


def take_samples(batch: Any, index: Tensor) -> Any:
    """Cut several samples out of a batch: by its own `take_samples`, if it has one, else out of its columns.

    Columns of another length than `first_length`, scalars and everything else stay whole, as does the batch itself.

    Raises:
        UserError: It cannot be told what its samples are.
    """
    return batch.take_samples(index) if isinstance(batch, TakesSamples) else _cut(batch, index)


def _cut(batch: Any, index: Tensor | list[int]) -> Any:
    if not (size := first_length(batch)):
        raise UserError(
            f"what is one sample of a {type(batch).__name__} cannot be told: give it a take_samples(index) that "
            "returns the batch of these samples"
        )
    listed = index.tolist() if isinstance(index, Tensor) else index

    def of(tensor: Tensor) -> Tensor:
        if tensor.is_nested:
            raise UserError("a batch with a nested tensor cannot be cut: give its class a take_samples(index)")
        if tensor.layout != torch.strided:
            return tensor.index_select(0, torch.as_tensor(index, device=tensor.device))
        if isinstance(index, Tensor):
            return tensor[index.to(tensor.device)]
        return tensor[index[0] : index[0] + 1]  # no copy, and no index to send to a device

    def cut(nest: Any, named: bool) -> Any:
        if isinstance(nest, Tensor):
            return of(nest) if nest.ndim and len(nest) == size else nest
        if isinstance(nest, np.ndarray):
            return nest[listed] if nest.ndim and len(nest) == size else nest
        if _is_column(nest, named) and len(nest) == size:
            return type(nest)(nest[i] for i in listed)
        if (parts := _parts_of(nest)) is None:
            return nest
        return _made_like(nest, {key: cut(part, _names(nest)) for key, part in parts.items()})

    return cut(batch, False)


def _names(nest: Any) -> bool:
    """Whether a container's parts have names."""
    return not isinstance(nest, list | tuple) or hasattr(nest, "_fields")


# ------------------------------------------------------------------------------------------------------- checkpoints


def packed(nest: Any) -> Packed:
    """Turn a nest into tensors and primitives, which a checkpoint holds without trusting anybody's code.

    Raises:
        UserError: It holds something else.
    """
    if (isinstance(nest, Tensor) and not nest.is_nested) or (isinstance(nest, _PLAIN) and not isinstance(nest, tuple)):
        return nest
    if isinstance(nest, torch.Size):
        return ("Size", [], list(nest))
    if isinstance(nest, np.ndarray | np.generic) and nest.dtype.kind in "biufc":
        return ("numpy", [], [torch.from_numpy(np.array(nest))])
    parts = _parts_of(nest)
    if parts is None or not all(isinstance(key, _PLAIN) for key in parts):
        raise UserError(
            f"a batch holds a {type(nest).__name__}, which no checkpoint can keep: let the data give tensors, numbers "
            "and strings, in containers or in objects with attributes and a `to`"
        )
    return (type(nest).__qualname__, list(parts), [packed(part) for part in parts.values()])


def unpacked(nest: Packed, like: Any) -> Any:
    """Make what `packed` was given again, of the containers of a batch of the same data.

    Raises:
        UserError: It has no container of a kind.
    """
    kinds: dict[str, Any] = {"dict": {}, "list": [], "tuple": ()}

    def collect(nest: Any) -> None:
        if (parts := _parts_of(nest)) is not None:
            kinds.setdefault(type(nest).__qualname__, nest)
            for part in parts.values():
                collect(part)

    def made(nest: Packed) -> Any:
        if not isinstance(nest, tuple):
            return nest
        kind, keys, packs = nest
        if kind == "Size":
            return torch.Size(packs)
        if kind == "numpy":
            return packs[0].numpy() if packs[0].ndim else packs[0].numpy()[()]
        if kind not in kinds:
            raise UserError(f"the checkpoint's batches hold a {kind}, those of this run do not: resume on its data")
        return _made_like(kinds[kind], {key: made(pack) for key, pack in zip(keys, packs, strict=True)})

    collect(like)
    return made(nest)


def filled(like: Any, leaves: Sequence[Tensor]) -> Any:
    """Put tensors in the places of a batch's own, in the order of `leaves_of`.

    Raises:
        UserError: The batch has another number of tensors.
    """
    if len(leaves_of(like)) != len(leaves):
        raise UserError(
            f"the checkpoint keeps {len(leaves)} tensors of a batch, those of this run have {len(leaves_of(like))}: "
            "resume on the data of the run"
        )
    rest = iter(leaves)
    return map_tensors(like, lambda leaf: next(rest))


def digest_of(batches: Sequence[Any]) -> str:
    """SHA-256 of all that batches hold: containers, keys, primitives; types, shapes and bytes of the tensors."""
    digest = hashlib.sha256()

    def add(nest: Packed) -> None:
        if isinstance(nest, Tensor):
            whole = nest if nest.layout == torch.strided else nest.to_dense()
            host = whole.detach().cpu().resolve_conj().contiguous()
            digest.update(f"{nest.dtype} {tuple(nest.shape)} ".encode())
            digest.update(host.reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(nest, tuple):
            digest.update(f"{nest[0]} {nest[1]!r} ".encode())
            for part in nest[2]:
                add(part)
        else:
            digest.update(f"{nest!r} ".encode())

    for batch in batches:
        add(packed(batch))
    return digest.hexdigest()
