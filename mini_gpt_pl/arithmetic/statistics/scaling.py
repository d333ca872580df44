r"""Power laws over scales, and the slope that a constant alone gives them.

A straight line in log-log coordinates can be drawn through any two clusters of points. A scale is one setting of what
was varied (a learning rate, a width): repeated seeds are points of one scale, not further scales.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mini_gpt_pl.arithmetic.statistics.onset import Number
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.path.growth import PowerLaw, power_law

_FEWEST = 4


@dataclass(frozen=True)
class Scaling:
    """A power law fitted to all points, and its exponent within each scale, None with fewer than three points.

    If these do not agree with the whole, the line joins clusters and is no law.
    """

    whole: PowerLaw
    within: dict[Number, float | None]


def scaling(x: Sequence[Number], y: Sequence[Number], scales: Sequence[Number]) -> Scaling:
    """Fit y = prefactor x^exponent to positive values of the same runs, over at least four scales that they belong to.

    Raises:
        UserError: There are fewer than four scales, or a value is not positive.
    """
    distinct = sorted(set(scales))
    if len(distinct) < _FEWEST:
        scales_here = "1 scale" if len(distinct) == 1 else f"{len(distinct)} scales"
        raise UserError(
            f"{len(x)} runs have {scales_here}, and a power law takes at least {_FEWEST}: run more settings, or "
            "compare the ones there are without a fit"
        )
    bad = sum(not (0 < a < math.inf and 0 < b < math.inf) for a, b in zip(x, y, strict=True))
    if bad:
        raise UserError(
            f"{bad} of {len(x)} runs have a value that is not positive, which no power law holds: "
            "fit another quantity, as leaving them out would choose the answer"
        )
    points = list(zip(x, y, scales, strict=True))
    within = {s: _fit([p for p in points if p[2] == s]) for s in distinct}
    whole = _fit(points)
    if whole is None:
        raise UserError("every run has the same x, so no slope can be fitted: vary it")
    return Scaling(whole, {s: None if fit is None else fit.exponent for s, fit in within.items()})


def _fit(points: Sequence[tuple[Number, Number, Number]]) -> PowerLaw | None:
    """None with fewer than three points or a single x."""
    if len({x for x, _, _ in points}) < 2:
        return None
    return power_law([x for x, _, _ in points], [float(y) for _, y, _ in points], 0, math.inf)
