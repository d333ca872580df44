"""What the study of grokking says, beside what runs say: the numbers, nulls and readings of its claims.

A claim that takes runs that are not there is left out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence

from mini_gpt_pl.arithmetic.nulls import DECAYING
from mini_gpt_pl.arithmetic.statistics.discrimination import Discrimination
from mini_gpt_pl.arithmetic.study.commutators import change_at_grok
from mini_gpt_pl.arithmetic.study.onsets import (
    DO_NOT,
    ONSET,
    OTHERS,
    PLACEBO,
    clock_steps,
    lead_of_memory,
    rate_of,
    separation,
    sides,
    sign_of,
)
from mini_gpt_pl.arithmetic.study.runs import (
    PUBLISHED,
    Phase,
    ResidueRun,
    common_windows,
    distinct,
    median,
    residue_runs,
)
from mini_gpt_pl.arithmetic.study.words import claim, words
from mini_gpt_pl.report import claims as core
from mini_gpt_pl.report.claims import Claim, Finding
from mini_gpt_pl.report.sheet import Table
from mini_gpt_pl.runs.folder import Run

# A share within so many points of a null is not told apart from it: seeds of one setting differ by as much.
_MARGIN = 3.0
_MORE_THAN_HALF = 0.6  # of the records above a null that less than half are above by chance
_TELLS_APART = 0.75  # an AUC up to here is no warning, whatever its p


def claims(runs: Sequence[Run]) -> list[Claim]:
    """Judge every claim that the runs allow."""
    draws = distinct(residue_runs(runs))
    return [one for judge in _CLAIMS if (one := judge(draws)) is not None]


def claims_table(runs: Sequence[Run]) -> Table:
    """The claims as a table."""
    said = words("claims")["grokking"]
    notes = [said["note"].format(_MARGIN), PUBLISHED["notes"]["not_repeated"]]
    return core.claims_table("grokking_claims", said["title"], claims(runs), notes)


def findings(runs: Sequence[Run]) -> list[Finding]:
    """The claims as sentences for the head of a report."""
    return [one.finding for one in claims(runs)]


def _spread(values: Iterable[float], form: str) -> str:
    """Range of the values that are known, one value alone as it is."""
    numbers = [value for value in values if not math.isnan(value)]
    if not numbers:
        return "-"
    low, high = form.format(min(numbers)), form.format(max(numbers))
    return low if low == high else f"{low} to {high}"


# ------------------------------------------------------------------------------------------------------- paths


def _cells(runs: Sequence[ResidueRun], window: Phase | None = None) -> list[dict[str, float]]:
    """Centred PC1 in points of every matrix of every run, and of every null; to each run's stop without a window."""
    return [
        {name: 100 * value for name, value in numbers["pc1_centred"].items()}
        for run in runs
        for label, numbers in run.numbers(window or run.cut).items()
        if label != run.trunk
    ]


def _excess(cells: Sequence[dict[str, float]], null: str) -> list[float]:
    return [cell["measured"] - cell[null] for cell in cells]


def _measured(cells: Sequence[dict[str, float]], name: str = "measured") -> str:
    return _spread([cell[name] for cell in cells], "{:.0f} %")


def _pc1(runs: Sequence[ResidueRun]) -> Claim | None:
    cells = _cells([run for run in runs if run.groks and run.decay])
    if not cells:
        return None
    excess = [_excess(cells, null) for null in DECAYING]
    both = sum(min(pair) > _MARGIN for pair in zip(*excess, strict=True))
    neither = sum(max(pair) <= _MARGIN for pair in zip(*excess, strict=True))
    nulls = "; ".join(
        f"decay, {name}: {_measured(cells, null)} (excess {_spread(values, '{:+.1f}')} points)"
        for null, name, values in zip(DECAYING, ("‖d‖", "‖e‖"), excess, strict=True)
    )
    reading = "few" if both <= len(cells) / 4 else "most" if both >= 3 * len(cells) / 4 else "some"
    return claim("pc1", reading, measured=_measured(cells), nulls=nulls, both=both, neither=neither, count=len(cells))


