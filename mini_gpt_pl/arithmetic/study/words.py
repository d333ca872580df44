"""The study's words as data: what its tables, claims and sections say stands in the YAML files beside this one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from mini_gpt_pl.report.claims import Claim
from mini_gpt_pl.report.sheet import Cell, Table, number, tabulate, word

Value = Cell | str | float | tuple[float, float] | None
"""What a row has in a column: words, a number, a number and its spread, nothing, or a cell that is ready."""
Values = Mapping[str, Value]


@cache
def words(file: str) -> Mapping[Any, Any]:
    """Read `FILE.yaml`: `published` (numbers of the papers), `tables`, `claims` or `sections`."""
    loaded: Mapping[Any, Any] = yaml.safe_load(
        files("mini_gpt_pl.arithmetic.study").joinpath(f"{file}.yaml").read_text(encoding="utf-8")
    )
    return loaded


def lay(name: str, rows: Iterable[Values], **noted: object) -> Table:
    """Lay rows, values by column, out as a table, with the title, number formats and notes of `tables.yaml`.

    Notes are filled with what is `noted`; one of which nothing is left is left out.
    """
    layout = words("tables")[name]
    forms = words("tables")["forms"] | layout.get("forms", {})
    filled = {key: "" if value is None else value for key, value in noted.items()}
    filled["published"] = words("published")["notes"]
    title, *notes = (text.format_map(filled) for text in (layout["title"], *layout.get("notes", ())))
    cells = [{column: _cell(value, _form(forms, column)) for column, value in row.items()} for row in rows]
    return tabulate(name, title, cells, notes)


def metrics_of(name: str) -> Mapping[str, str]:
    """Columns of a table that show one metric each, and its name behind what all of them begin with."""
    metrics: Mapping[str, str] = words("tables")[name]["metrics"]
    return metrics


def _form(forms: Mapping[str, str], column: str) -> str:
    """Form of a column's numbers; `t90, paper` and `increments: walk` have that of `t90` and of `increments`."""
    heads = (column, column.partition(": ")[0], column.partition(", ")[0])
    return next((forms[head] for head in heads if head in forms), "{:.3f}")


def _cell(value: Value, form: str) -> Cell:
    if isinstance(value, Cell):
        return value
    if isinstance(value, str):
        return word(value)
    return number(*((value[0], form, value[1]) if isinstance(value, tuple) else (value, form)))


def claim(name: str, reading: str, **numbers: object) -> Claim:
    """Fill a claim of `claims.yaml` with numbers, and with the one of its readings that they call for."""
    said = words("claims")[name]
    here, null, read = (text.format_map(numbers) for text in (said["here"], said["null"], said["readings"][reading]))
    return Claim(said["said"], here, null, read, said.get("anchor", ""), said.get("topic", ""))
