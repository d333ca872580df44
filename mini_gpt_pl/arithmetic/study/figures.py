"""Figures of runs that grok: accuracies and commutators over steps, and PC1 beside its nulls."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mini_gpt_pl.arithmetic.nulls import walks
from mini_gpt_pl.arithmetic.study.paths import short
from mini_gpt_pl.arithmetic.study.runs import NULLS, TEST, TRAIN, ResidueRun, residue_runs
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.figures.plotting import BACKBONE, DISTINCT, GREY, NULL, PC2, RESIDUAL, SWITCH, WIDTH, line
from mini_gpt_pl.geometry.path import centred, windows
from mini_gpt_pl.runs.folder import Run

_SERIES = (("defect", "D", RESIDUAL), ("norm_a", "‖g‖", GREY), ("c", "c", BACKBONE), ("relative", "relative", PC2))
_GROWING: Mapping[str, Mapping[str, Any]] = {
    "measured": {"color": BACKBONE, "lw": 1.6},
    "walk": {"color": GREY, "ls": ":"},
    "decaying_walk": {"color": NULL, "ls": "--", "lw": 0.9},
    "innovation_walk": {"color": RESIDUAL, "ls": "--", "lw": 0.9},
}
_MARKERS = {
    "measured": ("o", BACKBONE),
    "walk": ("x", GREY),
    "decaying_walk": ("d", NULL),
    "innovation_walk": ("s", RESIDUAL),
    "autoregressive_walk": ("^", SWITCH),
    "permuted": ("+", PC2),
}


def _only(run: Run) -> ResidueRun:
    runs = residue_runs([run])
    if not runs:
        raise UserError(f"the run {run.path} was not evaluated on a training and a test set")
    return runs[0]


def _dotted(axes: Axes, steps: Sequence[int | None]) -> None:
    for step in steps:
        if step is not None:
            axes.axvline(step, color=NULL, lw=0.6, ls=":")


def _grid(count: int, height: float, *, sharex: bool = False, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with two columns of panels, a spare one hidden."""
    rows = (count + 1) // 2
    figure = Figure(figsize=(WIDTH, height))
    grid: list[Axes] = np.ravel(figure.subplots(rows, 2, squeeze=False, sharex=sharex, sharey=sharey)).tolist()
    for spare in grid[count:]:
        spare.set_visible(False)
    return figure, grid


def learning(run: Run) -> Figure:
    """Accuracies and ‖θ‖ above, the defect and what it is made of below, with the run's phases.

    Raises:
        UserError: It is no run of the second task.
    """
    one = _only(run)
    figure = Figure(figsize=(WIDTH, 4.6 if one.reported else 2.6))
    axes = figure.subplots(2 if one.reported else 1, 1, sharex=True, squeeze=False)[:, 0]
    line(axes[0], one.series(TRAIN), "training accuracy", GREY)
    line(axes[0], one.series(TEST), "test accuracy", BACKBONE)
    weights = one.series("eval/weight_norm")
    line(axes[0], weights / weights.iloc[0], "‖θ‖ / ‖θ₀‖", SWITCH, ls="--")
    if one.reported:
        for name, label, colour in _SERIES:
            line(axes[1], one.commutator(name), label, colour)
        axes[1].set_yscale("log")
    for part in axes:
        _dotted(part, [window.last for window in one.phases[1:]])
        part.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes[-1].set_xlabel("step")
    return figure


def growing_pc1(run: Run) -> Figure:
    """Centred PC1 of the first snapshots beside its nulls: every matrix of the last block, every W_V, and the whole.

    Raises:
        UserError: It is no run of the second task, or has too few snapshots.
    """
    one, trajectory = _only(run), run.trajectory
    if len(trajectory) < 8:
        raise UserError(f"the run {run.path} has {len(trajectory)} snapshots: growing windows take 8")
    groups: list[str | None] = [group for group in trajectory.groups[:-4] if group.endswith("w_v")]
    groups += [*trajectory.groups[-4:], None]
    figure, grid = _grid(len(groups), 2.6 * ((len(groups) + 1) // 2), sharex=True, sharey=True)
    ends = windows.growing_ends(len(trajectory), 40)
    for axes, group in zip(grid, groups, strict=False):
        gram = trajectory.gram(group)
        paths = {"measured": gram, **walks(gram, trajectory.survival)}
        for name, style in _GROWING.items():
            curve = centred.growing_pc1(paths[name], ends)
            axes.plot([trajectory.steps[end - 1] for end in ends], curve, label=NULLS.get(name, name), **style)
        axes.set_title(short(group or run.trunk))
        _dotted(axes, [one.steps[name] for name in ("train_99", "test_90", "test_98_thrice")])
    grid[0].legend()
    for axes in grid[-2:]:
        axes.set_xlabel("steps so far")
    return figure


def pc1(run: Run) -> Figure:
    """Centred PC1 to the stop and in each phase, every matrix beside its nulls.

    Raises:
        UserError: No window holds enough snapshots.
    """
    one = _only(run)
    shown = [window for window in one.phases if one.numbers(window)]
    if not shown:
        raise UserError(f"the run {run.path} has too few snapshots")
    labels = list(one.numbers(shown[0]))
    figure, grid = _grid(len(shown), 0.9 + 0.26 * len(labels) * ((len(shown) + 1) // 2), sharey=True)
    for axes, window in zip(grid, shown, strict=False):
        shares = {label: numbers["pc1_centred"] for label, numbers in one.numbers(window).items()}
        heights = [labels.index(label) for label in shares]
        for name, (marker, colour) in _MARKERS.items():
            values, filled = [of[name] for of in shares.values()], colour if name == "measured" else "none"
            style: dict[str, Any] = {"ls": "", "ms": 5, "color": colour, "mfc": filled, "label": NULLS.get(name, name)}
            axes.plot(values, heights, marker=marker, **style)
        axes.set_yticks(range(len(labels)), [short(label) for label in labels])
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_title(window.words, fontsize=9)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def curves(runs: Sequence[Run]) -> Figure:
    """Test accuracy, defect, gradient and c of every run, coloured by operation; without decay dashed.

    Raises:
        UserError: None of them is of the second task.
    """
    shown = residue_runs(runs)
    if not shown:
        raise UserError("none of the runs was evaluated on a training and a test set")
    colours = dict(zip(dict.fromkeys(run.operation for run in shown), itertools.cycle(DISTINCT), strict=False))
    figure, grid = _grid(4, 5.0, sharex=True)
    panels = (("test accuracy", ""), ("D", "defect"), ("‖g‖", "norm_a"), ("c", "c"))
    for axes, (title, name) in zip(grid, panels, strict=True):
        labelled: set[str] = set()
        for run in shown:
            series = run.commutator(name) if name else run.series(TEST)
            label = "" if run.kind in labelled else run.kind
            labelled.add(run.kind)
            line(axes, series, label, colours[run.operation], lw=1, ls="--" if run.is_free else "-")
        axes.set_title(title)
        if name:
            axes.set_yscale("log")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    for axes in grid[2:]:
        axes.set_xlabel("step")
    return figure


FIGURES: Mapping[str, Callable[[Run], Figure]] = {
    "grokking_learning": learning,
    "grokking_pc1": pc1,
    "grokking_growing_pc1": growing_pc1,
}
COMPARISON_FIGURES: Mapping[str, Callable[[Sequence[Run]], Figure]] = {"grokking_curves": curves}
