"""Tables of one run about the switches of its probe, beside stretches of equal length without one."""

from __future__ import annotations

import dataclasses
import math

import torch

from mini_gpt_pl.geometry.path import nulls, switching
from mini_gpt_pl.geometry.path.switching import Interval, SwitchReport
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.report.published import Beside
from mini_gpt_pl.report.sheet import Cell, Table, number, tabulate, word
from mini_gpt_pl.report.subject import Subject
from mini_gpt_pl.stories.switches import switches_of


def switches(subject: Subject, beside: Beside) -> list[Table]:
    """Switches of p_ood beside stretches of equal length without one (paper, section 7)."""
    placed = switches_of(subject)
    if not placed:
        return []
    intervals = list(dict.fromkeys(interval for _, interval in placed))
    axes = switching.Axes()
    found = [
        {past: switching.report(subject.trajectory, interval, intervals, axes, past=past) for past in (False, True)}
        for _, interval in placed
    ]
    null = Null(subject.trajectory)
    return [
        _switch_table(subject, beside, placed, found, intervals, null),
        _switch_blocks(subject, beside, placed, found[0][False], null),
    ]


class Null:
    """The decaying walk of a trajectory, in which a stretch lies at the same steps as in the run.

    Args:
        trajectory: Of the run.
    """

    def __init__(self, trajectory: Trajectory) -> None:
        grams = [nulls.decaying_walk(gram, trajectory.survival) for gram in trajectory.grams]
        self._walk = dataclasses.replace(trajectory, grams=torch.stack(grams))
        self._axes = switching.Axes()

    def place(self, interval: Interval, group: str | None = None, *, past: bool = False) -> switching.Stretch:
        """Place the walk's displacement over a stretch in its own directions."""
        return switching.measure(self._walk, [interval], self._axes, group=group, past=past)[0]


def _switch_table(
    subject: Subject,
    beside: Beside,
    placed: list[tuple[switching.Switch, Interval]],
    found: list[dict[bool, dict[str | None, SwitchReport]]],
    intervals: list[Interval],
    null: Null,
) -> Table:
    rows = []
    for (pair, interval), reports in zip(placed, found, strict=True):
        whole, past = (_switch_cells(reports[side][None], null.place(interval, past=side)) for side in (False, True))
        ends = {"peak": number(pair.peak.step, "{:,.0f}"), "trough": number(pair.trough.step, "{:,.0f}")}
        rows.append(ends | whole | {f"past, {name}": cell for name, cell in past.items() if name in _PAST})
    pairs, control = (
        switching.mean_cosine(subject.trajectory.gram(), intervals),
        switching.control_mean_cosine(subject.trajectory, intervals),
    )
    notes = [
        "|cos| of theta(peak) - theta(trough) with the whole run's raw v_b; controls: mean over stretches of the same "
        "number of steps that share nothing with a switch; rank: share of the controls below it, uniform by chance. "
        "Past: with the v_b of the snapshots up to the peak.",
        "Controls lie early and late in the run alike, and alignment changes along any path, so that a rank also says "
        "when a switch happened; the decaying walk is measured over the same steps as the switch.",
        "E_2:6: energy in PCs 2 to 6 once the part along v_b is taken out.",
        None
        if math.isnan(pairs)
        else f"Pairs of switches that share no step: mean |cos| {pairs:.3f}; with controls in their place "
        f"{control:.3f}.",
        *beside.notes("switch_pairs"),
    ]
    return tabulate("switching", "Switches of the probe and the backbone (paper, section 7)", rows, notes)


_PAST = ("|cos|", "|cos|, decaying walk", "|cos|, controls", "|cos|, rank")


def _switch_cells(found: SwitchReport, null: switching.Stretch) -> dict[str, Cell]:
    return {
        "|cos|": number(abs(found.stretch.cosine)),
        "|cos|, decaying walk": number(abs(null.cosine)),
        "|cos|, controls": number(found.control_cosine),
        "|cos|, rank": number(found.cosine_percentile, "{:.2f}"),
        "transverse": number(found.stretch.transverse, "{:.1%}"),
        "E_2:6": number(found.stretch.energy_across, "{:.1%}"),
        "E_2:6, decaying walk": number(null.energy_across, "{:.1%}"),
        "E_2:6, rank": number(found.energy_across_percentile, "{:.2f}"),
        "controls": number(float(found.controls), "{:.0f}"),
    }


def _switch_blocks(
    subject: Subject,
    beside: Beside,
    placed: list[tuple[switching.Switch, Interval]],
    reports: dict[str | None, SwitchReport],
    null: Null,
) -> Table:
    rows = []
    for label, group in subject.parts.items():
        cells = {"group": word(label), **_switch_cells(reports[group], null.place(placed[0][1], group))}
        if group is not None:
            cells |= beside.cell("switch_cosine", "{:.2f}", "|cos|, ")
            cells |= beside.cell("switch_energy", "{:.0%}", "E_2:6, ")
        rows.append(cells)
    pair = placed[0][0]
    notes = [
        f"The first switch, from the peak at step {pair.peak.step:,} to the trough at {pair.trough.step:,}, as in the "
        "paper; controls and ranks as in the table of all switches.",
        *beside.notes("switch_cosine", "switch_energy"),
    ]
    return tabulate("switching_blocks", "The first switch, block by block (paper, section 7)", rows, notes)
