"""Additions to PyTorch's optimizers: what is decayed, Muon beside AdamW, decoupled decay for SGD, the schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mini_gpt_pl.errors import UserError

KINDS = ("matrices", "tables", "vectors")


def decay_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Split the trainable parameters: matrices and embedding tables are decayed, vectors are not.

    For the GPT of this project the matrices are those of the blocks, the tables those of tokens and positions, the
    vectors the LayerNorms.

    Args:
        module: The model; a tied parameter is listed once, a frozen one not at all.

    Returns:
        Parameter groups for an optimizer, empty ones left out, each with its ``kind``: "matrices", "tables" or
        "vectors". The vectors' ``weight_decay`` is 0; the others follow the optimizer's.
    """
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    groups: dict[str, dict[str, Any]] = {kind: {"params": [], "kind": kind} for kind in KINDS}
    for parameter in module.parameters():  # lists a tied one once
        if parameter.requires_grad:
            kind = "vectors" if parameter.ndim < 2 else "tables" if id(parameter) in tables else "matrices"
            groups[kind]["params"].append(parameter)
    groups["vectors"]["weight_decay"] = 0.0
    return [group for group in groups.values() if group["params"]]


def _evaluate(closure: Callable[[], Any] | None) -> Any:
    """The loss of the closure that `Optimizer.step` may be given, which computes the gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class MuonAdamW(Optimizer):
    """Muon on the matrices of hidden layers, AdamW on everything else, as one optimizer.

    Muon orthogonalises the momentum of a matrix, so it is no optimizer for embedding tables or vectors. Both parts
    are PyTorch's own; they share the learning rate and the decoupled decay, which ``match_rms_adamw`` makes meaningful
    (arXiv 2502.16982).

    Args:
        params: The groups of ``decay_groups``.
        lr: Learning rate of both.
        weight_decay: Decoupled decay of both; vectors keep their 0.
        momentum: Of Muon.
        nesterov: Whether Muon looks ahead.
        betas: Of AdamW.
        eps: Of AdamW.
        adjust_lr_fn: How Muon scales its step to a matrix's shape; see ``torch.optim.Muon``.

    Raises:
        ValueError: A group has no ``kind``, a setting is out of range, or the groups lack matrices or anything else.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        adjust_lr_fn: str = "match_rms_adamw",
    ) -> None:
        groups = list(params)
        if not all(isinstance(group, dict) and group.get("kind") in KINDS for group in groups):
            raise ValueError(f"MuonAdamW needs parameter groups with a kind, one of {', '.join(KINDS)}")
        matrices = [group for group in groups if group["kind"] == "matrices"]
        others = [group for group in groups if group["kind"] != "matrices"]
        if not (matrices and others):
            raise ValueError("MuonAdamW needs both matrices and other parameters; use torch.optim.Muon or AdamW alone")
        muon = torch.optim.Muon(
            matrices, lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov, adjust_lr_fn=adjust_lr_fn
        )
        self._parts = (muon, torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let the parts work on this optimizer's groups and state: schedules and checkpoints know only those."""
        matrices = [group for group in self.param_groups if group["kind"] == "matrices"]
        others = [group for group in self.param_groups if group["kind"] != "matrices"]
        for part, groups in zip(self._parts, (matrices, others), strict=True):
            part.param_groups, part.state = groups, self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()  # loading replaces both

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of both, as `torch.optim.Optimizer.step` has it."""
        loss = _evaluate(closure)
        for part in self._parts:
            part.step()
        return loss


class SGDW(torch.optim.SGD):
    r"""SGD with decoupled weight decay, applied after the step.

    With gradient g, momentum m and dampening tau, as in ``torch.optim.SGD`` (b <- g on the first step):

        b <- m b + (1 - tau) g
        theta <- theta - lr u,   u = b, or g + m b with Nesterov, or g with m = 0
        theta <- theta (1 - lr weight_decay)

    ``torch.optim.SGD`` adds weight_decay * theta to g instead, so its decay passes through the momentum and
    shrinks the weights at the rate lr weight_decay / (1 - m). Decoupled decay: Loshchilov and Hutter,
    arXiv 1711.05101.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        momentum: Momentum factor m.
        nesterov: Whether to look ahead; needs a momentum and no dampening.
        weight_decay: Decay rate; the weights shrink by lr * weight_decay a step.
        dampening: The tau above.
    """

    decays_after_step = True
    """Says to the optimizer's anatomy that this is the rule of its `step`."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        dampening: float = 0.0,
    ) -> None:
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov)

    # Not super().step(): PyTorch hooks the step of each class, so every step hook would run twice.
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step, as `torch.optim.Optimizer.step` has it."""
        loss = _evaluate(closure)
        for group in self.param_groups:
            for theta in group["params"]:
                if theta.grad is not None:
                    theta.sub_(group["lr"] * self._direction(theta, group))
                    theta.mul_(1 - group["lr"] * group["weight_decay"])
        return loss

    def _direction(self, theta: Tensor, group: dict[str, Any]) -> Tensor:
        grad, momentum = theta.grad, group["momentum"]
        assert grad is not None
        if momentum == 0:
            return grad
        state = self.state[theta]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = grad.clone()
        else:
            state["momentum_buffer"].mul_(momentum).add_(grad, alpha=1 - group["dampening"])
        buffer: Tensor = state["momentum_buffer"]
        return grad + momentum * buffer if group["nesterov"] else buffer


@dataclass(frozen=True)
class ClippedCosine:
    """Linear warmup, then a cosine cut off at a floor: the factor of the learning rate at optimizer step t.

        t / W                                                         for t < W
        max( (1 + cos(pi min(1, (t - W) / max(1, T - W)))) / 2, f )   else

    The cosine is clipped, not rescaled to end at the floor: with f = 0.1 the factor is constant once 79.5 %
    of the decay has passed (t = 8259 for W = 1500, T = 10000).

    Args:
        warmup: W, in optimizer steps; the peak is reached at step W.
        total: T, the step at which the unclipped cosine would reach 0. Longer runs stay on the floor.
        floor: f, the smallest factor after the warmup, between 0 and 1.

    Raises:
        UserError: ``warmup`` is not in [0, ``total``], ``total`` is below 1, or ``floor`` is not in [0, 1].
    """

    warmup: int = 1500
    total: int = 10000
    floor: float = 0.1

    def __post_init__(self) -> None:
        if self.total < 1:
            raise UserError(f"schedule: total is {self.total}; give 1 step or more")
        if not 0 <= self.warmup <= self.total:
            raise UserError(f"schedule: warmup is {self.warmup}; give 0 to total ({self.total}) steps")
        if not 0 <= self.floor <= 1:
            raise UserError(f"schedule: floor is {self.floor}; give a fraction from 0 to 1")

    def __call__(self, step: int) -> float:
        """The factor for optimizer step ``step``; the first one is 1."""
        if step < self.warmup:
            return step / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))
        return max((1 + math.cos(math.pi * progress)) / 2, self.floor)


@dataclass(frozen=True)
class Continued:
    """Another schedule times a factor, after ``offset`` steps of it: step t here is step ``offset`` + t there."""

    schedule: Callable[[int], float]
    offset: int
    factor: float = 1.0

    def __call__(self, step: int) -> float:
        """The factor for optimizer step ``step``; the first one is 1."""
        return self.factor * self.schedule(self.offset + step)


def lambda_lr(optimizer: Optimizer, schedule: Callable[[int], float]) -> LambdaLR:
    """A scheduler, stepped once per optimizer step, under which optimizer step t = 1, 2, ... uses lr * schedule(t).

    Its state holds the step and the peak rates but none of the schedule's constants, so a resumed run follows the
    schedule of its own configuration.
    """
    # A plain function: LambdaLR stores the attributes of other callables in checkpoints and restores them.
    return LambdaLR(optimizer, lambda epoch: schedule(epoch + 1))
