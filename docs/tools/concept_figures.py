"""Figures of docs/concepts, from the results that the repository keeps.

python -m docs.tools.concept_figures
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from mini_gpt_pl.figures.plotting import BACKBONE, GREY, NULL, RESIDUAL, STYLE, WIDTH, legend_below, save
from mini_gpt_pl.geometry.path import nulls, pca
from mini_gpt_pl.geometry.path.pca import Gram
from mini_gpt_pl.geometry.vectors.alignment import noise_floor
from mini_gpt_pl.runs.folder import Run

_RUN = Path("replication/runs/seeds/seed42")
_PROBED_RUN = Path("h100_full")
_STYLES: dict[str, Any] = {
    "measured": {"color": BACKBONE, "lw": 1.6},
    "walk": {"color": GREY, "lw": 1.6},
    "decaying walk": {"color": NULL, "lw": 1.4, "ls": ":"},
}
_RUNGS = {
    "gradient, clipped": "gradient",
    "momentum": "momentum",
    "m / √v": "normalised",
    "m / √v, β₂ 0.99": "normalised_beta2_0.99",
    "m / √v, β₂ 0.8": "normalised_beta2_0.8",
    "m / √v, β₂ 0": "normalised_beta2_0",
    "update, with decay": "update",
}


def draw(docs: Path, folder: Path) -> list[Path]:
    """Draw every figure.

    Args:
        docs: The repository's folder of documentation, where the kept runs lie.
        folder: Where the PNGs go.

    Returns:
        The files.
    """
    run, probed = Run(docs / _RUN), Run(docs / _PROBED_RUN)
    figures: dict[str, Callable[[], Figure]] = {
        "path": lambda: path_figure(run),
        "walk": lambda: walk_figure(run),
        "growing": lambda: growing_figure(run),
        "ladder": lambda: ladder_figure(probed),
    }
    with mpl.rc_context(STYLE):
        return [save(figure(), folder, name)[0] for name, figure in figures.items()]


def grams(run: Run) -> dict[str, Gram]:
    """H of a run and of its two nulls, by name."""
    gram = run.trajectory.gram()
    return {
        "measured": gram,
        "walk": nulls.walk(gram),
        "decaying walk": nulls.decaying_walk(gram, run.trajectory.survival),
    }


def path_figure(run: Run) -> Figure:
    """The drift in the plane of its first two components, and two walks with the same step lengths in theirs."""
    figure = Figure(figsize=(WIDTH, 1.9))
    axes: Sequence[Axes] = figure.subplots(1, 3, sharex=True, sharey=True)
    for panel, (name, gram) in zip(axes, grams(run).items(), strict=True):
        rows = pca.drifts(len(gram))
        found = pca.pca(gram, rows[1:])
        x, y = (pca.inner(gram, rows, direction).numpy() for direction in found.directions[:2])
        y = y * (1 if y[len(y) // 3] >= 0 else -1)  # the sign of PC2 means nothing
        panel.plot(x, y, **_STYLES[name])
        panel.plot(x[:1], y[:1], "o", color=RESIDUAL, ms=4)
        panel.annotate("θ₀", (x[0], y[0]), xytext=(4, -11), textcoords="offset points", color=RESIDUAL)
        panel.set_title(f"{name}: PC1 {found.pc1:.1%}", fontsize=9)
        panel.set_xlabel("along v_b")
        panel.set_aspect("equal")
    axes[0].set_ylabel("along PC2")
    return figure


def walk_figure(run: Run) -> Figure:
    """PC1 of random walks by their number of steps, and the first shares of a run beside those of its nulls."""
    figure = Figure(figsize=(WIDTH, 2.8))
    left, right = figure.subplots(1, 2)
    counts = [2, 3, 5, 8, 12, 20, 35, 60, 100]
    for dim, shade in ((10, "#a9c8e6"), (1000, BACKBONE)):
        shares = [_sampled_pc1(count, dim) for count in counts]
        left.plot(counts, shares, "o-", ms=3, lw=1, color=shade, label=f"sampled, D = {dim:,}")
    left.plot(counts, [_orthogonal_pc1(count) for count in counts], color=NULL, ls=":", label="orthogonal steps")
    left.axhline(8 / math.pi**2, color=RESIDUAL, lw=1, label="8/π²")
    left.set_xscale("log")
    left.set(xlabel="steps of equal length", ylabel="PC1 of the drift")
    legend_below(left, 2)
    for name, gram in grams(run).items():
        first = pca.pca(gram, pca.drifts(len(gram))[1:]).ratios[:6].numpy()
        label = "seed 42" if name == "measured" else name
        right.plot(range(1, 7), first, marker="o", ms=3, label=label, **_STYLES[name])
    right.set_yscale("log")
    right.set(xlabel="component", ylabel="share")
    legend_below(right, 2)
    return figure


def _orthogonal_pc1(count: int) -> float:
    return pca.pca(torch.eye(count + 1, dtype=torch.float64), pca.drifts(count + 1)[1:]).pc1


def _sampled_pc1(count: int, dim: int, draws: int = 100) -> float:
    """Mean PC1 of walks with Gaussian steps."""
    rng = np.random.Generator(np.random.Philox(key=count * 10_000 + dim))
    return float(np.mean([_pc1_of(torch.from_numpy(rng.standard_normal((count, dim)))) for _ in range(draws)]))


def _pc1_of(steps: Float[Tensor, "T D"]) -> float:
    energy = torch.linalg.svdvals(steps.cumsum(0)).square()
    return float(energy[0] / energy.sum())


def growing_figure(run: Run) -> Figure:
    """PC1 and cos(v_b, theta_0) of the snapshots so far, as they stood while the run went on, beside both nulls."""
    figure = Figure(figsize=(WIDTH, 2.7))
    left, right = figure.subplots(1, 2)
    steps, survival = run.trajectory.steps, run.trajectory.survival
    counts = range(3, len(steps) + 1)
    for name, gram in grams(run).items():
        found = [nulls.statistics(gram[:n, :n], survival[:n]) for n in counts]
        label = "seed 42" if name == "measured" else name
        at = [steps[n - 1] for n in counts]
        left.plot(at, [entry["pc1"] for entry in found], label=label, **_STYLES[name])
        right.plot(at, [entry["cos_theta0"] for entry in found], label=label, **_STYLES[name])
    left.set(xlabel="step", ylabel="PC1 of the drift so far")
    right.set(xlabel="step", ylabel="cos(v_b so far, θ₀)")
    legend_below(left, 3)
    legend_below(right, 3)
    return figure


def ladder_figure(run: Run) -> Figure:
    """Mean |cos| with the past's backbone, rung by rung from the gradient to the update."""
    figure = Figure(figsize=(WIDTH, 2.8))
    axes = figure.subplots()
    values = [run.series(f"anatomy/{run.trunk}/cos_{rung}").abs().mean() for rung in _RUNGS.values()]
    floor = noise_floor(run.trajectory.dim)
    for position, (words, value) in enumerate(zip(_RUNGS, values, strict=True)):
        colour = GREY if "β₂" in words else BACKBONE
        axes.plot([floor, value], [position, position], color=colour, lw=1.2)
        axes.plot([value], [position], "o", color=colour, ms=6)
        axes.annotate(
            f"{value:.4f}", (value, position), xytext=(7, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_yticks(range(len(values)), list(_RUNGS))
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(floor, color=RESIDUAL, lw=1, label=f"noise floor √(2/(πD)), {floor:.5f}")
    axes.set_xlim(floor / 1.3, 3 * max(values))
    axes.set_xlabel("mean |cos| of one step with the past's v_b")
    legend_below(axes)
    return figure


def main(args: Sequence[str] | None = None) -> None:
    """Draw them into docs/concepts/figures of the checkout."""
    docs = Path(__file__).resolve().parents[2] / "docs"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=docs / "concepts" / "figures", help="folder (%(default)s)")
    for file in draw(docs, parser.parse_args(args).out):
        print(file)


if __name__ == "__main__":
    main()
