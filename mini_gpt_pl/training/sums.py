"""Torchmetrics whose state is one tensor of sums, which takes one reduction over the ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from mini_gpt_pl.runs.logs import to_host


class Sums(Metric):
    """Sums of several quantities by name.

    All sums are one tensor on the module's device, so that `compute` takes one `all_reduce`: torchmetrics on its own
    gathers each state from each rank, behind a barrier and an exchange of shapes, and the host waits for the device.
    The state is in no checkpoint, and nothing moves to the host before `compute`.

    Example:
        >>> sums = Sums(["train/loss", "train/answers"])
        >>> for loss, answers in ((2.5, 1.0), (1.5, 3.0)):
        ...     sums.update(torch.tensor([loss, answers]))
        >>> {name: float(value) for name, value in sums.compute().items()}
        {'train/loss': 4.0, 'train/answers': 4.0}
    """

    full_state_update = False
    sums: Tensor
    columns: tuple[int, ...] = ()
    """Shape of one sum."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(dist_sync_fn=_sum_over_ranks)
        self.names = tuple(names)
        self.add_state("sums", torch.zeros(len(self.names), *self.columns), dist_reduce_fx="sum", persistent=False)

    @override
    def update(self, values: Float[Tensor, " names"]) -> None:
        """Add one value to each sum, in the order of the names; float64 values make float64 sums."""
        self.sums = self.sums + values

    @override
    def compute(self) -> Mapping[str, Tensor | float]:
        """Return the sums over all updates of all ranks, a scalar on the device by name."""
        return dict(zip(self.names, self.sums.unbind(), strict=True))


class Means(Sums):
    """Means of several quantities by name: sums of values over sums of weights, in float32.

    Example:
        >>> means = Means(["val/loss", "probe/p_in"])
        >>> means.update("val/loss", torch.tensor(6.0), torch.tensor(2))
        >>> means.update("val/loss", torch.tensor(2.0), torch.tensor(2))
        >>> means.compute()
        {'val/loss': 2.0, 'probe/p_in': nan}
    """

    columns = (2,)  # value and weight

    @override
    def update(self, name: str, total: Float[Tensor, ""], weight: Tensor) -> None:  # type: ignore[override]
        """Add the sum of some values, and their number or the sum of their weights, to one mean."""
        self.sums[self.names.index(name)].add_(torch.stack([total.float(), weight.float()]))

    @override
    def compute(self) -> dict[str, float]:
        """Return the means over all updates of all ranks, moved to the host at once; NaN where nothing was added."""
        return to_host(dict(zip(self.names, self.sums[:, 0] / self.sums[:, 1], strict=True)))


def _sum_over_ranks(values: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Give torchmetrics, which asks for one tensor of each rank, their sum alone.

    Not by the strategy's own reduction: it begins with a barrier.
    """
    total = values.clone()
    dist.all_reduce(total, group=group)
    return [total]
