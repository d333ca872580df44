"""Figures of runs that grok: accuracies and commutators over steps, and PC1 beside its nulls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
    "measured": "o",
    "walk": "x",
    "decaying_walk": "d",
    "innovation_walk": "s",
    "autoregressive_walk": "^",
    "permuted": "+",
}


def _only(run: Run) -> ResidueRun:
    runs = residue_runs([run])
    if not runs:
        raise UserError(f"the run {run.path} was not evaluated on a training and a test set")
    return runs[0]


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
        for window in one.phases[1:]:
            part.axvline(window.last, color=NULL, lw=0.6, ls=":")
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
    figure = Figure(figsize=(WIDTH, 2.6 * ((len(groups) + 1) // 2)))
    grid = figure.subplots((len(groups) + 1) // 2, 2, sharex=True, sharey=True).flatten()
    ends = windows.growing_ends(len(trajectory), 40)
    steps = [trajectory.steps[end - 1] for end in ends]
    for axes, group in zip(grid, groups, strict=False):
        gram = trajectory.gram(group)
        paths = {"measured": gram, **walks(gram, trajectory.survival)}
        for name, style in _GROWING.items():
            axes.plot(steps, centred.growing_pc1(paths[name], ends), label=NULLS.get(name, name), **style)
        axes.set_title(short(group or run.trunk))
        _milestones(axes, one)
    grid[0].legend()
    for spare in grid[len(groups) :]:
        spare.set_visible(False)
    for axes in grid[-2:]:
        axes.set_xlabel("steps so far")
    return figure


def _milestones(axes: Axes, run: ResidueRun) -> None:
    for name in ("train_99", "test_90", "test_98_thrice"):
        if (step := run.steps[name]) is not None:
            axes.axvline(step, color=NULL, lw=0.6, ls=":")


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
    figure = Figure(figsize=(WIDTH, 0.9 + 0.26 * len(labels) * ((len(shown) + 1) // 2)))
    grid = figure.subplots((len(shown) + 1) // 2, 2, sharey=True, squeeze=False).flatten()
    for axes, window in zip(grid, shown, strict=False):
        _points(axes, {label: numbers["pc1_centred"] for label, numbers in one.numbers(window).items()}, labels)
        axes.set_title(window.words, fontsize=9)
    for spare in grid[len(shown) :]:
        spare.set_visible(False)
    handles, words = grid[0].get_legend_handles_labels()
    figure.legend(handles, words, loc="outside lower center", ncols=6)
    return figure


def _points(axes: Axes, shares: Mapping[str, Mapping[str, float]], labels: Sequence[str]) -> None:
    colours = dict(zip(_MARKERS, (BACKBONE, GREY, NULL, RESIDUAL, SWITCH, PC2), strict=True))
    for name, marker in _MARKERS.items():
        heights = [labels.index(label) for label in shares]
        style: dict[str, Any] = {"mfc": "none"} if name != "measured" else {}
        values = [one[name] for one in shares.values()]
        axes.plot(
            values, heights, ls="", marker=marker, ms=5, color=colours[name], label=NULLS.get(name, name), **style
        )
    axes.set_yticks(range(len(labels)), [short(label) for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)


def curves(runs: Sequence[Run]) -> Figure:
    """Test accuracy, defect, gradient and c of every run, coloured by operation; without decay dashed.

    Raises:
        UserError: None of them is of the second task.
    """
    shown = residue_runs(runs)
    if not shown:
        raise UserError("none of the runs was evaluated on a training and a test set")
    units = list(dict.fromkeys(run.operation for run in shown))
    panels: tuple[tuple[str, Callable[[ResidueRun], object]], ...] = (
        ("test accuracy", lambda run: run.series(TEST)),
        ("D", lambda run: run.commutator("defect")),
        ("‖g‖", lambda run: run.commutator("norm_a")),
        ("c", lambda run: run.commutator("c")),
    )
    figure = Figure(figsize=(WIDTH, 5.0))
    grid = figure.subplots(2, 2, sharex=True).flatten()
    for axes, (title, series) in zip(grid, panels, strict=True):
        labelled: set[str] = set()
        for run in shown:
            label = "" if run.kind in labelled else run.kind
            labelled.add(run.kind)
            colour = DISTINCT[units.index(run.operation) % len(DISTINCT)]
            line(axes, series(run), label, colour, lw=1, ls="--" if run.is_free else "-")  # type: ignore[arg-type]
        axes.set_title(title)
        if title != "test accuracy":
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
