"""What the probes cost, and a budget that they keep."""

from __future__ import annotations

import math
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from mini_gpt_pl.callbacks.probe import Probe
from mini_gpt_pl.callbacks.trajectory import TrajectoryRecorder
from mini_gpt_pl.runs.logs import log_now, logging_due

# Steps that an estimate is of where nobody knows how many there will be.
_UNKNOWN = 10_000
# Beyond this a probe is as good as off.
_LONGEST_STRETCH = 1024


class TrainingClock(Callback):
    """Base of what is measured against the time of training, without its warm-up and evaluations.

    Args:
        warmup: Optimizer steps, of a resumed run too, before the clock starts.
    """

    def __init__(self, warmup: int = 20) -> None:
        super().__init__()
        self.warmup = warmup
        self._begun: float | None = None
        self._first = 0
        self._pause = 0.0

    def _start(self, trainer: Trainer) -> None:
        """Read what is to be measured, as the clock starts."""
        raise NotImplementedError

    def _report(self, trainer: Trainer, elapsed: float) -> dict[str, Any]:
        """Metrics of the time of training since the start, in seconds; asked for when the trainer logs."""
        raise NotImplementedError

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun, self._first = None, trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self._begun is None:
            if step >= self._first + self.warmup:
                self._begun = time.perf_counter()
                self._start(trainer)
        elif logging_due(trainer, step):
            log_now(trainer, self._report(trainer, time.perf_counter() - self._begun), step)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause = time.perf_counter()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._begun is not None:
            self._begun += time.perf_counter() - self._pause


class CostControl(TrainingClock):
    """Measure what the probes cost and, given a budget, stretch their schedules until they keep it.

    Logs `overhead/fraction`, the probes' share of training time without them (evaluations left out), and
    `overhead/<probe>`, each when the trainer logs. With a budget, a common factor thins the schedules of all probes
    that allow it: the recorder does not, as its schedule defines what is measured. At the start it prints an estimate
    of memory and of time. Times differ between runs, so these metrics alone are not reproducible.

    Args:
        max_overhead: Largest share, such as 0.02; None only measures.
        warmup: Optimizer steps, of a resumed run too, before the budget acts: compilation and first snapshots say
            nothing about the rest.
    """

    def __init__(self, max_overhead: float | None = None, warmup: int = 20) -> None:
        super().__init__(warmup)
        self.max_overhead = max_overhead
        self._spent_before: dict[Probe, float] = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        expected = trainer.max_steps if trainer.max_steps > 0 else float(trainer.estimated_stepping_batches)
        bounded = 0 < expected < math.inf
        steps = int(expected) if bounded else _UNKNOWN
        probes = _probes(trainer)
        dim = next((probe.selection.dim for probe in probes if isinstance(probe, TrajectoryRecorder)), 0)
        for probe in probes:
            probe.unstretch()  # of an earlier fit
            estimate = probe.estimate(steps, dim)
            if estimate.bytes or estimate.passes:
                share = estimate.passes / trainer.accumulate_grad_batches
                rank_zero_info(
                    f"{estimate.name}: about {estimate.memory}, and {share:.1%} of the time that a step's forward and "
                    f"backward passes take{'' if bounded else f', in the first {steps:,} steps'}"
                )

    @override
    def _start(self, trainer: Trainer) -> None:
        self._spent_before = {probe: probe.watch.seconds for probe in _probes(trainer)}
        for probe in self._spent_before:
            probe.asked = probe.answered = 0

    @override
    def _report(self, trainer: Trainer, elapsed: float) -> dict[str, Any]:
        spent = {probe: probe.watch.seconds - before for probe, before in self._spent_before.items()}
        free = max(elapsed - sum(spent.values()), 1e-9)
        metrics: dict[str, Any] = {"overhead/fraction": sum(spent.values()) / free}
        for probe, seconds in spent.items():  # several of one class are one number
            name = f"overhead/{type(probe).__name__}"
            metrics[name] = metrics.get(name, 0.0) + seconds / free
        if self.max_overhead is not None:
            metrics["overhead/stretch"] = float(self._stretch(trainer, spent, self.max_overhead * free))
        return metrics

    def _stretch(self, trainer: Trainer, spent: dict[Probe, float], budget: float) -> int:
        """Thin the schedules by the factor under which the probes' unthinned cost fits the budget, in seconds."""
        elastic = [probe for probe in spent if probe.stretchable]
        natural = sum(spent[probe] / probe.answered * probe.asked for probe in elastic if probe.answered)
        left = budget - sum(seconds for probe, seconds in spent.items() if not probe.stretchable)
        factor = _LONGEST_STRETCH if left <= 0 else min(_LONGEST_STRETCH, max(1, math.ceil(natural / left)))
        # One rank's clock decides for all: ranks that disagreed about when to measure would wait for each other.
        factor = trainer.strategy.broadcast(factor)
        for probe in elastic:
            probe.stretch = factor
        return factor


def _probes(trainer: Trainer) -> list[Probe]:
    return [callback for callback in trainer.callbacks if isinstance(callback, Probe)]  # type: ignore[attr-defined]
