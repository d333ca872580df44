"""Arms of an intervention over seeds: when runs generalised, those that did not by their cap being censored.

mini_gpt_pl interventions runs/interventions/arms --out runs/interventions/tables
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from mini_gpt_pl.arithmetic.statistics.lifetimes import Lifetimes, kaplan_meier
from mini_gpt_pl.arithmetic.study.words import Values, claim, lay, words
from mini_gpt_pl.command_line import CommandParser
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.figures.plotting import DISTINCT, STYLE, WIDTH, legend_below, save
from mini_gpt_pl.report import claims as core
from mini_gpt_pl.report.claims import Claim
from mini_gpt_pl.report.sheet import Cell, Table, number, write_tables
from mini_gpt_pl.runs.folder import Run, runs_below

# A sweep names its folders by the values that it varies.
_SEED = re.compile(r"_?seed_everything-\d+$")
_OPERATION = re.compile(r"^operation-[^_]+_")
# Below this training accuracy a run no longer knows what it was trained on, whatever it does on the test set.
_FORGOTTEN = 0.5
# An arm is later than another if it is in more than this share of the seeds, by more than one evaluation.
_MOST = 0.75
_EVALUATION = 50


@dataclass(frozen=True)
class Ended:
    """What became of one run.

    Args:
        seed: Its `seed_everything`.
        at: Step at which it generalised, None if it had not when it was stopped.
        stopped: Its last step.
        train: Lowest train accuracy from when it had memorised on; its last if it never had.
        norm: ||theta|| at the end.
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
        lowest = float(accuracy.iloc[-1] if memorised is None else accuracy.loc[memorised:].min())
        columns = [run.metrics.filter(regex=rf"^intervention/[^/]+/{name}$") for name in ("parallel", "parallel_null")]
        means = [float(part.mean().mean()) if part.size else math.nan for part in columns]
        seed = int(run.config["seed_everything"])
        return cls(seed, outcome.milestones[milestone], outcome.step, lowest, run.last("eval/weight_norm"), *means)

    @property
    def until(self) -> int:
        """Step that it generalised at, or was stopped at without."""
        return self.stopped if self.at is None else self.at


def arms_below(folder: Path, operation: str | None = None) -> dict[str, list[Run]]:
    """Group the runs in a sweep's folder by arm, in the order of the names: the folder's name without the seed.

    Names are those of the configuration files, in which a sweep writes hyphens for underscores. With an operation only
    its runs count, and names leave it out.

    Raises:
        UserError: There are no runs, or none of the operation.
    """
    arms: dict[str, list[Run]] = {}
    for run in map(Run, runs_below(folder)):
        if operation is None or run.config.get("data", {}).get("operation") == operation:
            name = run.path.name if operation is None else _OPERATION.sub("", run.path.name)
            arms.setdefault(_SEED.sub("", name).replace("-", "_") or "baseline", []).append(run)
    if not arms:
        raise UserError(f"{folder} holds no run of the operation {operation!r}: give one that its sweep varies")
    return arms


def survival(runs: Sequence[Ended]) -> Lifetimes:
    """Share of runs that have not generalised yet, after each step at which one did or was stopped."""
    return kaplan_meier([run.at for run in runs], [run.stopped for run in runs])


def ended(arms: Mapping[str, Sequence[Run]], milestone: str) -> dict[str, list[Ended]]:
    """Read the runs of each arm that have ended; an arm without one is left out.

    Raises:
        UserError: A run did not watch for the milestone.
    """
    finished = {name: [run for one in runs if (run := Ended.of(one, milestone))] for name, runs in arms.items()}
    return {name: runs for name, runs in finished.items() if runs}


@dataclass(frozen=True)
class Delays:
    """How much later runs generalised than runs of the same seeds in another arm, in steps, shortest first.

    There is one for each seed that both arms have, to its stop where a run had not generalised. Such a delay is only
    known to be longer: censored.
    """

    steps: tuple[int, ...]
    censored: tuple[bool, ...]

    @classmethod
    def between(cls, runs: Sequence[Ended], others: Sequence[Ended]) -> Delays:
        """Compare by seed; a seed whose other run did not generalise is left out."""
        bare = {run.seed: run.at for run in others}
        pairs = [(run.until - start, run.at is None) for run in runs if (start := bare.get(run.seed)) is not None]
        ordered = sorted(pairs, key=lambda pair: (pair[1], pair[0]))  # what is only known to be longer comes last
        return cls(tuple(steps for steps, _ in ordered), tuple(censored for _, censored in ordered))

    @property
    def middle(self) -> int:
        """Index of the median; of an even number the upper one."""
        return len(self.steps) // 2

    def longer(self, than: int) -> int:
        """In how many seeds the delay is above a number of steps."""
        return sum(steps > than for steps in self.steps)

    def __str__(self) -> str:
        """Median and range, > before what is only known to be longer."""
        if not self.steps:
            return "-"
        middle, low, high = (
            f"{'> ' if self.censored[index] else ''}{self.steps[index]:+d}" for index in (self.middle, 0, -1)
        )
        return f"{middle} ({low} to {high})"


