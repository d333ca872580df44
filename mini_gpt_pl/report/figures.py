"""The figures of one run of any task: its path beside both nulls, and what its probes or a replay measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text
from torch import Tensor

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.figures import plotting, trajectory_figures
from mini_gpt_pl.figures.plotting import BACKBONE, GREY, NULL, PC2, PROBE, RESIDUAL, SWITCH, WIDTH, legend_below, line
from mini_gpt_pl.figures.trajectory_figures import drift_rows, growing, moved_groups
from mini_gpt_pl.geometry.path import growth as growth_laws
from mini_gpt_pl.geometry.path import pca
from mini_gpt_pl.metrics.registry import statistics
from mini_gpt_pl.report.contents import Shown, contents_of
from mini_gpt_pl.report.learning import learning_curves
from mini_gpt_pl.report.probe_tables import fisher_survey
from mini_gpt_pl.report.subject import WINDOW, Subject, estimate
from mini_gpt_pl.runs.folder import FIGURES, Run

# Points of the walk, of the decaying walk and of what was measured.
_WALK: dict[str, Any] = {"ls": "", "marker": "x", "ms": 5, "color": RESIDUAL, "label": "walk"}
_DECAY: dict[str, Any] = {"ls": "", "marker": "d", "ms": 5, "mfc": "none", "color": NULL, "label": "decaying walk"}
_MEASURED: dict[str, Any] = {"ls": "", "marker": "o", "ms": 5, "color": BACKBONE, "label": "measured"}
_DOTTED: dict[str, Any] = {"ls": ":", "lw": 1.2}
_COUNTS = ("components", "directions")  # units of the registry

# Directions of the Fisher figure: key, name, colour, marker.
_DIRECTIONS = (
    ("backbone", "$v_b$", BACKBONE, "o"),
    ("switch", "$v_{sw}$", SWITCH, "s"),
    ("pc2", "PC2", PC2, "^"),
    ("theta0", "$\\theta_0$", "#7d3c98", "v"),
)


def spectrum(run: Run) -> Figure:
    """Share of each principal component of the drift, whole selection and groups, raw and unit rows."""
    return trajectory_figures.spectrum(run.trajectory, Subject.of(run).whole)


def backbone(run: Run) -> Figure:
    """Backbone coordinate and residual norm, with the metric behind that the run's study puts there."""
    run = Subject.of(run)
    trajectory, paths = run.trajectory, run.paths()
    rows, steps = pca.drifts(len(trajectory)), trajectory.steps
    directions = [pca.pca(path, rows[1:]).backbone for path in (paths.measured, paths.decaying)]
    split = pca.decompose(paths.measured, rows, directions[0])
    walked = pca.decompose(paths.decaying, rows, directions[1])
    cos0 = pca.cosine(paths.measured, directions[0], pca.theta0(len(trajectory)))
    decayed = (1 - np.array(trajectory.survival)) * float(paths.measured[0, 0]) ** 0.5
    figure = Figure(figsize=(WIDTH, 5.6))
    top, bottom = figure.subplots(2, 1, sharex=True)
    for axes, measured, null, colour, label in (
        (top, split.coordinate, walked.coordinate, BACKBONE, "$a(t)=\\langle x(t),v_b\\rangle$"),
        (bottom, split.residual_norm, walked.residual_norm, RESIDUAL, "$||r(t)||$"),
    ):
        axes.plot(steps, measured, "o-", ms=3, color=colour, label=label)
        axes.plot(steps, null, **_DOTTED, color=colour, label="the same, decaying walk")
    top.plot(steps, split.drift_norm, lw=1, color="black", label="$||x(t)||$")
    top.plot(steps, decayed, "-.", color="black", lw=0.9, label="moved by weight decay alone")
    top.set(ylabel="parameter units", title=f"{run.whole}: backbone and residual;  cos$(v_b,\\theta_0)$ = {cos0:+.2f}")
    bottom.set(xlabel="step", ylabel="parameter units")
    run.mark(top, bottom)
    for axes, drop in ((top, 8.0), (bottom, 34.0)):
        if run.backdrop.behind is not None:
            metric, label = run.backdrop.behind
            twin = axes.twinx()
            twin.grid(visible=False)
            twin.spines["right"].set_visible(True)
            line(twin, run.series(metric), label, PROBE, ls="--", lw=1)
            twin.set(ylim=(-0.03, 1.03), ylabel=label)
            axes.plot([], [], "--", color=PROBE, lw=1, label=label)
        legend_below(axes, 3, drop=drop)
    return figure


