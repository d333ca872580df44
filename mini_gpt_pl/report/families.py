"""Which runs belong together, and what tells them apart."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mini_gpt_pl.report.settings import facts, optimizer_label
from mini_gpt_pl.runs import Run

_SHORT = {
    "optimizer": "{}",
    "learning rate": "lr {}",
    "weight decay": "decay {}",
    "beta2": "β₂ {}",
    "seed": "seed {}",
    "steps": "{} steps",
}
_OF_OPTIMIZER = ("optimizer", "learning rate", "weight decay", "beta1", "beta2", "momentum", "Nesterov")


def from_scratch(runs: Sequence[Run]) -> list[Run]:
    """Runs that were not reheated from another."""
    return [run for run in runs if run.reheated is None]


def family(runs: Sequence[Run], *free: str) -> list[Run]:
    """Return the largest set of runs that agree in all facts but the free ones; of equal ones the first.

    Args:
        runs: Reheated ones are left out.
        free: Facts in which the runs may differ.
    """
    found: dict[str, list[Run]] = {}
    for run in from_scratch(runs):
        fixed = {key: value for key, value in facts(run).items() if key not in free}
        found.setdefault(repr(fixed), []).append(run)
    return max(found.values(), key=len, default=[])


def seeds_of(runs: Sequence[Run]) -> list[Run]:
    """Runs that differ in their seed only; none if there is no such pair."""
    return _several(family(runs, "seed"), "seed")


def beta2_of(runs: Sequence[Run]) -> list[Run]:
    """Runs that differ in beta2 (and perhaps seed) only, by falling beta2; none if there is no such pair."""
    found = [run for run in family(runs, "beta2", "seed") if facts(run)["beta2"] is not None]
    return sorted(_several(found, "beta2"), key=lambda run: -float(facts(run)["beta2"]))


def optimizers_of(runs: Sequence[Run]) -> list[Run]:
    """Runs that differ in their optimizer and its settings, one of each; none if there are not two.

    Of several runs of one kind, the one with the beta2 and the seed that most runs have, and the first of those.
    """
    known = [(run, facts(run)) for run in family(runs, *_OF_OPTIMIZER, "seed")]
    usual = {key: Counter(found[key] for _, found in known) for key in ("beta2", "seed")}
    known.sort(key=lambda pair: [-usual[key][pair[1][key]] for key in usual])
    kinds: dict[str, Run] = {}
    for run, found in known:
        kinds.setdefault(optimizer_label(found), run)
    return list(kinds.values()) if len(kinds) > 1 else []


def _several(runs: list[Run], fact: str) -> list[Run]:
    return runs if len({facts(run)[fact] for run in runs}) > 1 else []


def labels(runs: Sequence[Run]) -> list[str]:
    """Name runs by what tells them apart; by their folders too where that leaves two alike."""
    found = [facts(run) for run in runs]
    differing = [key for key in (found[0] if found else ()) if len({repr(f[key]) for f in found} - {"None"}) > 1]
    names = [_name(run, own, differing) for run, own in zip(runs, found, strict=True)]
    folders = [run.path.resolve().name for run in runs]
    return [
        name if name and names.count(name) == 1 else f"{name} ({folder})" if name else folder
        for name, folder in zip(names, folders, strict=True)
    ]


def _name(run: Run, found: Mapping[str, Any], differing: Sequence[str]) -> str:
    reheat = run.reheated
    parts = [] if reheat is None else [f"reheat, {reheat_setting(run, reheat)[1]}"]
    for key in differing:
        if (value := found[key]) is not None:
            parts.append(_SHORT.get(key, f"{key} {{}}").format(f"{value:g}" if isinstance(value, float) else value))
    return ", ".join(parts)


def is_control(record: Mapping[str, Any]) -> bool:
    """Whether a reheated run only went on with its parent's schedule."""
    return record.get("factor") == 1


def reheat_setting(run: Run, record: Mapping[str, Any]) -> tuple[float, str]:
    """What a reheat was done with: a key that puts high rates first, and words.

    Args:
        run: The reheated run.
        record: What it recorded of its parent.
    """
    if is_control(record):
        return math.inf, "control, the parent's schedule"
    if (factor := record.get("factor")) is not None:
        return -float(factor), f"the parent's rate × {factor:g}"
    rate = record.get("lr") or facts(run)["learning rate"]
    return (0.0, run.path.resolve().name) if rate is None else (-float(rate), f"lr {rate:g}")
