"""Measure without a trace: modes, weights, buffers, random states and gradients are afterwards as they were before.

What a module can be asked for is said by protocols of one method each. `isinstance` looks at the method's signature: a
`batch_loss` that takes other arguments, or a layer called `attention`, is something else.
"""

from __future__ import annotations

import inspect
import random
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector

Mode = Literal["eval", "train"]
"""In evaluation mode, or in the modes that training has: with dropout and batch norm the gradients differ."""


class _BySignature(type(Protocol)):  # type: ignore[misc]
    """Lets `isinstance` ask whether an object's method can be called as the protocol's own."""

    def __instancecheck__(cls, instance: Any) -> bool:
        (name,) = (key for key, value in vars(cls).items() if inspect.isfunction(value) and not key.startswith("_"))
        if isinstance(inspect.getattr_static(instance, name, None), property | cached_property):
            return False
        found = getattr(instance, name, None)
        if not callable(found) or isinstance(found, nn.Module | type):
            return False
        bound = inspect.ismethod(found)
        return _takes(found.__func__ if bound else found, bound, vars(cls)[name])


@lru_cache(maxsize=256)
def _takes(function: Callable[..., Any], bound: bool, wanted: Callable[..., Any]) -> bool:
    """Whether a function takes the arguments of a protocol's method by position, those of one name in one place."""
    names = list(inspect.signature(wanted).parameters)[1:]
    try:
        signature = inspect.signature(function)
        signature.bind(*([None] * bound), *names)
    except (TypeError, ValueError):
        return False
    own = list(signature.parameters)[bound:]
    return all(own.index(name) == place for place, name in enumerate(names) if name in own)


@runtime_checkable
class NamesItsLosses(Protocol, metaclass=_BySignature):
    """A module that can give the parts of its loss for one batch, by name."""

    def named_losses(self, batch: Any) -> Mapping[str, Tensor]:
        """Return scalars with a graph, one per part; a mapping may compute each when it is asked for."""
        ...


@runtime_checkable
class KnowsItsLoss(Protocol, metaclass=_BySignature):
    """A module that can give its training loss for one batch taken alone."""

    def batch_loss(self, batch: Any) -> Tensor:
        """Return a scalar with a graph; logs nothing and changes nothing."""
        ...


@runtime_checkable
class SplitsItsLoss(Protocol, metaclass=_BySignature):
    """A module whose loss is no plain mean over samples: a sample alone would be normalised otherwise."""

    def sample_loss(self, batch: Any, index: int) -> Tensor:
        """Return the sample's share of `batch_loss` times the number of samples: their mean is `batch_loss`."""
        ...