# ------------------------------------------------------------------------------------------------------- tables


def tables(arms: Mapping[str, Sequence[Run]], control: str = "none", milestone: str = "test_90") -> list[Table]:
    """Tables of what was claimed, of all arms, of every run, and of the arms' survival curves.

    Runs that have not ended are left out; `control` is the arm without intervention, and the milestone what counts as
    having generalised.

    Raises:
        UserError: No run of the control has ended, or a run did not watch for the milestone.
    """
    finished = ended(arms, milestone)
    if control not in finished:
        raise UserError(f"no run of the arm {control!r} has ended: name the arm without intervention with --control")
    waiting = sum(map(len, arms.values())) - sum(map(len, finished.values()))
    left_out = f"{waiting} runs that have not ended are left out." if waiting else None
    rows = [_row(name, runs, finished[control]) for name, runs in finished.items()]
    lived = {name: survival(runs) for name, runs in finished.items()}
    curves: list[Values] = [
        dict(zip(("arm", "step", "at risk", "not yet", "low", "high"), (name, *values), strict=True))
        for name, one in lived.items()
        for values in zip(
            *map(np.ndarray.tolist, (one.times, one.at_risk, one.surviving, one.low, one.high)), strict=True
        )
    ]
    every: list[Values] = [
        {
            "arm": name,
            "seed": run.seed,
            "generalised": "not by the end" if run.at is None else run.at,
            "stopped": run.stopped,
            "train accuracy, lowest": run.train,
            "||theta|| at the end": run.norm,
        }
        for name, runs in finished.items()
        for run in sorted(runs, key=lambda run: run.seed)
    ]
    return [
        claims_table(finished, control),
        lay("interventions", rows, milestone=milestone, waiting=left_out),
        lay("interventions_runs", every),
        lay("interventions_survival", curves, milestone=milestone),
    ]


def _row(name: str, runs: Sequence[Ended], control: Sequence[Ended]) -> Values:
    lived, delays = survival(runs), Delays.between(runs, control)
    everyone = max(run.until for run in control)
    past = lived.surviving[lived.times <= everyone]
    delay = None
    if delays.steps:
        ends = {"low": delays.steps[0], "high": delays.steps[-1], "censored": sum(delays.censored)}
        delay = Cell(str(delays), delays.steps[delays.middle], ends)
    return {
        "arm": name,
        "runs": len(runs),
        "generalised": sum(run.at is not None for run in runs),
        "median step": f"> {max(run.stopped for run in runs)}" if lived.median is None else lived.median,
        f"not yet at {everyone}": number(float(past[-1]) if len(past) else 1.0, "{:.0%}"),
        "delay": delay,
        "train accuracy, lowest": statistics.median(run.train for run in runs),
        "||theta|| at the end": statistics.median(run.norm for run in runs),
        "|P x| / |x|": statistics.fmean(run.parallel for run in runs),
        "random in the same blocks": statistics.fmean(run.null for run in runs),
    }


def figure(arms: Mapping[str, Sequence[Run]], names: Sequence[str], milestone: str = "test_90") -> Figure:
    """Draw survival curves of the arms of some names, at most as many as there are colours; see `tables`."""
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


# ------------------------------------------------------------------------------------------------------- claims

Reading = tuple[str, Mapping[str, Sequence[str]]]
"""Which of a claim's readings the arms call for, and the arms that it names, or what `more` holds."""
_KICKS = ("kick", "sustained_050", "sustained_100", "sustained_200", "sustained_500")


class _Bench:
    """Arms, and how to say what became of them."""

    def __init__(self, arms: Mapping[str, Sequence[Ended]], control: str) -> None:
        self.arms, self.control = arms, control

    def has(self, *names: str) -> bool:
        return all(name in self.arms for name in (self.control, *names))

    def later(self, name: str, than: str = "") -> bool:
        """Whether an arm generalises later than another, or than the control; or not at all where the other does."""
        delays = Delays.between(self.arms[name], self.arms[than or self.control])
        return delays.longer(_EVALUATION) > _MOST * len(delays.steps) if delays.steps else False

    def reached(self, name: str) -> int:
        return sum(run.at is not None for run in self.arms[name])

    def fails(self, name: str) -> bool:
        """Whether some run of an arm did not generalise."""
        return self.reached(name) < len(self.arms[name])

    def accuracy(self, name: str) -> float:
        """Median over seeds of the lowest training accuracy since memorisation."""
        return statistics.median(run.train for run in self.arms[name])

    def forgets(self, name: str) -> bool:
        return self.accuracy(name) < _FORGOTTEN

    def delay(self, name: str) -> str:
        return str(Delays.between(self.arms[name], self.arms[self.control]))

    def fate(self, name: str) -> str:
        """How many runs of an arm generalised, and what they still knew of the training set."""
        said = f"{self.reached(name)} of {len(self.arms[name])} generalise, training accuracy falls to"
        return f"{name}: {said} {self.accuracy(name):.0%}"


