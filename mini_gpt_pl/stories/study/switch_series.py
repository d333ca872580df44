"""What the switches of a run have in common: their dimension, and whether updates along them move the probe."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mini_gpt_pl.geometry.path import pca, switching
from mini_gpt_pl.geometry.path.centred import effective_ranks
from mini_gpt_pl.geometry.path.phases import correlate
from mini_gpt_pl.geometry.path.switching import Interval
from mini_gpt_pl.report.sheet import Cell, Row, Table, number, word
from mini_gpt_pl.report.subject import Subject
from mini_gpt_pl.stories.study.words import laid_out
from mini_gpt_pl.stories.switches import P_OOD, switches_of

_DRAWS = 200
_FEWEST = 8  # changes, for a correlation


def switch_series(subject: Subject) -> list[Table]:
    """Make the tables that a run's path and its evaluations allow."""
    intervals = list(dict.fromkeys(interval for _, interval in switches_of(subject)))
    return [*_dimension(subject, intervals), *_correlations(subject, intervals)]


def dimensions(gram: pca.Gram, stretches: Sequence[Interval]) -> Float[Tensor, " 3"]:
    """Dimension of the unit displacements of some stretches of a path, three times.

    Args:
        gram: H of the path.
        stretches: S of them.

    Returns:
        The effective rank exp(entropy of the shares of variance), the participation ratio
        (sum lambda)^2 / sum lambda^2, and the published count of displacements with a remainder above 1e-8 across the
        ones before, which is S unless two are the same. lambda are the eigenvalues of the matrix of cosines.
    """
    cosines = switching.pairwise_cosines(gram, stretches)
    energy = torch.linalg.eigvalsh(cosines).clamp_min(0.0)
    participation = energy.sum() ** 2 / energy.square().sum()
    # A displacement's remainder across the ones before is the diagonal of the Cholesky factor.
    remainders = torch.linalg.cholesky_ex(cosines).L.diagonal()
    return torch.stack([effective_ranks(energy)[0], participation, (remainders > 1e-8).sum().double()])


def _dimension(subject: Subject, intervals: Sequence[Interval]) -> list[Table]:
    if len(intervals) < 2:
        return []
    sets = _elsewhere(subject.trajectory.steps, intervals)
    rows: list[Row] = []
    for label, group in subject.parts.items():
        gram = subject.trajectory.gram(group)
        own = dimensions(gram, intervals)
        row = {"group": word(label), "switches": number(float(len(intervals)), "{:.0f}")}
        drawn = None
        if sets:
            drawn = torch.stack([dimensions(gram, chosen) for chosen in sets])
        for column, name in enumerate(("effective rank", "participation", "published count")):
            row[name] = number(float(own[column]), "{:.2f}" if column < 2 else "{:.0f}")
            if drawn is not None and column < 2:
                null = drawn[:, column]
                row[f"{name}, any stretches"] = number(float(null.mean()), "{:.2f}", float(null.std()))
                row[f"{name}, rank"] = number(float((null < own[column]).double().mean()), "{:.2f}")
        rows.append(row)
    return laid_out("switching_dimension", rows, draws=_DRAWS)


def _elsewhere(steps: Sequence[int], intervals: Sequence[Interval]) -> list[list[Interval]]:
    """Sets of stretches as long as the switches, anywhere on the path; none shares increments unless switches do.

    Returns:
        The sets, fewer than `_DRAWS` or none where the path has hardly room for them.
    """
    rng = np.random.Generator(np.random.Philox(key=0))
    pools = [switching.control_intervals(steps, Interval(i.first, i.last), (), limit=len(steps)) for i in intervals]
    shared = [any(switching.overlap(a, b) for b in intervals if b != a) for a in intervals]
    sets: list[list[Interval]] = []
    for _ in range(20 * _DRAWS):
        chosen: list[Interval] = []
        for place in sorted(range(len(pools)), key=lambda place: (-len(steps) + len(pools[place]), rng.random())):
            free = [s for s in pools[place] if shared[place] or not any(switching.overlap(s, c) for c in chosen)]
            if free:
                chosen.append(free[int(rng.integers(len(free)))])
        if len(chosen) == len(pools):
            sets.append(chosen)
        if len(sets) == _DRAWS:
            break
    return sets


def _correlations(subject: Subject, intervals: Sequence[Interval]) -> list[Table]:
    rows = [*_losses(subject), *_along_switches(subject, intervals)]
    return laid_out("switching_series", rows, switches=intervals)


def _losses(subject: Subject) -> list[Row]:
    """Correlation of the losses on ordinary and on probed tokens of the questions at long gaps."""
    values = subject.metrics.reindex(columns=["probe/lm_ood", "probe/nll_ood"]).dropna()
    values = values.loc[2:] if len(values) else values
    changes = torch.from_numpy(values.to_numpy(copy=True)).double().diff(dim=0)
    if len(changes) < _FEWEST:
        return []
    found = correlate(changes[:, 0], changes[:, 1])
    return [
        {
            "series": word("loss on ordinary and on probed tokens"),
            "r of levels": number(float(values.corr().to_numpy()[0, 1]), "{:+.2f}"),
            "r": number(found.value, "{:+.2f}"),
            "chance": number(found.level, "{:.2f}"),
            "p": number(found.p, "{:.3f}"),
            "values": number(float(len(changes)), "{:.0f}"),
        }
    ]


def _along_switches(subject: Subject, intervals: Sequence[Interval]) -> list[Row]:
    """Correlation of updates along each switch with the change of p_ood, beside other stretches of the path."""
    trajectory, accuracy = subject.trajectory, subject.series(P_OOD)
    steps, gram = trajectory.steps, trajectory.gram()
    joint = [index for index in range(1, len(steps)) if {steps[index - 1], steps[index]} <= set(accuracy.index)]
    change = {index: float(accuracy[steps[index]] - accuracy[steps[index - 1]]) for index in joint}

    def correlation(stretch: Interval) -> tuple[float, float, float, int]:
        free = [index for index in joint if not stretch.first < index <= stretch.last]
        direction = switching.switch_direction(len(steps), stretch.last, stretch.first)
        along = (gram @ direction)[free] / (gram.diagonal()[free].sqrt() * pca.norms(gram, direction[None]))
        if len(free) < _FEWEST or not bool(torch.isfinite(along).all()):
            return math.nan, math.nan, math.nan, len(free)
        found = correlate(along, torch.tensor([change[index] for index in free], dtype=torch.float64))
        return found.value, found.level, found.p, len(free)

    rows: list[Row] = []
    for interval in intervals:
        value, level, p, count = correlation(interval)
        if math.isnan(value):
            continue
        others = [correlation(other)[0] for other in switching.control_intervals(steps, interval, intervals, 20)]
        others = [other for other in others if not math.isnan(other)]
        row: dict[str, Cell] = {
            "series": word(
                f"updates along the switch {steps[interval.first]:,} to {steps[interval.last]:,}, and p_ood"
            ),
            "r": number(value, "{:+.2f}"),
            "chance": number(level, "{:.2f}"),
            "p": number(p, "{:.3f}"),
            "values": number(float(count), "{:.0f}"),
        }
        if len(others) > 1:
            row["other stretches"] = number(float(np.mean(others)), "{:+.2f}", float(np.std(others, ddof=1)))
        rows.append(row)
    return rows
