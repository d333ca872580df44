"""The gradient of the last backward pass, copied once for all probes that look at it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mini_gpt_pl.geometry.axes import Axes
from mini_gpt_pl.geometry.moments import copies
from mini_gpt_pl.geometry.selection import ParameterSelection, Vector


class LastGradient:
    """A selection's `.grad` as one flat vector, and its products with the directions of the past.

    Probes of one step ask one after another; the second one finds what the first has paid for, as long as nothing has
    written into a gradient, as clipping does. Unscaling leaves no trace, so whoever asks says what factor is on the
    gradients. Memory: D values, from the first question of a step until the next backward pass. Where ranks share the
    weights, whose gradients do not say when they change, every question is answered anew.

    Args:
        selection: Of the weights.
    """

    def __init__(self, selection: ParameterSelection) -> None:
        self.selection = selection
        self.forget()

    def forget(self) -> None:
        """Give the memory back; to be called before each backward pass."""
        self._state: list[tuple[int, float]] = []
        self._vector: Vector | None = None
        self._met: tuple[Axes, tuple[Tensor, Tensor]] | None = None

    def of(self, module: nn.Module, scale: float = 1.0) -> Vector:
        """Flatten the gradients as they are, in float32; to be read only.

        Args:
            module: Whose.
            scale: Factor that a loss scaler has on them now.
        """
        gradients = [parameter.grad for parameter in self.selection.parameters(module)]
        state = [(0, scale), *((0, 0) if g is None else (id(g), g._version) for g in gradients)]
        if self._vector is None or self.selection.shards is not None or state != self._state:
            self.forget()
            self._state, self._vector = state, self.selection.gradients(module)
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
        if self.selection.shards is None and all(g.dtype == torch.float32 for g in gradients):
            return list(self.selection.unflatten(self.of(module, scale)).values())
        return copies(gradients)
