"""What every logged number means, printed from the registry: the command `explain`, and the page `docs/metrics.md`."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mini_gpt_pl.command_line import CommandParser, one_line_errors
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.metrics.registry import Metric, beside, data, find, metrics, quantity_of
from mini_gpt_pl.runs.folder import CONFIG, Run

# The placeholders that a run has several of: one row of a table stands for all of them.
_COLLAPSED = ("group", "whole")
# Endings of what a table of a run shows in the row of what it is about, or not at all.
_DERIVED = re.compile(r"(.+)_(?:null|null_sd|excess|se)")
_UNKNOWN = "not in the glossary: of a probe of your own, or of another version"
_ANY_MODULE = "the LightningModule"


def explain(name: str) -> str:
    """Describe one logged name in a few lines, and the quantity that it derives from.

    Raises:
        UserError: No command logs it.
    """
    metric = find(name)
    if metric is None:
        listed = {other.name: other.name.rpartition("/")[2] for other in metrics()}
        near = [n for n, end in listed.items() if end == name] or get_close_matches(name, listed, n=1, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"no command logs {name!r}, and there is no such run folder; {hint}give a name of metrics.csv")
    lines = [name, f"  {metric.describe(name)}"]
    shown = {"formula": metric.formula, "unit": metric.unit, "null": metric.null, "cost": metric.cost}
    shown |= {"logged by": f"{metric.source or _ANY_MODULE}, {metric.when}", "reference": metric.reference}
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
    order: list[Metric | None] = [*metrics(), None]
    rows: dict[tuple[Any, ...], list[str]] = {}  # names of one quantity by its place in the glossary
    for name in map(str, run.metrics.columns):
        if (derived := _DERIVED.fullmatch(name)) and derived[1] in run.metrics.columns:
            continue
        metric, parts = find(name), name.split("/")
        holes = (metric.match(name) or {}) if metric else {"family": parts[0], "quantity": parts[-1]}
        key = (order.index(metric), *(value for hole, value in holes.items() if hole not in _COLLAPSED))
        rows.setdefault(key, []).append(name)
    for _, names in sorted(rows.items()):
        shown = next((name for name in names if f"/{trunk}/" in name), names[0])
        more = f" (+{len(names) - 1})" if len(names) > 1 else ""
        words = _UNKNOWN if (metric := find(shown)) is None else metric.describe(shown)
        other = beside(shown, run.metrics.columns)
        null = "" if other is None else f"{other.rpartition('/')[2]} {run.last(other):.4g}"
        table.add_row(f"{shown}{more}", f"{run.last(shown):.4g}", null, words)
    return table


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
    lines = [_HEAD, *(f"- **{symbol}**: {words}" for symbol, words in data()["symbols"].items())]
    lines += ["", "## Placeholders", "", "| in a name | stands for |", "|---|---|"]
    lines += [f"| `{{{name}}}` | {place['words']} |" for name, place in data()["placeholders"].items()]
    for family in (family for family in data()["families"] if "metrics" in family):
        source = family.get("source")
        who = f"[`{source.rpartition('.')[2]}`](reference/{family['page']}.md#{source})" if source else _ANY_MODULE
        lines += ["", f"## {family['title']}", "", f"Logged by {who} {family['when']}. Cost: {family['cost']}."]
        for metric in metrics():
            if metric.family == family["title"]:
                lines += ["", *_card(metric, family)]
    return "\n".join(lines) + "\n"


def _card(metric: Metric, family: Mapping[str, Any]) -> list[str]:
    common = {hole: place["pattern"] for hole, place in data()["placeholders"].items()}
    narrowed = {hole: own for hole, own in metric.patterns.items() if own != common.get(hole)}
    choices = [f"`{hole}`: `{own.replace('|', '`, `')}`".replace(r"\w+", "…") for hole, own in narrowed.items()]
    words = re.sub(r"\{(\w+)\}", r"`{\1}`", metric.words)
    lines = [f"### `{metric.name}`", "", words + (f" Here {'; '.join(choices)}." if choices else ""), ""]
    lines += [f"- formula: `{metric.formula}`", f"- unit: {metric.unit}", f"- null: {metric.null}"]
    lines += [f"- logged: {metric.when}"] if metric.when != family["when"] else []
    lines += [f"- cost: {metric.cost}"] if metric.cost != family["cost"] else []
    return [*lines, f"- reference: {metric.reference}"]


def main(args: Sequence[str] | None = None) -> None:
    """Explain metrics: `mini_gpt_pl explain NAME_OR_RUN...`.

    Raises:
        UserError: A name is neither a logged metric nor a run folder.
    """
    parser = CommandParser("explain", description="Say what a logged number means, and what its null is.")
    parser.add_argument("names", nargs="*", metavar="NAME_OR_RUN", help="a name of metrics.csv, or a run folder")
    parser.add_argument("--markdown", action="store_true", help="print the whole glossary as a page")
    options = parser.parse_args(args)
    if options.markdown:
        return print(markdown(), end="")
    if not options.names:
        parser.error("give the name of a metric, or a run folder")
    console = Console(markup=False, width=None if sys.stdout.isatty() else 160)
    for name in options.names:
        console.print(run_table(Run(Path(name)))) if Path(name).is_dir() else print(explain(name))


if __name__ == "__main__":
    with one_line_errors():
        main()
