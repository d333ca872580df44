"""Runs of the second task side by side: which are draws of one setting, and what a row says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mini_gpt_pl.arithmetic.study.published import ONSETS, ONSETS_NO_DECAY
from mini_gpt_pl.arithmetic.study.runs import ResidueRun
from mini_gpt_pl.report.published import listed
from mini_gpt_pl.report.settings import plain
from mini_gpt_pl.report.sheet import Cell, number, word

_OWN_COLUMNS = ("operation", "learning rate", "weight decay", "seed")
_LENGTH = ("steps", "steps a snapshot")
"""Facts that say how long and how often a run was recorded, rather than how it goes."""


def _setting(run: ResidueRun, *free: str) -> str:
    """What decides how a run goes, but for some facts, as one string."""
    fixed = {key: value for key, value in run.facts.items() if key not in free}
    return repr((run.operation, fixed))


def groups_of(runs: Sequence[ResidueRun]) -> list[list[ResidueRun]]:
    """Gather runs that agree in all facts but the seed, in the order in which they were given."""
    groups: dict[str, list[ResidueRun]] = {}
    for run in runs:
        groups.setdefault(_setting(run, "seed"), []).append(run)
    return list(groups.values())


def distinct(runs: Sequence[ResidueRun]) -> list[ResidueRun]:
    """Keep one run of each setting and seed, the longest: the same run once more is no second draw."""
    kept: dict[str, ResidueRun] = {}
    for k, run in enumerate(runs):
        key = _setting(run, *_LENGTH) if run.seed is not None else str(k)
        if key not in kept or (bool(run.reported), run.last_step) > (bool(kept[key].reported), kept[key].last_step):
            kept[key] = run
    return [run for run in runs if any(run is other for other in kept.values())]


def repeated_note(runs: Sequence[ResidueRun]) -> str | None:
    """Name the runs that `distinct` leaves out; None if there are none."""
    kept = distinct(runs)
    twice = [run.label for run in runs if not any(run is other for other in kept)]
    return f"Of one setting and seed as a longer run, and not counted again: {', '.join(twice)}." if twice else None


def group_cells(group: Sequence[ResidueRun], runs: Sequence[ResidueRun]) -> dict[str, Cell]:
    """What the runs of a group have in common.

    Args:
        group: Of `groups_of`.
        runs: All runs of the table; what else they differ in has a column.
    """
    first = group[0]
    apart = [key for key in first.facts if key not in _OWN_COLUMNS and len({repr(r.facts.get(key)) for r in runs}) > 1]
    differing = [f"{key} {plain(first.facts[key])}" for key in apart if first.facts[key] is not None]
    return {
        "operation": word(first.operation),
        "lr": word(plain(first.rate)),
        "decay": word(plain(first.decay)),
        "else": word("; ".join(differing) or "-"),
        "seeds": number(len(group), "{:.0f}"),
    }


def run_cells(run: ResidueRun, runs: Sequence[ResidueRun]) -> dict[str, Cell]:
    """What a single run was; see `group_cells`."""
    cells = group_cells([run], runs)
    del cells["seeds"]
    return cells | {"seed": number(run.seed, "{:.0f}")}


def spread(values: Sequence[float], form: str) -> Cell:
    """Least and greatest of some published values; a dash without any."""
    if not values:
        return number(None)
    low, high = form.format(min(values)), form.format(max(values))
    ends = {"low": float(min(values)), "high": float(max(values))}
    return Cell(low if low == high else f"{low} to {high}", None, ends)


def published_onsets(run: ResidueRun) -> Mapping[str, Sequence[float]]:
    """What is published of the onsets of a run's operation; nothing for a run that does not repeat the paper's."""
    return (ONSETS_NO_DECAY if run.is_free else ONSETS).get(run.operation, {}) if run.repeats else {}


def setting_note(runs: Sequence[ResidueRun]) -> str | None:
    """Say why there are no published numbers beside runs that do not repeat the paper's."""
    other = next((run for run in runs if run.differs), None)
    if other is None:
        return None
    return (
        f"Published numbers stand only beside runs that repeat the paper's; {other.label} has {listed(other.differs)}."
    )


def commutator_note(runs: Sequence[ResidueRun]) -> str | None:
    """Say which commutator a table shows where runs have several."""
    several = next((run for run in runs if len(run.commutators) > 1), None)
    if several is None:
        return None
    others = ", ".join(name for name in several.commutators if name != several.reported)
    return f"The commutator is {several.reported}; {several.label} also measured {others}, which this does not show."
