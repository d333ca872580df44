"""The study's words as data: titles, rows and footnotes of its tables, its sections, what the published runs were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from mini_gpt_pl.report.path_tables import NumberRow
from mini_gpt_pl.report.published import Beside, listed
from mini_gpt_pl.report.sheet import NULLS, Cell, Row, Table, tabulate


@cache
def words(name: str) -> dict[str, Any]:
    """Read `settings`, `sections` or `tables` from the YAML file of that name."""
    loaded: dict[str, Any] = yaml.safe_load(files(__package__).joinpath(f"{name}.yaml").read_text(encoding="utf-8"))
    return loaded


def numbers(table: str, part: str = "rows") -> list[NumberRow]:
    """Return the numbers that a table shows, as data."""
    return [NumberRow(**row) for row in words("tables")[table].get(part, ())]


def laid_out(table: str, rows: Sequence[Row], more: Sequence[str | None] = (), **values: Any) -> list[Table]:
    """Lay rows out under the title and above the footnotes that a table has in `tables.yaml`; nothing without rows.

    Args:
        table: Its name there.
        rows: Cells by column.
        more: Further footnotes.
        values: To be filled in. A footnote with `when` is left out where that value is missing, empty or false.
    """
    if not rows:
        return []
    entry, values = words("tables")[table], {"nulls": NULLS, **values}
    notes = [{"said": note} if isinstance(note, str) else note for note in entry["notes"]]
    shown = [note["said"].format(**values) for note in notes if "when" not in note or values.get(note["when"])]
    title = entry["title"].format(**values)
    return [tabulate(entry.get("name", table), title, rows, [*shown, *more])]


@dataclass
class PublishedColumns:
    """Columns with published values, in a table of runs that each stand beside a published run of their own.

    Args:
        besides: The published run of each run, by its name; None where there is none.
        head: What the heads of the columns end with.
        keys: Of the published numbers shown.
    """

    besides: Mapping[str, Beside | None]
    head: str
    keys: list[str] = field(default_factory=list)

    def cells(self, run: str, shown: Sequence[NumberRow]) -> dict[str, Cell]:
        """Write the published numbers beside a run, each in a column of its own; without words that of the head."""
        beside = self.besides[run]
        self.keys += [one.published_key for one in shown]
        heads = {f"{one.words}, {self.head}".removeprefix(", "): one for one in shown}
        return {} if beside is None else {k: beside.only(one.published_key, one.form) for k, one in heads.items()}

    @property
    def notes(self) -> list[str]:
        """Footnotes of the numbers shown; runs that differ alike from their published ones share a line."""
        notes: list[str] = []
        alike: dict[tuple[str, ...], list[str]] = {}
        for run, beside in self.besides.items():
            of_run = [] if beside is None else beside.notes(*self.keys)
            if beside is not None and beside.differs and of_run:
                of_run.pop()
                # The seed has a column of its own.
                alike.setdefault(tuple(line for line in beside.differs if not line.startswith("seed ")), []).append(run)
            notes += of_run
        return notes + [
            f"Not as published in {', '.join(runs)}: {listed(line)}." for line, runs in alike.items() if line
        ]