def alignment(run: Run) -> Figure:
    """Gradients and updates beside the backbone.

    The band spans what orthogonal updates of the same lengths show against a direction fitted to themselves, with and
    without weight decay.
    """
    run = Subject.of(run)
    trajectory, trunk, paths = run.trajectory, run.trunk, run.paths()
    rows, steps = drift_rows(trajectory), trajectory.steps[1:]
    figure = Figure(figsize=(WIDTH, 4.6))
    axes = figure.subplots()
    whole, chance, decayed = (pca.update_alignment(path, pca.pca(path, rows).backbone) for path in paths)
    past, walked = (pca.past_update_alignment(path) for path in (paths.measured, paths.decaying))
    axes.fill_between(steps, chance, decayed, color=NULL, alpha=0.08, lw=0)
    axes.plot(steps, whole, "--", color=BACKBONE, lw=1, alpha=0.7, label="update, whole-run $v_b$ (contains it)")
    axes.plot(steps, chance, ":", color=NULL, lw=1, label="random directions, whole-run $v_b$")
    axes.plot(steps, decayed, "-.", color=NULL, lw=0.8, label="the same, decaying")
    axes.plot(steps, past, "o-", ms=3, color=BACKBONE, label="update, $v_b$ of its past")
    axes.plot(steps, walked, ":", color=BACKBONE, lw=1.4, label="decaying walk, $v_b$ up to then")
    if run.has_metrics:
        for (name, words), colour in zip(run.backdrop.losses.items(), (PC2, RESIDUAL, SWITCH), strict=False):
            series = run.series(f"alignment/{trunk}/{name}")
            line(axes, series, f"{words} gradient", colour, marker=".", ls="", ms=5)
        _binned(axes, run.series(f"alignment/{trunk}/gradient"), trajectory.steps)
    if replayed := run.replayed_at("gradient", "combined", trunk, "abs_cos"):
        mean, spread = zip(*map(estimate, replayed.values()), strict=True)
        label = "replayed gradient, |cos| with whole-run $v_b$"
        plotting.dots(axes, list(replayed), mean, spread, fmt="D", mfc="white", color="black", label=label)
    floor = run.floor(trunk)
    axes.axhspan(-floor, floor, color="black", alpha=0.12, lw=0)
    axes.axhline(0, color="black", lw=0.6)
    title = f"{run.whole}: alignment with the backbone; noise floor {floor:.1e} (band)"
    axes.set(xlabel="step", ylabel="cosine", title=title)
    run.mark(axes)
    legend_below(axes)
    return figure


def _binned(axes: Axes, series: pd.Series[float], edges: list[int]) -> None:
    """Mean and standard deviation of single-batch values between snapshots."""
    if len(series):
        grouped = series.groupby(pd.cut(series.index.to_series(), edges).to_numpy(), observed=True)
        mean, spread = grouped.mean(), grouped.std().fillna(0.0)
        centres = [interval.mid for interval in mean.index]
        label = "single-batch gradient, mean and sd"
        axes.errorbar(centres, mean, yerr=spread, fmt="s", ms=3, color=PROBE, lw=1, label=label)