@runtime_checkable
class SamplesItsLabels(Protocol, metaclass=_BySignature):
    """A module that can answer for itself, for the true Fisher."""

    def sampled_loss(self, batch: Any, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw every label of a batch from the module's own prediction; its true ones only say where there is one.

        Returns:
            Mean negative log-likelihood of the drawn labels, a scalar with a graph, and their number. All that is
            random comes from the generator, which is on the module's device.
        """
        ...


@runtime_checkable
class DrawsBatches(Protocol, metaclass=_BySignature):
    """A module or a data module that can draw batches like those of training, as many as are asked for."""

    def draw_batch(self, generator: np.random.Generator, size: int | None = None) -> Any:
        """Draw a batch of some samples (None: as many as in training), independent of all others, by the generator."""
        ...


@runtime_checkable
class DrawsKinds(Protocol, metaclass=_BySignature):
    """A module or a data module whose examples are of several kinds, each to be looked at by itself."""

    def draw_kinds(self, generator: np.random.Generator, size: int) -> Mapping[str, Any]:
        """Draw a batch of each kind, by name (training and test examples, easy and hard ones), of at most `size`."""
        ...


@runtime_checkable
class ShowsItsAttention(Protocol, metaclass=_BySignature):
    """A module that can give the attention weights that its output is made of."""

    def attention(self, batch: Any) -> Sequence[Tensor]:
        """Return a tensor (B, heads, T, T) for each layer, whose rows sum to 1."""
        ...


@runtime_checkable
class ChangesItsAttention(Protocol, metaclass=_BySignature):
    """A module that can answer with other attention weights than its own."""

    def accuracy_through(self, batch: Any, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the share of right answers with `change` behind the softmax of every layer; changes nothing."""
        ...


@runtime_checkable
class TakesSamples(Protocol, metaclass=_BySignature):
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


@contextmanager
def measuring(trainer: Trainer, module: LightningModule, mode: Mode = "eval") -> Iterator[None]:
    """Evaluate the module inside training, and leave no trace.

    Modes go through `train(mode)`, as a layer may fold itself into its weight there. Put back, bit for bit and also
    where the measurement fails: the modes, the weights that setting them may have written, those that an embedding's
    `max_norm` writes in a forward, all buffers, and the random states of Python, of numpy and of torch on the host and
    on the module's devices. Other attributes that a forward writes are the module's own affair. Take gradients inside
    with `gradient_of`: `.grad` belongs to training.

    Args:
        trainer: Knows the precision.
        module: Whose losses are asked for.
        mode: `train` leaves the modes as they are.

    Raises:
        UserError: An iterator ended inside, which Lightning would take for the end of the epoch; or a forward has
            written into other weights, which it would do to those of training.
    """
    parts = _parts(module)
    states, precision = RandomStates(parts), trainer.precision_plugin
    bounded = [part.weight for part in parts if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.max_norm]
    others = [p for part in parts for p in part._parameters.values() if p is not None]
    others = [p for p in others if all(p is not weight for weight in bounded)]
    versions = [p._version for p in others]
    try:
        with (
            _kept(bounded),
            _kept_buffers(parts),
            evaluating(module, mode),
            torch.enable_grad(),
            precision.forward_context(),
        ):
            yield
        if [p._version for p in others] != versions:
            raise UserError(
                f"a forward of {type(module).__name__} writes into its weights, so that measuring it would change "
                "training: bound them in a hook after the optimizer's step instead"
            )
    except StopIteration as error:
        raise UserError(
            f"an iterator ended while a probe measured {type(module).__name__} (StopIteration): let what draws batches "
            "begin anew instead of ending"
        ) from error
    finally:
        states.put_back()


@contextmanager
def evaluating(module: nn.Module, mode: Mode = "eval") -> Iterator[None]:
    """Put a module in evaluation mode, and each part back into its own mode afterwards.

    Who measures many times enters it once around all of them, and `measuring` then finds nothing to set: while the host
    sets modes a GPU may run out of work. Weights and buffers of parts that have a `train` of their own are copied
    meanwhile, and put back bit for bit. Mode `train` leaves everything as it is.
    """
    modes = [(part, part.training) for part in _parts(module)]
    if mode == "train" or not any(training for _, training in modes):
        yield
        return
    own = [part for part, _ in modes if _sets_more_than_modes(part)]
    with _kept([tensor for part in own for tensor in (*part.parameters(), *part.buffers())]):
        try:
            module.eval()
            yield
        finally:
            if modes[0][1]:
                module.train()
            for part, training in modes:  # parents come before their parts
                if part.training != training:
                    if _sets_more_than_modes(part):
                        part.train(training)
                    part.training = training


def _sets_more_than_modes(part: nn.Module) -> bool:
    return type(part).train is not nn.Module.train or type(part).eval is not nn.Module.eval


class RandomStates:
    """The random states of Python, of numpy, and of torch on the host and where modules have weights or buffers."""

    def __init__(self, parts: Iterable[nn.Module]) -> None:
        self._host = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._devices = {d: torch.get_device_module(d).get_rng_state(*_place(d)) for d in _devices(parts)}

    def put_back(self) -> None:
        """Set all of them to what they were."""
        of_python, of_numpy, of_torch = self._host
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)
        for device, state in self._devices.items():
            torch.get_device_module(device).set_rng_state(state, *_place(device))


def seed_everything(module: nn.Module, *numbers: int) -> None:
    """Let all random states of a module's devices go on from some numbers; inside `measuring`, which puts them back."""
    drawn = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(drawn)
    np.random.seed(drawn)
    torch.default_generator.manual_seed(drawn)
    for device in _devices(_parts(module)):
        state = torch.Generator(device).manual_seed(drawn).get_state()
        torch.get_device_module(device).set_rng_state(state, *_place(device))


def _devices(parts: Iterable[nn.Module]) -> set[torch.device]:
    """Those that weights and buffers lie on, beside the host."""
    tensors = (tensor for part in parts for tensor in (*part._parameters.values(), *part._buffers.values()))
    return {t.device for t in tensors if t is not None and t.device.type not in ("cpu", "meta")}


def _place(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)


