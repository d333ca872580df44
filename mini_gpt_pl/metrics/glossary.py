"""What every logged number means: its words, formula, unit, null, cost and origin, as data.

python -m mini_gpt_pl.metrics.glossary backbone/trunk/pc1      # one name
python -m mini_gpt_pl.metrics.glossary runs/mine               # all that a run logged
python -m mini_gpt_pl.metrics.glossary --markdown              # the page docs/metrics.md
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from mini_gpt_pl.command_line import CommandParser, one_line_errors
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.runs.folder import CONFIG, Run

_ASSET = "assets/metrics.yaml"
_HOLE = re.compile(r"\{(\w+)\}")
# The placeholders that a run has several of: one row of a table stands for all of them.
_COLLAPSED = ("group", "whole")
# Endings of what a table of a run shows in the row of what it is about, or not at all.
_DERIVED = re.compile(r"(.+)_(?:null|null_sd|excess|se)")
_UNKNOWN = "not in the glossary: of a probe of your own, or of another version"


@dataclass(frozen=True)
class Metric:
    """An entry of the glossary.

    Args:
        name: Template of the logged names, such as `backbone/{group}/pc1`.
        words: What it is.
        formula: In the symbols of the glossary's head.
        unit: `share` is from 0 to 1, `cosine` from -1 to 1.
        null: What chance or a decaying walk gives; `none: ` and the reason where there is none.
        cost: What it takes to get it.
        reference: Where it comes from.
        source: Dotted path of the class that logs it.
        when: When that class logs it.
        family: Title of the entries that it belongs to.
        patterns: Regular expression of each placeholder in the name.
        beside: Template of the logged metric that holds the null, or the number in units of it; empty without one.
    """

    name: str
    words: str
    formula: str
    unit: str
    null: str
    cost: str
    reference: str
    source: str
    when: str
    family: str
    patterns: Mapping[str, str]
    beside: str = ""

    @cached_property
    def expression(self) -> re.Pattern[str]:
        """Regular expression of the logged names, one named group a placeholder."""
        parts = re.split(r"(\{\w+\})", self.name)
        holes = [f"(?P<{part[1:-1]}>{self.patterns[part[1:-1]]})" if _HOLE.match(part) else None for part in parts]
        return re.compile("".join(hole or re.escape(part) for hole, part in zip(holes, parts, strict=True)))

    @property
    def literal(self) -> int:
        """Number of characters that are the same in all names: of two templates that fit, the larger one is meant."""
        return len(_HOLE.sub("", self.name))

    def match(self, name: str) -> dict[str, str] | None:
        """Return what the placeholders stand for in a logged name, None if the name is another metric's."""
        found = self.expression.fullmatch(name)
        return None if found is None else found.groupdict()

    def describe(self, name: str) -> str:
        """Return the words with the placeholders of a logged name filled in."""
        told = self.match(name) or {}
        return _HOLE.sub(lambda hole: told.get(hole[1], hole[0]), self.words)


# ------------------------------------------------------------------------------------------------- reading


@cache
def _asset() -> dict[str, Any]:
    text = files("mini_gpt_pl.metrics").joinpath(_ASSET).read_text(encoding="utf-8")
    loaded: dict[str, Any] = yaml.load(text, Loader=yaml.BaseLoader)  # strings only: elsewhere in YAML, null is no word
    return loaded


@cache
def metrics() -> tuple[Metric, ...]:
    """All entries, in the order of the glossary."""
    return tuple(_entries(_asset()))


def _entries(asset: Mapping[str, Any]) -> Iterator[Metric]:
    common = {name: hole["pattern"] for name, hole in asset["placeholders"].items()}
    known = {field.name for field in fields(Metric)}
    for family in asset["families"]:
        defaults = {key: value for key, value in family.items() if key in known} | {"family": family["title"]}
        for name, entry in family["metrics"].items():
            patterns = common | entry.get("where", {})
            own = {key: value for key, value in entry.items() if key != "where"}
            holes = {hole: patterns[hole] for hole in _HOLE.findall(name)}
            yield Metric(**{**defaults, **own, "name": name, "patterns": holes})


