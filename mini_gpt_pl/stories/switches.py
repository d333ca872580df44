"""Where the probe's accuracy switched in a finished run, and over which snapshots."""

from __future__ import annotations

from typing import NamedTuple

from mini_gpt_pl.geometry.path import switching
from mini_gpt_pl.geometry.path.switching import Event, Interval, Switch
from mini_gpt_pl.runs.folder import Run

P_OOD = "probe/p_ood"


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
