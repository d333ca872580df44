"""Fourier power of the residue tables while training runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from mini_gpt_pl.arithmetic import fourier
from mini_gpt_pl.arithmetic.fourier import AXES, Axis
from mini_gpt_pl.callbacks.probe import Row, StateProbe
from mini_gpt_pl.callbacks.schedule import Schedule
from mini_gpt_pl.errors import UserError


class FourierProbe(StateProbe):
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
        self._residues = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        encoder = getattr(pl_module, "encoder", None)
        if not isinstance(encoder, fourier.Encoder):
            raise UserError(f"FourierProbe: {type(pl_module).__name__} has no encoder of residues: leave the probe out")
        self._residues = encoder.embedding.num_embeddings
        fourier.tables(encoder, _tasks(pl_module))
        for axis in self.axes:
            fourier.residues(self._residues, axis)

    @override
    def _measure(self, trainer: Trainer, module: LightningModule) -> None:
        with torch.no_grad():
            encoder = module.encoder
            assert isinstance(encoder, fourier.Encoder)
            for name, table in fourier.tables(encoder, _tasks(module)).items():
                for axis in self.axes:
                    numbers = fourier.moments(table, axis)
                    self._deferred.add(trainer.global_step, [(axis, name, k) for k in range(len(numbers))], numbers)

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
