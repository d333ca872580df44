"""Arms of an intervention over seeds: when runs generalised, those that did not by their cap being censored.

python -m mini_gpt_pl.report.interventions runs/interventions/arms --out runs/interventions/tables
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.lifetimes import Lifetimes, kaplan_meier
from mini_gpt_pl.report.plotting import DISTINCT, STYLE, WIDTH, legend_below, save
from mini_gpt_pl.report.sheet import EMPTY, Cell, Row, Table, number, tabulate, word, write_tables
from mini_gpt_pl.runs import Run, runs_below

# A sweep names its folders by the values that it varies.
_SEED = re.compile(r"_?seed_everything-\d+$")
NOTES = (
    "Median and share are the product-limit estimate of Kaplan and Meier: a run that had not generalised when it was "
    "stopped says that its time is longer, and no more.",
    "Delays are between runs of one seed, which share initial weights, split and batches; > marks what is only known "
    "to be longer. Evaluations are a grid: a delay of one of its steps is no delay.",
    "An arm says something about a subspace only where it differs from the arm that scales alike without one, and from "
    "random directions inside the same blocks. A low train accuracy or a short ||theta|| says that the network was "
    "taken apart.",
)


@dataclass(frozen=True)
class Ended:
    """What became of one run.

    Args:
        seed: Its `seed_everything`.
        at: Step at which it generalised, None if it had not when it was stopped.
        stopped: Its last step.
        train: Lowest train accuracy from when it had memorised on, NaN if it never had.
        norm: ||theta|| at the end, parameter units.
        parallel: Mean over the changed steps of |P x| / |x|, NaN without a basis.
        null: The same of random directions inside the same blocks.
    """

    seed: int
    at: int | None
    stopped: int
    train: float
    norm: float
    parallel: float
    null: float

    @classmethod
    def of(cls, run: Run, milestone: str) -> Ended | None:
        """Read a run folder; None if the run has not ended.

        Raises:
            UserError: The run did not watch for the milestone.
        """
        outcome = run.outcome
        if outcome is None:
            return None
        if milestone not in outcome.milestones:
            raise UserError(f"{run.path} watched for no milestone {milestone!r}: train it with an Evaluation callback")
        memorised = outcome.milestones.get("train_99")
        accuracy = run.series("eval/train_accuracy")
        lowest = float("nan") if memorised is None else float(accuracy.loc[memorised:].min())
        means = [_mean(run, rf"^intervention/[^/]+/{name}$") for name in ("parallel", "parallel_null")]
        seed = int(run.config["seed_everything"])
        return cls(seed, outcome.milestones[milestone], outcome.step, lowest, run.last("eval/weight_norm"), *means)

    @property
    def known(self) -> int:
        """Step that it generalised at, or was stopped at without."""
        return self.stopped if self.at is None else self.at


def _mean(run: Run, pattern: str) -> float:
    found = run.metrics.filter(regex=pattern)
    return float(found.mean().mean()) if found.size else float("nan")


def arms_below(folder: Path) -> dict[str, list[Run]]:
    """Group the runs in a sweep's folder by arm: the folder's name without the seed, in the order of the names.

    Raises:
        UserError: There are no runs.
    """
    arms: dict[str, list[Run]] = {}
    for path in runs_below(folder):
        arms.setdefault(_SEED.sub("", path.name) or "baseline", []).append(Run(path))
    return arms


def survival(runs: Sequence[Ended]) -> Lifetimes:
    """Share of runs that have not generalised yet, after each step at which one did or was stopped."""
    return kaplan_meier([run.at for run in runs], [run.stopped for run in runs])


def tables(arms: Mapping[str, Sequence[Run]], control: str = "none", milestone: str = "test_90") -> list[Table]:
    """Make a table of all arms and one of their survival curves.

    Args:
        arms: Runs of each arm; those that have not ended are left out.
        control: Name of the arm without intervention.
        milestone: What counts as having generalised.

    Raises:
        UserError: No run of the control has ended, or a run did not watch for the milestone.
    """
    ended = _ended(arms, milestone)
    if control not in ended:
        raise UserError(f"no run of the arm {control!r} has ended: name the arm without intervention with --control")
    waiting = sum(map(len, arms.values())) - sum(map(len, ended.values()))
    left_out = f"{waiting} runs that have not ended are left out." if waiting else None
    rows = [_row(name, runs, ended[control]) for name, runs in ended.items()]
    title = f"Interventions: when {milestone} was reached"
    curves = [row for name, runs in ended.items() for row in _curve(name, survival(runs))]
    return [
        tabulate("interventions", title, rows, [*NOTES, left_out]),
        tabulate("interventions_survival", f"Interventions: share of runs without {milestone}", curves, [NOTES[0]]),
    ]


def _ended(arms: Mapping[str, Sequence[Run]], milestone: str) -> dict[str, list[Ended]]:
    found = {name: [run for given in runs if (run := Ended.of(given, milestone))] for name, runs in arms.items()}
    return {name: runs for name, runs in found.items() if runs}


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


def _at(lived: Lifetimes, step: int) -> float:
    past = lived.surviving[lived.times <= step]
    return float(past[-1]) if len(past) else 1.0


def _delay(runs: Sequence[Ended], control: Sequence[Ended]) -> Cell:
    """Median over the seeds of the delay against the control's run of the same seed, and its range."""
    bare = {run.seed: run.at for run in control}
    pairs = [(run.known - start, run.at is None) for run in runs if (start := bare.get(run.seed)) is not None]
    if not pairs:
        return Cell(EMPTY, None)
    ordered = sorted(pairs, key=lambda pair: (pair[1], pair[0]))  # what is only known to be longer comes last
    (low, _), (middle, open_middle), (high, open_high) = ordered[0], ordered[len(ordered) // 2], ordered[-1]
    text = f"{'> ' if open_middle else ''}{middle:+d} ({low:+d} to {'> ' if open_high else ''}{high:+d})"
    return Cell(text, middle, {"low": low, "high": high, "censored": sum(censored for _, censored in pairs)})


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
    ended = _ended({name: arms[name] for name in names if name in arms}, milestone)
    with mpl.rc_context(STYLE):
        drawn = Figure(figsize=(WIDTH, 3.4))
        axes = drawn.subplots()
        for colour, (name, runs) in zip(DISTINCT, ended.items(), strict=False):
            lived, end = survival(runs), max(run.stopped for run in runs)
            steps, shares = [0.0, *lived.times.tolist(), end], [1.0, *lived.surviving.tolist()]
            axes.step(steps, [*shares, shares[-1]], where="post", color=colour, label=name)
        axes.set(xlabel="optimizer step", ylabel=f"share of seeds without {milestone}", ylim=(-0.03, 1.03))
        legend_below(axes, columns=4)
    return drawn


def main(args: Sequence[str] | None = None) -> None:
    """Write tables and figure of the runs below a sweep's folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of the sweep's runs")
    parser.add_argument("--control", default="none", help="arm without intervention")
    parser.add_argument("--milestone", default="test_90", help="what counts as having generalised")
    parser.add_argument("--draw", nargs="+", default=None, help="arms in the figure (default: the first ten)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the tables and the figure")
    given = parser.parse_args(args)
    try:
        arms = arms_below(given.runs)
        made = tables(arms, given.control, given.milestone)
        written = write_tables(made, given.out)
        written += save(figure(arms, given.draw or list(arms), given.milestone), given.out, "interventions")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(made[0].markdown())
    for path in written:
        print(path)


if __name__ == "__main__":
    main()
