"""What a W&B run needs beyond its logger: its axis, summaries, a trace through resumed and reheated runs, artifacts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import override

from mini_gpt_pl.callbacks.trajectory import TRAJECTORY_FILE, TrajectoryRecorder
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.path import pca
from mini_gpt_pl.metrics.registry import metrics

AXIS = "trainer/global_step"
TYPE = "geometry"

When = Literal["end", "checkpoints", "never"]


class WandbSegments(Callback):
    """Define the step axis and summaries, remember the run's id in checkpoints, and keep the geometry as an artifact.

    An offline run cannot be appended to, so a resumed training is a new segment in the group of the first one, whose
    id `config.resumed_from` names. At the end of a run, however it ends, the recorder's Gram matrices become the
    artifact `geometry-<run id>` of type `geometry`, a few hundred kilobytes: inner products of theta_0 and the
    increments, (G, T+1, T+1) in float64. A reheated run declares that it uses its parent's. Without a WandbLogger the
    callback does nothing.

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

    def __init__(self, artifact: When = "end", basis: bool = False) -> None:
        super().__init__()
        if artifact not in get_args(When):
            raise UserError(f"WandbSegments: artifact is {artifact!r}: choose from {', '.join(get_args(When))}")
        self.artifact = artifact
        self.basis = basis
        self.run_id = ""
        self.group = ""
        self._resumed_from = ""

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for run in self._runs(trainer):
            # The logger does the same, but not for a run that it finds open; every metric comes with its step.
            run.define_metric("*", step_metric=AXIS, step_sync=True)
            for metric in metrics():  # a best value is kept as `<metric>.<min or max>`
                if metric.best:
                    run.define_metric(metric.name, step_metric=AXIS, summary=metric.best)
            self.run_id = str(run.id)
            self.group = self.group or self.run_id
            if self._resumed_from:
                run.config.update({"resumed_from": self._resumed_from, "first_segment": self.group})
            if parent := run.config.get("parent_run"):
                use_parent(run, f"{TYPE}-{parent}:latest")

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

    def _log_geometry(self, trainer: Trainer) -> None:
        """Hand the Gram matrices to W&B; nothing before a second snapshot."""
        recorder = next((c for c in trainer.callbacks if isinstance(c, TrajectoryRecorder)), None)  # type: ignore[attr-defined]
        if recorder is None or (trajectory := recorder.trajectory) is None or len(trajectory) < 2:
            return
        file, last = Path(recorder.dirpath or trainer.default_root_dir) / TRAJECTORY_FILE, trajectory.steps[-1]
        for run in self._runs(trainer) if file.is_file() else ():
            if run.disabled:
                continue
            import wandb  # there is a WandbLogger, and so there is wandb

            metadata = {
                "run": run.id,
                "snapshots": len(trajectory),
                "last_step": last,
                "whole": recorder.name,
                "groups": list(trajectory.groups),
                "dim": trajectory.dim,
                "fingerprint": trajectory.fingerprint,
            }
            words = "Gram matrices of the weight trajectory"
            artifact = wandb.Artifact(f"{TYPE}-{run.id}", TYPE, words, metadata=metadata)
            # A copy, as a resumed run writes the file anew before this one is sent; beside W&B's own files.
            folder = Path(run.dir).parent / TYPE / f"step-{last}"
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / TRAJECTORY_FILE)
            if self.basis and (tensors := basis_tensors(recorder)):
                save_file(tensors, folder / "basis.safetensors")
            elif self.basis:
                rank_zero_info("no basis artifact: the ranks share the weights, and none holds a whole direction")
            for part in sorted(folder.iterdir()):
                artifact.add_file(str(part.resolve()), part.name, policy="immutable", skip_cache=True)
            run.log_artifact(artifact, aliases=["latest", f"step-{last}"])

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"run_id": self.run_id, "group": self.group}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed_from, self.group = state_dict["run_id"], state_dict["group"]


def basis_tensors(recorder: TrajectoryRecorder) -> dict[str, Tensor]:
    """Materialise the backbone of the snapshots so far and theta_0.

    Returns:
        `v_b/<weight>` and `theta_0/<weight>` on the host, each in the shape of the weight; v_b is a unit vector over
        all of them. Empty where the ranks share the weights, and before a second snapshot.
    """
    backbone, selection, trajectory = recorder.backbone(), recorder.selection, recorder.trajectory
    if backbone is None or trajectory is None or selection.shards is not None:
        return {}
    count = len(trajectory)
    theta0 = recorder.direction(pca.theta0(count).expand(len(trajectory.groups), count))
    return {
        f"{axis}/{name}": tensor.cpu().contiguous()
        for axis, vector in (("v_b", backbone[1]), ("theta_0", theta0))
        for name, tensor in selection.unflatten(vector).items()
    }


def use_parent(run: Any, name: str) -> None:
    """Declare that a W&B run starts from another's geometry, the artifact of that name and version.

    Its name is in the configuration as `parent_artifact` in any case: offline, W&B cannot look an artifact up.
    """
    run.config.update({"parent_artifact": name}, allow_val_change=True)
    if run.offline or run.disabled:
        return
    try:
        run.use_artifact(name, type=TYPE)
    except Exception as error:  # the client raises plain exceptions too; training must not end over a missing link
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        rank_zero_warn(f"W&B has no artifact {name} of the parent run ({reason}): only the configuration names it")
