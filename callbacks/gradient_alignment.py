"""Per-batch gradients beside the backbone of the past."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from mini_gpt_pl.callbacks.last_gradient import loss_scale
from mini_gpt_pl.callbacks.measuring import NamesItsLosses, gradient_of, measuring
from mini_gpt_pl.callbacks.probe import Deferred, Estimate, Row, StepProbe
from mini_gpt_pl.callbacks.schedule import Schedule
from mini_gpt_pl.callbacks.trajectory import TrajectoryRecorder, find_recorder
from mini_gpt_pl.geometry.directions.axes import BACKBONE, Axes
from mini_gpt_pl.geometry.vectors.alignment import cosines, noise_floor
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector
from mini_gpt_pl.observation.steps import Step


class GradientAlignment(StepProbe):
    """Cosine of single-batch gradients with the backbone of the snapshots before them.

    The combined gradient is the one that training has just computed (accumulated, before clipping): it costs a few
    inner products. The gradients of the loss's parts, where the module has `named_losses`, cost a forward and a
    backward each, so they have a slower schedule. Logged under `alignment/<group>/`, for each group against its own
    backbone and for the whole selection against the whole's: gradient, gradient_z (in units of the noise floor
    sqrt(2/(pi D))), bias b = <g, v_b> and bias_sum, and with named losses `<loss>`, `<loss>_z` and `<a>_vs_<b>`, the
    cosine of two parts' gradients (interference).

    Args:
        schedule: When to measure the combined gradient.
        split_schedule: When to measure the parts of the loss apart; None never does.

    Raises:
        UserError: The trainer has no TrajectoryRecorder.
    """

    def __init__(
        self,
        schedule: Schedule = Schedule(every=20),  # noqa: B008 (frozen)
        split_schedule: Schedule | None = Schedule(every=200),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__(schedule)
        self.split_schedule = split_schedule
        self._recorder: TrajectoryRecorder | None = None
        self._deferred = Deferred[_Number]()
        self._bias_sum: dict[str, float] = {}
        self._split_step = -1

    @override
    def estimate(self, steps: int, dim: int) -> Estimate:
        splits = 0 if self.split_schedule is None else sum(self.split_schedule.due(step) for step in range(1, steps))
        # Two flat directions and a flat gradient; two parts of the loss at a forward and a backward each.
        return Estimate(type(self).__name__, bytes=12.0 * dim, passes=2 * splits / max(1, steps))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._recorder = find_recorder(trainer, type(self).__name__)
            self._trainer = trainer
            self._deferred, self._bias_sum, self._split_step = Deferred(), {}, -1

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.recorder.attach(self)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = self.recorder.steps.next
        if self.split_schedule is None or step == self._split_step or not isinstance(pl_module, NamesItsLosses):
            return
        self._split_step = step  # once per optimizer step, on its first micro-batch
        if not self.due(step, self.split_schedule, "split"):
            return
        with self.watch.running():
            if (axes := self.recorder.axes()) is not None:
                gradients = self._part_gradients(trainer, pl_module, batch)
                self._defer(trainer.global_step + 1, self._compare_parts(gradients, axes))

    @override
    def before_step(self, step: Step) -> None:
        """Compare the step's gradient with the backbone, if it is due."""
        assert self._trainer is not None
        if not self.due(step.count) or self.recorder.gradient.lost:
            return
        with self.watch.running():
            if (axes := self.recorder.axes()) is not None:
                scale = loss_scale(self._trainer, step.optimizer)
                cosine, bias = _along(axes, *self.recorder.gradient.meet(self._trainer.lightning_module, axes, scale))
                self._defer(step.number, {"gradient": cosine, "bias": bias / scale})

    @override
    def state_dict(self) -> dict[str, Any]:
        self._flush()
        return {"bias_sum": dict(self._bias_sum)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._bias_sum = dict(state_dict["bias_sum"])

    # --------------------------------------------------------------------------------------------- measuring

    @property
    def recorder(self) -> TrajectoryRecorder:
        """The callback that owns the backbone."""
        if self._recorder is None:
            raise RuntimeError("the probe is used before Trainer.fit has set it up")
        return self._recorder

    def _part_gradients(self, trainer: Trainer, module: LightningModule, batch: Any) -> dict[str, Vector]:
        selection = self.recorder.selection
        with measuring(trainer, module):
            parts = part_gradients(module, batch, selection)
        if trainer.world_size == 1 or selection.shards is not None:
            return parts  # gradients of shared weights are means over the ranks already
        reduce = trainer.strategy.reduce
        return {name: Vector(reduce(g.values, reduce_op="mean"), selection) for name, g in parts.items()}

    def _compare_parts(self, gradients: dict[str, Vector], axes: Axes) -> dict[str, Float[Tensor, " G1"]]:
        found = {name: _along(axes, *axes.meet(grad))[0] for name, grad in gradients.items()}
        names = list(gradients)
        for i, first in enumerate(names):
            for second in names[i + 1 :]:
                found[f"{first}_vs_{second}"] = cosines(gradients[first], gradients[second])
        return found

    # ----------------------------------------------------------------------------------------------- logging

    def _defer(self, step: int, found: Mapping[str, Float[Tensor, " G1"]]) -> None:
        selection = self.recorder.selection
        parts = list(zip((*selection.groups, self.recorder.name), (*selection.dims, selection.dim), strict=True))
        names = [_Number(quantity, label, dim) for quantity in found for label, dim in parts]
        self._deferred.add(step, names, torch.cat(list(found.values())))

    @override
    def _take_rows(self) -> Iterable[Row]:
        for step, found in self._deferred.take():
            metrics: dict[str, float] = {}
            for number, value in found.items():
                if value != 0.0:  # a vanished gradient (a batch without the probe) has no direction
                    metrics |= self._named(number, value)
            yield step, metrics

    def _named(self, number: _Number, value: float) -> dict[str, float]:
        """Name one number, and what follows from it."""
        key = f"alignment/{number.label}/{number.quantity}"
        if number.quantity == "bias":
            self._bias_sum[number.label] = self._bias_sum.get(number.label, 0.0) + value
            return {key: value, f"{key}_sum": self._bias_sum[number.label]}
        if "_vs_" in number.quantity:
            return {key: value}
        return {key: value, f"{key}_z": abs(value) / noise_floor(number.dim)}


class _Number(NamedTuple):
    """What was measured, of which weights, and how many they are."""

    quantity: str
    label: str
    dim: int


def part_gradients(module: LightningModule, batch: Any, selection: ParameterSelection) -> dict[str, Vector]:
    """Gradient of each named loss of a batch by the selected weights.

    Each takes a forward of its own: a compiled graph gives its buffers away and cannot be walked through twice.
    """
    assert isinstance(module, NamesItsLosses)
    losses: Mapping[str, Tensor] | None = module.named_losses(batch)
    parts: dict[str, Vector] = {}

    def part(name: str) -> Tensor:
        nonlocal losses
        found, losses = losses or module.named_losses(batch), None  # frees the graph before the next forward
        return found[name]

    for name in tuple(losses or ()):
        parts[name] = gradient_of(partial(part, name), selection, module, name)
    return parts


def _along(
    axes: Axes, square: Float[Tensor, " G1"], coordinates: Float[Tensor, "N G1"]
) -> tuple[Float[Tensor, " G1"], Float[Tensor, " G1"]]:
    """Cosine and coordinate along the backbone: per group along its own, then of the whole along the whole's."""
    along = coordinates[axes.index(BACKBONE)]
    return torch.where(square == 0, 0.0, along / square.sqrt()), along
