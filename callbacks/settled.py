"""Spare the garbage collector what stays."""

from __future__ import annotations

import gc
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override


class SettledObjects(Callback):
    """Take out of Python's garbage collection what is alive after the first steps.

    Compiled graphs are hundreds of thousands of objects that stay. Each full collection walks through all of them,
    which takes the host several steps' time, and the device then waits.

    Args:
        after: Optimizer steps of this process after which everything alive is exempt; by then a model is compiled.
    """

    def __init__(self, after: int = 10) -> None:
        super().__init__()
        self.after = after
        self._first = 0
        self._frozen = False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first, self._frozen = trainer.global_step, False

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._frozen and trainer.global_step - self._first >= self.after:
            self._frozen = True
            gc.collect()
            gc.freeze()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._frozen:
            self._frozen = False
            gc.unfreeze()
