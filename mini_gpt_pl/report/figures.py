"""The figures of one run, drawn from its folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry import growth as growth_laws
from mini_gpt_pl.geometry import nulls, pca
from mini_gpt_pl.geometry.alignment import noise_floor
from mini_gpt_pl.runs import FIGURES, Run

_WINDOW = 10  # snapshots, as in the paper
BACKBONE, RESIDUAL, PROBE, GREY = "#1f5fa8", "#c0392b", "#7f8c8d", "#b0b7bd"
_STYLE: Any = {
    "font.family": "serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def draw_all(run: Run) -> list[Path]:
    """Draw every figure that the run's data allow, into its `figures` folder.

    Returns:
        The PNG files that were written.
    """
    written = []
    for name, draw in FIGURE_FUNCTIONS.items():
        try:
            with mpl.rc_context(_STYLE):
                figure = draw(run)
        except UserError:
            continue  # a run without a recorder has no trajectory to draw
        file = run.path / FIGURES / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150)
        written.append(file)
    return written


def learning(run: Run) -> Figure:
    """Loss on the left, probe accuracy on the right, against the optimizer step."""
    figure = Figure(figsize=(9, 3.4))
    left, right = figure.subplots(1, 2)
    _line(left, run.series("train/lm_loss"), "training, LM", GREY, lw=1)
    _line(left, run.series("train/probe_loss"), "training, probe", "#e5b8a0", lw=1)
    _line(left, run.series("val/loss"), "validation, LM", BACKBONE, marker="o", ms=3)
    left.set(xlabel="step", ylabel="nats per token", title="Loss")
    left.set_ylim(bottom=0)
    _line(right, run.series("probe/p_in"), "$p_{in}$, short gap", BACKBONE, marker="o", ms=3)
    _line(right, run.series("probe/p_ood"), "$p_{ood}$, long gap", RESIDUAL, marker="o", ms=3)
    right.set(xlabel="step", ylabel="exact match", title="Key retrieval", ylim=(-0.03, 1.03))
    for axes in (left, right):
        if axes.lines:
            axes.legend()
    return figure


def spectrum(run: Run) -> Figure:
    """Share of each principal component of the drift, whole trunk and blocks, raw and unit rows."""
    trajectory = run.trajectory
    rows = run.drift_rows
    figure = Figure(figsize=(9, 3.4))
    for axes, unit in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
        for group, moved in zip(trajectory.groups, trajectory.grams.diagonal(dim1=1, dim2=2)[:, 1:], strict=True):
            if not moved.any():
                continue  # frozen weights have no direction
            ratios = pca.pca(trajectory.gram(group), rows, normalise=unit).ratios
            axes.plot(range(1, len(ratios) + 1), ratios, color=GREY, lw=0.8)
        whole = pca.pca(trajectory.gram(), rows, normalise=unit)
        axes.plot(range(1, len(whole.ratios) + 1), whole.ratios, "o-", color=BACKBONE, ms=4)
        walk = pca.pca(nulls.walk(run.trajectory.gram()), rows, normalise=unit)
        axes.plot(range(1, len(walk.ratios) + 1), walk.ratios, "--", color=RESIDUAL, lw=1)
        axes.set_yscale("log")
        axes.set_ylim(1e-5, 1.5)
        axes.set(xlabel="component", title=f"{'unit rows' if unit else 'raw drift'}: PC1 {100 * whole.pc1:.1f} %")
    axes_left = figure.axes[0]
    axes_left.set_ylabel("share of squared drift")
    axes_left.plot([], [], "o-", color=BACKBONE, ms=4, label=run.trunk)
    axes_left.plot([], [], color=GREY, lw=0.8, label="its groups")
    axes_left.plot([], [], "--", color=RESIDUAL, lw=1, label="same step lengths, random directions")
    axes_left.legend(loc="lower left")
    return figure


def backbone(run: Run) -> Figure:
    """Backbone coordinate and residual norm with the probe's accuracy behind (paper, Figure 1)."""
    trajectory = run.trajectory
    gram, rows = trajectory.gram(), pca.drifts(len(trajectory))
    direction = pca.pca(gram, run.drift_rows).backbone
    split = pca.decompose(gram, rows, direction)
    cos0 = pca.cosine(gram, direction, pca.theta0(len(trajectory)))
    decayed = (1 - np.array(trajectory.survival)) * float(gram[0, 0]) ** 0.5
    figure = Figure(figsize=(7.5, 5.6))
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.plot(trajectory.steps, split.coordinate, "o-", ms=3, color=BACKBONE, label="$a(t)=\\langle x(t),v_b\\rangle$")
    top.plot(trajectory.steps, split.drift_norm, lw=1, color="black", label="$||x(t)||$")
    top.plot(trajectory.steps, decayed, ":", color="black", lw=1, label="moved by weight decay alone")
    top.set(ylabel="parameter units", title=f"{run.trunk}: backbone and residual;  cos$(v_b,\\theta_0)$ = {cos0:+.2f}")
    bottom.plot(trajectory.steps, split.residual_norm, "o-", ms=3, color=RESIDUAL, label="$||r(t)||$")
    bottom.set(xlabel="step", ylabel="parameter units")
    for axes in (top, bottom):
        twin = axes.twinx()
        twin.grid(visible=False)
        _line(twin, run.series("probe/p_ood"), "$p_{ood}$", PROBE, ls="--", lw=1)
        twin.set(ylim=(-0.03, 1.03), ylabel="$p_{ood}$")
        axes.plot([], [], "--", color=PROBE, lw=1, label="$p_{ood}$")
        axes.legend(loc="best", fontsize=8)
    return figure


