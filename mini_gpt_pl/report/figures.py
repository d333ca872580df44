"""The figures that every run draws when it ends: learning, spectrum, backbone, alignment and growth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.figures import trajectory_figures
from mini_gpt_pl.figures.plotting import (
    BACKBONE,
    NULL,
    PC2,
    PROBE,
    RESIDUAL,
    STYLE,
    SWITCH,
    WIDTH,
    dots,
    legend_below,
    line,
    plain_log_steps,
    save,
)
from mini_gpt_pl.geometry.path import growth as growth_laws
from mini_gpt_pl.geometry.path import nulls, pca
from mini_gpt_pl.geometry.vectors.alignment import noise_floor
from mini_gpt_pl.report.contents import contents_of
from mini_gpt_pl.report.learning import learning_curves
from mini_gpt_pl.report.subject import Subject, estimate
from mini_gpt_pl.runs.folder import FIGURES, Run

_WINDOW = 10  # snapshots


def draw_all(run: Run) -> list[Path]:
    """Draw every figure that the run's data allow, into its `figures` folder.

    Returns:
        The PNG files that were written.
    """
    subject, written = Subject.of(run), []
    for name, draw in {**FIGURE_FUNCTIONS, **contents_of([subject]).figures}.items():
        try:
            with mpl.rc_context(STYLE):
                figure = draw(subject)
        except UserError:
            continue  # a run without a recorder has no trajectory to draw
        written += save(figure, run.path / FIGURES, name)
    return written


def spectrum(run: Run) -> Figure:
    """Share of each principal component of the drift, whole selection and groups, raw and unit rows."""
    return trajectory_figures.spectrum(run.trajectory, run.trunk)


def backbone(run: Run) -> Figure:
    """Backbone coordinate and residual norm, with the metric behind that the run's study puts there."""
    run = Subject.of(run)
    trajectory = run.trajectory
    gram, rows, steps = trajectory.gram(), pca.drifts(len(trajectory)), trajectory.steps
    direction = pca.pca(gram, run.drift_rows).backbone
    split = pca.decompose(gram, rows, direction)
    cos0 = pca.cosine(gram, direction, pca.theta0(len(trajectory)))
    null = nulls.decaying_walk(gram, trajectory.survival)
    walked = pca.decompose(null, rows, pca.pca(null, rows[1:]).backbone)
    decayed = (1 - np.array(trajectory.survival)) * float(gram[0, 0]) ** 0.5
    figure = Figure(figsize=(WIDTH, 5.6))
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.plot(steps, split.coordinate, "o-", ms=3, color=BACKBONE, label="$a(t)=\\langle x(t),v_b\\rangle$")
    top.plot(steps, walked.coordinate, ":", lw=1.2, color=BACKBONE, label="the same, decaying walk")
    top.plot(steps, split.drift_norm, lw=1, color="black", label="$||x(t)||$")
    top.plot(steps, decayed, "-.", color="black", lw=0.9, label="moved by weight decay alone")
    top.set(ylabel="parameter units", title=f"{run.trunk}: backbone and residual;  cos$(v_b,\\theta_0)$ = {cos0:+.2f}")
    bottom.plot(steps, split.residual_norm, "o-", ms=3, color=RESIDUAL, label="$||r(t)||$")
    bottom.plot(steps, walked.residual_norm, ":", lw=1.2, color=RESIDUAL, label="the same, decaying walk")
    bottom.set(xlabel="step", ylabel="parameter units")
    run.mark(top, bottom)
    for axes, drop in ((top, 8.0), (bottom, 34.0)):
        if run.backdrop.behind is not None:
            _behind(run, axes, *run.backdrop.behind)
        legend_below(axes, 3, drop=drop)
    return figure


def _behind(run: Run, axes: Axes, metric: str, label: str) -> None:
    """Draw a share on an axis of its own behind the curves of another, and enter it in their legend."""
    twin = axes.twinx()
    twin.grid(visible=False)
    twin.spines["right"].set_visible(True)
    line(twin, run.series(metric), label, PROBE, ls="--", lw=1)
    twin.set(ylim=(-0.03, 1.03), ylabel=label)
    axes.plot([], [], "--", color=PROBE, lw=1, label=label)


