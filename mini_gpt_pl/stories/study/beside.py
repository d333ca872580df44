"""Which published run a run of stories repeats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mini_gpt_pl.report.published import Beside, Book, book, listed
from mini_gpt_pl.report.settings import differences, facts
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.study.settings import PAPER

BOOK: Book = book("mini_gpt_pl.stories.study")
"""The published values: arXiv 2602.23696 ("paper"), and its authors' repository."""
MAIN, SHORT = "51 M, 10,000 steps", "51 M, 4,000 steps"
COLUMN = f"paper ({SHORT})"
"""Head of the column with published values where several runs stand beside runs of 4,000 steps."""

_CONTROLS: dict[str, dict[str, Any]] = {
    "A": {"optimizer": "AdamW", "learning rate": 1e-3, "weight decay": 0.5, "beta1": 0.9, "beta2": 0.95},
    "B": {"optimizer": "SGD", "learning rate": 1e-3, "weight decay": 0.5, "momentum": 0},
    "C": {"optimizer": "SGD", "learning rate": 1e-2, "weight decay": 0.05, "momentum": 0.9},
    "C'": {"optimizer": "SGDW", "learning rate": 1e-2, "weight decay": 0.5, "momentum": 0.9},
}


def notes_of_runs(published: Mapping[str, Beside | None], keys: Sequence[str]) -> list[str]:
    """Footnotes of several runs, each beside a published run of its own; runs that differ alike share a line.

    Args:
        published: By name of the run.
        keys: Of the published numbers shown.
    """
    notes: list[str] = []
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, beside in published.items():
        if beside is None:
            continue
        found = beside.notes(*keys)
        if beside.differs and found:
            found.pop()
            # The seed has a column of its own.
            rest = tuple(line for line in beside.differs if not line.startswith("seed "))
            alike.setdefault(rest, []).append(name)
        notes += found
    lines = ((names, listed(differs)) for differs, names in alike.items() if differs)
    return notes + [f"Not as published in {', '.join(names)}: {differs}." for names, differs in lines]


def main_run(run: Run) -> Beside:
    """Find the main run of the paper that a run is to be compared with: its seed if it has one of the two."""
    found = facts(run)
    differs = differences(found, PAPER)
    if run.lineage is not None:
        differs.insert(0, "reheated from a checkpoint instead of trained from scratch")
    seed = found["seed"]
    if seed not in (None, 42, 271):
        differs.append(f"seed {seed} instead of 42")
    return Beside("seed271" if seed == 271 else "seed42", tuple(differs), MAIN, BOOK)


def control_of(run: Run) -> Beside | None:
    """Find the optimizer control of the paper (Table 8) whose optimizer a run has, by its settings; None without."""
    found = facts(run)
    for name, optimizer in _CONTROLS.items():
        if all((found[key] or 0) == value for key, value in optimizer.items()):
            steps = 2000 if name == "C'" else 4000
            wanted = {**PAPER, **optimizer, "schedule length": 4000, "steps": steps, "seed": 42}
            # In 4,000 steps the second lambda acted on the last one only.
            return Beside(name, tuple(differences(found, wanted, ("beta1", "beta2", "lambda"))), SHORT, BOOK)
    return None


def beta2_of(run: Run) -> Beside | None:
    """Find the published beta2 run with a run's beta2; None without."""
    found = facts(run)
    name = "" if found["beta2"] is None else f"beta2/{found['beta2']:g}"
    if (name, "pc1") not in BOOK.values:
        return None
    sweep = {"beta2": found["beta2"], "schedule length": 4000, "steps": 4000, "share of probe sequences": 0.2}
    return Beside(name, tuple(differences(found, {**PAPER, **sweep, "seed": 42}, ("lambda",))), SHORT, BOOK)


def reheat_of(run: Run, record: Mapping[str, Any]) -> Beside:
    """Find the published reheat with a run's seed and learning rate; one that holds nothing where there is none."""
    lr, found = record.get("lr"), facts(run)
    name = f"reheat/{found['seed']}/{lr:g}" if isinstance(lr, int | float) else ""
    if (name, "gain") not in BOOK.values:
        return Beside("", (), MAIN, BOOK)
    kept = ("model", "context", "sequences a step", "share of probe sequences", "corpus")
    differs = differences(
        {**found, "reheated step": record.get("parent_step")},
        {key: PAPER[key] for key in kept} | {"reheated step": 10_000},
    )
    return Beside(name, tuple(differs), MAIN, BOOK)
