"""Tables as data: each cell is kept formatted and raw, and a table renders to CSV, Markdown and HTML."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from mini_gpt_pl.atomic import write_text
from mini_gpt_pl.geometry.path.nulls import Calibrated

NULLS = (
    "Walk: the measured step lengths in mutually orthogonal directions. Decaying walk: the same under the run's own "
    "weight decay. The excess is over the latter; its 95 % interval is a block bootstrap over snapshots and knows "
    "nothing of other seeds."
)
EMPTY = "-"
_NUMBER = re.compile(r"[-+−±]?[\d.,]|[-–]?$|nan$")
_LONG = 40  # characters of a cell that needs a wide column


@dataclass(frozen=True)
class Cell:
    """One cell, as it is shown and as it goes into the CSV; each of more numbers is a CSV column `<column> <key>`."""

    text: str
    value: float | str | None
    extra: Mapping[str, float] = field(default_factory=dict)


Row = Mapping[str, Cell]
"""Cells of one row by column; a column that is not there is a dash."""
_BLANK = Cell(EMPTY, None)


@dataclass(frozen=True)
class Table:
    """Columns and rows, with a name (a file stem), a title and footnotes; `tabulate` makes one.

    Example:
        >>> table = tabulate("shares", "Shares", [{"group": word("head"), "PC1": number(0.812, "{:.1%}")}])
        >>> table.lines
        [['head', '81.2%']]
        >>> table.numbers["PC1"].tolist()
        [0.812]
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def lines(self) -> list[list[str]]:
        """Cells as they are shown, row by row."""
        return [[row.get(column, _BLANK).text for column in self.columns] for row in self.rows]

    @property
    def heads(self) -> list[tuple[str, str]]:
        """Each column's head, and the CSS class that it has on the page: number, words or long."""
        sides = zip(*self.lines, strict=True) if self.rows else ((),) * len(self.columns)
        return [(name.strip(), kind_of(cells)) for name, cells in zip(self.columns, sides, strict=True)]

    @property
    def frame(self) -> pd.DataFrame:
        """Cells as they are shown."""
        return pd.DataFrame(self.lines, columns=list(self.columns))

    @property
    def numbers(self) -> pd.DataFrame:
        """Cells unformatted, as the CSV has them; a cell with several numbers takes several columns."""
        split = {column for row in self.rows for column, cell in row.items() if cell.extra}
        rows: list[dict[str, float | str | None]] = []
        for row in self.rows:
            values: dict[str, float | str | None] = {}
            for column in self.columns:
                cell = row.get(column, _BLANK)
                if cell.value is not None or column not in split:
                    values[column] = cell.value
                values |= {f"{column} {key}": value for key, value in cell.extra.items()}
            rows.append(values)
        return pd.DataFrame(rows)

    def markdown(self) -> str:
        """Write title, table and footnotes as Markdown."""
        notes = "\n".join(f"* {note}" for note in self.notes)
        return f"## {self.title}\n\n{markdown(self.frame)}\n" + (f"\n{notes}\n" if notes else "")


def markdown(frame: pd.DataFrame) -> str:
    """Write a table of strings as Markdown."""
    lines = [list(frame.columns), ["---"] * len(frame.columns), *frame.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(cell.strip().replace("|", "\\|") for cell in line) + " |" for line in lines)


def kind_of(cells: Iterable[str]) -> str:
    """Name the CSS class of a column by what it holds: number, words or long."""
    texts = list(cells)
    if all(_NUMBER.match(text) for text in texts):
        return "number"
    return "long" if max(map(len, texts)) > _LONG else "words"


def write_tables(tables: Iterable[Table], folder: Path) -> list[Path]:
    """Write every table as NAME.csv (numbers) and NAME.md (as shown) into a folder, and return the files."""
    written = []
    for table in tables:
        for file, text in (("csv", table.numbers.to_csv(index=False)), ("md", table.markdown())):
            written.append(folder / f"{table.name}.{file}")
            write_text(written[-1], text)
    return written


def tabulate(name: str, title: str, rows: Sequence[Row], notes: Iterable[str | None] = ()) -> Table:
    """Lay rows out as a table; columns keep the order in which they first appear.

    A column without a single entry is left out, and so is a note that is None or repeated.
    """
    columns = dict.fromkeys(column for row in rows for column in row)
    shown = [column for column in columns if any(column in row and row[column].text != EMPTY for row in rows)]
    return Table(name, title, tuple(shown), tuple(rows), tuple(dict.fromkeys(note for note in notes if note)))


def word(text: str) -> Cell:
    """A cell of words."""
    return Cell(text, text)


def number(value: float | None, form: str = "{:.3f}", spread: float | None = None, label: str = "sd") -> Cell:
    """A number in a format, with its spread after a ± if there is one; a dash for None and NaN.

    The spread is a standard deviation or error, and `label` its name in the CSV.
    """
    if value is None or math.isnan(value):
        return _BLANK
    if spread is None or math.isnan(spread):
        return Cell(_unsigned_zero(form, value), value)
    return Cell(f"{_unsigned_zero(form, value)} ± {form.replace('+', '').format(spread)}", value, {label: spread})


def gap(value: float, form: str) -> Cell:
    """A difference of two numbers of a format string, with a sign: shares differ by points, not by per cent."""
    if math.isnan(value):
        return _BLANK
    signed = form.replace("{:+", "{:").replace("{:", "{:+")
    if "%" in form:
        return Cell(_unsigned_zero(signed.replace("%", "f"), 100 * value) + " pt", value)
    return Cell(_unsigned_zero(signed, value), value)


def interval(low: float, high: float, form: str, write: Callable[[float, str], Cell] = gap) -> Cell:
    """The ends of an interval of differences, or of what else `write` writes."""
    return Cell(f"{write(low, form).text} to {write(high, form).text}", None, {"low": low, "high": high})


def beside_nulls(one: Calibrated, form: str) -> dict[str, Cell]:
    """Cells of a calibrated number: measured, both nulls, excess and its interval if there is one."""
    cells = {
        "measured": number(one.value, form),
        "walk": number(one.walk, form),
        "decaying walk": number(one.decay, form),
        "excess": gap(one.excess, form),
    }
    return cells if math.isnan(one.low) else cells | {"95 %": interval(one.low, one.high, form)}


def conclusion(one: Calibrated) -> str:
    """Say in words what a number says beside the decaying walk."""
    if math.isnan(one.excess):
        return "its null is not known, so it says nothing by itself"
    if math.isnan(one.low):
        if one.excess == 0:
            return "what chance and weight decay give"
        side = "above" if one.excess > 0 else "below"
        return f"{side} what chance and weight decay give; one path does not say how surely"
    if one.low > 0:
        return "more than chance and weight decay explain"
    if one.high < 0:
        return "less than chance and weight decay would give"
    return "the interval of the excess contains zero, so chance and weight decay may be all of it"


def _unsigned_zero(form: str, value: float) -> str:
    """Write a number; one that rounds to zero has no minus."""
    text = form.format(value)
    return form.format(0.0) if text.startswith("-") and not text.strip("-0.% ") else text
