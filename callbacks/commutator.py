"""What the order of two batches changes: commutators while training runs, beside what chance would have given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from mini_gpt_pl.callbacks.commutator_metrics import Measured
from mini_gpt_pl.callbacks.measuring import (
    KnowsItsLoss,
    Mode,
    NamesItsLosses,
    measuring,
    seed_everything,
    training_loss,
)
from mini_gpt_pl.callbacks.pairs import BatchPairs
from mini_gpt_pl.callbacks.probe import DeferringProbe, Estimate, Row, state_key
from mini_gpt_pl.callbacks.schedule import Schedule
from mini_gpt_pl.callbacks.trajectory import SNAPSHOT_FOLDER, TRAJECTORY_FILE, TrajectoryRecorder
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.curvature import commutator
from mini_gpt_pl.geometry.curvature.two_steps import OptimizerSteps
from mini_gpt_pl.geometry.directions import subspace
from mini_gpt_pl.geometry.directions.subspace import Basis, restrict
from mini_gpt_pl.geometry.path.snapshots import SnapshotFolder
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.geometry.vectors.free_weights import FreeWeights, Loss
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector
from mini_gpt_pl.observation.steps import StepObserver


class CommutatorProbe(DeferringProbe):
    r"""Commutators of gradient steps on pairs of independent batches, in a dtype of their own.

    Each due step draws K pairs of batches (`draw_batch` of the module or the data module; else random halves of the
    training batch), and measures what the order of two steps on them changes, at the weights before the next step, in
    evaluation mode, without autocast and without casts to a narrower dtype. All pairs are a function of (seed, step,
    sample) and of the data. Medians over the K samples are logged, the mean of the middle two where K is even.

    Logged under `commutator/<name>/`: defect D = ||H_B g_A - H_A g_B|| / (||g_A|| ||g_B||), defect_eta (of steps of
    size eta: the published quantity, without its rounding), relative, c and c_theta2 (the forms of it without 1/||g||),
    these with `_low` and `_high`, their quartiles; bracket, norm_a, norm_b, gradient_cosine, weights (||theta||);
    step_resolution and float32_signal (below 1, float32 weights would not have shown the step, or the effect of its
    order); resolved, the share of samples whose bracket is more than rounding here. The others have no defect,
    rather than one of 0, and count in no median of it.

    With a recorder also how much of the bracket lies in subspaces of its weights: `on_<basis>` = |proj| / |bracket|,
    `_null` (the same for random directions inside the same blocks, `_isotropic` in all weights), `_ratio` to the null,
    and `_below`, the share of random subspaces that hold less. The bases are `path`, the leading principal directions
    of each group's snapshots so far; `theta0`, each group's initial weights; `singular`, the leading singular
    directions of each matrix as it is; `rank_one`, random u v' of each matrix; and `other`, another run's path. Beside
    them `commutator/<group>/share` of the bracket's and gradient_share of the gradients' squared length, and the cosine
    with the last increment: alignment (signed mean over the samples), alignment_rms, and alignment_flip, its null.

    With several ranks each does all of the same work, and rank zero's numbers are logged.

    Args:
        schedule: When to measure. 0 is before the first step.
        samples: K, pairs of batches.
        eta: Step size of defect_eta and of what float32 would resolve.
        pattern: Which weights move, searched in their names; all that are trained by default.
        name: Of these weights, in metric names.
        size: Samples in a batch; None for the drawer's own, or half of the training batch. A large model in float64
            may need few.
        dtype: Of the measurement.
        method: `hessian`, by two Hessian-vector products; `differences`, by gradient differences, for a loss that has
            no second derivative.
        optimizer_step: Also take two steps of the optimizer itself on copies of its state, with decay and clipping:
            step_defect = ||theta_AB - theta_BA|| / (||s_A|| ||s_B||), step_memory (what is left of it with the
            gradients frozen), step_curvature (the rest), and step_cosine of the rest with the bracket.
        directions: Of each group or matrix in a basis; 0 projects on none.
        other_run: Folder of a finished run of the same model, with its snapshots, for the basis `other`.
        losses: Names of two of the module's `named_losses`: batch A is taken with the first, B with the second, such
            as those of two tasks. Beside it belongs what each gives with itself. None for the training loss of both.
        seed: Of the pairs and of the random directions, and of what a forward draws in the modes of training.
        mode: `eval` measures in evaluation mode; `train` in the modes of training, with dropout and batch statistics.

    Raises:
        UserError: A setting is out of range, the module has no loss of one batch, the loss no second derivative, its
            graph does not reach a weight (a reentrant checkpoint), the ranks share the weights (FSDP2), or the recorder
            records weights that are not among those that move.

    Example:
        >>> probe = CommutatorProbe(Schedule(every=100), samples=3)
    """

    def __init__(
        self,
        schedule: Schedule = Schedule(every=200),  # noqa: B008 (frozen)
        samples: int = 5,
        eta: float = 1e-3,
        pattern: str = "",
        name: str = "all",
        size: int | None = None,
        dtype: Literal["float64", "float32"] = "float64",
        method: Literal["hessian", "differences"] = "hessian",
        optimizer_step: bool = False,
        directions: int = 2,
        other_run: str | None = None,
        losses: tuple[str, str] | None = None,
        seed: int = 0,
        mode: Mode = "eval",
    ) -> None:
        super().__init__(schedule)
        if samples < 1 or not eta > 0 or directions < 0 or (size is not None and size < 1):
            raise UserError(
                f"CommutatorProbe: samples {samples} and size {size} (1 or more), eta {eta} (above 0), "
                f"directions {directions} (0 or more)"
            )
        if method not in ("hessian", "differences"):
            raise UserError(f"CommutatorProbe: method {method!r}; choose hessian or differences")
        self.samples = samples
        self.eta = eta
        self.pattern = pattern
        self.name = name
        self.size = size
        self.dtype = getattr(torch, dtype)
        self.method = method
        self.optimizer_step = optimizer_step
        self.directions = directions
        self.other_run = other_run
        self.losses = losses
        self.seed = seed
        self.mode = mode
        self._reset()

    def _reset(self) -> None:
        self._recorder: TrajectoryRecorder | None = None
        self._selection: ParameterSelection | None = None
        self._pairs: BatchPairs | None = None
        self._steps: StepObserver | None = None
        self._counted: dict[str, int] = {}
        self._other: Basis | None = None
        self._passing: Any = None
        self._reaches = False
        self._asked_at = -1
        self._pending: list[Measured] = []

    @property
    @override
    def state_key(self) -> str:
        return state_key(self, name=self.name)

    @override
    def estimate(self, steps: int, dim: int) -> Estimate:
        times = sum(self.schedule.due(step) for step in range(steps)) / max(steps, 1)
        # Two gradients whose graphs are kept, two passes over them, and two more gradients.
        passes = (8 + 2 * self.optimizer_step) * self.samples
        return Estimate(type(self).__name__, bytes=10.0 * self.dtype.itemsize * dim, passes=passes * times)

    # ------------------------------------------------------------------------------------------------ hooks

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._reset()
        self._trainer = trainer
        if not isinstance(pl_module, KnowsItsLoss | NamesItsLosses):
            raise UserError(
                f"CommutatorProbe: {type(pl_module).__name__} has no batch_loss(batch), the training loss of one "
                "batch: add it"
            )
        if self.losses is not None and not isinstance(pl_module, NamesItsLosses):
            raise UserError(f"CommutatorProbe: {type(pl_module).__name__} has no named_losses(batch) to choose from")
        if self.directions:
            for other in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(other, TrajectoryRecorder):
                    self._recorder = self._recorder or other
                elif isinstance(other, CommutatorProbe) and other is not self and other.directions:
                    raise UserError(  # shares of the recorder's groups are logged without the name of a probe
                        f"CommutatorProbe: {self.name} and {other.name} both tell of the recorder's groups: give one "
                        "of them directions 0"
                    )
        if self._recorder is not None and self._recorder.sketch is not None:
            raise UserError(
                "CommutatorProbe: directions cannot be rebuilt from the recorder's sketches: give that sketch null, "
                "or the probe directions 0"
            )
        if self.other_run is not None and self._recorder is None:
            raise UserError("CommutatorProbe: other_run needs a TrajectoryRecorder, and directions of 1 or more")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._selection = trained(pl_module, self.pattern, type(self).__name__)
        if self._selection.shards is not None:
            raise UserError("CommutatorProbe: the ranks share the weights (FSDP2): measure on one device or under DDP")
        self._pairs = BatchPairs(trainer, pl_module, self.seed, self.size, self.dtype)
        parameters, alone = self._selection.parameters(pl_module), len(trainer.optimizers) == 1
        self._steps = StepObserver(parameters, lambda: trainer.global_step, alone)
        last = trainer.global_step
        self._steps.count, self._steps.number = self._counted.get("count", last), self._counted.get("number", last)
        self._steps.__enter__()
        if self._recorder is not None:
            recorded = self._recorder.selection
            if missing := [name for name in recorded.names if name not in self._selection.names]:
                raise UserError(
                    f"CommutatorProbe: the recorder's weight {missing[0]!r} is not among those that move "
                    f"(pattern {self.pattern!r}, frozen ones left out): widen the pattern, or give directions 0"
                )
            if self.other_run is not None:
                path = Path(self.other_run)
                files = SnapshotFolder(path / SNAPSHOT_FOLDER, recorded)
                trajectory = Trajectory.load(path / TRAJECTORY_FILE)
                self._other = subspace.of_run(files, trajectory, self.directions, pl_module.device)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._measure_if_due(trainer, pl_module, batch)
        if self._pairs is not None and self._pairs.drawer is None:
            self._passing = batch

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._passing is not None or (self._pairs is not None and self._pairs.drawer is not None):
            self._measure_if_due(trainer, pl_module, self._passing)
        super().on_train_end(trainer, pl_module)
        self._close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._close()

    def _close(self) -> None:
        if self._steps is not None:
            self._steps.__exit__()

    @override
    def state_dict(self) -> dict[str, Any]:
        self._flush()
        return {} if self._steps is None else {"count": self._steps.count, "number": self._steps.number}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._counted = state_dict

    # -------------------------------------------------------------------------------------------- measuring

    def _measure_if_due(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        assert self._steps is not None
        step = self._steps.now
        if not self.due_once(self._steps.next - 1):
            return
        with self.watch.running(), measuring(trainer, module, self.mode):
            try:
                measured = self._measure(trainer, module, batch, step)
            except RuntimeError as error:
                if "modified by an inplace operation" not in str(error):
                    raise
                raise UserError(
                    f"CommutatorProbe: a forward of {type(module).__name__} writes into its weights (max_norm of an "
                    "embedding, a clamp), so that its loss has no derivatives by them: leave them out of the pattern"
                ) from None
            if measured is not None:
                self._pending.append(measured)

    def _measure(self, trainer: Trainer, module: LightningModule, batch: Any, step: int) -> Measured | None:
        assert self._selection is not None and self._pairs is not None
        selection = self._selection
        free = FreeWeights(module, selection, self.dtype)
        theta = free.weights
        if not theta.values.isfinite().all():
            return None  # the run has diverged, and says so itself
        steps = self._optimizer_steps(trainer, module, theta) if self.optimizer_step else None
        bases, last = dict(self._bases(theta, step)), self._last_increment()
        recorded = None if self._recorder is None else self._recorder.selection
        measured = Measured(step)
        for sample in range(self.samples):
            pair = self._pairs(step, sample, batch)
            evaluate = [partial(self._loss, module, part, step, sample, which) for which, part in enumerate(pair)]
            if not self._reaches:
                free.require_reach(lambda both=evaluate: both[0]() + both[1]())  # type: ignore[misc]
                self._reaches = True
            loss_a, loss_b = map(free.loss, evaluate)
            found = self._commutator(loss_a, loss_b, theta.values)
            stepped = commutator.finite(found, loss_a, loss_b, theta.values, self.eta)
            measured.add(found, stepped, theta, self.eta, bases, recorded, last)
            if steps is not None:
                measured.add_steps(steps.order(loss_a, loss_b, found.grad_a, found.grad_b), found.bracket)
        return measured

    def _loss(self, module: LightningModule, batch: Any, step: int, sample: int, which: int) -> Tensor:
        """Loss of batch A (0) or B (1); one function of the weights, whatever the mode."""
        if self.mode == "train":
            seed_everything(module, self.seed, step, sample, which)
        if self.losses is None:
            return training_loss(module, batch)
        assert isinstance(module, NamesItsLosses)
        name, losses = self.losses[which], module.named_losses(batch)
        if name not in losses:
            raise UserError(f"{type(module).__name__} has no loss {name!r}: its named_losses are {', '.join(losses)}")
        return losses[name]

    def _commutator(self, loss_a: Loss, loss_b: Loss, theta: Float[Tensor, " D"]) -> commutator.Commutator:
        way = commutator.by_hessian if self.method == "hessian" else commutator.by_differences
        try:
            return way(loss_a, loss_b, theta)
        except commutator.NotTwiceError as error:
            raise UserError(f"CommutatorProbe: {error}: use gradient differences (method: differences)") from None

    def _optimizer_steps(self, trainer: Trainer, module: LightningModule, theta: Vector) -> OptimizerSteps:
        training = [optimizer for optimizer in trainer.optimizers if self._steps and self._steps.trains(optimizer)]
        if len(training) != 1:
            raise UserError(
                f"CommutatorProbe: {len(training)} optimizers train the weights that move, and optimizer_step takes "
                "the steps of one: let the pattern name the weights of one"
            )
        clip = trainer.gradient_clip_val if trainer.gradient_clip_algorithm in (None, "norm") else None
        return OptimizerSteps(training[0], module, theta.selection, theta.values, None if clip is None else float(clip))

    def _bases(self, theta: Vector, step: int) -> Iterator[tuple[str, Basis]]:
        """Directions that are known now."""
        recorder = self._recorder
        if recorder is None or recorder.trajectory is None or not len(recorder.trajectory):
            return
        selection, trajectory, k = recorder.selection, recorder.trajectory, self.directions
        if _has_moved(trajectory):
            yield "path", subspace.principal(trajectory, recorder.directions, selection, k)
        yield "theta0", subspace.own_directions(recorder.direction(_row(trajectory, 0)))
        if any(len(shape) >= 2 for shape in selection.shapes):
            yield "singular", subspace.singular(restrict(theta, selection), k)
            seed = int(np.random.SeedSequence((self.seed, step)).generate_state(1, np.uint64)[0] >> np.uint64(1))
            yield "rank_one", subspace.rank_one(selection, k, torch.Generator(theta.values.device).manual_seed(seed))
        if self._other is not None:
            yield "other", self._other

    def _last_increment(self) -> Vector | None:
        if self._recorder is None or self._recorder.trajectory is None or not _has_moved(self._recorder.trajectory):
            return None
        return self._recorder.direction(_row(self._recorder.trajectory, -1))

    # ---------------------------------------------------------------------------------------------- logging

    @override
    def _take_rows(self) -> Iterable[Row]:
        pending, self._pending = self._pending, []
        if self._selection is None:
            return
        recorded = None if self._recorder is None else (self._recorder.name, self._recorder.selection)
        for measured in pending:
            yield measured.step, measured.metrics(self.name, self._selection.dim, recorded)


def trained(module: LightningModule, pattern: str, asker: str) -> ParameterSelection:
    """Weights of a module that a pattern names and that are not frozen.

    Raises:
        UserError: There is none, says the asker.
    """
    found = ParameterSelection.of(module, pattern)
    kept = [p.requires_grad for p in found.parameters(module)]
    if not any(kept):
        raise UserError(f"{asker}: all weights that the pattern {pattern!r} names are frozen")
    columns = zip(found.names, found.shapes, found.owners, kept, strict=True)
    names, shapes, owners = zip(*((name, shape, owner) for name, shape, owner, keep in columns if keep), strict=True)
    return found if all(kept) else ParameterSelection(names, shapes, owners, found.shards)


def _has_moved(trajectory: Trajectory) -> bool:
    return len(trajectory) > 1 and bool((trajectory.grams.diagonal(dim1=1, dim2=2)[:, 1:] > 0).any())


def _row(trajectory: Trajectory, position: int) -> Float[Tensor, "G n"]:
    """Coefficients of theta_0 or of an increment, the same in every group."""
    rows = torch.zeros(len(trajectory.groups), len(trajectory), dtype=torch.float64)
    rows[:, position] = 1.0
    return rows
