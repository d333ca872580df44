"""Tables over runs of the second task: each published table beside these runs, with nulls and excess."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from mini_gpt_pl.arithmetic.study.claims import claims_table
from mini_gpt_pl.arithmetic.study.clocks import discrimination
from mini_gpt_pl.arithmetic.study.defects import defect_at_grok, last_defects, projections
from mini_gpt_pl.arithmetic.study.groups import distinct, group_cells, groups_of, repeated_note, run_cells, setting_note
from mini_gpt_pl.arithmetic.study.onsets import onsets, rates, rules
from mini_gpt_pl.arithmetic.study.published import NOTES, PC1, PC1_NO_DECAY
from mini_gpt_pl.arithmetic.study.runs import (
    COLUMNS,
    DECAYING,
    NULLS,
    NULLS_NOTE,
    TEST,
    TRAIN,
    Phase,
    ResidueRun,
    common_windows,
    reached,
    residue_runs,
)
from mini_gpt_pl.arithmetic.study.seeds import seed_by_seed
from mini_gpt_pl.arithmetic.study.tables import short
from mini_gpt_pl.report.sheet import Cell, Row, Table, gap, number, tabulate, word
from mini_gpt_pl.runs.folder import Run

_SHARE, _COSINE, _STEP = "{:.1%}", "{:+.3f}", "{:,.0f}"
_MATRICES = ("Q", "K", "V", "O")


def comparison_tables(runs: Sequence[Run]) -> list[Table]:
    """Make every table that runs of the second task allow; none for runs of another task."""
    everything = residue_runs(runs)
    draws = distinct(everything)
    if not draws:
        return []
    tables = [
        claims_table(runs),
        overview(everything),
        seed_by_seed(draws),
        pc1(draws),
        fixed_windows(draws),
        persistence(draws),
        onsets(draws),
        rules(draws),
        rates(draws),
    ]
    tables += [discrimination(draws), defect_at_grok(draws), last_defects(draws), projections(draws)]
    return [table for table in tables if not table.frame.empty]


def overview(runs: Sequence[ResidueRun]) -> Table:
    """All runs: what they were, when they memorised and generalised, and what they ended at."""
    rows: list[Row] = []
    for run in runs:
        ends = {name: run.series(key) for name, key in (("training", TRAIN), ("test", TEST))}
        rows.append(
            {
                "run": word(run.label),
                **run_cells(run, runs),
                **{COLUMNS[name]: reached(run, name) for name in COLUMNS if name != "test_95"},
                "steps": number(run.last_step, _STEP),
                **{f"{name} accuracy at the end": number(s.iloc[-1], _SHARE) for name, s in ends.items()},
                "‖θ‖ at the end": number(run.last("eval/weight_norm"), "{:.1f}"),
            }
        )
    note = "t50, t90, t98: first evaluation with that test accuracy; stop: the third in a row with 98 %."
    return tabulate("grokking_runs", "The runs", rows, [note, repeated_note(runs)])


# ------------------------------------------------------------------------------------------------------- paths


def pc1(runs: Sequence[ResidueRun]) -> Table:
    """Centred PC1 of every matrix from the start to the stop, mean over seeds, beside the paper's and every null."""
    title = "Centred PC1 to the stop, by operation and matrix"
    return _pc1_table("grokking_pc1_published", title, runs, None, published=True)


def fixed_windows(runs: Sequence[ResidueRun]) -> Table:
    """The same over the same steps for all runs: the medians of the phases of those that generalise."""
    title = "Centred PC1 over the same steps for all runs"
    parts = [_pc1_table("", title, runs, window, published=False) for window in common_windows(runs)]
    return _joined("grokking_pc1_windows", title, parts)


def _joined(name: str, title: str, parts: Sequence[Table]) -> Table:
    notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
    return tabulate(name, title, [row for part in parts for row in part.rows], notes)


