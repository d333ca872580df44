"""Tables of one run about its learning curve: loss and over-fitting, and what happens where the probe switches."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import pandas as pd
import torch

from mini_gpt_pl.geometry.path import nulls, switching
from mini_gpt_pl.geometry.path.switching import Interval, SwitchReport
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.report.calibration import probes_table
from mini_gpt_pl.report.measures import RecordedPath
from mini_gpt_pl.report.sheet import Cell, Row, Table, number, tabulate, word
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.study.beside import Setting
from mini_gpt_pl.stories.switches import P_OOD, switches_of

LOSS, TRAIN, P_IN = "val/loss", "train/lm_loss", "probe/p_in"


# ---------------------------------------------------------------------------------------------------- learning


@dataclass(frozen=True)
class Fit:
    """Where validation and training loss part.

    Args:
        best: Lowest validation loss, in nats per token.
        best_step: Its step.
        last: Validation loss at the end.
        train: Mean training loss on language since the evaluation before the last; NaN if it was not logged.
        parted: First evaluation from which on validation lies above training loss; None where it does not at the end.
    """

    best: float
    best_step: int
    last: float
    train: float
    parted: int | None

    @property
    def rise(self) -> float:
        """Validation loss at the end above its lowest, in nats per token."""
        return self.last - self.best

    @property
    def overfits(self) -> bool:
        """Whether validation loss has risen by more than 1 % of its lowest: less is noise of single evaluations."""
        return self.rise > 0.01 * abs(self.best)


def fit_of(run: Run) -> Fit | None:
    """Compare validation loss with the mean training loss of the steps since the evaluation before; None without."""
    loss, train = run.series(LOSS), run.series(TRAIN)
    if loss.empty:
        return None
    means = pd.Series(math.nan, index=loss.index)
    before = -1
    for step in loss.index:
        means.loc[step] = train[(train.index > before) & (train.index <= step)].mean()
        before = step
    above = loss > means
    parted = None
    for step in reversed(loss.index):
        if not above[step]:
            break
        parted = int(step)
    best = int(loss.argmin())
    return Fit(float(loss.iloc[best]), int(loss.index[best]), float(loss.iloc[-1]), float(means.iloc[-1]), parted)


def learning(run: Run, setting: Setting) -> list[Table]:
    """Loss, over-fitting and the probe's accuracy: best, and at the end."""
    rows: list[Row] = []

    def add(words: str, value: float, form: str, key: str = "", step: float = math.nan) -> None:
        if not math.isnan(value):
            row = {"quantity": word(words), "measured": number(value, form), "at step": number(step, "{:,.0f}")}
            rows.append({**row, **setting.cell(key, form)})
            keys.append(key)

    keys: list[str] = []
    fit = fit_of(run)
    if fit is not None:
        add("validation loss, lowest (nats per token)", fit.best, "{:.3f}", "loss_best", fit.best_step)
        add("validation loss at the end", fit.last, "{:.3f}", "loss_last", run.series(LOSS).index[-1])
        add("rise since its lowest", fit.rise, "{:+.3f}")
        add("training loss on language at the end", fit.train, "{:.3f}")
        add("validation minus training loss at the end", fit.last - fit.train, "{:+.3f}")
        parted = math.nan if fit.parted is None else fit.parted
        add("step from which validation stays above training loss", parted, "{:,.0f}")
    for metric, words, key in ((P_OOD, "p_ood", "p_ood"), (P_IN, "p_in", "p_in")):
        values = run.series(metric)
        if len(values):
            best = int(values.argmax())
            add(f"{words}, highest", float(values.iloc[best]), "{:.3f}", f"{key}_best", int(values.index[best]))
            add(f"{words} at the end", float(values.iloc[-1]), "{:.3f}", f"{key}_last", int(values.index[-1]))
    if not rows:
        return []
    notes = [
        "Training loss: mean over the logged steps since the evaluation before, without the probe's share.",
        f"Over-fitting: validation loss has risen by {fit.rise:.2f} nats per token since step {fit.best_step:,}, while "
        f"training loss went on to {fit.train:.2f}; what the run does later, it does on stories that it knows."
        if fit is not None and fit.overfits
        else None,
        *setting.notes(*keys),
    ]
    return [tabulate("learning", "Learning and over-fitting", rows, notes)]


def live_probes(path: RecordedPath, setting: Setting) -> list[Table]:
    """What the probes logged during the run, each beside its null."""
    frame = probes_table(path.run)
    notes = (
        "Directions are those of the snapshots before each measurement; means over the run, in units of the null.",
    )
    return [] if frame.empty else [Table("live_probes", "Live probes, means over the run", frame, notes)]


# --------------------------------------------------------------------------------------------------- switching


def switches(path: RecordedPath, setting: Setting) -> list[Table]:
    """Switches of p_ood beside stretches of equal length without one (paper, section 7)."""
    placed = switches_of(path.run)
    if not placed:
        return []
    intervals = list(dict.fromkeys(interval for _, interval in placed))
    axes = switching.Axes()
    found = [
        {past: switching.report(path.trajectory, interval, intervals, axes, past=past) for past in (False, True)}
        for _, interval in placed
    ]
    null = Null(path.trajectory)
    return [
        _switch_table(path, setting, placed, found, intervals, null),
        _switch_blocks(path, setting, placed, found[0][False], null),
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
    path: RecordedPath,
    setting: Setting,
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
        switching.mean_cosine(path.trajectory.gram(), intervals),
        switching.control_mean_cosine(path.trajectory, intervals),
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
        *setting.notes("switch_pairs"),
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
    path: RecordedPath,
    setting: Setting,
    placed: list[tuple[switching.Switch, Interval]],
    reports: dict[str | None, SwitchReport],
    null: Null,
) -> Table:
    rows = []
    for label, group in path.parts.items():
        cells = {"group": word(label), **_switch_cells(reports[group], null.place(placed[0][1], group))}
        if group is not None:
            cells |= {f"|cos|, {name}": cell for name, cell in setting.cell("switch_cosine", "{:.2f}").items()}
            cells |= {f"E_2:6, {name}": cell for name, cell in setting.cell("switch_energy", "{:.0%}").items()}
        rows.append(cells)
    pair = placed[0][0]
    notes = [
        f"The first switch, from the peak at step {pair.peak.step:,} to the trough at {pair.trough.step:,}, as in the "
        "paper; controls and ranks as in the table of all switches.",
        *setting.notes("switch_cosine", "switch_energy"),
    ]
    return tabulate("switching_blocks", "The first switch, block by block (paper, section 7)", rows, notes)
