"""Runs of different optimizers: the same window, the same step, the same loss (paper, Tables 9 and 10)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.figures.plotting import WIDTH
from mini_gpt_pl.geometry.path import pca
from mini_gpt_pl.geometry.path.nulls import Calibrated
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.metrics.registry import statistics
from mini_gpt_pl.report.claims import Finding
from mini_gpt_pl.report.comparison import ending
from mini_gpt_pl.report.families import from_scratch, names
from mini_gpt_pl.report.overlays import LINE_HEIGHT, Look, draw, legend, legend_rows, looks_of, named
from mini_gpt_pl.report.path_tables import NumberRow
from mini_gpt_pl.report.settings import diverged, optimizer_label, progress
from mini_gpt_pl.report.sheet import Cell, Row, Table, beside_nulls, gap, number, word
from mini_gpt_pl.report.subject import Subject, against_nulls
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.study.learning import LOSS
from mini_gpt_pl.stories.study.overlays import CURVES, need
from mini_gpt_pl.stories.study.runs import BOOK, COLUMN, control_beside, optimizer_labels, optimizers_of
from mini_gpt_pl.stories.study.words import PublishedColumns, laid_out, numbers, words
from mini_gpt_pl.stories.switches import P_OOD

STANDARD = (600, 2000)
"""Steps of the paper's window for comparisons."""
# A loss this many times the lowest first one says that a run went astray, and would press the others into a corner.
_ASTRAY = 3.0


def tables(paths: Sequence[Subject], left_out: Sequence[str] = ()) -> list[Table]:
    """Tables 9 and 10: the standard window, the whole run, the paper's windows, and pairs at matched step and loss.

    Args:
        paths: Runs that differ in their optimizer, its settings, their length and seed.
        left_out: Names of runs that differ from one of them in beta2 only.
    """
    return [*_outcome(paths, left_out), *_whole_run(paths), *_windows(paths), *_matched(paths)]


# ---------------------------------------------------------------------------------------- what several tables share


def common_window(paths: Iterable[Subject]) -> tuple[int, int] | None:
    """Window that runs are compared in: the paper's, steps 600 to 2,000, if two of them were there.

    Else the same shares of the shortest; None if there are no such snapshots. Runs that diverged have no say.
    """
    paths = list(paths)
    paths = [path for path in paths if not diverged(path)] or paths
    if sum(set(STANDARD) <= set(path.trajectory.steps) for path in paths) > 1:
        return STANDARD
    common = sorted(set.intersection(*(set(path.trajectory.steps) for path in paths)))
    last = min(path.last_step for path in paths)
    lo, hi = (min(common, key=lambda step: abs(step - share * last), default=0) for share in (0.15, 0.5))
    return (lo, hi) if lo < hi else None


def window_note(paths: Iterable[Subject], chosen: tuple[int, int] | None) -> str | None:
    """Name the runs that have no path over a window; None if all have one."""
    lacking = []
    for path in paths:
        if chosen is not None and window_of(path.trajectory, *chosen) is None:
            how = f"diverged at step {progress(path)[0]:,}, " if diverged(path) else ""
            lacking.append(f"{path.label} ({how}last snapshot at step {path.last_step:,})")
    if chosen is None or not lacking:
        return None
    return f"Without the window of steps {chosen[0]:,} to {chosen[1]:,}: {', '.join(lacking)}."


def identity(path: Subject) -> dict[str, Cell]:
    """Cells that say which run a row is."""
    seed = path.facts["seed"]
    cells = {"run": word(path.label), "optimizer": word(optimizer_label(path.facts, beta2=True))}
    return cells | ({} if seed is None else {"seed": word(str(seed))})


