r"""What an optimizer's own settings and state say about its updates.

From the gradient g to the step that is taken (arXiv 2602.23696, eqs. 13 to 16):

    g  ->  m_hat  ->  m_hat / (sqrt(v_hat) + eps)  ->  -lr m_hat / (sqrt(v_hat) + eps) - lr wd theta

Everything here is read from the state that the optimizer keeps anyway (exp_avg, exp_avg_sq, momentum_buffer), whether
it steps tensor by tensor, with foreach or fused. Vectors are signed as steps: the first rungs are -g and -m_hat, so
that a cosine keeps its sign along the ladder, and for plain SGD all rungs are parallel.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adam, Optimizer

from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector, as_real

Rule = Literal["adam", "sgd", "sgdw", "other"]


def steps_taken(optimizer: Optimizer, parameters: Sequence[Tensor]) -> list[int]:
    """Read how often each parameter was stepped; it waits for the device, so whoever sees every step counts on."""
    return [int(optimizer.state.get(p, {}).get("step", 0)) for p in parameters]


def rule_of(optimizer: Optimizer) -> Rule:
    """Say whose update rule an optimizer has: by the function that its `step` is, as any class may derive from Adam.

    `sgdw` is that of a class that says of its own `step`, by `decays_after_step`, that it is SGD's and decays after it.
    """
    own = inspect.unwrap(type(optimizer).step)  # PyTorch wraps the `step` of each class
    for kind in type(optimizer).__mro__:
        if "step" in vars(kind) and inspect.unwrap(vars(kind)["step"]) is own:
            if kind in (Adam, SGD):
                return "adam" if kind is Adam else "sgd"
            if vars(kind).get("decays_after_step"):
                return "sgdw"
    return "other"


# ------------------------------------------------------------------------------------------------- one step


@dataclass(frozen=True)
class Settings:
    """An optimizer's settings for one parameter group and one step.

    Args:
        rule: Whose update rule it is: that of torch's Adam and AdamW, of SGD, of SGDW, or one that is not known here.
        lr: Learning rate.
        decay: Weight decay coefficient.
        decay_at: Where decay enters: in the gradient (L2), or on the weights before or after the step; None where the
            rule is not known.
        beta1: Of the first moment; SGD's momentum factor.
        beta2: Of the second moment.
        eps: Beside sqrt(v_hat).
        dampening: Of SGD's momentum.
        nesterov: Whether SGD looks ahead.
        amsgrad: Whether the largest second moment so far is used.
        sign: -1 where the optimizer maximises.
        overwrites: Whether the step leaves g + momentum b in `.grad` (see `Settings.of`).
    """

    rule: Rule
    lr: float
    decay: float
    decay_at: Literal["gradient", "before", "after"] | None
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
        rule = rule_of(optimizer)
        beta1, beta2 = group["betas"] if rule == "adam" else (group.get("momentum", 0.0), 0.0)
        decoupled: Any = "before" if group.get("decoupled_weight_decay") else "gradient"
        decay = _number(group.get("weight_decay", 0.0))
        return cls(
            rule=rule,
            lr=_number(group.get("lr")),
            decay=decay,
            decay_at={"sgdw": "after", "other": None}.get(rule, decoupled),
            beta1=_number(beta1),
            beta2=_number(beta2),
            eps=_number(group.get("eps", 0.0)),
            dampening=_number(group.get("dampening", 0.0)),
            nesterov=bool(group.get("nesterov", False)),
            amsgrad=bool(group.get("amsgrad", False)),
            sign=-1.0 if group.get("maximize") else 1.0,
            overwrites=rule == "sgd" and _overwrites_gradient(group, decay),
        )

    @property
    def l2(self) -> float:
        """Decay that passes through the moments; 0 where it is decoupled."""
        return self.decay if self.decay_at == "gradient" else 0.0


def _number(value: Any) -> float:
    """A setting as a number; NaN where a rule that is not known here has none, or several, under that name."""
    single = isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
    return float(value) if single else math.nan


def _overwrites_gradient(group: Mapping[str, Any], decay: float) -> bool:
    """Whether torch's foreach SGD adds momentum b to `.grad` in place: with Nesterov, and nothing that copies it."""
    if not group.get("nesterov") or decay != 0.0 or group.get("maximize") or group.get("fused"):
        return False
    if group.get("foreach") is not None:
        return bool(group["foreach"])
    return all(p.is_cuda for p in group["params"])  # torch's default


