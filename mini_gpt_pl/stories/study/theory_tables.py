"""Tables of the theory beside what was measured: equations 11 to 21, the restoring force and the separation of scales.

Equation 30 has da/dt = -eta g - eta kappa a. Time in units of eta is read off the recorded decay, as its logarithm is
-lambda sum eta, so that kappa comes in units of the weight decay lambda. A path that only decays has kappa = 1: that,
and not 0, is what a restoring force must exceed.

Equation 34 separates a slow motion along v_b from a fast one across it. The correlation time of the increments,
1 + 2 sum of rho_k up to the first lag that is not positive, is measured along and across.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mini_gpt_pl.geometry.path import nulls, pca
from mini_gpt_pl.report.sheet import Cell, Row, Table, number, word
from mini_gpt_pl.report.subject import Subject
from mini_gpt_pl.stories.study.words import laid_out, words

_DRAWS = 500
_LAGS = 10


def theory_tables(subject: Subject) -> list[Table]:
    """Make the tables that a run's path and its probes allow."""
    return [*_account(subject), *_force(subject), *_scales(subject)]


def _account(subject: Subject) -> list[Table]:
    rows: list[Row] = []
    for equation, quantity, metric, predicted in words("tables")["theory"]["rows"]:
        name = metric.format(subject.trunk)
        if name not in subject.metrics:
            continue
        theory = name if predicted is None else predicted.format(subject.trunk)
        both = subject.metrics.reindex(columns=list(dict.fromkeys([name, theory]))).dropna().abs()
        early = both.index <= subject.length / 2
        for phase, part in (("first half", both[early]), ("second half", both[~early])):
            if part.empty:
                continue
            row: dict[str, Cell] = {"eq.": word(equation), "quantity": word(quantity), "steps": word(phase)}
            row["measured"] = _mean(part[name])
            if predicted is None:
                row["by the equation"] = number(subject.floor(subject.trunk), "{:.3g}")
            else:
                row["by the equation"] = _mean(part[theory])
                middle = float((part[name] / part[theory].where(part[theory] > 0)).median())
                row["ratio"] = number(middle, "{:.2f}")
            if name.endswith("update_size") and f"{name}_null" in subject.metrics:
                row["no signal"] = _mean(subject.series(f"{name}_null").reindex(part.index).dropna())
            if name.endswith("fraction"):
                walk = subject.series(f"{name}_decaying_walk")
                row["no signal"] = _mean(walk.reindex(part.index).dropna())
            rows.append(row)
    return laid_out("theory", rows)


def _mean(values: pd.Series[float]) -> Cell:
    spread = float(values.std()) if len(values) > 1 else None
    return number(float(values.mean()) if len(values) else math.nan, "{:.3g}", spread)


# ----------------------------------------------------------------------------------------- restoring force


class Force(NamedTuple):
    """A fit of da/d(lambda tau) = c - kappa a.

    Attributes:
        kappa: In units of the weight decay.
        error: Of kappa, by a bootstrap over blocks of increments.
        increments: Number of them.
    """

    kappa: float
    error: float
    increments: int