def outcome(path: Subject) -> dict[str, Cell]:
    """Cells that say how a run ended: steps, loss, its lowest, best p_ood and where, and whether it diverged."""
    loss, p_ood = (path.series(name) for name in (LOSS, P_OOD))
    return {
        **ending(path),
        "final loss": number(float(loss.iloc[-1]) if len(loss) else None),
        "lowest loss": number(float(loss.min()) if len(loss) else None),
        "best p_ood": number(float(p_ood.max()) if len(p_ood) else None),
        "best p_ood at": number(float(p_ood.index[int(p_ood.argmax())]) if len(p_ood) else None, "{:,.0f}"),
    }


@dataclass(frozen=True)
class Window:
    """PCA of the drifts inside a window of steps, each from the window's first snapshot and of unit length.

    Args:
        rows: Number of drifts.
        numbers: pc1, k95, k99 and drift (||theta(hi) - theta(lo)||), each beside its nulls.
        decay: How far weight decay alone moves theta_0 over the window, ||theta_0|| (S(lo) - S(hi)).
    """

    rows: int
    numbers: dict[str, Calibrated]
    decay: float


def window_of(trajectory: Trajectory, lo: int, hi: int, group: str | None = None) -> Window | None:
    """Measure the path of a group, or of the whole selection for None, from step `lo` to step `hi`.

    Returns:
        The window, or None where one of them has no snapshot, nothing lies between, or nothing moved.
    """
    steps, gram = trajectory.steps, trajectory.gram(group)
    if lo not in steps or hi not in steps or not lo < hi:
        return None
    first, last = steps.index(lo), steps.index(hi)

    def describe(h: pca.Gram) -> dict[str, float]:
        rows = pca.drifts(len(h), first)[first + 1 : last + 1]
        parts = pca.pca(h, rows, normalise=True)
        k95, k99 = (float(parts.components_for(share)) for share in (0.95, 0.99))
        return {"pc1": parts.pc1, "k95": k95, "k99": k99, "drift": float(pca.norms(h, rows[-1:]))}

    try:
        numbers = against_nulls(gram, trajectory.decaying_walk(group), describe)
    except ValueError:  # nothing moved
        return None
    decay = float(gram[0, 0].clamp_min(0).sqrt()) * (trajectory.survival[first] - trajectory.survival[last])
    return Window(last - first, numbers, decay)


def window_cells(window: Window | None) -> dict[str, Cell]:
    """Cells of a window: its shape, each number beside its nulls, and how far decay alone goes; none without one."""
    if window is None:
        return {}
    counts = {name: window.numbers[name] for name in ("k95", "k99")}
    drift = window.numbers["drift"]
    return {
        "rows": number(float(window.rows), "{:.0f}"),
        **{f"PC1, {name}": cell for name, cell in beside_nulls(window.numbers["pc1"], "{:.1%}").items()},
        **{
            name: Cell(
                f"{count.value:.0f} ({count.walk:.0f}, {count.decay:.0f})",
                count.value,
                {"walk": count.walk, "decaying walk": count.decay},
            )
            for name, count in counts.items()
        },
        "drift": number(drift.value, "{:.2f}"),
        "drift, decaying walk": number(drift.decay, "{:.2f}"),
        "drift, decay alone": number(window.decay, "{:.2f}"),
    }


# ------------------------------------------------------------------------------------------------------- tables


def _outcome(paths: Sequence[Subject], left_out: Sequence[str]) -> list[Table]:
    window = common_window(paths)
    published = PublishedColumns({path.label: control_beside(path) for path in paths}, COLUMN)
    shown = numbers("table9_optimizers", "columns")
    shown += numbers("table9_optimizers", "window") if window == STANDARD else []
    rows = [
        identity(path)
        | outcome(path)
        | window_cells(window_of(path.trajectory, *window) if window else None)
        | published.cells(path.label, shown)
        for path in paths
    ]
    more = f"Left out, as they differ from a run here in beta2 only: {', '.join(left_out)}." if left_out else None
    with_sgd = any("SGD" in str(path.facts["optimizer"]) for path in paths)
    return laid_out(
        "table9_optimizers",
        rows,
        [*published.notes, more, BOOK.notes["sgd"] if with_sgd else None],
        where=f", window of steps {window[0]:,} to {window[1]:,}" if window else "",
        lacking=window_note(paths, window),
    )


