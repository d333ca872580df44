"""The report of a sweep: which runs it is about, what they differ in, and its panels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mini_gpt_pl.dashboard.layout import WHOLE, Logged, Panel, Section
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.presets import preset
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.sweep.grid import Sweep, read_sweep

# What runs differ in without being another experiment.
_ASIDE = (
    *("run_dir", "overwrite", "resume", "config", "ckpt_path", "data.cache_dir"),
    *("trainer.logger", "trainer.callbacks", "trainer.default_root_dir", "trainer.accelerator", "trainer.devices"),
)
_MOST = 6
"""Settings that a report compares runs by; the others say no more than the runs' names."""


@dataclass(frozen=True)
class SweepRuns:
    """The runs that a report is about.

    Args:
        title: Of the report.
        varied: Config keys in which the runs differ, dotted.
        numbers: Those of them whose values are all numbers.
        names: Names of the runs; empty if `identifier` says which they are.
        identifier: Of a sweep that W&B keeps.
    """

    title: str
    varied: tuple[str, ...]
    numbers: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    identifier: str = ""


def find_sweep(wanted: str, runs: Sequence[Run]) -> SweepRuns:
    """Find out which runs a sweep has and what it varies.

    Args:
        wanted: A sweep file, the name of one in `configs/sweeps`, or the id of a sweep on the W&B server.
        runs: Run folders of a sweep on the server: they say what it varies, which its file says otherwise.

    Raises:
        UserError: It is none of these.
    """
    path = _sweep_file(wanted)
    if path is None and not re.fullmatch(r"[a-z0-9]{6,12}", wanted):
        raise UserError(
            f"--sweep {wanted}: no sweep file, none in configs/sweeps, and no id of a W&B sweep (eight letters and "
            "digits): give one of them"
        )
    if path is None:
        settings = [{k: v for k, v in flatten(run.config).items() if not _aside(k)} for run in runs]
        return SweepRuns(f"Sweep {wanted}", *_varied(settings), identifier=wanted)
    sweep = read_sweep(path)
    names = tuple(point.name for point in sweep.points)
    return SweepRuns(f"Sweep {sweep.name}", *_varied(_of_points(sweep)), names=names)


def _sweep_file(wanted: str) -> Path | None:
    if (path := preset(wanted, "sweeps")) is not None:
        return path
    if wanted.endswith((".yaml", ".yml")):
        raise UserError(f"no sweep file {wanted}: give the path of one")
    return None


def _of_points(sweep: Sweep) -> list[dict[str, Any]]:
    """What each point sets, with the configuration files that it names read."""
    found = []
    for point in sweep.points:
        settings: dict[str, Any] = {}
        for key, value in point.parameters.items():
            if key in ("config", "c"):
                settings |= flatten(yaml.safe_load((preset(value) or Path(value)).read_text()) or {})
            else:
                settings |= flatten({key: value})
        found.append(settings)
    return found


def flatten(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Give nested settings dotted keys; lists stay whole, as W&B keeps them."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{above}{key}.")
        else:
            flat[f"{above}{key}"] = value
    return flat


def _varied(settings: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Keys that have several values, most telling first, and those of them that are numbers throughout."""
    keys = dict.fromkeys(key for one in settings for key in one)
    several = [key for key in keys if len({repr(one.get(key)) for one in settings}) > 1]
    # A setting that only some runs have (another optimizer's) says less than one that all have.
    several.sort(key=lambda key: sum(key not in one for one in settings))
    # Of several that tell the same runs apart, the first.
    telling = {_partition([repr(one.get(key)) for one in settings]): key for key in reversed(several)}
    kept = tuple([key for key in several if key in telling.values()][:_MOST])
    numbers = tuple(key for key in kept if all(_is_number(one.get(key)) for one in settings))
    return kept, numbers


def _partition(values: Sequence[str]) -> tuple[int, ...]:
    """Say which values are equal: each one's first position."""
    return tuple(values.index(value) for value in values)


def _aside(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in _ASIDE)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# ------------------------------------------------------------------------------------------------------- panels


_CURVES = (
    Panel("Validation loss", ("val/loss",)),
    Panel("Key retrieval, exact match", ("probe/p_in", "probe/p_ood")),
    Panel("PC1 of the drift, raw", (f"backbone/{WHOLE}/pc1",)),
    Panel("PC1, unit rows", (f"backbone/{WHOLE}/pc1_unit",)),
    Panel("cos(v_b, theta_0)", (f"backbone/{WHOLE}/cos_theta0",)),
    Panel("Persistence, drift over the free walk's", (f"backbone/{WHOLE}/persistence",)),
    Panel("Excess of PC1", (f"backbone/{WHOLE}/pc1_excess",), level=0.0, chance="decaying walk"),
    Panel("Update with v_b of its past", (f"alignment/{WHOLE}/update",), level=0.0, chance="walk"),
)
_BARS = tuple(
    Panel(title, (f"backbone/{WHOLE}/{name}",), kind="bars")
    for title, name in (
        ("PC1 of the drift, raw, at the end", "pc1"),
        ("PC1, unit rows, at the end", "pc1_unit"),
        ("k95 at the end", "k95"),
        ("cos(v_b, theta_0) at the end", "cos_theta0"),
        ("Persistence at the end", "persistence"),
        ("Autocorrelation of updates at the end", "autocorrelation"),
    )
)
_OUTCOMES = ("val/loss", "probe/p_ood", f"backbone/{WHOLE}/pc1_excess", f"backbone/{WHOLE}/persistence_excess")


def report_sections(logged: Logged, sweep: SweepRuns) -> list[Section]:
    """Lay out the report of a sweep: curves, last values, and both against what was varied.

    Args:
        logged: What runs log.
        sweep: Whose report.
    """
    panels = {
        "Over training": [found for panel in _CURVES if (found := logged.resolve(panel))],
        "At the end, beside the null": [found for panel in _BARS if (found := logged.resolve(panel))],
        "Against what was varied": [found for panel in _against(sweep) if (found := logged.resolve(panel))],
    }
    return [Section(name, tuple(members)) for name, members in panels.items() if members]


def _against(sweep: SweepRuns) -> list[Panel]:
    """Parallel coordinates of all settings, and a scatter of each outcome over each numeric one."""
    if not sweep.varied:
        return []
    found = [Panel("Settings and outcomes", _OUTCOMES, kind="parallel", across=sweep.varied)]
    for key in sweep.numbers:
        for outcome in _OUTCOMES:
            level = 0.0 if outcome.endswith("_excess") else None
            title = f"{outcome.replace(f'{WHOLE}/', '')} over {key.rpartition('.')[2]}"
            found.append(Panel(title, (outcome,), level=level, chance="null", kind="scatter", across=(key,)))
    return found