@dataclass(frozen=True)
class BeforeStep:
    """What a step is about to destroy: the settings, copies of the weights, and the unclipped gradients.

    Args:
        parameters: The selected ones, in the selection's order; what follows has one entry for each.
        settings: None where the step will not touch the parameter (frozen, or without gradient).
        weights: Copies; empty if not asked for.
        gradients: As the loss gave them, signed for descent, of one width with the weights; empty if not asked for.
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
        gradients: Sequence[Tensor] = (),
        loss_scale: float = 1.0,
    ) -> BeforeStep:
        """Remember the state before `optimizer.step()`, gradients complete.

        Args:
            optimizer: About to step.
            parameters: The selected ones.
            weights: Whether to copy the weights.
            gradients: Copies, for whoever wants them beside the clipped ones.
            loss_scale: Factor that is still on the gradients.
        """
        groups = [(Settings.of(optimizer, group), group["params"]) for group in optimizer.param_groups]
        owner = {id(p): settings for settings, members in groups for p in members}
        settings = [owner.get(id(p)) if p.grad is not None else None for p in parameters]
        raw = [
            wide(gradient) if s is None or s.sign == loss_scale else wide(gradient) * (s.sign / loss_scale)
            for gradient, s in zip(gradients, settings, strict=bool(gradients))
        ]
        return cls(parameters, settings, copies(parameters) if weights else [], raw)

    def touched(self) -> Iterator[tuple[int, Settings, Tensor]]:
        """Iterate over position, settings and parameter of what the step moves."""
        pairs = enumerate(zip(self.settings, self.parameters, strict=True))
        return ((i, settings, parameter) for i, (settings, parameter) in pairs if settings is not None)


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors; plain ones of one kind all at once, as views of one copy."""
    kinds = {(type(t) in (Tensor, Parameter) and t.layout is torch.strided, t.dtype, t.device) for t in tensors}
    if len(kinds) != 1 or not kinds.pop()[0]:
        return [t.detach().clone() for t in tensors]
    flat = torch.cat([t.detach().reshape(-1) for t in tensors])
    return [part.view(t.shape) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]


@dataclass(frozen=True)
class Parts:
    """One parameter's step: theta <- theta - lr numerator / denominator + decay."""

    gradient: Tensor
    momentum: Tensor
    numerator: Tensor
    denominator: Tensor
    decay: Tensor
    bias1: Tensor


def parts_of(optimizer: Optimizer, settings: Settings, parameter: Tensor, before: Tensor) -> Parts:
    """Take apart the step that has just been made on one parameter, in float32 or wider."""
    gradient, theta = seen_gradient(optimizer, settings, parameter), wide(before)
    one = torch.ones((), dtype=theta.dtype, device=theta.device)
    if settings.rule == "adam":
        state = optimizer.state[parameter]
        bias1 = 1.0 - settings.beta1 ** _count(state)
        momentum = numerator = wide(state["exp_avg"]) / bias1
        square = wide(state["max_exp_avg_sq" if settings.amsgrad else "exp_avg_sq"])
        denominator = (square / (1.0 - settings.beta2 ** _count(state))).sqrt() + settings.eps
    else:
        bias1, denominator = one, one
        momentum = numerator = gradient + settings.l2 * theta
        if settings.beta1 != 0.0:
            momentum = wide(optimizer.state[parameter]["momentum_buffer"])
            numerator = numerator + settings.beta1 * momentum if settings.nesterov else momentum
    decay = torch.zeros_like(theta)
    if settings.decay_at != "gradient":
        shrunk = theta if settings.decay_at == "before" else theta - settings.lr * numerator / denominator
        decay = -settings.lr * settings.decay * shrunk
    return Parts(gradient, momentum, numerator, denominator, decay, bias1)


