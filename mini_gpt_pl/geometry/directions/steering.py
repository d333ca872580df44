r"""Take a vector apart by a subspace, and put it together again otherwise.

With P the projection on a basis, every intervention in a step is one linear map,

    x  ->  a P x + b (x - P x),

with a gain for the parallel and one for the orthogonal part:

| gains | what is done |
|---|---|
| a = 1, b = 1 - s | orthogonal part suppressed; with s = 1 only the parallel part is kept |
| a = 0, b = 1 | parallel part removed |
| a = b = 1 - s | everything scaled, nothing selected |
| a = 1 / (1 - s), b = 1 | parallel part amplified, nothing suppressed |

Adam divides by the size of past gradients, so a constant factor on all of them changes nothing but its eps. To it the
first row (s < 1) IS the last one: g_par + (1 - s) g_perp = (1 - s) (g + s / (1 - s) g_par).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mini_gpt_pl.geometry.directions.subspace import Basis
from mini_gpt_pl.geometry.vectors.products import squared_length
from mini_gpt_pl.geometry.vectors.selection import Vector


@dataclass(frozen=True, eq=False)
class Steering:
    """The map x -> a P x + b (x - P x), on tensors by the name of their weight.

    The basis is None where both gains, `parallel` a and `orthogonal` b, are the same. With `others`, weights that are
    not the basis' belong to the orthogonal part; else they stay as they are.

    Raises:
        ValueError: The gains differ, and there is no basis to tell the parts by.

    Example:
        >>> from mini_gpt_pl.geometry.vectors.selection import ParameterSelection
        >>> selection = ParameterSelection(("w",), ((2,),), ("all",))
        >>> basis = Basis.of(selection, [("w", slice(0, 2), torch.tensor([[1.0, 0.0]]))])
        >>> tensors = {"w": torch.tensor([3.0, 4.0]), "bias": torch.tensor([2.0])}
        >>> Steering(basis, parallel=1.0, orthogonal=0.5).apply_(tensors)
        >>> tensors
        {'w': tensor([3., 2.]), 'bias': tensor([1.])}
    """

    basis: Basis | None
    parallel: float
    orthogonal: float
    others: bool = True

    def __post_init__(self) -> None:
        if self.basis is None and self.parallel != self.orthogonal:
            raise ValueError("different gains for two parts need a basis that tells them apart")

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing, so that it need not be applied: rounding would change something."""
        return self.parallel == self.orthogonal == 1.0

    @torch.no_grad()
    def apply_(self, tensors: Mapping[str, Tensor]) -> None:
        """Change tensors in place: one for each weight that there is, such as gradients, by plain name.

        Weights of the basis that have none count as zero.
        """
        changed = {name: tensor for name, tensor in tensors.items() if self._is_mine(name)}
        inside: dict[str, Tensor] = {}
        if self.parallel != self.orthogonal:  # before anything changes
            assert self.basis is not None
            inside = self.basis.selection.unflatten(self.basis.parallel(self._flat(tensors)))
        if self.orthogonal != 1.0 and changed:
            torch._foreach_mul_(list(changed.values()), self.orthogonal)
        if met := [name for name in inside if name in changed]:
            parts = [inside[name].to(changed[name].dtype) for name in met]
            torch._foreach_add_([changed[name] for name in met], parts, alpha=self.parallel - self.orthogonal)

    @torch.no_grad()
    def measure(self, tensors: Mapping[str, Tensor]) -> dict[str, Float[Tensor, ""]]:
        """What `apply_` would change: lengths as shares of |x|, on the tensors' device, NaN for a zero vector.

        `change` = |x' - x| / |x|; with a basis also `parallel` = |P x| / |x| and `parallel_null`, the root of the share
        that as many random directions in the same blocks hold on average.
        """
        squares = {name: squared_length(tensor) for name, tensor in tensors.items()}
        total = torch.stack(list(squares.values())).sum()
        mine = torch.stack([s for name, s in squares.items() if self._is_mine(name)] or [0.0 * total]).sum()
        if self.basis is None:
            return {"change": torch.where(total > 0, (mine / total).sqrt() * abs(self.orthogonal - 1.0), torch.nan)}
        dim = sum(tensor.numel() for tensor in tensors.values())
        projection = replace(self.basis.project(self._flat(tensors)), total=total, dim=dim)
        share = projection.share
        across = (self.orthogonal - 1.0) ** 2 * (mine / total - share).clamp_min(0.0)
        change = ((self.parallel - 1.0) ** 2 * share + across).sqrt()
        return {"parallel": projection.ratio, "parallel_null": projection.matched.sqrt(), "change": change}

    def _is_mine(self, name: str) -> bool:
        return self.others or (self.basis is not None and name in self.basis.selection.names)

    def _flat(self, tensors: Mapping[str, Tensor]) -> Vector:
        """The tensors of the basis' weights as one vector, in the dtype of its rows."""
        assert self.basis is not None
        selection, rows = self.basis.selection, self.basis.blocks[0].rows
        shaped = zip(selection.names, selection.shapes, strict=True)
        parts = [tensors[name] if name in tensors else rows.new_zeros(shape) for name, shape in shaped]
        return selection.flatten(parts, rows.dtype)
