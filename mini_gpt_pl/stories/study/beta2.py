"""Runs that differ in beta2: what it does to loss, probe and geometry, and whether anything follows it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from mini_gpt_pl.figures.plotting import BACKBONE, NULL, PC2, WIDTH, palette
from mini_gpt_pl.geometry.path import growth
from mini_gpt_pl.geometry.path.nulls import Calibrated
from mini_gpt_pl.metrics.registry import statistics
from mini_gpt_pl.report.claims import Finding
from mini_gpt_pl.report.families import names
from mini_gpt_pl.report.overlays import STYLES, Look
from mini_gpt_pl.report.path_tables import update_statistics
from mini_gpt_pl.report.settings import diverged, facts, plain
from mini_gpt_pl.report.sheet import Cell, Row, Table, beside_nulls, gap, number, word
from mini_gpt_pl.report.subject import Subject
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.study.optimizers import common_window, identity, outcome, window_note, window_of
from mini_gpt_pl.stories.study.overlays import need, panels
from mini_gpt_pl.stories.study.runs import COLUMN, beta2_beside, beta2_of
from mini_gpt_pl.stories.study.words import PublishedColumns, laid_out, numbers

_MISSING = Calibrated(math.nan, math.nan, math.nan)


def value_of(run: Run) -> float:
    """Return the beta2 of a run that has one."""
    return float(facts(run)["beta2"])


# ------------------------------------------------------------------------------------------------------- tables


def tables(paths: Sequence[Subject]) -> list[Table]:
    """Outcome and geometry of runs that differ in beta2, and whether anything follows it."""
    paths = sorted(paths, key=lambda path: -value_of(path))
    window = common_window(paths)
    measured = [_geometry(path, window) for path in paths]
    return [*_outcome(paths), *_beside_nulls(paths, measured, window), *_trend(paths, measured)]


def _geometry(path: Subject, window: tuple[int, int] | None) -> dict[str, Calibrated]:
    """Numbers of the table of geometry, each beside its nulls; what a run's data do not allow is left out."""
    measured = path.calibrated()
    if not measured:
        return {}
    if window is not None and (inside := window_of(path.trajectory, *window)) is not None:
        measured |= {f"window_{name}": value for name, value in inside.numbers.items()}
    thinned = path.thinned
    if len(thinned) > 3:
        measured |= path.against_nulls(lambda gram: update_statistics(gram, thinned.steps, path.length), thinned=True)
    halves = {"first": (0, path.length // 2), "second": (path.length // 2, path.length)}
    steps = path.trajectory.steps
    fits = path.against_nulls(lambda gram: growth.summary(gram, steps, path.border, tuple(halves.values())))
    for name, (lo, hi) in halves.items():
        for part in ("a", "r"):
            if hi <= path.last_step and (fit := fits.get(f"exponent_{part}_{lo}_{hi}")) is not None:
                measured[f"{part}_{name}"] = fit
    return measured


def _lead(path: Subject) -> dict[str, Cell]:
    value = path.facts["beta2"]
    cells = {name: cell for name, cell in identity(path).items() if name != "optimizer"}
    return {"beta2": Cell(f"{value:g}", float(value)), **cells}


def _outcome(paths: Sequence[Subject]) -> list[Table]:
    published = PublishedColumns({path.label: beta2_beside(path) for path in paths}, COLUMN)
    rows: list[Row] = []
    for path in paths:
        # Over replayed checkpoints, or over the steps measured live.
        cosines = path.estimates(("interference", path.trunk), f"alignment/{path.trunk}/lm_vs_probe").values.values()
        values = pd.Series([value for value, _ in cosines if not math.isnan(value)], dtype=float)
        cells = {"interference": number(float(values.mean()), "{:+.3f}", float(values.std()))}
        shown = numbers("beta2_outcome", "columns")
        rows.append(_lead(path) | outcome(path) | cells | published.cells(path.label, shown))
    return laid_out("beta2_outcome", rows, published.notes)


def _beside_nulls(
    paths: Sequence[Subject], measured: Sequence[Mapping[str, Calibrated]], window: tuple[int, int] | None
) -> list[Table]:
    published = PublishedColumns({path.label: beta2_beside(path) for path in paths}, COLUMN)
    rows: list[Row] = []
    for one in numbers("beta2_geometry"):
        for path, of_path in zip(paths, measured, strict=True):
            lead = {"quantity": word(one.words), **_lead(path), "rows": number(len(path.trajectory) - 1.0, "{:.0f}")}
            cells = beside_nulls(of_path.get(one.key, _MISSING), one.form)
            rows.append({**lead, **cells, **published.cells(path.label, [replace(one, words="")])})
    return laid_out("beta2_geometry", rows, published.notes, window=window, lacking=window_note(paths, window))


def _trend(paths: Sequence[Subject], measured: Sequence[Mapping[str, Calibrated]]) -> list[Table]:
    sound = [(value_of(path), of_path) for path, of_path in zip(paths, measured, strict=True) if not diverged(path)]
    rows: list[Row] = []
    for one in numbers("beta2_geometry"):
        pairs = [(value, of_path[one.key]) for value, of_path in sound if one.key in of_path]
        columns = ["beta2", "measured", "excess"]
        frame = pd.DataFrame([(value, of.value, of.excess) for value, of in pairs], columns=columns, dtype=float)
        means = frame.dropna().groupby("beta2").mean()
        if len(means) < 3:
            continue
        cells = {"quantity": word(one.words), "values of beta2": number(float(len(means)), "{:.0f}")}
        for column in columns[1:]:
            cells[f"Spearman, {column}"] = number(spearman(means.index.to_list(), means[column].to_list()), "{:+.2f}")
            cells[f"{column} as beta2 rises"] = word(direction(means[column].to_list()))
        rows.append(cells)
    count = len({value for value, _ in sound})
    lost = ", ".join(path.label for path in paths if diverged(path))
    return laid_out("beta2_trend", rows, count=count, least=2 / math.factorial(count), lost=lost)


def finding(sound: Mapping[Run, Mapping[str, Calibrated]]) -> Iterator[Finding]:
    """Whether the excess of PC1 follows beta2, over the means of runs of one value."""
    chosen = beta2_of(list(sound))
    values = sorted({value_of(run) for run in chosen})
    if len(values) < 3:
        return
    for name in ("pc1", "pc1_unit"):
        form = statistics()[name].format
        excesses = [[sound[run][name].excess for run in chosen if value_of(run) == value] for value in values]
        means = [math.fsum(of_value) / len(of_value) for of_value in excesses]
        shown = ", ".join(f"{gap(mean, form).text} at {plain(x)}" for x, mean in zip(values, means, strict=True))
        way = direction(means)
        verdict = (
            f"{way} with beta2 throughout" if way != "neither" else "neither rises nor falls with beta2 throughout"
        )
        orders = f"{len(values)} values have {math.factorial(len(values)):,} orders"
        said = f"{verdict}: {shown} (rank correlation {spearman(values, means):+.2f}; {orders})."
        yield Finding(f"Excess of {statistics()[name].title} by beta2", said, "beta2")


# ------------------------------------------------------------------------------------------------------ figures


def curves(runs: Sequence[Run]) -> Figure:
    """Backbone coordinate, residual, loss and p_ood by beta2; logarithmic where one run dwarfs the others.

    Seeds of one value share its colour, and have other lines and their names.

    Raises:
        UserError: There are no two values of beta2.
    """
    chosen, called = need(beta2_of(runs), "beta2"), names(runs)
    values = [value_of(run) for run in chosen]
    shades = dict(zip(dict.fromkeys(values), palette(len(set(values))), strict=True))
    looks = []
    for k, (run, value) in enumerate(zip(chosen, values, strict=True)):
        name = f"β₂ {plain(value)}" + (f", {called[run]}" if values.count(value) > 1 else "")
        looks.append(Look(run, name, shades[value], STYLES[values[:k].count(value) % len(STYLES)]))
    return panels(looks, "a", "r", "loss", "p_ood")


def pc1(runs: Sequence[Run]) -> Figure:
    """PC1 by beta2, raw and with unit rows, beside the decaying walk's, and the excess over it.

    A run that diverged has too few rows for a share to be compared; it is named and left out.

    Raises:
        UserError: There are no two values of beta2 with a path.
    """
    chosen = need(beta2_of(runs), "beta2")
    values = list(dict.fromkeys(value_of(run) for run in chosen))
    figure = Figure(figsize=(WIDTH, 3.6))
    left, right = figure.subplots(1, 2)
    for name, colour, shift, label in (("pc1", BACKBONE, -0.2, "raw"), ("pc1_unit", PC2, 0.1, "unit rows")):
        seen: list[float] = []
        for run in chosen:
            shares = {} if diverged(run) else Subject.of(run).calibrated()
            if not shares:
                continue  # too short, or it never moved
            share, beta2 = shares[name], value_of(run)
            x = values.index(beta2) + shift + 0.07 * seen.count(beta2)  # seeds side by side
            seen.append(beta2)
            left.plot([x], [100 * share.value], "o", ms=5, color=colour, label=f"PC1, {label}")
            left.plot([x], [100 * share.decay], "d", ms=5, mfc="none", color=colour, label="its decaying walk")
            right.plot([x, x], [100 * share.low, 100 * share.high], color=colour, lw=5, alpha=0.3)
            right.plot([x], [100 * share.excess], "o", ms=5, color=colour)
    right.axhline(0, color=NULL, ls=":", lw=1.2)
    for axes, title in ((left, "PC1 of the drift, %"), (right, "Excess, points, with 95 % interval")):
        for beta2 in {value_of(run) for run in chosen if diverged(run)}:
            place = (values.index(beta2), 0.5)
            axes.annotate("diverged", place, xycoords=("data", "axes fraction"), ha="center", rotation=90, fontsize=8)
        axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        axes.set_xlim(-0.5, len(values) - 0.5)
        axes.set_xlabel("$\\beta_2$")
        axes.set_title(title, fontsize=9)
    handles, labels = left.get_legend_handles_labels()
    once = {(label, handle.get_color()): handle for handle, label in zip(handles, labels, strict=True)}
    figure.legend(once.values(), [label for label, _ in once], loc="outside lower center", ncols=4)
    return figure


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation, ties sharing their mean rank; NaN where one series is constant."""
    if min(len(set(x)), len(set(y))) < 2:
        return math.nan
    return float(stats.spearmanr(x, y).statistic)


def direction(values: Sequence[float]) -> str:
    """Say whether values rise or fall throughout."""
    steps = [later - earlier for earlier, later in itertools.pairwise(values)]
    return "rises" if all(step > 0 for step in steps) else "falls" if all(step < 0 for step in steps) else "neither"
