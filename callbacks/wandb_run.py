"""What a W&B run needs beyond its logger: its axis, summaries, a trace through resumed and reheated runs, artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from typing_extensions import override

from mini_gpt_pl.callbacks.trajectory import TrajectoryRecorder
from mini_gpt_pl.callbacks.wandb_artifacts import artifact_name, log_geometry, use_parent
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.metrics.registry import metrics

AXIS = "trainer/global_step"

_WHEN = ("end", "checkpoints", "never")


class WandbSegments(Callback):
    """Define the step axis and summaries, remember the run's id in checkpoints, and keep the geometry as an artifact.

    An offline run cannot be appended to, so a resumed training is a new segment in the group of the first one, whose
    id `config.resumed_from` names. At the end of a run, however it ends, the recorder's Gram matrices become the
    artifact `geometry-<run id>` of type `geometry`, a few hundred kilobytes; a reheated run declares that it uses its
    parent's.
    Without a WandbLogger the callback does nothing.

    The command line adds one with these defaults in front of the configured callbacks; the last one listed acts.

    Args:
        artifact: When to log the artifact: at the end, at every checkpoint too (as versions of it), or never.
        basis: Also store the backbone v_b and theta_0 as vectors, 8 bytes for each recorded weight.

    Attributes:
        run_id: Of the current segment.
        group: Id of the first segment.

    Raises:
        UserError: `artifact` is none of these.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[WandbSegments(artifact="checkpoints")])
    """

    def __init__(self, artifact: Literal["end", "checkpoints", "never"] = "end", basis: bool = False) -> None:
        super().__init__()
        if artifact not in _WHEN:
            raise UserError(f"WandbSegments: artifact is {artifact!r}: choose from {', '.join(_WHEN)}")
        self.artifact = artifact
        self.basis = basis
        self.run_id = ""
        self.group = ""
        self._resumed_from = ""

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for run in self._runs(trainer):
            self._define(run)
            if parent := run.config.get("parent_run"):
                use_parent(run, f"{artifact_name(str(parent))}:latest")

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not on_train_end: the recorder takes its last snapshot there, and may come after this callback.
        if self.artifact != "never":
            self._log_geometry(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.artifact != "never" and self.run_id:
            self._log_geometry(trainer)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.artifact == "checkpoints":
            self._log_geometry(trainer)

    def _runs(self, trainer: Trainer) -> list[Any]:
        """The W&B runs that this callback speaks for: none on other ranks, nor where a later one was listed."""
        last = [c for c in trainer.callbacks if isinstance(c, WandbSegments)][-1]  # type: ignore[attr-defined]
        if not trainer.is_global_zero or last is not self:
            return []
        return [logger.experiment for logger in trainer.loggers if isinstance(logger, WandbLogger)]

    def _define(self, run: Any) -> None:
        # The logger does the same, but not for a run that it finds open; every metric comes with its step.
        run.define_metric("*", step_metric=AXIS, step_sync=True)
        for metric in metrics():  # a best value is kept as `<metric>.<min or max>`
            if metric.best:
                run.define_metric(metric.name, step_metric=AXIS, summary=metric.best)
        self.run_id = str(run.id)
        self.group = self.group or self.run_id
        if self._resumed_from:
            run.config.update({"resumed_from": self._resumed_from, "first_segment": self.group})

    def _log_geometry(self, trainer: Trainer) -> None:
        recorder = next((c for c in trainer.callbacks if isinstance(c, TrajectoryRecorder)), None)  # type: ignore[attr-defined]
        if recorder is None:
            return
        for run in self._runs(trainer):
            log_geometry(run, recorder, Path(trainer.default_root_dir), basis=self.basis)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"run_id": self.run_id, "group": self.group}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed_from, self.group = state_dict["run_id"], state_dict["group"]
