"""Which runs of stories differ in their optimizer or in its beta2 only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mini_gpt_pl.report.families import AnyRun, families, family, several
from mini_gpt_pl.report.settings import facts, optimizer_label
from mini_gpt_pl.runs.folder import Run

OF_OPTIMIZER = ("optimizer", "learning rate", "weight decay", "beta1", "beta2", "momentum", "Nesterov")
"""Facts that are an optimizer's own."""
_PREFERRED = 0.95


def beta2_of(runs: Sequence[AnyRun]) -> list[AnyRun]:
    """Runs that differ in beta2 (and perhaps seed) only, by falling beta2; none if there is no such pair."""
    found = [run for run in family(runs, "beta2", "seed") if facts(run)["beta2"] is not None]
    return sorted(several(found, "beta2"), key=lambda run: -float(facts(run)["beta2"]))


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
