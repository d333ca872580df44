r"""What the order of two of the optimizer's own steps changes: preconditioned, with momentum, decay and clipping.

    Delta = theta_AB - theta_BA of two steps from the same optimizer state.

An optimizer with a memory tells the orders apart even where the loss has no curvature: the older gradient counts
otherwise in its averages. So the same two steps are also taken with both gradients frozen at theta. What is left,

    curvature part = Delta - Delta with frozen gradients,

is due to gradients that change along the steps, as the bracket of `commutator` is. For plain SGD without decay the
frozen part is zero, and Delta / (||s_A|| ||s_B||) is the defect at eta = lr.

Everything happens on copies of the weights and of the optimizer's state in the dtype of theta. An optimizer that
rounds inside of its step (Muon orthogonalises in bfloat16) rounds there as well.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from mini_gpt_pl.geometry.curvature.commutator import gradient
from mini_gpt_pl.geometry.vectors.free_weights import Loss
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection

Field = Callable[[Float[Tensor, " D"]], Float[Tensor, " D"]]
# What an optimizer's copy must not take along: hooks, and methods that a scheduler has wrapped around the original.
_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


@dataclass(frozen=True, eq=False)
class TwoSteps:
    """Displacements in parameter units: the steps s_A and s_B from the state as it is, and theta_AB - theta_BA.

    `memory` is that change with the gradients frozen at theta: what the optimizer's memory and decay alone do.
    """

    step_a: Float[Tensor, " D"]
    step_b: Float[Tensor, " D"]
    change: Float[Tensor, " D"]
    memory: Float[Tensor, " D"]

    @property
    def curvature(self) -> Float[Tensor, " D"]:
        """The part of `change` that comes from gradients that change along the steps."""
        return self.change - self.memory


class OptimizerSteps:
    """Takes steps of an optimizer on copies of the selected weights, theta, and of its state; it is never changed.

    Other weights that the optimizer trains stay where they are. Gradients are clipped to `clip_norm` over the selected
    weights, as training does; None does not clip.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        module: nn.Module,
        selection: ParameterSelection,
        theta: Float[Tensor, " D"],
        clip_norm: float | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._parameters = selection.parameters(module)
        self._selection = selection
        self._theta = theta
        self._clip_norm = clip_norm

    def path(self, fields: Sequence[Field]) -> list[Float[Tensor, " D"]]:
        """Weights after each of some steps, one gradient field a step."""
        parts = self._theta.split(self._selection.sizes)
        shaped = zip(parts, self._selection.shapes, strict=True)
        moving = [nn.Parameter(part.clone().view(shape)) for part, shape in shaped]
        optimizer = _twin(self._optimizer, self._parameters, moving)
        places: list[Tensor] = []
        for field in fields:
            here = places[-1] if places else self._theta
            for parameter, grad in zip(moving, field(here).split(self._selection.sizes), strict=True):
                parameter.grad = grad.view_as(parameter).clone()
            if self._clip_norm is not None:
                nn.utils.clip_grad_norm_(moving, self._clip_norm)
            optimizer.step()
            places.append(torch.cat([parameter.detach().reshape(-1) for parameter in moving]))
        return places

    def order(self, loss_a: Loss, loss_b: Loss, grad_a: Float[Tensor, " D"], grad_b: Float[Tensor, " D"]) -> TwoSteps:
        """Take A then B, and B then A, whose gradients at theta are given; two gradients beside those."""

        def pair(first: Tensor, second: Field) -> list[Tensor]:
            return self.path([lambda _: first, second])

        after_a, a_then_b = pair(grad_a, lambda theta: gradient(loss_b, theta))
        after_b, b_then_a = pair(grad_b, lambda theta: gradient(loss_a, theta))
        frozen = pair(grad_a, lambda _: grad_b)[1] - pair(grad_b, lambda _: grad_a)[1]
        return TwoSteps(after_a - self._theta, after_b - self._theta, a_then_b - b_then_a, frozen)


def _twin(optimizer: Optimizer, parameters: Sequence[Tensor], moving: Sequence[Tensor]) -> Optimizer:
    """Copy an optimizer onto other parameters, its state in their dtype."""
    memo: dict[int, object] = {id(old): new for old, new in zip(parameters, moving, strict=True)}
    elsewhere = torch.empty(0)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            memo.setdefault(id(parameter), elsewhere)
    twin: Optimizer = object.__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        if name in _HOOKS:
            setattr(twin, name, type(value)())
        elif not callable(value):
            setattr(twin, name, copy.deepcopy(value, memo))
    copies, dtype = {id(new) for new in moving}, moving[0].dtype
    for group in twin.param_groups:
        group["params"] = [p for p in group["params"] if id(p) in copies]
        # One tensor after the other: fused kernels are choosy about dtypes.
        group.update({name: False for name in ("fused", "foreach") if name in group})
    for parameter in [p for p in twin.state if id(p) not in copies]:
        del twin.state[parameter]
    for state in twin.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.is_floating_point() and value.ndim:  # a count of steps stays
                state[name] = value.to(dtype)
    return twin
