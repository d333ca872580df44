"""Bases of the probes that look at the weights of a recorder, and at the steps that move them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from mini_gpt_pl.callbacks.probe import DeferringProbe, Probe
from mini_gpt_pl.callbacks.trajectory import TrajectoryRecorder, find_recorder
from mini_gpt_pl.observation.steps import Step


class RecordedProbe(Probe):
    """A probe of the weights that the trainer's TrajectoryRecorder records.

    Raises:
        UserError: The trainer has no TrajectoryRecorder.
    """

    _recorder: TrajectoryRecorder | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._recorder = find_recorder(trainer, type(self).__name__)
        super().setup(trainer, pl_module, stage)

    @property
    def recorder(self) -> TrajectoryRecorder:
        """The callback that owns the weights' order and the backbone."""
        if self._recorder is None:
            raise RuntimeError("the probe is used before Trainer.fit has set it up")
        return self._recorder


class StepProbe(RecordedProbe, DeferringProbe):
    """A probe that looks at what an optimizer does in a step; the recorder calls it (`TrajectoryRecorder.attach`)."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.recorder.attach(self)

    def before_step(self, step: Step) -> None:
        """Look at the weights, which have not moved yet, and at their complete, unclipped gradient."""

    def after_step(self, step: Step) -> None:
        """Look at the weights, which have just moved; `.grad` is still what the step was made of."""

    def _keep(self, step: int, family: str, numbers: Mapping[str, Tensor | float]) -> None:
        """Keep numbers until they are logged as `<family>/<group>/<quantity>`.

        A number is of the whole selection, G values are of the groups, and the last of G + 1 is of the whole. They lie
        on one device.
        """
        names: list[str] = []
        tensors = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in numbers.items()}
        for quantity, values in tensors.items():
            labels = self.recorder.labels[-1:] if values.ndim == 0 else self.recorder.labels[: len(values)]
            names += [f"{family}/{label}/{quantity}" for label in labels]
        if names:
            self._deferred.add(step, names, torch.cat([values.reshape(-1) for values in tensors.values()]))
