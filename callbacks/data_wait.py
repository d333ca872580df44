"""How long training waits for its data."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import Profiler
from typing_extensions import override

from mini_gpt_pl.runs.logs import log_now, logging_due

# The end of the name under which Lightning's training loop tells its profiler of `next` on the training data.
_FETCH = ".train_dataloader_next"


class DataWait(Callback):
    """Measure what share of training time goes by waiting for the next batch.

    Logs `overhead/data_wait` when the trainer logs: the time in `next` of the training data loaders over the time of
    training, evaluations left out, both since the warm-up. In it is what the host does there: it waits for a worker and
    unpacks the batch or, without workers, builds it. The copy to the device is not. On a GPU it is an upper bound of
    what the device waits, which has work queued while the host waits. Times differ between runs.

    Args:
        warmup: Optimizer steps, of a resumed run too, before the clock starts: workers start, and kernels are compiled.

    Example:
        >>> trainer = Trainer(callbacks=[DataWait()])  # doctest: +SKIP
    """

    def __init__(self, warmup: int = 20) -> None:
        super().__init__()
        self.warmup = warmup
        self._fetches: _FetchWatch | None = None
        self._begun: float | None = None
        self._first = 0
        self._waited_before = 0.0
        self._paused = 0.0
        self._pause = 0.0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun, self._first = None, trainer.global_step
        self._fetches = _FetchWatch(trainer.profiler)  # type: ignore[attr-defined]

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._fetches is not None
        step = trainer.global_step
        if self._begun is None:
            if step >= self._first + self.warmup:
                self._begun, self._paused, self._waited_before = time.perf_counter(), 0.0, self._fetches.seconds
            return
        if logging_due(trainer, step):
            elapsed = max(time.perf_counter() - self._begun - self._paused, 1e-9)
            log_now(trainer, {"overhead/data_wait": (self._fetches.seconds - self._waited_before) / elapsed}, step)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause = time.perf_counter()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused += time.perf_counter() - self._pause

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()

    def _end(self) -> None:
        if self._fetches is not None:
            self._fetches.close()
            self._fetches = None


class _FetchWatch:
    """Sums up the time of the fetches that a profiler is told of.

    The loop tells the trainer's profiler, also the one that does nothing, when a fetch begins and ends. No hook is so
    near to it: between the end of a batch and the start of the next, loggers and checkpoints are at work too.
    """

    def __init__(self, profiler: Profiler) -> None:
        self.seconds = 0.0
        self._asked = 0.0
        self._profiler = profiler
        self._start, self._stop = profiler.start, profiler.stop
        profiler.start, profiler.stop = self.start, self.stop  # type: ignore[method-assign]

    def start(self, action_name: str) -> None:
        self._start(action_name)
        if action_name.endswith(_FETCH):
            self._asked = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name.endswith(_FETCH):
            self.seconds += time.perf_counter() - self._asked
        self._stop(action_name)

    def close(self) -> None:
        """Leave the profiler as it was."""
        self._profiler.start, self._profiler.stop = self._start, self._stop  # type: ignore[method-assign]
