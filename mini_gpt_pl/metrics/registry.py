"""The one registry of everything that a run logs, loaded from `metrics.yaml` of the core and of each installed study.

An entry's name is a template such as `backbone/{group}/pc1`; it stands for every logged name that fits it. The
glossary, the terminal, the report, the dashboard and `docs/metrics.md` read what is said of a metric here. The keys of
an entry in the files are the arguments of `Metric`; a family of entries gives those that its members share.

Example:
    >>> find("backbone/trunk/pc1").write(0.8123)
    '81.2%'
    >>> title_of("commutator/all/on_theta0")
    'commutator on theta_0'
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from importlib.resources import files
from typing import Any, Literal

import yaml

from mini_gpt_pl.tasks import tasks

CORE = "metrics/assets/metrics.yaml"
"""What the core logs; `Task.metrics` names what a study adds."""
WHOLE, GROUP = "{whole}", "{group}"
"""Stand in the names of a panel for the whole selection of weights, and for each of its groups."""

Kind = Literal["line", "images", "bars", "scatter", "parallel"]

_HOLE = re.compile(r"\{(\w+)\}")
_IS_NULL = re.compile(r"none, (?:it|this) is (?:the|a) null")
_DEFAULT_FORMAT = "{:.4g}"
_ALSO = {"group": "group|whole"}


@dataclass(frozen=True)
class Panel:
    """A panel of a dashboard: measured values with what chance gives beside them.

    In the registry, `values` and `nulls` are templates; in a layout they are names that runs logged.

    Args:
        title: What it shows.
        values: Metrics that were measured.
        nulls: Metrics that say what chance, or chance under weight decay, gives for them.
        level: What chance gives where that is one number for all steps; None where it is not.
        chance: What that chance is, such as `isotropic`.
        log_y: Whether the value axis is logarithmic.
        probe: Class name of the callback that logs it; empty for the module.
        kind: How it is drawn.
        across: Configuration keys that runs are compared by, where the kind is `scatter` or `parallel`.
        section: The section of the dashboard that it stands in.
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
    section: str = ""

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
class Quantity:
    """A number that has a name in words and is written in one way.

    Args:
        name: Of a statistic, or the template of a metric's logged names.
        title: Its name in words, as rows of tables and panels have it.
        unit: `share` is from 0 to 1, `cosine` from -1 to 1.
        format: Format string of a value.
    """

    name: str
    title: str
    unit: str
    format: str

    def write(self, value: float) -> str:
        """Write a value."""
        return self.format.format(value)

    def write_difference(self, difference: float) -> str:
        """Write a difference of two values: shares differ by points, counts by whole numbers; `-` for NaN."""
        if difference != difference:
            return "-"
        if "%" in self.format:
            return f"{100 * difference:+.1f} pt".replace("-0.0 pt", "+0.0 pt")
        return f"{difference:+.0f}" if self.format == "{:.0f}" else f"{difference:+.3f}"


@dataclass(frozen=True)
class Metric(Quantity):
    """An entry of the registry.

    Args:
        words: What it is, in a sentence.
        formula: In the symbols of the registry's head.
        null: What chance or a decaying walk gives; `none` and the reason where there is none.
        cost: What it takes to get it.
        reference: Where it comes from.
        source: Dotted path of the class that logs it; empty for any LightningModule.
        when: When it is logged.
        family: Title of the entries that it belongs to.
        patterns: Regular expression of each placeholder in the name.
        beside: Template of the logged metric that holds the null, or the number in units of it; empty without one.
        column: Header in the terminal, where `{}` stands for the value if it is shown in another metric's column; empty
            if the terminal leaves it out.
        column_beside: Template of the metric in the same column, where it is not `beside`.
        level: What chance gives on average, where that is one number.
        chance: What that chance is, such as `isotropic`.
        floor: Whether chance gives the mean |cosine| of an isotropic vector for the absolute value.
        best: Which of a run's values is its best; empty where none is better than another.
        panels: Panels of a dashboard that begin with it.
    """

    words: str
    formula: str
    null: str
    cost: str
    reference: str
    source: str
    when: str
    family: str
    patterns: Mapping[str, str]
    beside: str = ""
    column: str = ""
    column_beside: str = ""
    level: float | None = None
    chance: str = "chance"
    floor: bool = False
    best: Literal["", "min", "max"] = ""
    panels: tuple[Panel, ...] = ()

    @cached_property
    def expression(self) -> re.Pattern[str]:
        """Regular expression of the logged names, one named group a placeholder; it may stand for itself."""
        itself = {hole: rf"{pattern}|\{{(?:{_ALSO.get(hole, hole)})\}}" for hole, pattern in self.patterns.items()}
        return expression(self.name, itself)

    @property
    def literal(self) -> int:
        """Number of characters that are the same in all names: of two templates that fit, the larger one is meant."""
        return len(_HOLE.sub("", self.name))

    @property
    def is_null(self) -> bool:
        """Whether it is the null of other metrics."""
        return _IS_NULL.match(self.null) is not None

    def match(self, name: str) -> dict[str, str] | None:
        """Return what the placeholders stand for in a logged name, None if the name is another metric's."""
        matched = self.expression.fullmatch(name)
        return None if matched is None else matched.groupdict()

    def describe(self, name: str) -> str:
        """Return the words with the placeholders of a logged name filled in."""
        return fill(self.words, self.match(name) or {})


