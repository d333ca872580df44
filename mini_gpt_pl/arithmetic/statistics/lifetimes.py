"""How long until it happens, when some runs are stopped before: the product-limit estimate of Kaplan and Meier (1958).

A run that has not generalised when it is stopped is not a run that never does. It is censored: it says that the time is
longer than that, and no more.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from mini_gpt_pl.arithmetic.statistics.onset import Number
from mini_gpt_pl.errors import UserError


@dataclass(frozen=True)
class Lifetimes:
    """Share of runs that it has not yet happened to, S(t), after each distinct time, those of stopped runs included.

    Its interval, from ln(-ln S), stays within 0 and 1, and is NaN where S is 0 or 1. At risk are the runs that were
    still going just before.
    """

    times: Float[np.ndarray, " k"]
    surviving: Float[np.ndarray, " k"]
    low: Float[np.ndarray, " k"]
    high: Float[np.ndarray, " k"]
    at_risk: Int[np.ndarray, " k"]

    @property
    def median(self) -> float | None:
        """First time by which it has happened to half of the runs; None if it has to fewer."""
        reached = self.times[self.surviving <= 0.5 + 1e-12]
        return float(reached[0]) if len(reached) else None


def kaplan_meier(times: Sequence[Number | None], cap: Number | Sequence[Number], confidence: float = 0.95) -> Lifetimes:
    """Estimate S(t) = prod over t_i <= t of (1 - d_i / n_i), with d_i events among n_i runs at risk.

    Args:
        times: When it happened in each run, None where it had not when the run was stopped.
        cap: Where runs were stopped: one for all, or one for each.
        confidence: Of the interval.

    Raises:
        UserError: There are no runs, or not one cap for each run, or it happened after the cap.
    """
    caps = list(cap) if isinstance(cap, Sequence) else [cap] * len(times)
    if not times or len(caps) != len(times):
        raise UserError(f"{len(times)} runs have {len(caps)} caps: give at least one run, and one cap for each")
    if late := [t for t, end in zip(times, caps, strict=True) if t is not None and t > end]:
        raise UserError(f"it happened at {late[0]}, after the run was stopped: give the cap that the run had")
    ends = np.array([end if t is None else t for t, end in zip(times, caps, strict=True)], dtype=float)
    curve = stats.ecdf(stats.CensoredData.right_censored(ends, [t is None for t in times])).sf
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the interval is undefined where S is 0 or 1
        interval = curve.confidence_interval(confidence, method="log-log")
    inside = (curve.probabilities > 0) & (curve.probabilities < 1)
    low, high = (np.where(inside, end.probabilities, np.nan) for end in (interval.low, interval.high))
    at_risk = (ends >= curve.quantiles[:, None]).sum(1)
    return Lifetimes(curve.quantiles, curve.probabilities, low, high, at_risk)
