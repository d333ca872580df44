"""Figures of one run from what its probes or a replay measured: gradients and Fisher curvature."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.figures.plotting import (
    BACKBONE,
    GREY,
    NULL,
    PC2,
    PROBE,
    RESIDUAL,
    SWITCH,
    WIDTH,
    dots,
    legend_below,
    line,
)
from mini_gpt_pl.report.probe_tables import fisher_survey
from mini_gpt_pl.report.subject import Subject
from mini_gpt_pl.runs.folder import Run

# Directions of the Fisher figure: key, name, colour, marker.
_DIRECTIONS = (
    ("backbone", "$v_b$", BACKBONE, "o"),
    ("switch", "$v_{sw}$", SWITCH, "s"),
    ("pc2", "PC2", PC2, "^"),
    ("theta0", "$\\theta_0$", "#7d3c98", "v"),
)


def gradients(run: Run) -> Figure:
    """|cos| of single-batch gradients with the backbone on a logarithmic axis, beside that of isotropic noise.

    Of a replay where there is one (mean and standard deviation over batches, whole-run v_b), else as measured live
    against v_b of the past.

    Raises:
        UserError: Nobody measured gradients.
    """
    run = Subject.of(run)
    figure = Figure(figsize=(WIDTH, 3.8))
    axes = figure.subplots()
    axes.set_yscale("log")
    parts = {"gradient": ("combined", "combined")} | {key: (key, words) for key, words in run.backdrop.losses.items()}
    for (metric, (part, label)), colour in zip(parts.items(), (PROBE, PC2, RESIDUAL), strict=False):
        found = run.estimates(("gradient", part, run.trunk, "abs_cos"), f"alignment/{run.trunk}/{metric}")
        if found.live:
            live = run.series(f"alignment/{run.trunk}/{metric}").abs()
            line(axes, live[live > 0], f"{label}, single batches", colour, marker=".", ls="", ms=4)
        elif found.values:
            mean, spread = zip(*found.values.values(), strict=True)
            dots(
                axes, list(found.values), mean, spread, fmt="o-", color=colour, label=f"{label}, mean and sd of batches"
            )
    if not axes.has_data():
        raise UserError(f"the run {run.path} measured no gradients: train it with GradientAlignment, or replay it")
    floor = run.floor(run.trunk)
    axes.axhline(floor, color=NULL, ls=":", lw=1.2, label=f"isotropic noise, {floor:.1e}")
    against = "whole-run $v_b$, replayed" if run.replayed_at("gradient") else "$v_b$ of the past, live"
    axes.set(xlabel="step", ylabel="|cos|", title=f"{run.trunk}: gradients and the {against}")
    run.mark(axes)
    legend_below(axes)
    return figure


def fisher(run: Run) -> Figure:
    """Rayleigh quotients over tr(F)/D, and the anisotropy along the backbone.

    tr(F)/D is the mean over random directions, so that an isotropic Fisher is 1 in both panels.

    Raises:
        UserError: Nobody measured the Fisher.
    """
    run = Subject.of(run)
    found = fisher_survey(run)
    if not found:
        raise UserError(f"the run {run.path} has no Fisher measurements: train it with FisherProbe, or replay it")
    figure = Figure(figsize=(WIDTH, 5.0))
    top, bottom = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 2]})
    top.set_yscale("log")
    dim = run.trajectory.dim
    for key, label, colour, marker in _DIRECTIONS:
        known = {step: (row[f"q_{key}"], row["trace"][0] / dim) for step, row in found.items() if f"q_{key}" in row}
        known = {step: pair for step, pair in known.items() if pair[1] > 0}
        if known:
            values, errors = (([estimate[k] / scale for estimate, scale in known.values()]) for k in (0, 1))
            dots(top, list(known), values, errors, fmt=f"{marker}-", color=colour, label=label)
    top.axhline(1, color=GREY, lw=2, label="random directions")
    top.set(ylabel="$q(v)\\,/\\,(\\mathrm{tr} F/D)$", title=f"{run.trunk}: curvature along directions")
    known_ratios = {step: row["anisotropy"] for step, row in found.items() if "anisotropy" in row}
    ratios, spreads = ([estimate[k] for estimate in known_ratios.values()] for k in (0, 1))
    if max(ratios, default=1) > 10 or 0 < min(ratios, default=1) < 0.1:
        bottom.set_yscale("log")
    dots(
        bottom,
        list(known_ratios),
        ratios,
        spreads,
        fmt="o-",
        color=BACKBONE,
        label="$\\alpha=q(v_b)$ over its mean across $v_b$",
    )
    bottom.axhline(1, color=NULL, ls=":", lw=1.2, label="isotropic")
    bottom.set(xlabel="step", ylabel="anisotropy")
    run.mark(top, bottom)
    legend_below(top, 5, drop=8.0)
    legend_below(bottom)
    return figure


PROBE_FIGURES: dict[str, Callable[[Run], Figure]] = {
    "gradients": gradients,
    "fisher": fisher,
}
