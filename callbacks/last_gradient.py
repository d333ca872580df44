"""The gradient of the last backward pass, copied once for all probes that look at it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from mini_gpt_pl.geometry.directions.axes import Axes
from mini_gpt_pl.geometry.optimizer.moments import copies
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector


class LastGradient:
    """A selection's `.grad` as one flat vector, and its products with the directions of the past.

    Probes of one step ask one after another; the second one finds what the first has paid for, as long as nothing has
    written into a gradient, as clipping does. Unscaling leaves no trace, so whoever asks says what factor is on the
    gradients. Memory: D values, from the first question of a step until the next batch. Where ranks share the
    weights, whose gradients do not say when they change, every question is answered anew.

    Args:
        selection: Of the weights.
    """

    def __init__(self, selection: ParameterSelection) -> None:
        self.selection = selection
        self._held: Vector | None = None
        self._vector: Vector | None = None
        self.forget()

    def hold(self, module: nn.Module, scale: float) -> None:
        """Keep the gradient as it is, without a loss scaler's factor, as that of the coming step, until `forget`."""
        self.forget()
        gradient = self.selection.gradients(module)
        self._held = gradient if scale == 1.0 else Vector(gradient.values / scale, self.selection)

    def leave(self) -> bool:
        """Say that `.grad` belongs to other weights now, so that only what is held counts; whether anything is held."""
        self._vector, self.lost = self._held, self._held is None
        return not self.lost

    def forget(self) -> None:
        """Give the memory back; to be called before each batch and each backward pass."""
        self._held = self._vector = None
        self.lost = False
        """Whether the gradient of the weights that the step began from is no longer at hand."""
        self._scale = 1.0
        self._seen: list[tuple[Tensor | None, int]] = []
        self._met: tuple[Axes, tuple[Tensor, Tensor]] | None = None

    def of(self, module: nn.Module, scale: float = 1.0) -> Vector:
        """Flatten the gradients as they are, with a loss scaler's factor on them, in float32; to be read only."""
        if self._held is not None and self._vector is self._held:
            return self._held  # already unscaled
        # The tensors themselves, not what they are called by: another one may lie where a freed one lay.
        seen = [(g, 0 if g is None else g._version) for g in (p.grad for p in self.selection.parameters(module))]
        if (
            self._vector is None
            or self.selection.shards is not None
            or scale != self._scale
            or any(a is not b or v != w for (a, v), (b, w) in zip(seen, self._seen, strict=True))
        ):
            self.forget()
            self._seen, self._scale = seen, scale
            self._vector = self.selection.gradients(module)
        return self._vector

    def meet(
        self, module: nn.Module, axes: Axes, scale: float = 1.0
    ) -> tuple[Float[Tensor, " G1"], Float[Tensor, "N G1"]]:
        """Squared length and coordinates along axes, as `Axes.meet` has them, of what `of` gives."""
        vector = self.of(module, scale)
        if self._met is None or self._met[0] is not axes:
            self._met = (axes, axes.meet(vector))
        return self._met[1]

    def parts(self, module: nn.Module, scale: float = 1.0) -> list[Tensor]:
        """One gradient per weight, in its own width and shape, zero where there is none; to be read only."""
        parameters = self.selection.parameters(module)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        held = self._held is not None and self._vector is self._held
        if held or (self.selection.shards is None and all(g.dtype == torch.float32 for g in gradients)):
            return list(self.selection.unflatten(self.of(module, scale)).values())
        return copies(gradients)


def loss_scale(trainer: Trainer, optimizer: Optimizer) -> float:
    """Factor that fp16 training still has on its gradients when the optimizer unscales them itself (fused)."""
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    return backward_scale(trainer) if fused else 1.0


def backward_scale(trainer: Trainer) -> float:
    """Factor that fp16 training has on its gradients right after the backward pass."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())