def find(name: str) -> Metric | None:
    """Return the entry of a logged name (or of a template itself), None if no command logs it.

    Args:
        name: Such as `backbone/trunk/pc1_null`. Where several templates fit, the one that fixes most of the name.

    Example:
        >>> find("backbone/blocks.0/pc1").name
        'backbone/{group}/pc1'
    """
    fitting = [metric for metric in metrics() if name == metric.name or metric.match(name) is not None]
    return max(fitting, key=lambda metric: metric.literal, default=None)


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
    if not metric.beside:
        return None
    holes = metric.match(name) or {}
    label = holes.get("group") or holes.get("whole")
    told = {**holes, "group": label, "whole": label, "quantity": name.rpartition("/")[2]}
    parts = re.split(r"\{(\w+)\}", metric.beside)
    parts[::2] = map(re.escape, parts[::2])
    parts[1::2] = [re.escape(told.get(hole) or "") or r"\w+" for hole in parts[1::2]]
    return next((other for other in logged if re.fullmatch("".join(parts), other)), None)


def _require(name: str) -> Metric:
    metric = find(name)
    if metric is None:
        known = [metric.name for metric in metrics()]
        ends = [other for other in known if other.rpartition("/")[2] == name]
        near = ends or get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"no command logs {name!r}, and there is no such run folder; {hint}give a name of metrics.csv")
    return metric


# ------------------------------------------------------------------------------------------------ printing


def explain(name: str) -> str:
    """Describe one logged name in a few lines, and the quantity that it derives from.

    Raises:
        UserError: No command logs it.
    """
    metric = _require(name)
    lines = [name, f"  {metric.describe(name)}"]
    shown = {"formula": metric.formula, "unit": metric.unit, "null": metric.null, "cost": metric.cost}
    shown |= {"logged by": f"{metric.source}, {metric.when}", "reference": metric.reference}
    if metric.name != name:
        shown["one of"] = metric.name
    lines += [f"  {label + ':':<11}{text}" for label, text in shown.items()]
    about = quantity_of(name)
    return "\n".join(lines if about is None else [*lines, "", explain(about)])


def run_table(run: Run) -> Table:
    """List what a run logged, with its last value and what that is to be compared with.

    A row a quantity: groups are folded into the whole selection's, nulls and errors into what they are about.

    Raises:
        UserError: The folder has no metrics.
    """
    table = Table("metric", "last", "beside it", "what it is", title=str(run.path), title_justify="left")
    table.columns[0].no_wrap = table.columns[2].no_wrap = True
    table.columns[1].justify = "right"
    trunk = run.trunk if (run.path / CONFIG).is_file() else "trunk"
    for metric, names in _folded(run):
        shown = next((name for name in names if f"/{trunk}/" in name), names[0])
        more = f" (+{len(names) - 1})" if len(names) > 1 else ""
        words = _UNKNOWN if metric is None else metric.describe(shown)
        other = beside(shown, run.metrics.columns)
        null = "" if other is None else f"{other.rpartition('/')[2]} {run.last(other):.4g}"
        table.add_row(f"{shown}{more}", f"{run.last(shown):.4g}", null, words)
    return table


def _folded(run: Run) -> list[tuple[Metric | None, list[str]]]:
    """The logged names by what they are, groups taken together, in the glossary's order."""
    order: list[Metric | None] = [*metrics(), None]
    rows: dict[tuple[Any, ...], tuple[Metric | None, list[str]]] = {}
    for name in map(str, run.metrics.columns):
        if (derived := _DERIVED.fullmatch(name)) and derived[1] in run.metrics.columns:
            continue
        metric = find(name)
        parts = name.split("/")
        holes = (metric.match(name) or {}) if metric else {"family": parts[0], "quantity": parts[-1]}
        key = (order.index(metric), *(value for hole, value in holes.items() if hole not in _COLLAPSED))
        rows.setdefault(key, (metric, []))[1].append(name)
    return [rows[key] for key in sorted(rows)]


