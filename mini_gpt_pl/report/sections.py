"""The parts of a report: sections with one sentence, their figures and their tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from matplotlib.figure import Figure

from mini_gpt_pl.runs.folder import Run

Subject = TypeVar("Subject", Run, Sequence[Run])


@dataclass(frozen=True)
class Plate(Generic[Subject]):
    """One figure of a report.

    Args:
        name: File stem.
        draw: Draws it, or raises a UserError where the data for it are missing.
        caption: What is seen.
    """

    name: str
    draw: Callable[[Subject], Figure]
    caption: str


@dataclass(frozen=True)
class Section(Generic[Subject]):
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
    plates: tuple[Plate[Subject], ...] = ()
    tables: tuple[str, ...] = ()

    def claims(self, name: str) -> bool:
        """Whether a table of this name belongs here."""
        return any(
            name == claim.rstrip("*") or (claim[-1] == "*" and name.startswith(claim[:-1])) for claim in self.tables
        )


def plates(functions: Mapping[str, Callable[[Subject], Figure]], **captions: str) -> tuple[Plate[Subject], ...]:
    """Figures by name, each with its caption."""
    return tuple(Plate(name, functions[name], caption) for name, caption in captions.items())


MORE = ("more", "More tables", "What belongs to no section above.")
"""Anchor, title and sentence of the section for tables that no other claims."""


def claimed(sections: Iterable[Section[Subject]], names: Sequence[str]) -> dict[str, list[str]]:
    """Share tables out among sections, by anchor; those that none claims come under that of `MORE`."""
    known = list(sections)
    shared: dict[str, list[str]] = {section.anchor: [] for section in known}
    for name in names:
        owner = next((section.anchor for section in known if section.claims(name)), MORE[0])
        shared.setdefault(owner, []).append(name)
    return shared