def alignment(run: Run) -> Figure:
    """Gradients and updates beside the backbone (paper, Figure 2)."""
    trajectory, trunk = run.trajectory, run.trunk
    gram, rows = trajectory.gram(), run.drift_rows
    figure = Figure(figsize=(7.5, 4.6))
    axes = figure.subplots()
    steps = trajectory.steps[1:]
    whole = pca.update_alignment(gram, pca.pca(gram, rows).backbone)
    axes.plot(steps, whole, "--", color=BACKBONE, lw=1, alpha=0.7, label="update, whole-run $v_b$ (contains it)")
    axes.plot(steps, pca.past_update_alignment(gram), "o-", ms=3, color=BACKBONE, label="update, $v_b$ of its past")
    # Against a direction fitted with them included, orthogonal updates of the same lengths look like this.
    walk = nulls.walk(run.trajectory.gram())
    chance = pca.update_alignment(walk, pca.pca(walk, rows).backbone)
    axes.plot(steps, chance, ":", color="black", lw=1, label="random directions, whole-run $v_b$")
    for name, label, colour in (("lm", "LM gradient", "#2e8b57"), ("probe", "probe gradient", RESIDUAL)):
        _line(axes, run.series(f"alignment/{trunk}/{name}"), label, colour, marker=".", ls="", ms=5)
    _binned(axes, run.series(f"alignment/{trunk}/gradient"), trajectory.steps)
    floor = noise_floor(trajectory.dim)
    axes.axhspan(-floor, floor, color="black", alpha=0.12, lw=0)
    axes.axhline(0, color="black", lw=0.6)
    axes.set(
        xlabel="step", ylabel="cosine", title=f"{trunk}: alignment with the backbone; noise floor {floor:.1e} (band)"
    )
    axes.legend(fontsize=8)
    return figure


def growth(run: Run) -> Figure:
    """Power laws of coordinate and residual, and how a windowed first direction turns, each beside its null."""
    trajectory, steps = run.trajectory, run.trajectory.steps
    run.drift_rows  # noqa: B018 (raises for a run without a path)
    null = nulls.decaying_walk(trajectory.gram(), trajectory.survival)
    figure = Figure(figsize=(9, 3.6))
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
        curves = growth_laws.alignment_curves(gram, steps, run.border)
        if curves is not None:
            right.plot(
                curves.centres, curves.early, style, color=BACKBONE, label=f"with the early phase{suffix}", lw=1.2
            )
            right.plot(curves.centres, curves.late, style, color=RESIDUAL, label=f"with the late phase{suffix}", lw=1.2)
        if len(gram) > _WINDOW + 1:
            turning = pca.rolling_self_anchored(gram, _WINDOW)
            ends = [steps[end] for end in turning.ends]
            right.plot(ends, turning.cosines, style, color=PROBE, label=f"with the window before{suffix}", lw=1.2)
    hi = windows[0][1]
    left.set(xscale="log", yscale="log", xlabel="step", title=f"Growth; exponents over (0, {hi}]")
    left.xaxis.set_minor_formatter(NullFormatter())
    left.legend(fontsize=7)
    right.set(xlabel="step", ylim=(-0.03, 1.05), title=f"Windows of {_WINDOW} snapshots, |cos| of PC1")
    if right.lines:
        right.legend(fontsize=7)
    return figure


FIGURE_FUNCTIONS: dict[str, Callable[[Run], Figure]] = {
    "learning": learning,
    "spectrum": spectrum,
    "backbone": backbone,
    "alignment": alignment,
    "growth": growth,
}


def _line(axes: Axes, series: pd.Series[float], label: str, colour: str, **style: object) -> None:
    if len(series):
        axes.plot(series.index.to_numpy(), series.to_numpy(), label=label, color=colour, **style)  # type: ignore[arg-type]


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
