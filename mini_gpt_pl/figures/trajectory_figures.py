"""Figures that need a trajectory and nothing else of a run, so that they can be drawn while it is still going on.

python -m mini_gpt_pl.figures.trajectory_figures runs/mine/trajectory.safetensors --out pictures
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from mini_gpt_pl.command_line import one_line_errors
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.figures.plotting import BACKBONE, GREY, NULL, RESIDUAL, STYLE, WIDTH, legend_below, render
from mini_gpt_pl.geometry.path import nulls, pca
from mini_gpt_pl.geometry.path.trajectory import Trajectory

_MOST_COLUMNS = 32
"""Snapshots of a heat map: each takes an eigenvalue problem for every group, for it and for its null."""


def draw(name: str, trajectory: Trajectory, whole: str) -> Figure:
    """Draw one of `TRAJECTORY_FIGURES`, in the style of all figures, of a selection that is called `whole`.

    Raises:
        UserError: Nothing has moved, or there are too few snapshots to say anything.
    """
    with mpl.rc_context(STYLE):
        return TRAJECTORY_FIGURES[name](trajectory, whole)


def drift_rows(trajectory: Trajectory) -> pca.Rows:
    """Coefficients of the drift of every snapshot but the first.

    Raises:
        UserError: There is no second snapshot, or nothing has moved.
    """
    if not bool((trajectory.gram().diagonal()[1:] > 0).any()):
        raise UserError("the recorded weights have not moved between snapshots: there is no path to show")
    return pca.drifts(len(trajectory))[1:]


def growing(gram: pca.Gram, read: Callable[[pca.Gram], float]) -> list[float]:
    """Numbers of the path up to each snapshot from the second on; NaN while nothing has moved."""
    numbers = []
    for k in range(2, len(gram) + 1):
        try:
            numbers.append(read(gram[:k, :k]))
        except ValueError:
            numbers.append(math.nan)
    return numbers


def spectrum(trajectory: Trajectory, whole: str) -> Figure:
    """Share of each principal component of the drift, whole selection and groups, raw and unit rows, and both nulls."""
    rows, gram = drift_rows(trajectory), trajectory.gram()
    curves = [(trajectory.gram(group), "-", {"color": GREY, "lw": 0.8}) for group in moved_groups(trajectory)]
    curves += [
        (gram, "o-", {"color": BACKBONE, "ms": 3, "label": whole}),
        (nulls.walk(gram), "--", {"color": RESIDUAL, "lw": 1, "label": "walk of the same step lengths"}),
        (trajectory.decaying_walk(), ":", {"color": NULL, "lw": 1.2, "label": "the same under weight decay"}),
    ]
    figure = Figure(figsize=(WIDTH, 3.3))
    for axes, unit in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
        found = [pca.pca(path, rows, normalise=unit) for path, _, _ in curves]
        for parts, (_, style, look) in zip(found, curves, strict=True):
            axes.plot(range(1, len(parts.ratios) + 1), parts.ratios, style, **look)
        axes.set_yscale("log")
        axes.set_ylim(max(1e-5, axes.get_ylim()[0]), 1.5)
        shares = f"PC1 {100 * found[-3].pc1:.1f} % (null {100 * found[-1].pc1:.1f} %)"
        axes.set_title(f"{'Unit rows' if unit else 'Raw drift'}: {shares}", fontsize=9)
        axes.set_xlabel("component")
    left = figure.axes[0]
    left.set_ylabel("share of squared drift")
    handles = left.get_legend_handles_labels()[0]
    handles.insert(1, left.plot([], [], color=GREY, lw=0.8, label="its groups")[0])
    figure.legend(handles=handles, loc="outside lower center", ncols=4, columnspacing=1.2)
    return figure


def moved_groups(trajectory: Trajectory) -> list[str]:
    """Return the groups whose weights have moved; frozen ones have no direction."""
    lengths = trajectory.grams.diagonal(dim1=1, dim2=2)[:, 1:]
    return [group for group, steps in zip(trajectory.groups, lengths, strict=True) if steps.any()]


def path(trajectory: Trajectory, whole: str) -> Figure:
    """The drift on its own PC1 and PC2, beside the decaying walk on its own; time is the colour.

    Right: both coordinates against the step.
    """
    rows = drift_rows(trajectory)
    if len(rows) < 2:
        raise UserError("a path on two components takes three snapshots")
    steps = trajectory.steps
    figure = Figure(figsize=(WIDTH, 3.4))
    left, right = figure.subplots(1, 2)
    gram = trajectory.gram()
    for matrix, colour, style, label in (
        (trajectory.decaying_walk(), NULL, ":", "decaying walk"),
        (gram, BACKBONE, "-", whole),
    ):
        first, second = _coordinates(matrix)
        left.plot(first, second, style, color=colour, lw=1, label=label)
        right.plot(steps, first, style, color=colour, lw=1.3, label=f"PC1, {label}")
        right.plot(steps, second, style, color=RESIDUAL, lw=1.3 if style == "-" else 1, label=f"PC2, {label}")
    points = left.scatter(first, second, c=steps, cmap="viridis", s=14, zorder=3)
    left.plot([0], [0], "+", color=NULL, ms=8)
    left.set(xlabel="PC1, parameter units", ylabel="PC2, parameter units")
    left.set_title("Drift from $\\theta_0$ (+)", fontsize=9)
    right.set(xlabel="step", ylabel="parameter units")
    right.set_title("Coordinates", fontsize=9)
    figure.colorbar(points, ax=left, label="step", shrink=0.85)
    legend_below(left, 2)
    legend_below(right, 2)
    return figure


def _coordinates(gram: pca.Gram) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Drifts of all snapshots on PC1 and PC2; zero on a PC2 that is not there. PC2 ends up positive."""
    drifts = pca.drifts(len(gram))
    directions = pca.pca(gram, drifts[1:]).directions
    first = pca.inner(gram, drifts, directions[0])
    second = pca.inner(gram, drifts, directions[1]) if len(directions) > 1 else torch.zeros_like(first)
    return first, second * (-1.0 if second[-1] < 0 else 1.0)