def seen_gradient(optimizer: Optimizer, settings: Settings, parameter: Tensor) -> Tensor:
    """Gradient that the step used, signed for descent, without L2: accumulated, reduced, clipped. To be read only."""
    assert parameter.grad is not None
    grad = wide(parameter.grad)
    if settings.sign != 1.0:
        grad = grad * settings.sign
    if settings.overwrites and settings.beta1 != 0.0:
        grad = grad - settings.beta1 * wide(optimizer.state[parameter]["momentum_buffer"])
    return grad


def _count(state: Mapping[str, Any]) -> Tensor:
    """Steps taken, in float64 where the optimizer keeps them: 1 - beta^t cancels in float32."""
    return torch.as_tensor(state["step"]).double()


def wide(tensor: Tensor) -> Tensor:
    """Detach, and convert what is narrower than float32 to that: squares of small gradients vanish in float16.

    Complex values become pairs of real ones, as which optimizers step them, and sparse gradients dense.
    """
    tensor = as_real(tensor.detach())
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


_RUNGS = ("gradient", "momentum", "normalised", "decay", "update", "denominator", "difference")


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
    def of(
        cls, optimizer: Optimizer, before: BeforeStep, selection: ParameterSelection, *, unclipped: bool = False
    ) -> Ladder:
        """Read the ladder after `optimizer.step()`, `.grad` still there.

        Args:
            optimizer: That has stepped.
            before: What was there before.
            selection: Of the parameters.
            unclipped: Whether an optimizer whose rule is not known has put another gradient into `.grad` since.
        """
        first = next((settings for _, settings, _ in before.touched()), None)
        rule = "other" if first is None else first.rule
        rungs: dict[str, list[Tensor]] = {name: [] for name in _RUNGS}
        pairs = zip(before.weights, before.parameters, before.settings, strict=True)
        for i, (old, parameter, settings) in enumerate(pairs):
            found = {"difference": wide(parameter) - wide(old)}
            if settings is not None and settings.rule == "other":
                seen = before.gradients[i] if unclipped else seen_gradient(optimizer, settings, parameter)
                found["gradient"] = -seen
            elif settings is not None:
                parts = parts_of(optimizer, settings, parameter, old)
                ratio = parts.numerator / parts.denominator
                found |= {"gradient": -parts.gradient, "momentum": -parts.momentum, "normalised": -ratio}
                found |= {"decay": parts.decay, "update": parts.decay - settings.lr * ratio}
                found["denominator"] = parts.denominator.expand_as(ratio)
            for name, tensors in rungs.items():
                tensors.append(found[name] if name in found else torch.zeros_like(found["difference"]))
        flat: dict[str, Any] = {name: flatten(selection, rungs.pop(name)) for name in _RUNGS}
        if rule != "adam":
            flat |= {"normalised": None, "denominator": None}
        if rule == "other":
            flat |= {"momentum": None, "decay": None, "update": flat["difference"]}
        return cls(**flat, settings=first)

    def rungs(self) -> dict[str, Vector]:
        """Name the vectors that this optimizer has."""
        named = {name: getattr(self, name) for name in ("gradient", "momentum", "normalised", "decay", "update")}
        return {name: vector for name, vector in named.items() if vector is not None}


def flatten(selection: ParameterSelection, tensors: Sequence[Tensor]) -> Vector:
    """Copy one tensor per selected parameter into a flat vector of their own width."""
    return selection.flatten(tensors, dtype=tensors[0].dtype)


def to_host(tensor: Tensor) -> Tensor:
    """Copy to the host, even from there: what a checkpoint holds must not change with the run."""
    return tensor.detach().to("cpu", copy=True)