class _Said(dict[str, str]):
    """What is said of arms, by their names with a space between; arms that were not run are left out."""

    def __init__(self, arms: Container[str], say: Callable[[str], str]) -> None:
        self._arms, self._say = arms, say

    def __missing__(self, names: str) -> str:
        return "; ".join(self._say(name) for name in names.split() if name in self._arms)


def claims_table(arms: Mapping[str, Sequence[Ended]], control: str = "none") -> Table:
    """Put every claim of the study of grokking that the arms allow beside what they give.

    A claim is left out where an arm that it takes has not been run. Arms are those of
    `configs/grokking/interventions`; `control` is the one without intervention.
    """
    said, bench = words("claims"), _Bench(arms, control)
    alone = [kick for kick in _KICKS if not bench.has(kick, f"{kick}_random")]
    shown = set(arms) - {name for kick in alone for name in (kick, f"{kick}_random")}
    of_arms = {
        "delay": _Said(shown, bench.delay),
        "delays": _Said(shown, lambda name: f"{name} {bench.delay(name)}"),
        "fates": _Said(shown, bench.fate),
    }
    claims: list[Claim] = []
    for name, read in _READINGS.items():
        if bench.has(*said[name]["takes"]) and (reading := read(bench)) is not None:
            named = {key: ", ".join(names) for key, names in reading[1].items()}
            claims.append(claim(name, reading[0], **of_arms, **named))
    text = said["interventions"]
    notes = [text["note"].format(_EVALUATION, _MOST, _FORGOTTEN)]
    columns = ("the study says", "here", "beside", "reading")
    return core.claims_table("intervention_claims", text["title"], claims, notes, columns)


def _dose(bench: _Bench) -> Reading:
    """A gradient whose orthogonal part is suppressed is, to Adam, one whose parallel part is amplified."""
    if not bench.later("pca_s075"):
        return "no", {}
    if not bench.later("amplify_s075"):
        return "yes", {}
    return "partly" if bench.later("pca_s075", "amplify_s075") else "amplification", {}


def _specific(bench: _Bench) -> Reading:
    matched = ("blocks_s075", "rank_one_s075", "theta0_s075", "other_s075")
    beaten = [name for name in matched if bench.later("pca_s075", name)]
    equal = [name for name in matched if name not in beaten]
    reading = "none" if not bench.later("pca_s075") else "yes" if not equal else "some" if beaten else "no"
    return reading, {"beaten": beaten, "equal": equal}


def _confined(bench: _Bench) -> Reading:
    """At s = 1 all weights outside the span have no gradient, and decay goes on."""
    erased = "erased" if bench.forgets("decay_off_s100") else "decay"
    reading = "no" if bench.reached("pca_s100") else erased if bench.forgets("pca_s100") else "yes"
    more = bench.has("inside_s100") and not bench.fails("inside_s100")
    return reading, {"more": [words("claims")["confined"]["more"]] if more else []}


def _along(bench: _Bench) -> Reading:
    arms = ("remove", "update_remove")
    failing, late = [name for name in arms if bench.fails(name)], [name for name in arms if bench.later(name)]
    earlier = [name for name in arms if bench.later(bench.control, name)]
    if any(bench.forgets(name) for name in failing):
        reading = "erased"
    elif failing:
        reading = "blocks" if bench.fails("blocks_remove") else "stands"
    else:
        reading = "late" if late else "early" if earlier else "alike"
    return reading, {"failing": failing, "late": late, "earlier": earlier}


def _kicks(bench: _Bench) -> Reading | None:
    pairs = [pair for name in _KICKS if bench.has(*(pair := (name, f"{name}_random")))]
    differ = [one for one, random in pairs if bench.later(one, random) or bench.later(random, one)]
    return ("no" if differ else "yes", {"differ": differ}) if pairs else None


def _update(bench: _Bench) -> Reading:
    rate = "more" if bench.later("update_s075", "update_scale_s075") else "rate"
    arm = "update_s100_decay_span"
    more = bench.has(arm) and not bench.reached(arm) and not bench.forgets(arm)
    reading = rate if bench.later("update_s075") else "none"
    return reading, {"more": [words("claims")["update"]["more"]] if more else []}


_READINGS: Mapping[str, Callable[[_Bench], Reading | None]] = {
    "dose": _dose,
    "subspace": _specific,
    "confined": _confined,
    "along": _along,
    "kicks": _kicks,
    "update": _update,
}


# ------------------------------------------------------------------------------------------------------ command


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
    shown = [table for table in tables(arms, options.control, options.milestone) if table.rows]
    written = write_tables(shown, options.out)
    written += save(figure(arms, options.draw or list(arms), options.milestone), options.out, "interventions")
    for table in shown[:2]:
        print(table.markdown())
    for path in written:
        print(path)