def _whole_run(paths: Sequence[Subject]) -> list[Table]:
    shown = {name: statistics()[name] for name in words("tables")["table9_whole_runs"]["rows"]}
    rows = [
        {"quantity": word(one.title), **identity(path), **beside_nulls(measured[name], one.format)}
        for name, one in shown.items()
        for path in paths
        if (measured := path.calibrated())
    ]
    return laid_out("table9_whole_runs", rows)


def _windows(paths: Sequence[Subject]) -> list[Table]:
    published = PublishedColumns({path.label: control_beside(path) for path in paths}, COLUMN)
    entry = words("tables")["table10_windows"]
    rows: list[Row] = []
    for lo, hi in entry["rows"]:
        shown = [NumberRow(f"{name.lower()}/{lo}_{hi}", name, form) for name, form in entry["columns"].items()]
        for path in paths:
            if (window := window_of(path.trajectory, lo, hi)) is not None:
                cells = identity(path) | {"window": word(f"{lo:,} to {hi:,}")} | window_cells(window)
                rows.append(cells | published.cells(path.label, shown))
    return laid_out("table10_windows", rows, [BOOK.notes["few_rows"], *published.notes])


def _matched(paths: Sequence[Subject]) -> list[Table]:
    lost = [path.label for path in paths if diverged(path)]
    sound = [path for path in paths if path.label not in lost]
    first: dict[str, Subject] = {}
    for path in sound:
        first.setdefault(optimizer_label(path.facts), path)
    rows: list[Row] = []
    for pair in itertools.combinations(first.values(), 2):
        common = sorted(set.intersection(*(set(path.trajectory.steps) for path in pair)))
        if len(common) > 1:
            rows += [_matched_row(pair, "step", path, common[-1]) for path in pair]
        # The loss that both reach: the best of the worse one.
        bests = [path.series(LOSS).min() for path in pair]
        if not any(math.isnan(best) for best in bests):
            level = float(max(bests))
            firsts = [int(loss.index[loss <= level][0]) for loss in (path.series(LOSS) for path in pair)]
            rows += [
                _matched_row(pair, f"loss {level:.2f}", path, first) for path, first in zip(pair, firsts, strict=True)
            ]
    return laid_out("table10_matched", rows, repeated=len(first) < len(sound), lost=", ".join(lost))


def _matched_row(pair: Sequence[Subject], matched: str, path: Subject, step: int) -> Row:
    steps = path.trajectory.steps
    last = max((at for at in steps if at <= step), default=steps[0])
    loss, p_ood = (path.series(name).get(step, math.nan) for name in (LOSS, P_OOD))
    return {
        "pair": word(" and ".join(one.label for one in pair)),
        "matched": word(matched),
        "run": word(path.label),
        "step": word(f"{step:,}"),
        "loss": number(float(loss)),
        "p_ood": number(float(p_ood)),
        **window_cells(window_of(path.trajectory, steps[0], last)),
    }


def finding(
    runs: Sequence[Run], sound: Mapping[Run, Mapping[str, Calibrated]], called: Mapping[Run, str]
) -> Iterator[Finding]:
    """PC1 of each optimizer beside the decaying walk's, and where the excess is largest."""
    chosen = {called[run]: sound[run]["pc1_unit"] for run in optimizers_of(runs) if run in sound}
    if len(chosen) < 2:
        return
    form = statistics()["pc1_unit"].format
    each = ", ".join(
        f"{name} {form.format(share.value)} (decaying walk {form.format(share.decay)})"
        for name, share in sorted(chosen.items(), key=lambda pair: -pair[1].value)
    )
    most = max(chosen, key=lambda name: chosen[name].excess)
    best = f"The excess is largest in {most}, {gap(chosen[most].excess, form).text}."
    yield Finding("PC1 by optimizer (unit rows)", f"{each}. {best}", "optimizers")


# ------------------------------------------------------------------------------------------------------ figures


