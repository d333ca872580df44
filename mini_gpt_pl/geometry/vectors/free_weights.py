"""A module's loss as a function of one flat vector of weights, in a dtype of its own.

Second derivatives, and gradients at points that training never visits, need the loss as a plain function L(theta). The
module itself is not touched: for one evaluation its weights are replaced by views of the vector, and put back.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector, plain_name

Loss = Callable[[Float[Tensor, " D"]], Float[Tensor, ""]]
"""L(theta) of one batch; differentiable as often as the module's operations are."""


class FreeWeights:
    """Evaluates a module at any weights.

    Weights outside of the selection are copied once and buffers for each evaluation, so that nothing that one does in
    place reaches the module or the next. Attention runs in its plain form, whose derivative has a derivative, compiled
    code eagerly, and casts to a narrower dtype than that of the evaluation (many language models cast their logits to
    float32) are left out. The batch must be in that dtype too, where it has floating numbers.

    Raises:
        UserError: The ranks share the weights (FSDP2, tensor parallelism): no rank could evaluate the loss alone.
            Or some of them are complex.
    """

    def __init__(self, module: nn.Module, selection: ParameterSelection, dtype: torch.dtype = torch.float64) -> None:
        if selection.shards is not None:
            raise UserError(
                "the loss cannot be taken at other weights where the ranks share them (FSDP2, tensor parallelism): "
                "measure on one device or under DDP"
            )
        if any(parameter.is_complex() for parameter in selection.parameters(module)):
            raise UserError("the loss cannot be taken at other complex weights: leave them out by the weight pattern")
        self.selection = selection
        self.dtype = dtype
        self._module = module
        self._start = Vector(selection.flatten(selection.parameters(module), dtype).values, selection)
        named = {plain_name(raw): raw for raw, _ in module.named_parameters()}
        self._raw = [named[name] for name in selection.names]
        fixed = [(raw, p) for raw, p in module.named_parameters() if raw not in set(self._raw)]
        self._fixed = {raw: _copy(tensor, dtype) for raw, tensor in fixed}
        self._buffers = {raw: _copy(tensor, dtype) for raw, tensor in module.named_buffers()}

    @property
    def weights(self) -> Vector:
        """The selected weights as they were, in the dtype."""
        return self._start

    def loss(self, evaluate: Callable[[], Tensor]) -> Loss:
        """Turn what computes a scalar with the module, such as `lambda: module.batch_loss(batch)`, into L(theta)."""
        value = self.value(evaluate)
        return lambda theta: value(theta).reshape(())

    def value(self, evaluate: Callable[[], Tensor]) -> Callable[[Float[Tensor, " D"]], Tensor]:
        """Turn any tensor that the module gives into a function of its weights, as `loss` does a scalar."""
        return lambda theta: self._at(theta.split(self.selection.sizes), evaluate)

    def require_reach(self, evaluate: Callable[[], Tensor]) -> None:
        """Check that the graph of a loss reaches every weight that the loss depends on.

        A flat gradient shows a weight that it does not reach as zero. Such weights are moved, to see whether that
        changes the loss by more than it changes by itself.

        Raises:
            UserError: It does not reach one.
        """
        parts = [part.detach().requires_grad_() for part in self._start.values.split(self.selection.sizes)]
        with torch.enable_grad():
            reached = torch.autograd.grad(self._at(parts, evaluate).sum(), parts, allow_unused=True)
        missing = [name for name, part in zip(self.selection.names, reached, strict=True) if part is None]
        if not missing:
            return
        with torch.no_grad():
            move = [part if r is not None else 1.5 * part + 0.1 for part, r in zip(parts, reached, strict=True)]
            first, again, moved = (float(self._at(at, evaluate)) for at in (parts, parts, move))
        if not abs(moved - first) <= 10 * abs(again - first):
            raise UserError(
                f"the loss of {type(self._module).__name__} depends on {missing[0]!r}, and its graph does not reach "
                "that weight: checkpoint with use_reentrant=False, or leave it out of the pattern"
            )

    def _at(self, parts: Sequence[Tensor], evaluate: Callable[[], Tensor]) -> Tensor:
        shaped = zip(self._raw, parts, self.selection.shapes, strict=True)
        tensors = {f"module.{raw}": part.view(shape) for raw, part, shape in shaped}
        tensors |= {f"module.{raw}": tensor for raw, tensor in self._fixed.items()}
        tensors |= {f"module.{raw}": tensor.clone() for raw, tensor in self._buffers.items()}
        with _twice_differentiable(parts[0].device), _FullWidth(self.dtype) as width:
            try:
                value: Tensor = functional_call(_Call(self._module, evaluate), tensors, ())
            except RuntimeError as error:
                if not width.casts:
                    raise
                raise UserError(
                    f"the loss of {type(self._module).__name__} casts to {width.casts} and cannot be computed in "
                    f"{self.dtype} without that ({str(error).splitlines()[0]}): measure in dtype float32"
                ) from error
        return value


class _FullWidth(TorchDispatchMode):
    """Leaves out casts of floating numbers to a narrower dtype than one; `casts` is the last that was asked for."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.casts: torch.dtype | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dtype = (kwargs or {}).get("dtype")
        narrower = dtype is not None and dtype.is_floating_point and dtype.itemsize < self.dtype.itemsize
        if narrower and args and isinstance(args[0], Tensor) and args[0].dtype == self.dtype:
            self.casts, kwargs = dtype, {**kwargs, "dtype": self.dtype}
        return func(*args, **(kwargs or {}))


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