def groups(trajectory: Trajectory, whole: str) -> Figure:
    """Excess over the decaying walk, by group and step: of PC1, and of the update's alignment with v_b of its past.

    Every column uses the snapshots up to its step only.
    """
    drift_rows(trajectory)
    if len(trajectory) < 3:
        raise UserError("a map over steps takes three snapshots")
    names = [*moved_groups(trajectory), None]
    columns = shown_columns(len(trajectory))
    height = min(7.0, max(2.6, 1.2 + 0.22 * len(names)))
    figure = Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(wspace=0.06))
    axes_pair = figure.subplots(1, 2, sharey=True)
    steps = [trajectory.steps[k] for k in columns]
    pc1, update = (excess(trajectory, names, columns) for excess in (pc1_excess, update_excess))
    _heat_map(figure, axes_pair[0], 100.0 * pc1, steps, "Excess of PC1, points")
    _heat_map(figure, axes_pair[1], update, steps, "Excess of the update's cosine")
    labels = [whole if name is None else name.removeprefix("blocks.") for name in names]
    axes_pair[0].set_yticks(range(len(labels)), labels, fontsize=5 if len(labels) > 16 else 8)
    axes_pair[0].set_ylabel("parameter group")
    return figure


def shown_columns(count: int) -> list[int]:
    """Return which of `count` snapshots a map shows: all from the second one on, or evenly spaced ones and the last."""
    return sorted({round(x) for x in np.linspace(1, count - 1, min(count - 1, _MOST_COLUMNS))})