@dataclass(frozen=True)
class Placeholder:
    """A part of a template that stands for several names.

    Args:
        pattern: Regular expression of what it stands for.
        words: What that is.
    """

    pattern: str
    words: str


@dataclass(frozen=True)
class Family:
    """Entries that one class logs.

    Args:
        title: Heading of its entries.
        source: Dotted path of the class; empty for any LightningModule.
        when: When it logs them.
        cost: What most of them cost.
        page: Page of the reference that has the class.
        metrics: Its entries, in order.
    """

    title: str
    source: str
    when: str
    cost: str
    page: str
    metrics: tuple[Metric, ...]


@dataclass(frozen=True)
class Registry:
    """Everything that the installed package logs.

    Args:
        symbols: Meaning of the symbols in the formulas.
        placeholders: Of the templates, by name.
        families: Of entries, in the order of the glossary.
        titles: Names in words of those logged names whose entry is of several, by template.
        statistics: Numbers of a whole path, by name, in the order of a report.
        panels: Of the dashboard, section by section.
        standard: Templates that a run with the standard probes logs besides those without a further placeholder.
        sweep: Names that the report of a sweep shows as `curves` (each a panel), at their `last` value, as `outcomes`.
    """

    symbols: Mapping[str, str]
    placeholders: Mapping[str, Placeholder]
    families: tuple[Family, ...]
    titles: Mapping[str, str]
    statistics: Mapping[str, Quantity]
    panels: tuple[Panel, ...]
    standard: tuple[str, ...]
    sweep: Mapping[str, tuple[Any, ...]]

    @cached_property
    def metrics(self) -> tuple[Metric, ...]:
        """All entries, in the order of the glossary."""
        return tuple(metric for family in self.families for metric in family.metrics)


# ------------------------------------------------------------------------------------------------- reading


@cache
def registry() -> Registry:
    """Load what the core and the installed studies log; the core comes first."""
    resources = dict.fromkeys([CORE, *(task.metrics for task in tasks().values() if task.metrics)])
    return _assembled([_loaded(resource) for resource in resources])


def _loaded(resource: str) -> dict[str, Any]:
    text = files("mini_gpt_pl").joinpath(resource).read_text(encoding="utf-8")
    # All scalars are strings: elsewhere in YAML, `null` is not a word.
    loaded: dict[str, Any] = yaml.load(text, Loader=getattr(yaml, "CBaseLoader", yaml.BaseLoader))
    return loaded