def figure(runs: Sequence[Run]) -> Figure:
    """PC1 by optimizer beside its nulls, loss, p_ood, and cos(v_b, theta_0), which weight decay alone makes.

    Raises:
        UserError: There are no two optimizers.
    """
    chosen, called = need(optimizers_of(runs), "optimizer"), names(runs)
    labels = zip(chosen, optimizer_labels(chosen), strict=True)
    looks = looks_of(chosen, [f"{called[run]}: {label}" for run, label in labels])
    drawn = Figure(figsize=(WIDTH, 4.8 + legend_rows(looks) * LINE_HEIGHT))
    bars, *others = drawn.subplots(2, 2).flat
    for x, look in enumerate(looks):
        shares = {} if look.diverged else Subject.of(look.run).calibrated()
        for name, shift, alpha in (("pc1", -0.2, 1.0), ("pc1_unit", 0.2, 0.5)) if shares else ():
            bars.bar([x + shift], [100 * shares[name].value], 0.36, color=look.colour, alpha=alpha)
            bars.plot([x + shift], [100 * shares[name].walk], "x", ms=5, color="black")
            bars.plot([x + shift], [100 * shares[name].decay], "d", ms=5, mfc="white", color="black")
    bars.set_xticks([])
    bars.set_ylim(0, 105)
    bars.set_title("PC1 %, raw and unit rows (pale); × walk, ◇ decaying", fontsize=8)
    for axes, name in zip(others, ("loss", "p_ood", "cos"), strict=True):
        draw(axes, looks, CURVES[name])
        axes.set_xlabel("step")
    legend(drawn, looks)
    return drawn


def matched_loss(runs: Sequence[Run]) -> Figure:
    """p_ood and the PC1 of the path so far against validation loss, so that runs are compared at equal loss.

    Each run up to its lowest loss: what it does when it over-fits is no progress. A run that diverged is left out.

    Raises:
        UserError: Fewer than two runs were evaluated.
    """
    chosen = [run for run in from_scratch(runs) if len(run.series(LOSS)) > 1 and not diverged(run)]
    if len(chosen) < 2:
        raise UserError("fewer than two runs have a validation loss to be compared at")
    looks = named(chosen, runs)
    astray = _ASTRAY * min(float(run.series(LOSS).iloc[0]) for run in chosen)
    drawn = Figure(figsize=(WIDTH, 3.0 + legend_rows(looks) * LINE_HEIGHT))
    for axes, name in zip(drawn.subplots(1, 2), ("p_ood", "pc1"), strict=True):
        for look in looks:
            try:
                curve = CURVES[name].measure(look.run)
            except UserError:
                continue  # a run that never moved
            _against_loss(axes, look, astray, curve.steps, curve.values, {"marker": "o", "ls": look.style})
            if curve.null is not None:
                _against_loss(axes, look, astray, curve.steps, curve.null, {"ls": ":"})
        axes.set_xlabel("validation loss, nats")
        axes.set_title(CURVES[name].title, fontsize=9)
        # Logarithmic and falling, with whole numbers on it: most happens at low losses.
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        low, high = axes.get_xlim()
        shown = [value for value in (1, 2, 3, 4, 6, 8, 10, 12) if low <= value <= high]
        axes.set_xticks(shown, [str(value) for value in shown])
        axes.set_xlim(high, low)
    legend(drawn, looks)
    return drawn


def _against_loss(
    axes: Axes, look: Look, most: float, steps: Iterable[int], values: Iterable[float], style: Mapping[str, Any]
) -> None:
    """Draw values at the losses of their steps, of those up to a loss and until the lowest one."""
    series = look.run.series(LOSS)
    falling = series.iloc[: int(series.argmin()) + 1]
    loss = {step: value for step, value in falling.items() if value <= most}
    pairs = [(loss[step], value) for step, value in zip(steps, values, strict=True) if step in loss]
    if pairs:
        axes.plot(*zip(*pairs, strict=True), ms=2.5, lw=1, color=look.colour, **style)
