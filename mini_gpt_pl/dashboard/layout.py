"""What a panel of the dashboard shows, and which panels some runs can fill."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.runs.folder import TRAJECTORY, Run

AXIS = "trainer/global_step"
"""The optimizer step, which every history row of a run holds."""
WHOLE, GROUP = "{whole}", "{group}"
"""Stand in a metric's name for the whole selection, and for each of its groups."""
PICTURES = ("pictures/spectrum", "pictures/path", "pictures/blocks")
"""What `GeometryPictures` logs as images; no CSV holds them."""

Kind = Literal["line", "images", "bars", "scatter", "parallel"]

# How the names of metrics end that are the null of the metric without that ending.
_NULLS = ("_null", "_walk", "_decaying_walk")
_EXCESS = "_excess"


@dataclass(frozen=True)
class Panel:
    """One panel: measured values with what chance gives beside them.

    In the catalogue, names hold `{whole}`, `{group}` (one curve per group) and `*`; in a layout they are names that
    runs log.

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

    @property
    def heading(self) -> str:
        """The title, with the level of chance if there is one."""
        return self.title if self.level is None else f"{self.title} ({self.chance}: {self.level:g})"

    @property
    def metrics(self) -> tuple[str, ...]:
        """All metrics, nulls last."""
        return self.values + self.nulls


@dataclass(frozen=True)
class Section:
    """A named row of panels.

    Args:
        name: What it is about.
        panels: In reading order.
    """

    name: str
    panels: tuple[Panel, ...]


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
        wholes = sorted(labels - parts)
        if len(wholes) > 1:
            raise UserError(
                f"the runs call their recorded weights by different names ({', '.join(wholes)}): "
                "give runs of one name, a dashboard for each"
            )
        listed = frozenset(name for run in runs for name in _callbacks(run))
        whole = wholes[0] if wholes else "trunk"
        return cls(names, whole, tuple(sorted(labels & parts, key=natural)), listed)

    def resolve(self, panel: Panel) -> Panel | None:
        """Fill in a panel of the catalogue with the names that were logged; None if no value was.

        A null is overlaid wherever one was logged, whether the catalogue names it or not.
        """
        if panel.kind == "images":
            return panel if panel.probe in self.probes else None
        values = tuple(dict.fromkeys(self._expand(panel.values)))
        beside = [f"{value}{ending}" for value in values for ending in _NULLS]
        known = (*self._expand(panel.nulls), *(name for name in beside if name in self.names))
        nulls = tuple(name for name in dict.fromkeys(known) if name not in values)
        return replace(panel, values=values, nulls=nulls) if values else None

    def _expand(self, patterns: Iterable[str]) -> Iterator[str]:
        for pattern in patterns:
            labels = self.groups if GROUP in pattern else (self.whole,)
            for label in labels:
                name = pattern.replace(GROUP, label).replace(WHOLE, label)
                if "*" in name:
                    yield from sorted((known for known in self.names if _matches(known, name)), key=natural)
                elif name in self.names:
                    yield name


def _matches(name: str, pattern: str) -> bool:
    """Whether a name fits a pattern whose `*` stays within one part of it."""
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


def _callbacks(run: Run) -> list[str]:
    """Names of the callbacks in a run's configuration; without one its CSV says all there is."""
    listed = (run.settings.get("trainer") or {}).get("callbacks") or []
    return [str(entry["class_path"]).rpartition(".")[2] for entry in (listed if isinstance(listed, list) else [listed])]


def workspace_sections(catalogue: Sequence[Section], logged: Logged) -> list[Section]:
    """Return the sections that runs can fill, with what the catalogue does not know behind them.

    Args:
        catalogue: Sections of patterns.
        logged: What runs logged.
    """
    found = []
    for section in catalogue:
        panels = tuple(panel for pattern in section.panels if (panel := logged.resolve(pattern)) is not None)
        if panels:
            found.append(Section(section.name, panels))
    patterns = [panel for section in catalogue for panel in section.panels]
    probes = {family(name) for panel in patterns for name in panel.metrics if panel.probe}
    modules = {family(name) for panel in patterns for name in panel.metrics if not panel.probe}
    covered = {name for section in found for panel in section.panels for name in panel.metrics}
    return found + _own(logged, covered, probes, modules)


def _own(logged: Logged, covered: set[str], probes: set[str], modules: set[str]) -> list[Section]:
    """Sections of what only the reader's own module and probes log, each value beside its null.

    Args:
        logged: What runs logged.
        covered: Names that have a panel.
        probes: Families of our own probes: what they log besides is left out on purpose.
        modules: Families that modules log, such as `train`.
    """
    panels: dict[str, list[Panel]] = {}
    for name in sorted(logged.names - covered, key=natural):
        kind = family(name)
        if kind in probes or set(logged.groups) & set(name.split("/")) or _is_null(name, logged.names):
            continue
        level = 0.0 if name.endswith(_EXCESS) else None
        panel = logged.resolve(Panel(name, (name,), level=level, chance="its null"))
        assert panel is not None
        panels.setdefault("more" if kind in modules or not kind else kind, []).append(panel)
    return [Section(name, tuple(members)) for name, members in panels.items()]


def family(name: str) -> str:
    """Return the first part of a metric's name; empty where it has one part only."""
    return name.split("/")[0] if "/" in name else ""


def _is_null(name: str, names: frozenset[str]) -> bool:
    return any(name.endswith(ending) and name.removesuffix(ending) in names for ending in _NULLS)


def natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key under which blocks.2 comes before blocks.10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name)]
