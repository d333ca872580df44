"""Where the probe's accuracy switched in a finished run, over which snapshots, and beyond which error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mini_gpt_pl.geometry.path import switching
from mini_gpt_pl.geometry.path.switching import Event, Interval, Switch
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.evaluation import binomial_error

P_OOD = "probe/p_ood"
_DRAWS = 200


class Rules(NamedTuple):
    """What counts as a peak or a trough; see `switching.events`. The defaults are the paper's.

    Attributes:
        prominence: Least height, in the metric's units.
        reach: Number of evaluations to either side that a value is measured against.
    """

    prominence: float = 0.03
    reach: int = 3

    @classmethod
    def of(cls, run: Run) -> Rules:
        """Read the rules of the run's own SwitchingProbe, where it had one that watched p_ood."""
        for settings in run.callback_settings("SwitchingProbe"):
            if settings.get("metric", P_OOD) == P_OOD:
                return cls(**{name: settings[name] for name in cls._fields if name in settings})
        return cls()


def events_of(run: Run) -> list[Event]:
    """Peaks and troughs of p_ood by the run's own rules; none if it was not measured."""
    series = run.series(P_OOD)
    return switching.events([int(step) for step in series.index], series.tolist(), *Rules.of(run))


def switches_of(run: Run) -> list[tuple[Switch, Interval]]:
    """Switches of p_ood by the run's own rules, each with the snapshots at, or last before, its two ends.

    A switch whose ends are one and the same snapshot is left out.

    Raises:
        UserError: The run's trajectory is missing or corrupt.
    """
    steps = run.trajectory.steps
    pairs = switching.switches(events_of(run), Rules.of(run).reach)
    placed = [(pair, switching.interval_of(pair, steps)) for pair in pairs]
    return [(pair, interval) for pair, interval in placed if interval is not None]


def switch_of(run: Run) -> tuple[int, int] | None:
    """Return the first switch, from peak to trough, by the steps of its snapshots; None where there is none."""
    steps = run.trajectory.steps
    return next(((steps[interval.first], steps[interval.last]) for _, interval in switches_of(run)), None)


# ------------------------------------------------------------------------------------- beside the evaluation's error


class Judged(NamedTuple):
    """A switch beside the error of its evaluations.

    Attributes:
        switch: Peak and trough.
        error: Standard error of peak minus trough, from both binomial errors; too large where the same questions are
            answered alike.
        last_error: Binomial error at the last evaluation, which the published tiers take for all of them.
    """

    switch: Switch
    error: float
    last_error: float

    @property
    def height(self) -> float:
        """Peak minus trough."""
        return self.switch.peak.value - self.switch.trough.value

    @property
    def tier(self) -> str:
        """By its own error; see `tier`."""
        return tier(self.height, self.error)


def tier(height: float, error: float) -> str:
    """A for a height of 3 errors or more, B for 2 or more, else C, as published."""
    sigmas = height / error if error > 0 else math.inf
    return "A" if sigmas >= 3 else "B" if sigmas >= 2 else "C"


def questions_of(run: Run) -> int:
    """Number of questions behind each p_ood, by the configuration; 2,000 where it names none."""
    return int(run.settings.get("data", {}).get("probe", {}).get("eval_examples", 2000))


def judged(run: Run) -> list[Judged]:
    """Every switch of p_ood by the run's own rules."""
    count, series = questions_of(run), run.series(P_OOD)
    pairs = switching.switches(events_of(run), Rules.of(run).reach)
    if not pairs:
        return []
    last = binomial_error(float(series.iloc[-1]), count)
    ends = [(binomial_error(pair.peak.value, count), binomial_error(pair.trough.value, count)) for pair in pairs]
    return [Judged(pair, math.hypot(*both), last) for pair, both in zip(pairs, ends, strict=True)]


def switches_by_noise(values: Sequence[float], count: int, rules: Rules) -> tuple[float, float]:
    """Number of switches that evaluations of a smooth curve would have: mean and standard deviation over draws.

    The curve is the running median of the series over as many values as a peak is measured against; each draw asks new
    questions at every evaluation.

    Args:
        values: p_ood at each evaluation.
        count: Questions of an evaluation.
        rules: What counts as a peak or a trough.
    """
    width = rules.reach
    smooth = [float(np.median(values[max(0, i - width) : i + width + 1])) for i in range(len(values))]
    rng = np.random.Generator(np.random.Philox(key=0))
    numbers = []
    for row in rng.binomial(count, np.clip(smooth, 0, 1), (_DRAWS, len(smooth))) / count:
        found = switching.events(range(len(row)), row.tolist(), rules.prominence, rules.reach)
        numbers.append(len(switching.switches(found, rules.reach)))
    return float(np.mean(numbers)), float(np.std(numbers))
