"""What a W&B run needs beyond its logger: axes, summaries, and a trace through resumed and reheated runs."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from typing_extensions import override

_AXIS = "trainer/global_step"
_FAMILIES = ("train", "val", "probe", "backbone", "alignment", "reheat", "fisher", "anatomy", "switching")
_SUMMARIES = {"val/loss": "min", "probe/p_in": "max", "probe/p_ood": "max"}


class WandbSegments(Callback):
    """Define metric axes and summaries, and remember the run's id in checkpoints.

    An offline run cannot be appended to, so a resumed training is a new segment in the group of the first one, whose
    id `config.resumed_from` names.

    Attributes:
        run_id: Of the current segment.
        group: Id of the first segment.
    """

    def __init__(self) -> None:
        super().__init__()
        self.run_id = ""
        self.group = ""
        self._resumed_from = ""

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and trainer.is_global_zero:
                self._define(logger)

    def _define(self, logger: WandbLogger) -> None:
        run: Any = logger.experiment
        for family in _FAMILIES:
            run.define_metric(f"{family}/*", step_metric=_AXIS)
        for name, kind in _SUMMARIES.items():
            run.define_metric(name, step_metric=_AXIS, summary=kind)
        self.run_id = str(run.id)
        self.group = self.group or self.run_id
        if self._resumed_from:
            run.config.update({"resumed_from": self._resumed_from, "first_segment": self.group})

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"run_id": self.run_id, "group": self.group}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed_from, self.group = state_dict["run_id"], state_dict["group"]
