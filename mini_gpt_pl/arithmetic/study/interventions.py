"""Arms of an intervention over seeds: when runs generalised, those that did not by their cap being censored.

mini_gpt_pl interventions runs/interventions/arms --out runs/interventions/tables
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from mini_gpt_pl.arithmetic.statistics.lifetimes import Lifetimes
from mini_gpt_pl.arithmetic.study.intervention_claims import claims_table
from mini_gpt_pl.arithmetic.study.intervention_runs import Delays, Ended, arms_below, ended, survival
from mini_gpt_pl.command_line import CommandParser
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.figures.plotting import DISTINCT, STYLE, WIDTH, legend_below, save
from mini_gpt_pl.report.sheet import EMPTY, Cell, Row, Table, number, tabulate, word, write_tables
from mini_gpt_pl.runs.folder import Run

NOTES = (
    "Median and share are the product-limit estimate of Kaplan and Meier: a run that had not generalised when it was "
    "stopped says that its time is longer, and no more.",
    "Delays are between runs of one seed, which share initial weights, split and batches; > marks what is only known "
    "to be longer. Evaluations are a grid: a delay of one of its steps is no delay.",
    "An arm says something about a subspace only where it differs from the arm that scales alike without one, and from "
    "random directions inside the same blocks. A low train accuracy or a short ||theta|| says that the network was "
    "taken apart.",
)


def tables(arms: Mapping[str, Sequence[Run]], control: str = "none", milestone: str = "test_90") -> list[Table]:
    """Make tables of what was claimed, of all arms, of every run, and of the arms' survival curves.

    Args:
        arms: Runs of each arm; those that have not ended are left out.
        control: Name of the arm without intervention.
        milestone: What counts as having generalised.

    Raises:
        UserError: No run of the control has ended, or a run did not watch for the milestone.
    """
    finished = ended(arms, milestone)
    if control not in finished:
        raise UserError(f"no run of the arm {control!r} has ended: name the arm without intervention with --control")
    waiting = sum(map(len, arms.values())) - sum(map(len, finished.values()))
    left_out = f"{waiting} runs that have not ended are left out." if waiting else None
    rows = [_row(name, runs, finished[control]) for name, runs in finished.items()]
    title = f"Interventions: when {milestone} was reached"
    curves = [row for name, runs in finished.items() for row in _curve(name, survival(runs))]
    return [
        claims_table(finished, control),
        tabulate("interventions", title, rows, [*NOTES, left_out]),
        tabulate("interventions_runs", "Interventions: every run", _every_run(finished), [NOTES[0]]),
        tabulate("interventions_survival", f"Interventions: share of runs without {milestone}", curves, [NOTES[0]]),
    ]


def _row(name: str, runs: Sequence[Ended], control: Sequence[Ended]) -> Row:
    lived = survival(runs)
    reached = sum(run.at is not None for run in runs)
    everyone = max(run.known for run in control)
    median = number(lived.median, "{:.0f}")
    return {
        "arm": word(name),
        "runs": number(len(runs), "{:.0f}"),
        "generalised": number(reached, "{:.0f}"),
        "median step": median if lived.median is not None else word(f"> {max(run.stopped for run in runs)}"),
        f"not yet at {everyone}": number(_at(lived, everyone), "{:.0%}"),
        "delay": _delay(runs, control),
        "train accuracy, lowest": number(statistics.median(run.train for run in runs)),
        "||theta|| at the end": number(statistics.median(run.norm for run in runs), "{:.1f}"),
        "|P x| / |x|": number(statistics.fmean(run.parallel for run in runs), "{:.4f}"),
        "random in the same blocks": number(statistics.fmean(run.null for run in runs), "{:.4f}"),
    }


def _every_run(arms: Mapping[str, Sequence[Ended]]) -> list[Row]:
    return [
        {
            "arm": word(name),
            "seed": number(run.seed, "{:.0f}"),
            "generalised": word("not by the end") if run.at is None else number(run.at, "{:.0f}"),
            "stopped": number(run.stopped, "{:.0f}"),
            "train accuracy, lowest": number(run.train),
            "||theta|| at the end": number(run.norm, "{:.1f}"),
        }
        for name, runs in arms.items()
        for run in sorted(runs, key=lambda run: run.seed)
    ]


def _at(lived: Lifetimes, step: int) -> float:
    past = lived.surviving[lived.times <= step]
    return float(past[-1]) if len(past) else 1.0


def _delay(runs: Sequence[Ended], control: Sequence[Ended]) -> Cell:
    """Median over the seeds of the delay against the control's run of the same seed, and its range."""
    delays = Delays.between(runs, control)
    if not delays.steps:
        return Cell(EMPTY, None)
    ends = {"low": delays.steps[0], "high": delays.steps[-1], "censored": sum(delays.censored)}
    return Cell(str(delays), delays.steps[delays.middle], ends)


def _curve(name: str, lived: Lifetimes) -> list[Row]:
    columns = (lived.times, lived.at_risk, lived.surviving, lived.low, lived.high)
    return [
        {
            "arm": word(name),
            "step": number(step, "{:.0f}"),
            "at risk": number(risk, "{:.0f}"),
            "not yet": number(share, "{:.0%}"),
            "low": number(low, "{:.0%}"),
            "high": number(high, "{:.0%}"),
        }
        for step, risk, share, low, high in zip(*(column.tolist() for column in columns), strict=True)
    ]


def figure(arms: Mapping[str, Sequence[Run]], names: Sequence[str], milestone: str = "test_90") -> Figure:
    """Draw the survival curves of some arms.

    Args:
        arms: Runs of each arm.
        names: Which of them, at most as many as there are colours; those without an ended run are left out.
        milestone: What counts as having generalised.
    """
    finished = ended({name: arms[name] for name in names if name in arms}, milestone)
    with mpl.rc_context(STYLE):
        drawn = Figure(figsize=(WIDTH, 3.4))
        axes = drawn.subplots()
        for colour, (name, runs) in zip(DISTINCT, finished.items(), strict=False):
            lived, end = survival(runs), max(run.stopped for run in runs)
            steps, shares = [0.0, *lived.times.tolist(), end], [1.0, *lived.surviving.tolist()]
            axes.step(steps, [*shares, shares[-1]], where="post", color=colour, label=name)
        axes.set(xlabel="optimizer step", ylabel=f"share of seeds without {milestone}", ylim=(-0.03, 1.03))
        legend_below(axes, columns=4)
    return drawn


def main(args: Sequence[str] | None = None) -> None:
    """Write tables and figure of the runs below a sweep's folder."""
    parser = CommandParser("interventions", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, help="folder of the sweep's runs")
    parser.add_argument("--control", default="none", help="arm without intervention")
    parser.add_argument("--operation", help="of a sweep over operations: the runs of this one only")
    parser.add_argument("--milestone", default="test_90", help="what counts as having generalised")
    parser.add_argument("--draw", nargs="+", default=None, help="arms in the figure (default: the first ten)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the tables and the figure")
    options = parser.parse_args(args)
    arms = arms_below(options.runs, options.operation)
    made = [table for table in tables(arms, options.control, options.milestone) if table.rows]
    written = write_tables(made, options.out)
    written += save(figure(arms, options.draw or list(arms), options.milestone), options.out, "interventions")
    for table in made[:2]:
        print(table.markdown())
    for path in written:
        print(path)
