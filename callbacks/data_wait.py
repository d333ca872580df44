"""How long training waits for its data."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from mini_gpt_pl.callbacks.cost import TrainingClock

# The end of the name under which Lightning's training loop tells its profiler of `next` on the training data.
_FETCH = ".train_dataloader_next"


class DataWait(TrainingClock):
    """Measure what share of training time goes by waiting for the next batch.

    Logs `overhead/data_wait` when the trainer logs: the time in `next` of the training data loaders over the time of
    training, evaluations left out, both since the warm-up. In it is what the host does there: it waits for a worker and
    unpacks the batch or, without workers, builds it. The copy to the device is not. On a GPU it is an upper bound of
    what the device waits, which has work queued while the host waits. Times differ between runs.

    The loop tells the trainer's profiler, also the one that does nothing, when a fetch begins and ends, and the
    callback listens there. No hook is so near to it: between the end of a batch and the start of the next, loggers and
    checkpoints are at work too.

    Args:
        warmup: Optimizer steps, of a resumed run too, before the clock starts: workers start, and kernels are compiled.

    Example:
        >>> trainer = Trainer(callbacks=[DataWait()])  # doctest: +SKIP
    """

    def __init__(self, warmup: int = 20) -> None:
        super().__init__(warmup)
        self._own: tuple[Any, Any, Any] | None = None  # the profiler and its methods
        self._waited = 0.0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        profiler: Any = trainer.profiler  # type: ignore[attr-defined]
        start, stop, begun = profiler.start, profiler.stop, 0.0

        def started(action_name: str) -> None:
            nonlocal begun
            start(action_name)
            if action_name.endswith(_FETCH):
                begun = time.perf_counter()

        def stopped(action_name: str) -> None:
            if action_name.endswith(_FETCH):
                self._waited += time.perf_counter() - begun
            stop(action_name)

        self._own = profiler, start, stop
        profiler.start, profiler.stop = started, stopped

    @override
    def _start(self, trainer: Trainer) -> None:
        self._waited = 0.0

    @override
    def _report(self, trainer: Trainer, elapsed: float) -> dict[str, Any]:
        return {"overhead/data_wait": self._waited / max(elapsed, 1e-9)}

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._own is not None:
            profiler, start, stop = self._own
            profiler.start, profiler.stop = start, stop
            self._own = None
