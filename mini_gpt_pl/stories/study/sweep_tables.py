"""Runs that differ in beta2, or in their seed only: trends and intervals, of the numbers and of their excess."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import pandas as pd

from mini_gpt_pl.geometry.path import growth
from mini_gpt_pl.geometry.path.nulls import Calibrated
from mini_gpt_pl.report.calibration import QUANTITIES
from mini_gpt_pl.report.measures import RecordedPath, against_nulls, update_statistics, window
from mini_gpt_pl.report.settings import diverged, facts
from mini_gpt_pl.report.sheet import NULLS, Cell, Row, Table, beside_nulls, gap, number, tabulate, word
from mini_gpt_pl.stories.study.beside import beta2_of, notes_of_runs
from mini_gpt_pl.stories.study.gradient_tables import dig, estimate, replayed
from mini_gpt_pl.stories.study.learning_tables import LOSS
from mini_gpt_pl.stories.study.optimizer_tables import common_window, identity, outcome, window_note
from mini_gpt_pl.stories.switches import P_OOD

_COLUMN = "paper (51 M, 4,000 steps)"
# Key, words, form, key of the published value.
_GEOMETRY: tuple[tuple[str, str, str, str], ...] = (
    ("pc1", "PC1, raw", "{:.1%}", "pc1"),
    ("pc1_unit", "PC1, unit rows", "{:.1%}", "pc1_unit"),
    ("k95_unit", "k95, unit rows", "{:.0f}", ""),
    ("drift", "drift ||x(T)||", "{:.1f}", "drift"),
    ("cos_theta0", "cos(v_b, theta_0)", "{:+.3f}", ""),
    ("window_pc1", "PC1 in the window", "{:.1%}", "window_pc1"),
    ("window_k95", "k95 in the window", "{:.0f}", "window_k95"),
    ("window_drift", "drift over the window", "{:.1f}", "window_drift"),
    ("mean", "update alignment, whole-run v_b, mean |cos|", "{:.3f}", "cos"),
    ("mean_past", "update alignment, past-only v_b, mean cos", "{:+.3f}", ""),
    ("a_first", "exponent of |a|, first half", "{:+.2f}", "exponent_a_0_2000"),
    ("r_first", "exponent of ||r||, first half", "{:+.2f}", "exponent_r_0_2000"),
    ("a_second", "exponent of |a|, second half", "{:+.2f}", "exponent_a_2000_4000"),
    ("r_second", "exponent of ||r||, second half", "{:+.2f}", "exponent_r_2000_4000"),
)


_MISSING = Calibrated(math.nan, math.nan, math.nan)


# ------------------------------------------------------------------------------------------------------- beta2


def beta2(paths: Sequence[RecordedPath]) -> list[Table]:
    """Outcome and geometry of runs that differ in beta2, and whether anything follows it."""
    paths = sorted(paths, key=lambda path: -float(facts(path.run)["beta2"]))
    chosen = common_window(paths)
    found = {index: geometry(path, chosen) for index, path in enumerate(paths)}
    tables = [_beta2_outcome(paths), _beta2_geometry(paths, found, chosen), _beta2_trend(paths, found)]
    return [table for table in tables if table is not None]


def geometry(path: RecordedPath, chosen: tuple[int, int] | None) -> dict[str, Calibrated]:
    """Numbers of `_GEOMETRY`, each beside its nulls; what a run's data do not allow is left out."""
    numbers = dict(path.calibrated(None) or {})
    if not numbers:
        return {}
    inside = window(path.trajectory, *chosen) if chosen else None
    if inside is not None:
        numbers |= {f"window_{name}": value for name, value in inside.numbers.items()}
    thinned = path.thinned()
    if len(thinned) > 3:
        numbers |= against_nulls(
            thinned.gram(), thinned.survival, lambda gram: update_statistics(gram, thinned.steps, path.length)
        )
    half = path.length // 2
    halves = {"first": (0, half), "second": (half, path.length)}
    fits = against_nulls(
        path.trajectory.gram(),
        path.trajectory.survival,
        lambda gram: growth.summary(gram, path.trajectory.steps, path.run.border, tuple(halves.values())),
    )
    for name, (lo, hi) in halves.items():
        for part in ("a", "r"):
            if hi <= path.last and (fit := fits.get(f"exponent_{part}_{lo}_{hi}")) is not None:
                numbers[f"{part}_{name}"] = fit
    return {name: numbers[name] for name, *_ in _GEOMETRY if name in numbers}


