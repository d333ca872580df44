"""What moved the weights over an interval: the gradients, the decay and the clipping, step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mini_gpt_pl.geometry.kernels import step_kernels
from mini_gpt_pl.geometry.optimizer.moments import (
    BeforeStep,
    Parts,
    Settings,
    flatten,
    parts_of,
    steps_taken,
    to_host,
    wide,
)
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector


class DisplacementSplit:
    r"""Adds up, step by step, what the gradients, the decay and the clipping have moved.

    A step is theta <- theta - lr L[g + wd theta] / P + (decoupled decay), where P is the denominator and L the first
    moment (Adam's m_hat, SGD's buffer, with Nesterov's look-ahead), a linear map of the past gradients. Hence, exactly:

        gradient part   -lr L[unclipped g] / P
        clipping part   -lr (L[g] - L[unclipped g]) / P
        decay part      the decoupled decay, or -lr L[wd theta] / P where it is L2

    P is the one that the run had: clipping also acts through it, and that share is not taken apart. The stored weights
    are rounded (about 1e-6 of a displacement in float32 at lr 1e-3, more in a warm-up); what rounding moved is told
    apart and counted with the gradient part, so that the parts sum to the displacement of the weights themselves.

    Memory: 5 D values (6 with L2). Work: some 40 passes over D values at every step, and 16 of AdamW on a GPU.

    Args:
        optimizer: Adam, AdamW, SGD or SGDW; what its momentum holds already counts as gradient.
        parameters: The selected ones, in the selection's order.
    """

    PARTS = ("gradient", "decay", "clipping")

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self.anchor = [p.detach().clone() for p in parameters]
        self.moved = {part: [torch.zeros_like(wide(p)) for p in parameters] for part in self.PARTS}
        self.counts = steps_taken(optimizer, parameters)
        self._raw = _FirstMoment([_first_moment(optimizer, p) for p in parameters])
        self._pull = _FirstMoment([None if m is None else torch.zeros_like(m) for m in self._raw.values])

    def account(self, optimizer: Optimizer, before: BeforeStep) -> None:
        """Take in the step that has just been made; `before` needs weights and gradients."""
        at_once: dict[tuple[Settings, int], list[list[Tensor]]] = {}
        for i, settings, parameter in before.touched():
            self.counts[i] += 1
            tensors = self._for_kernel(i, settings, optimizer.state.get(parameter, {}), before)
            if tensors is None:
                self._account(i, settings, parts_of(optimizer, settings, parameter, before.weights[i]), before)
            else:
                at_once.setdefault((settings, self.counts[i]), []).append(tensors)
        for (settings, count), weights in at_once.items():
            step_kernels.account(
                weights,
                beta1=settings.beta1,
                bias1=1.0 - settings.beta1**count,
                bias2=1.0 - settings.beta2**count,
                lr=settings.lr,
                eps=settings.eps,
                decay=settings.decay,
            )

    def _account(self, i: int, settings: Settings, parts: Parts, before: BeforeStep) -> None:
        """Take in the step on one weight by plain operations."""
        raw = self._raw.feed(i, settings, before.gradients[i]) / parts.bias1
        scale = settings.lr / parts.denominator
        rest = parts.numerator - raw
        self.moved["gradient"][i].addcmul_(raw, scale, value=-1.0)
        self.moved["decay"][i].add_(parts.decay)
        if settings.l2 != 0.0:
            pull = self._pull.feed(i, settings, settings.l2 * wide(before.weights[i])) / parts.bias1
            self.moved["decay"][i].addcmul_(pull, scale, value=-1.0)
            rest = rest - pull
        self.moved["clipping"][i].addcmul_(rest, scale, value=-1.0)

    def _for_kernel(
        self, i: int, settings: Settings, state: Mapping[str, Any], before: BeforeStep
    ) -> list[Tensor] | None:
        """Collect what the kernel needs of one weight; None if there is no kernel for it."""
        if step_kernels is None or settings.rule != "adam" or settings.l2 != 0.0:
            return None
        momentum, square = state["exp_avg"], state["max_exp_avg_sq" if settings.amsgrad else "exp_avg_sq"]
        raw = torch.zeros_like(momentum) if self._raw.values[i] is None else self._raw.values[i]
        assert raw is not None
        moved = [self.moved[part][i] for part in ("gradient", "decay", "clipping")]
        tensors = [raw, before.gradients[i], momentum, square, before.weights[i], *moved]
        if not step_kernels.takes(tensors):
            return None
        self._raw.values[i] = raw
        return tensors

    def close(self, selection: ParameterSelection) -> dict[str, Vector]:
        """Begin a new interval, and return the parts of the last one.

        Returns:
            gradient, decay, clipping and their sum, the true `displacement`; `rounding`, the share of the gradient part
            that the formula does not explain.
        """
        found = {part: flatten(selection, tensors) for part, tensors in self.moved.items()}
        pairs = zip(self.parameters, self.anchor, strict=True)
        found["displacement"] = true = flatten(selection, [wide(p) - wide(old) for p, old in pairs])
        rest = true - found["decay"] - found["clipping"]
        found["rounding"] = rest - found["gradient"]
        found["gradient"] = rest
        for tensor in (t for tensors in self.moved.values() for t in tensors):
            tensor.zero_()
        for old, parameter in zip(self.anchor, self.parameters, strict=True):
            old.copy_(parameter.detach())
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and primitives only, on the host: 5 or 6 D values."""
        state: dict[str, Any] = {"anchor": [to_host(t) for t in self.anchor]}
        state["moved"] = {part: [to_host(t) for t in tensors] for part, tensors in self.moved.items()}
        for name, moment in (("raw", self._raw), ("pull", self._pull)):
            state[name] = [None if t is None else to_host(t) for t in moment.values]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        places = [p.device for p in self.parameters]
        self.anchor = _onto(places, state["anchor"])
        self.moved = {part: _onto(places, state["moved"][part]) for part in self.PARTS}
        self._raw, self._pull = (_FirstMoment(_onto(places, state[name])) for name in ("raw", "pull"))


def _onto(places: Sequence[torch.device], tensors: Sequence[Any]) -> list[Any]:
    return [None if t is None else t.to(place, copy=True) for t, place in zip(tensors, places, strict=True)]


class _FirstMoment:
    """The optimizer's first moment, of another sequence than its gradients; None before the first step."""

    def __init__(self, values: list[Tensor | None]) -> None:
        self.values = values

    def feed(self, i: int, settings: Settings, new: Tensor) -> Tensor:
        """Take in one value, and return the numerator of the step (for Adam, before bias correction)."""
        old = self.values[i]
        if settings.rule == "adam":
            old = torch.zeros_like(new) if old is None else old
            self.values[i] = old.lerp_(new, 1.0 - settings.beta1)
            return old
        if settings.beta1 == 0.0:
            return new
        buffer = new.clone() if old is None else old.mul_(settings.beta1).add_(new, alpha=1.0 - settings.dampening)
        self.values[i] = buffer
        return new + settings.beta1 * buffer if settings.nesterov else buffer


def _first_moment(optimizer: Optimizer, parameter: Tensor) -> Tensor | None:
    state = optimizer.state.get(parameter, {})
    found = state.get("exp_avg", state.get("momentum_buffer"))
    return None if found is None else wide(found).clone()
