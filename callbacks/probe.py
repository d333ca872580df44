"""What every probe has in common: when it speaks, what it costs, and how its numbers reach the host."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import TypeVar, override

from mini_gpt_pl.callbacks.schedule import Schedule
from mini_gpt_pl.runs.logs import log_now, logging_due


@dataclass(frozen=True)
class Estimate:
    """What a probe will take, as far as can be said before training.

    Args:
        name: Of the probe.
        bytes: Memory it holds where the model is at the end of training, in bytes.
        passes: Forward and backward passes of one micro-batch that it adds to each optimizer step, on average.
        host: Bytes of the host's memory beside that.
        disk: Bytes of the files that it leaves.
    """

    name: str
    bytes: float
    passes: float
    host: float = 0.0
    disk: float = 0.0

    @property
    def memory(self) -> str:
        """Say in words how many bytes go where, leaving out what takes none."""
        places = (("with the model", self.bytes), ("in host memory", self.host), ("on disk", self.disk))
        return ", ".join(f"{size / 2**20:,.0f} MiB {place}" for place, size in places if size) or "0 MiB"


# A step and what was measured at it.
Row: TypeAlias = tuple[int, Mapping[str, Tensor | float]]
Name = TypeVar("Name", bound=Hashable, default=str)


class Deferred(Generic[Name]):
    """Device numbers by step and name, kept where they are until one transfer moves them all."""

    def __init__(self) -> None:
        self._pending: list[tuple[int, Sequence[Name], Float[Tensor, " k"]]] = []

    def __bool__(self) -> bool:
        return bool(self._pending)

    def add(self, step: int, names: Sequence[Name], values: Float[Tensor, " k"]) -> None:
        """Remember one number per name."""
        assert len(names) == values.numel(), "one number per name"
        self._pending.append((step, names, values.detach().double().reshape(-1)))

    def take(self) -> list[tuple[int, dict[Name, float]]]:
        """Move everything to the host at once and forget it."""
        pending, self._pending = self._pending, []
        places = {values.device for *_, values in pending}
        flat = {
            at: iter(torch.cat([values for *_, values in pending if values.device == at]).tolist()) for at in places
        }
        return [(step, {name: next(flat[values.device]) for name in names}) for step, names, values in pending]


class Stopwatch:
    """Time spent in a probe, without waiting for the device: CUDA events are read once they have passed."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what happens inside: device time where there is a GPU, and never less than the host's."""
        begun = time.perf_counter()
        pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) if _on_gpu() else None
        if pair:
            pair[0].record()
        try:
            yield
        finally:
            if pair:
                pair[1].record()
                self._events.append(pair)
            else:
                self._seconds += time.perf_counter() - begun

    @property
    def seconds(self) -> float:
        """Seconds so far; on a GPU, those of the intervals that the device has finished."""
        waiting = []
        for begin, end in self._events:
            if end.query():
                self._seconds += begin.elapsed_time(end) / 1e3
            else:
                waiting.append((begin, end))
        self._events = waiting
        return self._seconds


