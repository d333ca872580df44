"""Tables of paths: PC1 and its kin by phase and by run beside every null, and whether successive steps agree."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from mini_gpt_pl.arithmetic.nulls import DECAYING, walks
from mini_gpt_pl.arithmetic.study.moments import markers, moments
from mini_gpt_pl.arithmetic.study.runs import (
    COLUMNS,
    NULLS,
    TEST,
    TRAIN,
    Numbers,
    Phase,
    ResidueRun,
    common_windows,
    groups_of,
    lay_runs,
    median,
    repeated_note,
    run_values,
    step_of,
)
from mini_gpt_pl.arithmetic.study.words import Value, Values, lay, metrics_of, words
from mini_gpt_pl.geometry.path import centred, pca, resampled, windows
from mini_gpt_pl.report.settings import facts
from mini_gpt_pl.report.sheet import Cell, Table, gap, number
from mini_gpt_pl.runs.folder import TRAJECTORY, Run

_SHARE, _COUNT = "{:.1%}", "{:.0f}"
_DRAWS = 100
_COMPONENTS = {
    "pc1": ("raw PC1", _SHARE),
    "k90_centred": ("k90", _COUNT),
    "k95_centred": ("k95", _COUNT),
    "k99_centred": ("k99", _COUNT),
    "pc1_centred_off": ("PC1 without θ₀", _SHARE),
}
"""Words and form of the statistics that share a column."""


def short(label: str) -> str:
    """Name of a matrix as the studies have it, such as `L0 Q`; other weights keep theirs."""
    parts = label.split(".")
    if len(parts) == 4 and parts[0] == "blocks" and parts[3].startswith("w_"):
        return f"L{parts[1]} {parts[3][2:].upper()}"
    return label


# -------------------------------------------------------------------------------------------------- milestones


def milestones(run: ResidueRun) -> Table:
    """Steps at which the run got somewhere, with accuracies and ‖θ‖ there, and what it ended at."""
    table = "grokking_milestones"
    steps = {words("tables")[table]["rows"][name]: step for name, step in run.steps.items()}
    steps["end"] = int(run.series(TEST).index[-1])
    rows: list[Values] = [
        {"milestone": name, "step": step_of(step)}
        | ({} if step is None else {column: run.at(metric, step) for column, metric in metrics_of(table).items()})
        for name, step in steps.items()
    ]
    return lay(table, rows, never="" if run.groks else "It has not generalised: nothing says that it never would.")


def overview(runs: Sequence[ResidueRun]) -> Table:
    """All runs: what they were, when they memorised and generalised, and what they ended at."""
    rows: list[Values] = [
        {
            "run": run.label,
            **run_values(run, runs),
            **run.reached(*(name for name in COLUMNS if name != "test_95")),
            "steps": run.last_step,
            "training accuracy at the end": run.series(TRAIN).iloc[-1],
            "test accuracy at the end": run.series(TEST).iloc[-1],
            "‖θ‖ at the end": run.last("eval/weight_norm"),
        }
        for run in runs
    ]
    return lay("grokking_runs", rows, repeated=repeated_note(runs))


# ------------------------------------------------------------------------------------------------ PC1 and its kin


def _parts(run: ResidueRun) -> Iterator[tuple[Phase, str, Numbers, dict[str, Value]]]:
    """Every phase and group of a run with its numbers, and the columns that say which they are."""
    for phase in run.phases:
        for label, of in run.numbers(phase).items():
            yield phase, label, of, {"window": phase.words, "weights": short(label)}


def _beside_decay(table: str, of: Numbers) -> dict[str, Value]:
    """Columns of a table's statistics, each as measured and of the two nulls that decay."""
    return {
        f"{column}: {NULLS[null]}" if null else column: of[name][null or "measured"]
        for column, name in metrics_of(table).items()
        for null in ("", *DECAYING)
    }


