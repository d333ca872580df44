"""Runs that differ in beta2: what it does to loss, probe and geometry, and whether anything follows it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from mini_gpt_pl.geometry.path import growth
from mini_gpt_pl.geometry.path.nulls import Calibrated
from mini_gpt_pl.report.measures import update_statistics
from mini_gpt_pl.report.settings import diverged
from mini_gpt_pl.report.sheet import NULLS, Cell, Row, Table, beside_nulls, number, tabulate, word
from mini_gpt_pl.report.statistics import direction, spearman
from mini_gpt_pl.report.subject import Subject
from mini_gpt_pl.stories.study.beside import COLUMN, beta2_of, notes_of_runs
from mini_gpt_pl.stories.study.optimizer_tables import common_window, identity, outcome, window_note

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


def beta2(paths: Sequence[Subject]) -> list[Table]:
    """Outcome and geometry of runs that differ in beta2, and whether anything follows it."""
    paths = sorted(paths, key=lambda path: -float(path.facts["beta2"]))
    chosen = common_window(paths)
    found = {index: geometry(path, chosen) for index, path in enumerate(paths)}
    tables = [_beta2_outcome(paths), _beta2_geometry(paths, found, chosen), _beta2_trend(paths, found)]
    return [table for table in tables if table is not None]


def geometry(path: Subject, chosen: tuple[int, int] | None) -> dict[str, Calibrated]:
    """Numbers of `_GEOMETRY`, each beside its nulls; what a run's data do not allow is left out."""
    numbers = dict(path.calibrated())
    if not numbers:
        return {}
    inside = path.window(*chosen) if chosen else None
    if inside is not None:
        numbers |= {f"window_{name}": value for name, value in inside.numbers.items()}
    thinned = path.thinned
    if len(thinned) > 3:
        numbers |= path.against_nulls(lambda gram: update_statistics(gram, thinned.steps, path.length), thinned=True)
    half = path.length // 2
    halves = {"first": (0, half), "second": (half, path.length)}
    steps = path.trajectory.steps
    fits = path.against_nulls(lambda gram: growth.summary(gram, steps, path.border, tuple(halves.values())))
    for name, (lo, hi) in halves.items():
        for part in ("a", "r"):
            if hi <= path.last_step and (fit := fits.get(f"exponent_{part}_{lo}_{hi}")) is not None:
                numbers[f"{part}_{name}"] = fit
    return {name: numbers[name] for name, *_ in _GEOMETRY if name in numbers}


def _beta2_cell(path: Subject) -> dict[str, Cell]:
    value = path.facts["beta2"]
    cells = {name: cell for name, cell in identity(path).items() if name != "optimizer"}
    return {"beta2": Cell(f"{value:g}", float(value)), **cells}


def _beta2_outcome(paths: Sequence[Subject]) -> Table:
    rows, settings = [], {path.label: beta2_of(path) for path in paths}
    for path in paths:
        setting, (mean, spread) = settings[path.label], _interference(path)
        cells = _beta2_cell(path) | outcome(path) | {"interference": number(mean, "{:+.3f}", spread)}
        for column, key, form in (
            ("final loss", "loss_last", "{:.2f}"),
            ("best p_ood", "p_ood_best", "{:.3f}"),
            ("interference", "interference", "{:.3f}"),
        ):
            if setting is not None:
                cells |= {f"{column}, {COLUMN}": setting.only(key, form)}
        rows.append(cells)
    notes = [
        "Interference: mean cos of LM and probe gradients over the measured steps, ± standard deviation.",
        *notes_of_runs(settings, ("loss_last",)),
    ]
    return tabulate("beta2_outcome", "What beta2 does: loss and probe", rows, notes)


def _interference(path: Subject) -> tuple[float, float]:
    """Mean and standard deviation over replayed checkpoints, or over the steps measured live."""
    found = path.estimates(("interference", path.trunk), f"alignment/{path.trunk}/lm_vs_probe").values.values()
    values = pd.Series([value for value, _ in found if not math.isnan(value)], dtype=float)
    return float(values.mean()), float(values.std())


def _beta2_geometry(
    paths: Sequence[Subject], found: Mapping[int, Mapping[str, Calibrated]], chosen: tuple[int, int] | None
) -> Table | None:
    rows: list[Row] = []
    settings = {path.label: beta2_of(path) for path in paths}
    for name, words, form, key in _GEOMETRY:
        for index, path in enumerate(paths):
            setting = settings[path.label]
            published = {} if setting is None else {COLUMN: setting.only(key, form)}
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


def _beta2_trend(paths: Sequence[Subject], found: Mapping[int, Mapping[str, Calibrated]]) -> Table | None:
    kept = [index for index, path in enumerate(paths) if not diverged(path)]
    rows: list[Row] = []
    for name, words, _, _ in _GEOMETRY:
        known = [index for index in kept if name in found[index]]
        frame = pd.DataFrame(
            {
                "beta2": [float(paths[index].facts["beta2"]) for index in known],
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
    count = len({paths[index].facts["beta2"] for index in kept})
    left_out = [path.label for path in paths if diverged(path)]
    notes = [
        f"Rank correlation with beta2 over {count} values, means over the runs of one value; of {count} values even a "
        f"perfect order has p = {2 / math.factorial(count):.2g}, two-sided.",
        f"Without what diverged: {', '.join(left_out)}." if left_out else None,
    ]
    return tabulate("beta2_trend", "What beta2 does: does anything follow it?", rows, notes)
