"""An observer of its own: it stands around every `optimizer.step()` and keeps the true weights, in float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class Seen(NamedTuple):
    """One step: the weights before and after it, and the gradient at the weights before."""

    before: Tensor
    gradient: Tensor
    after: Tensor


class Witness(Callback):
    """Wraps the step function of every optimizer; uses nothing of what it is compared with."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.start = torch.zeros(0)
        self.steps: list[Seen] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights = [p for name, p in pl_module.named_parameters() if re.search(self.pattern, name)]
        self.start = flat([p.detach() for p in self.weights])
        for optimizer in trainer.optimizers:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if any(id(p) in held for p in self.weights):
                optimizer.step = MethodType(self.around(optimizer.step), optimizer)  # type: ignore[method-assign]

    def around(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def witnessed(_: Any, closure: Callable[[], Any] | None = None, **settings: Any) -> Any:
            before, gradients = flat([p.detach() for p in self.weights]), [self.gradient()]

            def asked(closure: Callable[[], Any]) -> Any:
                loss = closure()
                gradients.append(self.gradient())
                return loss

            result = step(None if closure is None else partial(asked, closure), **settings)
            at = gradients[1] if len(gradients) > 1 else gradients[0]
            self.steps.append(Seen(before, at, flat([p.detach() for p in self.weights])))
            return result

        return witnessed

    def gradient(self) -> Tensor:
        return flat([torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in self.weights])

    # --------------------------------------------------------------------------------------------- what follows

    def drifts(self, every: int, until: int) -> Tensor:
        """Rows theta_k - theta_0 of the snapshots after step `every`, 2 `every`, ... up to a step."""
        return torch.stack([self.steps[k - 1].after - self.start for k in range(every, until + 1, every)])

    def backbone(self, every: int, until: int) -> Tensor:
        rows = self.drifts(every, until)
        direction = torch.linalg.svd(rows, full_matrices=False).Vh[0]
        return direction * torch.sign(direction @ rows[-1])

    def pc1(self, every: int, until: int) -> float:
        energy = torch.linalg.svdvals(self.drifts(every, until)).square()
        return float(energy[0] / energy.sum())

    def cosine(self, vector: Tensor, every: int, until: int) -> float:
        return float(vector @ self.backbone(every, until) / vector.norm())

    def update_alignment(self, every: int, until: int) -> float:
        """Cosine of the last increment with the backbone of the snapshots before it."""
        rows = self.drifts(every, until)
        return self.cosine(rows[-1] - rows[-2], every, until - every)


def flat(tensors: list[Tensor]) -> Tensor:
    real = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
    return torch.cat([t.clone().double().reshape(-1) for t in real])
