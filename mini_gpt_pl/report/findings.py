"""What several runs say together: computed sentences for the head of a report that compares them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from mini_gpt_pl.geometry.path.nulls import Calibrated
from mini_gpt_pl.metrics.registry import statistics
from mini_gpt_pl.report.claims import Finding
from mini_gpt_pl.report.families import from_scratch, names, seeds_of
from mini_gpt_pl.report.settings import diverged, progress
from mini_gpt_pl.report.sheet import gap, interval
from mini_gpt_pl.report.statistics import t_interval
from mini_gpt_pl.report.subject import Subject
from mini_gpt_pl.runs.folder import METRICS, Run

_JUDGED = ("pc1", "pc1_unit", "k95", "k95_unit")  # those with an interval
_FEW = 4  # names that a sentence can hold


def findings(runs: Sequence[Run]) -> list[Finding]:
    """Collect what can be said across runs of any task; what takes runs that are not there is left out."""
    called = names(runs)
    scratch, sound = logged(runs), sound_ones(runs)
    said: list[Finding] = []
    if judged := {run: numbers for run, numbers in sound.items() if not math.isnan(numbers["pc1"].excess)}:
        said += [_standing_out(judged, called, name) for name in _JUDGED]
    said += _seeds(sound)
    if lost := [f"{called[run]} (at step {progress(run)[0]:,})" for run in scratch if diverged(run)]:
        said.append(Finding("Diverged", f"{', '.join(lost)}; the sentences above leave them out.", "runs"))
    return said


def logged(runs: Sequence[Run]) -> list[Run]:
    """Runs from scratch that logged anything."""
    return [run for run in from_scratch(runs) if (run.path / METRICS).is_file()]


def sound_ones(runs: Sequence[Run]) -> dict[Run, dict[str, Calibrated]]:
    """Those of them that neither diverged nor stood still, with their calibrated numbers."""
    return {run: found for run in logged(runs) if not diverged(run) and (found := Subject.of(run).calibrated())}


def _standing_out(sound: dict[Run, dict[str, Calibrated]], called: dict[Run, str], name: str) -> Finding:
    """In how many runs a number stands out of the decaying walk, and where it does not."""
    quantity, numbers = statistics()[name], {run: calibrated[name] for run, calibrated in sound.items()}
    sides: dict[str, list[str]] = {"above": [], "below": [], "within": []}
    for run, one in numbers.items():
        sides["above" if one.low > 0 else "below" if one.high < 0 else "within"].append(called[run])
    parts = [
        f"{side} in {len(inside)}" + (f" ({', '.join(inside)})" if 0 < len(inside) <= _FEW < len(sound) else "")
        for side, inside in sides.items()
    ]
    excesses = [one.excess for one in numbers.values()]
    span = interval(min(excesses), max(excesses), quantity.format).text
    said = f"of {len(sound)} runs from scratch {', '.join(parts)}; excess {span}."
    return Finding(f"{quantity.title}, against the decaying walk", said, "runs")


def _seeds(sound: dict[Run, dict[str, Calibrated]]) -> Iterator[Finding]:
    """Whose excess has an interval over seeds that leaves out zero."""
    chosen = seeds_of(list(sound))
    if len(chosen) < 2:
        return
    apart, tried = [], 0
    for name, quantity in statistics().items():
        excesses = [sound[run][name].excess for run in chosen if name in sound[run]]
        same = quantity.format == "{:.0f}" and len(set(excesses)) == 1
        # Counts that are the same in every seed have an interval without a width, which says nothing.
        if len(excesses) < 2 or any(map(math.isnan, excesses)) or same:
            continue
        tried += 1
        mean, half = t_interval(excesses)
        if abs(mean) > half:
            apart.append(f"{quantity.title} {gap(mean, quantity.format).text}")
    said = f"{len(apart)} of {tried} excesses have a t interval over {len(chosen)} seeds that leaves out zero"
    chance = f"of {tried} such intervals about {0.05 * tried:.0f} would by chance."
    yield Finding("Over seeds", f"{said}{': ' if apart else ''}{'; '.join(apart)}; {chance}", "seeds")