def pc1_excess(
    trajectory: Trajectory, names: Sequence[str | None], columns: Sequence[int]
) -> Float[Tensor, "names columns"]:
    """PC1 minus that of the decaying walk, each with the snapshots up to a column; NaN before anything has moved.

    Args:
        trajectory: The snapshots.
        names: Groups; None for the whole selection.
        columns: Positions of snapshots.
    """

    def pc1(grams: Float[Tensor, "g n n"]) -> Float[Tensor, " g"]:
        # Several paths at once: single eigenvalue problems of this size are all overhead.
        rows = pca.drifts(grams.shape[-1])[1:]
        energy = torch.linalg.eigvalsh(rows @ grams @ rows.T).clamp_min(0.0)
        total = energy.sum(-1)
        return torch.where(total > 0, energy[:, -1] / total.clamp_min(1e-300), torch.nan)

    return _excess(pc1, trajectory, names, columns)


def update_excess(
    trajectory: Trajectory, names: Sequence[str | None], columns: Sequence[int]
) -> Float[Tensor, "names columns"]:
    """Cosine of the latest increment with v_b of its past minus that of the decaying walk; NaN without a past."""
    return _excess(pca.latest_update_alignment, trajectory, names, columns)


def _excess(
    read: Callable[[Tensor], Tensor], trajectory: Trajectory, names: Sequence[str | None], columns: Sequence[int]
) -> Float[Tensor, "names columns"]:
    """Numbers of the snapshots up to each column minus those of the decaying walks; NaN where decay is unknown."""
    walks = [trajectory.decaying_walk(name) for name in names]
    if not all(torch.isfinite(walk).all() for walk in walks):
        return torch.full((len(names), len(columns)), torch.nan, dtype=torch.float64)
    grams = torch.stack([*(trajectory.gram(name) for name in names), *walks])
    numbers = torch.stack([read(grams[:, : k + 1, : k + 1]) for k in columns], 1)
    return numbers[: len(names)] - numbers[len(names) :]


def _heat_map(figure: Figure, axes: Axes, values: Float[Tensor, "names columns"], steps: list[int], title: str) -> None:
    """Draw one row for each group, the whole above a line, colours symmetric about no excess."""
    top = float(values[~values.isnan()].abs().max()) if bool((~values.isnan()).any()) else 1.0
    edges = np.arange(len(steps) + 1) - 0.5
    colours = TwoSlopeNorm(0.0, -max(top, 1e-9), max(top, 1e-9))
    rows = np.arange(len(values) + 1) - 0.5
    image = axes.pcolormesh(edges, rows, np.ma.masked_invalid(values), cmap="RdBu_r", norm=colours, rasterized=True)
    axes.axhline(len(values) - 1.5, color=NULL, lw=1.2)
    axes.grid(visible=False)
    ticks = np.unique(np.linspace(0, len(steps) - 1, min(5, len(steps))).round().astype(int))
    axes.set_xticks(ticks, [f"{steps[k]:,}" for k in ticks], fontsize=8)
    axes.set_xlabel("step")
    axes.set_title(title, fontsize=9)
    figure.colorbar(image, ax=axes, pad=0.02)


TRAJECTORY_FIGURES: dict[str, Callable[[Trajectory, str], Figure]] = {
    "spectrum": spectrum,
    "path": path,
    "blocks": groups,
}
"""By the last part of their W&B keys; each raises a UserError where nothing has moved or snapshots are too few."""


def draw_files(trajectory: Trajectory, whole: str) -> dict[str, bytes]:
    """Draw all of `TRAJECTORY_FIGURES` that the trajectory allows, as PNG files by name."""
    files = {}
    for name in TRAJECTORY_FIGURES:
        with suppress(UserError):  # too few snapshots, or nothing has moved yet
            files[name] = render(draw(name, trajectory, whole), "png")
    return files


def main() -> None:
    """Draw the figures of a trajectory file, such as one that a run is still adding to."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("trajectory", type=Path, help="trajectory.safetensors of a run")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the PNG files")
    parser.add_argument("--whole", default="trunk", help="name of the whole selection")
    parser.add_argument("--nice", type=int, default=0, help="priority: up to 19, to stay out of the way of training")
    options = parser.parse_args()
    os.nice(options.nice)
    with one_line_errors():
        for name, data in draw_files(Trajectory.load(options.trajectory), options.whole).items():
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / f"{name}.png").write_bytes(data)


if __name__ == "__main__":
    main()
