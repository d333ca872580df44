"""Which runs belong together, and what they are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from mini_gpt_pl.report.settings import facts
from mini_gpt_pl.runs.folder import Run

AnyRun = TypeVar("AnyRun", bound=Run)


def from_scratch(runs: Sequence[AnyRun]) -> list[AnyRun]:
    """Runs that continue no other."""
    return [run for run in runs if run.lineage is None]


def families(runs: Sequence[AnyRun], *free: str) -> list[list[AnyRun]]:
    """Gather runs that agree in all facts but the free ones, in the order in which they were given."""
    gathered: dict[str, list[AnyRun]] = {}
    for run in runs:
        fixed = {key: value for key, value in facts(run).items() if key not in free}
        gathered.setdefault(repr(fixed), []).append(run)
    return list(gathered.values())


def family(runs: Sequence[AnyRun], *free: str) -> list[AnyRun]:
    """Return the largest of the families of the runs from scratch; of equal ones the first."""
    return max(families(from_scratch(runs), *free), key=len, default=[])


def one_of_each_seed(runs: Sequence[AnyRun]) -> list[AnyRun]:
    """Keep the first run of each seed: one that was run twice, as in two sweeps, is no second draw."""
    first: dict[Any, AnyRun] = {}
    for run in runs:
        first.setdefault(facts(run)["seed"], run)
    return list(first.values())


def seeds_of(runs: Sequence[AnyRun]) -> list[AnyRun]:
    """Runs that differ in their seed only, one of each seed; none if there is no such pair."""
    return several(one_of_each_seed(family(runs, "seed")), "seed")


def several(runs: list[AnyRun], fact: str) -> list[AnyRun]:
    """Return runs that differ in a fact; none where they all agree in it."""
    return runs if len({facts(run)[fact] for run in runs}) > 1 else []


def names(runs: Sequence[AnyRun]) -> dict[AnyRun, str]:
    """Name runs by their folders, and by as many folders above as it takes to tell two of one name apart."""
    parts = [run.path.resolve().parts for run in runs]
    depths = [1] * len(parts)
    while True:
        called = ["/".join(part[-depth:]) for part, depth in zip(parts, depths, strict=True)]
        alike = [k for k, name in enumerate(called) if called.count(name) > 1 and depths[k] < len(parts[k])]
        if not alike:
            return dict(zip(runs, called, strict=True))
        for k in alike:
            depths[k] += 1
