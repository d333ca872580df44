"""Figures of several runs beside one another: optimizers, beta2, seeds, and equal validation loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry import nulls, pca
from mini_gpt_pl.report.calibration import calibrate_run
from mini_gpt_pl.report.families import beta2_of, from_scratch, labels, optimizers_of, seeds_of
from mini_gpt_pl.report.plotting import BACKBONE, NULL, PC2, RESIDUAL, WIDTH, log_if_dwarfed, palette
from mini_gpt_pl.report.probe_figures import reheats
from mini_gpt_pl.report.settings import facts, optimizer_label
from mini_gpt_pl.runs import Run

_DISTINCT = (BACKBONE, RESIDUAL, PC2, "#d68910", "#7d3c98", "#5d6d7e", "#117a65", "#a04000")
_LINE = 105  # characters of a legend that fit in one line
_LINE_HEIGHT = 0.17  # inches
# A loss this many times the lowest first one says that a run went astray, and would press the others into a corner.
_ASTRAY = 3.0


# ---------------------------------------------------------------------------------------------------- curves


class Curve(NamedTuple):
    """One quantity along a run.

    Attributes:
        steps: Where it was measured.
        values: What was measured.
        null: The same of the decaying walk; None for what no walk has.
    """

    steps: Sequence[int]
    values: Sequence[float]
    null: Sequence[float] | None = None


def _metric(name: str) -> Callable[[Run], Curve]:
    def read(run: Run) -> Curve:
        series = run.series(name)
        return Curve(series.index.tolist(), series.tolist())

    return read


def _of_split(read: Callable[[pca.Decomposition], Any]) -> Callable[[Run], Curve]:
    def measure(run: Run) -> Curve:
        measured, null = (_split(path) for path in _paths(run))
        return Curve(run.trajectory.steps[1:], read(measured).tolist(), read(null).tolist())

    return measure


def _paths(run: Run) -> tuple[pca.Gram, pca.Gram]:
    """H of a run and of its decaying walk."""
    run.drift_rows  # noqa: B018 (raises for a run without a path)
    gram = run.trajectory.gram()
    return gram, nulls.decaying_walk(gram, run.trajectory.survival)


def _split(gram: pca.Gram) -> pca.Decomposition:
    rows = pca.drifts(len(gram))[1:]
    return pca.decompose(gram, rows, pca.pca(gram, rows).backbone)


def _over_time(read: Callable[[pca.Gram], float]) -> Callable[[Run], Curve]:
    """A number of the path up to each snapshot."""

    def measure(run: Run) -> Curve:
        sides = [[read(path[:k, :k]) for k in range(2, len(path) + 1)] for path in _paths(run)]
        return Curve(run.trajectory.steps[1:], sides[0], sides[1])

    return measure


def _cos_theta0(gram: pca.Gram) -> float:
    rows = pca.drifts(len(gram))[1:]
    try:
        return pca.cosine(gram, pca.pca(gram, rows).backbone, pca.theta0(len(gram)))
    except ValueError:  # nothing has moved yet
        return math.nan


def _pc1(gram: pca.Gram) -> float:
    try:
        return 100 * pca.pca(gram, pca.drifts(len(gram))[1:]).pc1
    except ValueError:  # nothing has moved yet
        return math.nan


_CURVES: dict[str, tuple[str, Callable[[Run], Curve]]] = {
    "loss": ("validation loss, nats", _metric("val/loss")),
    "p_ood": ("$p_{ood}$", _metric("probe/p_ood")),
    "a": ("$a(t)=\\langle x(t),v_b\\rangle$", _of_split(lambda split: split.coordinate)),
    "r": ("$||r(t)||$", _of_split(lambda split: split.residual_norm)),
    "fraction": ("fraction $a^2/||x||^2$", _of_split(lambda split: split.fraction)),
    "cos": ("cos$(v_b,\\theta_0)$, $v_b$ of the past", _over_time(_cos_theta0)),
    "pc1": ("PC1 up to the step, %", _over_time(_pc1)),
}


_UNBOUNDED = ("loss", "a", "r")


def _draw(axes: Axes, runs: Sequence[Run], colours: Sequence[Any], curve: str) -> None:
    """Draw one quantity of every run that has it, its null dotted in the same colour."""
    title, measure = _CURVES[curve]
    for run, colour in zip(runs, colours, strict=True):
        try:
            found = measure(run)
        except UserError:
            continue  # a run that never moved
        axes.plot(found.steps, found.values, "-", color=colour, lw=1.2)
        if found.null is not None:
            axes.plot(found.steps, found.null, ":", color=colour, lw=1.0)
    if curve in _UNBOUNDED:
        log_if_dwarfed(axes)
    axes.set_title(title, fontsize=9)


def _panels(runs: Sequence[Run], names: Sequence[str], curves: Sequence[str], colours: Sequence[Any]) -> Figure:
    figure = Figure(figsize=(WIDTH, 4.6 + _lines(names) * _LINE_HEIGHT))
    grid = figure.subplots(2, 2, sharex=True)
    for axes, curve in zip(grid.flat, curves, strict=True):
        _draw(axes, runs, colours, curve)
    for axes in grid[1]:
        axes.set_xlabel("step")
    _legend(figure, names, colours)
    return figure


def _legend(figure: Figure, names: Sequence[str], colours: Sequence[Any], *, null: bool = True) -> None:
    handles = [Line2D([], [], color=colour, lw=1.4, label=name) for name, colour in zip(names, colours, strict=True)]
    if null:
        handles.append(Line2D([], [], color=NULL, ls=":", lw=1.0, label="decaying walk of each"))
    columns = _columns([str(handle.get_label()) for handle in handles])
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, columnspacing=1.2)


def _columns(names: Sequence[str]) -> int:
    return max(1, min(4, len(names), _LINE // (max(map(len, names), default=0) + 8)))


def _lines(names: Sequence[str]) -> int:
    return math.ceil(len(names) / _columns(names))


def _colours(runs: Sequence[Run]) -> Sequence[Any]:
    return _DISTINCT[: len(runs)] if len(runs) <= len(_DISTINCT) else palette(len(runs))


# --------------------------------------------------------------------------------------------------- figures


def _need(runs: Sequence[Run], what: str) -> Sequence[Run]:
    if len(runs) < 2:
        raise UserError(f"no two of the runs differ in {what} only")
    return runs


def overview(runs: Sequence[Run]) -> Figure:
    """Loss, p_ood, backbone coordinate and residual of all runs from scratch.

    Raises:
        UserError: There are fewer than two.
    """
    chosen = from_scratch(runs)
    if len(chosen) < 2:
        raise UserError("fewer than two of the runs are from scratch: there is nothing to lay over one another")
    return _panels(chosen, labels(chosen), ("loss", "p_ood", "a", "r"), _colours(chosen))


def seeds(runs: Sequence[Run]) -> Figure:
    """Backbone coordinate, residual, fraction and p_ood of runs that differ in their seed.

    Raises:
        UserError: There are no two such runs.
    """
    chosen = _need(seeds_of(runs), "seed")
    return _panels(chosen, labels(chosen), ("a", "r", "fraction", "p_ood"), _colours(chosen))


def beta2_curves(runs: Sequence[Run]) -> Figure:
    """Backbone coordinate, residual, loss and p_ood by beta2; logarithmic where one run dwarfs the others.

    Raises:
        UserError: There are no two values of beta2.
    """
    chosen = _need(beta2_of(runs), "beta2")
    return _panels(chosen, labels(chosen), ("a", "r", "loss", "p_ood"), palette(len(chosen)))


def beta2_pc1(runs: Sequence[Run]) -> Figure:
    """PC1 by beta2, raw and with unit rows, beside the decaying walk's, and the excess over it.

    Raises:
        UserError: There are no two values of beta2 with a path.
    """
    chosen = _need(beta2_of(runs), "beta2")
    values = list(dict.fromkeys(float(facts(run)["beta2"]) for run in chosen))
    figure = Figure(figsize=(WIDTH, 3.6))
    left, right = figure.subplots(1, 2)
    for name, colour, shift, label in (("pc1", BACKBONE, -0.2, "raw"), ("pc1_unit", PC2, 0.1, "unit rows")):
        seen: list[float] = []
        for run in chosen:
            try:
                found = calibrate_run(run)[name]
            except UserError:
                continue  # too short, or it never moved
            beta2 = float(facts(run)["beta2"])
            x = values.index(beta2) + shift + 0.07 * seen.count(beta2)  # seeds side by side
            seen.append(beta2)
            left.plot([x], [100 * found.value], "o", ms=5, color=colour, label=f"PC1, {label}")
            left.plot([x], [100 * found.decay], "d", ms=5, mfc="none", color=colour, label="its decaying walk")
            right.plot([x, x], [100 * found.low, 100 * found.high], color=colour, lw=5, alpha=0.3)
            right.plot([x], [100 * found.excess], "o", ms=5, color=colour)
    right.axhline(0, color=NULL, ls=":", lw=1.2)
    for axes, title in ((left, "PC1 of the drift, %"), (right, "Excess, points, with 95 % interval")):
        axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        axes.set_xlim(-0.5, len(values) - 0.5)
        axes.set_xlabel("$\\beta_2$")
        axes.set_title(title, fontsize=9)
    _legend_once(figure, left)
    return figure


def _legend_once(figure: Figure, axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    known = {(name, handle.get_color()): handle for handle, name in zip(handles, names, strict=True)}  # type: ignore[attr-defined]
    figure.legend(known.values(), [name for name, _ in known], loc="outside lower center", ncols=4)


def optimizers(runs: Sequence[Run]) -> Figure:
    """PC1 by optimizer beside its nulls, loss, p_ood, and cos(v_b, theta_0), which weight decay alone makes.

    Raises:
        UserError: There are no two optimizers.
    """
    chosen = _need(optimizers_of(runs), "optimizer")
    colours = _colours(chosen)
    figure = Figure(figsize=(WIDTH, 5.4))
    grid = figure.subplots(2, 2)
    bars = grid[0, 0]
    for x, (run, colour) in enumerate(zip(chosen, colours, strict=True)):
        try:
            found = calibrate_run(run, bootstrap=0)
        except UserError:
            continue
        for name, shift, alpha in (("pc1", -0.2, 1.0), ("pc1_unit", 0.2, 0.5)):
            bars.bar([x + shift], [100 * found[name].value], 0.36, color=colour, alpha=alpha)
            bars.plot([x + shift], [100 * found[name].walk], "x", ms=5, color="black")
            bars.plot([x + shift], [100 * found[name].decay], "d", ms=5, mfc="white", color="black")
    bars.set_xticks([])
    bars.set_ylim(0, 105)
    bars.set_title("PC1 %, raw and unit rows (pale); × walk, ◇ decaying", fontsize=8)
    for axes, curve in zip(grid.flat[1:], ("loss", "p_ood", "cos"), strict=True):
        _draw(axes, chosen, colours, curve)
        axes.set_xlabel("step")
    _legend(figure, [optimizer_label(facts(run)) for run in chosen], colours)
    return figure


def matched_loss(runs: Sequence[Run]) -> Figure:
    """p_ood and the PC1 of the path so far against validation loss, so that runs are compared at equal loss.

    Raises:
        UserError: Fewer than two runs were evaluated.
    """
    chosen = [run for run in from_scratch(runs) if len(run.series("val/loss")) > 1]
    if len(chosen) < 2:
        raise UserError("fewer than two runs have a validation loss to be compared at")
    colours = _colours(chosen)
    astray = _ASTRAY * min(float(run.series("val/loss").iloc[0]) for run in chosen)
    names = labels(chosen)
    figure = Figure(figsize=(WIDTH, 3.0 + _lines(names) * _LINE_HEIGHT))
    pair = figure.subplots(1, 2)
    for axes, curve in zip(pair, ("p_ood", "pc1"), strict=True):
        for run, colour in zip(chosen, colours, strict=True):
            try:
                found = _CURVES[curve][1](run)
            except UserError:
                continue  # a run that never moved
            _against_loss(axes, run, astray, found.steps, found.values, "o-", colour)
            if found.null is not None:
                _against_loss(axes, run, astray, found.steps, found.null, ":", colour)
        axes.set_xlabel("validation loss, nats")
        axes.set_title(_CURVES[curve][0], fontsize=9)
        axes.invert_xaxis()
    _legend(figure, names, colours)
    return figure


def _against_loss(
    axes: Axes, run: Run, most: float, steps: Iterable[int], values: Iterable[float], style: str, colour: Any
) -> None:
    """Draw values at the losses of their steps, up to a loss."""
    loss = {step: value for step, value in run.series("val/loss").items() if value <= most}
    pairs = [(loss[step], value) for step, value in zip(steps, values, strict=True) if step in loss]
    if pairs:
        axes.plot(*zip(*pairs, strict=True), style, ms=2.5, lw=1, color=colour)


COMPARISON_FIGURES: dict[str, Callable[[Sequence[Run]], Figure]] = {
    "overview": overview,
    "optimizers": optimizers,
    "beta2_pc1": beta2_pc1,
    "beta2_curves": beta2_curves,
    "seeds": seeds,
    "matched_loss": matched_loss,
    "reheating": reheats,
}
"""Figures of several runs; each raises a UserError where no two of the runs belong to it."""
