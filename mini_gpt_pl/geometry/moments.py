r"""What an optimizer's own settings and state say about its updates.

From the gradient g to the step that is taken (paper, eqs. 13 to 16):

    g  ->  m_hat  ->  m_hat / (sqrt(v_hat) + eps)  ->  -lr m_hat / (sqrt(v_hat) + eps) - lr wd theta

Everything here is read from the state that the optimizer keeps anyway (exp_avg, exp_avg_sq, momentum_buffer), whether
it steps tensor by tensor, with foreach or fused. Vectors are signed as steps: the first rungs are -g and -m_hat, so
that a cosine keeps its sign along the ladder, and for plain SGD all rungs are parallel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from mini_gpt_pl.geometry import pca
from mini_gpt_pl.geometry.pca import Gram
from mini_gpt_pl.geometry.selection import ParameterSelection, Vector, local_part

# torch keeps the two kinds of decay apart by class, or by this flag on Adam and its relatives.
_DECOUPLED = ("AdamW", "SGDW", "Muon", "MuonAdamW", "Adafactor")
# Values of each vector converted to float64 at a time.
_CHUNK = 1 << 20
# Normal deviates behind one `white_noise`.
_DEVIATES = 1 << 17

Array = np.ndarray[Any, np.dtype[np.float64]]


def group_of(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
    """Return the optimizer's parameter group that holds a parameter.

    Raises:
        ValueError: None does.
    """
    for group in optimizer.param_groups:
        if any(parameter is member for member in group["params"]):
            return group
    raise ValueError("the optimizer does not train this parameter")


def decay_rate(optimizer: Optimizer, parameter: Tensor) -> float:
    """Share of a parameter that weight decay takes away in one step at the current learning rate.

    Decoupled decay (AdamW, SGDW, Muon, Adafactor): lr wd. L2 inside SGD's gradient: lr wd / (1 - momentum), its rate
    once the momentum buffer has filled. L2 inside an adaptive gradient is rescaled per coordinate and is no shrinkage
    at any common rate: 0.
    """
    group = group_of(optimizer, parameter)
    rate = float(group["lr"]) * float(group.get("weight_decay", 0.0))
    if _is_decoupled(optimizer, group):
        return rate
    if "SGD" in _kinds(optimizer):
        return rate / (1.0 - float(group.get("momentum", 0.0)))
    return 0.0


def _kinds(optimizer: Optimizer) -> set[str]:
    return {kind.__name__ for kind in type(optimizer).__mro__}


def _is_decoupled(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    return bool(_kinds(optimizer) & set(_DECOUPLED) or group.get("decoupled_weight_decay"))


# ------------------------------------------------------------------------------------------------- one step


@dataclass(frozen=True)
class Settings:
    """An optimizer's settings for one parameter group and one step.

    Args:
        kind: Whose update rule it is: torch's Adam and AdamW, torch's SGD and SGDW, or one that is not known here.
        lr: Learning rate.
        decay: Weight decay coefficient.
        decay_at: Where decay enters: in the gradient (L2), or on the weights before or after the step.
        beta1: Of the first moment; SGD's momentum factor.
        beta2: Of the second moment.
        eps: Beside sqrt(v_hat).
        dampening: Of SGD's momentum.
        nesterov: Whether SGD looks ahead.
        amsgrad: Whether the largest second moment so far is used.
        sign: -1 where the optimizer maximises.
        overwrites: Whether the step leaves g + momentum b in `.grad` (see `Settings.of`).
    """

    kind: Literal["adam", "sgd", "other"]
    lr: float
    decay: float
    decay_at: Literal["gradient", "before", "after"]
    beta1: float
    beta2: float
    eps: float
    dampening: float
    nesterov: bool
    amsgrad: bool
    sign: float
    overwrites: bool

    @classmethod
    def of(cls, optimizer: Optimizer, group: Mapping[str, Any]) -> Settings:
        """Read a parameter group as it is now; schedulers change it between steps."""
        kind: Literal["adam", "sgd", "other"] = (
            "adam" if isinstance(optimizer, Adam) else "sgd" if isinstance(optimizer, SGD) else "other"
        )
        after = "SGDW" in _kinds(optimizer)
        beta1, beta2 = group["betas"] if kind == "adam" else (group.get("momentum", 0.0), 0.0)
        decay = float(group.get("weight_decay", 0.0))
        return cls(
            kind=kind,
            lr=float(group["lr"]),
            decay=decay,
            decay_at="after" if after else "before" if _is_decoupled(optimizer, group) else "gradient",
            beta1=float(beta1),
            beta2=float(beta2),
            eps=float(group.get("eps", 0.0)),
            dampening=float(group.get("dampening", 0.0)),
            nesterov=bool(group.get("nesterov", False)),
            amsgrad=bool(group.get("amsgrad", False)),
            sign=-1.0 if group.get("maximize") else 1.0,
            overwrites=kind == "sgd" and not after and _overwrites_gradient(group, decay),
        )

    @property
    def l2(self) -> float:
        """Decay that passes through the moments; 0 where it is decoupled."""
        return self.decay if self.decay_at == "gradient" else 0.0


def _overwrites_gradient(group: Mapping[str, Any], decay: float) -> bool:
    """Whether torch's foreach SGD adds momentum b to `.grad` in place: with Nesterov, and nothing that copies it."""
    if not group.get("nesterov") or decay != 0.0 or group.get("maximize") or group.get("fused"):
        return False
    if group.get("foreach") is not None:
        return bool(group["foreach"])
    return all(p.is_cuda for p in group["params"])  # torch's default


