"""Which runs belong together, and what they are called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

from mini_gpt_pl.report.settings import facts, optimizer_label
from mini_gpt_pl.runs.folder import Run

OF_OPTIMIZER = ("optimizer", "learning rate", "weight decay", "beta1", "beta2", "momentum", "Nesterov")
"""Facts that are an optimizer's own."""
_PREFERRED = 0.95

AnyRun = TypeVar("AnyRun", bound=Run)


def from_scratch(runs: Sequence[AnyRun]) -> list[AnyRun]:
    """Runs that were not reheated from another."""
    return [run for run in runs if run.reheated is None]


def family(runs: Sequence[AnyRun], *free: str) -> list[AnyRun]:
    """Return the largest set of runs that agree in all facts but the free ones; of equal ones the first.

    Args:
        runs: Reheated ones are left out.
        free: Facts in which the runs may differ.
    """
    return max(families(from_scratch(runs), *free), key=len, default=[])


def families(runs: Sequence[AnyRun], *free: str) -> list[list[AnyRun]]:
    """Gather runs that agree in all facts but the free ones, in the order in which they were given."""
    found: dict[str, list[AnyRun]] = {}
    for run in runs:
        fixed = {key: value for key, value in facts(run).items() if key not in free}
        found.setdefault(repr(fixed), []).append(run)
    return list(found.values())


def seeds_of(runs: Sequence[AnyRun]) -> list[AnyRun]:
    """Runs that differ in their seed only, one of each seed; none if there is no such pair."""
    return _several(one_of_each_seed(family(runs, "seed")), "seed")


def one_of_each_seed(runs: Sequence[AnyRun]) -> list[AnyRun]:
    """Keep the first run of each seed: one that was run twice, as in two sweeps, is no second draw."""
    kept: dict[Any, AnyRun] = {}
    for run in runs:
        kept.setdefault(facts(run)["seed"], run)
    return list(kept.values())


def beta2_of(runs: Sequence[AnyRun]) -> list[AnyRun]:
    """Runs that differ in beta2 (and perhaps seed) only, by falling beta2; none if there is no such pair."""
    found = [run for run in family(runs, "beta2", "seed") if facts(run)["beta2"] is not None]
    return sorted(_several(found, "beta2"), key=lambda run: -float(facts(run)["beta2"]))


def one_beta2(runs: Sequence[AnyRun]) -> list[AnyRun]:
    """Of runs that differ in beta2 (and perhaps seed) only, keep those of one beta2: 0.95, else the commonest one."""
    kept: list[AnyRun] = []
    for part in families(runs, "beta2", "seed"):
        count = Counter(facts(run).get("beta2") for run in part)
        beta2 = _PREFERRED if count[_PREFERRED] else count.most_common(1)[0][0]
        kept += [run for run in part if facts(run)["beta2"] == beta2]
    return [run for run in runs if run in kept]


def optimizers_of(runs: Sequence[AnyRun]) -> list[AnyRun]:
    """Runs that differ in their optimizer, its settings and their length, one of each; none if there are not two.

    Of several runs of one kind, that of the seed that most runs have, and the first of those.
    """
    known = [(run, facts(run)) for run in one_beta2(family(runs, *OF_OPTIMIZER, "steps", "seed"))]
    usual = Counter(found["seed"] for _, found in known)
    known.sort(key=lambda pair: -usual[pair[1]["seed"]])
    kinds: dict[str, AnyRun] = {}
    for run, found in known:
        kinds.setdefault(optimizer_label(found), run)
    return list(kinds.values()) if len(kinds) > 1 else []


def optimizer_labels(runs: Sequence[Run]) -> list[str]:
    """Name the optimizers of runs, with their beta2 where runs that have one differ in it."""
    found = [facts(run) for run in runs]
    several = len({one["beta2"] for one in found} - {None}) > 1
    return [optimizer_label(one, beta2=several) for one in found]


def _several(runs: list[AnyRun], fact: str) -> list[AnyRun]:
    return runs if len({facts(run)[fact] for run in runs}) > 1 else []


def names(runs: Sequence[AnyRun]) -> dict[AnyRun, str]:
    """Name runs by their folders, and by as many folders above as it takes to tell two of one name apart."""
    parts = [run.path.resolve().parts for run in runs]
    depths = [1] * len(parts)
    while True:
        found = ["/".join(part[-depth:]) for part, depth in zip(parts, depths, strict=True)]
        alike = [k for k, name in enumerate(found) if found.count(name) > 1 and depths[k] < len(parts[k])]
        if not alike:
            return dict(zip(runs, found, strict=True))
        for k in alike:
            depths[k] += 1
