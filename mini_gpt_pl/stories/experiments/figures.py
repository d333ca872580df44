"""Figures of the experiments that train again from a run's checkpoints."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.figures.plotting import BACKBONE, GREY, NULL, PC2, RESIDUAL, WIDTH, legend_below
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.experiments.records import Records
from mini_gpt_pl.stories.experiments.relaxation import Answers
from mini_gpt_pl.stories.experiments.tables import REACHED, depths

_STARTS = {"peak": RESIDUAL, "trough": PC2, "displaced": GREY, "initial": NULL, "last": BACKBONE}


def recovery(run: Run) -> Figure:
    """p_ood while each start is trained on, one panel for each pair of a peak and a trough.

    Raises:
        UserError: The experiment was not done.
    """
    trials = _trials(run, "recovery")
    pairs = list(dict.fromkeys(trial["labels"]["peak"] for trial in trials if "peak" in trial["labels"]))
    figure = Figure(figsize=(WIDTH, 2.8))
    panels = figure.subplots(1, len(pairs), sharey=True, squeeze=False)[0]
    for axes, peak in zip(panels, pairs, strict=True):
        for trial in trials:
            labels = trial["labels"]
            if labels.get("peak", peak) == peak:
                answers = [Answers(*row) for row in trial["answers"]]
                style = ":" if labels["start"] in ("initial", "displaced") else "-"
                axes.plot(
                    [row.step for row in answers],
                    [row.p_ood for row in answers],
                    style,
                    color=_STARTS[labels["start"]],
                    label=labels["start"],
                )
        axes.axhline(REACHED, color=NULL, lw=0.8, ls="--")
        trough = next(trial["labels"]["trough"] for trial in trials if trial["labels"].get("peak") == peak)
        axes.set(
            xlabel="steps since the checkpoint", title=f"peak {peak:,.0f}, trough {trough:,.0f}", ylim=(-0.03, 1.03)
        )
    panels[0].set_ylabel("$p_{ood}$")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def depth(run: Run) -> Figure:
    """p_ood restored after noise of each size, one curve for each checkpoint.

    Raises:
        UserError: The experiment was not done.
    """
    found = depths(run)
    if not found:
        raise UserError(f"the run {run.path} has no depth experiment: mini_gpt_pl experiment {run.path} depth")
    figure = Figure(figsize=(WIDTH, 3.6))
    axes = figure.subplots()
    for one in found:
        spread = one.restored.std(0, ddof=1) if len(one.restored) > 1 else None
        places = np.arange(len(one.sigmas))  # the sizes are spaced by factors, and the first is none
        label = f"{one.kind} {one.step:,}"
        axes.errorbar(
            places, one.restored.mean(0), spread, fmt="o-", ms=3, capsize=2, color=_STARTS[one.kind], label=label
        )
    axes.set_xticks(range(len(found[0].sigmas)), [f"{sigma:g}" for sigma in found[0].sigmas])
    axes.set(xlabel="noise sigma, relative to each matrix", ylabel="$p_{ood}$ after training", ylim=(0, None))
    legend_below(axes, 4)
    return figure


def blocks(run: Run) -> Figure:
    """p_ood at each share of the way that one block moves, beside random directions, one panel for each block.

    Raises:
        UserError: The experiment was not done.
    """
    moved: dict[str, dict[bool, dict[float, list[float]]]] = defaultdict(
        lambda: {True: defaultdict(list), False: defaultdict(list)}
    )
    for trial in _trials(run, "blocks"):
        labels = trial["labels"]
        if labels["share"]:
            switch = labels["direction"] == "switch"
            moved[labels["block"]][switch][labels["share"]].append(Answers(*trial["answers"][-1]).p_ood)
    figure = Figure(figsize=(WIDTH, 1.7 * (1 + (len(moved) - 1) // 4) + 0.6))
    panels = figure.subplots(1 + (len(moved) - 1) // 4, min(4, len(moved)), sharey=True, sharex=True, squeeze=False)
    for axes in panels.flat[len(moved) :]:
        axes.set_visible(False)
    for axes, (block, kinds) in zip(panels.flat, moved.items(), strict=False):
        for switch, values in kinds.items():
            shares = sorted(values)
            means = [float(np.mean(values[share])) for share in shares]
            face = RESIDUAL if switch else "white"
            label = "towards the trough" if switch else "random"
            axes.plot(shares, means, "o-", ms=4, color=RESIDUAL if switch else GREY, mfc=face, label=label)
        axes.set_title(block, fontsize=8)
    for axes in panels[-1]:
        axes.set_xlabel("share of the way")
    for axes in panels[:, 0]:
        axes.set_ylabel("$p_{ood}$")
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _trials(run: Run, name: str) -> list[Any]:
    trials = list(Records(run, name).trials.values())
    if not trials:
        raise UserError(f"the run {run.path} has no {name} experiment: mini_gpt_pl experiment {run.path} {name}")
    return trials


EXPERIMENT_FIGURES: Mapping[str, Callable[[Run], Figure]] = {
    "recovery": recovery,
    "depth": depth,
    "moved_blocks": blocks,
}
