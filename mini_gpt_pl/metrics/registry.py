"""The one registry of everything that a run logs, loaded from `metrics.yaml` of the core and of each installed study.

An entry's name is a template such as `backbone/{group}/pc1`; it stands for every logged name that fits it. The
glossary, the terminal, the report, the dashboard and `docs/metrics.md` read what is said of a metric here. The keys of
an entry in the files are the arguments of `Metric`; a family of entries gives those that its members share.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from functools import cache, cached_property
from importlib.resources import files
from typing import Any, Literal

import yaml

from mini_gpt_pl.tasks import tasks

CORE = "metrics/assets/metrics.yaml"
"""What the core logs; `Task.metrics` names what a study adds."""

_HOLE = re.compile(r"\{(\w+)\}")
_ALSO = {"group": "group|whole"}  # `{whole}` in a name of a panel is the group that is all of them


@dataclass(frozen=True)
class Quantity:
    """A number that has a name in words, a unit (`share` is from 0 to 1), and a format string of its values."""

    name: str
    title: str
    unit: str
    format: str

    def write(self, value: float) -> str:
        """Write a value."""
        return self.format.format(value)

    def write_difference(self, difference: float) -> str:
        """Write a difference of two values: shares differ by points, counts by whole numbers; `-` for NaN."""
        if "%" in self.format and difference == difference:
            return f"{100 * difference:+.1f} pt".replace("-0.0 pt", "+0.0 pt")
        return "-" if difference != difference else f"{difference:{'+.0f' if self.format == '{:.0f}' else '+.3f'}}"


@dataclass(frozen=True)
class Metric(Quantity):
    """An entry of the registry; its name is the template of its logged names.

    Args:
        words: What it is, in a sentence.
        formula: In the symbols of the registry's head.
        null: What chance or a decaying walk gives; `none` and the reason where there is none.
        cost: What it takes to get it.
        reference: Where it comes from.
        source: Dotted path of the class that logs it; empty for any LightningModule.
        when: It is logged.
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
        panels: Panels of a dashboard that begin with it, by the arguments of `dashboard.layout.Panel`.
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
    panels: tuple[Mapping[str, Any], ...] = ()

    @cached_property
    def expression(self) -> re.Pattern[str]:
        """Regular expression of the logged names, one named group a placeholder; it may stand for itself."""
        return expression(self.name, {h: rf"{p}|\{{(?:{_ALSO.get(h, h)})\}}" for h, p in self.patterns.items()})

    def match(self, name: str) -> dict[str, str] | None:
        """Return what the placeholders stand for in a logged name, None if the name is another metric's."""
        return matched.groupdict() if (matched := self.expression.fullmatch(name)) else None

    def describe(self, name: str) -> str:
        """Return the words with the placeholders of a logged name filled in."""
        return _fill(self.words, self.match(name) or {})


@cache
def data() -> Mapping[str, Any]:
    """What the files of the core and of the installed studies say, merged by key; the core comes first."""
    merged: dict[str, Any] = {}
    for resource in dict.fromkeys([CORE, *(task.metrics for task in tasks().values() if task.metrics)]):
        text = files("mini_gpt_pl").joinpath(resource).read_text(encoding="utf-8")
        # All scalars are strings: elsewhere in YAML, `null` is not a word.
        _merge(merged, yaml.load(text, Loader=getattr(yaml, "CBaseLoader", yaml.BaseLoader)))
    return merged


def _merge(into: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict):
            _merge(into.setdefault(key, {}), value)
        else:
            into[key] = into.get(key, []) + value if isinstance(value, list) else value


@cache
def metrics() -> tuple[Metric, ...]:
    """All entries, in the order of the glossary."""
    files_say, made = data(), []
    inherited = {field.name for field in fields(Metric)} - {"title", "panels"}
    listed = [(family, *entry) for family in files_say["families"] for entry in family.get("metrics", {}).items()]
    for family, name, entry in listed:
        patterns = {hole: place["pattern"] for hole, place in files_say["placeholders"].items()}
        patterns |= entry.get("where", {})
        if null := entry.get("quantities"):
            named = [n.rpartition("/")[2] for _, n, other in listed if other.get("beside") == null]
            patterns["quantity"] = "|".join(named)
        values: dict[str, Any] = {
            "title": name.rpartition("/")[2].replace("_", " "),
            "format": files_say["formats"].get(entry["unit"], "{:.4g}"),
            "reference": files_say.get("references", {}).get(name, "ours"),
            "source": "",
            **{key: value for key, value in family.items() if key in inherited},
            **{key: value for key, value in entry.items() if key not in ("where", "quantities")},
            "panels": tuple(entry.get("panels", ())),
            "floor": "floor" in entry,
        }
        values |= {"level": float(entry["level"])} if "level" in entry else {}
        holes = {hole: patterns[hole] for hole in _HOLE.findall(name)}
        made.append(Metric(**values, name=name, family=family["title"], patterns=holes))
    return tuple(made)