class Probe(Callback):
    """Base of the callbacks that measure: a schedule that a budget may stretch, and a stopwatch.

    Args:
        schedule: When to measure.
    """

    stretchable = True
    """Whether a budget may make this probe speak less often."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule
        self.stretch = 1
        self.watch = Stopwatch()
        self.asked = 0
        self.answered = 0
        self._waits: dict[str, int] = {}
        self._last_step = 0
        self._asked_at = -1
        self._said: set[str] = set()

    def _once(self, text: str, say: Callable[[str], None] = rank_zero_info) -> None:
        """Say why a number is missing, or not what it seems, once."""
        if text not in self._said:
            self._said.add(text)
            say(text)

    def _reset(self) -> None:
        """Forget the fit before this one; called when a fit is set up, before a checkpoint is loaded."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._asked_at = -1
            self._reset()

    def stepped(self, trainer: Trainer) -> bool:
        """Whether the optimizer has stepped since the last call; a micro-batch of an accumulation alone is no step."""
        last, self._last_step = self._last_step, trainer.global_step
        return trainer.global_step != last

    def unstretch(self) -> None:
        """Follow the schedules as they are again."""
        self.stretch, self._waits = 1, {}

    def due(self, step: int, schedule: Schedule | None = None, name: str = "") -> bool:
        """Whether to measure at this step: every `stretch`-th time that the schedule asks.

        Args:
            step: Optimizer step.
            schedule: A second schedule of the probe; its own for None.
            name: Of the second schedule.
        """
        if not (schedule or self.schedule).due(step):
            return False
        self.asked += 1
        self._waits[name] = self._waits.get(name, 0) - 1
        if self._waits[name] > 0:
            return False
        self._waits[name] = self.stretch
        self.answered += 1
        return True

    def due_once(self, step: int) -> bool:
        """Whether to measure at this step, or at one since the last question, where a batch takes several steps.

        Of the micro-batches of one step only the first one is answered, so that a stretched schedule counts steps.
        """
        last, self._asked_at = self._asked_at, step
        passed = range(step, last if 0 <= last <= step else step - 1, -1)
        return any(self.schedule.due(s) for s in passed) and self.due(next(s for s in passed if self.schedule.due(s)))

    def estimate(self, steps: int, dim: int) -> Estimate:
        """Say what the probe will take.

        Args:
            steps: Optimizer steps of the run.
            dim: Number of recorded weights, D.
        """
        return Estimate(type(self).__name__, bytes=0.0, passes=0.0)


class DeferringProbe(Probe):
    """A probe that leaves its numbers on the device until the trainer logs, before evaluations and at every end.

    Where that makes many rows they go to the loggers one by one, over the steps until the trainer logs again: for as
    long as loggers take all of them at once, a device would have nothing to do.
    """

    def __init__(self, schedule: Schedule) -> None:
        super().__init__(schedule)
        self._trainer: Trainer | None = None
        self._deferred: Deferred[Any] = Deferred()
        self._outbox: deque[Row] = deque()
        self._share = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._trainer, self._deferred = trainer, Deferred()
        super().setup(trainer, pl_module, stage)

    def _take_rows(self) -> Iterable[Row]:
        """Move to the host whatever has been measured since the last time: step and metrics, one row a step."""
        rows: dict[int, dict[str, float]] = {}
        for step, numbers in self._deferred.take():
            rows.setdefault(step, {}).update(numbers)
        return sorted(rows.items())

    @override
    def state_dict(self) -> dict[str, Any]:
        self._flush()  # a resumed run does not log it again
        return {}

    def _flush(self) -> None:
        """Log whatever has been measured; nothing if there is nothing."""
        if self._trainer is not None:
            self._outbox.extend(self._take_rows())
            self._log(len(self._outbox))

    def _log(self, rows: int) -> None:
        assert self._trainer is not None
        for _ in range(min(rows, len(self._outbox))):
            step, metrics = self._outbox.popleft()
            known = {name: value for name, value in metrics.items() if value == value}  # what is undefined is left out
            log_now(self._trainer, known, step)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if logging_due(trainer, trainer.global_step):
            self._outbox.extend(self._take_rows())
            self._share = math.ceil(len(self._outbox) / max(1, trainer.log_every_n_steps))  # type: ignore[attr-defined]
        self._log(self._share)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._flush()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._flush()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._flush()


class StateProbe(DeferringProbe):
    """A probe of the module as it is after the steps of its schedule; 0 is before the first."""

    def _measure(self, trainer: Trainer, module: LightningModule) -> None:
        """Keep what the module shows at `trainer.global_step`."""
        raise NotImplementedError

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stepped(trainer)
        if trainer.global_step == 0 and self.due(0):
            with self.watch.running():
                self._measure(trainer, pl_module)
            self._flush()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.stepped(trainer) and self.due(trainer.global_step):
            with self.watch.running():
                self._measure(trainer, pl_module)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def state_key(callback: Callback, **settings: Any) -> str:
    """Name a callback's state in checkpoints by its class and the settings that tell it from others of the class.

    Example:
        >>> state_key(Callback(), name="trunk")
        "Callback{'name': 'trunk'}"
    """
    return f"{type(callback).__qualname__}{settings!r}"


def _on_gpu() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()