# ------------------------------------------------------------------------------------------------ the page

_HEAD = """# Metrics

Every number that a command logs, to `metrics.csv` in the run folder and to W&B (there against `trainer/global_step`).
This page is written by `python -m mini_gpt_pl.metrics.glossary --markdown` from data that the package carries.
`python cli.py explain backbone/trunk/pc1` prints one entry, `python cli.py explain RUN` what a run logged, with its
last values.

A number about geometry means something beside its null only: what chance, or chance and weight decay, would have given.

## Symbols
"""


def markdown() -> str:
    """Write the glossary as the page `docs/metrics.md`."""
    asset = _asset()
    lines = [_HEAD, *(f"- **{symbol}**: {words}" for symbol, words in asset["symbols"].items())]
    lines += ["", "## Placeholders", "", "| in a name | stands for |", "|---|---|"]
    lines += [f"| `{{{name}}}` | {hole['words']} |" for name, hole in asset["placeholders"].items()]
    for family in asset["families"]:
        lines += ["", f"## {family['title']}", "", _logged_by(family)]
        for metric in metrics():
            if metric.family == family["title"]:
                lines += ["", *_card(metric, family["cost"])]
    return "\n".join(lines) + "\n"


def _logged_by(family: Mapping[str, Any]) -> str:
    module, _, name = family["source"].rpartition(".")
    pages = {"mini_gpt_pl.callbacks": "callbacks", "mini_gpt_pl.arithmetic": "grokking"}
    page = next((page for package, page in pages.items() if module.startswith(package)), "model")
    source = f"[`{name}`](reference/{page}.md#{family['source']})"
    return f"Logged by {source} {family['when']}. Cost: {family['cost']}."


def _card(metric: Metric, usual_cost: str) -> list[str]:
    choices = [f"`{hole}`: {_choices(metric.patterns[hole])}" for hole in metric.patterns if _is_narrowed(metric, hole)]
    words = _HOLE.sub(r"`{\1}`", metric.words)
    lines = [f"### `{metric.name}`", "", words + (f" Here {'; '.join(choices)}." if choices else ""), ""]
    lines += [f"- formula: `{metric.formula}`", f"- unit: {metric.unit}", f"- null: {metric.null}"]
    if metric.cost != usual_cost:
        lines.append(f"- cost: {metric.cost}")
    return [*lines, f"- reference: {metric.reference}"]


def _is_narrowed(metric: Metric, hole: str) -> bool:
    return metric.patterns[hole] != _asset()["placeholders"].get(hole, {}).get("pattern")


def _choices(pattern: str) -> str:
    return ", ".join(f"`{choice.replace(chr(92) + 'w+', '…')}`" for choice in pattern.split("|"))


# --------------------------------------------------------------------------------------------- command line


def main(args: Sequence[str] | None = None) -> None:
    """Explain metrics: `mini_gpt_pl explain NAME_OR_RUN...`.

    Raises:
        UserError: A name is neither a logged metric nor a run folder.
    """
    parser = CommandParser("explain", description="Say what a logged number means, and what its null is.")
    parser.add_argument("names", nargs="*", metavar="NAME_OR_RUN", help="a name of metrics.csv, or a run folder")
    parser.add_argument("--markdown", action="store_true", help="print the whole glossary as a page")
    given = parser.parse_args(args)
    if given.markdown:
        print(markdown(), end="")
        return
    if not given.names:
        parser.error("give the name of a metric, or a run folder")
    console = Console() if sys.stdout.isatty() else Console(width=160)
    for name in given.names:
        if Path(name).is_dir():
            console.print(run_table(Run(Path(name))))
        else:
            print(explain(name))


if __name__ == "__main__":
    with one_line_errors():
        main()