@contextmanager
def _kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Put values back bit for bit, where they lay, without a version that autograd would count."""
    kept = [(t, t.data, t.detach().clone()) for t in {id(t): t for t in tensors}.values() if not is_lazy(t)]
    try:
        yield
    finally:
        for tensor, data, values in kept:
            data.copy_(values)
            if tensor.data_ptr() != data.data_ptr():
                tensor.data = data


@contextmanager
def _kept_buffers(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Put buffers back: those that a forward writes into, exchanges or makes."""
    before = [(part, dict(part._buffers), set(part._non_persistent_buffers_set)) for part in parts]
    with _kept([buffer for _, buffers, _ in before for buffer in buffers.values() if buffer is not None]):
        try:
            yield
        finally:
            for part, buffers, fleeting in before:
                if [*map(id, part._buffers.values())] != [*map(id, buffers.values())]:
                    part._buffers.clear()
                    part._buffers.update(buffers)
                    part._non_persistent_buffers_set = fleeting


def _parts(module: nn.Module) -> list[nn.Module]:
    """A module and all below it, each once; `modules()`, a generator inside of another, takes twice as long."""
    parts, met = [module], {module}
    for part in parts:
        for child in part._modules.values():
            if child is not None and child not in met:
                met.add(child)
                parts.append(child)
    return parts


# --------------------------------------------------------------------------------------------------------- gradients

# By module: whether the loss of a name depends on weights that its graph does not reach.
_HIDDEN: weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, ...], bool]] = weakref.WeakKeyDictionary()


def gradient_of(
    evaluate: Callable[[], Tensor], selection: ParameterSelection, module: nn.Module, name: str = ""
) -> Vector:
    """Gradient of a loss by the selected weights; every `.grad` stays as it is.

    A weight that the graph does not reach counts as zero only where the loss does not depend on it, which is found out
    once by moving it. Behind a reentrant checkpoint it does: the gradient then comes from a backward pass as training
    makes it.

    Args:
        evaluate: Gives the loss, with a graph.
        selection: By which weights.
        module: Theirs, inside `measuring`.
        name: Of the loss, where the module has several.

    Raises:
        UserError: The loss depends on a weight, and no backward pass gives the gradient by it.
    """
    states = RandomStates(_parts(module))
    parts = selection.partials(evaluate(), module)
    if missing := _missing(parts, selection, module):
        known = _HIDDEN.setdefault(module, {})
        if (name, *missing) not in known:
            known[(name, *missing)] = _depends(evaluate, missing, selection, module, states)
        if known[(name, *missing)]:
            states.put_back()
            parts = _by_backward(evaluate, missing, selection, module)
    return selection.filled(parts, module)


def _missing(parts: Sequence[Tensor | None], selection: ParameterSelection, module: nn.Module) -> tuple[str, ...]:
    weights = zip(selection.names, selection.parameters(module), parts, strict=True)
    return tuple(name for name, weight, part in weights if part is None and weight.requires_grad)


def _by_backward(
    evaluate: Callable[[], Tensor], missing: tuple[str, ...], selection: ParameterSelection, module: nn.Module
) -> list[Tensor | None]:
    watched = any(getattr(p, "_post_accumulate_grad_hooks", None) for p in module.parameters())
    if not watched and not torch.distributed.is_initialized():  # else training itself would hear of the backward pass
        parts = selection.partials(evaluate(), module, by_backward=True)
        if not set(missing) & set(_missing(parts, selection, module)):
            return parts
    raise UserError(
        f"the loss of {type(module).__name__} depends on {missing[0]!r}, and its graph does not reach that weight: "
        "checkpoint with use_reentrant=False; where a layer folds its weights in evaluation mode, let the probe "
        "measure with mode: train; or leave the weight out of the pattern"
    )


def _depends(
    evaluate: Callable[[], Tensor],
    missing: tuple[str, ...],
    selection: ParameterSelection,
    module: nn.Module,
    states: RandomStates,
) -> bool:
    """Whether a loss changes, by more than it does by itself, when the missing weights are moved."""

    def value() -> float:
        states.put_back()
        with torch.no_grad():
            return float(evaluate())

    first, again = value(), value()
    own = [part for part in _parts(module) if _sets_more_than_modes(part)]
    weights = [p for name, p in zip(selection.names, selection.parameters(module), strict=True) if name in missing]
    with _kept([*weights, *(t for part in own for t in (*part.parameters(), *part.buffers()))]):
        modes = [(part, part.training) for part in _parts(module)]
        for part in own:  # what they fold in evaluation mode is folded with the moved weights
            part.train()
        for weight in weights:
            weight.data.mul_(1.5).add_(torch.full_like(weight, 0.1))
        for part, training in modes:
            if part in own:
                part.train(training)
            part.training = training
        moved = value()
    return not abs(moved - first) <= 10 * abs(again - first)