@dataclass(frozen=True)
class BeforeStep:
    """What a step is about to destroy: the settings, and copies of the weights and the unclipped gradients.

    Args:
        parameters: The selected parameters, in the selection's order.
        settings: One per parameter; None where the step will not touch it (frozen, or without gradient).
        weights: Copies, one per parameter; empty if not asked for.
        gradients: Copies as the loss gave them, signed for descent; empty if not asked for.
    """

    parameters: Sequence[Tensor]
    settings: Sequence[Settings | None]
    weights: Sequence[Tensor]
    gradients: Sequence[Tensor]

    @classmethod
    def of(
        cls,
        optimizer: Optimizer,
        parameters: Sequence[Tensor],
        *,
        weights: bool = True,
        gradients: bool = False,
        loss_scale: float = 1.0,
    ) -> BeforeStep:
        """Remember the state before `optimizer.step()`, gradients complete.

        Args:
            optimizer: About to step.
            parameters: The selected ones.
            weights: Whether to copy the weights.
            gradients: Whether to copy the gradients.
            loss_scale: Factor that is still on the gradients.
        """
        owner = {id(p): Settings.of(optimizer, group) for group in optimizer.param_groups for p in group["params"]}
        settings = [owner.get(id(p)) if p.grad is not None else None for p in parameters]
        copies = [p.detach().clone() for p in parameters] if weights else []
        raw = []
        for p, s in zip(parameters if gradients else [], settings, strict=False):
            grad = torch.zeros_like(p) if s is None or p.grad is None else p.grad * (s.sign / loss_scale)
            raw.append(_wide(grad))
        return cls(parameters, settings, copies, raw)

    def touched(self) -> Iterator[tuple[int, Settings, Tensor]]:
        """Iterate over position, settings and parameter of what the step moves."""
        for i, (settings, parameter) in enumerate(zip(self.settings, self.parameters, strict=True)):
            if settings is not None:
                yield i, settings, parameter


@dataclass(frozen=True)
class _Parts:
    """One parameter's step: theta <- theta - lr numerator / denominator + decay."""

    gradient: Tensor
    momentum: Tensor
    numerator: Tensor
    denominator: Tensor
    decay: Tensor
    bias1: Tensor


