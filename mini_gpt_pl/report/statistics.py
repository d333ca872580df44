"""Statistics over several runs: means, and their intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
from scipy import stats


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t with n - 1 degrees of freedom.

    The quantile has four decimals, as in printed tables.
    """
    series = pd.Series(values, dtype=float)
    quantile = round(float(stats.t.ppf(0.975, len(values) - 1)), 4)
    return float(series.mean()), quantile * float(series.std()) / math.sqrt(len(values))


def mean(values: Sequence[float]) -> float:
    """Mean of the values that are known; NaN without any."""
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan
