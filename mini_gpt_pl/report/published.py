"""Values that somebody published, as data, and how they are written beside one's own.

A study keeps them in a YAML file of its own:

    column: paper                        # head of the column with published values
    notes: {pc1: What is known of it.}   # footnotes, by topic
    values:
      - setting: seed42                  # the published run; or a list of several
        definition: share of PC1, raw drifts
        source: paper, Table 2
        note: pc1                        # a topic, if there is something to say
        values: {pc1: 0.805, windows: [0.997, 0.998]}   # of a parameter group with its name: pc1/blocks.0
        walks: {pc1: 0.901}              # what a walk gives, where that is known
    tables:                              # what the study calls a table of the core
      pc1_groups: {name: table2_pc1_blocks, title: 'Share of PC1, raw drifts (paper, Table 2)'}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from mini_gpt_pl.report.sheet import Cell, Row, Table, number, tabulate


@dataclass(frozen=True)
class Published:
    """A published number, or the ends of a range of it, as an entry of the file has it.

    Args:
        value: The number or the range.
        definition: What was measured.
        source: Where it was published.
        note: Topic of a footnote; None if there is nothing to say.
        walk: What a walk with the published step lengths gives; None where nobody can tell.
    """

    value: float | tuple[float, float]
    definition: str
    source: str
    note: str | None = None
    walk: float | None = None

    def cell(self, form: str) -> Cell:
        """Write the number or range, with its null in brackets where that is known."""
        null = "" if self.walk is None else f" (walk {form.format(self.walk)})"
        extra = {} if self.walk is None else {"walk": self.walk}
        if isinstance(self.value, tuple):
            low, high = self.value
            return Cell(f"{form.format(low)} to {form.format(high)}{null}", None, {"low": low, "high": high} | extra)
        return Cell(f"{form.format(self.value)}{null}", self.value, extra)


@dataclass(frozen=True)
class Book:
    """All that a study quotes: the parts of its file, values by setting and quantity, tables by the core's name."""

    column: str = "published"
    values: Mapping[tuple[str, str], Published] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, tuple[str, str]] = field(default_factory=dict)


@cache
def book(package: str, name: str = "published.yaml") -> Book:
    """Read a study's published values from a file of the package of that dotted name."""
    loaded: dict[str, Any] = yaml.safe_load(files(package).joinpath(name).read_text(encoding="utf-8"))
    values = {
        (setting, key): Published(
            tuple(value) if isinstance(value, list) else value,
            entry["definition"],
            entry["source"],
            entry.get("note"),
            entry.get("walks", {}).get(key),
        )
        for entry in loaded["values"]
        for setting in (entry["setting"] if isinstance(entry["setting"], list) else [entry["setting"]])
        for key, value in entry["values"].items()
    }
    tables = {key: (table["name"], table["title"]) for key, table in loaded.get("tables", {}).items()}
    return Book(loaded["column"], values, loaded.get("notes", {}), tables)


@dataclass(frozen=True)
class Beside:
    """The published run that a run is shown beside; without arguments there is none, and tables have no such column.

    Args:
        setting: Of the published run.
        differs: What is not as it was there; empty if the run repeats it.
        run: What that run was, in words.
        book: Where its values stand.
    """

    setting: str = ""
    differs: tuple[str, ...] = ()
    run: str = ""
    book: Book = field(default=Book(), repr=False)

    @property
    def column(self) -> str:
        """Head of the column with published values."""
        return f"{self.book.column} ({self.run})" if self.differs else self.book.column

    def get(self, key: str) -> Published | None:
        """Return a published number of this setting."""
        return self.book.values.get((self.setting, key))

    def only(self, key: str, form: str) -> Cell:
        """Write a published number; a dash where nothing was published."""
        published = self.get(key)
        return number(None) if published is None else published.cell(form)

    def cell(self, key: str, form: str, prefix: str = "") -> dict[str, Cell]:
        """Write a published number into its column, whose head may have a prefix."""
        return {f"{prefix}{self.column}": self.only(key, form)}

    def number(self, key: str, form: str) -> Cell:
        """Write a published number by itself, without its null; a dash for a range, or where nothing was published."""
        value = published.value if (published := self.get(key)) else None
        return number(None if isinstance(value, tuple) else value, form)

    def steps(self, quantity: str) -> list[int]:
        """Steps at which a quantity was published, from keys such as `fisher/200/anisotropy`."""
        keys = (key.split("/") for setting, key in self.book.values if setting == self.setting)
        return sorted({int(parts[1]) for parts in keys if parts[0] == quantity})

    def notes(self, *keys: str) -> list[str]:
        """Footnotes of the published numbers shown: what they are, what is known of them, how this run differs."""
        shown = [published for key in keys if (published := self.get(key))]
        if not shown:
            return []
        defined = dict.fromkeys(f"{published.definition} ({published.source})" for published in shown)
        notes = [f"Published: {'; '.join(defined)}."]
        notes += [self.book.notes[note] for note in dict.fromkeys(published.note for published in shown) if note]
        if any(published.walk is not None for published in shown):
            notes.append(self.book.notes["walk"])
        if self.differs:
            differs = listed(self.differs)
            notes.append(f"The {self.book.column}'s values are of another setting: here {differs}.")
        return notes

    def table(
        self, name: str, title: str, rows: Sequence[Row], notes: Iterable[str | None] = (), keys: Iterable[str] = ()
    ) -> Table:
        """Lay out a table of the core, under the name and title that the study gives it.

        Args:
            name: The core's file stem.
            title: The core's title.
            rows: Cells by column.
            notes: Footnotes.
            keys: Of the published numbers shown, which have footnotes of their own.
        """
        own = self.book.tables.get(name, (name, title))
        return tabulate(*own, rows, [*notes, *self.notes(*keys)])


NOTHING = Beside()
"""No published run."""


def listed(differs: Sequence[str], most: int = 4) -> str:
    """Join differences, the first few of them: a small model on other data differs in nearly everything."""
    more = len(differs) - most
    return "; ".join(differs[:most]) + (f"; and {more} more" if more > 0 else "")
