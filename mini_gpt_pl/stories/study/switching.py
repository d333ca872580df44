"""The switches of a run's probe, beside stretches of equal length without one (paper, section 7): tables and figure."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import torch
from matplotlib.figure import Figure

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.figures.plotting import BACKBONE, PC2, PROBE, RESIDUAL, SWITCH, WIDTH, legend_below
from mini_gpt_pl.geometry.path import nulls
from mini_gpt_pl.geometry.path import switching as measures
from mini_gpt_pl.geometry.path.switching import Axes, Interval, SwitchReport
from mini_gpt_pl.report.published import Beside
from mini_gpt_pl.report.sheet import Cell, Row, Table, number, word
from mini_gpt_pl.report.subject import Subject
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.study.words import laid_out, words
from mini_gpt_pl.stories.switches import switches_of

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
