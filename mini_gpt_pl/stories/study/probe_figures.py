"""Figures of one run from what probes and replays measured: gradients, Fisher, switches, logit lens, reheating."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.figures.plotting import (
    BACKBONE,
    CHANGE,
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
    mark_change,
    palette,
)
from mini_gpt_pl.geometry.vectors.alignment import noise_floor
from mini_gpt_pl.report.families import is_control, reheat_setting
from mini_gpt_pl.report.settings import progress
from mini_gpt_pl.runs.folder import METRICS, Run

Estimate = tuple[float, float]
"""A value and its standard error or standard deviation."""

_SWITCHING = "switching.json"
_LIVE = "fisher/{}/batch_mean/"
_GRADIENTS = (
    ("combined", "gradient", "combined", PROBE),
    ("lm", "lm", "LM", PC2),
    ("probe", "probe", "probe", RESIDUAL),
)
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
    figure = Figure(figsize=(WIDTH, 3.8))
    axes = figure.subplots()
    axes.set_yscale("log")
    replayed = {step: found["gradient"] for step, found in run.replayed.items() if "gradient" in found}
    for key, metric, label, colour in _GRADIENTS:
        known = {step: found[key][run.trunk]["abs_cos"] for step, found in replayed.items() if key in found}
        if known:
            mean, spread = zip(*known.values(), strict=True)
            dots(axes, list(known), mean, spread, fmt="o-", color=colour, label=f"{label}, mean and sd of batches")
        elif len(live := run.series(f"alignment/{run.trunk}/{metric}").abs()):
            line(axes, live[live > 0], f"{label}, single batches", colour, marker=".", ls="", ms=4)
    if not axes.has_data():
        raise UserError(f"the run {run.path} measured no gradients: train it with GradientAlignment, or replay it")
    floor = noise_floor(run.trajectory.dim)
    axes.axhline(floor, color=NULL, ls=":", lw=1.2, label=f"isotropic noise, {floor:.1e}")
    against = "whole-run $v_b$, replayed" if replayed else "$v_b$ of the past, live"
    axes.set(xlabel="step", ylabel="|cos|", title=f"{run.trunk}: gradients and the {against}")
    mark_change(run, axes)
    legend_below(axes)
    return figure


# ---------------------------------------------------------------------------------------------------- Fisher


def fisher_survey(run: Run) -> dict[int, dict[str, Estimate]]:
    """Collect Fisher quantities of the whole selection by step, replayed ones if there are any, else the live ones.

    Returns:
        Per step: `q_<direction>`, `trace` and `anisotropy`, each with its standard error.
    """
    replayed = {
        step: {f"q_{name}": _estimate(x) for name, x in found["fisher"][run.trunk]["q"].items()}
        | {name: _estimate(found["fisher"][run.trunk][name]) for name in ("trace", "anisotropy")}
        for step, found in run.replayed.items()
        if run.trunk in found.get("fisher", {})
    }
    return replayed or _live_fisher(run)


def _live_fisher(run: Run) -> dict[int, dict[str, Estimate]]:
    prefix = _LIVE.format(run.trunk)
    names = [name.removeprefix(prefix) for name in map(str, run.metrics) if name.startswith(prefix)]
    found: dict[int, dict[str, Estimate]] = {}
    for name in names:
        values, errors = run.series(f"{prefix}{name}"), run.series(f"{prefix}{name}_se").to_dict()
        for step, value in zip(values.index.tolist(), values.tolist(), strict=True):
            found.setdefault(int(step), {})[name] = (value, float(errors.get(step, math.nan)))
    return {step: values for step, values in found.items() if "trace" in values}


def _estimate(found: Any) -> Estimate:
    value, spread = found if isinstance(found, Sequence) else (found, math.nan)
    return float(value), float(spread)


def fisher(run: Run) -> Figure:
    """Rayleigh quotients over tr(F)/D, and the anisotropy along the backbone (paper, Figure 3, coordinates aligned).

    tr(F)/D is the mean over random directions, so that an isotropic Fisher is 1 in both panels.

    Raises:
        UserError: Nobody measured the Fisher.
    """
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
    mark_change(run, top, bottom)
    legend_below(top, 5, drop=8.0)
    legend_below(bottom)
    return figure


def signed_bias(run: Run) -> Figure:
    """Signed projection of batch gradients on each group's own v_b at replayed checkpoints, and its running sum.

    Raises:
        UserError: The run was not replayed.
    """
    found = {step: values["bias"] for step, values in run.replayed.items() if values.get("bias")}
    if not found:
        raise UserError(f"the run {run.path} has no replay: replay it for the signed bias of its gradients")
    figure = Figure(figsize=(WIDTH, 3.8))
    left, right = figure.subplots(1, 2)
    groups = [name for name in run.trajectory.groups if all(name in row for row in found.values())]
    steps = list(found)
    for name, colour in zip(groups, palette(len(groups)), strict=True):
        mean, spread = (np.array([row[name][k] for row in found.values()]) for k in (0, 1))
        left.plot(steps, mean, "o-", ms=3, color=colour, label=name)
        left.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.06, lw=0)
        right.plot(steps, np.cumsum(mean), "o-", ms=3, color=colour)
    for axes, label in ((left, "$b_l=\\langle g,v_b\\rangle$, mean and sd"), (right, "$B_l$, running sum")):
        axes.axhline(0, color=NULL, lw=1.2, ls=":")
        axes.set(xlabel="step")
        axes.set_title(label, fontsize=9)
    mark_change(run, left, right)
    left.plot([], [], ":", color=NULL, lw=1.2, label="no bias")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


# ------------------------------------------------------------------------------------------------- switching


def switching(run: Run) -> Figure:
    """Peaks and troughs of the metric, and each switch's |cos| with the backbone beside stretches of equal length.

    Raises:
        UserError: Nobody looked for switches, or there was none.
    """
    found = _switches(run)
    figure = Figure(figsize=(WIDTH, 5.2))
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.plot(found["steps"], found["values"], "-", color=PROBE, lw=1, label=found["metric"])
    for kind, marker, colour in (("peak", "^", RESIDUAL), ("trough", "v", PC2)):
        events = [event for event in found["events"] if event["kind"] == kind]
        top.plot(*_columns(events, "step", "value"), marker, color=colour, ms=6, label=kind)
    top.set(ylabel=found["metric"], title=f"{run.trunk}: switches from a peak to the trough after it")
    middles = [(switch["peak"] + switch["trough"]) / 2 for switch in found["switches"]]
    for key, label, colour, marker in (
        ("run", "whole-run $v_b$ (contains it)", SWITCH, "s"),
        ("past", "$v_b$ of its past", BACKBONE, "o"),
    ):
        rows = [switch[key][run.trunk] for switch in found["switches"]]
        own, controls = ([abs(_number(row[name])) for row in rows] for name in ("cosine", "control_cosine"))
        bottom.plot(middles, own, marker, color=colour, ms=6, label=label)
        bottom.plot(middles, controls, marker, color=colour, mfc="none", ms=6, label="its controls, mean")
        bottom.vlines(middles, controls, own, color=colour, lw=0.8)
    bottom.set(xlabel="step", ylabel="|cos| of switch and $v_b$")
    bottom.set_ylim(bottom=0)
    mark_change(run, top, bottom)
    legend_below(top, 3, drop=8.0)
    legend_below(bottom, 4)
    return figure


def _switches(run: Run) -> dict[str, Any]:
    file = run.path / _SWITCHING
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    switches = found.get("switches", [])
    measured = [switch for switch in switches if all(run.trunk in switch.get(key, {}) for key in ("run", "past"))]
    if not measured:
        raise UserError(f"the run {run.path} has no switches on record: train it with SwitchingProbe")
    return found | {"switches": measured}


def _columns(rows: Sequence[Mapping[str, Any]], *names: str) -> list[list[Any]]:
    return [[row[name] for row in rows] for name in names]


def _number(found: float | None) -> float:
    return math.nan if found is None else float(found)


def logit_lens(run: Run) -> Figure:
    """Probe accuracy read off after the embedding and after each block, at replayed checkpoints.

    Raises:
        UserError: No replay read the logit lens.
    """
    found = {step: row for step, row in run.replayed.items() if row.get("logit_lens")}
    if not found:
        raise UserError(f"the run {run.path} has no logit lens: replay it")
    words = ((run.settings.get("data") or {}).get("probe") or {}).get("n_codewords")
    figure = Figure(figsize=(WIDTH, 3.8))
    sides = figure.subplots(1, 2, sharey=True)
    shades = palette(len(found))
    for axes, key, title in zip(sides, ("in", "ood"), ("$p_{in}$, short gap", "$p_{ood}$, long gap"), strict=True):
        for (step, row), shade in zip(found.items(), shades, strict=True):
            style = {"peak": "^-", "trough": "v--"}.get(row.get("event") or "", "o:")
            values = row["logit_lens"][key]
            axes.plot(range(len(values)), values, style, color=shade, ms=4, lw=1, label=f"{step:,}{_event(row)}")
        if words:
            axes.axhline(1 / words, color=NULL, ls=":", lw=1, label=f"chance, 1/{words}")
        axes.set(xlabel="after block (0: embedding)", title=title, ylim=(-0.03, 1.03))
        axes.xaxis.get_major_locator().set_params(integer=True)
    sides[0].set_ylabel("exact match")
    figure.legend(*sides[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _event(row: Mapping[str, Any]) -> str:
    return f", {row['event']}" if row.get("event") else ""


# ------------------------------------------------------------------------------------------------ reheating

_WARM = (RESIDUAL, SWITCH, PC2, BACKBONE, "#7d3c98")


def reheating(run: Run) -> Figure:
    """One reheated run behind its parent (paper, Figure 4).

    Raises:
        UserError: The run was not reheated from another.
    """
    return reheats([run])


def reheats(runs: Sequence[Run]) -> Figure:
    """p_ood of reheated runs at parent step + own step, by learning rate, their parents' in light grey.

    A star marks each maximum; controls, for which the parent's own schedule just goes on, are dashed.

    Raises:
        UserError: None of the runs was reheated from another.
    """
    known = [(run, record) for run in runs if (record := run.reheated) is not None]
    if not known:
        raise UserError("none of the runs is reheated: there is no re-entry to show")
    figure = Figure(figsize=(WIDTH, 4.2))
    axes = figure.subplots()
    for parent in {str(found.path): found for _, record in known if (found := _parent(record))}.values():
        series = parent.series("probe/p_ood")
        best = "" if series.empty else f": best {series.max():.3f} at {int(series.index[int(series.argmax())]):,}"
        line(axes, series, f"parent, {parent.path.name}{best}", GREY, lw=1.2)
    settings = sorted({reheat_setting(run, record) for run, record in known if not is_control(record)})
    colours = dict(zip(settings, _WARM if len(settings) <= len(_WARM) else palette(len(settings)), strict=False))
    for run, record in known:
        _reheat(axes, run, record, colours.get(reheat_setting(run, record), NULL))
    for start in {int(record.get("parent_step") or 0) for _, record in known} - {0}:
        axes.axvline(start, color=CHANGE, ls="--", lw=1, zorder=0)
    axes.set(xlabel="step (parent's + own)", ylabel="$p_{ood}$", ylim=(-0.03, 1.03), title="Reheating")
    _show_end(axes, known)
    legend_below(axes)
    return figure


def _show_end(axes: Axes, known: Sequence[tuple[Run, Mapping[str, Any]]]) -> None:
    """Begin the step axis as far before the earliest reheat as the longest one goes on; the parents are far longer."""
    starts = [int(record.get("parent_step") or 0) for _, record in known]
    longest = max((int(series.index[-1]) for run, _ in known if len(series := run.series("probe/p_ood"))), default=0)
    if longest:
        margin = 0.03 * longest
        axes.set_xlim(max(0, min(starts) - longest) - margin, max(starts) + longest + margin)


def _reheat(axes: Axes, run: Run, record: Mapping[str, Any], colour: Any) -> None:
    series = run.series("probe/p_ood")
    if not len(series):
        return
    steps = series.index.to_numpy() + int(record.get("parent_step") or 0)
    gain = record.get("gain")
    label = reheat_setting(run, record)[1] + ("" if gain is None else f": G = {gain:+.3f}")
    taken, asked = progress(run)
    if asked is not None and taken < asked:
        label += f", ended at {taken:,}"
    style = "--" if is_control(record) else "o-"
    axes.plot(steps, series.to_numpy(), style, ms=3, lw=1.1, color=colour, label=label)
    best = int(np.argmax(series.to_numpy()))
    axes.plot([steps[best]], [series.iloc[best]], "*", ms=12, color=colour, mec="white", mew=0.6)


def _parent(record: Mapping[str, Any]) -> Run | None:
    """The run that another was reheated from, if its folder is still there."""
    found = Run(Path(str(record.get("parent") or "")))
    return found if record.get("parent") and (found.path / METRICS).is_file() else None


PROBE_FIGURES: dict[str, Callable[[Run], Figure]] = {
    "gradients": gradients,
    "signed_bias": signed_bias,
    "fisher": fisher,
    "switching": switching,
    "logit_lens": logit_lens,
    "reheating": reheating,
}
