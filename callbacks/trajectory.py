"""Record the trajectory of selected weights, and show its backbone while it grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from callbacks.probe import Estimate, Probe
from callbacks.schedule import Schedule
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry import nulls, pca
from mini_gpt_pl.geometry.moments import decay_rate, is_trained
from mini_gpt_pl.geometry.rows import IncrementRows, Place, memory_of
from mini_gpt_pl.geometry.selection import ParameterSelection, Vector
from mini_gpt_pl.geometry.snapshots import SnapshotFolder
from mini_gpt_pl.geometry.trajectory import Trajectory
from mini_gpt_pl.logs import log_now, resume_tables

TRAJECTORY_FILE = "trajectory.safetensors"
SNAPSHOT_FOLDER = "snapshots"

# The live metrics that are shown beside their null and their excess over it.
CALIBRATED = (
    *("pc1", "pc1_unit", "k95", "k99", "cos_theta0", "pc1_corrected", "participation"),
    *("persistence", "autocorrelation", "coordinate", "residual", "fraction"),
)

_T = TypeVar("_T")


class TrajectoryRecorder(Probe):
    r"""Snapshot selected weights on a schedule and keep the trajectory as Gram matrices.

    A snapshot costs one row of inner products. Everything shown live uses snapshots up to now only. Logged per group
    and for the whole selection, under `backbone/<group>/`: the numbers of `nulls.statistics` (pc1, pc1_unit with rows
    scaled to unit length, k95, drift ||x||, cos_theta0 = cos(v_b, theta_0), persistence, autocorrelation of updates,
    pc1_corrected with the decay of theta_0 taken out, ...), those of `CALIBRATED` also as `<name>_null`, what a
    decaying walk with the same step lengths gives, and `<name>_excess`; coordinate a, residual ||r||, fraction
    a^2/||x||^2; and `alignment/<group>/update`, the cosine of the latest increment with the backbone of the snapshots
    before it, with `_null` and `_excess` too.

    Args:
        pattern: Which weights, searched in their names; a group `(?P<group>...)` in it cuts them into blocks.
        schedule: When to take a snapshot; steps 0 and the last are always taken.
        name: Of the whole selection, in metric names.
        dirpath: Folder for `snapshots/` and `trajectory.safetensors`; the trainer's root folder for None.
        dtype: Of the stored increments; bfloat16 halves memory and disk, its rounding is fed back.
        keep_on: Where the rows stay (D values a snapshot), and so what training waits for at a snapshot: with the
            `model`, a pass over them at the device's speed; in the host's memory (`cpu`), one at its speed; on `disk`,
            reading them all, once for the snapshot and once for the directions, while memory does not grow with the
            snapshots. `geometry.rows.memory_of` has the bytes.
        write_snapshots: Without the files a run cannot be resumed, reheated against its own basis or replayed.
        max_pending: With `disk`, rows that may wait in memory to be written; when there are more, training waits for
            the disk and says how long. Elsewhere it never does, as the rows are in memory anyway.

    Raises:
        UserError: The pattern selects nothing, a resumed run's snapshots are missing or of another model, or rows are
            to be kept on disk and not written.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> recorder = TrajectoryRecorder(r"(?P<group>layer\d)\..*weight", Schedule(every=100))
        >>> trainer = Trainer(callbacks=[recorder])
    """

    stretchable = False  # its schedule defines what is measured

    def __init__(
        self,
        pattern: str,
        schedule: Schedule = Schedule(every=200),  # noqa: B008 (frozen)
        name: str = "trunk",
        dirpath: str | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        keep_on: Place = "model",
        write_snapshots: bool = True,
        max_pending: int = 2,
    ) -> None:
        super().__init__(schedule)
        if keep_on == "disk" and (not write_snapshots or max_pending < 1):
            raise UserError("keep_on disk keeps the rows in their files: set write_snapshots true and max_pending >= 1")
        self.pattern = pattern
        self.name = name
        self.dirpath = dirpath
        self.dtype = getattr(torch, dtype)
        self.keep_on = keep_on
        self.write_snapshots = write_snapshots
        self.max_pending = max_pending
        self.trajectory: Trajectory | None = None
        self._rows: IncrementRows | None = None
        self._folder: SnapshotFolder | None = None
        self._file: Path | None = None
        self._restored: dict[str, Any] | None = None
        self._survival = 1.0
        self._device = torch.device("cpu")
        self._directions: tuple[int, Vector, Vector] | None = None
        self._decayed: Tensor | None = None

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(pattern=self.pattern, name=self.name)

    @property
    def selection(self) -> ParameterSelection:
        """The recorded weights and their order; known from `on_fit_start` on."""
        return _need(self._rows).selection

    def backbone(self) -> tuple[Vector, Vector] | None:
        """Directions of the snapshots so far: each group's own backbone, and that of the whole selection.

        On the model's device, wherever the rows are kept. None until a second snapshot has been taken.
        """
        trajectory, rows = _need(self.trajectory), _need(self._rows)
        if len(trajectory) < 2:
            return None
        if self._directions is None or self._directions[0] != len(trajectory):
            self._directions = None  # makes room for the new ones
            own, whole = backbone_vectors(trajectory, rows)
            self._directions = (len(trajectory), own.to(self._device), whole.to(self._device))
        return self._directions[1:]

    @override
    def estimate(self, steps: int, dim: int) -> Estimate:
        snapshots = 2 + sum(self.schedule.due(step) for step in range(1, steps))
        found = memory_of(self.keep_on, snapshots, dim, self.dtype.itemsize, self.write_snapshots, self.max_pending)
        return Estimate(type(self).__name__, bytes=found.device, passes=0.0, host=found.host, disk=found.disk)

    def decay(self, optimizer: Optimizer) -> float:
        """Share of the recorded weights that weight decay takes in one step of an optimizer; 0 if it is another's.

        Read from the first of them that is trained: the nulls know one rate.
        """
        if self._decayed is None or not is_trained(optimizer, self._decayed):
            return 0.0
        return decay_rate(optimizer, self._decayed)

    def direction(self, coefficients: Float[Tensor, "G n"]) -> Vector:
        """Materialise a direction over the basis (theta_0, d_1, ...), one set of coefficients per group.

        On the model's device, wherever the rows are kept.
        """
        return _need(self._rows).combine(coefficients).to(self._device)

    # ------------------------------------------------------------------------------------------------ hooks

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.trajectory, self._rows, self._folder = None, None, None
            self._directions, self._restored, self._survival = None, None, 1.0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in setup: a module may make, and a strategy share out, its weights after that.
        selection = ParameterSelection.of(pl_module, self.pattern)
        root = Path(self.dirpath or trainer.default_root_dir)
        limit = self.max_pending if self.keep_on == "disk" else None
        self._folder = SnapshotFolder(root / SNAPSHOT_FOLDER, selection, limit)
        self._file = root / TRAJECTORY_FILE
        self._rows = IncrementRows(selection, self.dtype, torch.device("cpu") if self.keep_on == "cpu" else None)
        self.trajectory = Trajectory.empty(selection)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._device = pl_module.device
        self.stepped(trainer)
        self._decayed = next((p for p in self.selection.parameters(pl_module) if p.requires_grad), None)
        if self._restored is not None:
            self._restore(trainer, pl_module)
        elif not _need(self.trajectory).steps:
            self._record(trainer, pl_module)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._survival *= 1.0 - self.decay(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.stepped(trainer) and self.due(trainer.global_step):
            self._record(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        taken = _need(self.trajectory).steps
        if not taken or trainer.global_step > taken[-1]:
            self._record(trainer, pl_module)
        _need(self._folder).close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._folder is not None:
            self._folder.close()

    @override
    def state_dict(self) -> dict[str, Any]:
        if self.trajectory is None:
            return {}
        if self._folder is not None:
            # A checkpoint must not point at snapshots that are not on disk yet. It is a file itself, so that whoever
            # writes one waits for the disk anyway.
            self._folder.flush()
        return {"trajectory": self.trajectory.state_dict(), "survival": self._survival}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict or None

    # --------------------------------------------------------------------------------------------- recording

    def _record(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with self.watch.running():
            self._snapshot(trainer, pl_module)

    def _snapshot(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trajectory, rows = _need(self.trajectory), _need(self._rows)
        step = trainer.global_step
        row = rows.increment(rows.selection.weights(pl_module))
        products = rows.dots(row).cpu()
        if not torch.isfinite(products).all():
            rank_zero_info(f"step {step}: the weights are no longer finite, no snapshot is taken")
            return
        trajectory.append(step, products, self._survival)
        self._keep(trainer, step, row)
        if len(trajectory) > 1:
            log_now(trainer, live_metrics(trajectory, self.name), step)

    def _keep(self, trainer: Trainer, step: int, row: Vector) -> None:
        """Hand a row to the side thread, and the trajectory's file behind it, and keep what later rows need."""
        rows, folder = _need(self._rows), _need(self._folder)
        waited = folder.waited
        if self.write_snapshots and _writes(trainer, rows.selection):
            folder.write(step, row, self._survival)
        if trainer.is_global_zero:
            folder.write_trajectory(_need(self._file), _need(self.trajectory))
        if folder.waited > waited:
            rank_zero_warn(
                f"step {step}: training waited {folder.waited - waited:.1f} s for the disk of {folder.path}, "
                f"{folder.waited:.1f} s so far: raise max_pending or take fewer snapshots"
            )
        if self.keep_on == "disk" and trainer.world_size > 1:
            folder.flush()  # ranks that hold copies of the weights read the file of the one that writes
            trainer.strategy.barrier()
        rows.push(row, folder.stored(step) if self.keep_on == "disk" else None)

    def _restore(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up the rows of the interrupted run from its snapshot files."""
        state, rows, folder = _need(self._restored), _need(self._rows), _need(self._folder)
        self._restored = None
        resume_tables(trainer)
        trajectory = Trajectory.from_state(state["trajectory"])
        rows.selection.require(trajectory.fingerprint)
        device = torch.device("cpu") if self.keep_on == "cpu" else self.selection.parameters(pl_module)[0].device
        for step in trajectory.steps:
            row = folder.read(step)
            kept = folder.stored(step) if self.keep_on == "disk" else None
            rows.push(Vector(row.values.to(device), row.selection), kept)
        if _writes(trainer, rows.selection):
            folder.discard_after(trajectory.steps[-1])
        self.trajectory, self._survival = trajectory, state["survival"]


def _writes(trainer: Trainer, selection: ParameterSelection) -> bool:
    """Whether this rank's rows go to disk: one copy of each."""
    return trainer.is_global_zero if selection.shards is None else selection.shards.first_replica


def live_metrics(trajectory: Trajectory, name: str) -> dict[str, float]:
    """Describe the trajectory so far, per group and as a whole, beside what decay and chance would have given.

    Args:
        trajectory: At least two snapshots.
        name: What the whole selection is called.
    """
    grams = torch.stack([trajectory.gram(), *trajectory.grams])
    moved = pca.norms(grams, pca.drifts(len(trajectory))).amax(-1) > 0  # frozen so far: nothing has a direction yet
    if not moved.any():
        return {}
    grams = grams[moved]
    labels = [label for label, has in zip((name, *trajectory.groups), moved.tolist(), strict=True) if has]
    both = torch.cat([grams, nulls.decaying_walk(grams, trajectory.survival)])  # one batch of eigenvalue problems
    columns = {key: values.tolist() for key, values in nulls.statistics_of(both, trajectory.survival).items()}
    updates = pca.latest_update_alignment(both).tolist()
    metrics: dict[str, float] = {}
    for own, label in enumerate(labels):
        null = own + len(labels)
        for key, values in columns.items():
            found = _beside(key, values[own], values[null]) if key in CALIBRATED else {key: values[own]}
            metrics |= {f"backbone/{label}/{part}": value for part, value in found.items() if value == value}
        if updates[own] == updates[own]:  # the first increment has no past to be aligned with
            beside = _beside("update", updates[own], updates[null])
            metrics |= {f"alignment/{label}/{key}": value for key, value in beside.items()}
    return metrics


def _beside(name: str, value: float, null: float) -> dict[str, float]:
    return {name: value, f"{name}_null": null, f"{name}_excess": value - null}


def backbone_vectors(trajectory: Trajectory, rows: IncrementRows) -> tuple[Vector, Vector]:
    """Materialise each group's own backbone, and the whole selection's, as flat vectors.

    Zero for weights that have not moved (frozen, or before the first step).
    """
    found = pca.spectra(torch.stack([*trajectory.grams, trajectory.gram()]), pca.drifts(len(trajectory))[1:])
    backbones = torch.where((found.moved > 0)[:, None], found.directions[:, 0], 0.0)
    found = rows.combine_all([backbones[:-1], backbones[-1:].expand(len(trajectory.groups), -1)])
    return found[0], found[1]


def find_recorder(trainer: Trainer, asking: str) -> TrajectoryRecorder:
    """Return the trainer's recorder.

    Raises:
        UserError: There is none.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, TrajectoryRecorder):
            return callback
    raise UserError(f"{asking} needs a TrajectoryRecorder among the trainer's callbacks: it owns the backbone")


def _need(value: _T | None) -> _T:
    if value is None:
        raise RuntimeError("the recorder is used before Trainer.fit has set it up")
    return value