def alignment(run: Run) -> Figure:
    """Gradients and updates beside the backbone.

    The band spans what orthogonal updates of the same lengths show against a direction fitted to themselves, with and
    without weight decay.
    """
    run = Subject.of(run)
    trajectory, trunk = run.trajectory, run.trunk
    gram, rows, steps = trajectory.gram(), run.drift_rows, trajectory.steps[1:]
    decaying = nulls.decaying_walk(gram, trajectory.survival)
    figure = Figure(figsize=(WIDTH, 4.6))
    axes = figure.subplots()
    whole, chance, decayed = (
        pca.update_alignment(path, pca.pca(path, rows).backbone) for path in (gram, nulls.walk(gram), decaying)
    )
    axes.fill_between(steps, chance, decayed, color=NULL, alpha=0.08, lw=0)
    axes.plot(steps, whole, "--", color=BACKBONE, lw=1, alpha=0.7, label="update, whole-run $v_b$ (contains it)")
    axes.plot(steps, chance, ":", color=NULL, lw=1, label="random directions, whole-run $v_b$")
    axes.plot(steps, decayed, "-.", color=NULL, lw=0.8, label="the same, decaying")
    axes.plot(steps, pca.past_update_alignment(gram), "o-", ms=3, color=BACKBONE, label="update, $v_b$ of its past")
    axes.plot(
        steps, pca.past_update_alignment(decaying), ":", color=BACKBONE, lw=1.4, label="decaying walk, $v_b$ up to then"
    )
    if run.has_metrics:
        for (name, words), colour in zip(run.backdrop.losses.items(), (PC2, RESIDUAL, SWITCH), strict=False):
            series = run.series(f"alignment/{trunk}/{name}")
            line(axes, series, f"{words} gradient", colour, marker=".", ls="", ms=5)
        _binned(axes, run.series(f"alignment/{trunk}/gradient"), trajectory.steps)
    if replayed := run.replayed_at("gradient", "combined", trunk, "abs_cos"):
        mean, spread = zip(*map(estimate, replayed.values()), strict=True)
        label = "replayed gradient, |cos| with whole-run $v_b$"
        dots(axes, list(replayed), mean, spread, fmt="D", mfc="white", color="black", label=label)
    floor = noise_floor(trajectory.dim)
    axes.axhspan(-floor, floor, color="black", alpha=0.12, lw=0)
    axes.axhline(0, color="black", lw=0.6)
    title = f"{trunk}: alignment with the backbone; noise floor {floor:.1e} (band)"
    axes.set(xlabel="step", ylabel="cosine", title=title)
    run.mark(axes)
    legend_below(axes)
    return figure


def growth(run: Run) -> Figure:
    """Power laws of coordinate and residual, and how a windowed first direction turns, each beside its null."""
    run = Subject.of(run)
    trajectory, steps = run.trajectory, run.trajectory.steps
    run.drift_rows  # noqa: B018 (raises for a run without a path)
    null = nulls.decaying_walk(trajectory.gram(), trajectory.survival)
    figure = Figure(figsize=(WIDTH, 3.9))
    left, right = figure.subplots(1, 2)
    windows = growth_laws.scaled_windows(steps[-1])[:1]
    for gram, style, suffix in ((trajectory.gram(), "-", ""), (null, ":", ", decaying walk")):
        split = growth_laws.split_drift(gram)
        fit = growth_laws.regimes(steps[1:], split, windows)[0]
        for values, law, colour, name in (
            (split.coordinate, fit.coordinate, BACKBONE, "|a|"),
            (split.residual_norm, fit.residual, RESIDUAL, "||r||"),
        ):
            exponent = f" ~ $t^{{{law.exponent:.2f}}}$" if law else ""
            left.plot(steps[1:], values.abs(), style, color=colour, label=f"{name}{exponent}{suffix}", lw=1.2)
        _turning(right, run, gram, style, measured=not suffix)
    left.set(yscale="log", xlabel="step", ylabel="parameter units")
    left.set_title(f"Growth; exponents over (0, {windows[0][1]:,}]", fontsize=9)
    plain_log_steps(left, steps[1:])
    right.set(xlabel="step", ylabel="|cos| of first directions", ylim=(-0.03, 1.05))
    right.set_title(f"Windows of {_WINDOW} snapshots", fontsize=9)
    if right.lines:
        right.plot([], [], ":", color=NULL, lw=1.2, label="decaying walk")
    for axes in (left, right):
        legend_below(axes, 1)
    return figure


def _turning(axes: Axes, run: Subject, gram: pca.Gram, style: str, *, measured: bool) -> None:
    """Draw how each window's first direction lies to both phases' and to that of the window before."""
    steps = run.trajectory.steps

    def draw(x: list[float], y: pca.Direction, colour: str, label: str) -> None:
        axes.plot(x, y, style, color=colour, label=label if measured else "_null", lw=1.2)

    if (curves := growth_laws.alignment_curves(gram, steps, run.border)) is not None:
        draw(curves.centres, curves.early, BACKBONE, "with the early phase")
        draw(curves.centres, curves.late, RESIDUAL, "with the late phase")
    if len(gram) > _WINDOW + 1:
        turning = pca.rolling_self_anchored(gram, _WINDOW)
        draw([float(steps[end]) for end in turning.ends], turning.cosines, PROBE, "with the window before")


FIGURE_FUNCTIONS: dict[str, Callable[[Run], Figure]] = {
    "learning": learning_curves,
    "spectrum": spectrum,
    "backbone": backbone,
    "alignment": alignment,
    "growth": growth,
}
"""The figures that are cheap enough to close every run."""


def _binned(axes: Axes, series: pd.Series[float], edges: list[int]) -> None:
    """Mean and standard deviation of single-batch values between snapshots."""
    if not len(series):
        return
    bins = pd.cut(series.index.to_series(), edges)
    grouped = series.groupby(bins.to_numpy(), observed=True)
    mean, spread = grouped.mean(), grouped.std().fillna(0.0)
    centres = [interval.mid for interval in mean.index]
    axes.errorbar(
        centres, mean, yerr=spread, fmt="s", ms=3, color=PROBE, lw=1, label="single-batch gradient, mean and sd"
    )
