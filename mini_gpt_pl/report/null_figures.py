"""Figures of one run that put its path beside the two nulls: single numbers, blocks, updates and initial weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.figures.plotting import BACKBONE, GREY, NULL, PC2, RESIDUAL, WIDTH, legend_below
from mini_gpt_pl.geometry.path import nulls, pca
from mini_gpt_pl.geometry.path.nulls import Calibrated
from mini_gpt_pl.metrics.registry import statistics
from mini_gpt_pl.report.subject import Subject
from mini_gpt_pl.runs.folder import Run

_SHARES = (
    "pc1",
    "pc1_unit",
    "pc1_corrected",
    "pc2",
    "pc2_unit",
    "cos_theta0",
    "fraction",
    "persistence",
    "autocorrelation",
    "autocorrelation_off",
    "windows_origin_anchored",
    "windows_self_anchored",
    "windows_against_global",
    "update_alignment",
    "update_alignment_past",
)
_COUNTS = ("k95", "k99", "k95_unit", "k99_unit", "participation", "participation_updates")
_MEASURED: dict[str, Any] = {"ls": "", "marker": "o", "ms": 5, "color": BACKBONE, "label": "measured"}
_WALK: dict[str, Any] = {"ls": "", "marker": "x", "ms": 5, "color": RESIDUAL, "label": "walk"}
_DECAY: dict[str, Any] = {"ls": "", "marker": "d", "ms": 5, "mfc": "none", "color": NULL, "label": "decaying walk"}


def against_nulls(run: Run) -> Figure:
    """Every calibrated number as a point beside the same number of both walks, and its excess over the decaying one.

    Raises:
        UserError: The run has no path.
    """
    found = Subject.of(run).calibrate()
    parts = [[name for name in names if name in found] for names in (_SHARES, _COUNTS)]
    figure = Figure(figsize=(WIDTH, 6.2))
    grid = figure.subplots(
        2, 2, sharey="row", gridspec_kw={"height_ratios": [len(part) + 1 for part in parts], "width_ratios": (3, 2)}
    )
    for (left, right), names, title in zip(grid, parts, ("Shares and cosines", "Numbers of components"), strict=True):
        shown = [found[name] for name in names]
        _points(left, shown)
        _excesses(right, shown)
        labels = [statistics()[name].title.replace("v_b", "$v_b$").replace("theta_0", "$\\theta_0$") for name in names]
        left.set_yticks(range(len(names))[::-1], labels, fontsize=7.5)
        left.set_ylim(-0.6, len(names) - 0.4)
        left.set_title(title)
        right.set_title("Excess")
        for axes in (left, right):
            axes.axvline(0, color=NULL, lw=0.6)
            axes.margins(x=0.08)
            axes.tick_params(axis="x", labelsize=8)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _points(axes: Axes, found: Sequence[Calibrated]) -> None:
    heights = range(len(found))[::-1]
    axes.plot([one.walk for one in found], heights, **_WALK)
    axes.plot([one.decay for one in found], heights, **_DECAY)
    axes.plot([one.value for one in found], heights, **_MEASURED)


def _excesses(axes: Axes, found: Sequence[Calibrated]) -> None:
    """Measured minus decaying walk, with its 95 % interval where there is one."""
    heights = range(len(found))[::-1]
    axes.plot([one.excess for one in found], heights, **_MEASURED)
    for height, one in zip(heights, found, strict=True):
        if one.low == one.low:
            axes.plot([one.low, one.high], [height, height], color=BACKBONE, lw=5, alpha=0.3, solid_capstyle="butt")


def blocks(run: Run) -> Figure:
    """PC1 of every parameter group and of the whole, raw and with unit rows, beside both nulls.

    Raises:
        UserError: The run has no path.
    """
    trajectory = run.trajectory
    rows = run.drift_rows
    moved = [name for name in trajectory.groups if float(pca.norms(trajectory.gram(name), rows).max()) > 0]
    names: list[str | None] = [*moved, None]
    figure = Figure(figsize=(WIDTH, 3.4))
    for axes, unit in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
        for style, kind in ((_WALK, "walk"), (_DECAY, "decay"), (_MEASURED, "")):
            shares = [100 * _pc1(run, name, kind, unit=unit) for name in names]
            axes.plot(range(len(names)), shares, **style)
        axes.axvline(len(moved) - 0.5, color=GREY, lw=0.8)
        labels = [run.trunk if name is None else name.removeprefix("blocks.") for name in names]
        crowded = max(map(len, labels[:-1]), default=0) > 4
        axes.set_xticks(range(len(names)), labels, rotation=90 if crowded else 0, fontsize=8)
        axes.set_title("Unit rows" if unit else "Raw drift", fontsize=10)
        axes.set_xlabel("parameter group")
    figure.axes[0].set_ylabel("PC1 of the drift, %")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _pc1(run: Run, group: str | None, kind: str, *, unit: bool) -> float:
    gram = run.trajectory.gram(group)
    if kind == "walk":
        gram = nulls.walk(gram)
    elif kind == "decay":
        gram = nulls.decaying_walk(gram, run.trajectory.survival)
    return pca.pca(gram, pca.drifts(len(gram))[1:], normalise=unit).pc1


def update_cosines(run: Run) -> Figure:
    """Cosines of all pairs of updates between snapshots, beside those of the decaying walk.

    Raises:
        UserError: The run has no path, or a single update.
    """
    trajectory = run.trajectory
    if len(trajectory) < 3:
        raise UserError(f"the run {run.path} has {len(trajectory)} snapshots: pairs of updates need three")
    run.drift_rows  # noqa: B018 (raises for a run without a path)
    gram = trajectory.gram()
    found = [_cosines(path) for path in (gram, nulls.decaying_walk(gram, trajectory.survival))]
    off = found[0][~torch.eye(len(found[0]), dtype=torch.bool)].abs()
    # The diagonal is 1 by definition, and neighbours may be far above the rest: colours span 98 % of the others.
    top = max(float(off.quantile(0.98)), 1e-3)
    figure = Figure(figsize=(WIDTH, 3.3), layout=ConstrainedLayoutEngine(wspace=0.08))
    edges = [float(step) for step in trajectory.steps]
    axes_pair = figure.subplots(1, 2, sharey=True)
    for axes, cosines, title in zip(axes_pair, found, ("Measured", "Decaying walk"), strict=True):
        colours = TwoSlopeNorm(0.0, -top, top)
        image = axes.pcolormesh(edges, edges, cosines, cmap="RdBu_r", norm=colours, rasterized=True)
        axes.set(title=title, xlabel="step", aspect="equal")
        axes.grid(visible=False)
    axes_pair[0].set_ylabel("step")
    figure.colorbar(image, ax=list(axes_pair), label="cosine of updates", extend="both", shrink=0.85)
    return figure


def _cosines(gram: pca.Gram) -> Float[Tensor, "T T"]:
    products = gram[1:, 1:]
    lengths = products.diagonal().clamp_min(0.0).sqrt()
    scale = lengths[:, None] * lengths
    return torch.where(scale > 0, products / scale.clamp_min(1e-300), 0.0)


def initial_weights(run: Run) -> Figure:
    """How the backbone lies to the initial weights, and how much of them is left.

    Left: cos(v_b, theta_0) with v_b of the snapshots up to each step. Right: <theta_t, theta_0> / ||theta_0||^2, beside
    the share prod(1 - lr wd) that weight decay alone leaves.

    Raises:
        UserError: The run has no path, or theta_0 is zero.
    """
    trajectory, n = run.trajectory, len(run.trajectory)
    gram, steps = trajectory.gram(), trajectory.steps
    run.drift_rows  # noqa: B018 (raises for a run without a path)
    if float(gram[0, 0]) <= 0:
        raise UserError(f"the initial weights of {run.path} are zero: nothing has a cosine with them")
    figure = Figure(figsize=(WIDTH, 3.3))
    left, right = figure.subplots(1, 2)
    left.plot(steps[1:], _cos_theta0(gram), "o-", ms=3, color=BACKBONE, label="measured")
    null = nulls.decaying_walk(gram, trajectory.survival)
    left.plot(steps[1:], _cos_theta0(null), ":", color=NULL, lw=1.2, label="decaying walk")
    left.axhline(0, color=RESIDUAL, lw=0.8, ls="--", label="walk")
    left.set(xlabel="step", ylabel="cos$(v_b,\\theta_0)$", title="Backbone of the past and $\\theta_0$")
    kept = 1 + pca.inner(gram, pca.drifts(n), pca.theta0(n)) / gram[0, 0]
    right.plot(steps, kept, "o-", ms=3, color=PC2, label="$\\langle\\theta_t,\\theta_0\\rangle/||\\theta_0||^2$")
    right.plot(steps, trajectory.survival, ":", color=NULL, lw=1.2, label="weight decay alone")
    right.set(xlabel="step", ylabel="share of $\\theta_0$ left", title="Surviving initial weights")
    right.set_ylim(bottom=min(0.0, right.get_ylim()[0]))
    Subject.of(run).mark(right, left)
    legend_below(left, 3)
    legend_below(right, 2)
    return figure


def _cos_theta0(gram: pca.Gram) -> list[float]:
    """cos(v_b, theta_0) with the snapshots 1 .. k, for every k; NaN while nothing has moved."""
    found = []
    for k in range(2, len(gram) + 1):
        part = gram[:k, :k]
        try:
            found.append(pca.cosine(part, pca.pca(part, pca.drifts(k)[1:]).backbone, pca.theta0(k)))
        except ValueError:
            found.append(float("nan"))
    return found


NULL_FIGURES: dict[str, Callable[[Run], Figure]] = {
    "against_nulls": against_nulls,
    "initial_weights": initial_weights,
    "blocks": blocks,
    "update_cosines": update_cosines,
}
