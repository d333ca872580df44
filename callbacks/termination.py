"""End training on all ranks at one step when one of them is told to, without a wait at every step."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

# Lightning's own way, by the names of its methods; where a version has others, it keeps its own way.
_ASK, _NOTICE = "_broadcast_sigterm_tensor", "_sigterm_notifier_fn"
_CONNECTOR = "_signal_connector"


class _Message:
    """Whether any rank was to stop before one batch, on its way to the host.

    A stream of the GPU's own, `aside`, waits for the sum over ranks, so that the stream of training does not.
    """

    def __init__(self, stop: bool, device: torch.device, aside: torch.cuda.Stream | None) -> None:
        self._sum = torch.full((), int(stop), dtype=torch.int32, device=device)  # kept until it has been copied
        self._work = dist.all_reduce(self._sum, async_op=True)
        self._arrived, self._copied = self._sum, None
        if aside is not None:
            self._arrived = torch.empty((), dtype=torch.int32, pin_memory=True)
            with torch.cuda.stream(aside):
                self._work.wait()
                self._arrived.copy_(self._sum, non_blocking=True)
                self._copied = aside.record_event()

    def read(self) -> bool:
        """Wait for the answer."""
        if self._copied is None:
            self._work.wait()
        else:
            self._copied.synchronize()
        return bool(self._arrived)


class AgreedTermination(Callback):
    """Stop every rank at the same batch after a SIGTERM to any of them.

    Lightning asks rank 0 before each batch and waits for the answer, so that no GPU has work queued when the host
    begins a step (pytorch-lightning #21487). Here each rank sends whether it was told to stop, and reads what the
    ranks sent `lag` batches ago, which has long arrived. One rank alone stops as Lightning stops it.

    Args:
        lag: Batches from the sending to the reading; the host is never further ahead of the device.
    """

    def __init__(self, lag: int = 4) -> None:
        super().__init__()
        self.lag = lag
        self._stop = False
        self._sent: deque[_Message] = deque()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        loop: Any = trainer.fit_loop.epoch_loop
        connector: Any = getattr(trainer, _CONNECTOR, None)
        if stage != "fit" or trainer.world_size == 1 or not (hasattr(loop, _ASK) and hasattr(connector, _NOTICE)):
            return
        self._stop = False
        self._sent.clear()
        device = trainer.strategy.root_device
        aside = torch.cuda.Stream(device) if device.type == "cuda" else None

        def notice(*_: Any) -> None:
            self._stop = True

        def agree() -> None:
            self._sent.append(_Message(self._stop, device, aside))
            if len(self._sent) > self.lag and self._sent.popleft().read():
                connector.received_sigterm = True
                raise SIGTERMException

        setattr(loop, _ASK, agree)
        setattr(connector, _NOTICE, notice)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        vars(trainer.fit_loop.epoch_loop).pop(_ASK, None)  # the classes' own methods are back
        if (connector := getattr(trainer, _CONNECTOR, None)) is not None:
            vars(connector).pop(_NOTICE, None)
