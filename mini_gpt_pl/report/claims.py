"""What several runs say: claims that somebody made beside what was measured, and sentences for the head of a report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mini_gpt_pl.report.sheet import Table, tabulate, word


@dataclass(frozen=True)
class Finding:
    """One sentence or two about several runs: its topic, what it says, and the anchor of the section that shows it."""

    topic: str
    said: str
    anchor: str


@dataclass(frozen=True)
class Claim:
    """A published claim and what became of it; every part but the first is computed.

    Args:
        said: By whoever made it.
        here: The same number of these runs.
        null: What chance, decay or a control gives.
        reading: What follows.
        anchor: Section that shows it.
        topic: In a few words.

    Example:
        >>> claim = Claim("PC1 is 80 %", "PC1 is 79 %", "a walk has 81 %", "**no more than chance**")
        >>> claims_table("claims", "Claims", [claim]).lines
        [['PC1 is 80 %', 'PC1 is 79 %', 'a walk has 81 %', '**no more than chance**']]
    """

    said: str
    here: str
    null: str
    reading: str
    anchor: str = ""
    topic: str = ""

    @property
    def finding(self) -> Finding:
        """The claim as a sentence for the head of a report."""
        return Finding(self.topic, f"{self.reading} Here {self.here}; {self.null}.", self.anchor)


def claims_table(
    name: str,
    title: str,
    claims: Iterable[Claim | None],
    notes: Sequence[str | None] = (),
    columns: tuple[str, str, str, str] = ("the studies say", "here", "null", "reading"),
) -> Table:
    """Lay claims out as a table; those that the runs do not allow are None."""
    parts = [(claim.said, claim.here, claim.null, claim.reading) for claim in claims if claim is not None]
    return tabulate(name, title, [dict(zip(columns, map(word, part), strict=True)) for part in parts], notes)
