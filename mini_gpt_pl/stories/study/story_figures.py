"""Figures of one run of stories: its learning, signed bias, the switches of its probe, logit lens, reheating."""

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
    legend_below,
    line,
    palette,
)
from mini_gpt_pl.report.settings import progress
from mini_gpt_pl.report.subject import Subject, estimate
from mini_gpt_pl.runs.folder import METRICS, Run
from mini_gpt_pl.stories.evaluation import binomial_error
from mini_gpt_pl.stories.study.learning_tables import fit_of
from mini_gpt_pl.stories.study.reheat_tables import is_control, reheat_setting
from mini_gpt_pl.stories.study.switch_noise import judged, questions_of
from mini_gpt_pl.stories.switches import P_OOD

_SWITCHING = "switching.json"


def learning(run: Run) -> Figure:
    """Loss on the left, probe accuracy on the right, against the optimizer step.

    Where the validation loss has its minimum is marked: what it rises afterwards is over-fitting.
    """
    figure = Figure(figsize=(WIDTH, 3.6))
    left, right = figure.subplots(1, 2)
    line(left, run.series("train/lm_loss"), "training, LM", GREY, lw=1)
    line(left, run.series("train/probe_loss"), "training, probe", "#e5b8a0", lw=1)
    validation = run.series("val/loss")
    line(left, validation, "validation, LM", BACKBONE, marker="o", ms=3)
    if (fit := fit_of(run)) is not None:
        best, label = fit.best_step, f"best validation: step {fit.best_step:,}"
        if fit.overfits:
            over = f"over-fitting: {fit.rise:+.2f} since"
            left.axvspan(best, int(validation.index[-1]), color=RESIDUAL, alpha=0.07, lw=0, label=over)
            right.axvspan(best, int(validation.index[-1]), color=RESIDUAL, alpha=0.07, lw=0)
        left.plot([best], [fit.best], "*", ms=11, color=BACKBONE, mec="white", mew=0.6, label=label)
    left.set(xlabel="step", ylabel="nats per token", title="Loss")
    left.set_ylim(bottom=0)
    line(right, run.series("probe/p_in"), "$p_{in}$, short gap", BACKBONE, marker="o", ms=3)
    line(right, run.series("probe/p_ood"), "$p_{ood}$, long gap", RESIDUAL, marker="o", ms=3)
    right.set(xlabel="step", ylabel="exact match", title="Key retrieval", ylim=(-0.03, 1.03))
    Subject.of(run).mark(right, left)
    for axes in (left, right):
        legend_below(axes, 1)
    return figure


def signed_bias(run: Run) -> Figure:
    """Signed projection of batch gradients on each group's own v_b at replayed checkpoints, and its running sum.

    Raises:
        UserError: The run was not replayed.
    """
    run = Subject.of(run)
    found = {step: record for step, record in run.replayed_at("bias").items() if record}
    if not found:
        raise UserError(f"the run {run.path} has no replay: replay it for the signed bias of its gradients")
    figure = Figure(figsize=(WIDTH, 3.8))
    left, right = figure.subplots(1, 2)
    groups = [name for name in run.trajectory.groups if all(name in row for row in found.values())]
    steps = list(found)
    for name, colour in zip(groups, palette(len(groups)), strict=True):
        mean, spread = (np.array([estimate(row[name])[k] for row in found.values()]) for k in (0, 1))
        left.plot(steps, mean, "o-", ms=3, color=colour, label=name)
        left.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.06, lw=0)
        right.plot(steps, np.cumsum(mean), "o-", ms=3, color=colour)
    for axes, label in ((left, "$b_l=\\langle g,v_b\\rangle$, mean and sd"), (right, "$B_l$, running sum")):
        axes.axhline(0, color=NULL, lw=1.2, ls=":")
        axes.set(xlabel="step")
        axes.set_title(label, fontsize=9)
    run.mark(left, right)
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
    Subject.of(run).mark(top, bottom)
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
    known = [(run, record) for run in runs if (record := run.lineage) is not None]
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


def significance(run: Run) -> Figure:
    """p_ood with its error at every evaluation, and each switch in units of its error.

    Raises:
        UserError: p_ood has no switch.
    """
    found, series, count = judged(run), run.series(P_OOD), questions_of(run)
    if not found:
        raise UserError(f"p_ood of {run.path} has no switch")
    figure = Figure(figsize=(WIDTH, 4.6))
    top, bottom = figure.subplots(2, 1, sharex=True)
    errors = [binomial_error(value, count) for value in series]
    top.errorbar(series.index.to_numpy(), series.to_numpy(), errors, fmt="-", lw=1, elinewidth=0.8, color=PROBE)
    top.set(ylabel="$p_{ood}$", title=f"error of {count:,} answers")
    middles = [(one.switch.peak.step + one.switch.trough.step) / 2 for one in found]
    bottom.plot(middles, [one.height / one.error if one.error else np.nan for one in found], "o", ms=5, color=RESIDUAL)
    for level, tier in ((3, "A"), (2, "B")):
        bottom.axhline(level, color=NULL, lw=0.9, ls=":")
        bottom.annotate(
            tier, (1.0, level), xycoords=("axes fraction", "data"), xytext=(3, 0), textcoords="offset points"
        )
    bottom.set(xlabel="step", ylabel="height / error", yscale="log")
    return figure


STORY_FIGURES: dict[str, Callable[[Run], Figure]] = {
    "learning": learning,
    "signed_bias": signed_bias,
    "switching": switching,
    "significance": significance,
    "logit_lens": logit_lens,
    "reheating": reheating,
}
