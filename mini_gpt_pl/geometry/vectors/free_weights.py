"""A module's loss as a function of one flat vector of weights, in a dtype of its own.

Second derivatives, and gradients at points that training never visits, need the loss as a plain function L(theta). The
module itself is not touched: for one evaluation its weights are replaced by views of the vector, and put back.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector, plain_name

Loss = Callable[[Float[Tensor, " D"]], Float[Tensor, ""]]
"""L(theta) of one batch; differentiable as often as the module's operations are."""


class FreeWeights:
    """Evaluates a module at any weights.

    Weights outside of the selection, and buffers, are copied once, so that nothing that an evaluation does in place
    reaches the module. Attention runs in its plain form, whose derivative has a derivative, and compiled code eagerly.

    Args:
        module: Owner of the weights.
        selection: The weights that are free.
        dtype: Of the evaluation. The batch must be in it too, where it has floating numbers.

    Raises:
        UserError: The ranks share the weights (FSDP2, tensor parallelism): no rank could evaluate the loss alone.
    """

    def __init__(self, module: nn.Module, selection: ParameterSelection, dtype: torch.dtype = torch.float64) -> None:
        if selection.shards is not None:
            raise UserError(
                "the loss cannot be taken at other weights where the ranks share them (FSDP2, tensor parallelism): "
                "measure on one device or under DDP"
            )
        self.selection = selection
        self.dtype = dtype
        self._module = module
        self._start = Vector(selection.flatten(selection.parameters(module), dtype).values, selection)
        named = {plain_name(raw): raw for raw, _ in module.named_parameters()}
        self._raw = [named[name] for name in selection.names]
        fixed = [(raw, p) for raw, p in module.named_parameters() if raw not in set(self._raw)]
        self._fixed = {raw: _copy(tensor, dtype) for raw, tensor in [*fixed, *module.named_buffers()]}

    @property
    def weights(self) -> Vector:
        """The selected weights as they were, in the dtype."""
        return self._start

    def loss(self, evaluate: Callable[[], Tensor]) -> Loss:
        """Turn a loss of the module as it stands into a function of its weights.

        Args:
            evaluate: Computes a scalar of one batch with the module, such as `lambda: module.batch_loss(batch)`.
        """
        value = self.value(evaluate)
        return lambda theta: value(theta).reshape(())

    def value(self, evaluate: Callable[[], Tensor]) -> Callable[[Float[Tensor, " D"]], Tensor]:
        """Turn any tensor that the module gives into a function of its weights, as `loss` does a scalar."""
        call = _Call(self._module, evaluate)

        def at(theta: Float[Tensor, " D"]) -> Tensor:
            parts = theta.split(self.selection.sizes)
            shaped = zip(self._raw, parts, self.selection.shapes, strict=True)
            tensors = {f"module.{raw}": part.view(shape) for raw, part, shape in shaped}
            tensors |= {f"module.{raw}": tensor for raw, tensor in self._fixed.items()}
            with _twice_differentiable(theta.device):
                found: Tensor = functional_call(call, tensors, ())
            return found

        return at


class _Call(nn.Module):
    """Gives `functional_call` a forward: the loss."""

    def __init__(self, module: nn.Module, evaluate: Callable[[], Tensor]) -> None:
        super().__init__()
        self.module = module
        self.evaluate = evaluate

    def forward(self) -> Tensor:
        return self.evaluate()


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype, copy=True) if tensor.is_floating_point() else tensor.detach().clone()


@contextmanager
def _twice_differentiable(device: torch.device) -> Iterator[None]:
    """No autocast, no fused attention, no compiled graph: none of them has a second derivative in every dtype."""
    with torch.autocast(device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it takes a second
            with torch.compiler.set_stance("force_eager"):
                yield
        else:
            yield
