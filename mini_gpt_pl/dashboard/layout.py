"""What a panel of the dashboard shows, and which panels some runs can fill."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any, Literal

import yaml

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.metrics.registry import about, beside, data, expression, find, metrics
from mini_gpt_pl.presets import presets
from mini_gpt_pl.runs.folder import TRAJECTORY, Run
from mini_gpt_pl.tasks import tasks

AXIS = "trainer/global_step"
"""The optimizer step, which every history row of a run holds."""
WHOLE, GROUP = "{whole}", "{group}"
"""Stand in a metric's name for the whole selection, and for each of its groups."""

Kind = Literal["line", "images", "bars", "scatter", "parallel"]

# How the names of metrics end that are the null of the metric without that ending.
_NULLS = ("_null", "_walk", "_decaying_walk")
_IS_NULL = re.compile(r"none, (it|this) is (the|a) null")


@dataclass(frozen=True)
class Panel:
    """One panel: measured values with what chance gives beside them.

    In the catalogue, names are templates with `{whole}`, `{group}` (one curve per group) and other placeholders of the
    registry (a curve for each name that fits); in a layout they are names that runs log.

    Args:
        title: What it shows.
        values: Metrics that were measured; config keys where the kind is `parallel`.
        nulls: Metrics that say what chance, or chance under weight decay, gives for them.
        level: What chance gives where that is one number for all steps; None where it is not.
        chance: What that chance is, such as `isotropic`.
        log_y: Whether the value axis is logarithmic.
        probe: The callback that logs it; empty for the module and the trainer.
        kind: How it is drawn.
        across: Config keys that runs are compared by, where the kind is `scatter` or `parallel`.
    """

    title: str
    values: tuple[str, ...]
    nulls: tuple[str, ...] = ()
    level: float | None = None
    chance: str = "chance"
    log_y: bool = False
    probe: str = ""
    kind: Kind = "line"
    across: tuple[str, ...] = ()

    def with_level(self) -> Panel:
        """Take over the level of chance that the registry has for all of the values."""
        levels = {(metric.level, metric.chance) if (metric := find(name)) else (None, "") for name in self.values}
        level, chance = levels.pop()
        return self if levels or level is None else replace(self, level=level, chance=chance)

    @property
    def heading(self) -> str:
        """The title with a capital, and the level of chance if there is one."""
        title = self.title[:1].upper() + self.title[1:] if re.match(r"[a-z]{2,}[ ,-]", self.title) else self.title
        return title if self.level is None else f"{title} ({self.chance}: {self.level:g})"

    @property
    def metrics(self) -> tuple[str, ...]:
        """All metrics, nulls last."""
        return self.values + self.nulls


@dataclass(frozen=True)
class Section:
    """A named row of panels, in reading order."""

    name: str
    panels: tuple[Panel, ...]


@cache
def catalogue() -> tuple[Section, ...]:
    """Every panel of the workspace by section, top to bottom, as the registry of metrics has them."""
    modules = {task.model for task in tasks().values()}
    panels: dict[str, list[Panel]] = {name: [] for name in data()["sections"]}
    for family in data()["families"]:
        source = family.get("source", "")
        probe = "" if source in modules else source.rpartition(".")[2]
        # A panel of a metric has its title, and shows it, unless it says otherwise.
        defaults = {
            metric.name: (metric.title, metric.panels) for metric in metrics() if metric.family == family["title"]
        }
        for name, (title, several) in {**defaults, "": ("", family.get("panels", ()))}.items():
            for given in several:
                rest: dict[str, Any] = {key: value for key, value in given.items() if key in ("title", "kind")}
                rest |= {key: tuple(given[key]) for key in ("values", "nulls") if key in given}
                whole = {"title": title, "values": (name.replace(GROUP, WHOLE),), "log_y": "log_y" in given, **rest}
                panels.setdefault(given["section"], []).append(Panel(probe=probe, **whole).with_level())
    return tuple(Section(name, tuple(members)) for name, members in panels.items())


