"""The steps that another second moment would have made of the same gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mini_gpt_pl.geometry.kernels import step_kernels
from mini_gpt_pl.geometry.optimizer.moments import (
    BeforeStep,
    Ladder,
    Settings,
    seen_gradient,
    steps_taken,
    to_host,
    wide,
)
from mini_gpt_pl.geometry.vectors.selection import Vector, local_part


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
        self.counts = steps_taken(optimizer, parameters)
        counted = list(zip(parameters, self.counts, strict=True))
        self.values = [[_start(optimizer, p, count, b) for p, count in counted] for b in beta2]
        self._betas = torch.tensor(self.beta2, device=parameters[0].device)

    def feed(self, optimizer: Optimizer, before: BeforeStep) -> None:
        """Take in the gradients of the step that has just been made; those of L2 decay need `before.weights`."""
        at_once = []
        for i, settings, parameter in before.touched():
            gradient = seen_gradient(optimizer, settings, parameter)
            if settings.l2 != 0.0:
                gradient = gradient + settings.l2 * wide(before.weights[i])
            self.counts[i] += 1
            tensors = [gradient, *(values[i] for values in self.values)]
            if step_kernels is not None and step_kernels.takes([*tensors, self._betas]):
                at_once.append(tensors)
                continue
            for beta2, values in zip(self.beta2, self.values, strict=True):
                values[i].mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        if at_once:
            step_kernels.feed(at_once, self._betas)

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
        flat = [torch.cat([to_host(v).reshape(-1) for v in values]) for values in self.values]
        return {"beta2": list(self.beta2), "counts": list(self.counts), "values": flat}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave; the state of other beta2 values is left aside."""
        self.counts = list(state["counts"])
        for beta2, flat in zip(state["beta2"], state["values"], strict=True):
            if beta2 in self.beta2:
                own = self.values[self.beta2.index(beta2)]
                for tensor, part in zip(own, flat.split([t.numel() for t in own]), strict=True):
                    tensor.copy_(part.view_as(tensor))


def _start(optimizer: Optimizer, parameter: Tensor, count: int, beta2: float) -> Tensor:
    """Second moment whose corrected value is the optimizer's own, with the bias of beta2 after `count` steps."""
    if count == 0:
        return torch.zeros_like(wide(parameter))
    group = next(g for g in optimizer.param_groups if any(parameter is member for member in g["params"]))
    own = Settings.of(optimizer, group).beta2
    return wide(optimizer.state[parameter]["exp_avg_sq"]) * ((1.0 - beta2**count) / (1.0 - own**count))
