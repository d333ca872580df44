"""Runs that were intervened in: what became of each, and when, arm by arm."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mini_gpt_pl.arithmetic.statistics.lifetimes import Lifetimes, kaplan_meier
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.runs.folder import Run, runs_below

# A sweep names its folders by the values that it varies.
_SEED = re.compile(r"_?seed_everything-\d+$")
_OPERATION = re.compile(r"^operation-[^_]+_")


@dataclass(frozen=True)
class Ended:
    """What became of one run.

    Args:
        seed: Its `seed_everything`.
        at: Step at which it generalised, None if it had not when it was stopped.
        stopped: Its last step.
        train: Lowest train accuracy from when it had memorised on; its last if it never had.
        norm: ||theta|| at the end, parameter units.
        parallel: Mean over the changed steps of |P x| / |x|, NaN without a basis.
        null: The same of random directions inside the same blocks.
    """

    seed: int
    at: int | None
    stopped: int
    train: float
    norm: float
    parallel: float
    null: float

    @classmethod
    def of(cls, run: Run, milestone: str) -> Ended | None:
        """Read a run folder; None if the run has not ended.

        Raises:
            UserError: The run did not watch for the milestone.
        """
        outcome = run.outcome
        if outcome is None:
            return None
        if milestone not in outcome.milestones:
            raise UserError(f"{run.path} watched for no milestone {milestone!r}: train it with an Evaluation callback")
        memorised = outcome.milestones.get("train_99")
        accuracy = run.series("eval/train_accuracy")
        lowest = float(accuracy.iloc[-1] if memorised is None else accuracy.loc[memorised:].min())
        means = [_mean(run, rf"^intervention/[^/]+/{name}$") for name in ("parallel", "parallel_null")]
        seed = int(run.config["seed_everything"])
        return cls(seed, outcome.milestones[milestone], outcome.step, lowest, run.last("eval/weight_norm"), *means)

    @property
    def known(self) -> int:
        """Step that it generalised at, or was stopped at without."""
        return self.stopped if self.at is None else self.at


def _mean(run: Run, pattern: str) -> float:
    columns = run.metrics.filter(regex=pattern)
    return float(columns.mean().mean()) if columns.size else float("nan")


def arms_below(folder: Path, operation: str | None = None) -> dict[str, list[Run]]:
    """Group the runs in a sweep's folder by arm, in the order of the names: the folder's name without the seed.

    Names are those of the configuration files, in which a sweep writes hyphens for underscores.

    Args:
        folder: Of the sweep.
        operation: Only the runs of this operation, which their names then leave out.

    Raises:
        UserError: There are no runs, or none of the operation.
    """
    arms: dict[str, list[Run]] = {}
    for run in map(Run, runs_below(folder)):
        if operation is None or run.config.get("data", {}).get("operation") == operation:
            name = run.path.name if operation is None else _OPERATION.sub("", run.path.name)
            arms.setdefault(_SEED.sub("", name).replace("-", "_") or "baseline", []).append(run)
    if not arms:
        raise UserError(f"{folder} holds no run of the operation {operation!r}: give one that its sweep varies")
    return arms


def survival(runs: Sequence[Ended]) -> Lifetimes:
    """Share of runs that have not generalised yet, after each step at which one did or was stopped."""
    return kaplan_meier([run.at for run in runs], [run.stopped for run in runs])


def ended(arms: Mapping[str, Sequence[Run]], milestone: str) -> dict[str, list[Ended]]:
    """Read the runs of each arm that have ended; an arm without one is left out.

    Raises:
        UserError: A run did not watch for the milestone.
    """
    finished = {name: [run for given in runs if (run := Ended.of(given, milestone))] for name, runs in arms.items()}
    return {name: runs for name, runs in finished.items() if runs}


@dataclass(frozen=True)
class Delays:
    """How much later runs generalised than runs of the same seeds in another arm, in steps, shortest first.

    Args:
        steps: One a seed that both arms have. From run to stop where a run had not generalised: it takes longer.
        censored: Which of them are only known to be longer.
    """

    steps: tuple[int, ...]
    censored: tuple[bool, ...]

    @classmethod
    def between(cls, runs: Sequence[Ended], others: Sequence[Ended]) -> Delays:
        """Compare by seed; a seed whose other run did not generalise is left out."""
        bare = {run.seed: run.at for run in others}
        pairs = [(run.known - start, run.at is None) for run in runs if (start := bare.get(run.seed)) is not None]
        ordered = sorted(pairs, key=lambda pair: (pair[1], pair[0]))  # what is only known to be longer comes last
        return cls(tuple(steps for steps, _ in ordered), tuple(open_ for _, open_ in ordered))

    @property
    def middle(self) -> int:
        """Index of the median; of an even number the upper one."""
        return len(self.steps) // 2

    def longer(self, than: int) -> int:
        """In how many seeds the delay is above a number of steps."""
        return sum(steps > than for steps in self.steps)

    def __str__(self) -> str:
        """Median and range, > before what is only known to be longer."""
        if not self.steps:
            return "-"
        middle, low, high = (self._one(index) for index in (self.middle, 0, -1))
        return f"{middle} ({low} to {high})"

    def _one(self, index: int) -> str:
        return f"{'> ' if self.censored[index] else ''}{self.steps[index]:+d}"