def _parts(optimizer: Optimizer, settings: Settings, parameter: Tensor, before: Tensor) -> _Parts:
    """Take apart the step that has just been made on one parameter, in float32 or wider."""
    gradient, theta = _seen_gradient(optimizer, settings, parameter), _wide(before)
    one = torch.ones((), dtype=theta.dtype, device=theta.device)
    if settings.kind == "adam":
        state = optimizer.state[parameter]
        bias1 = 1.0 - settings.beta1 ** _count(state)
        momentum = numerator = _wide(state["exp_avg"]) / bias1
        square = _wide(state["max_exp_avg_sq" if settings.amsgrad else "exp_avg_sq"])
        denominator = (square / (1.0 - settings.beta2 ** _count(state))).sqrt() + settings.eps
    else:
        bias1, denominator = one, one
        momentum = numerator = gradient + settings.l2 * theta
        if settings.beta1 != 0.0:
            momentum = _wide(optimizer.state[parameter]["momentum_buffer"])
            numerator = numerator + settings.beta1 * momentum if settings.nesterov else momentum
    decay = torch.zeros_like(theta)
    if settings.decay_at != "gradient":
        shrunk = theta if settings.decay_at == "before" else theta - settings.lr * numerator / denominator
        decay = -settings.lr * settings.decay * shrunk
    return _Parts(gradient, momentum, numerator, denominator, decay, bias1)


def _seen_gradient(optimizer: Optimizer, settings: Settings, parameter: Tensor) -> Tensor:
    """Gradient that the step used, signed for descent, without L2: accumulated, reduced and clipped."""
    assert parameter.grad is not None
    grad = _wide(parameter.grad) * settings.sign
    if settings.overwrites and settings.beta1 != 0.0:
        grad = grad - settings.beta1 * _wide(optimizer.state[parameter]["momentum_buffer"])
    return grad


def _count(state: Mapping[str, Any]) -> Tensor:
    """Steps taken, in float64 where the optimizer keeps them: 1 - beta^t cancels in float32."""
    return torch.as_tensor(state["step"]).double()


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


_RUNGS = ("gradient", "momentum", "normalised", "decay", "update", "denominator", "difference")


def _rungs(optimizer: Optimizer, settings: Settings, parameter: Tensor, before: Tensor) -> dict[str, Tensor]:
    if settings.kind == "other":
        return {"gradient": -_seen_gradient(optimizer, settings, parameter)}
    parts = _parts(optimizer, settings, parameter, before)
    ratio = parts.numerator / parts.denominator
    return {
        "gradient": -parts.gradient,
        "momentum": -parts.momentum,
        "normalised": -ratio,
        "decay": parts.decay,
        "update": parts.decay - settings.lr * ratio,
        "denominator": parts.denominator.expand_as(ratio),
    }


@dataclass(frozen=True)
class Ladder:
    """One step from the gradient to the update, each rung signed as a step.

    Args:
        gradient: -g as the optimizer saw it, clipped; without L2.
        momentum: -m_hat of Adam, minus the buffer of SGD; it holds the L2 term if there is one. None if unknown.
        normalised: -m_hat / (sqrt(v_hat) + eps); None without a second moment.
        decay: What decoupled decay moved, in parameter units; None if unknown.
        update: theta_{t+1} - theta_t, in parameter units: by the optimizer's formula, or where that is unknown the
            difference of the weights.
        difference: theta_{t+1} - theta_t of the stored weights, rounding included.
        denominator: sqrt(v_hat) + eps; None without a second moment.
        settings: Of the first parameter that the step moved; None if it moved none.
    """

    gradient: Vector
    momentum: Vector | None
    normalised: Vector | None
    decay: Vector | None
    update: Vector
    difference: Vector
    denominator: Vector | None
    settings: Settings | None

    @classmethod
    def of(cls, optimizer: Optimizer, before: BeforeStep, selection: ParameterSelection) -> Ladder:
        """Read the ladder after `optimizer.step()`, `.grad` still there. Reads only."""
        first = next((settings for _, settings, _ in before.touched()), None)
        kind = "other" if first is None else first.kind
        rungs: dict[str, list[Tensor]] = {name: [] for name in _RUNGS}
        for old, parameter, settings in zip(before.weights, before.parameters, before.settings, strict=True):
            found = {} if settings is None else _rungs(optimizer, settings, parameter, old)
            found["difference"] = _wide(parameter) - _wide(old)
            for name, tensors in rungs.items():
                tensors.append(found[name] if name in found else torch.zeros_like(found["difference"]))
        flat = {name: _flatten(selection, rungs.pop(name)) for name in _RUNGS}
        known, adaptive = kind != "other", kind == "adam"
        return cls(
            gradient=flat["gradient"],
            momentum=flat["momentum"] if known else None,
            normalised=flat["normalised"] if adaptive else None,
            decay=flat["decay"] if known else None,
            update=flat["update"] if known else flat["difference"],
            difference=flat["difference"],
            denominator=flat["denominator"] if adaptive else None,
            settings=first,
        )

    def rungs(self) -> dict[str, Vector]:
        """Name the vectors that this optimizer has."""
        named = {name: getattr(self, name) for name in ("gradient", "momentum", "normalised", "decay", "update")}
        return {name: vector for name, vector in named.items() if vector is not None}


