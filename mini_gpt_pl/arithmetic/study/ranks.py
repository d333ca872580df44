"""Tables of a path's shape: how many directions it takes, counted in three ways, and where its PC1 turns over."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from mini_gpt_pl.arithmetic.study.moments import markers, moments
from mini_gpt_pl.arithmetic.study.runs import DECAYING, NULLS, NULLS_NOTE, Phase, ResidueRun
from mini_gpt_pl.arithmetic.study.tables import short
from mini_gpt_pl.geometry.path import centred, innovations, nulls, windows
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.report.settings import facts
from mini_gpt_pl.report.sheet import Cell, Row, Table, number, tabulate, word
from mini_gpt_pl.runs.folder import TRAJECTORY, Run

_COUNTS = {
    "k90_centred": ("r_90", "{:.0f}"),
    "rank_variances": ("effective, variances", "{:.2f}"),
    "rank_singular_values": ("effective, singular values", "{:.2f}"),
}
_MARKER_MODEL = "5 blocks, 4 heads, width 128, MLP 0"
_FEWEST = 7  # snapshots: shorter windows have no curve to turn


def rank_tables(run: Run) -> list[Table]:
    """Numbers of directions of every matrix's path, and where a growing window's PC1 turns; none without a path."""
    if not (run.path / TRAJECTORY).is_file():
        return []
    return [table for table in (_ranks(run), _turnover(run)) if not table.frame.empty]


def _ranks(run: Run) -> Table:
    path = ResidueRun.of(run).numbers(Phase("whole run", 0, run.trajectory.steps[-1]))
    rows: list[Row] = []
    for label, numbers in path.items():
        row: dict[str, Cell] = {"weights": word(short(label))}
        for name, (words, form) in _COUNTS.items():
            row[words] = number(numbers[name]["measured"], form)
            row |= {f"{words}: {NULLS[null]}": number(numbers[name][null], form) for null in DECAYING}
        rows.append(row)
    notes = [
        "Centred PCA of the whole run. r_90: components that hold 90 % of the spread; effective: exp of the entropy of "
        "the shares of variances s², or of singular values s, which is the larger.",
        _published(run),
        NULLS_NOTE,
    ]
    return tabulate("grokking_ranks", "How many directions the path of a matrix takes", rows, notes)


def _published(run: Run) -> str | None:
    """What the study of marker sums reports, for a run of its model."""
    if not markers(run) or facts(run)["model"] != _MARKER_MODEL:
        return None
    return "The study of marker sums prints the latter, and r_90 of 3 to 5."


def _turnover(run: Run) -> Table:
    trajectory = run.trajectory
    if len(trajectory) < _FEWEST:
        return tabulate("grokking_turnover", "", [])
    labels = (*trajectory.groups, run.trunk)
    grams = torch.cat([trajectory.grams, trajectory.gram()[None]])
    turns = {name: _turns(part, trajectory) for name, part in _paths(grams, trajectory).items()}
    rows: list[Row] = []
    for place, label in enumerate(labels):
        row = {"weights": word(short(label))}
        for name, steps in turns.items():
            step = steps[place]
            row[name] = word("none") if step is None else number(step, "{:,.0f}")
        rows.append(row)
    reached = [f"{words} at step {step:,}" for words, step in moments(run).items() if step is not None]
    notes = [
        "Last step of the growing window at which centred PC1 begins to fall twice in a row behind its late maximum, "
        "in up to 20 windows from the start on: the turnover that is read as a sign of generalisation. None: it does "
        "not turn. A null that turns there too says that the run was cut, or its steps shrank, there.",
        f"{'; '.join(reached)}." if reached else None,
        NULLS_NOTE,
    ]
    return tabulate("grokking_turnover", "Where the PC1 of a growing window turns", rows, notes)


def _paths(grams: Float[Tensor, "G n n"], trajectory: Trajectory) -> Mapping[str, Float[Tensor, "G n n"]]:
    """Measured paths and the nulls of them that need no draws, by column."""
    survival = trajectory.survival
    return {
        "measured": grams,
        NULLS["walk"]: nulls.walk(grams),
        NULLS["decaying_walk"]: nulls.decaying_walk(grams, survival),
        NULLS["innovation_walk"]: innovations.innovation_walk(grams, survival),
        NULLS["autoregressive_walk"]: innovations.autoregressive_walk(grams, survival),
    }


def _turns(grams: Float[Tensor, "G n n"], trajectory: Trajectory) -> list[int | None]:
    """Step at which each path's curve turns, None where it does not or nothing has moved."""
    ends = windows.growing_ends(len(trajectory))
    turns: list[int | None] = []
    for curve in centred.growing_pc1(grams, ends):
        turn = None if bool(curve.isnan().any()) else centred.turnover(curve)
        turns.append(None if turn is None else trajectory.steps[ends[turn] - 1])
    return turns
