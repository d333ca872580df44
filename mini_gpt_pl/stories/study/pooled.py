"""Tables of single runs, cell by cell over runs that differ in their seed only."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from mini_gpt_pl.report.sheet import EMPTY, Cell, Row, Table, number, tabulate
from mini_gpt_pl.report.statistics import mean, t_interval
from mini_gpt_pl.report.subject import Subject

LEAST = 3
"""Fewer seeds give no interval worth showing: Student's t has a factor of 12.7 for two."""

# What has a table of its own over seeds, and tables whose rows are other steps in each run.
_LEFT_OUT = ("overview", "logit_lens")
_EVENTS = {"switching": ("switches", ("peak", "trough"))}
_OF_OTHERS = re.compile(r"[Pp]ublished|original|repository|The paper|95 % interval")
_OTHERS = "paper"  # columns and rows with this word are of another's runs


def over_seeds(subjects: Sequence[Subject], tables: Callable[[Subject], list[Table]]) -> list[Table]:
    """Pool the tables of runs that differ in their seed only; none for fewer than `LEAST` of them.

    A table of events, whose rows are other steps in each run, becomes one row: the means over a run's events.

    Args:
        subjects: One of each seed.
        tables: Makes the tables of one run.
    """
    if len(subjects) < LEAST:
        return []
    of_runs = [{made.name: made for made in tables(Subject.of(subject, bootstrap=0))} for subject in subjects]
    shared = [name for name in of_runs[0] if all(name in made for made in of_runs) and name not in _LEFT_OUT]
    pooled = []
    for name in shared:
        each = [made[name] for made in of_runs]
        pooled.append(pool([mean_row(one, *_EVENTS[name]) for one in each] if name in _EVENTS else each))
    seeds = ", ".join(str(subject.facts["seed"]) for subject in subjects)
    note = (
        f"Seeds {seeds}: mean ± half of the 95 % interval, by Student's t over the seeds; in brackets how many seeds "
        "have the number, where not all do. What their own tables write alike stands by itself."
    )
    return [Table(one.name, one.title, one.columns, one.rows, (note, *one.notes)) for one in pooled]


def pool(tables: Sequence[Table]) -> Table:
    """Pool tables of one kind: rows are matched by their words, and stay where at least two tables have them.

    Args:
        tables: One of each run.

    Returns:
        Named `seeds_<name>`, with the footnotes that all of them share. Intervals of single runs are left out, and
        published numbers: they have no seeds here.

    Example:
        >>> from mini_gpt_pl.report.sheet import word
        >>> rows = [{"group": word("head"), "PC1": number(share, "{:.1%}")} for share in (0.79, 0.80, 0.83)]
        >>> pool([tabulate("shares", "Shares", [row]) for row in rows]).lines
        [['head', '80.7 ± 5.2%']]
    """
    keyed = [_by_words(table) for table in tables]
    order = list(dict.fromkeys(key for rows in keyed for key in rows if not any(_OTHERS in str(word) for word in key)))
    columns = list(dict.fromkeys(column for table in tables for column in table.columns if _OTHERS not in column))
    rows: list[Row] = []
    for key in order:
        found = [rows_of[key] for rows_of in keyed if key in rows_of]
        if len(found) > 1:
            cells = {column: [row[column] for row in found if column in row] for column in columns}
            rows.append({column: _pooled_cell(several, len(tables)) for column, several in cells.items()})
    first = tables[0]
    notes = [
        note for note in first.notes if all(note in table.notes for table in tables) and not _OF_OTHERS.search(note)
    ]
    return tabulate(f"seeds_{first.name}", f"{first.title}, over seeds", rows, notes)


def mean_row(table: Table, counted: str, without: Sequence[str] = ()) -> Table:
    """Reduce a table to one row, the mean of each column of numbers, with how many rows there were.

    Args:
        table: Whose rows are events.
        counted: What they are, the head of the column with their number.
        without: Columns of which a mean says nothing.
    """
    row: dict[str, Cell] = {counted: number(float(len(table.rows)), "{:.0f}")}
    for column in table.columns:
        cells = [cells[column] for cells in table.rows if column in cells]
        values = [cell.value for cell in cells if isinstance(cell.value, float)]
        if values and column not in without and _OTHERS not in column:
            share = any(cell.text.endswith("%") for cell in cells)
            row[column] = number(mean(values), "{:.1%}" if share else "{:.3f}")
    return tabulate(table.name, f"{table.title}: means over a run's {counted}", [row], table.notes)


def _by_words(table: Table) -> dict[tuple[str | int, ...], Row]:
    """Rows of a table by their words, and by how many rows before them have the same words."""
    found: dict[tuple[str | int, ...], Row] = {}
    for row in table.rows:
        words = tuple(cell.value for cell in row.values() if isinstance(cell.value, str))
        again = sum(key[:-1] == words for key in found)  # "the same, ..." may be said of several rows
        found[*words, again] = row
    return found


def _pooled_cell(cells: Sequence[Cell], runs: int) -> Cell:
    known = [cell for cell in cells if cell.value is not None]
    texts = {cell.text for cell in known}
    values = [float(cell.value) for cell in known if isinstance(cell.value, float | int)]
    if len(values) < 2:
        return known[0] if len(texts) == 1 else Cell(EMPTY, None)
    middle, half = t_interval(values)
    fewer = f" ({len(values)})" if len(values) < runs else ""
    text = known[0].text if len(texts) == 1 else _written(middle, half, [cell.text for cell in known])
    return Cell(f"{text}{fewer}", middle, {"95 %": half, "n": float(len(values))})


def _written(middle: float, half: float, texts: Sequence[str]) -> str:
    """Write a mean as its cells are written, to the second digit of its interval."""
    unit = next((unit for unit in ("%", " pt") if texts[0].endswith(unit)), "")
    sign = "+" if any(text.startswith("+") for text in texts) else ""
    if any("e-" in text or "e+" in text for text in texts):
        return f"{middle:{sign}.1e} ± {half:.1e}"
    scale = 100.0 if unit else 1.0
    digits = 0 if half == 0 else max(0, 1 - math.floor(math.log10(half * scale)))
    return f"{middle * scale:{sign},.{digits}f} ± {half * scale:,.{digits}f}{unit}"