def _against(seeds: Sequence[Mapping[str, float]], form: str, **beside: Value) -> dict[str, Value]:
    """Means of a statistic over seeds: as measured, what is put beside it, its nulls, and the excess over two."""
    measured = [one["measured"] for one in seeds]
    cells: dict[str, Value] = {"measured": number(statistics.fmean(measured), form, _sd(measured)), **beside}
    cells |= {column: number(statistics.fmean(one[null] for one in seeds), form) for null, column in NULLS.items()}
    for null in DECAYING:
        excess = [one["measured"] - one[null] for one in seeds]
        mean, sd = gap(statistics.fmean(excess), form), _sd(excess)
        if not math.isnan(sd):
            mean = Cell(f"{mean.text} ± {100 * sd:.1f}", mean.value, {"sd": sd})
        cells[f"excess, {NULLS[null].split()[-1]}"] = mean
    return cells


def _sd(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


def pc1(run: ResidueRun) -> Table:
    """Centred PC1 of every matrix to the stop and in each phase, beside every null."""
    rows = [
        head | {"snapshots": float(len(run.within(phase)))} | _against([of["pc1_centred"]], _SHARE)
        for phase, _, of, head in _parts(run)
    ]
    return lay("grokking_pc1", rows)


def pc1_to_the_stop(runs: Sequence[ResidueRun]) -> Table:
    """Centred PC1 of every matrix from the start to the stop, mean over seeds, beside the paper's and every null."""
    return lay_runs("grokking_pc1_published", _pc1_rows(runs, None), runs)


def pc1_in_windows(runs: Sequence[ResidueRun]) -> Table:
    """The same over the same steps for all runs: the medians of the phases of those that generalise."""
    return lay("grokking_pc1_windows", (row for window in common_windows(runs) for row in _pc1_rows(runs, window)))


def _pc1_rows(runs: Sequence[ResidueRun], window: Phase | None) -> Iterator[Values]:
    for group in groups_of(runs):
        # A seed whose window is too short has no numbers; the others do.
        of_seeds = [path for run in group if (path := run.numbers(window or run.cut))]
        counts = [len(run.within(window or run.cut)) for run in group if run.numbers(window or run.cut)]
        for label in dict.fromkeys(label for path in of_seeds for label in path):
            paper = group[0].published("pc1", {})
            matrix = short(label)
            beside = {} if window else {"paper": number(paper.get(matrix, paper.get(matrix[:2])), _SHARE)}
            yield {
                "window": "each to its stop" if window is None else window.words,
                **run_values(group[0], runs, len(group)),
                "weights": matrix,
                "snapshots": f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}",
                **_against([path[label]["pc1_centred"] for path in of_seeds if label in path], _SHARE, **beside),
            }


def quantiles(run: ResidueRun) -> Table:
    """Where the numbers of the path to the stop lie among draws of each null in as many dimensions as the weights."""
    rows: list[Values] = []
    for label in run.numbers(run.cut):
        placed = resampled.place(*run.part(run.cut, label), _DRAWS)
        for name, (column, form) in {"pc1_centred": ("centred PC1", _SHARE), **_COMPONENTS}.items():
            row: dict[str, Value] = {"weights": short(label), "number": column}
            row["measured"] = number(placed[name].value, form)
            for null, of in NULLS.items():
                band = placed[name].bands[null]
                ends = f"{form.format(band.low)} to {form.format(band.high)}"
                row[of] = None if math.isnan(band.low) else Cell(ends, None, {"low": band.low, "high": band.high})
                row[f"above, {of}"] = number(band.below, "{:.2f}")
            rows.append(row)
    return lay("grokking_quantiles", rows, draws=_DRAWS)


def components(run: ResidueRun) -> Table:
    """Uncentred PC1, numbers of components, and PC1 with the axis θ₀ projected out, to the stop and by phase."""
    rows = [
        head | {"number": column} | _against([of[name]], form)
        for _, _, of, head in _parts(run)
        for name, (column, form) in _COMPONENTS.items()
    ]
    return lay("grokking_components", rows)


