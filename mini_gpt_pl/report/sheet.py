"""A table whose cells are written and unwritten at once: strings for the page, numbers for the CSV."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from mini_gpt_pl.geometry.path.nulls import Calibrated
from mini_gpt_pl.report.calibration import markdown

NULLS = (
    "Walk: the measured step lengths in mutually orthogonal directions. Decaying walk: the same under the run's own "
    "weight decay. The excess is over the latter; its 95 % interval is a block bootstrap over snapshots and knows "
    "nothing of other seeds."
)
EMPTY = "-"


@dataclass(frozen=True)
class Table:
    """One table as it is shown, and as numbers.

    Args:
        name: File stem, such as `table2_pc1_blocks`.
        title: In words.
        frame: Strings, ready to show.
        notes: Footnotes, one sentence or two each.
        numbers: The same cells unformatted, for the CSV; None where the strings are all there is.
    """

    name: str
    title: str
    frame: pd.DataFrame
    notes: tuple[str, ...] = ()
    numbers: pd.DataFrame | None = None

    def markdown(self) -> str:
        """Write title, table and footnotes as Markdown."""
        notes = "\n".join(f"* {note}" for note in self.notes)
        return f"## {self.title}\n\n{markdown(self.frame)}\n" + (f"\n{notes}\n" if notes else "")


def write_tables(tables: Iterable[Table], folder: Path) -> list[Path]:
    """Write every table as NAME.csv (numbers) and NAME.md (as shown) into a folder.

    Returns:
        The files, CSV before Markdown, table by table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for table in tables:
        csv, text = folder / f"{table.name}.csv", folder / f"{table.name}.md"
        (table.frame if table.numbers is None else table.numbers).to_csv(csv, index=False)
        text.write_text(table.markdown())
        written += [csv, text]
    return written


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
        return Cell(EMPTY, None)
    if spread is None or math.isnan(spread):
        return Cell(_unsigned_zero(form, value), value)
    return Cell(f"{_unsigned_zero(form, value)} ± {form.replace('+', '').format(spread)}", value, {label: spread})


def gap(value: float, form: str) -> Cell:
    """A difference of two numbers written by `form`: shares differ by points."""
    return Cell(EMPTY, None) if math.isnan(value) else Cell(_signed(value, form), value)


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


def tabulate(name: str, title: str, rows: Sequence[Row], notes: Iterable[str | None] = ()) -> Table:
    """Lay rows out as a table; a column without a single entry is left out, and so is a note that is None or repeated.

    Args:
        name: File stem.
        title: In words.
        rows: Cells by column; columns keep the order in which they first appear.
        notes: Footnotes.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    columns = [column for column in columns if any(column in row and row[column].text != EMPTY for row in rows)]
    blank = Cell(EMPTY, None)
    shown = [{column: row.get(column, blank).text for column in columns} for row in rows]
    numbers: list[dict[str, float | str | None]] = []
    for row in rows:
        cells = {column: row.get(column, blank) for column in columns}
        plain: dict[str, float | str | None] = {}
        for column, cell in cells.items():
            if cell.value is not None or not any(column in other and other[column].extra for other in rows):
                plain[column] = cell.value
            plain |= {f"{column} {key}": value for key, value in cell.extra.items()}
        numbers.append(plain)
    kept = tuple(dict.fromkeys(note for note in notes if note))
    return Table(name, title, pd.DataFrame(shown, columns=columns), kept, pd.DataFrame(numbers))


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
