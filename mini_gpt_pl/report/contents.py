"""What a report is made of: sections with one sentence each, their figures and tables, and what a study adds.

Sections stand in a file `sections.yaml`, in lists by name:

    run:
    - anchor: spectrum                   # of links to it
      title: How many directions
      sentence: Shares of the principal components.   # what is measured
      figures: {blocks: Share of the first component in each group.}   # captions, what is seen
      tables: [pc1_groups*]              # how names of its tables begin, or whole names
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, Generic, TypeVar

import yaml
from matplotlib.figure import Figure

from mini_gpt_pl.report.claims import Finding
from mini_gpt_pl.report.settings import general_facts
from mini_gpt_pl.report.sheet import Table
from mini_gpt_pl.report.subject import Backdrop, Subject
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.tasks import UNLISTED, tasks

Shown = TypeVar("Shown", Run, Sequence[Run])


@dataclass(frozen=True)
class Plate(Generic[Shown]):
    """One figure of a report.

    Args:
        name: File stem.
        draw: Draws it, or raises a UserError where the data for it are missing.
        caption: What is seen.
    """

    name: str
    draw: Callable[[Shown], Figure]
    caption: str


@dataclass(frozen=True)
class Section(Generic[Shown]):
    """A section of a report; one for which a run has neither figure nor table is left out.

    Args:
        anchor: Of links to it.
        title: In words.
        sentence: What is measured.
        plates: Its figures.
        tables: How names of its tables begin; a table goes to the first section that claims it.
    """

    anchor: str
    title: str
    sentence: str
    plates: tuple[Plate[Shown], ...] = ()
    tables: tuple[str, ...] = ()

    def claims(self, name: str) -> bool:
        """Whether a table of this name belongs here."""
        return any(
            name == claim.rstrip("*") or (claim[-1] == "*" and name.startswith(claim[:-1])) for claim in self.tables
        )


def plates(functions: Mapping[str, Callable[[Shown], Figure]], **captions: str) -> tuple[Plate[Shown], ...]:
    """Figures by name, each with its caption."""
    return tuple(Plate(name, functions[name], caption) for name, caption in captions.items())


def section_of(entry: Mapping[str, Any], figures: Mapping[str, Callable[[Shown], Figure]]) -> Section[Shown]:
    """Make a section of its entry in a file; figures are looked up by name."""
    shown, tables = plates(figures, **entry.get("figures", {})), tuple(entry.get("tables", ()))
    return Section(entry["anchor"], entry["title"], entry["sentence"], shown, tables)


def sections(package: str, name: str, figures: Mapping[str, Callable[[Shown], Figure]]) -> tuple[Section[Shown], ...]:
    """Read one list of sections from a package's `sections.yaml`."""
    text = files(package).joinpath("sections.yaml").read_text(encoding="utf-8")
    return tuple(section_of(entry, figures) for entry in yaml.safe_load(text)[name])


MORE: Section[Any] = Section("more", "More tables", "What belongs to no section above.")
"""Of tables that no other section claims."""


def claimed(sections: Iterable[Section[Shown]], names: Sequence[str]) -> dict[str, list[str]]:
    """Share tables out among sections, by anchor; those that none claims come under that of `MORE`."""
    claiming = list(sections)
    shared: dict[str, list[str]] = {section.anchor: [] for section in claiming}
    for name in names:
        owner = next((section.anchor for section in claiming if section.claims(name)), MORE.anchor)
        shared.setdefault(owner, []).append(name)
    return shared


@dataclass(frozen=True)
class Contents:
    """All that the report's core knows of a study: what it shows, and what it calls things.

    Args:
        of_run: Sections of a report on one run.
        run_tables: Tables of one run.
        of_runs: Sections of a report on several.
        comparison: Tables over several runs.
        findings: Sentences over several runs.
        entry: Figure of each of several runs.
        facts: What decides how a run goes, in words; see `settings.facts`.
        learned: What a run learned, one sentence each, for the head of its report.
        closing: Logged metrics of the table that closes a run, in words; its own metrics by their names for None.
        figures: Figures that close a run instead of the general ones of the same name.
        backdrop: What it adds to the general figures and tables.
    """

    of_run: tuple[Section[Run], ...]
    run_tables: Callable[[Run], list[Table]]
    of_runs: tuple[Section[Sequence[Run]], ...]
    comparison: Callable[[Sequence[Run]], list[Table]]
    findings: Callable[[Sequence[Run]], list[Finding]]
    entry: Plate[Run]
    facts: Callable[[Run], Mapping[str, Any]] = general_facts
    learned: Callable[[Subject], tuple[str, ...]] = lambda subject: ()
    closing: Mapping[str, str] | None = None
    figures: Mapping[str, Callable[[Run], Figure]] = field(default_factory=dict)
    backdrop: Backdrop = field(default=Backdrop())


def contents_of(runs: Sequence[Run]) -> Contents:
    """Contents for runs of one task; the general ones for runs of none, or of one whose study is not installed."""
    contents: Contents = tasks().get(runs[0].task, UNLISTED).load("contents")
    return contents
