"""Which published run a run repeats, and how its numbers are written beside one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mini_gpt_pl.report.settings import PAPER, differences, facts
from mini_gpt_pl.report.sheet import Cell, number
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.study.published import NOTES, PUBLISHED, Published


@dataclass(frozen=True)
class Setting:
    """Which published run a run is shown beside.

    Args:
        name: First key of `PUBLISHED`.
        differs: What is not as it was there; empty if the run repeats it.
        run: What that run was, in words.
    """

    name: str
    differs: tuple[str, ...]
    run: str = "51 M, 10,000 steps"

    @property
    def column(self) -> str:
        """Head of the column with published values."""
        return f"paper ({self.run})" if self.differs else "paper"

    def get(self, key: str) -> Published | None:
        """Return a published number of this setting."""
        return PUBLISHED.get((self.name, key))

    def cell(self, key: str, form: str) -> dict[str, Cell]:
        """Write a published number into its column, a dash where nothing was published."""
        found = self.get(key)
        return {self.column: number(None) if found is None else published_cell(found, form)}

    def notes(self, *keys: str) -> list[str]:
        """Footnotes of the published numbers shown: what they are, what is known of them, how this run differs."""
        found = [published for key in keys if (published := self.get(key))]
        if not found:
            return []
        defined = dict.fromkeys(f"{published.definition} ({published.source})" for published in found)
        notes = [f"Published: {'; '.join(defined)}."]
        notes += [NOTES[note] for note in dict.fromkeys(published.note for published in found) if note]
        if any(published.walk is not None for published in found):
            notes.append(NOTES["walk"])
        return [*notes, self.setting_note] if self.differs else notes

    @property
    def setting_note(self) -> str:
        """Say that the published column is of another setting, and what differs."""
        return f"The paper's values are of another setting: here {listed(self.differs)}."


def listed(differs: Sequence[str], most: int = 4) -> str:
    """Join differences, the first few of them: a small model on other stories differs in nearly everything."""
    more = len(differs) - most
    return "; ".join(differs[:most]) + (f"; and {more} more" if more > 0 else "")


def notes_of_runs(settings: Mapping[str, Setting | None], keys: Sequence[str]) -> list[str]:
    """Footnotes of several runs, each beside a published run of its own; runs that differ alike share a line.

    Args:
        settings: By name of the run.
        keys: Of the published numbers shown.
    """
    notes: list[str] = []
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, setting in settings.items():
        if setting is None:
            continue
        found = setting.notes(*keys)
        if setting.differs and found:
            found.pop()
            # The seed has a column of its own.
            rest = tuple(line for line in setting.differs if not line.startswith("seed "))
            alike.setdefault(rest, []).append(name)
        notes += found
    lines = ((names, listed(differs)) for differs, names in alike.items() if differs)
    return notes + [f"Not as published in {', '.join(names)}: {differs}." for names, differs in lines]


def setting_of(run: Run) -> Setting:
    """Find the main run of the paper that a run is to be compared with: its seed if it has one of the two.

    A run of another task has none: nothing is published for the name that its setting has then.
    """
    if run.task != "stories":
        return Setting(run.task, ())
    found = facts(run)
    differs = differences(found, PAPER)
    if run.reheated is not None:
        differs.insert(0, "reheated from a checkpoint instead of trained from scratch")
    seed = found["seed"]
    if seed not in (None, 42, 271):
        differs.append(f"seed {seed} instead of 42")
    return Setting("seed271" if seed == 271 else "seed42", tuple(differs))


def control_of(run: Run) -> Setting | None:
    """Find the optimizer control of the paper (Table 8) whose optimizer a run has, by its settings; None without."""
    found = facts(run)
    for name, optimizer in _CONTROLS.items():
        if all((found[key] or 0) == value for key, value in optimizer.items()):
            steps = 2000 if name == "C'" else 4000
            wanted = {**PAPER, **optimizer, "schedule length": 4000, "steps": steps, "seed": 42}
            # In 4,000 steps the second lambda acted on the last one only.
            return Setting(name, tuple(differences(found, wanted, ("beta1", "beta2", "lambda"))), "51 M, 4,000 steps")
    return None


_CONTROLS: dict[str, dict[str, Any]] = {
    "A": {"optimizer": "AdamW", "learning rate": 1e-3, "weight decay": 0.5, "beta1": 0.9, "beta2": 0.95},
    "B": {"optimizer": "SGD", "learning rate": 1e-3, "weight decay": 0.5, "momentum": 0},
    "C": {"optimizer": "SGD", "learning rate": 1e-2, "weight decay": 0.05, "momentum": 0.9},
    "C'": {"optimizer": "SGDW", "learning rate": 1e-2, "weight decay": 0.5, "momentum": 0.9},
}


def beta2_of(run: Run) -> Setting | None:
    """Find the published beta2 run with a run's beta2; None without."""
    found = facts(run)
    if found["beta2"] is None or ("beta2/" + f"{found['beta2']:g}", "pc1") not in PUBLISHED:
        return None
    sweep = {"beta2": found["beta2"], "schedule length": 4000, "steps": 4000, "share of probe sequences": 0.2}
    differs = differences(found, {**PAPER, **sweep, "seed": 42}, ("lambda",))
    return Setting(f"beta2/{found['beta2']:g}", tuple(differs), "51 M, 4,000 steps")


def published_cell(found: Published, form: str) -> Cell:
    """Write a published number or range, with its null in brackets where that is known."""
    null = "" if found.walk is None else f" (walk {form.format(found.walk)})"
    extra = {} if found.walk is None else {"walk": found.walk}
    if isinstance(found.value, tuple):
        low, high = found.value
        return Cell(f"{form.format(low)} to {form.format(high)}{null}", None, {"low": low, "high": high} | extra)
    return Cell(f"{form.format(found.value)}{null}", found.value, extra)