def _beta2_cell(path: RecordedPath) -> dict[str, Cell]:
    value = facts(path.run)["beta2"]
    cells = {name: cell for name, cell in identity(path).items() if name != "optimizer"}
    return {"beta2": Cell(f"{value:g}", float(value)), **cells}


def _beta2_outcome(paths: Sequence[RecordedPath]) -> Table:
    rows, settings = [], {path.label: beta2_of(path.run) for path in paths}
    for path in paths:
        setting, (mean, spread) = settings[path.label], _interference(path)
        cells = _beta2_cell(path) | outcome(path) | {"interference": number(mean, "{:+.3f}", spread)}
        for column, key, form in (
            ("final loss", "loss_last", "{:.2f}"),
            ("best p_ood", "p_ood_best", "{:.3f}"),
            ("interference", "interference", "{:.3f}"),
        ):
            if setting is not None:
                cells |= {f"{column}, {_COLUMN}": next(iter(setting.cell(key, form).values()))}
        rows.append(cells)
    notes = [
        "Interference: mean cos of LM and probe gradients over the measured steps, ± standard deviation.",
        *notes_of_runs(settings, ("loss_last",)),
    ]
    return tabulate("beta2_outcome", "What beta2 does: loss and probe", rows, notes)


def _interference(path: RecordedPath) -> tuple[float, float]:
    """Mean and standard deviation over replayed checkpoints, or over the steps measured live."""
    found = [estimate(dig(at, "interference", path.trunk))[0] for at in replayed(path.run).values()]
    values = pd.Series([value for value in found if not math.isnan(value)], dtype=float)
    if values.empty:
        values = path.run.series(f"alignment/{path.trunk}/lm_vs_probe")
    return float(values.mean()), float(values.std())


def _beta2_geometry(
    paths: Sequence[RecordedPath], found: Mapping[int, Mapping[str, Calibrated]], chosen: tuple[int, int] | None
) -> Table | None:
    rows: list[Row] = []
    settings = {path.label: beta2_of(path.run) for path in paths}
    for name, words, form, key in _GEOMETRY:
        for index, path in enumerate(paths):
            setting = settings[path.label]
            published = {} if setting is None else {_COLUMN: next(iter(setting.cell(key, form).values()))}
            row = {"quantity": word(words), **_beta2_cell(path), "rows": number(len(path.trajectory) - 1.0, "{:.0f}")}
            rows.append({**row, **beside_nulls(found[index].get(name, _MISSING), form), **published})
    notes = [
        NULLS,
        "Rows: snapshots after the start; PC1 and k95 depend on their number, for the nulls as for the run.",
        f"Window: unit drifts from step {chosen[0]:,} to {chosen[1]:,}." if chosen else None,
        window_note(paths, chosen),
        *notes_of_runs(settings, [key for *_, key in _GEOMETRY]),
    ]
    return tabulate("beta2_geometry", "What beta2 does: geometry beside its nulls", rows, notes) if rows else None