def growth(run: Run) -> Figure:
    """Power laws of coordinate and residual, and how a windowed first direction turns, each beside its null."""
    run = Subject.of(run)
    steps, paths = run.trajectory.steps, run.paths()
    figure = Figure(figsize=(WIDTH, 3.9))
    left, right = figure.subplots(1, 2)
    windows = growth_laws.scaled_windows(steps[-1])[:1]
    for gram, style, suffix in ((paths.measured, "-", ""), (paths.decaying, ":", ", decaying walk")):
        split = growth_laws.split_drift(gram)
        fit = growth_laws.regimes(steps[1:], split, windows)[0]
        for values, law, colour, name in (
            (split.coordinate, fit.coordinate, BACKBONE, "|a|"),
            (split.residual_norm, fit.residual, RESIDUAL, "||r||"),
        ):
            exponent = f" ~ $t^{{{law.exponent:.2f}}}$" if law else ""
            left.plot(steps[1:], values.abs(), style, color=colour, label=f"{name}{exponent}{suffix}", lw=1.2)
        # How each window's first direction lies to both phases' and to that of the window before.
        turns: list[tuple[list[float], Tensor, str, str]] = []
        if (curves := growth_laws.alignment_curves(gram, steps, run.border)) is not None:
            turns.append((curves.centres, curves.early, BACKBONE, "with the early phase"))
            turns.append((curves.centres, curves.late, RESIDUAL, "with the late phase"))
        if len(gram) > WINDOW + 1:
            turning = pca.rolling_self_anchored(gram, WINDOW)
            turns.append(([steps[end] for end in turning.ends], turning.cosines, PROBE, "with the window before"))
        for x, y, colour, label in turns:
            right.plot(x, y, style, color=colour, label="_null" if suffix else label, lw=1.2)
    left.set(yscale="log", xlabel="step", ylabel="parameter units")
    left.set_title(f"Growth; exponents over (0, {windows[0][1]:,}]", fontsize=9)
    plotting.plain_log_steps(left, steps[1:])
    right.set(xlabel="step", ylabel="|cos| of first directions", ylim=(-0.03, 1.05))
    right.set_title(f"Windows of {WINDOW} snapshots", fontsize=9)
    if right.lines:
        right.plot([], [], **_DOTTED, color=NULL, label="decaying walk")
    for axes in (left, right):
        legend_below(axes, 1)
    return figure


# ------------------------------------------------------------------------------------------------ beside the nulls