def _assembled(parts: list[dict[str, Any]]) -> Registry:
    def merged(key: str) -> dict[str, Any]:
        return {name: value for part in parts for name, value in part.get(key, {}).items()}

    def joined(key: str, of: str = "") -> tuple[Any, ...]:
        return tuple(item for part in parts for item in (part.get(of, {}) if of else part).get(key, ()))

    places = {name: Placeholder(**place) for name, place in merged("placeholders").items()}
    given = [{"page": part.get("page", "callbacks"), **family} for part in parts for family in part["families"]]
    names = {name: entry for family in given for name, entry in family.get("metrics", {}).items()}
    common = {name: place.pattern for name, place in places.items()}
    formats, references, modules = merged("formats"), merged("references"), {task.model for task in tasks().values()}
    families: list[Family] = []
    panels: list[Panel] = []
    for family in given:
        source = family.get("source", "")
        probe = "" if source in modules else source.rpartition(".")[2]
        entries = []
        for name, entry in family.get("metrics", {}).items():
            defaults = {"reference": references.get(name, "ours"), "source": source, "family": family["title"]}
            shared = {key: family[key] for key in _SHARED if key in family}
            metric = _metric(name, {**defaults, **shared, **entry}, common, formats, names)
            metric = replace(metric, panels=tuple(_panel(given, metric, probe) for given in entry.get("panels", ())))
            entries.append(metric)
        panels += [_panel(one, None, probe) for one in family.get("panels", ())]
        panels += [panel for metric in entries for panel in metric.panels]
        texts = (family.get("when", ""), family.get("cost", ""), family["page"])
        families.append(Family(family["title"], source, *texts, tuple(entries)))
    by_name = {metric.name: metric for family in families for metric in family.metrics}
    panels = [_with_level(panel, by_name.values()) for panel in panels]
    sections = [*joined("sections"), *dict.fromkeys(panel.section for panel in panels)]
    return Registry(
        symbols=merged("symbols"),
        placeholders=places,
        families=tuple(families),
        titles=merged("titles"),
        statistics={name: _statistic(name, own, formats, by_name) for name, own in merged("statistics").items()},
        panels=tuple(sorted(panels, key=lambda panel: sections.index(panel.section))),
        standard=joined("standard"),
        sweep={key: joined(key, "sweep") for key in ("curves", "last", "outcomes")},
    )


_SHARED = ("when", "cost", "null", "reference")
_FIELDS = {field.name for field in fields(Metric)} - {"panels"}


def _metric(
    name: str,
    entry: Mapping[str, Any],
    common: Mapping[str, str],
    formats: Mapping[str, str],
    names: Mapping[str, Mapping[str, Any]],
) -> Metric:
    patterns = {**common, **entry.get("where", {})}
    if "quantities" in entry:
        beside = [other for other, one in names.items() if one.get("beside") == entry["quantities"]]
        patterns["quantity"] = "|".join(other.rpartition("/")[2] for other in beside)
    typed: dict[str, Any] = {
        "title": name.rpartition("/")[2].replace("_", " "),
        "format": formats.get(entry["unit"], _DEFAULT_FORMAT),
        **{key: value for key, value in entry.items() if key in _FIELDS},
        "patterns": {hole: patterns[hole] for hole in _HOLE.findall(name)},
    }
    if "level" in typed:
        typed["level"] = float(typed["level"])
    return Metric(name=name, **{**typed, "floor": entry.get("floor") == "true"})


def _panel(given: Mapping[str, Any], metric: Metric | None, probe: str) -> Panel:
    own = () if metric is None else (metric.name.replace(GROUP, WHOLE),)
    typed: dict[str, Any] = {"title": "" if metric is None else metric.title, "values": own}
    typed |= {key: given[key] for key in ("section", "title", "kind") if key in given}
    typed |= {key: tuple(given[key]) for key in ("values", "nulls") if key in given}
    typed["log_y"] = given.get("log_y") == "true"
    return Panel(**typed, probe=probe)


def _with_level(panel: Panel, entries: Collection[Metric]) -> Panel:
    """Give a panel the level of chance that all of its values have in common."""
    shown = [_best_fit(value, entries) for value in panel.values]
    levels = {None if metric is None else metric.level for metric in shown}
    if len(levels) > 1 or shown[0] is None:
        return panel
    return replace(panel, level=shown[0].level, chance=shown[0].chance)


def _best_fit(name: str, entries: Collection[Metric]) -> Metric | None:
    fitting_ones = [metric for metric in entries if metric.match(name) is not None]
    return max(fitting_ones, key=lambda metric: metric.literal, default=None)


def _statistic(
    name: str, own: Mapping[str, str], formats: Mapping[str, str], metrics: Mapping[str, Metric]
) -> Quantity:
    if own:
        return Quantity(**{"format": formats[own["unit"]], **own, "name": name})
    metric = metrics[f"backbone/{{group}}/{name}"]
    return Quantity(name, metric.title, metric.unit, metric.format)


