"""Record the trajectory of selected weights, and show its backbone while it grows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from callbacks.probe import Estimate, Probe
from callbacks.schedule import Schedule
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry import nulls, pca
from mini_gpt_pl.geometry.leading import LeadingFiles
from mini_gpt_pl.geometry.moments import decay_rate, is_trained
from mini_gpt_pl.geometry.selection import ParameterSelection, Vector
from mini_gpt_pl.geometry.sketch import SketchedRows
from mini_gpt_pl.geometry.snapshots import SnapshotFolder
from mini_gpt_pl.geometry.trajectory import IncrementRows, Trajectory
from mini_gpt_pl.logs import log_now, resume_tables

TRAJECTORY_FILE = "trajectory.safetensors"
SNAPSHOT_FOLDER = "snapshots"
# Of a run with a sketch: the rows that stand in for snapshots, and the directions that are kept.
SKETCH_FOLDER, LEADING_FOLDER = "sketches", "directions"

# The live metrics that are shown beside their null and their excess over it.
CALIBRATED = ("pc1", "pc1_unit", "k95", "cos_theta0", "pc1_corrected", "persistence", "autocorrelation")

_T = TypeVar("_T")


class Rows(Protocol):
    """The basis of a path, exact (`IncrementRows`) or as sketches (`SketchedRows`)."""

    selection: ParameterSelection

    def increment(self, weights: Vector) -> Vector:
        """Make the next row."""
        ...

    def dots(self, new: Vector) -> Float[Tensor, "G n"]:
        """Inner products of a new row with every row and with itself."""
        ...

    def push(self, row: Vector) -> None:
        """Add a row."""
        ...

    def combine(self, coefficients: Float[Tensor, "G n"]) -> Vector:
        """Give a direction as D values."""
        ...


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
        keep_on: Where the rows stay, with the model or in host memory (D values per snapshot).
        write_snapshots: Without the files a run cannot be resumed, reheated against its own basis or replayed.
        sketch: Keep a random projection of each group to this many values (on each rank that shares the weights) in
            place of the rows. Inner products are then estimates, a cosine's error being 1/sqrt(sketch); gradients meet
            directions that are kept beside it (`backbone/<name>/kept` says how well). Such a run can be resumed, not
            replayed, and not reheated against its own basis. `dtype` plays no part.

    Raises:
        UserError: The pattern selects nothing, or a resumed run's snapshots are missing or of another model.

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
        keep_on: Literal["model", "cpu"] = "model",
        write_snapshots: bool = True,
        sketch: int | None = None,
    ) -> None:
        super().__init__(schedule)
        if sketch is not None and sketch < 1:
            raise UserError(f"TrajectoryRecorder: a sketch of {sketch} values holds nothing: give 1 or more, or null")
        self.pattern = pattern
        self.name = name
        self.dirpath = dirpath
        self.dtype = getattr(torch, dtype)
        self.keep_on = keep_on
        self.write_snapshots = write_snapshots
        self.sketch = sketch
        self.trajectory: Trajectory | None = None
        self._rows: Rows | None = None
        self._leading: LeadingFiles | None = None
        self._folder: SnapshotFolder | None = None
        self._file: Path | None = None
        self._restored: dict[str, Any] | None = None
        self._survival = 1.0
        self._writes = True  # this rank's rows go to disk: one copy of each
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
            own, whole = backbone_vectors(trajectory, rows)
            self._directions = (len(trajectory), own.to(self._device), whole.to(self._device))
        return self._directions[1:]

    @override
    def estimate(self, steps: int, dim: int) -> Estimate:
        snapshots = 2 + sum(self.schedule.due(step) for step in range(1, steps))
        if isinstance(self._rows, SketchedRows):
            return Estimate(type(self).__name__, bytes=float(self._rows.bytes(snapshots)), passes=0.0)
        return Estimate(type(self).__name__, bytes=(4 + self.dtype.itemsize * (snapshots - 1)) * dim, passes=0.0)

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
            self.trajectory, self._rows, self._folder, self._leading = None, None, None, None
            self._directions, self._restored, self._survival = None, None, 1.0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in setup: a module may make, and a strategy share out, its weights after that.
        selection = ParameterSelection.of(pl_module, self.pattern)
        root = Path(self.dirpath or trainer.default_root_dir)
        self._file = root / TRAJECTORY_FILE
        device = torch.device("cpu") if self.keep_on == "cpu" else None
        self.trajectory = Trajectory.empty(selection)
        if self.sketch is None:
            self._folder = SnapshotFolder(root / SNAPSHOT_FOLDER, selection)
            self._rows = IncrementRows(selection, self.dtype, device)
            return
        rows = self._rows = SketchedRows(selection, self.sketch, device)
        self._folder = SnapshotFolder(root / SKETCH_FOLDER, rows.stored)
        self._leading = LeadingFiles(root / LEADING_FOLDER, selection, rows.leading.count)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._device = pl_module.device
        self._writes = trainer.is_global_zero if (shards := self.selection.shards) is None else shards.first_replica
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
            self._folder.flush()  # a checkpoint must not point at snapshots that are not on disk yet
        state = {"trajectory": self.trajectory.state_dict(), "survival": self._survival}
        if isinstance(self._rows, SketchedRows) and len(self.trajectory):
            state["leading"] = self._rows.leading.coefficients.clone()
            if self.write_snapshots and self._writes:
                _need(self._leading).save(self.trajectory.steps[-1], self._rows.leading)
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict or None

    # --------------------------------------------------------------------------------------------- recording

    def _record(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with self.watch.running():
            self._snapshot(trainer, pl_module)

    def _snapshot(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trajectory, rows, folder = _need(self.trajectory), _need(self._rows), _need(self._folder)
        step = trainer.global_step
        row = rows.increment(rows.selection.weights(pl_module))
        products = rows.dots(row).cpu()
        if not torch.isfinite(products).all():
            rank_zero_info(f"step {step}: the weights are no longer finite, no snapshot is taken")
            return
        rows.push(row)
        trajectory.append(step, products, self._survival)
        if self.write_snapshots and self._writes:
            folder.write(step, row)
        if trainer.is_global_zero:
            trajectory.save(_need(self._file))
        if len(trajectory) > 1:
            log_now(trainer, live_metrics(trajectory, self.name) | self._kept(), step)

    def _kept(self) -> dict[str, float]:
        """How well the backbone is kept beside sketches."""
        rows, trajectory = self._rows, _need(self.trajectory)
        if not isinstance(rows, SketchedRows):
            return {}
        whole = _backbone(trajectory.gram(), pca.drifts(len(trajectory))[1:])
        return {f"backbone/{self.name}/kept": rows.kept(whole.expand(len(trajectory.groups), -1))}

    def _restore(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up the rows of the interrupted run from its snapshot files."""
        state, rows, folder = _need(self._restored), _need(self._rows), _need(self._folder)
        self._restored = None
        resume_tables(trainer)
        trajectory = Trajectory.from_state(state["trajectory"])
        rows.selection.require(trajectory.fingerprint)
        device = self.selection.parameters(pl_module)[0].device if self.keep_on == "model" else torch.device("cpu")
        for step in trajectory.steps:
            row = folder.read(step)
            rows.push(Vector(row.values.to(device), row.selection))
        if isinstance(rows, SketchedRows):
            rows.leading.coefficients = state["leading"].clone()
            _need(self._leading).load(trajectory.steps[-1], rows.leading, device)
        if self._writes:
            folder.discard_after(trajectory.steps[-1])
        self.trajectory, self._survival = trajectory, state["survival"]


