"""What a run is and what its numbers say: the head of its report, and the short table that closes a run.

python -m mini_gpt_pl.report.summary runs/mine
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table as Printed
from rich.text import Text

from mini_gpt_pl.command_line import one_line_errors
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.metrics.registry import statistics
from mini_gpt_pl.report.calibration import calibrate_run, written
from mini_gpt_pl.report.contents import contents_of
from mini_gpt_pl.report.learning import own_metrics
from mini_gpt_pl.report.settings import facts, optimizer_label, plain, progress
from mini_gpt_pl.report.sheet import Table, beside_nulls, conclusion, tabulate, word
from mini_gpt_pl.report.subject import Subject
from mini_gpt_pl.runs.folder import Run

SHOWN = (
    "pc1",
    "pc1_unit",
    "k95",
    "drift",
    "update_alignment_past",
    "cos_theta0",
    "persistence",
    "autocorrelation",
)
"""The statistics of the closing table; `mini_gpt_pl.report.calibration` prints them all."""

# ------------------------------------------------------------------------------------------- the head of a report


@dataclass(frozen=True)
class Headline:
    """The head of a report on one run.

    Args:
        sentence: What the run is.
        facts: Its settings, in words.
        learned: What it learned, one sentence each.
        verdicts: Numbers with an interval beside their null, and whether they stand out of it.
        without_interval: How many calibrated numbers have none.
    """

    sentence: str
    facts: Mapping[str, str]
    learned: tuple[str, ...]
    verdicts: Table
    without_interval: int

    @property
    def found(self) -> str:
        """Which numbers stand out of their null and which do not, in a sentence."""
        if not self.verdicts.rows:
            why = "the path is too short, the weights never moved, or what weight decay took of them is not known"
            return f"There is no interval for any of its numbers: {why}."
        names = {
            words: [row["quantity"].text for row in self.verdicts.rows if (row["verdict"].text == _OUT) is out]
            for words, out in (("Out of the null", True), ("Within the null", False))
        }
        return " ".join(f"{words}: {'; '.join(listed)}." for words, listed in names.items() if listed)


_OUT = "**stands out**"


def headline(run: Run) -> Headline:
    """Read a run's settings and calibrate its numbers.

    Raises:
        UserError: The run has no configuration, or no trajectory.
    """
    subject = Subject.of(run)
    calibrated = subject.calibrated()
    rows = []
    for name, one in calibrated.items():
        if one.low == one.low:  # there is an interval
            cells = beside_nulls(one, statistics()[name].format)
            cells["null"] = cells.pop("decaying walk")
            verdict = word("within the null" if one.low <= 0 <= one.high else _OUT)
            row = {"quantity": word(statistics()[name].title)}
            row |= {head: cells[head] for head in ("measured", "null", "excess", "95 %")}
            rows.append(row | {"verdict": verdict, "in words": word(conclusion(one))})
    learned = contents_of([subject]).learned(subject) if subject.has_metrics else ()
    table = tabulate("verdicts", "Out of the null or within it", rows)
    return Headline(_sentence(subject), _facts(subject), learned, table, len(calibrated) - len(rows))


def _sentence(run: Run) -> str:
    known = facts(run)
    parts = [
        optimizer_label(known, beta2=True) if known["optimizer"] else None,
        known["model"],
        None if known.get("operation") is None else f"{known['operation']} modulo {known['modulus']}",
        f"seed {known['seed']}" if known["seed"] is not None else None,
    ]
    if (ended := run.outcome) is None:
        steps, asked = progress(run)
        whole = "" if asked is None or steps >= asked else f" of {asked:,}"
        parts.append(f"recorded up to step {steps:,}{whole}, its end is not on record")
    else:
        parts.append(f"{ended.state} at step {ended.step:,}")
    return "; ".join(str(part) for part in parts if part) + "."


def _facts(run: Subject) -> dict[str, str]:
    """Settings, then what was recorded of the path."""
    shown = {key: plain(value) for key, value in facts(run).items() if value is not None}
    trajectory = run.trajectory
    gaps = sorted({later - earlier for earlier, later in pairwise(trajectory.steps)})
    spacing = f"{gaps[0]} to {gaps[-1]} steps apart" if gaps else "one alone"
    spacing = f"every {gaps[0]} steps" if len(gaps) == 1 else spacing
    shown["recorded weights"] = f"{trajectory.dim:,} in {len(trajectory.groups)} groups"
    shown["snapshots"] = f"{len(trajectory)}, {spacing}"
    shown["initial weights that decay left"] = run.decay_left
    if (record := run.lineage) is not None and record.get("parent"):
        shown["continues"] = f"{record['parent']}, step {record.get('parent_step', '?')}"
    return shown


# --------------------------------------------------------------------------------------------- the closing table


_COLUMNS = ("quantity", "value", "walk", "decay", "excess", "interval")


def lines(run: Run, bootstrap: int = 0) -> list[dict[str, str]]:
    """Rows of the closing table: what was learned, then the geometry if the run recorded a trajectory that moved.

    Returns:
        Of each row the quantity in words and, as they are written, its value, that of the walk and of the decaying
        walk, the excess over the latter and its 95 % interval; empty for what it does not have.
    """
    subject = Subject.of(run, bootstrap=bootstrap)
    closing = contents_of([run]).closing
    if closing is None:
        rows = [[name, f"{run.last(name):.4g}"] for name in own_metrics(run)]
    else:
        logged = {name: words for name, words in closing.items() if subject.has_metrics and len(run.series(name))}
        rows = [[words, f"{run.last(name):.3f}"] for name, words in logged.items()]
    with suppress(UserError):  # a run without a path has a table of losses alone
        numbers = subject.calibrate()
        rows += [[statistics()[name].title, *written(name, numbers[name]).values()] for name in SHOWN]
        rows.append(["initial weights that weight decay left", subject.decay_left])
    return [dict(zip(_COLUMNS, [*row, *[""] * len(_COLUMNS)], strict=False)) for row in rows]


def verdicts(run: Run, bootstrap: int = 100) -> list[str]:
    """Say in words what the table shows: what each number is, and whether it says more than its null.

    Raises:
        UserError: The run has no trajectory, or one without movement.
    """
    numbers = calibrate_run(run, bootstrap=bootstrap)
    if not Subject.of(run).decay_known:
        return ["What weight decay took of the weights is not known: there is no decaying walk to compare with."]
    update, theta0 = numbers["update_alignment_past"], numbers["cos_theta0"]
    raw, unit = (
        f"{one.value:.1%}, where the decaying walk has {one.decay:.1%}: {conclusion(one)}."
        for one in (numbers["pc1"], numbers["pc1_unit"])
    )
    return [
        f"PC1 is the share of the squared drift along one direction, the backbone v_b. {raw}",
        "With unit rows every snapshot counts the same, so the last ones, which lie farthest out, do not decide. "
        f"{unit}",
        f"Weight decay alone has taken {1.0 - run.trajectory.survival[-1]:.0%} of the initial weights away, a path "
        f"along -theta_0: cos(v_b, theta_0) is {theta0.value:+.2f} where the decaying walk has {theta0.decay:+.2f}.",
        f"Each update against the backbone of its own past: {update.value:+.3f}, decaying walk {update.decay:+.3f}. "
        "Zero means that the past does not tell where the next step goes.",
    ]


def print_summary(run: Run, console: Console | None = None) -> None:
    """Print the closing table, and what it says in words."""
    run = Subject.of(run, bootstrap=100)
    table = Printed(title=f"{run.path}", title_justify="left")
    table.add_column("quantity")
    for column in ("measured", "walk*", "decaying walk*", "excess", "95 %"):
        table.add_column(column, justify="right")
    for line in lines(run, bootstrap=100):
        table.add_row(*line.values())
    console = console or Console(markup=False)
    console.print(table)
    console.print(
        "* the same step lengths in mutually orthogonal directions, without and with the run's weight decay;\n"
        "  the excess is over the latter, its interval a block bootstrap over snapshots",
        style="dim",
    )
    with suppress(UserError):
        for text in verdicts(run):
            console.print(Padding(Text(text), (0, 0, 0, 2)))


def table_console() -> Console:
    """A console as wide as the terminal, or wide enough for the table where there is none; brackets are text."""
    return Console(markup=False, width=None if sys.stdout.isatty() else 110)


def main() -> None:
    """Print the closing table of a run again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    with one_line_errors():
        print_summary(Run(parser.parse_args().run), table_console())


if __name__ == "__main__":
    main()
