"""Per-batch gradients beside the backbone of the past."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from mini_gpt_pl.callbacks.last_gradient import loss_scale
from mini_gpt_pl.callbacks.measuring import NamesItsLosses, gradient_of, measuring
from mini_gpt_pl.callbacks.probe import Estimate, Row
from mini_gpt_pl.callbacks.recorded import StepProbe
from mini_gpt_pl.callbacks.schedule import Schedule
from mini_gpt_pl.geometry.directions.axes import BACKBONE, Axes
from mini_gpt_pl.geometry.vectors.alignment import cosines, noise_floor
from mini_gpt_pl.geometry.vectors.selection import Vector
from mini_gpt_pl.observation.steps import Step


class GradientAlignment(StepProbe):
    """Cosine of single-batch gradients with the backbone of the snapshots before them.

    The combined gradient is the one that training has just computed (accumulated, before clipping): it costs a few
    inner products. The gradients of the loss's parts, where the module has `named_losses`, cost a forward and a
    backward each, so they have a slower schedule. Logged under `alignment/<group>/`, for each group against its own
    backbone and for the whole selection against the whole's: each cosine, also in units of the noise floor (`_z`), the
    coordinate of the gradient on v_b (bias) and its sum so far, and the cosines of the parts with one another.

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
        self._reset()

    @override
    def _reset(self) -> None:
        self._bias_sum: dict[str, float] = {}
        self._split_step = -1

    @override
    def estimate(self, steps: int, dim: int) -> Estimate:
        splits = 0 if self.split_schedule is None else sum(self.split_schedule.due(step) for step in range(1, steps))
        # Two flat directions and a flat gradient; two parts of the loss at a forward and a backward each.
        return Estimate(type(self).__name__, bytes=12.0 * dim, passes=2 * splits / max(1, steps))

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
                cosine = {name: _along(axes, *axes.meet(gradient))[0] for name, gradient in gradients.items()}
                pairs = {f"{a}_vs_{b}": cosines(gradients[a], gradients[b]) for a, b in combinations(gradients, 2)}
                self._defer(trainer.global_step + 1, cosine | pairs)

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
        return {**super().state_dict(), "bias_sum": dict(self._bias_sum)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._bias_sum = dict(state_dict["bias_sum"])

    def _part_gradients(self, trainer: Trainer, module: LightningModule, batch: Any) -> dict[str, Vector]:
        """Gradient of each named loss, averaged over ranks.

        Each takes a forward of its own: a compiled graph gives its buffers away and cannot be walked through twice.
        """
        assert isinstance(module, NamesItsLosses)
        selection = self.recorder.selection
        parts: dict[str, Vector] = {}
        with measuring(trainer, module):
            losses: Mapping[str, Tensor] | None = module.named_losses(batch)

            def part(name: str) -> Tensor:
                nonlocal losses
                now, losses = losses or module.named_losses(batch), None  # frees the graph before the next forward
                return now[name]

            for name in tuple(losses or ()):
                parts[name] = gradient_of(partial(part, name), selection, module, name)
        if trainer.world_size == 1 or selection.shards is not None:
            return parts  # gradients of shared weights are means over the ranks already
        reduce = trainer.strategy.reduce
        return {name: Vector(reduce(g.values, reduce_op="mean"), selection) for name, g in parts.items()}

    def _defer(self, step: int, numbers: Mapping[str, Float[Tensor, " G1"]]) -> None:
        names = [(label, quantity) for quantity in numbers for label in self.recorder.labels]
        self._deferred.add(step, names, torch.cat(list(numbers.values())))

    @override
    def _take_rows(self) -> Iterable[Row]:
        for step, numbers in self._deferred.take():
            dims, row = dict(zip(self.recorder.labels, self.recorder.dims, strict=True)), dict[str, float]()
            for (label, quantity), value in numbers.items():
                if value == 0.0:
                    continue  # a vanished gradient (a batch without the probe) has no direction
                row[key := f"alignment/{label}/{quantity}"] = value
                if quantity == "bias":
                    row[f"{key}_sum"] = self._bias_sum[label] = self._bias_sum.get(label, 0.0) + value
                elif "_vs_" not in quantity:
                    row[f"{key}_z"] = abs(value) / noise_floor(dims[label])
            yield step, row


def _along(
    axes: Axes, square: Float[Tensor, " G1"], coordinates: Float[Tensor, "N G1"]
) -> tuple[Float[Tensor, " G1"], Float[Tensor, " G1"]]:
    """Cosine and coordinate along the backbone: per group along its own, then of the whole along the whole's."""
    along = coordinates[axes.index(BACKBONE)]
    return torch.where(square == 0, 0.0, along / square.sqrt()), along
