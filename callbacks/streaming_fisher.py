"""The Fisher along the backbone from the training gradients themselves, at no extra backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from mini_gpt_pl.callbacks.last_gradient import backward_scale, loss_scale
from mini_gpt_pl.callbacks.nests import first_length
from mini_gpt_pl.callbacks.probe import Estimate, Row
from mini_gpt_pl.callbacks.recorded import StepProbe
from mini_gpt_pl.callbacks.schedule import Schedule
from mini_gpt_pl.geometry.curvature import fisher
from mini_gpt_pl.geometry.directions.axes import BACKBONE, Axes
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector
from mini_gpt_pl.observation.steps import Step


class _Window(NamedTuple):
    """What one direction has seen, step by step.

    Attributes:
        step: The last one.
        rows: Per step (||g||^2, <g, v>^2) of the optimizer batch and, with accumulation, their means over the
            micro-batches; per group and for the whole.
        sizes: Samples in a micro-batch and in an optimizer batch.
    """

    step: int
    rows: Float[Tensor, "S r G1"]
    sizes: tuple[int, int]


class StreamingFisher(StepProbe):
    """Running Rayleigh quotient and anisotropy of the training gradients along the backbone, and the noise scale.

    The gradients are those that training computes anyway, before clipping, each at the weights of its own step. Their
    direction changes with every snapshot, so means are taken between two snapshots and logged, at the last measured
    step, once the next snapshot has been taken.

    Logged for every group and, with `<name>_se` over the steps, for the whole selection:

    * `fisher/<group>/streaming/`: q_backbone, trace and anisotropy of the second moment of whole optimizer batches,
      mu mu' + Sigma / B. It shrinks with the batch, so runs of different batch sizes do not compare;
    * `fisher/<group>/streaming_per_sample/`, with gradient accumulation: the same of mu mu' + Sigma, corrected for the
      batch size. Micro-batches are a second batch size b, and E||g_b||^2 = ||mu||^2 + tr Sigma / b at two of them gives
      both parts (McCandlish et al. 2018). No bias, but noise: a value can be negative, and is then logged as it is.
      noise_scale = tr Sigma / ||mu||^2, in samples, is the batch size above which a larger one hardly helps.

    Without accumulation there is one batch size, and the second part is absent. A sample is one entry of the batch's
    first dimension. With several ranks a micro-batch is this rank's own, and the last of each step, which is averaged
    over ranks by the time it can be seen, is left out. Optimizer steps cut short by the end of an epoch are left out.
    Under manual optimization the gradient is the one that `step()` is given, however the module has added it up; what
    a micro-batch's share of it is, is not known, and the second part is absent.

    Args:
        schedule: At which optimizer steps the gradients are looked at: an inner product or three for each micro-batch.

    Raises:
        UserError: The trainer has no TrajectoryRecorder.
    """

    def __init__(self, schedule: Schedule = Schedule(every=10)) -> None:  # noqa: B008 (frozen)
        super().__init__(schedule)
        self._reset()

    @override
    def _reset(self) -> None:
        self._pending: list[_Window] = []
        # The open window: number of snapshots behind its direction, batch sizes, steps.
        self._snapshots, self._sizes, self._measured = 0, (0, 0), -1
        self._rows: list[Float[Tensor, "r G1"]] = []
        # The optimizer step in progress.
        self._step, self._active = -1, False
        self._micro: list[Float[Tensor, "2 G1"]] = []
        self._seen = 0
        self._before: Vector | None = None
        self._batch: Any = None

    @override
    def estimate(self, steps: int, dim: int) -> Estimate:
        return Estimate(type(self).__name__, bytes=12.0 * dim, passes=0.0)

    # ------------------------------------------------------------------------------------------------ hooks

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rows = [row.to(pl_module.device) for row in self._rows]
        super().on_train_start(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch = batch
        if self.recorder.steps.next != self._step:
            self._begin(trainer, batch)
        elif self._active and first_length(batch) != self._sizes[0]:
            self._active = False  # micro-batches of unequal sizes have no one noise level

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self.recorder.steps.next != self._step:
            self._begin(trainer, self._batch)  # the second step or a later one on one batch

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen += 1
        if self._active and pl_module.automatic_optimization and trainer.accumulate_grad_batches > 1:
            with self.watch.running():
                self._look(trainer, pl_module)

    @override
    def before_step(self, step: Step) -> None:
        """Take the step's whole gradient."""
        assert self._trainer is not None
        module = self._trainer.lightning_module
        complete = not module.automatic_optimization or self._seen == self._trainer.accumulate_grad_batches
        if not (self._active and complete) or self.recorder.gradient.lost:
            return
        with self.watch.running():
            axes, scale = self.recorder.axes(), loss_scale(self._trainer, step.optimizer)
            assert axes is not None
            row = [_squares(axes, *self.recorder.gradient.meet(module, axes, scale), 1.0 / scale)]
            if self._micro:
                row.append(torch.stack(self._micro).mean(0))
            self._rows.append(torch.cat(row))
            self._measured = step.number

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()
        super().on_train_end(trainer, pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        state, rows = super().state_dict(), torch.stack(self._rows).cpu() if self._rows else None
        state |= {"rows": rows, "snapshots": self._snapshots, "sizes": list(self._sizes), "measured": self._measured}
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        rows = state_dict["rows"]
        self._rows = [] if rows is None else list(rows)
        self._snapshots, self._measured = state_dict["snapshots"], state_dict["measured"]
        self._sizes = (state_dict["sizes"][0], state_dict["sizes"][1])

    # -------------------------------------------------------------------------------------------- measuring

    def _begin(self, trainer: Trainer, batch: Any) -> None:
        """Start an optimizer step: decide whether to look at it, and along which direction."""
        self._step, self._micro, self._seen, self._before = self.recorder.steps.next, [], 0, None
        assert self.recorder.trajectory is not None
        snapshots, samples = len(self.recorder.trajectory), first_length(batch)
        sizes = (samples, samples * trainer.accumulate_grad_batches * trainer.world_size)
        if (snapshots, sizes) != (self._snapshots, self._sizes):
            self._close()
            self._snapshots, self._sizes = snapshots, sizes
        self._active = self.due(self._step) and self.recorder.axes() is not None

    def _look(self, trainer: Trainer, module: LightningModule) -> None:
        """Take the gradient of the micro-batch that was just added to `.grad`."""
        axes, parts = self.recorder.axes(), trainer.accumulate_grad_batches
        assert axes is not None
        last, scale = self._seen == parts, backward_scale(trainer)
        if self._seen > parts:
            return  # the closure is called again, at other weights
        total = self.recorder.gradient.of(module, scale)
        if not (last and trainer.world_size > 1):
            added = total if self._before is None else total - self._before
            # Lightning has divided its loss by `parts`.
            self._micro.append(_squares(axes, *axes.meet(added), parts / scale))
        self._before = None if last else total

    # ---------------------------------------------------------------------------------------------- logging

    def _close(self) -> None:
        """End the window: its direction or its batch size is no longer the current one."""
        if self._rows:
            self._pending.append(_Window(self._measured, torch.stack(self._rows), self._sizes))
        self._rows = []

    @override
    def _take_rows(self) -> Iterable[Row]:
        pending, self._pending = self._pending, []
        for window in pending:
            rows = window.rows.cpu()
            rows = rows[torch.isfinite(rows).all(-1).all(-1)]  # fp16 skips steps whose gradients overflow
            if len(rows):
                metrics = streaming_metrics(rows, window.sizes, self.recorder.selection, self.recorder.name)
                yield window.step, metrics


def _squares(
    axes: Axes, square: Float[Tensor, " G1"], coordinates: Float[Tensor, "N G1"], factor: float
) -> Float[Tensor, "2 G1"]:
    """||g||^2 and <g, v>^2 of a gradient that is to be multiplied by a factor."""
    return torch.stack([square, coordinates[axes.index(BACKBONE)].square()]) * factor**2


def streaming_metrics(
    rows: Float[Tensor, "S r G1"], sizes: tuple[int, int], selection: ParameterSelection, name: str
) -> dict[str, float]:
    """Name what the training gradients between two snapshots show.

    Args:
        rows: As in a window, on the host.
        sizes: As there.
        selection: Whose groups the columns are.
        name: Of the whole selection.

    Returns:
        Values by `fisher/<group>/streaming.../<quantity>`; what is undefined is left out.
    """
    large = rows[:, :2]
    metrics = _named(large, "streaming", selection, name)
    if rows.shape[1] == 4 and sizes[0]:  # 0: what a sample is cannot be told
        parts = fisher.split_moments(rows[:, 2:], large, *sizes)
        kind = "streaming_per_sample"
        metrics |= _named(parts.per_sample, kind, selection, name)
        mean, noise = float(parts.mean[:, 0, -1].mean()), float(parts.noise[:, 0, -1].mean())
        if mean > 0:
            metrics[f"fisher/{name}/{kind}/noise_scale"] = noise / mean
    return metrics


def _named(moments: Float[Tensor, "S 2 G1"], kind: str, selection: ParameterSelection, name: str) -> dict[str, float]:
    squares, quotients = moments[:, 0], moments[:, 1]
    estimates = {
        "q_backbone": fisher.mean_of(quotients),
        "trace": fisher.mean_of(squares),
        "anisotropy": fisher.anisotropy(quotients, squares, (*selection.dims, selection.dim)),
    }
    metrics = {}
    for quantity, (value, error) in estimates.items():
        for column, label in enumerate((*selection.groups, name)):
            metrics[f"fisher/{label}/{kind}/{quantity}"] = float(value[column])
        metrics[f"fisher/{name}/{kind}/{quantity}_se"] = float(error[-1])
    return {key: value for key, value in metrics.items() if value == value}
