"""End a diverged run in order, with all that it recorded."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from mini_gpt_pl.runs.logs import logging_due


class StopOnDivergence(Callback):
    """Stop training when the loss is no longer finite.

    The flag is kept on the device and read when the trainer logs, so a run may go on for `log_every_n_steps` steps.

    Attributes:
        step: Optimizer step at which the divergence was noticed, or None.
    """

    def __init__(self) -> None:
        super().__init__()
        self.step: int | None = None
        self._bad: Tensor | None = None

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if not isinstance(loss, Tensor):
            return
        bad = ~torch.isfinite(loss.detach()).all()
        self._bad = bad if self._bad is None else self._bad | bad
        if logging_due(trainer, trainer.global_step) and self._noticed(trainer):
            self.step = trainer.global_step
            trainer.should_stop = True
            rank_zero_info(
                f"the loss is not finite at step {self.step}: training ends here, what was recorded is kept; "
                "try a lower learning rate, a longer warm-up or gradient clipping"
            )

    def _noticed(self, trainer: Trainer) -> bool:
        assert self._bad is not None
        bad, self._bad = bool(self._bad), None
        return trainer.strategy.reduce_boolean_decision(bad, all=False)
