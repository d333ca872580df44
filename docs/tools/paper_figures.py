"""Figures 1, 2 and 4 of arXiv 2602.23696 as the paper has them, from the kept runs, the first two with a null.

    python -m docs.tools.paper_figures docs/replication/runs --out docs/replication/figures

Figure 1 is of block 0, raw PCA: coordinate and residual with p_ood behind. Figure 2 has gradients and updates of
block 0 in one. Figure 4 has the reheats behind the whole of their parent, from step 0. Figure 3: `fisher` of a report.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mini_gpt_pl.command_line import one_line_errors
from mini_gpt_pl.figures.plotting import BACKBONE, GREY, NULL, PC2, PROBE, RESIDUAL, STYLE, WIDTH, save
from mini_gpt_pl.geometry.path import pca
from mini_gpt_pl.geometry.vectors.alignment import noise_floor
from mini_gpt_pl.report.subject import Subject, estimate
from mini_gpt_pl.runs.folder import Run

BLOCK = "blocks.0"
SWITCH_STEP = 4000
REHEATS = {"lr1e-3": RESIDUAL, "lr6e-4": BACKBONE, "lr3e-4": PC2, "control": NULL}


def decomposition(run: Subject) -> Figure:
    """Figure 1: coordinate along block 0's own v_b and the length of what is left, with p_ood behind both."""
    path = run.trajectory
    rows = pca.drifts(len(path))
    figure = Figure(figsize=(WIDTH, 5.2))
    sides = figure.subplots(2, 1, sharex=True)
    for gram, style, words in ((path.gram(BLOCK), "-", ""), (path.decaying_walk(BLOCK), ":", ", decaying walk")):
        split = pca.decompose(gram, rows, pca.pca(gram, rows[1:]).backbone)
        sides[0].plot(path.steps, split.coordinate, style, color=BACKBONE, label=f"$a(t)${words}")
        sides[1].plot(path.steps, split.residual_norm, style, color=RESIDUAL, label=f"$||r(t)||${words}")
    p_ood = run.series("probe/p_ood")
    for axes in sides:
        behind = axes.twinx()
        behind.grid(visible=False)
        behind.plot(p_ood.index, p_ood, "--", color=PROBE, lw=0.8)
        behind.set(ylim=(-0.05, 0.95), ylabel="$p_{ood}$")
        axes.plot([], [], "--", color=PROBE, lw=0.8, label="$p_{ood}$")
        axes.set(ylabel="parameter units")
        _mark(axes)
    sides[0].legend(fontsize=7, loc="lower right")
    sides[1].legend(fontsize=7, loc="upper right")
    sides[0].set_title("Figure 1: block 0, seed 42")
    sides[1].set_xlabel("step")
    return figure


def linchpin(run: Subject) -> Figure:
    """Figure 2: gradients of single batches and 200-step updates of block 0 against its whole run's v_b."""
    path = run.trajectory
    rows, steps = pca.drifts(len(path))[1:], path.steps[1:]
    figure = Figure(figsize=(WIDTH, 4.2))
    axes = figure.subplots()
    aligned = {
        name: pca.update_alignment(gram, pca.pca(gram, rows).backbone)
        for name, gram in (("run", path.gram(BLOCK)), ("walk", path.decaying_walk(BLOCK)))
    }
    axes.plot(steps, aligned["run"].abs(), "o-", ms=3, color=RESIDUAL, label="200-step update, |cos|")
    axes.plot(steps, aligned["run"], "--", lw=1, color=RESIDUAL, label="the same, signed")
    axes.plot(steps, aligned["walk"].abs(), ":", lw=1.4, color=NULL, label="decaying walk, |cos|")
    found = run.replayed_at("gradient", "combined", BLOCK, "abs_cos")
    mean, spread = np.array([estimate(value) for value in found.values()]).T
    axes.errorbar(
        list(found), mean, yerr=spread, fmt="s", ms=4, color=BACKBONE, label="gradients of single batches, |cos|"
    )
    floor = noise_floor(path.dim_of(BLOCK))
    axes.axhline(floor, ls=":", lw=1, color="black", label=f"$\\sqrt{{2/\\pi D}}$ = {floor:.1e}")
    axes.axhline(0, lw=0.6, color="black")
    axes.set(xlabel="step", ylabel="cosine with $v_b$", title="Figure 2: block 0, seed 42")
    _mark(axes)
    axes.legend(fontsize=7)
    return figure


def reheats(parent: Subject, runs: Sequence[Run]) -> Figure:
    """Figure 4: p_ood of reheated runs at their parent's last step plus their own, the parent from step 0."""
    figure = Figure(figsize=(WIDTH, 4.0))
    axes = figure.subplots()
    whole = parent.series("probe/p_ood")
    axes.plot(whole.index, whole, color=GREY, lw=1.2, label="original training")
    start = int(whole.index[-1])
    for run in runs:
        own, name = run.series("probe/p_ood"), run.path.name
        style = "--" if name == "control" else "o-"
        axes.plot(own.index + start, own, style, ms=3, lw=1.1, color=REHEATS[name], label=name)
        axes.plot([own.idxmax() + start], [own.max()], "*", ms=12, color=REHEATS[name], mec="white", mew=0.6)
    axes.axvline(start, ls="--", lw=1, color="black", alpha=0.5)
    axes.set(xlabel="step", ylabel="$p_{ood}$", ylim=(-0.05, 0.9), title="Figure 4: reheats of seed 42")
    axes.legend(fontsize=7)
    return figure


def _mark(axes: Axes) -> None:
    axes.axvline(SWITCH_STEP, ls="--", lw=0.8, color="0.75", zorder=0)


def main(args: Sequence[str] | None = None) -> None:
    """Draw the three figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="the folder of the kept runs of the replication")
    parser.add_argument("--out", type=Path, required=True, help="folder of the PNG files")
    options = parser.parse_args(args)
    with one_line_errors(), mpl.rc_context(STYLE):
        seed = Subject.of(Run(options.runs / "seeds" / "seed42"))
        warm = [Run(options.runs / "reheat" / name) for name in REHEATS]
        figures = {"figure1": decomposition(seed), "figure2": linchpin(seed), "figure4": reheats(seed, warm)}
        for name, figure in figures.items():
            for path in save(figure, options.out, name):
                print(path)


if __name__ == "__main__":
    main()
