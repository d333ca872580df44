"""The switches of a run's probe, beside stretches of equal length without one (paper, section 7): tables and figure."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import torch
from matplotlib.figure import Figure

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.figures.plotting import BACKBONE, NULL, PC2, PROBE, RESIDUAL, SWITCH, WIDTH, legend_below
from mini_gpt_pl.geometry.path import nulls
from mini_gpt_pl.geometry.path import switching as measures
from mini_gpt_pl.geometry.path.switching import Axes, Interval, SwitchReport
from mini_gpt_pl.report.published import Beside
from mini_gpt_pl.report.sheet import Cell, Row, Table, number, word
from mini_gpt_pl.report.subject import Subject
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.evaluation import binomial_error
from mini_gpt_pl.stories.study.words import laid_out, words
from mini_gpt_pl.stories.switches import P_OOD, Rules, judged, questions_of, switches_by_noise, switches_of, tier

_FILE = "switching.json"


def tables(subject: Subject, beside: Beside) -> list[Table]:
    """All switches of p_ood, and the first one block by block, each beside its controls and the decaying walk."""
    placed = switches_of(subject)
    if not placed:
        return []
    path, axes, axes_of_walk = subject.trajectory, Axes(), Axes()
    grams = torch.stack([nulls.decaying_walk(gram, path.survival) for gram in path.grams])
    walk = dataclasses.replace(path, grams=grams)
    intervals = list(dict.fromkeys(interval for _, interval in placed))

    def cells(interval: Interval, past: bool = False, group: str | None = None) -> dict[str, Cell]:
        report = reports[interval, past][group]
        # The walk's displacement between the same snapshots, in its own directions.
        return _cells(report, measures.measure(walk, [interval], axes_of_walk, group=group, past=past)[0])

    reports = {
        (interval, past): measures.report(path, interval, intervals, axes, past=past)
        for interval in intervals
        for past in (False, True)
    }
    shown = words("tables")["switching"]["past"]
    rows: list[Row] = [
        {"peak": number(pair.peak.step, "{:,.0f}"), "trough": number(pair.trough.step, "{:,.0f}")}
        | cells(interval)
        | {f"past, {name}": cell for name, cell in cells(interval, past=True).items() if name in shown}
        for pair, interval in placed
    ]
    pairs = measures.mean_cosine(path.gram(), intervals)
    control = measures.control_mean_cosine(path, intervals)
    mean_cosine = None if math.isnan(pairs) else pairs
    of_switches = laid_out("switching", rows, beside.notes("switch_pairs"), pairs=mean_cosine, control=control)
    pair, interval = placed[0]
    blocks: list[Row] = []
    for label, group in subject.parts.items():
        published: dict[str, Cell] = {}
        if group is not None:
            published = beside.cell("switch_cosine", "{:.2f}", "|cos|, ")
            published |= beside.cell("switch_energy", "{:.0%}", "E_2:6, ")
        blocks.append({"group": word(label), **cells(interval, group=group), **published})
    notes = beside.notes("switch_cosine", "switch_energy")
    return of_switches + laid_out("switching_blocks", blocks, notes, peak=pair.peak.step, trough=pair.trough.step)


def _cells(switch: SwitchReport, walk: measures.Stretch) -> dict[str, Cell]:
    return {
        "|cos|": number(abs(switch.stretch.cosine)),
        "|cos|, decaying walk": number(abs(walk.cosine)),
        "|cos|, controls": number(switch.control_cosine),
        "|cos|, rank": number(switch.cosine_percentile, "{:.2f}"),
        "transverse": number(switch.stretch.transverse, "{:.1%}"),
        "E_2:6": number(switch.stretch.energy_across, "{:.1%}"),
        "E_2:6, decaying walk": number(walk.energy_across, "{:.1%}"),
        "E_2:6, rank": number(switch.energy_across_percentile, "{:.2f}"),
        "controls": number(float(switch.controls), "{:.0f}"),
    }


def figure(run: Run) -> Figure:
    """Peaks and troughs of the metric, and each switch's |cos| with the backbone beside stretches of equal length.

    Raises:
        UserError: Nobody looked for switches, or there was none.
    """
    file = run.path / _FILE
    record: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    directions = (("run", "whole-run $v_b$ (contains it)", SWITCH, "s"), ("past", "$v_b$ of its past", BACKBONE, "o"))
    switches = [
        switch
        for switch in record.get("switches", [])
        if all(run.trunk in switch.get(key, {}) for key, *_ in directions)
    ]
    if not switches:
        raise UserError(f"the run {run.path} has no switches on record: train it with SwitchingProbe")
    drawn = Figure(figsize=(WIDTH, 5.2))
    top, bottom = drawn.subplots(2, 1, sharex=True)
    top.plot(record["steps"], record["values"], "-", color=PROBE, lw=1, label=record["metric"])
    for kind, marker, colour in (("peak", "^", RESIDUAL), ("trough", "v", PC2)):
        events = [event for event in record["events"] if event["kind"] == kind]
        steps, values = ([event[name] for event in events] for name in ("step", "value"))
        top.plot(steps, values, marker, color=colour, ms=6, label=kind)
    top.set(ylabel=record["metric"], title=f"{run.trunk}: switches from a peak to the trough after it")
    middles = [(switch["peak"] + switch["trough"]) / 2 for switch in switches]
    for key, label, colour, marker in directions:
        rows = [switch[key][run.trunk] for switch in switches]
        own, controls = (
            [math.nan if row[name] is None else abs(row[name]) for row in rows] for name in ("cosine", "control_cosine")
        )
        bottom.plot(middles, own, marker, color=colour, ms=6, label=label)
        bottom.plot(middles, controls, marker, color=colour, mfc="none", ms=6, label="its controls, mean")
        bottom.vlines(middles, controls, own, color=colour, lw=0.8)
    bottom.set(xlabel="step", ylabel="|cos| of switch and $v_b$")
    bottom.set_ylim(bottom=0)
    Subject.of(run).mark(top, bottom)
    legend_below(top, 3, drop=8.0)
    legend_below(bottom, 4)
    return drawn


# ------------------------------------------------------------------------------------- beside the evaluation's error


def significance(run: Run) -> list[Table]:
    """Each switch in units of its error, its tier, and how many switches noise alone would make."""
    switches = judged(run)
    if not switches:
        return []
    rows: list[Row] = [
        {
            "peak": number(float(one.switch.peak.step), "{:,.0f}"),
            "trough": number(float(one.switch.trough.step), "{:,.0f}"),
            "from": number(one.switch.peak.value),
            "to": number(one.switch.trough.value),
            "height": number(one.height, "{:.3f}", one.error, "se"),
            "/ error": number(one.height / one.error if one.error else math.nan, "{:.1f}"),
            "tier": word(one.tier),
            "tier by the last error": word(tier(one.height, one.last_error)),
        }
        for one in switches
    ]
    count = questions_of(run)
    mean, spread = switches_by_noise(run.series(P_OOD).tolist(), count, Rules.of(run))
    return laid_out("switching_significance", rows, count=count, mean=mean, spread=spread, switches=len(switches))


def significance_figure(run: Run) -> Figure:
    """p_ood with its error at every evaluation, and each switch in units of its error.

    Raises:
        UserError: p_ood has no switch.
    """
    switches, series, count = judged(run), run.series(P_OOD), questions_of(run)
    if not switches:
        raise UserError(f"p_ood of {run.path} has no switch")
    drawn = Figure(figsize=(WIDTH, 4.6))
    top, bottom = drawn.subplots(2, 1, sharex=True)
    errors = [binomial_error(value, count) for value in series]
    top.errorbar(series.index.to_numpy(), series.to_numpy(), errors, fmt="-", lw=1, elinewidth=0.8, color=PROBE)
    top.set(ylabel="$p_{ood}$", title=f"error of {count:,} answers")
    middles = [(one.switch.peak.step + one.switch.trough.step) / 2 for one in switches]
    heights = [one.height / one.error if one.error else math.nan for one in switches]
    bottom.plot(middles, heights, "o", ms=5, color=RESIDUAL)
    for level, name in ((3, "A"), (2, "B")):
        bottom.axhline(level, color=NULL, lw=0.9, ls=":")
        place: Any = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        bottom.annotate(name, (1.0, level), xytext=(3, 0), **place)
    bottom.set(xlabel="step", ylabel="height / error", yscale="log")
    return drawn