def initial_weights(run: ResidueRun) -> Table:
    """How much of the path is the weights that it starts from, to the stop and by phase, beside decay alone."""
    rows: list[Values] = []
    for phase, label, of, head in _parts(run):
        gram, survival, _ = run.part(phase, label)
        nulls = walks(gram, survival)
        start, *_, end = pca.weights(len(gram))
        paths = {"": gram} | {f": {NULLS[null]}": nulls[null] for null in DECAYING}
        lengths = {f"‖θ‖{null}": float(pca.norms(one, end[None])[0]) for null, one in paths.items()}
        decayed = float(pca.norms(gram, start[None])[0]) * survival[-1]
        row = head | {"‖θ‖": lengths.pop("‖θ‖"), "‖θ‖: decay alone": decayed} | lengths
        row |= {f"cos(θ, θ₀){null}": pca.cosine(one, start, end) for null, one in paths.items()}
        rows.append(row | _beside_decay("grokking_theta0", of))
    return lay("grokking_theta0", rows)


# -------------------------------------------------------------------------------------------------- persistence


def persistence(run: ResidueRun) -> Table:
    """Correlation of increments and of innovations at lag 1, with the tangential part beside it."""
    rows = [head | _correlations([run], phase, label, errors=True) for phase, label, _, head in _parts(run)]
    return lay("grokking_persistence", rows)


def persistence_of_runs(runs: Sequence[ResidueRun]) -> Table:
    """The same of the whole of the recorded weights, in the same windows for all runs, mean over seeds."""
    rows: list[Values] = []
    for window in common_windows(runs):
        for group in groups_of(runs):
            if whole := [run for run in group if run.trunk in run.numbers(window)]:
                head = {"window": window.words, **run_values(group[0], runs, len(group))}
                rows.append(head | _correlations(whole, window, whole[0].trunk, errors=False))
    return lay("grokking_persistence_runs", rows)


def _correlations(runs: Sequence[ResidueRun], phase: Phase, label: str, *, errors: bool) -> dict[str, Value]:
    """Mean correlations over runs with their standard deviation, or those of a single one with their errors."""
    of = [run.numbers(phase)[label] for run in runs]

    def mean(name: str, null: str) -> float:
        return statistics.fmean(one[name][null] for one in of)

    cells: dict[str, Value] = {"increments": mean("autocorrelation", "measured")}
    cells |= {f"increments: {NULLS[null]}": mean("autocorrelation", null) for null in DECAYING}
    for column, side in (("innovations", False), ("tangential", True)):
        parts = [run.correlation(phase, label, tangential=side) for run in runs]
        values = [one.value for one in parts]
        beside = (parts[0].error, "error") if errors else (_sd(values), "sd")
        cells[column] = number(statistics.fmean(values), "{:+.3f}", *beside)
    if errors:
        cells["chance"] = runs[0].correlation(phase, label, tangential=False).chance
    return cells | {"tangential, permuted": mean("autocorrelation_tangential", "permuted")}


# ----------------------------------------------------------------------------------------------- shape of a path


def rank_tables(run: Run) -> list[Table]:
    """Numbers of directions of every matrix's path, and where a growing window's PC1 turns; none without a path."""
    return [_ranks(run), _turnover(run)] if (run.path / TRAJECTORY).is_file() else []


def _ranks(run: Run) -> Table:
    path = ResidueRun.of(run).numbers(Phase("whole run", 0, run.trajectory.steps[-1]))
    rows = [{"weights": short(label), **_beside_decay("grokking_ranks", numbers)} for label, numbers in path.items()]
    layout = words("tables")["grokking_ranks"]
    repeats = markers(run) and facts(run)["model"] == layout["model"]
    return lay("grokking_ranks", rows, printed=layout["printed"] if repeats else None)


def _turnover(run: Run) -> Table:
    trajectory = run.trajectory
    grams = torch.cat([trajectory.grams, trajectory.gram()[None]])
    ends = windows.growing_ends(len(trajectory))
    rows: list[dict[str, Value]] = [{"weights": short(label)} for label in (*trajectory.groups, run.trunk)]
    if len(trajectory) < 7:
        rows = []  # there is no curve to turn
    for name, paths in {"measured": grams, **walks(grams, trajectory.survival)}.items() if rows else ():
        for row, curve in zip(rows, centred.growing_pc1(paths, ends), strict=True):
            turn = None if bool(curve.isnan().any()) else centred.turnover(curve)
            row[NULLS.get(name, name)] = "none" if turn is None else trajectory.steps[ends[turn] - 1]
    reached = [f"{name} at step {step:,}" for name, step in moments(run).items() if step is not None]
    return lay("grokking_turnover", rows, reached=f"{'; '.join(reached)}." if reached else None)