def _contrast(runs: Sequence[ResidueRun]) -> Claim | None:
    window = common_windows(runs)[0] if runs else None
    decayed = [run for run in runs if run.decay]
    sides_of = [_cells([run for run in decayed if run.groks is kind], window) for kind in (True, False)]
    if window is None or not all(sides_of):
        return None
    measured = [statistics.fmean(cell["measured"] for cell in side) for side in sides_of]
    d, e = ([statistics.fmean(_excess(side, null)) for side in sides_of] for null in DECAYING)
    difference = measured[0] - measured[1]
    reading = "no" if difference <= _MARGIN else "null" if max(d[0] - d[1], e[0] - e[1]) <= _MARGIN else "yes"
    grok, others = (f"{value:.0f} %" for value in measured)
    return claim("contrast", reading, grok=grok, others=others, last=window.last, d=d, e=e, difference=difference)


def _no_decay(runs: Sequence[ResidueRun]) -> Claim | None:
    window = common_windows(runs)[0] if runs else None
    sides_of = ([run for run in runs if run.is_free], [run for run in runs if run.groks and run.decay])
    free, grokked = (_cells(side, window) for side in sides_of)
    if not free or not grokked:
        return None
    of_free = statistics.fmean(_excess(free, "walk"))
    d, e = (statistics.fmean(_excess(grokked, null)) for null in DECAYING)
    reading = "no" if of_free > max(d, e) else "yes" if of_free < min(d, e) else "between"
    if max(of_free, d, e) <= _MARGIN:
        reading = "null"
    return claim("without decay", reading, measured=_measured(free), free=of_free, d=d, e=e, margin=_MARGIN)


def _motion(runs: Sequence[ResidueRun]) -> Claim | None:
    """What is evidence of a drift: nothing that the studies report."""
    chosen = [run for run in runs if run.groks and run.decay and run.trunk in run.numbers(run.cut)]
    if not chosen:
        return None
    whole, across = ([run.correlation(run.cut, run.trunk, tangential=side) for run in chosen] for side in (False, True))
    shuffled = [run.numbers(run.cut)[run.trunk]["autocorrelation_tangential"]["permuted"] for run in chosen]
    sure = sum(one.value - 2 * one.error > null for one, null in zip(across, shuffled, strict=True))
    said = {"whole": [one.value for one in whole], "across": [one.value for one in across], "shuffled": shuffled}
    ranges = {name: _spread(values, "{:+.2f}") for name, values in said.items()}
    return claim("motion", "yes" if sure > len(chosen) / 2 else "no", sure=sure, count=len(chosen), **ranges)


# ------------------------------------------------------------------------------------------------- commutators


def _explodes(runs: Sequence[ResidueRun]) -> Claim | None:
    changes = [(run, change) for run in runs if run.decay and (change := change_at_grok(run)) is not None]
    grokked = [change for run, change in changes if run.groks]
    others = [change.before for run, change in changes if not run.groks]
    if not grokked:
        return None
    factors = {name: median(change.ratios[name] for change in grokked) for name in ("defect", "norm_a", "c")}
    said = words("claims")["explosion"]["factors"].format_map(factors)
    if math.isnan(factors["defect"]):
        reading, said = "none behind", "none has records behind its stop"
    elif factors["norm_a"] < 1 and factors["c"] < 1 < factors["defect"]:
        reading = "gradient"
    else:
        reading = "yes" if factors["defect"] > 1 else "no"
    return claim(
        "explosion",
        reading,
        before=_spread([change.before for change in grokked], "{:.0f}"),
        after=_spread([change.after for change in grokked], "{:.0f}"),
        others=f"operations that do not: × {_spread(others, '{:.0f}')}" if others else "no other operation",
        factors=said,
    )


