"""Fourier power of the residue tables while training runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from mini_gpt_pl.arithmetic import fourier
from mini_gpt_pl.arithmetic.fourier import AXES, Axis
from mini_gpt_pl.callbacks.probe import Deferred, DeferringProbe, Row
from mini_gpt_pl.callbacks.schedule import Schedule
from mini_gpt_pl.errors import UserError


class FourierProbe(DeferringProbe):
    """Frequencies of the embedding, of E W_Q' and E W_V' W_O' of each block, and of the head, over the residues.

    Logged under `fourier/<axis>/<table>/`: largest, the share of the frequency that has most, with `_null` (its median
    by chance) and `_level` (95 % of chance stays under it); frequency, which one it is; and effective, the effective
    number of frequencies, with `_null`. The axis of the other group is a control: an addition has no reason to be
    sparse in multiplicative characters.

    Args:
        schedule: When to measure, after a step; 0 is before the first.
        axes: Over which group's characters. The multiplicative one needs a prime modulus.

    Raises:
        UserError: The module has no encoder of residues, or the modulus has no such axis.

    Example:
        >>> probe = FourierProbe(Schedule(every=100))
    """

    def __init__(
        self,
        schedule: Schedule = Schedule(every=100),  # noqa: B008 (frozen)
        axes: Sequence[Axis] = AXES,
    ) -> None:
        super().__init__(schedule)
        self.axes = tuple(axes)
        self._deferred = Deferred[tuple[Axis, str, int]]()
        self._residues = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        encoder = getattr(pl_module, "encoder", None)
        if not isinstance(encoder, fourier.Encoder):
            raise UserError(f"FourierProbe: {type(pl_module).__name__} has no encoder of residues: leave the probe out")
        self._trainer, self._deferred = trainer, Deferred()
        self._residues = encoder.embedding.num_embeddings
        fourier.tables(encoder, _tasks(pl_module))
        for axis in self.axes:
            fourier.residues(self._residues, axis)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stepped(trainer)
        if trainer.global_step == 0 and self.due(0):
            self._measure(pl_module, 0)
            self._flush()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.stepped(trainer) and self.due(trainer.global_step):
            self._measure(pl_module, trainer.global_step)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def state_dict(self) -> dict[str, Any]:
        self._flush()  # a resumed run does not say it again
        return {}

    def _measure(self, module: LightningModule, step: int) -> None:
        with self.watch.running(), torch.no_grad():
            encoder = module.encoder
            assert isinstance(encoder, fourier.Encoder)
            for name, table in fourier.tables(encoder, _tasks(module)).items():
                for axis in self.axes:
                    numbers = fourier.moments(table, axis)
                    self._deferred.add(step, [(axis, name, k) for k in range(len(numbers))], numbers)

    @override
    def _take_rows(self) -> Iterable[Row]:
        for step, numbers in self._deferred.take():
            if not fourier.varies(list(numbers.values())):
                continue  # a table that was never drawn, or of a run that has diverged and says so itself
            axis, name, _ = next(iter(numbers))
            spectrum = fourier.read(list(numbers.values()), self._residues - (axis == "multiplicative"))
            values = {
                "largest": spectrum.largest,
                "largest_null": spectrum.largest_null(0.5),
                "largest_level": spectrum.largest_null(0.95),
                "frequency": float(spectrum.frequency),
                "effective": spectrum.effective,
                "effective_null": spectrum.effective_null,
            }
            yield step, {f"fourier/{axis}/{name}/{key}": value for key, value in values.items()}


def _tasks(module: LightningModule) -> tuple[str, ...]:
    return tuple(getattr(module, "tasks", ()))
