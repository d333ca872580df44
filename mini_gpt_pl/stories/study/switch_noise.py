"""Which switches of p_ood are larger than the error of its evaluations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.figures.plotting import NULL, PROBE, RESIDUAL, WIDTH
from mini_gpt_pl.geometry.path import switching
from mini_gpt_pl.geometry.path.switching import Switch
from mini_gpt_pl.report.sheet import Row, Table, number, word
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.evaluation import binomial_error
from mini_gpt_pl.stories.study.words import laid_out
from mini_gpt_pl.stories.switches import P_OOD, Rules, events_of

_DRAWS = 200


class Judged(NamedTuple):
    """A switch beside the error of its evaluations.

    Attributes:
        switch: Peak and trough.
        error: Standard error of peak minus trough, from both binomial errors; too large where the same questions are
            answered alike.
        last_error: Binomial error at the last evaluation, which the published tiers take for all of them.
    """

    switch: Switch
    error: float
    last_error: float

    @property
    def height(self) -> float:
        """Peak minus trough."""
        return self.switch.peak.value - self.switch.trough.value

    @property
    def tier(self) -> str:
        """A from 3 errors on, B from 2 on, else C."""
        return _tier(self.height, self.error)


def _tier(height: float, error: float) -> str:
    sigmas = height / error if error > 0 else math.inf
    return "A" if sigmas >= 3 else "B" if sigmas >= 2 else "C"


def questions_of(run: Run) -> int:
    """Number of questions behind each p_ood, by the configuration; 2,000 where it names none."""
    return int(run.settings.get("data", {}).get("probe", {}).get("eval_examples", 2000))


def judged(run: Run) -> list[Judged]:
    """Every switch of p_ood by the run's own rules."""
    count, series = questions_of(run), run.series(P_OOD)
    pairs = switching.switches(events_of(run), Rules.of(run).reach)
    if not pairs:
        return []
    last = binomial_error(float(series.iloc[-1]), count)
    ends = [(binomial_error(pair.peak.value, count), binomial_error(pair.trough.value, count)) for pair in pairs]
    return [Judged(pair, math.hypot(*both), last) for pair, both in zip(pairs, ends, strict=True)]


def switches_by_noise(values: Sequence[float], count: int, rules: Rules) -> tuple[float, float]:
    """Number of switches that evaluations of a smooth curve would have: mean and standard deviation over draws.

    The curve is the running median of the series over as many values as a peak is measured against; each draw asks new
    questions at every evaluation.

    Args:
        values: p_ood at each evaluation.
        count: Questions of an evaluation.
        rules: What counts as a peak or a trough.
    """
    width = rules.reach
    smooth = [float(np.median(values[max(0, i - width) : i + width + 1])) for i in range(len(values))]
    rng = np.random.Generator(np.random.Philox(key=0))
    numbers = []
    for row in rng.binomial(count, np.clip(smooth, 0, 1), (_DRAWS, len(smooth))) / count:
        found = switching.events(range(len(row)), row.tolist(), rules.prominence, rules.reach)
        numbers.append(len(switching.switches(found, rules.reach)))
    return float(np.mean(numbers)), float(np.std(numbers))


def significance(run: Run) -> list[Table]:
    """Each switch in units of its error, its tier, and how many switches noise alone would make."""
    found = judged(run)
    if not found:
        return []
    rows: list[Row] = [
        {
            "peak": number(float(one.switch.peak.step), "{:,.0f}"),
            "trough": number(float(one.switch.trough.step), "{:,.0f}"),
            "from": number(one.switch.peak.value),
            "to": number(one.switch.trough.value),
            "height": number(one.height, "{:.3f}", one.error, "se"),
            "/ error": number(one.height / one.error if one.error else math.nan, "{:.1f}"),
            "tier": word(one.tier),
            "tier by the last error": word(_tier(one.height, one.last_error)),
        }
        for one in found
    ]
    count = questions_of(run)
    mean, spread = switches_by_noise(run.series(P_OOD).tolist(), count, Rules.of(run))
    return laid_out("switching_significance", rows, count=count, mean=mean, spread=spread, switches=len(found))


def figure(run: Run) -> Figure:
    """p_ood with its error at every evaluation, and each switch in units of its error.

    Raises:
        UserError: p_ood has no switch.
    """
    switches, series, count = judged(run), run.series(P_OOD), questions_of(run)
    if not switches:
        raise UserError(f"p_ood of {run.path} has no switch")
    drawn = Figure(figsize=(WIDTH, 4.6))
    top, bottom = drawn.subplots(2, 1, sharex=True)
    errors = [binomial_error(value, count) for value in series]
    top.errorbar(series.index.to_numpy(), series.to_numpy(), errors, fmt="-", lw=1, elinewidth=0.8, color=PROBE)
    top.set(ylabel="$p_{ood}$", title=f"error of {count:,} answers")
    middles = [(one.switch.peak.step + one.switch.trough.step) / 2 for one in switches]
    heights = [one.height / one.error if one.error else np.nan for one in switches]
    bottom.plot(middles, heights, "o", ms=5, color=RESIDUAL)
    for level, tier in ((3, "A"), (2, "B")):
        bottom.axhline(level, color=NULL, lw=0.9, ls=":")
        place: Any = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        bottom.annotate(tier, (1.0, level), xytext=(3, 0), **place)
    bottom.set(xlabel="step", ylabel="height / error", yscale="log")
    return drawn
