"""Figures of several runs beside one another: optimizers, beta2, seeds, and equal validation loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.figures.plotting import BACKBONE, NULL, PC2, WIDTH, palette
from mini_gpt_pl.report import overlays
from mini_gpt_pl.report.families import from_scratch, names, seeds_of
from mini_gpt_pl.report.overlays import (
    LINE_HEIGHT,
    STYLES,
    Look,
    Quantity,
    draw,
    legend,
    legend_rows,
    looks_of,
    metric,
    named,
    panels,
    several,
)
from mini_gpt_pl.report.settings import diverged, facts, plain
from mini_gpt_pl.report.subject import Subject
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.study.families import beta2_of, optimizer_labels, optimizers_of
from mini_gpt_pl.stories.study.story_figures import reheats

_CURVES = {
    **overlays.CURVES,
    "loss": Quantity("validation loss, nats", metric("val/loss"), unbounded=True),
    "p_ood": Quantity("$p_{ood}$", metric("probe/p_ood")),
}
# A loss this many times the lowest first one says that a run went astray, and would press the others into a corner.
_ASTRAY = 3.0


def _curves(*names: str) -> list[Quantity]:
    return [_CURVES[name] for name in names]


def _need(runs: Sequence[Run], what: str) -> Sequence[Run]:
    if len(runs) < 2:
        raise UserError(f"no two of the runs differ in {what} only")
    return runs


def overview(runs: Sequence[Run]) -> Figure:
    """Loss, p_ood, backbone coordinate and residual of all runs from scratch.

    Raises:
        UserError: There are fewer than two.
    """
    return panels(named(several(runs), runs), _curves("loss", "p_ood", "a", "r"))


def seeds(runs: Sequence[Run]) -> Figure:
    """Backbone coordinate, residual, fraction and p_ood of runs that differ in their seed.

    Raises:
        UserError: There are no two such runs.
    """
    chosen = _need(seeds_of(runs), "seed")
    return panels(named(chosen, runs), _curves("a", "r", "fraction", "p_ood"))


def beta2_curves(runs: Sequence[Run]) -> Figure:
    """Backbone coordinate, residual, loss and p_ood by beta2; logarithmic where one run dwarfs the others.

    Raises:
        UserError: There are no two values of beta2.
    """
    return panels(_shaded(_need(beta2_of(runs), "beta2"), runs), _curves("a", "r", "loss", "p_ood"))


def _shaded(chosen: Sequence[Run], runs: Sequence[Run]) -> list[Look]:
    """Colours in the order of beta2; seeds of one value have its colour, other lines and their names."""
    called = names(runs)
    values = [float(facts(run)["beta2"]) for run in chosen]
    shades = dict(zip(dict.fromkeys(values), palette(len(set(values))), strict=True))
    looks = []
    for k, (run, value) in enumerate(zip(chosen, values, strict=True)):
        name = f"β₂ {plain(value)}" + (f", {called[run]}" if values.count(value) > 1 else "")
        looks.append(Look(run, name, shades[value], STYLES[values[:k].count(value) % len(STYLES)]))
    return looks


def beta2_pc1(runs: Sequence[Run]) -> Figure:
    """PC1 by beta2, raw and with unit rows, beside the decaying walk's, and the excess over it.

    A run that diverged has too few rows for a share to be compared; it is named and left out.

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
            if diverged(run):
                continue
            try:
                found = Subject.of(run).calibrate()[name]
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
        for beta2 in {float(facts(run)["beta2"]) for run in chosen if diverged(run)}:
            place = (values.index(beta2), 0.5)
            axes.annotate("diverged", place, xycoords=("data", "axes fraction"), ha="center", rotation=90, fontsize=8)
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
    called, told = names(runs), optimizer_labels(chosen)
    looks = looks_of(chosen, [f"{called[run]}: {label}" for run, label in zip(chosen, told, strict=True)])
    figure = Figure(figsize=(WIDTH, 4.8 + legend_rows(looks) * LINE_HEIGHT))
    grid = figure.subplots(2, 2)
    bars = grid[0, 0]
    for x, look in enumerate(looks):
        try:
            found = Subject.of(look.run).calibrate()
        except UserError:
            continue
        if look.diverged:
            continue
        for name, shift, alpha in (("pc1", -0.2, 1.0), ("pc1_unit", 0.2, 0.5)):
            bars.bar([x + shift], [100 * found[name].value], 0.36, color=look.colour, alpha=alpha)
            bars.plot([x + shift], [100 * found[name].walk], "x", ms=5, color="black")
            bars.plot([x + shift], [100 * found[name].decay], "d", ms=5, mfc="white", color="black")
    bars.set_xticks([])
    bars.set_ylim(0, 105)
    bars.set_title("PC1 %, raw and unit rows (pale); × walk, ◇ decaying", fontsize=8)
    for axes, curve in zip(grid.flat[1:], _curves("loss", "p_ood", "cos"), strict=True):
        draw(axes, looks, curve)
        axes.set_xlabel("step")
    legend(figure, looks)
    return figure


def matched_loss(runs: Sequence[Run]) -> Figure:
    """p_ood and the PC1 of the path so far against validation loss, so that runs are compared at equal loss.

    Each run up to its lowest loss: what it does when it over-fits is no progress. A run that diverged is left out.

    Raises:
        UserError: Fewer than two runs were evaluated.
    """
    chosen = [run for run in from_scratch(runs) if len(run.series("val/loss")) > 1 and not diverged(run)]
    if len(chosen) < 2:
        raise UserError("fewer than two runs have a validation loss to be compared at")
    looks = named(chosen, runs)
    astray = _ASTRAY * min(float(run.series("val/loss").iloc[0]) for run in chosen)
    figure = Figure(figsize=(WIDTH, 3.0 + legend_rows(looks) * LINE_HEIGHT))
    pair = figure.subplots(1, 2)
    for axes, curve in zip(pair, _curves("p_ood", "pc1"), strict=True):
        for look in looks:
            try:
                found = curve.measure(look.run)
            except UserError:
                continue  # a run that never moved
            _against_loss(axes, look, astray, found.steps, found.values, {"marker": "o", "ls": look.style})
            if found.null is not None:
                _against_loss(axes, look, astray, found.steps, found.null, {"ls": ":"})
        axes.set_xlabel("validation loss, nats")
        axes.set_title(curve.title, fontsize=9)
        _loss_axis(axes)
    legend(figure, looks)
    return figure


def _against_loss(
    axes: Axes, look: Look, most: float, steps: Iterable[int], values: Iterable[float], style: Mapping[str, Any]
) -> None:
    """Draw values at the losses of their steps, of those up to a loss and until the lowest one."""
    series = look.run.series("val/loss")
    kept = series.iloc[: int(series.argmin()) + 1]
    loss = {step: value for step, value in kept.items() if value <= most}
    pairs = [(loss[step], value) for step, value in zip(steps, values, strict=True) if step in loss]
    if pairs:
        axes.plot(*zip(*pairs, strict=True), ms=2.5, lw=1, color=look.colour, **style)


def _loss_axis(axes: Axes) -> None:
    """Make the axis of losses logarithmic and falling, with whole numbers on it: most happens at low losses."""
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_xlim()
    shown = [value for value in (1, 2, 3, 4, 6, 8, 10, 12) if low <= value <= high]
    axes.set_xticks(shown, [str(value) for value in shown])
    axes.set_xlim(high, low)


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
