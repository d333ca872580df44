r"""How long until it happens, when some runs are stopped before: the product-limit estimate of Kaplan and Meier (1958).

A run that has not generalised at its cap is not a run that never does. It is censored: it says that the time is longer
than the cap, and no more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mini_gpt_pl.arithmetic.statistics.onset import Number
from mini_gpt_pl.errors import UserError


@dataclass(frozen=True)
class Lifetimes:
    """Share of runs that it has not yet happened to, S(t), after each distinct time, stopped runs included.

    Args:
        times: Ascending, in the unit given.
        surviving: S(t).
        error: Its standard error (Greenwood 1926); NaN once nobody survives.
        low: Lower end of the interval from ln(-ln S), which stays within 0 and 1; NaN where S is 0 or 1.
        high: Its upper end.
        at_risk: Runs that were still going just before.
    """

    times: Float[Tensor, " k"]
    surviving: Float[Tensor, " k"]
    error: Float[Tensor, " k"]
    low: Float[Tensor, " k"]
    high: Float[Tensor, " k"]
    at_risk: Int[Tensor, " k"]

    @property
    def median(self) -> float | None:
        """First time by which it has happened to half of the runs; None if it has to fewer."""
        reached = self.times[self.surviving <= 0.5 + 1e-12]
        return float(reached[0]) if len(reached) else None


def kaplan_meier(times: Sequence[Number | None], cap: Number | Sequence[Number], confidence: float = 0.95) -> Lifetimes:
    r"""Estimate S(t) = prod over t_i <= t of (1 - d_i / n_i), with d_i events among n_i runs at risk.

    Args:
        times: When it happened in each run, None where it had not when the run was stopped.
        cap: Where runs were stopped: one for all, or one for each.
        confidence: Of the interval, S^exp(-+ z sigma), sigma^2 = sum d_i / (n_i (n_i - d_i)) / ln(S)^2.

    Raises:
        UserError: There are no runs, or not one cap for each run, or it happened after the cap.
    """
    caps = list(cap) if isinstance(cap, Sequence) else [cap] * len(times)
    if not times or len(caps) != len(times):
        raise UserError(f"{len(times)} runs have {len(caps)} caps: give at least one run, and one cap for each")
    if late := [t for t, end in zip(times, caps, strict=True) if t is not None and t > end]:
        raise UserError(f"it happened at {late[0]}, after the run was stopped: give the cap that the run had")
    ends = torch.tensor([end if t is None else t for t, end in zip(times, caps, strict=True)], dtype=torch.float64)
    happened = torch.tensor([t is not None for t in times])
    return _product_limit(ends, happened, NormalDist().inv_cdf((1 + confidence) / 2))


def _product_limit(ends: Float[Tensor, " R"], happened: Bool[Tensor, " R"], z: float) -> Lifetimes:
    distinct = ends.unique()
    at_risk = (ends >= distinct[:, None]).sum(1)
    events = ((ends == distinct[:, None]) & happened).sum(1)
    surviving = (1 - events / at_risk.double()).cumprod(0)
    spread = (events / (at_risk * (at_risk - events)).double()).cumsum(0).sqrt()
    scale = torch.exp(z * spread / surviving.log().abs())
    inside = (surviving > 0) & (surviving < 1)
    low, high = (torch.where(inside, surviving**power, math.nan) for power in (scale, 1 / scale))
    error = torch.where(surviving > 0, surviving * spread, math.nan)
    return Lifetimes(distinct, surviving, error, low, high, at_risk)
