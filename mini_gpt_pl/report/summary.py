"""The short table that closes a run.

python -m mini_gpt_pl.report.summary runs/mine
"""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mini_gpt_pl.command_line import one_line_errors
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.path.nulls import Calibrated
from mini_gpt_pl.metrics.registry import statistics
from mini_gpt_pl.report.calibration import calibrate_run, conclusion, written
from mini_gpt_pl.report.contents import contents_of
from mini_gpt_pl.report.learning import own_metrics
from mini_gpt_pl.report.subject import Subject
from mini_gpt_pl.runs.folder import METRICS, Run

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


@dataclass(frozen=True)
class Line:
    """One row of the closing table, as it is written.

    Args:
        quantity: What was measured, in words.
        value: As measured.
        walk: Of a walk with the same step lengths in orthogonal directions; empty where that says nothing.
        decay: Of the same walk under the run's own weight decay.
        excess: Measured minus decaying walk.
        interval: 95 % interval of the excess over which snapshots were taken; empty if none was asked for.
    """

    quantity: str
    value: str
    walk: str = ""
    decay: str = ""
    excess: str = ""
    interval: str = ""


def lines(run: Run, bootstrap: int = 0) -> list[Line]:
    """Collect the rows: what was learned, then the geometry if the run recorded a trajectory that moved."""
    closing, has_metrics = contents_of([run]).closing, (run.path / METRICS).is_file()
    if closing is None:
        table = [Line(name, f"{run.last(name):.4g}") for name in own_metrics(run)]
    else:
        shown = closing.items() if has_metrics else ()
        table = [Line(words, f"{run.last(name):.3f}") for name, words in shown if len(run.series(name))]
    try:
        return table + geometry_lines(run, bootstrap)
    except UserError:
        return table


def geometry_lines(run: Run, bootstrap: int = 0) -> list[Line]:
    """Rows of the whole selection's trajectory, each beside its nulls.

    Raises:
        UserError: The run has no trajectory, or one without movement.
    """
    found = calibrate_run(run, bootstrap=bootstrap)
    rows = []
    for name in SHOWN:
        rows.append(Line(statistics()[name].title, *written(name, found[name]).values()))
    left = f"{run.trajectory.survival[-1]:.0%}"
    return [*rows, Line("initial weights that weight decay left", left)]


def verdicts(run: Run, bootstrap: int = 100) -> list[str]:
    """Say in words what the table shows: what each number is, and whether it says more than its null.

    Raises:
        UserError: The run has no trajectory, or one without movement.
    """
    found = calibrate_run(run, bootstrap=bootstrap)
    update, theta0 = found["update_alignment_past"], found["cos_theta0"]
    gone = 1.0 - run.trajectory.survival[-1]
    return [
        f"PC1 is the share of the squared drift along one direction, the backbone v_b. {_verdict(found['pc1'])}",
        "With unit rows every snapshot counts the same, so the last ones, which lie farthest out, do not decide. "
        f"{_verdict(found['pc1_unit'])}",
        f"Weight decay alone has taken {gone:.0%} of the initial weights away, a path along -theta_0: cos(v_b, "
        f"theta_0) is {theta0.value:+.2f} where the decaying walk has {theta0.decay:+.2f}.",
        f"Each update against the backbone of its own past: {update.value:+.3f}, decaying walk {update.decay:+.3f}. "
        "Zero means that the past does not tell where the next step goes.",
    ]


def _verdict(pc1: Calibrated) -> str:
    return f"{pc1.value:.1%}, where the decaying walk has {pc1.decay:.1%}: {conclusion(pc1)}."


def print_summary(run: Run, console: Console | None = None) -> None:
    """Print the closing table, and what it says in words."""
    table = Table(title=f"{run.path}", title_justify="left")
    table.add_column("quantity")
    for column in ("measured", "walk*", "decaying walk*", "excess", "95 %"):
        table.add_column(column, justify="right")
    run = Subject.of(run, bootstrap=100)
    for line in lines(run, bootstrap=100):
        table.add_row(line.quantity, line.value, line.walk, line.decay, line.excess, line.interval)
    console = console or Console()
    console.print(table)
    console.print(
        "* the same step lengths in mutually orthogonal directions, without and with the run's weight decay;\n"
        "  the excess is over the latter, its interval a block bootstrap over snapshots",
        style="dim",
    )
    with suppress(UserError):  # a run without a path has a table of losses alone
        for text in verdicts(run):
            console.print(Padding(Text(text), (0, 0, 0, 2)))


def table_console() -> Console:
    """A console as wide as the terminal, or wide enough for the table where there is none."""
    return Console() if sys.stdout.isatty() else Console(width=110)


def main() -> None:
    """Print the closing table of a run again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    with one_line_errors():
        print_summary(Run(parser.parse_args().run), table_console())


if __name__ == "__main__":
    main()
