"""Tables as data: each cell is kept formatted and raw, and a table renders to CSV, Markdown and HTML."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from mini_gpt_pl.atomic import write_text
from mini_gpt_pl.geometry.path.nulls import Calibrated
from mini_gpt_pl.report.calibration import markdown

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
    """One cell.

    Args:
        text: As it is shown.
        value: As it goes into the CSV.
        extra: More numbers of the same cell, each a CSV column `<column> <key>`.
    """

    text: str
    value: float | str | None
    extra: Mapping[str, float] = field(default_factory=dict)


Row = Mapping[str, Cell]
"""Cells of one row by column; a column that is not there is a dash."""
_BLANK = Cell(EMPTY, None)


@dataclass(frozen=True)
class Table:
    """Columns and rows, with a name, a title and footnotes; `tabulate` makes one.

    Args:
        name: File stem, such as `growth`.
        title: In words.
        columns: Heads, in their order.
        rows: Cells by column.
        notes: Footnotes, one sentence or two each.

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


def kind_of(cells: Iterable[str]) -> str:
    """Name the CSS class of a column by what it holds: number, words or long."""
    texts = list(cells)
    if all(_NUMBER.match(text) for text in texts):
        return "number"
    return "long" if max(map(len, texts)) > _LONG else "words"


def write_tables(tables: Iterable[Table], folder: Path) -> list[Path]:
    """Write every table as NAME.csv (numbers) and NAME.md (as shown) into a folder.

    Returns:
        The files, CSV before Markdown, table by table.
    """
    written = []
    for table in tables:
        csv, text = folder / f"{table.name}.csv", folder / f"{table.name}.md"
        write_text(csv, table.numbers.to_csv(index=False))
        write_text(text, table.markdown())
        written += [csv, text]
    return written


def tabulate(name: str, title: str, rows: Sequence[Row], notes: Iterable[str | None] = ()) -> Table:
    """Lay rows out as a table; a column without a single entry is left out, and so is a note that is None or repeated.

    Args:
        name: File stem.
        title: In words.
        rows: Cells by column; columns keep the order in which they first appear.
        notes: Footnotes.
    """
    columns = dict.fromkeys(column for row in rows for column, cell in row.items())
    kept = [column for column in columns if any(column in row and row[column].text != EMPTY for row in rows)]
    return Table(name, title, tuple(kept), tuple(rows), tuple(dict.fromkeys(note for note in notes if note)))


# ------------------------------------------------------------------------------------------------------- cells


def word(text: str) -> Cell:
    """A cell of words."""
    return Cell(text, text)


def number(value: float | None, form: str = "{:.3f}", spread: float | None = None, label: str = "sd") -> Cell:
    """A number, with its spread after a ± if there is one; a dash for None and NaN.

    Args:
        value: The number.
        form: How it is written.
        spread: Standard deviation or error.
        label: Name of the spread in the CSV.
    """
    if value is None or math.isnan(value):
        return _BLANK
    if spread is None or math.isnan(spread):
        return Cell(_unsigned_zero(form, value), value)
    return Cell(f"{_unsigned_zero(form, value)} ± {form.replace('+', '').format(spread)}", value, {label: spread})


def gap(value: float, form: str) -> Cell:
    """A difference of two numbers written by `form`: shares differ by points."""
    return _BLANK if math.isnan(value) else Cell(_signed(value, form), value)


def beside_nulls(found: Calibrated, form: str) -> dict[str, Cell]:
    """Cells of a calibrated number: measured, both nulls, excess and its interval if there is one."""
    cells = {
        "measured": number(found.value, form),
        "walk": number(found.walk, form),
        "decaying walk": number(found.decay, form),
        "excess": gap(found.excess, form),
    }
    if not math.isnan(found.low):
        ends = f"{_signed(found.low, form)} to {_signed(found.high, form)}"
        cells["95 %"] = Cell(ends, None, {"low": found.low, "high": found.high})
    return cells


def _signed(value: float, form: str) -> str:
    """Write a difference with a sign and the digits of `form`; shares differ by points, not by per cent."""
    signed = form.replace("{:+", "{:").replace("{:", "{:+")
    if "%" in form:
        return _unsigned_zero(signed.replace("%", "f"), 100 * value) + " pt"
    return _unsigned_zero(signed, value)


def _unsigned_zero(form: str, value: float) -> str:
    """Write a number; one that rounds to zero has no minus."""
    text = form.format(value)
    return form.format(0.0) if text.startswith("-") and not text.strip("-0.% ") else text