def _pc1_table(name: str, title: str, runs: Sequence[ResidueRun], window: Phase | None, *, published: bool) -> Table:
    rows: list[Row] = []
    for group in groups_of(runs):
        of_seed = [run.numbers(window or run.cut) for run in group]
        # A seed whose window is too short has no numbers; the others do.
        for label in dict.fromkeys(label for path in of_seed for label in path):
            of_matrix = [path[label]["pc1_centred"] for path in of_seed if label in path]
            values = {key: [one[key] for one in of_matrix] for key in ("measured", *NULLS)}
            head = {"window": word("each to its stop" if window is None else window.words)}
            cells: dict[str, Cell] = {**head, **group_cells(group, runs), "weights": word(short(label))}
            cells["snapshots"] = word(_snapshots(group, window))
            cells["measured"] = number(statistics.fmean(values["measured"]), _SHARE, _sd(values["measured"]))
            if published:
                cells["paper"] = number(_paper_pc1(group[0], short(label)), _SHARE)
            for null, column in NULLS.items():
                cells[column] = number(statistics.fmean(values[null]), _SHARE)
            for null in DECAYING:
                excess = [a - b for a, b in zip(values["measured"], values[null], strict=True)]
                cells[f"excess, {NULLS[null].split()[-1]}"] = _mean_gap(excess)
            rows.append(cells)
    said = f"Mean over the seeds ± their standard deviation. {NOTES['pc1']}" if published else _WINDOWS_NOTE
    notes = [said, NULLS_NOTE, setting_note(runs) if published else None]
    return tabulate(name, title, rows, notes)


def _snapshots(group: Sequence[ResidueRun], window: Phase | None) -> str:
    """How many of them a PC1 is of, over the seeds."""
    counts = [len(run.within(window or run.cut)) for run in group if run.numbers(window or run.cut)]
    return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


_WINDOWS_NOTE = (
    "Mean over the seeds ± their standard deviation. All runs are cut at the same steps, the medians over the runs "
    "that generalise, and only snapshots that all of them have count: a share depends on the length of a path and on "
    "the number of its snapshots before anything else. Windows of a few snapshots say "
    "little."
)


def _paper_pc1(run: ResidueRun, label: str) -> float:
    """Published value of a matrix such as `L0 Q`; NaN where there is none."""
    layer, _, matrix = label.partition(" ")
    if matrix not in _MATRICES or not run.repeats:
        return math.nan
    index = int(layer[1:])
    if not run.decay:
        return PC1_NO_DECAY.get(index, {}).get(run.operation, math.nan)
    shares = PC1.get(index, {}).get(run.operation)
    return math.nan if shares is None else shares[_MATRICES.index(matrix)]


def _sd(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


def _mean_gap(values: Sequence[float]) -> Cell:
    cell = gap(statistics.fmean(values), _SHARE)
    spread = _sd(values)
    return cell if math.isnan(spread) else Cell(f"{cell.text} ± {100 * spread:.1f}", cell.value, {"sd": spread})


def persistence(runs: Sequence[ResidueRun]) -> Table:
    """Correlations at lag 1 of the whole of the recorded weights, in the same windows for all runs, mean over seeds."""
    rows: list[Row] = []
    for window in common_windows(runs):
        for group in groups_of(runs):
            whole = [run for run in group if run.trunk in run.numbers(window)]
            if not whole:
                continue
            cells = {"window": word(window.words), **group_cells(group, runs)}
            increments = [run.numbers(window)[run.trunk]["autocorrelation"] for run in whole]
            cells["increments"] = number(statistics.fmean(one["measured"] for one in increments), _COSINE)
            for null in DECAYING:
                value = statistics.fmean(one[null] for one in increments)
                cells[f"increments: {NULLS[null]}"] = number(value, _COSINE)
            for column, side in (("innovations", False), ("tangential", True)):
                values = [run.correlation(window, run.trunk, tangential=side).value for run in whole]
                cells[column] = number(statistics.fmean(values), _COSINE, _sd(values))
            shuffled = [run.numbers(window)[run.trunk]["autocorrelation_tangential"]["permuted"] for run in whole]
            cells["tangential, permuted"] = number(statistics.fmean(shuffled), _COSINE)
            rows.append(cells)
    notes = [
        "Innovations are increments without decay: zero for every walk. They also correlate where training only pushes "
        "back against decay and nothing moves, so the tangential number, without the part along the weights, is the "
        "evidence of a motion; permuted: the same steps in other orders.",
        _WINDOWS_NOTE,
    ]
    return tabulate("grokking_persistence_runs", "Do successive steps agree?", rows, notes)