def _warns(runs: Sequence[ResidueRun]) -> Claim | None:
    rate = rate_of(runs)
    runs = [run for run in runs if run.rate == rate]
    signs = sign_of(runs)
    if signs is None:
        return None
    leads = [lead_of_memory(run) for run in sides(runs)[0]]
    split, control = (separation(runs, clock) for clock in (ONSET, PLACEBO))
    area = ""
    if split is not None:
        p = "no p" if math.isnan(split.p) else f"p {split.p:.2g}, at best {split.smallest:.2g}"
        area = f"; AUC {split.auc:.2f} ({p})"
    return claim(
        "warning",
        _warning(split),
        test=signs[0],
        ahead=signs[1],
        count=signs[2],
        area=area,
        fired=_fired(runs),
        placebo=sum(lead is not None and lead > 0 for lead in leads),
        placebo_area="" if control is None else f", AUC {control.auc:.2f}",
        units=0 if split is None else split.units,
    )


def _fired(runs: Sequence[ResidueRun]) -> str:
    """Say in how many runs of each kind that do not generalise the onset comes."""
    said = {DO_NOT: "runs that do not generalise", "no decay": "without decay"}
    kinds = []
    for kind in OTHERS:
        others = sides(runs, kind)[1]
        fired = sum(clock_steps(run)[ONSET] is not None for run in others)
        kinds += [f"{fired} of {len(others)} {said[kind]}"] if others else []
    return f"it also comes in {' and '.join(kinds)}" if kinds else "all runs generalise"


def _warning(split: Discrimination | None) -> str:
    """Which reading an AUC allows; a high one of few operations allows nothing."""
    if split is None:
        return "one kind"
    if split.auc <= _TELLS_APART:
        return "no"
    return "mixed" if math.isnan(split.p) else "yes" if split.p < 0.05 else "few"


def _inside(runs: Sequence[ResidueRun], name: str, over: str = "") -> list[float]:
    """Records of a commutator's number up to each run's stop, or of its ratio to another."""
    listed: list[float] = []
    for run in runs:
        values = run.commutator(name)
        listed += run.cut.inside((values / run.commutator(over)).dropna() if over else values)
    return listed


def _orthogonal(runs: Sequence[ResidueRun]) -> Claim | None:
    decayed = [run for run in runs if run.decay]
    if not _inside(decayed, "on_path_ratio"):
        return None
    share, chance, below = (median(_inside(decayed, f"on_path{name}")) for name in ("", "_isotropic", "_below"))
    return claim(
        "orthogonal",
        "null" if 0.05 < below < 0.95 else "more" if below >= 0.95 else "less",
        # The published rho is a ratio of lengths, not a share of energy, which would be its square.
        across=100 * math.sqrt(1 - share**2),
        by_chance=100 * math.sqrt(1 - chance**2),
        isotropic=median(_inside(decayed, "on_path", "on_path_isotropic")),
        ratio=median(_inside(decayed, "on_path_ratio")),
        below=f"{100 * below:.0f} %",
    )


def _aligned(runs: Sequence[ResidueRun]) -> Claim | None:
    ratios: list[float] = []
    for run in runs:
        value, null = (run.commutator(name) for name in ("alignment_rms", "alignment_flip"))
        ratios += (value / null).dropna().tolist() if run.decay else []
    if not ratios:
        return None
    above = statistics.fmean(ratio > 1 for ratio in ratios)
    reading = "no" if above > _MORE_THAN_HALF else "yes"
    return claim("alignment", reading, ratio=median(ratios), above=f"{100 * above:.0f} %", count=len(ratios))


def _zeros(runs: Sequence[ResidueRun]) -> Claim | None:
    chosen = [run for run in runs if run.is_free and run.reported]
    defects, signal, resolved = (
        [value for run in chosen for value in run.commutator(name)] for name in ("defect", "float32_signal", "resolved")
    )
    if not signal or not resolved:
        return None
    below, unresolved = (statistics.fmean(value < 1 for value in values) for values in (signal, resolved))
    spread = _spread(defects, "{:.2g}") if defects else "no record resolved"
    reading = "arithmetic" if below > unresolved else "undecided"
    return claim("zeros", reading, spread=spread, unresolved=unresolved, below=below)


_CLAIMS: tuple[Callable[[Sequence[ResidueRun]], Claim | None], ...] = (
    _pc1,
    _contrast,
    _no_decay,
    _motion,
    _explodes,
    _warns,
    _orthogonal,
    _aligned,
    _zeros,
)