def against_nulls(run: Run) -> Figure:
    """Every calibrated number as a point beside the same number of both walks, and its excess over the decaying one.

    Lengths, in parameter units, have no place on these axes.
    """
    calibrated = Subject.of(run).calibrate()
    names = [name for name, one in statistics().items() if name in calibrated and one.unit != "parameter units"]
    parts = [[name for name in names if (statistics()[name].unit in _COUNTS) is counts] for counts in (False, True)]
    figure = Figure(figsize=(WIDTH, 6.2))
    ratios = {"height_ratios": [len(part) + 1 for part in parts], "width_ratios": (3, 2)}
    grid = figure.subplots(2, 2, sharey="row", gridspec_kw=ratios)
    for (left, right), part, title in zip(grid, parts, ("Shares and cosines", "Numbers of components"), strict=True):
        numbers, heights = [calibrated[name] for name in part], range(len(part))[::-1]
        left.plot([one.walk for one in numbers], heights, **_WALK)
        left.plot([one.decay for one in numbers], heights, **_DECAY)
        left.plot([one.value for one in numbers], heights, **_MEASURED)
        right.plot([one.excess for one in numbers], heights, **_MEASURED)
        for height, one in zip(heights, numbers, strict=True):
            if one.low == one.low:  # there is an interval
                bar: dict[str, Any] = {"lw": 5, "alpha": 0.3, "solid_capstyle": "butt"}
                right.plot([one.low, one.high], [height, height], color=BACKBONE, **bar)
        labels = [statistics()[name].title for name in part]
        labels = [label.replace("v_b", "$v_b$").replace("theta_0", "$\\theta_0$") for label in labels]
        left.set_yticks(heights, labels, fontsize=7.5)
        left.set_ylim(-0.6, len(part) - 0.4)
        left.set_title(title)
        right.set_title("Excess")
        for axes in (left, right):
            axes.axvline(0, color=NULL, lw=0.6)
            axes.margins(x=0.08)
            axes.tick_params(axis="x", labelsize=8)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def blocks(run: Run) -> Figure:
    """PC1 of every parameter group and of the whole, raw and with unit rows, beside both nulls."""
    run = Subject.of(run)
    rows, names = drift_rows(run.trajectory), [*moved_groups(run.trajectory), None]
    figure = Figure(figsize=(WIDTH, 3.4))
    for axes, unit in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
        shares = [[100 * pca.pca(path, rows, normalise=unit).pc1 for path in run.paths(name)] for name in names]
        for style, of_path in zip((_MEASURED, _WALK, _DECAY), zip(*shares, strict=True), strict=True):
            axes.plot(range(len(names)), of_path, **style)
        axes.axvline(len(names) - 1.5, color=GREY, lw=0.8)
        labels = [run.whole if name is None else name.removeprefix("blocks.") for name in names]
        crowded = max(map(len, labels[:-1]), default=0) > 4
        axes.set_xticks(range(len(names)), labels, rotation=90 if crowded else 0, fontsize=8)
        axes.set_title("Unit rows" if unit else "Raw drift", fontsize=10)
        axes.set_xlabel("parameter group")
    figure.axes[0].set_ylabel("PC1 of the drift, %")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def update_cosines(run: Run) -> Figure:
    """Cosines of all pairs of updates between snapshots, beside those of the decaying walk."""
    run = Subject.of(run)
    if len(run.trajectory) < 3:
        raise UserError(f"the run {run.path} has {len(run.trajectory)} snapshots: pairs of updates need three")
    pair = [_cosines(path) for path in (run.paths().measured, run.paths().decaying)]
    # The diagonal is 1 by definition, and neighbours may be far above the rest: colours span 98 % of the others.
    top = max(float(pair[0][~torch.eye(len(pair[0]), dtype=torch.bool)].abs().quantile(0.98)), 1e-3)
    figure = Figure(figsize=(WIDTH, 3.3), layout=ConstrainedLayoutEngine(wspace=0.08))
    edges = [float(step) for step in run.trajectory.steps]
    axes_pair = figure.subplots(1, 2, sharey=True)
    for axes, cosines, title in zip(axes_pair, pair, ("Measured", "Decaying walk"), strict=True):
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
    """
    run = Subject.of(run)
    steps, paths, n = run.trajectory.steps, run.paths(), len(run.trajectory)
    gram = paths.measured
    if float(gram[0, 0]) <= 0:
        raise UserError(f"the initial weights of {run.path} are zero: nothing has a cosine with them")
    figure = Figure(figsize=(WIDTH, 3.3))
    left, right = figure.subplots(1, 2)
    left.plot(steps[1:], growing(gram, cos_theta0), "o-", ms=3, color=BACKBONE, label="measured")
    left.plot(steps[1:], growing(paths.decaying, cos_theta0), **_DOTTED, color=NULL, label="decaying walk")
    left.axhline(0, color=RESIDUAL, lw=0.8, ls="--", label="walk")
    left.set(xlabel="step", ylabel="cos$(v_b,\\theta_0)$", title="Backbone of the past and $\\theta_0$")
    share = 1 + pca.inner(gram, pca.drifts(n), pca.theta0(n)) / gram[0, 0]
    right.plot(steps, share, "o-", ms=3, color=PC2, label="$\\langle\\theta_t,\\theta_0\\rangle/||\\theta_0||^2$")
    right.plot(steps, run.trajectory.survival, **_DOTTED, color=NULL, label="weight decay alone")
    right.set(xlabel="step", ylabel="share of $\\theta_0$ left", title="Surviving initial weights")
    right.set_ylim(bottom=min(0.0, right.get_ylim()[0]))
    run.mark(right, left)
    legend_below(left, 3)
    legend_below(right, 2)
    return figure


def cos_theta0(gram: pca.Gram) -> float:
    """cos(v_b, theta_0) of a path."""
    return pca.cosine(gram, pca.pca(gram, pca.drifts(len(gram))[1:]).backbone, pca.theta0(len(gram)))


# ---------------------------------------------------------------------------------------------- probes and replays


def gradients(run: Run) -> Figure:
    """|cos| of single-batch gradients with the backbone on a logarithmic axis, beside that of isotropic noise.

    Of a replay where there is one (mean and standard deviation over batches, whole-run v_b), else as measured live
    against v_b of the past.
    """
    run = Subject.of(run)
    figure = Figure(figsize=(WIDTH, 3.8))
    axes = figure.subplots()
    axes.set_yscale("log")
    for (metric, (part, label)), colour in zip(run.gradient_parts.items(), (PROBE, PC2, RESIDUAL), strict=False):
        measured = run.estimates(("gradient", part, run.trunk, "abs_cos"), f"alignment/{run.trunk}/{metric}")
        if measured.live:
            live = run.series(f"alignment/{run.trunk}/{metric}").abs()
            line(axes, live[live > 0], f"{label}, single batches", colour, marker=".", ls="", ms=4)
        elif measured.values:
            mean, spread = zip(*measured.values.values(), strict=True)
            words = f"{label}, mean and sd of batches"
            plotting.dots(axes, list(measured.values), mean, spread, fmt="o-", color=colour, label=words)
    if not axes.has_data():
        raise UserError(f"the run {run.path} measured no gradients: train it with GradientAlignment, or replay it")
    floor = run.floor(run.trunk)
    axes.axhline(floor, color=NULL, **_DOTTED, label=f"isotropic noise, {floor:.1e}")
    against = "whole-run $v_b$, replayed" if run.replayed_at("gradient") else "$v_b$ of the past, live"
    axes.set(xlabel="step", ylabel="|cos|", title=f"{run.whole}: gradients and the {against}")
    run.mark(axes)
    legend_below(axes)
    return figure


def fisher(run: Run) -> Figure:
    """Rayleigh quotients over tr(F)/D, and the anisotropy along the backbone.

    tr(F)/D is the mean over random directions, so that an isotropic Fisher is 1 in both panels.
    """
    run = Subject.of(run)
    survey, dim = fisher_survey(run), run.trajectory.dim
    if not survey:
        raise UserError(f"the run {run.path} has no Fisher measurements: train it with FisherProbe, or replay it")
    figure = Figure(figsize=(WIDTH, 5.0))
    top, bottom = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 2]})
    top.set_yscale("log")
    scaled = {step: row for step, row in survey.items() if row["trace"][0] > 0}
    for key, label, colour, marker in _DIRECTIONS:
        scales = {step: row["trace"][0] / dim for step, row in scaled.items() if f"q_{key}" in row}
        values, errors = ([scaled[step][f"q_{key}"][k] / scale for step, scale in scales.items()] for k in (0, 1))
        if scales:
            plotting.dots(top, list(scales), values, errors, fmt=f"{marker}-", color=colour, label=label)
    top.axhline(1, color=GREY, lw=2, label="random directions")
    top.set(ylabel="$q(v)\\,/\\,(\\mathrm{tr} F/D)$", title=f"{run.whole}: curvature along directions")
    ratios = {step: row["anisotropy"] for step, row in survey.items() if "anisotropy" in row}
    values, errors = ([ratio[k] for ratio in ratios.values()] for k in (0, 1))
    if max(values, default=1) > 10 or 0 < min(values, default=1) < 0.1:
        bottom.set_yscale("log")
    label = "$\\alpha=q(v_b)$ over its mean across $v_b$"
    plotting.dots(bottom, list(ratios), values, errors, fmt="o-", color=BACKBONE, label=label)
    bottom.axhline(1, color=NULL, **_DOTTED, label="isotropic")
    bottom.set(xlabel="step", ylabel="anisotropy")
    run.mark(top, bottom)
    legend_below(top, 5, drop=8.0)
    legend_below(bottom)
    return figure


CLOSING: Mapping[str, Callable[[Run], Figure]] = {
    "learning": learning_curves,
    "spectrum": spectrum,
    "backbone": backbone,
    "alignment": alignment,
    "growth": growth,
}
"""The figures that are cheap enough to close every run."""
RUN_FIGURES: Mapping[str, Callable[[Run], Figure]] = {
    **CLOSING,
    "against_nulls": against_nulls,
    "initial_weights": initial_weights,
    "blocks": blocks,
    "update_cosines": update_cosines,
    "gradients": gradients,
    "fisher": fisher,
}
"""The figures of a run of any task; each raises a UserError where the data for it are missing."""


def drawn(draw: Callable[[Shown], Figure], subject: Shown) -> Figure | None:
    """Draw a figure in the style of all, and lay it out; None where the data for it are missing.

    A figure in which a decaying walk is missing says so in one line.
    """
    runs = [subject] if isinstance(subject, Run) else subject
    with mpl.rc_context(plotting.STYLE), suppress(UserError):
        figure = draw(subject)
        has_null = any("decay" in text.get_text().lower() for text in figure.findobj(Text))
        if has_null and not all(Subject.of(run).decay_known for run in runs):
            figure.suptitle("What weight decay took is not known: there is no decaying walk.", fontsize=8)
        plotting.lay_out(figure)
        return figure
    return None


def draw_all(run: Run) -> list[Path]:
    """Draw every figure that closes a run and that its data allow, into its `figures` folder.

    Returns:
        The PNG files that were written.
    """
    subject, written = Subject.of(run), []
    for name, draw in {**CLOSING, **contents_of([subject]).figures}.items():
        if (figure := drawn(draw, subject)) is not None:
            written += plotting.save(figure, run.path / FIGURES, name)
    return written
