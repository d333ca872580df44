"""A strategy for small models on several GPUs: all gradients are summed where they lie, at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from mini_gpt_pl.errors import UserError

NAME = "one_sum"


class OneSumStrategy(DDPStrategy):
    """Data parallelism without buckets: `--trainer.strategy one_sum`.

    `DistributedDataParallel` copies every gradient into a bucket and back, and splits a compiled graph, so that sums
    can overlap with the backward pass. Between GPUs of one host the sum of a small model's gradients takes less time
    than that. Here one grouped operation behind the backward pass takes their mean over the ranks in place. Losses,
    gradients and what callbacks see of them are as under DDP; its options have no meaning. The slower the link, the
    more there is to overlap: between hosts, take DDP.

    Raises:
        UserError: During training, if a parameter that requires a gradient has none.
    """

    _accumulating = False

    @override
    def configure_ddp(self) -> None:
        assert self.model is not None
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            dist.broadcast(tensor.detach(), 0)  # all ranks begin with the weights of the first

    @contextmanager
    @override
    def block_backward_sync(self) -> Iterator[None]:
        self._accumulating = True
        try:
            yield
        finally:
            self._accumulating = False

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        module, precision = self.lightning_module, self.precision_plugin
        assert module is not None
        loss: Tensor = precision.pre_backward(closure_loss, module)
        precision.backward(loss, module, optimizer, *args, **kwargs)
        if not self._accumulating:
            self._average()
        result: Tensor = precision.post_backward(loss, module)  # calls `on_after_backward`
        return result

    def _average(self) -> None:
        """Take the mean of every gradient over the ranks."""
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for gradient in self._gradients():
            by_type.setdefault(gradient.dtype, []).append(gradient)
        averages = dist.get_backend() == "nccl"
        options = dist.AllreduceCoalescedOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.AVG if averages else dist.ReduceOp.SUM)
        for gradients in by_type.values():
            world = dist.group.WORLD
            assert world is not None
            world.allreduce_coalesced(gradients, options).wait()
            for gradient in gradients if not averages else ():
                gradient.div_(self.world_size)

    def _gradients(self) -> Iterator[Tensor]:
        assert self.model is not None
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                yield parameter.grad
            elif parameter.requires_grad:
                raise UserError(
                    f"{name} got no gradient, and the strategy {NAME} takes one of every parameter: "
                    "use --trainer.strategy ddp_find_unused_parameters_true"
                )


StrategyRegistry.register(NAME, OneSumStrategy, description="DDP with one sum of all gradients", override=True)