@dataclass(frozen=True)
class Logged:
    """Names that runs logged.

    Args:
        names: Of their metrics.
        whole: What their recorder calls the whole of its weights.
        groups: What it calls the parts.
        probes: Names of the callbacks whose panels are wanted even where no name says so; images are in no CSV.
    """

    names: frozenset[str]
    whole: str = "trunk"
    groups: tuple[str, ...] = ()
    probes: frozenset[str] = frozenset()

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Logged:
        """Collect what runs logged.

        Raises:
            UserError: A run has no metrics, or two runs call the whole of their weights differently.
        """
        names = frozenset(str(name) for run in runs for name in run.metrics if run.metrics[name].notna().any())
        labels = {name.split("/")[1] for name in names if re.fullmatch(r"backbone/[^/]+/pc1", name)}
        parts = {group for run in runs if (run.path / TRAJECTORY).is_file() for group in run.trajectory.groups}
        wholes = sorted(labels - parts) or ["trunk"]
        if len(wholes) > 1:
            raise UserError(
                f"the runs call their recorded weights by different names ({', '.join(wholes)}): "
                "give runs of one name, a dashboard for each"
            )
        probes = frozenset(name for run in runs for name in _callbacks(run.settings))
        return cls(names, wholes[0], tuple(sorted(labels & parts, key=natural)), probes)

    @classmethod
    def standard(cls) -> Logged:
        """What a run with `configs/probes/standard.yaml` logs: the whole selection's metrics, no group's."""
        settings = yaml.safe_load(presets()["probes/standard"].read_text())
        probes = frozenset({"", *_callbacks(settings)})
        values = [value for part in catalogue() for p in part.panels if p.probe in probes for value in p.metrics]
        names = {name for value in values if GROUP not in value for name in _choices(value)} | set(data()["standard"])
        nulls = {other for name in names if (m := find(name)) and _is_null(other := about(m.beside, name))}
        measured = {name.replace(WHOLE, "trunk") for name in names | nulls if not name.startswith("anatomy/")}
        return cls(frozenset(measured), probes=probes)

    def resolve(self, panel: Panel) -> Panel | None:
        """Fill in a panel of the catalogue with the names that were logged; None if no value was.

        A null is overlaid wherever one was logged, whether the catalogue names it or not.
        """
        if panel.kind == "images":
            return panel if panel.probe in self.probes else None
        values = tuple(dict.fromkeys(self._expand(panel.values)))
        endings = [f"{value}{ending}" for value in values for ending in _NULLS]
        pairs = [(value, beside(value, self.names)) for value in values]
        # Beside a metric of another family stands a number on a scale, or with a sign, of its own.
        held = [other for value, other in pairs if other and _is_null(other) and _family(other) == _family(value)]
        nulls = [*self._expand(panel.nulls), *held, *(name for name in endings if name in self.names)]
        shown = tuple(name for name in dict.fromkeys(nulls) if name not in values)
        return replace(panel, values=values, nulls=shown) if values else None

    def fill(self, sections: Iterable[Section]) -> list[Section]:
        """Fill in sections, without panels that cannot be filled and sections that have none left."""
        filled = [(part.name, tuple(filter(None, map(self.resolve, part.panels)))) for part in sections]
        return [Section(name, panels) for name, panels in filled if panels]

    def _expand(self, templates: Iterable[str]) -> Iterator[str]:
        for template in templates:
            for label in self.groups if GROUP in template else (self.whole,):
                name = template.replace(GROUP, label).replace(WHOLE, label)
                metric = find(template)
                if "{" in name and metric is not None:
                    fits = expression(name, metric.patterns)
                    yield from sorted((n for n in self.names if fits.fullmatch(n) and find(n) is metric), key=natural)
                elif name in self.names:
                    yield name


def _is_null(name: str) -> bool:
    metric = find(name)
    return metric is not None and _IS_NULL.match(metric.null) is not None


def _choices(template: str) -> Iterator[str]:
    """Every name that a template of the catalogue stands for; none where a placeholder stands for any word."""
    metric = find(template)
    holes = [hole for hole in re.findall(r"\{(\w+)\}", template) if hole != "whole"]
    choices = [metric.patterns[hole].split("|") if metric else [] for hole in holes]
    if all(re.fullmatch(r"\w+", choice) for several in choices for choice in several):
        for chosen in product(*choices):
            yield template.format(whole=WHOLE, **dict(zip(holes, chosen, strict=True)))


def _callbacks(settings: dict[str, Any]) -> list[str]:
    """Names of the callbacks in a configuration; without one its CSV says all there is."""
    listed = (settings.get("trainer") or {}).get("callbacks") or []
    return [str(entry["class_path"]).rpartition(".")[2] for entry in (listed if isinstance(listed, list) else [listed])]


def workspace_sections(logged: Logged) -> list[Section]:
    """Return the sections that runs can fill, with what the catalogue does not list behind them."""
    sections = logged.fill(catalogue())
    return sections + _own(logged, {name for part in sections for panel in part.panels for name in panel.metrics})


def _own(logged: Logged, covered: set[str]) -> list[Section]:
    """Sections of what only the reader's own module and probes log, each value beside its null.

    What our own probes log without a panel (`covered` are the names with one) is left out on purpose.
    """
    listed = [(_family(name), p.probe) for section in catalogue() for p in section.panels for name in p.metrics]
    probes, modules = ({kind for kind, probe in listed if bool(probe) is own} for own in (True, False))
    panels: dict[str, list[Panel]] = {}
    for name in sorted(logged.names - covered, key=natural):
        kind = _family(name)
        is_null = any(name.endswith(end) and name.removesuffix(end) in logged.names for end in _NULLS)
        if kind in probes or set(logged.groups) & set(name.split("/")) or is_null:
            continue
        level = 0.0 if name.endswith("_excess") else None
        panel = logged.resolve(Panel(name, (name,), level=level, chance="its null"))
        assert panel is not None
        panels.setdefault("more" if kind in modules or not kind else kind, []).append(panel)
    return [Section(name, tuple(members)) for name, members in panels.items()]


def _family(name: str) -> str:
    return name.split("/")[0] if "/" in name else ""


def natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key under which blocks.2 comes before blocks.10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name)]