def _beta2_trend(paths: Sequence[RecordedPath], found: Mapping[int, Mapping[str, Calibrated]]) -> Table | None:
    kept = [index for index, path in enumerate(paths) if not diverged(path.run)]
    rows: list[Row] = []
    for name, words, _, _ in _GEOMETRY:
        known = [index for index in kept if name in found[index]]
        frame = pd.DataFrame(
            {
                "beta2": [float(facts(paths[index].run)["beta2"]) for index in known],
                "measured": [found[index][name].value for index in known],
                "excess": [found[index][name].excess for index in known],
            }
        )
        means = frame.dropna().groupby("beta2").mean()
        if len(means) < 3:
            continue
        cells = {"quantity": word(words), "values of beta2": number(float(len(means)), "{:.0f}")}
        for column in ("measured", "excess"):
            cells[f"Spearman, {column}"] = number(spearman(means.index.to_list(), means[column].to_list()), "{:+.2f}")
            cells[f"{column} as beta2 rises"] = word(direction(means[column].to_list()))
        rows.append(cells)
    if not rows:
        return None
    count = len({facts(paths[index].run)["beta2"] for index in kept})
    left_out = [path.label for path in paths if diverged(path.run)]
    notes = [
        f"Rank correlation with beta2 over {count} values, means over the runs of one value; of {count} values even a "
        f"perfect order has p = {2 / math.factorial(count):.2g}, two-sided.",
        f"Without what diverged: {', '.join(left_out)}." if left_out else None,
    ]
    return tabulate("beta2_trend", "What beta2 does: does anything follow it?", rows, notes)


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation, ties sharing their mean rank; NaN where one series is constant."""
    ranks = [pd.Series(values, dtype=float).rank() for values in (x, y)]
    return math.nan if any(rank.nunique() < 2 for rank in ranks) else float(ranks[0].corr(ranks[1]))


def direction(values: Sequence[float]) -> str:
    """Say whether values rise or fall throughout."""
    steps = [later - earlier for earlier, later in itertools.pairwise(values)]
    return "rises" if all(step > 0 for step in steps) else "falls" if all(step < 0 for step in steps) else "neither"


# ------------------------------------------------------------------------------------------------------- seeds


def seeds(paths: Sequence[RecordedPath], name: str = "seeds") -> list[Table]:
    """Mean over seeds and its t interval, of every statistic and of its excess over the decaying walk."""
    rows: list[Row] = []
    for metric, words, pick in ((LOSS, "validation loss at the end", -1), (P_OOD, "p_ood, highest", None)):
        series = [path.run.series(metric) for path in paths]
        values = [float(s.max() if pick is None else s.iloc[pick]) for s in series if len(s)]
        if len(values) > 1:
            rows.append({"quantity": word(words), **_mean_cells(values, "{:.3f}")})
    calibrated = [found for path in paths if (found := path.calibrated(None)) is not None]
    for key, (words, form) in QUANTITIES.items():
        numbers = [found[key] for found in calibrated if key in found]
        values = [value.value for value in numbers if not math.isnan(value.value)]
        excesses = [value.excess for value in numbers if not math.isnan(value.excess)]
        if len(values) > 1:
            rows.append({"quantity": word(words), **_mean_cells(values, form), **_null_cells(numbers, excesses, form)})
    if not rows:
        return []
    chosen = ", ".join(f"{facts(path.run)['seed']} ({path.label})" for path in paths)
    notes = [
        f"Seeds {chosen}; intervals are Student's t over the seeds, n = {len(paths)}.",
        "Walks as in each run's own tables; the excess is over the decaying walk of the same run.",
    ]
    return [tabulate(name, "Over seeds", rows, notes)]


def _mean_cells(values: Sequence[float], form: str) -> dict[str, Cell]:
    mean, half = t_interval(values)
    ends = f"{form.format(mean - half)} to {form.format(mean + half)}"
    each = ", ".join(form.format(value) for value in values)
    return {
        "n": number(float(len(values)), "{:.0f}"),
        "mean": number(mean, form),
        "95 %": Cell(ends, None, {"low": mean - half, "high": mean + half}),
        "each": word(each),
    }


def _null_cells(numbers: Sequence[Calibrated], excesses: Sequence[float], form: str) -> dict[str, Cell]:
    cells = {
        "walk": number(_mean([value.walk for value in numbers]), form),
        "decaying walk": number(_mean([value.decay for value in numbers]), form),
    }
    if len(excesses) > 1:
        mean, half = t_interval(excesses)
        low, high = gap(mean - half, form), gap(mean + half, form)
        cells["excess"] = gap(mean, form)
        ends = {"low": mean - half, "high": mean + half}
        cells["excess, 95 %"] = Cell(f"{low.text} to {high.text}", None, ends)
    return cells


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t with n - 1 degrees of freedom."""
    series = pd.Series(values, dtype=float)
    return float(series.mean()), t_quantile(len(values) - 1) * float(series.std()) / math.sqrt(len(values))


_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


def t_quantile(degrees: int) -> float:
    """Student's t at 97.5 %: tabulated up to 10 degrees of freedom, then by Cornish and Fisher's expansion."""
    if degrees <= len(_T):
        return _T[degrees - 1]
    z = 1.959964
    first = (z**3 + z) / (4 * degrees)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    return z + first + second + third


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan
