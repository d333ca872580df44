"""Training without weight decay whose weights shrink as those of a decayed run did: scale apart from learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.runs.folder import Run

NORM = "eval/weight_norm"


class TiedNorm(Callback):
    """After every optimizer step, rescale all parameters together to the norm that another run had at that step.

    Between the steps at which the other run recorded its norm, the logarithm is interpolated linearly (as under
    constant decay); before the first, from this run's initial norm; after the last, the norm stays.

    Where the other run decayed all parameters at one rate, this is that decay over again, at the rate that keeps the
    norm: the two differ by rounding and by the interpolation. It says that nothing of decay but the norm mattered;
    scale apart from decay would take a model whose norm does not matter.

    The optimizer decays nothing, so the decaying walk of `TrajectoryRecorder` is here the walk without decay. The model
    is to be trained by one optimizer.

    Args:
        run: Folder of the run whose norm is followed.

    Raises:
        UserError: That run recorded no norm, or the optimizer decays the weights as well.
    """

    def __init__(self, run: str) -> None:
        norms = Run(Path(run)).series(NORM)
        if norms.empty:
            raise UserError(f"TiedNorm: the run {run} recorded no {NORM}: give one with an Evaluation callback")
        self.run = run
        self._steps = norms.index.to_numpy(dtype=float)
        self._logs = np.log(norms.to_numpy(dtype=float))
        self._hooks: list[RemovableHandle] = []

    def norm_at(self, step: int) -> float:
        """The norm that the weights are to have after an optimizer step."""
        return float(np.exp(np.interp(step, self._steps, self._logs)))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if any(group.get("weight_decay") for optimizer in trainer.optimizers for group in optimizer.param_groups):
            raise UserError("TiedNorm replaces weight decay: give the optimizer weight_decay 0")
        parameters: list[Tensor] = list(pl_module.parameters())
        if trainer.global_step == 0 and self._steps[0] > 0:
            own = torch.nn.utils.get_total_norm([parameter.detach() for parameter in parameters])
            self._steps = np.concatenate([[0.0], self._steps])
            self._logs = np.concatenate([[float(own.log())], self._logs])

        # Before anything that looks at the step, wherever in the list of callbacks this one is.
        @torch.no_grad()
        def rescale(*_: Any) -> None:
            target = self.norm_at(trainer.global_step + 1)  # the step is counted when it is over
            torch._foreach_mul_(parameters, target / torch.nn.utils.get_total_norm(parameters))

        self._hooks = [optimizer.register_step_post_hook(rescale) for optimizer in trainer.optimizers]

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps.tolist(), "logs": self._logs.tolist()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # With this run's own initial norm, which a resumed run no longer has.
        self._steps, self._logs = np.array(state_dict["steps"]), np.array(state_dict["logs"])

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)
