"""What a run is, and which of its numbers stand out of their null: computed, for the head of its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from mini_gpt_pl.geometry.path.nulls import Calibrated
from mini_gpt_pl.metrics.registry import statistics
from mini_gpt_pl.report.calibration import conclusion, written
from mini_gpt_pl.report.contents import contents_of
from mini_gpt_pl.report.settings import facts, optimizer_label, plain, progress
from mini_gpt_pl.report.subject import Subject
from mini_gpt_pl.runs.folder import Run


@dataclass(frozen=True)
class Verdict:
    """A number with an interval, and whether it differs from its null by more than that.

    Args:
        quantity: In words.
        measured: As written.
        null: The decaying walk's, as written.
        excess: Measured minus null, as written.
        interval: 95 % of the excess, as written.
        stands_out: Whether the interval leaves out zero.
        said: What that says, in words.
    """

    quantity: str
    measured: str
    null: str
    excess: str
    interval: str
    stands_out: bool
    said: str = ""


@dataclass(frozen=True)
class Headline:
    """The head of a report on one run.

    Args:
        sentence: What the run is.
        facts: Its settings, in words.
        learned: What it learned, one sentence each.
        verdicts: Numbers with an interval.
        without_interval: How many calibrated numbers have none.
    """

    sentence: str
    facts: Mapping[str, str]
    learned: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    without_interval: int

    @property
    def found(self) -> str:
        """Which numbers stand out of their null and which do not, in a sentence."""
        if not self.verdicts:
            return "There is no interval for any of its numbers: the path is too short, or the weights never moved."
        sides = {out: [v.quantity for v in self.verdicts if v.stands_out == out] for out in (True, False)}
        said = [
            f"{words}: {'; '.join(names)}."
            for words, names in (("Out of the null", sides[True]), ("Within the null", sides[False]))
            if names
        ]
        return " ".join(said)


def headline(run: Run) -> Headline:
    """Read a run's settings and calibrate its numbers.

    Raises:
        UserError: The run has no configuration, or no trajectory.
    """
    subject = Subject.of(run)
    calibrated = subject.calibrated()
    judged = tuple(_verdict(name, found) for name, found in calibrated.items() if found.low == found.low)
    learned = contents_of([subject]).learned(subject) if subject.has_metrics else ()
    return Headline(_sentence(subject), _facts(subject), learned, judged, len(calibrated) - len(judged))


def _verdict(name: str, found: Calibrated) -> Verdict:
    cells = written(name, found)
    return Verdict(
        statistics()[name].title,
        cells["measured"],
        cells["decaying walk"],
        cells["excess"],
        cells["95 %"],
        stands_out=not found.low <= 0 <= found.high,
        said=conclusion(found),
    )


def _sentence(run: Run) -> str:
    known = facts(run)
    parts = [
        optimizer_label(known, beta2=True) if known["optimizer"] else None,
        known["model"],
        None if known.get("operation") is None else f"{known['operation']} modulo {known['modulus']}",
        f"seed {known['seed']}" if known["seed"] is not None else None,
        state(run),
    ]
    return "; ".join(str(part) for part in parts if part) + "."


def state(run: Run) -> str:
    """How far a run came and how it ended."""
    ended = run.outcome
    if ended is None:
        taken, asked = progress(run)
        whole = "" if asked is None or taken >= asked else f" of {asked:,}"
        return f"recorded up to step {taken:,}{whole}, its end is not on record"
    return f"{ended.state} at step {ended.step:,}"


def _facts(run: Run) -> dict[str, str]:
    """Settings, then what was recorded of the path."""
    shown = {key: plain(value) for key, value in facts(run).items() if value is not None}
    trajectory = run.trajectory
    shown["recorded weights"] = f"{trajectory.dim:,} in {len(trajectory.groups)} groups"
    shown["snapshots"] = f"{len(trajectory)}, {_spacing(trajectory.steps)}"
    shown["initial weights that decay left"] = f"{trajectory.survival[-1]:.0%}"
    if (record := run.lineage) is not None and record.get("parent"):
        shown["continues"] = f"{record['parent']}, step {record.get('parent_step', '?')}"
    return shown


def _spacing(steps: list[int]) -> str:
    gaps = sorted({later - earlier for earlier, later in pairwise(steps)})
    if not gaps:
        return "one alone"
    return f"every {gaps[0]} steps" if len(gaps) == 1 else f"{gaps[0]} to {gaps[-1]} steps apart"
