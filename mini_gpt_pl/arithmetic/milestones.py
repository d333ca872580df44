"""When a run memorised and when it generalised: the definitions in use, by name, and a callback that notes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from mini_gpt_pl.callbacks.schedule import Schedule
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.runs.logs import log_now

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Milestone:
    """The first of some evaluations in a row at which the accuracy on a set is at or above a level.

    Args:
        name: As it is logged, behind `milestone/`.
        of: Name of the set.
        level: Accuracy.
        in_a_row: Evaluations at the level without one below it; the step is that of the last of them.
    """

    name: str
    of: str
    level: float
    in_a_row: int = 1

    def in_series(self, accuracy: pd.Series[float]) -> int | None:
        """The same as `reached`, of accuracies by step."""
        return self.reached([int(step) for step in accuracy.index], accuracy.tolist())

    def reached(self, steps: Sequence[int], accuracy: Sequence[float]) -> int | None:
        """The step at which it was reached by accuracies at ascending steps, None if it was not.

        Example:
            >>> Milestone("grokked", "test", 0.98, in_a_row=2).reached([1, 100, 200, 300], [0.0, 0.99, 0.98, 1.0])
            200
        """
        row = 0
        for step, value in zip(steps, accuracy, strict=True):
            row = row + 1 if value >= self.level else 0
            if row == self.in_a_row:
                return step
        return None


MEMORISED = Milestone("train_99", "train", 0.99)
BEGUN = Milestone("test_10", "test", 0.10)
"""Where a report lets the plateau end; it is not logged."""
GENERALISED = Milestone("test_90", "test", 0.90)
MILESTONES: tuple[Milestone, ...] = (
    MEMORISED,
    Milestone("test_50", "test", 0.50),
    GENERALISED,
    Milestone("test_95", "test", 0.95),
    Milestone("test_98", "test", 0.98),
    Milestone("test_98_thrice", "test", 0.98, in_a_row=3),
)
"""`train_99` is memorisation. The studies call four different steps the grok step: `test_90` (the tables and the lead
time), `test_95` (the spectral script), `test_98` (the runs over several seeds) and `test_98_thrice` (where training
stops). `test_50` is the middle of the rise."""


def reached(steps: Sequence[int], accuracy: Mapping[str, Sequence[float]]) -> dict[str, int | None]:
    """The step of every milestone of the sets whose accuracies are given, None for one that was not reached."""
    return {m.name: m.reached(steps, accuracy[m.of]) for m in MILESTONES if m.of in accuracy}


class Evaluation(Callback):
    """Measure the whole sets on a schedule, note the milestones, and end training at one if asked to.

    Logged at each evaluation: `eval/<set>_loss`, `eval/<set>_accuracy` and `eval/weight_norm`; and once, when it is
    known, `milestone/<name>`, the step at which it was reached. A run that never reaches the milestone it is to stop
    at ends at the trainer's `max_steps`; its outcome says which milestones were not reached.

    Args:
        schedule: When to evaluate, from step 1 on.
        stop_at: Name of the milestone that ends training; null trains on to `max_steps`.
        continue_steps: Steps to take after it.

    Attributes:
        milestones: The step of each milestone, None for one that has not been reached.

    Raises:
        UserError: There is no such milestone, the steps are negative, or the data has no whole sets.

    Example:
        >>> evaluation = Evaluation(Schedule(every=50), stop_at="test_98_thrice", continue_steps=400)
    """

    def __init__(
        self,
        schedule: Schedule = Schedule(every=100, steps=[1]),  # noqa: B008 (frozen)
        stop_at: str | None = None,
        continue_steps: int = 0,
    ) -> None:
        if stop_at is not None and stop_at not in (names := [milestone.name for milestone in MILESTONES]):
            raise UserError(f"Evaluation: there is no milestone {stop_at!r} to stop at; give one of {', '.join(names)}")
        if continue_steps < 0:
            raise UserError(f"Evaluation: continue_steps {continue_steps} is negative")
        self.schedule = schedule
        self.stop_at = stop_at
        self.continue_steps = continue_steps
        self.steps: list[int] = []
        self.accuracy: dict[str, list[float]] = {}
        self.milestones: dict[str, int | None] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.steps, self.accuracy, self.milestones = [], {}, {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not getattr(trainer.datamodule, "sets", None):  # type: ignore[attr-defined]
            raise UserError("Evaluation measures whole sets, and the data has none: leave it out of the callbacks")
        sets = trainer.datamodule.sets  # type: ignore[attr-defined]
        if self.stop_at and not any(m.name == self.stop_at and m.of in sets for m in MILESTONES):
            raise UserError(
                f"Evaluation: the sets {', '.join(sets)} have no milestone {self.stop_at!r}: give stop_at null"
            )

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        # Where several batches make a step: not before the first one, and once a step.
        if step > 0 and self.schedule.due(step) and step not in self.steps[-1:]:
            self._evaluate(trainer, pl_module, step)
        at = self.milestones.get(self.stop_at) if self.stop_at else None
        if at is not None and step >= at + self.continue_steps:
            trainer.should_stop = True

    def _evaluate(self, trainer: Trainer, module: Any, step: int) -> None:
        with trainer.precision_plugin.forward_context():
            logged = log_now(trainer, module.evaluate(trainer.datamodule.sets), step)  # type: ignore[attr-defined]
        self.steps.append(step)
        for name in trainer.datamodule.sets:  # type: ignore[attr-defined]
            self.accuracy.setdefault(name, []).append(logged[f"eval/{name}_accuracy"])
            module.log(f"{name}_accuracy", torch.tensor(self.accuracy[name][-1]), prog_bar=True, logger=False)
        before, self.milestones = self.milestones, reached(self.steps, self.accuracy)
        new = {name: at for name, at in self.milestones.items() if at is not None and before.get(name) is None}
        if new:
            log_now(trainer, {f"milestone/{name}": float(at) for name, at in new.items()}, step)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "accuracy": self.accuracy}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps, self.accuracy = list(state_dict["steps"]), {k: list(v) for k, v in state_dict["accuracy"].items()}
        self.milestones = reached(self.steps, self.accuracy)