def _flatten(selection: ParameterSelection, tensors: Sequence[Tensor]) -> Vector:
    return selection.flatten(tensors, dtype=tensors[0].dtype)


# -------------------------------------------------------------------------------------------- inner products


class Products:
    """All inner products of a few vectors, per group and over the whole selection, in float64.

    One pass over the coordinates serves every cosine between them.

    Args:
        vectors: By name.
    """

    def __init__(self, vectors: Mapping[str, Vector]) -> None:
        self.names = list(vectors)
        self.selection = next(iter(vectors.values())).selection
        for vector in vectors.values():
            self.selection.require(vector.selection.fingerprint)
        self.grams = _grams([vector.values for vector in vectors.values()], self.selection)

    def dot(self, a: str, b: str) -> Float[Tensor, " G1"]:
        """Inner product in each group, then of the whole."""
        return self.grams[:, self.names.index(a), self.names.index(b)]

    def cosine(self, a: str, b: str) -> Float[Tensor, " G1"]:
        """Cosine in each group, then of the whole; zero where either vanishes."""
        scale = (self.dot(a, a) * self.dot(b, b)).sqrt()
        return torch.where(scale == 0, 0.0, self.dot(a, b) / scale)


def _grams(rows: Sequence[Tensor], selection: ParameterSelection) -> Float[Tensor, "G1 K K"]:
    totals = []
    for span in selection.slices:
        total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows[0].device)
        for lo in range(span.start, span.stop, _CHUNK):
            stacked = torch.stack([row[lo : min(lo + _CHUNK, span.stop)].double() for row in rows])
            total += stacked @ stacked.T
        totals.append(total)
    groups = selection.total(torch.stack(totals))
    return torch.cat([groups, groups.sum(0, keepdim=True)])


# -------------------------------------------------------------------------------------------- counterfactual