def restoring_force(
    gram: pca.Gram, survival: Sequence[float], direction: pca.Direction, first: int = 0
) -> Force | None:
    """Fit the pull along a direction back to where the path began, in units of weight decay.

    Args:
        gram: H of the path.
        survival: Share of theta_0 that decay leaves, per snapshot.
        direction: Coefficients; of the whole path's backbone, say.
        first: Snapshot to begin at.

    Returns:
        The fit, or None where there is no decay to measure time by, or there are fewer than 8 increments.
    """
    times = -np.diff(np.log(np.maximum(np.asarray(survival), 1e-300)))[first:]
    along = (gram @ direction)[1:] / pca.norms(gram, direction[None])
    coordinate = np.concatenate([[0.0], np.cumsum(along.numpy())])[first:-1]
    rate, weights = along.numpy()[first:] / np.where(times > 0, times, 1), times
    usable = times > 0
    if usable.sum() < 8:
        return None
    rate, weights, coordinate = rate[usable], weights[usable], coordinate[usable]

    def slope(rows: np.ndarray) -> float:
        return float(np.polyfit(coordinate[rows], rate[rows], 1, w=np.sqrt(weights[rows]))[0])

    count = len(rate)
    block = max(2, round(count ** (1 / 3)))
    rng = np.random.Generator(np.random.Philox(key=0))
    starts = rng.integers(count - block + 1, size=(_DRAWS, -(-count // block)))
    drawn = [slope((row[:, None] + np.arange(block)).ravel()[:count]) for row in starts]
    return Force(-slope(np.arange(count)), float(np.std(drawn, ddof=1)), count)


def _force(subject: Subject) -> list[Table]:
    trajectory = subject.trajectory
    rows: list[Row] = []
    for label, group in subject.parts.items():
        gram, survival = trajectory.gram(group), trajectory.survival_of(group)
        if any(map(math.isnan, survival)) or survival[-1] >= 1:
            continue
        null = nulls.decaying_walk(gram, survival)
        half = len(survival) // 2
        for phase, first in (("whole run", 0), ("second half", half)):
            own, free = (restoring_force(h, survival, _backbone(h), first) for h in (gram, null))
            if own is None or free is None:
                continue
            rows.append(
                {
                    "group": word(label),
                    "steps": word(phase),
                    "kappa / decay": number(own.kappa, "{:+.2f}", own.error, "se"),
                    "decaying walk": number(free.kappa, "{:+.2f}", free.error, "se"),
                    "difference / error": number(
                        (own.kappa - free.kappa) / math.hypot(own.error, free.error), "{:+.1f}"
                    ),
                }
            )
    return laid_out("restoring_force", rows)


def _backbone(gram: pca.Gram, last: int | None = None) -> pca.Direction:
    """The uncentred PC1 of the path up to a snapshot, the last one for None."""
    return pca.pca(gram, pca.drifts(len(gram))[1 : None if last is None else last + 1]).backbone


# ------------------------------------------------------------------------------------ separation of time scales


def correlation_times(
    gram: pca.Gram, direction: pca.Direction, lags: int = _LAGS, first: int = 0
) -> tuple[float, float]:
    """Correlation times of the increments along a direction and across it, in increments.

    Args:
        gram: H of the path.
        direction: Coefficients.
        lags: Largest lag.
        first: Snapshot to begin at.

    Returns:
        1 + 2 sum of rho_k up to the first lag that is not positive; 1 for increments without memory.
    """
    along = (gram @ direction)[first + 1 :] / pca.norms(gram, direction[None])
    products = torch.outer(along, along)
    return _time(products, lags), _time(gram[first + 1 :, first + 1 :] - products, lags)


def _time(products: Float[Tensor, "T T"], lags: int) -> float:
    lengths = products.diagonal().clamp_min(0.0).sqrt()
    total = 1.0
    for lag in range(1, min(lags, len(products) - 2) + 1):
        rho = float(products.diagonal(lag).sum() / (lengths[:-lag] * lengths[lag:]).sum())
        if not rho > 0:
            break
        total += 2 * rho
    return total


def _scales(subject: Subject) -> list[Table]:
    trajectory = subject.trajectory
    spans = {later - earlier for earlier, later in itertools.pairwise(trajectory.steps[1:])}
    if len(trajectory) < 2 * _LAGS or len(spans) != 1:
        return []
    rows: list[Row] = []
    for label, group in subject.parts.items():
        gram, survival = trajectory.gram(group), trajectory.survival_of(group)
        paths = {"": gram, ", walk": nulls.walk(gram)}
        if not any(map(math.isnan, survival)):
            paths[", decaying walk"] = nulls.decaying_walk(gram, survival)
        half = len(gram) // 2
        for part, until, first in (("whole run", None, 0), ("second half, v_b of the first", half, half)):
            row: dict[str, Cell] = {"group": word(label), "increments": word(part)}
            for name, path in paths.items():
                along, across = correlation_times(path, _backbone(path, until), first=first)
                row[f"along{name}"], row[f"across{name}"] = number(along, "{:.2f}"), number(across, "{:.2f}")
                row[f"ratio{name}"] = number(across / along, "{:.3f}")
            rows.append(row)
    return laid_out("time_scales", rows, span=spans.pop(), lags=_LAGS)
