"""Record the trajectory of selected weights, and show its backbone while it grows."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from mini_gpt_pl.callbacks.backbone import backbone_coefficients, live_metrics
from mini_gpt_pl.callbacks.last_gradient import LastGradient, backward_scale
from mini_gpt_pl.callbacks.probe import Estimate, Probe, state_key
from mini_gpt_pl.callbacks.schedule import Schedule
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.directions.axes import BACKBONE, Axes
from mini_gpt_pl.geometry.path.leading import LeadingFiles
from mini_gpt_pl.geometry.path.rows import IncrementRows, Place, memory_of
from mini_gpt_pl.geometry.path.sketch import SketchedRows
from mini_gpt_pl.geometry.path.snapshots import SnapshotFolder
from mini_gpt_pl.geometry.path.trajectory import Rates, Trajectory
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector, role
from mini_gpt_pl.observation.decay import DecayShadows
from mini_gpt_pl.observation.steps import Step, StepObserver, require_observable
from mini_gpt_pl.runs.logs import log_now
from mini_gpt_pl.runs.record import record_run

if TYPE_CHECKING:
    from mini_gpt_pl.callbacks.recorded import StepProbe

TRAJECTORY_FILE = "trajectory.safetensors"
SNAPSHOT_FOLDER = "snapshots"
# Of a run with a sketch: the rows that stand in for snapshots, and the directions that are kept.
SKETCH_FOLDER, LEADING_FOLDER = "sketches", "directions"
# Paths that a resumed run does not go on with, by the step at which it was resumed.
EARLIER = "earlier"

# The basis of a path, exact or as sketches.
Rows: TypeAlias = IncrementRows | SketchedRows

_T = TypeVar("_T")
_EARLY = "the recorder is used before Trainer.fit has set it up"


class TrajectoryRecorder(Probe):
    r"""Snapshot selected weights on a schedule and keep the trajectory as Gram matrices.

    A snapshot costs one row of inner products. Everything that is logged uses snapshots up to now only: under
    `backbone/<group>/`, for each group and for the whole selection, the numbers of `nulls.statistics`, most of them
    also as `<name>_null`, what a decaying walk with the same step lengths gives, and `<name>_excess`; and under
    `alignment/<group>/`, update, the cosine of the latest increment with the backbone of the snapshots before it.

    Args:
        pattern: Which weights, searched in their names; a group `(?P<group>...)` in it cuts them into blocks.
        schedule: When to take a snapshot; steps 0 and the last are always taken.
        name: Of the whole selection, in metric names.
        dirpath: Folder for `snapshots/` and `trajectory.safetensors`; the trainer's root folder for None.
        dtype: Of the stored increments; float64 for null where one of the weights is in it, else float32. bfloat16
            halves memory and disk, its rounding is fed back.
        keep_on: Where the rows stay (D values a snapshot), and so what training waits for at a snapshot: with the
            `model`, a pass over them at the device's speed; in the host's memory (`cpu`), one at its speed; on `disk`,
            reading them all, once for the snapshot and once for the directions, while memory does not grow with the
            snapshots. `geometry.rows.memory_of` has the bytes.
        write_snapshots: Without the files a run cannot be resumed, reheated against its own basis or replayed.
        max_pending: With `disk`, rows that may wait in memory to be written; when there are more, training waits for
            the disk and says how long. Elsewhere it never does, as the rows are in memory anyway.
        sketch: Keep a random projection of each group to this many values (on each rank that shares the weights) in
            place of the rows. Inner products are then estimates, a cosine's error being 1/sqrt(sketch); gradients meet
            directions that are kept beside it (`backbone/<name>/kept` says how well). Such a run can be resumed, not
            replayed, and not reheated against its own basis. `dtype` plays no part.
        overwrite: Whether a run that begins anew may replace what another has recorded in the folder. One that goes on
            with other weights, or without a state of this callback, moves the old path into `earlier/` and begins
            another. With Lightning's `fast_dev_run` nothing is written there.

    Raises:
        UserError: The pattern selects nothing, the folder holds the path of another run, another recorder has the same
            folder, a resumed run's snapshots are missing or of another model, rows are to be kept on disk and not
            written, the strategy is FSDP1 or DeepSpeed, or an optimizer is none of PyTorch's, whose steps are observed.

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
        dtype: Literal["float32", "bfloat16", "float64"] | None = None,
        keep_on: Place = "model",
        write_snapshots: bool = True,
        max_pending: int = 2,
        sketch: int | None = None,
        overwrite: bool = False,
    ) -> None:
        super().__init__(schedule)
        if keep_on == "disk" and (not write_snapshots or max_pending < 1):
            raise UserError("keep_on disk keeps the rows in their files: set write_snapshots true and max_pending >= 1")
        if sketch is not None and sketch < 1:
            raise UserError(f"TrajectoryRecorder: a sketch of {sketch} values holds nothing: give 1 or more, or null")
        if sketch is not None and keep_on == "disk":
            raise UserError("TrajectoryRecorder: sketches are small and stay in memory: give keep_on model or cpu")
        self.pattern = pattern
        self.name = name
        self.dirpath = dirpath
        self.dtype: torch.dtype | None = None if dtype is None else getattr(torch, dtype)
        self.keep_on = keep_on
        self.write_snapshots = write_snapshots
        self.max_pending = max_pending
        self.sketch = sketch
        self.overwrite = overwrite
        self._scratch: TemporaryDirectory[str] | None = None
        self._side: ThreadPoolExecutor | None = None
        self._reset()

    @override
    def _reset(self) -> None:
        self.trajectory: Trajectory | None = None
        self._rows: Rows | None = None
        self._leading: LeadingFiles | None = None
        self._folder: SnapshotFolder | None = None
        self._file: Path | None = None
        self._restored: dict[str, Any] | None = None
        self._writes = True  # this rank's rows go to disk: one copy of each
        self._device = torch.device("cpu")
        self._axes: tuple[int, Axes] | None = None
        self._gradient: LastGradient | None = None
        self._steps: StepObserver | None = None
        self._probes: list[StepProbe] = []
        self._decay: DecayShadows | None = None
        self._left: list[list[float]] = []  # per snapshot, the share of each weight that decay alone has left
        self._squares: list[list[float]] = []  # and its squared length in the row, once the weights do not decay alike
        self._trainer: Trainer | None = None
        self._coming: tuple[int, Future[dict[str, float]]] | None = None

    @property
    @override
    def state_key(self) -> str:
        return state_key(self, pattern=self.pattern, name=self.name)

    @property
    def selection(self) -> ParameterSelection:
        """The recorded weights and their order; known from `on_fit_start` on."""
        return self._basis.selection

    @property
    def _basis(self) -> Rows:
        if self._rows is None:
            raise RuntimeError(_EARLY)
        return self._rows

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the groups, then of the whole selection."""
        return (*self.selection.groups, self.name)

    @property
    def dims(self) -> tuple[int, ...]:
        """Number of values in each group, then in the whole selection."""
        return (*self.selection.dims, self.selection.dim)

    @property
    def gradient(self) -> LastGradient:
        """The recorded weights' gradient, shared by the probes that look at it; known from `on_fit_start` on."""
        return _need(self._gradient)

    @property
    def steps(self) -> StepObserver:
        """What sees the steps; known from `on_train_start` on, where the recorder comes before all other callbacks."""
        return _need(self._steps)

    def axes(self) -> Axes | None:
        """Directions of the snapshots so far, as `BACKBONE`: each group's own, and that of the whole selection.

        On the model's device, wherever the rows are kept. None until a second snapshot has been taken.
        """
        trajectory = _need(self.trajectory)
        if len(trajectory) < 2:
            return None
        if self._axes is None or self._axes[0] != len(trajectory):
            self._axes = None  # makes room for the new ones
            vectors = self.directions(backbone_coefficients(trajectory))
            self._axes = (len(trajectory), Axes(vectors, {BACKBONE: (0, 1)}, self.selection))
        return self._axes[1]

    def backbone(self) -> tuple[Vector, Vector] | None:
        """The two vectors of `axes`."""
        axes = self.axes()
        return None if axes is None else (axes[BACKBONE].own, axes[BACKBONE].whole)

    @override
    def estimate(self, steps: int, dim: int) -> Estimate:
        snapshots = 2 + sum(self.schedule.due(step) for step in range(1, steps))
        if isinstance(self._rows, SketchedRows):
            return Estimate(type(self).__name__, bytes=float(self._rows.bytes(snapshots)), passes=0.0)
        size = 4 if self.dtype is None else self.dtype.itemsize
        memory = memory_of(self.keep_on, snapshots, dim, size, self.write_snapshots, self.max_pending)
        return Estimate(type(self).__name__, bytes=memory.device, passes=0.0, host=memory.host, disk=memory.disk)

    @property
    def decayed(self) -> float | tuple[float, ...]:
        """Share of the weights that decay has taken in the latest step; one for each weight where they differ."""
        shares = _need(self._decay).taken
        return shares[0] if all(share == shares[0] for share in shares) else tuple(shares)

    def attach(self, probe: StepProbe) -> None:
        """Let a probe see every step of the optimizers that train the recorded weights; to be asked at train start."""
        self.steps.watchers.append(probe)
        self._probes.append(probe)

    def direction(self, coefficients: Float[Tensor, "G n"]) -> Vector:
        """Materialise a direction over the basis (theta_0, d_1, ...), one set of coefficients per group.

        On the model's device, wherever the rows are kept.
        """
        return Vector(self.directions([coefficients])[0], self.selection)

    def directions(self, coefficients: Sequence[Float[Tensor, "G n"]]) -> Float[Tensor, "K D"]:
        """Materialise several directions in one pass over the rows, each as `direction` has it."""
        return self._basis.combine_all(coefficients).to(self._device)

    # ------------------------------------------------------------------------------------------------ hooks

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
            raise UserError(
                f"TrajectoryRecorder: {type(trainer.strategy).__name__} steps flat copies of the weights, which "
                "are not recorded: share the weights by FSDP2 (ModelParallelStrategy), or use DDP"
            )
        self._trainer, root = trainer, self._root(trainer)
        everyone: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for other in everyone:
            if isinstance(other, TrajectoryRecorder) and other is not self and other._root(trainer) == root:
                raise UserError(
                    f"TrajectoryRecorder: {self.name!r} and {other.name!r} would write to one folder: let one pattern, "
                    "with a group for each, select both, or give one of them a dirpath"
                )
        # First of all, so that at train end it sees the trained weights, not those that an averaging callback puts in
        # their place. A new list: Lightning is walking through the old one.
        trainer.callbacks = sorted(  # type: ignore[attr-defined]
            everyone, key=lambda callback: not isinstance(callback, TrajectoryRecorder)
        )

    def _root(self, trainer: Trainer) -> Path:
        root = Path(self.dirpath or trainer.default_root_dir)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            return root
        if self._scratch is None:
            self._scratch = TemporaryDirectory(prefix="fast_dev_run-", ignore_cleanup_errors=True)
            for name in (SNAPSHOT_FOLDER, SKETCH_FOLDER, LEADING_FOLDER):  # what is resumed
                if trainer.ckpt_path is not None and (root / name).is_dir():
                    shutil.copytree(root / name, Path(self._scratch.name) / name)
        return Path(self._scratch.name)

    def _require_free_folder(self, trainer: Trainer) -> None:
        """Refuse to replace the path of another run, unless told to; what a run that goes on has recorded is kept."""
        file, folder = _need(self._file), _need(self._folder)
        if trainer.ckpt_path is not None or trainer.global_step:
            if trainer.is_global_zero:
                self._set_aside(trainer)
            trainer.strategy.barrier()
        if trainer.ckpt_path is not None or not trainer.is_global_zero:
            return
        recorded = Trajectory.load(file).steps if file.is_file() and not self.overwrite else []
        if not self.overwrite and (last := max([*recorded, *folder.steps()], default=0)) > 0:
            raise UserError(
                f"{file.parent} holds the path of a run of {last} steps: resume it with ckpt_path, give another "
                "default_root_dir or dirpath, or replace it with TrajectoryRecorder(..., overwrite=True)"
            )
        folder.discard_after(-1)

    def _set_aside(self, trainer: Trainer) -> None:
        """Move a path that is not gone on with, of other weights or of another callback, out of the way."""
        root = _need(self._file).parent
        names = (TRAJECTORY_FILE, SNAPSHOT_FOLDER, SKETCH_FOLDER, LEADING_FOLDER)
        if not (there := [root / name for name in names if (root / name).exists()]):
            return
        step = f"{trainer.global_step:09d}"
        before = len([*(root / EARLIER).glob(f"{step}*")])
        place = root / EARLIER / (f"{step}-{before + 1}" if before else step)
        place.mkdir(parents=True)
        for path in there:
            path.rename(place / path.name)
        self._say(f"the path that {root} holds is not one that this run goes on with: it is kept in {place}")

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in setup: a module may make, and a strategy share out, its weights after that.
        selection = ParameterSelection.of(pl_module, self.pattern)
        self._gradient = LastGradient(selection)
        if stand_ins := [f"{name} for {role(name)}" for name in selection.names if role(name) != name]:
            rank_zero_info(f"{self.name}: what pruned or parametrized weights are made of: {', '.join(stand_ins)}")
        root = self._root(trainer)
        self._file = root / TRAJECTORY_FILE
        device = torch.device("cpu") if self.keep_on == "cpu" else None
        self.trajectory = Trajectory.empty(selection)
        if self.sketch is None:
            limit = self.max_pending if self.keep_on == "disk" else None
            self._folder = SnapshotFolder(root / SNAPSHOT_FOLDER, selection, limit)
            self._rows = IncrementRows(selection, self.dtype, device)
            return
        rows = self._rows = SketchedRows(selection, self.sketch, device)
        self._folder = SnapshotFolder(root / SKETCH_FOLDER, rows.stored)
        self._leading = LeadingFiles(root / LEADING_FOLDER, selection, rows.leading.count)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._restored is None and not _need(self.trajectory).steps:
            self._require_free_folder(trainer)
        self._device = pl_module.device
        self._writes = trainer.is_global_zero if (shards := self.selection.shards) is None else shards.first_replica
        parameters = self.selection.parameters(pl_module)
        self._decay, self._left, self._squares = DecayShadows(parameters), [], []
        for optimizer in trainer.optimizers:
            require_observable(optimizer)
        alone = len(trainer.optimizers) == 1
        self._steps = StepObserver(parameters, lambda: trainer.global_step, alone, [self])
        if self._restored is not None:
            self._restore(trainer, pl_module)
        elif not _need(self.trajectory).steps:
            self._record(trainer.global_step)
        record_run(trainer, pl_module, self._root(trainer))  # a refused resume leaves the folder as it was
        self._steps.__enter__()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.gradient.forget()
        self.steps.settle()
        if self.selection.shards is None:  # shares of weights change places within a step
            parameters = self.selection.parameters(pl_module)
            if any(new is not old for new, old in zip(parameters, _need(self._decay).parameters, strict=True)):
                self.steps.rebind(parameters)
                _need(self._decay).rebind(parameters)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self.steps.backward_begins(by_value=self._by_hand(pl_module)):
            self.gradient.forget()

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A SAM step in two halves under manual optimization has no hook between them.
        if self._by_hand(pl_module) and self.steps.backward_begins():
            self.gradient.hold(pl_module, backward_scale(trainer))

    def _by_hand(self, module: LightningModule) -> bool:
        """Whether the module itself makes the coming step, and a probe looks at it."""
        return not module.automatic_optimization and any(p.schedule.due(self.steps.next) for p in self._probes)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.steps.gradient_ready(optimizer)

    def before_step(self, step: Step) -> None:
        """Let the shadows of decay have the settings of the step."""
        if step.elsewhere and not self.gradient.leave():
            self._say(
                "the weights moved between the backward passes of a step, or before one without `manual_backward`: "
                "the gradient of such a step is not measured"
            )
        _need(self._decay).read(step.optimizer)

    def after_step(self, step: Step) -> None:
        """Take a snapshot where one is due."""
        if not step.ready:
            self._say(
                f"{type(step.optimizer).__name__} ignores its closure: its first step, {step.number}, is not seen"
            )
            self.before_step(step)
        decay = _need(self._decay)
        decay.step()
        if self.steps.outside and self.selection.shards is None:
            self._say("not only optimizers move the weights, and the null knows nothing of what else does")
        for reason in decay.reasons:
            self._say(f"{reason}, so that the null of a decaying walk is unknown and no excess over it is shown")
        if self.due(step.count):
            self._record(step.number)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._coming is not None and self._coming[1].done():
            self._tell()
        if self.steps.left_out() and self.due(self.steps.count):
            self._record(self.steps.number)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._steps is not None:  # a reheated run is evaluated before its first step
            self._steps.sample()
        self._tell()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.steps.sample()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        recorded, now = _need(self.trajectory).steps, self.steps.number
        if self.steps.replaced:
            self._say("other weights are in place of the trained ones (averages?): the end of the path is not recorded")
        elif not recorded or now > recorded[-1]:
            self._record(now)
        self.gradient.forget()
        self._close()
        record_run(trainer, pl_module, self._root(trainer), ended=True)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    def _say(self, text: str) -> None:
        self._once(f"TrajectoryRecorder: {text}", rank_zero_warn)

    def _close(self) -> None:
        """Log what is still being computed, write what is still to be written, look at no further step."""
        if self._steps is not None:
            self._steps.__exit__()
        self._tell()
        if self._side is not None:
            self._side.shutdown()
            self._side = None
        if self._folder is not None:
            self._folder.close()

    @override
    def state_dict(self) -> dict[str, Any]:
        if self.trajectory is None or not len(self.trajectory):  # of a search for a learning rate before training
            return {}
        self._tell()  # a resumed run does not log it again
        if self._folder is not None:
            # A checkpoint must not point at snapshots that are not on disk yet. It is a file itself, so that whoever
            # writes one waits for the disk anyway.
            self._folder.flush()
        state: dict[str, Any] = {"trajectory": self.trajectory.state_dict()}
        if self._steps is not None and self._decay is not None:
            state |= {"count": self._steps.count, "number": self._steps.number, "decay": self._decay.state_dict()}
            state |= {"left": [list(row) for row in self._left], "squares": [list(row) for row in self._squares]}
        if isinstance(self._rows, SketchedRows):
            state["leading"] = self._rows.leading.coefficients.clone()
            if self.write_snapshots and self._writes:
                _need(self._leading).save(self.trajectory.steps[-1], self._rows.leading)
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict or None

    # --------------------------------------------------------------------------------------------- recording

    def _record(self, step: int) -> None:
        with self.watch.running():
            self._snapshot(_need(self._trainer), step)

    def _snapshot(self, trainer: Trainer, step: int) -> None:
        trajectory, rows = _need(self.trajectory), self._basis
        row = rows.increment(rows.selection.weights(trainer.lightning_module))
        products = rows.dots(row).cpu()
        if not torch.isfinite(products).all():
            rank_zero_info(f"step {step}: the weights are no longer finite, no snapshot is taken")
            return
        trajectory.append(step, products)
        self._weigh(trajectory, row)
        self._keep(trainer, step, row)
        if len(trajectory) < 2:
            return
        # The numbers are computed beside training, which goes on, and logged once they are there.
        self._tell()
        if self._side is None:
            self._side = ThreadPoolExecutor(1, thread_name_prefix="backbone")
        copy, kept = Trajectory.from_state(trajectory.state_dict()), dict[str, float]()
        if isinstance(rows, SketchedRows):  # how well the backbone is kept beside them
            kept = {f"backbone/{self.name}/kept": rows.kept(backbone_coefficients(trajectory)[1])}
        self._coming = (step, self._side.submit(lambda: live_metrics(copy, self.name) | kept))
        if any(getattr(callback, "monitor", None) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            self._tell()  # a checkpoint of this very step may go by them

    def _weigh(self, trajectory: Trajectory, row: Vector) -> None:
        """Put down what decay alone has left, by rate where the weights do not all decay alike."""
        left = self._left = [*self._left, list(_need(self._decay).left)]
        curves = np.array(left).T  # (P, n)
        keys = [curve.tobytes() for curve in curves]  # NaN is not equal to itself
        rates = list(dict.fromkeys(keys))
        if len(rates) == 1:
            trajectory.survival = curves[0].tolist()
            return
        owners, groups = self.selection.owners, self.selection.groups
        of_rates = torch.zeros(len(groups), len(rates), len(left)).double()
        if isinstance(self._rows, IncrementRows):
            rows = [*(kept[:] for kept in self._rows.rows[len(self._squares) :]), row.values]
            self._squares += [self.selection.squares(values) for values in rows]
            squares = torch.tensor(self._squares, dtype=torch.float64).T  # (P, n)
            for owner, key, of_weight in zip(owners, keys, squares, strict=True):
                of_rates[groups.index(owner), rates.index(key)] += of_weight
        elif len(pairs := set(zip(owners, keys, strict=True))) == len(groups):
            for owner, key in pairs:
                own = groups.index(owner)
                of_rates[own, rates.index(key)] = trajectory.grams[own].diagonal()
        else:
            self._say("weights of one group decay at several rates, which no sketch tells apart: the null is unknown")
            trajectory.survival[-1], trajectory.rates = math.nan, None
            return
        trajectory.rates = Rates(torch.from_numpy(curves[[keys.index(rate) for rate in rates]]), of_rates)
        trajectory.survival = trajectory.rates.survival

    def _tell(self) -> None:
        """Log the numbers of the last snapshot, once; wait for them."""
        if self._coming is not None and self._trainer is not None:
            (step, numbers), self._coming = self._coming, None
            log_now(self._trainer, numbers.result(), step)

    def _keep(self, trainer: Trainer, step: int, row: Vector) -> None:
        """Hand a row to the side thread, and the trajectory's file behind it, and keep what later rows need."""
        folder, trajectory = _need(self._folder), _need(self.trajectory)
        waited = folder.waited
        if self.write_snapshots and self._writes:
            folder.write(step, row, trajectory.survival[-1] if trajectory.rates is None else math.nan)
        if trainer.is_global_zero:
            folder.write_trajectory(_need(self._file), trajectory)
        if folder.waited > waited:
            rank_zero_warn(
                f"step {step}: training waited {folder.waited - waited:.1f} s for the disk of {folder.path}, "
                f"{folder.waited:.1f} s so far: raise max_pending or take fewer snapshots"
            )
        if self.keep_on == "disk" and trainer.world_size > 1:
            folder.flush()  # ranks that hold copies of the weights read the file of the one that writes
            trainer.strategy.barrier()
        self._push(row, step)

    def _push(self, row: Vector, step: int) -> None:
        if isinstance(rows := self._basis, SketchedRows):
            rows.push(row)
        else:
            rows.push(row, _need(self._folder).stored(step) if self.keep_on == "disk" else None)

    def _restore(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up the rows of the interrupted run from its snapshot files."""
        state, rows, folder = _need(self._restored), self._basis, _need(self._folder)
        self._restored = None
        trajectory = Trajectory.from_state(state["trajectory"])
        rows.selection.require(trajectory.fingerprint)
        device = torch.device("cpu") if self.keep_on == "cpu" else self.selection.parameters(pl_module)[0].device
        for step in trajectory.steps:
            row = folder.read(step)
            self._push(Vector(row.values.to(device), row.selection), step)
        if isinstance(rows, SketchedRows):
            rows.leading.coefficients = state["leading"].clone()
            _need(self._leading).load(trajectory.steps[-1], rows.leading, device)
        if self._writes:
            folder.discard_after(trajectory.steps[-1])
        self.trajectory, last = trajectory, trainer.global_step
        if "decay" in state:
            _need(self._decay).load_state_dict(state["decay"])
            self._left, self._squares = state["left"], state["squares"]
        else:  # of an older version, which knew one rate
            count = len(self.selection.names)
            self._left = [[share] * count for share in trajectory.survival]
            _need(self._decay).left = [state["survival"]] * count
        self.steps.count, self.steps.number = state.get("count", last), state.get("number", last)


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
        raise RuntimeError(_EARLY)
    return value