class OtherSecondMoments:
    """Second moments that other beta2 would have made of the same gradients; the run itself never sees them.

    They start from the optimizer's own, so that at its own beta2 the counterfactual is the update itself. Only this
    step's preconditioner is another one: the gradients are those of the path that the run took.

    Memory: D values of the weights' width for each beta2, 4 bytes at least. (In bfloat16 an average with a long memory
    stands still: its increments are below the rounding.)

    Args:
        optimizer: Adam or AdamW.
        parameters: The selected ones, in the selection's order.
        beta2: The other values.
    """

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor], beta2: Sequence[float]) -> None:
        self.beta2 = tuple(beta2)
        self.counts = [int(optimizer.state.get(p, {}).get("step", 0)) for p in parameters]
        counted = list(zip(parameters, self.counts, strict=True))
        self.values = [[_start(optimizer, p, count, b) for p, count in counted] for b in beta2]

    def feed(self, optimizer: Optimizer, before: BeforeStep) -> None:
        """Take in the gradients of the step that has just been made; those of L2 decay need `before.weights`."""
        for i, settings, parameter in before.touched():
            gradient = _seen_gradient(optimizer, settings, parameter)
            if settings.l2 != 0.0:
                gradient = gradient + settings.l2 * _wide(before.weights[i])
            self.counts[i] += 1
            for beta2, values in zip(self.beta2, self.values, strict=True):
                values[i].mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)

    def steps(self, before: BeforeStep, ladder: Ladder) -> dict[float, tuple[Vector, Vector]]:
        """The normalised rung and the full update under each beta2, signed as steps."""
        assert ladder.momentum is not None and ladder.decay is not None
        selection = ladder.momentum.selection
        moments = ladder.momentum.values.split(selection.sizes)
        found = {}
        for beta2, values in zip(self.beta2, self.values, strict=True):
            held = [local_part(value).reshape(-1) for value in values]  # what this rank holds, as in `moments`
            ratios = [torch.zeros_like(value) for value in held]
            moves = list(ratios)
            for i, settings, _ in before.touched():
                root = (held[i] / (1.0 - beta2 ** self.counts[i])).sqrt() + settings.eps
                ratios[i] = moments[i] / root
                moves[i] = settings.lr * ratios[i]
            update = torch.cat(moves) + ladder.decay.values
            found[beta2] = (Vector(torch.cat(ratios), selection), Vector(update, selection))
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and primitives only, on the host: D values for each beta2."""
        flat = [torch.cat([_to_host(v).reshape(-1) for v in values]) for values in self.values]
        return {"beta2": list(self.beta2), "counts": list(self.counts), "values": flat}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave; the state of other beta2 values is left aside."""
        self.counts = list(state["counts"])
        for beta2, flat in zip(state["beta2"], state["values"], strict=True):
            if beta2 in self.beta2:
                _fill(self.values[self.beta2.index(beta2)], flat)


def _start(optimizer: Optimizer, parameter: Tensor, count: int, beta2: float) -> Tensor:
    """Second moment whose corrected value is the optimizer's own, with the bias of beta2 after `count` steps."""
    if count == 0:
        return torch.zeros_like(_wide(parameter))
    own = Settings.of(optimizer, group_of(optimizer, parameter)).beta2
    return _wide(optimizer.state[parameter]["exp_avg_sq"]) * ((1.0 - beta2**count) / (1.0 - own**count))


def _to_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _fill(tensors: Sequence[Tensor], flat: Tensor) -> None:
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


