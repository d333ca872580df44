"""The report of a sweep: which runs it is about, what they differ in, and its panels."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mini_gpt_pl.dashboard.layout import WHOLE, Logged, Panel, Section, catalogue
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.metrics.registry import data, title_of
from mini_gpt_pl.presets import preset
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.sweep.grid import Sweep, read_sweep

# What runs differ in without being another experiment.
_ASIDE = (
    *("run_dir.", "overwrite.", "resume.", "config.", "ckpt_path.", "data.cache_dir."),
    *("trainer.logger.", "trainer.callbacks.", "trainer.default_root_dir.", "trainer.accelerator.", "trainer.devices."),
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
    """Return which runs a sweep has and what it varies.

    Args:
        wanted: A sweep file, the name of one in `configs/sweeps`, or the id of a sweep on the W&B server.
        runs: Run folders of a sweep on the server: they say what it varies, which its file says otherwise.

    Raises:
        UserError: It is none of these.
    """
    if (path := preset(wanted, "sweeps")) is not None:
        sweep = read_sweep(path)
        names = tuple(point.name for point in sweep.points)
        return SweepRuns(f"Sweep {sweep.name}", *_varied(_of_points(sweep)), names=names)
    if wanted.endswith((".yaml", ".yml")):
        raise UserError(f"no sweep file {wanted}: give the path of one")
    if not re.fullmatch(r"[a-z0-9]{6,12}", wanted):
        raise UserError(
            f"--sweep {wanted}: no sweep file, none in configs/sweeps, and no id of a W&B sweep (eight letters and "
            "digits): give one of them"
        )
    settings = [{k: v for k, v in flatten(run.config).items() if not f"{k}.".startswith(_ASIDE)} for run in runs]
    return SweepRuns(f"Sweep {wanted}", *_varied(settings), identifier=wanted)


def _of_points(sweep: Sweep) -> list[dict[str, Any]]:
    """What each point sets, with the configuration files that it names read."""
    every: list[dict[str, Any]] = []
    for point in sweep.points:
        every.append({})
        for key, value in point.parameters.items():
            is_file = key in ("config", "c")
            held = yaml.safe_load((preset(value) or Path(value)).read_text()) or {} if is_file else {key: value}
            every[-1] |= flatten(held)
    return every


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
    telling: dict[tuple[int, ...], str] = {}
    for key in several:
        values = [repr(one.get(key)) for one in settings]
        telling.setdefault(tuple(map(values.index, values)), key)
    shown = tuple(telling.values())[:_MOST]
    # The type of True is bool.
    return shown, tuple(key for key in shown if all(type(one.get(key)) in (int, float) for one in settings))


def report_sections(logged: Logged, sweep: SweepRuns) -> list[Section]:
    """Lay out the report of a sweep from what its runs log: curves, last values, and both against what was varied."""
    shown = data()["sweep"]
    panels = {panel.values: panel for section in catalogue() for panel in section.panels}
    curves = (
        panels.get(tuple(names)) or Panel(title_of(names[0]), tuple(names)).with_level() for names in shown["curves"]
    )
    last = (Panel(f"{title_of(name)}, at the end", (name,), kind="bars") for name in shown["last"])
    against = _against(sweep, shown["outcomes"])
    sections = {"Over training": curves, "At the end, beside the null": last, "Against what was varied": against}
    return logged.fill(Section(name, tuple(members)) for name, members in sections.items())


def _against(sweep: SweepRuns, outcomes: Sequence[str]) -> Iterator[Panel]:
    """Parallel coordinates of all settings, and a scatter of each outcome over each numeric one."""
    if sweep.varied:
        yield Panel("Settings and outcomes", tuple(outcomes), kind="parallel", across=sweep.varied)
    for key in sweep.numbers:
        for outcome in outcomes:
            title = f"{outcome.replace(f'{WHOLE}/', '')} over {key.rpartition('.')[2]}"
            yield Panel(title, (outcome,), kind="scatter", across=(key,)).with_level()