# ------------------------------------------------------------------------------------------------- looking up


def metrics() -> tuple[Metric, ...]:
    """All entries, in the order of the glossary."""
    return registry().metrics


def statistics() -> Mapping[str, Quantity]:
    """The numbers of a whole path by name, in the order of a report: words, unit and format of each."""
    return registry().statistics


@cache
def find(name: str) -> Metric | None:
    """Return the entry of a logged name (or of a template itself), None if no command logs it.

    Args:
        name: Such as `backbone/trunk/pc1_null`. Where several templates fit, the one that fixes most of the name.

    Example:
        >>> find("backbone/blocks.0/pc1").name
        'backbone/{group}/pc1'
    """
    return _best_fit(name, metrics())


def title_of(name: str) -> str:
    """Return a logged name in words; the name itself where no command logs it."""
    metric = find(name)
    if metric is None:
        return name
    for template, title in registry().titles.items():
        if expression(template, metric.patterns | _patterns()).fullmatch(name):
            return title
    holes = metric.match(name) or {}
    quantity = quantity_of(name)
    return fill(metric.title, holes if quantity is None else {**holes, "quantity": title_of(quantity)})


def quantity_of(name: str) -> str | None:
    """Return the logged name that a derived one (a null, an excess, an error, a rank) is about, None for any other.

    Example:
        >>> quantity_of("backbone/trunk/pc1_null")
        'backbone/trunk/pc1'
    """
    metric = find(name)
    quantity = ((metric.match(name) if metric else None) or {}).get("quantity")
    return None if quantity is None else f"{name.rpartition('/')[0]}/{quantity}"


def beside(name: str, logged: Collection[str]) -> str | None:
    """Return the logged name that holds a metric's null, or the number in units of it; None where there is none.

    Args:
        name: A logged name.
        logged: All the names that the run logged.

    Example:
        >>> beside("backbone/trunk/pc1", ["backbone/trunk/pc1", "backbone/trunk/pc1_null"])
        'backbone/trunk/pc1_null'
    """
    metric = find(name)
    if metric is None:  # a reader's own probe
        return f"{name}_null" if f"{name}_null" in logged else None
    return fitting(metric.beside, name, logged)


def in_column(name: str, logged: Collection[str]) -> str | None:
    """Return the logged name whose value the terminal shows beside a metric's; None where there is none."""
    metric = find(name)
    return None if metric is None else fitting(metric.column_beside or metric.beside, name, logged)


def fitting(template: str, name: str, logged: Collection[str]) -> str | None:
    """Return the first logged name that fits a template once the placeholders of another name are filled in."""
    metric = find(name)
    if metric is None or not template:
        return None
    holes = metric.match(name) or {}
    label = holes.get("group") or holes.get("whole")
    filled = fill(template, {**holes, "group": label, "whole": label, "quantity": name.rpartition("/")[2]})
    whole = expression(filled, dict.fromkeys(_HOLE.findall(filled), r"\w+"))
    return next((other for other in logged if whole.fullmatch(other)), None)


def quantities(template: str) -> tuple[str, ...]:
    """Return the choices of `quantity` in an entry, such as those of `backbone/{group}/{quantity}_null`."""
    metric = find(template)
    return tuple(metric.patterns["quantity"].split("|")) if metric is not None else ()


def expression(template: str, patterns: Mapping[str, str]) -> re.Pattern[str]:
    """Make the regular expression of the names that fit a template, one named group a placeholder.

    Args:
        template: Such as `backbone/{group}/pc1`.
        patterns: Regular expression of each placeholder.
    """
    parts = re.split(r"\{(\w+)\}", template)
    parts[::2] = map(re.escape, parts[::2])
    parts[1::2] = [f"(?P<{hole}>{patterns[hole]})" for hole in parts[1::2]]
    return re.compile("".join(parts))


def fill(text: str, holes: Mapping[str, str | None]) -> str:
    """Fill in the placeholders of a text, and leave those that have no value."""
    return _HOLE.sub(lambda hole: holes.get(hole[1]) or hole[0], text)


def _patterns() -> dict[str, str]:
    return {name: place.pattern for name, place in registry().placeholders.items()}