@cache
def statistics() -> Mapping[str, Quantity]:
    """The numbers of a whole path by name, in the order of a report: words, unit and format of each."""
    held: dict[str, Quantity] = {metric.name.removeprefix("backbone/{group}/"): metric for metric in metrics()}
    listed, formats = data()["statistics"], data()["formats"]
    own = {name: Quantity(name, **{"format": formats[one["unit"]], **one}) for name, one in listed.items() if one}
    return {name: own.get(name) or held[name] for name in listed}


@cache
def find(name: str) -> Metric | None:
    """Return the entry of a logged name (or of a template itself), None if no command logs it.

    Where several templates fit, it is the one that fixes most of the name.

    Example:
        >>> find("backbone/blocks.0/pc1").name
        'backbone/{group}/pc1'
    """
    fitting = [metric for metric in metrics() if metric.match(name) is not None]
    return max(fitting, key=lambda metric: len(_HOLE.sub("", metric.name)), default=None)


def title_of(name: str) -> str:
    """Return a logged name in words; the name itself where no command logs it.

    Example:
        >>> title_of("commutator/all/on_theta0")
        'commutator on theta_0'
    """
    if (metric := find(name)) is None:
        return name
    holes = _holes(name)
    own = (title for template, title in data()["titles"].items() if _fill(template, holes) == name)
    if quantity := quantity_of(name):
        holes["quantity"] = title_of(quantity)
    return next(own, _fill(metric.title, holes))


def quantity_of(name: str) -> str | None:
    """Return the logged name that a derived one (a null, an excess, an error, a rank) is about, None for any other.

    Example:
        >>> quantity_of("backbone/trunk/pc1_null")
        'backbone/trunk/pc1'
    """
    quantity = _holes(name).get("quantity")
    return None if quantity is None else f"{name.rpartition('/')[0]}/{quantity}"


def quantities(template: str) -> tuple[str, ...]:
    """Return the choices of `quantity` in an entry, such as those of `backbone/{group}/{quantity}_null`."""
    metric = find(template)
    return tuple(metric.patterns["quantity"].split("|")) if metric is not None else ()


def beside(name: str, logged: Collection[str], *, in_column: bool = False) -> str | None:
    """Return the logged name that holds a metric's null, or the number in units of it; None where there is none.

    Args:
        name: A logged name.
        logged: All the names that the run logged.
        in_column: Return the one that the terminal shows in the metric's column.

    Example:
        >>> beside("backbone/trunk/pc1", ["backbone/trunk/pc1", "backbone/trunk/pc1_null"])
        'backbone/trunk/pc1_null'
    """
    metric = find(name)
    if metric is None:  # a reader's own probe
        return f"{name}_null" if f"{name}_null" in logged else None
    template = about((in_column and metric.column_beside) or metric.beside, name)
    fits = expression(template, dict.fromkeys(_HOLE.findall(template), r"\w+"))
    return next((other for other in logged if template and fits.fullmatch(other)), None)


def about(template: str, name: str) -> str:
    """Fill in a template with the placeholders of a logged name, of which `{quantity}` is then the last part."""
    holes = _holes(name)
    label = holes.get("group") or holes.get("whole")
    return _fill(template, {**holes, "group": label, "whole": label, "quantity": name.rpartition("/")[2]})


def _holes(name: str) -> dict[str, str]:
    """What the placeholders of a logged name's entry stand for in it."""
    metric = find(name)
    return (metric.match(name) if metric else None) or {}


def expression(template: str, patterns: Mapping[str, str]) -> re.Pattern[str]:
    """Make the regular expression of the names that fit a template, one named group a placeholder."""
    parts = _HOLE.split(template)
    parts[::2] = map(re.escape, parts[::2])
    parts[1::2] = [f"(?P<{hole}>{patterns[hole]})" for hole in parts[1::2]]
    return re.compile("".join(parts))


def _fill(text: str, holes: Mapping[str, str | None]) -> str:
    return _HOLE.sub(lambda hole: holes.get(hole[1]) or hole[0], text)