def live_metrics(trajectory: Trajectory, name: str) -> dict[str, float]:
    """Describe the trajectory so far, per group and as a whole, beside what decay and chance would have given.

    Args:
        trajectory: At least two snapshots.
        name: What the whole selection is called.
    """
    metrics: dict[str, float] = {}
    for group in (None, *trajectory.groups):
        label = name if group is None else group
        gram = trajectory.gram(group)
        if float(pca.norms(gram, pca.drifts(len(gram))).max()) == 0:
            continue  # frozen so far: nothing has a direction yet
        null = nulls.decaying_walk(gram, trajectory.survival)
        found = backbone_metrics(gram, null, trajectory.survival)
        metrics |= {f"backbone/{label}/{key}": value for key, value in found.items() if value == value}
        update = pca.latest_update_alignment(gram)
        if update == update:  # the first increment has no past to be aligned with
            beside = _beside("update", update, pca.latest_update_alignment(null))
            metrics |= {f"alignment/{label}/{key}": value for key, value in beside.items()}
    return metrics


def backbone_metrics(gram: pca.Gram, null: pca.Gram, survival: Sequence[float]) -> dict[str, float]:
    """Statistics of the drift beside those of a null, and the decomposition at the last snapshot."""
    rows = pca.drifts(len(gram))[1:]
    split = pca.decompose(gram, rows[-1:], pca.pca(gram, rows).backbone)
    found, chance = nulls.statistics(gram, survival), nulls.statistics(null, survival)
    for key in CALIBRATED:
        found |= _beside(key, found[key], chance[key])
    decomposition = {
        "coordinate": float(split.coordinate),
        "residual": float(split.residual_norm),
        "fraction": float(split.fraction),
    }
    return found | decomposition


def _beside(name: str, value: float, null: float) -> dict[str, float]:
    return {name: value, f"{name}_null": null, f"{name}_excess": value - null}


def backbone_vectors(trajectory: Trajectory, rows: Rows) -> tuple[Vector, Vector]:
    """Materialise each group's own backbone, and the whole selection's, as flat vectors."""
    n = len(trajectory)
    path = pca.drifts(n)[1:]
    own = [_backbone(trajectory.gram(group), path) for group in trajectory.groups]
    whole = _backbone(trajectory.gram(), path)
    return rows.combine(torch.stack(own)), rows.combine(whole.expand(len(trajectory.groups), n))


def _backbone(gram: pca.Gram, path: pca.Rows) -> pca.Direction:
    """Coefficients of v_b; zero for weights that have not moved (frozen, or before the first step)."""
    if float(pca.norms(gram, path).max()) == 0:
        return torch.zeros(len(gram), dtype=torch.float64)
    return pca.pca(gram, path).backbone


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