# ------------------------------------------------------------------------------------------------ the split


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

    Memory: 5 D values (6 with L2). Work: some 25 passes over D values at every step.

    Args:
        optimizer: Adam, AdamW, SGD or SGDW; what its momentum holds already counts as gradient.
        parameters: The selected ones, in the selection's order.
    """

    PARTS = ("gradient", "decay", "clipping")

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self.anchor = [p.detach().clone() for p in parameters]
        self.moved = {part: [torch.zeros_like(_wide(p)) for p in parameters] for part in self.PARTS}
        self._raw = _FirstMoment([_first_moment(optimizer, p) for p in parameters])
        self._pull = _FirstMoment([None if m is None else torch.zeros_like(m) for m in self._raw.values])

    def account(self, optimizer: Optimizer, before: BeforeStep) -> None:
        """Take in the step that has just been made; `before` needs weights and gradients."""
        for i, settings, parameter in before.touched():
            parts = _parts(optimizer, settings, parameter, before.weights[i])
            raw = self._raw.feed(i, settings, before.gradients[i]) / parts.bias1
            scale = settings.lr / parts.denominator
            rest = parts.numerator - raw
            self.moved["gradient"][i].addcmul_(raw, scale, value=-1.0)
            self.moved["decay"][i].add_(parts.decay)
            if settings.l2 != 0.0:
                pull = self._pull.feed(i, settings, settings.l2 * _wide(before.weights[i])) / parts.bias1
                self.moved["decay"][i].addcmul_(pull, scale, value=-1.0)
                rest = rest - pull
            self.moved["clipping"][i].addcmul_(rest, scale, value=-1.0)

    def close(self, selection: ParameterSelection) -> dict[str, Vector]:
        """Begin a new interval, and return the parts of the last one.

        Returns:
            gradient, decay, clipping and their sum, the true `displacement`; `rounding`, the share of the gradient part
            that the formula does not explain.
        """
        found = {part: _flatten(selection, tensors) for part, tensors in self.moved.items()}
        pairs = zip(self.parameters, self.anchor, strict=True)
        found["displacement"] = true = _flatten(selection, [_wide(p) - _wide(old) for p, old in pairs])
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
        state: dict[str, Any] = {"anchor": [_to_host(t) for t in self.anchor]}
        state["moved"] = {part: [_to_host(t) for t in tensors] for part, tensors in self.moved.items()}
        for name, moment in (("raw", self._raw), ("pull", self._pull)):
            state[name] = [None if t is None else _to_host(t) for t in moment.values]
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
        if settings.kind == "adam":
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
    return None if found is None else _wide(found).clone()


# ------------------------------------------------------------------------------------------- the predictions


def memory(beta: float) -> float:
    """Steps after which a moment has forgotten all but 1/e, -1 / ln(beta)."""
    return 0.0 if beta <= 0.0 else math.inf if beta >= 1.0 else -1.0 / math.log(beta)


def averaging(beta1: float) -> float:
    """Var[m_i] / sigma_i^2 of white gradient noise, (1 - beta1) / (1 + beta1) (paper, eq. 17)."""
    return (1.0 - beta1) / (1.0 + beta1)


@dataclass(frozen=True)
class WhiteNoise:
    """What gradients without any mean make of u = m_hat / sqrt(v_hat).

    Args:
        coherence: Mean of u^2; its limit for beta2 -> 1 is (1 - beta1) / (1 + beta1).
        coherence_median: Median of u^2.
        size: Mean of |u|.
    """

    coherence: float
    coherence_median: float
    size: float

    @property
    def has_means(self) -> bool:
        """Whether the two means say anything: at step 1 |u| is 1, and for beta2 = 0 both means are infinite."""
        return self.coherence < 0.999


def _average_on_ring(values: Array, beta: float, reach: int) -> Array:
    """Bias-corrected exponential average over the last `reach` values, at every place of a ring."""
    weights = np.zeros(len(values))
    weights[:reach] = np.power(beta, np.arange(reach))
    product = np.fft.rfft(values) * np.fft.rfft(weights / weights.sum())
    averaged: Array = np.fft.irfft(product, len(values))
    return averaged


@lru_cache(maxsize=64)
def white_noise(beta1: float, beta2: float, steps: int) -> WhiteNoise:
    """Draw the null of the update's size: standard normal gradients through both moments.

    The draw is fixed: 131,072 steps of one coordinate on a ring, along which both moments are averaged with their
    weights after `steps` steps. That leaves an error of about 2 % at beta1 = 0.9.

    Args:
        beta1: Of the first moment.
        beta2: Of the second.
        steps: Taken so far, for the bias correction.
    """
    draws = np.random.Generator(np.random.Philox(key=0)).standard_normal(_DEVIATES)
    # Beyond sixteen memories nothing changes: callers then share one cached answer.
    reach = max(1, int(min(steps, _DEVIATES, 16 * max(memory(beta1), memory(beta2), 1.0))))
    if reach < steps:
        return white_noise(beta1, beta2, reach)
    first, second = (_average_on_ring(x, beta, reach) for x, beta in ((draws, beta1), (draws**2, beta2)))
    square = first**2 / second
    return WhiteNoise(float(square.mean()), float(np.median(square)), float(np.sqrt(square).mean()))


def memory_metrics(u: Float[Tensor, " C"], null: WhiteNoise) -> dict[str, Float[Tensor, ""]]:
    r"""Effective signal-to-noise ratio of the gradients, and eq. 19 beside what is measured.

    With mean mu and variance sigma^2 of a coordinate's gradient and SNR = mu / sigma, the paper's eq. 19 has
    |u| = SNR / sqrt(1 + SNR^2). But u^2 is c > 0 on noise alone, so the share f = SNR^2 / (1 + SNR^2) of the signal is
    read from mean(u^2) = c + (1 - c) f, right at both ends.

    Args:
        u: m_hat / (sqrt(v_hat) + eps) of some coordinates.
        null: Of the same optimizer.

    Returns:
        coherence_median of u^2; where the null has means, too, coherence = mean(u^2), snr = sqrt(f / (1 - f)),
        update_size = mean |u| and update_size_predicted = sqrt(f).
    """
    square = u.double().square()
    found = {"coherence_median": torch.quantile(square, 0.5)}
    if not null.has_means:
        return found
    signal = ((square.mean() - null.coherence) / (1.0 - null.coherence)).clamp(0.0, 1.0 - 1e-12)
    return found | {
        "coherence": square.mean(),
        "snr": (signal / (1.0 - signal)).sqrt(),
        "update_size": u.double().abs().mean(),
        "update_size_predicted": signal.sqrt(),
    }


def averaging_metrics(
    moment: Float[Tensor, " C"],
    earlier: Float[Tensor, " C"],
    second: Float[Tensor, " C"],
    beta1: float,
    lag: int,
) -> dict[str, Float[Tensor, ""]]:
    r"""Variance of the first moment, measured between two steps, beside eqs. 17 and 18.

    For white noise around a mean that has not moved, E (m_t - m_{t-k})^2 = 2 Var[m] (1 - beta1^k). The noise of single
    gradients is sigma^2 = (v_hat - m_hat^2) / (1 - c), c = (1 - beta1) / (1 + beta1). Noise that is correlated from
    step to step shows as more variance, and less amplification, than predicted.

    Args:
        moment: m_hat of some coordinates.
        earlier: The same, `lag` steps ago.
        second: v_hat.
        beta1: Of the first moment.
        lag: Steps between the two, 1 or more.

    Returns:
        momentum_variance and momentum_variance_predicted = c sigma^2 (eq. 17), amplification = sigma / sqrt(Var[m])
        and amplification_predicted = sqrt((1 + beta1) / (1 - beta1)) (eq. 18); sums over the coordinates come first.
    """
    share = averaging(beta1)
    measured = (moment.double() - earlier.double()).square().mean() / (2.0 * (1.0 - beta1**lag))
    noise = ((second.double() - moment.double().square()).mean() / (1.0 - share)).clamp_min(0.0)
    return {
        "momentum_variance": measured,
        "momentum_variance_predicted": share * noise,
        "amplification": (noise / measured).sqrt(),
        "amplification_predicted": torch.full_like(noise, share**-0.5),
    }


def spread(denominator: Float[Tensor, " C"]) -> Float[Tensor, ""]:
    """Decades between the 10 % and the 90 % quantile of sqrt(v_hat) + eps."""
    decades = denominator.double().clamp_min(1e-300).log10()
    return torch.quantile(decades, 0.9) - torch.quantile(decades, 0.1)


@dataclass(frozen=True)
class BackboneGrowth:
    """The backbone's share of the squared drift after T intervals.

    Args:
        predicted: T^2 d^2 / (T^2 d^2 + T s^2) for a mean displacement d along the backbone and a mean square s^2 across
            it in each interval (paper, eqs. 20 and 21): what lies across cancels as a random walk does.
        measured: a(T)^2 / ||x(T)||^2.
    """

    predicted: float
    measured: float


def backbone_growth(gram: Gram) -> BackboneGrowth | None:
    """Compare the growth of the backbone fraction with the paper's account of it; None where nothing has moved.

    Args:
        gram: H over (theta_0, d_1, ..., d_T), measured or of a null.
    """
    n = len(gram)
    if n < 2 or float(gram.diagonal()[1:].max()) <= 0.0:
        return None
    rows = pca.drifts(n)[1:]
    direction = pca.pca(gram, rows).backbone
    along = pca.inner(gram, torch.eye(n, dtype=torch.float64)[1:], direction)
    across = (gram.diagonal()[1:] - along.square()).clamp_min(0.0)
    linear, walk = ((n - 1) * along.mean()).square(), (n - 1) * across.mean()
    measured = pca.decompose(gram, rows[-1:], direction).fraction
    return BackboneGrowth(float(linear / (linear + walk)), float(measured))