# -------------------------------------------------------------------------------------------------- run by run

NEAR, FAR = 0.06, 3.0
"""A PC1 this close to its null is near it; a c that falls by more than this factor has fallen."""
_BEHIND = 300  # steps behind t90


class Excess(NamedTuple):
    """Centred PC1 to the stop less that of the innovation walk: of all weights, and of the group furthest from it."""

    whole: float
    furthest: float
    group: str


class Fall(NamedTuple):
    """What c does at t90.

    The median of the last three records before, the least record from there to 300 steps later, and the record there
    over that 300 steps later (NaN where either was not taken).
    """

    level: float
    floor: float
    single: float

    @property
    def factor(self) -> float:
        """Level over floor."""
        return _ratio(self.level, self.floor)


def excess_at_stop(run: ResidueRun) -> Excess | None:
    """Find how far PC1 lies from its null; None without a stop or with too short a path."""
    numbers = run.numbers(run.cut) if run.steps["test_98_thrice"] is not None else {}
    over = {
        label: of["pc1_centred"]["measured"] - of["pc1_centred"]["innovation_walk"] for label, of in numbers.items()
    }
    whole = over.pop(run.trunk, math.nan)
    if not over:
        return None
    group = max(over, key=lambda label: abs(over[label]))
    return Excess(whole, over[group], group)


def fall_of_c(run: ResidueRun) -> Fall | None:
    """Find how far c falls; None without t90 or with fewer than three records before it or none behind it."""
    c, t90 = run.commutator("c").dropna(), run.steps["test_90"]
    if t90 is None:
        return None
    before, behind = c[c.index < t90].iloc[-3:], c[(c.index >= t90) & (c.index <= t90 + _BEHIND)]
    if len(before) < 3 or behind.empty:
        return None
    single = _ratio(*(float(c.get(step, math.nan)) for step in (t90, t90 + _BEHIND)))
    return Fall(median(before), float(behind.min()), single)


def _ratio(before: float, behind: float) -> float:
    """How many times smaller: without a limit where nothing is left, and NaN where there was nothing before either."""
    if behind == 0:
        return math.inf if before > 0 else math.nan
    return before / behind


def seed_by_seed(runs: Sequence[ResidueRun]) -> Table:
    """Each run that generalises: PC1 over its null at the stop, and c before and behind t90."""
    rows: list[Values] = []
    judged = [(run, excess_at_stop(run), fall_of_c(run)) for run in runs]
    for run, excess, fall in judged:
        if excess is None and fall is None:
            continue
        row = {**run_values(run, runs), **run.reached("test_90", "test_98_thrice")}
        if excess is not None:
            row["all, over ‖e‖"] = gap(excess.whole, _SHARE)
            text = f"{short(excess.group)} {gap(excess.furthest, _SHARE).text}"
            row["furthest matrix, over ‖e‖"] = Cell(text, excess.furthest)
        if fall is not None:
            row |= {"c before t90": fall.level, "least c behind it": fall.floor}
            row |= {"falls by": fall.factor, "as single records": fall.single}
        rows.append(row)
    near, falls = [e for _, e, _ in judged if e is not None], [fall for _, _, fall in judged if fall is not None]
    said = words("tables")["grokking_seeds"]
    noted = {"null": said["null"] if rows else "", "near": "", "fallen": ""}
    if near:
        holds = (_share(abs(e.whole) < NEAR for e in near), _share(abs(e.furthest) < NEAR for e in near))
        noted["near"] = said["near"].format(100 * NEAR, *holds)
    if falls:
        holds = (_share(fall.factor > FAR for fall in falls), _share(fall.single > FAR for fall in falls))
        noted["fallen"] = said["fallen"].format(FAR, _BEHIND, *holds)
    return lay_runs("grokking_seeds", rows, runs, **noted)


def _share(holds: Iterator[bool]) -> str:
    listed = list(holds)
    return f"{sum(listed)} of {len(listed)} runs"
