"""What the studies of grokking say, beside what runs say: numbers, nulls and a reading, all computed.

A claim that takes runs that are not there is left out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import pandas as pd

from mini_gpt_pl.arithmetic.statistics.discrimination import Discrimination
from mini_gpt_pl.arithmetic.study.clocks import (
    DO_NOT,
    ONSET,
    OTHERS,
    PLACEBO,
    clock_steps,
    rate_of,
    separation,
    sides,
    sign_of,
)
from mini_gpt_pl.arithmetic.study.commutators import inside
from mini_gpt_pl.arithmetic.study.defects import change_at_grok
from mini_gpt_pl.arithmetic.study.groups import distinct
from mini_gpt_pl.arithmetic.study.published import NOTES
from mini_gpt_pl.arithmetic.study.runs import DECAYING, Phase, ResidueRun, common_windows, median, residue_runs
from mini_gpt_pl.report import claims as core
from mini_gpt_pl.report.claims import Claim, Finding
from mini_gpt_pl.report.sheet import Table
from mini_gpt_pl.runs.folder import Run

# A share within this of a null is not told apart from it: seeds of one setting differ by as much.
_MARGIN = 0.03
_MORE_THAN_HALF = 0.6  # of the records above a null that less than half are above by chance
_TELLS_APART = 0.75  # an AUC up to here is no warning, whatever its p


def claims(runs: Sequence[Run]) -> list[Claim]:
    """Judge every claim that the runs allow."""
    draws = distinct(residue_runs(runs))
    return [claim for judge in _CLAIMS if (claim := judge(draws)) is not None]


def claims_table(runs: Sequence[Run]) -> Table:
    """The claims as a table."""
    note = (
        f"All cells are computed. A PC1 counts as above or below a null from {100 * _MARGIN:.0f} points on. Decay, ‖d‖ "
        "and ‖e‖: the two decaying walks, which keep the lengths of increments and of innovations."
    )
    title = "What the studies say, and what these runs say"
    return core.claims_table("grokking_claims", title, claims(runs), [note, NOTES["not_repeated"]])


def findings(runs: Sequence[Run]) -> list[Finding]:
    """The claims as sentences for the head of a report."""
    return [claim.finding for claim in claims(runs)]


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"


def _spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    """Range of the values that are known, one value alone as it is."""
    numbers = [value for value in values if not math.isnan(value)]
    if not numbers:
        return "-"
    low, high = form(min(numbers)), form(max(numbers))
    return low if low == high else f"{low} to {high}"


def _points(values: Sequence[float]) -> str:
    return _spread([100 * value for value in values], lambda value: f"{value:+.1f}".replace("+-", "-")) + " points"


# ------------------------------------------------------------------------------------------------------- paths


def _cells(runs: Sequence[ResidueRun], window: Phase | None = None) -> list[dict[str, float]]:
    """Centred PC1 of every matrix of every run, measured and of every null; to each run's stop without a window."""
    cells = []
    for run in runs:
        path = run.numbers(window or run.cut)
        cells += [dict(numbers["pc1_centred"]) for label, numbers in path.items() if label != run.trunk]
    return cells


def _excess(cells: Sequence[dict[str, float]], null: str) -> list[float]:
    return [cell["measured"] - cell[null] for cell in cells]


def _sides(cells: Sequence[dict[str, float]]) -> tuple[int, int]:
    """How many matrices lie above both decaying nulls by the margin, and how many above neither."""
    above = [[value > _MARGIN for value in _excess(cells, null)] for null in DECAYING]
    both = sum(all(pair) for pair in zip(*above, strict=True))
    neither = sum(not any(pair) for pair in zip(*above, strict=True))
    return both, neither


def _pc1(runs: Sequence[ResidueRun]) -> Claim | None:
    chosen = [run for run in runs if run.groks and run.decay]
    cells = _cells(chosen)
    if not cells:
        return None
    both, neither = _sides(cells)
    reading = f"{both} of {len(cells)} matrices lie above both decaying nulls, {neither} above neither"
    verdict = "a null" if both <= len(cells) / 4 else "more than decay" if both >= 3 * len(cells) / 4 else "mixed"
    null = "; ".join(
        f"decay, {name}: {_spread([cell[key] for cell in cells], _share)} (excess {_points(_excess(cells, key))})"
        for key, name in zip(DECAYING, ("‖d‖", "‖e‖"), strict=True)
    )
    return Claim(
        "PC1 holds 68 to 83 % of each attention matrix's path up to grokking (layer 0)",
        _spread([cell["measured"] for cell in cells], _share),
        null,
        f"**{verdict}**: {reading}.",
        "paths",
        "PC1",
    )


def _contrast(runs: Sequence[ResidueRun]) -> Claim | None:
    window = common_windows(runs)[0] if runs else None
    decayed = [run for run in runs if run.decay]
    sides = [_cells([run for run in decayed if run.groks is kind], window) for kind in (True, False)]
    if window is None or not all(sides):
        return None
    measured = [statistics.fmean(cell["measured"] for cell in side) for side in sides]
    excess = {null: [statistics.fmean(_excess(side, null)) for side in sides] for null in DECAYING}
    difference = measured[0] - measured[1]
    verdict = "does not reproduce" if difference <= _MARGIN else "reproduces"
    if difference > _MARGIN and all(a - b <= _MARGIN for a, b in excess.values()):
        verdict = "a null"
    null = "; ".join(
        f"excess over decay, {name}: {100 * a:+.1f} and {100 * b:+.1f} points"
        for name, (a, b) in zip(("‖d‖", "‖e‖"), excess.values(), strict=True)
    )
    return Claim(
        "Runs that grok have a higher PC1 (64 to 82 %) than operations that do not (38 to 53 %)",
        f"mean {_share(measured[0])} and {_share(measured[1])}, both over steps 0 to {window.last:,}",
        null,
        f"**{verdict}** on equal lengths: {100 * difference:+.1f} points.",
        "paths",
        "PC1 of runs that grok and of others",
    )


def _no_decay(runs: Sequence[ResidueRun]) -> Claim | None:
    window = common_windows(runs)[0] if runs else None
    sides = ([run for run in runs if run.is_free], [run for run in runs if run.groks and run.decay])
    free, grokked = (_cells(side, window) for side in sides)
    if not free or not grokked:
        return None
    of_free = statistics.fmean(_excess(free, "walk"))
    of_grokked = [statistics.fmean(_excess(grokked, null)) for null in DECAYING]
    if max(of_free, *of_grokked) <= _MARGIN:
        reading = f"**a null**: neither has {100 * _MARGIN:.0f} points over its null, on average over the matrices."
    elif of_free > max(of_grokked):
        reading = "**does not reproduce**: the excess without decay is larger than that of the runs that grok."
    elif of_free < min(of_grokked):
        reading = "**reproduces**: the excess without decay is smaller than that of the runs that grok."
    else:
        reading = (
            "**undecided**: the excess without decay lies between those of the runs that grok over their two nulls."
        )
    return Claim(
        "The control without weight decay has no such structure",
        f"PC1 {_spread([cell['measured'] for cell in free], _share)}, excess over the walk {100 * of_free:+.1f} points",
        f"runs that grok: {100 * of_grokked[0]:+.1f} and {100 * of_grokked[1]:+.1f} points over the two decaying walks",
        reading,
        "paths",
        "Without weight decay",
    )


def _motion(runs: Sequence[ResidueRun]) -> Claim | None:
    """What is evidence of a drift: nothing that the studies report."""
    chosen = [run for run in runs if run.groks and run.decay and run.trunk in run.numbers(run.cut)]
    if not chosen:
        return None
    whole, across = ([run.correlation(run.cut, run.trunk, tangential=side) for run in chosen] for side in (False, True))
    shuffled = [run.numbers(run.cut)[run.trunk]["autocorrelation_tangential"]["permuted"] for run in chosen]
    sure = sum(one.value - 2 * one.error > null for one, null in zip(across, shuffled, strict=True))
    return Claim(
        "(not reported) successive steps agree once decay is taken out",
        f"correlation of innovations {_spread([one.value for one in whole], '{:+.2f}'.format)}, tangential "
        f"{_spread([one.value for one in across], '{:+.2f}'.format)}",
        f"0 for any walk; tangential, the same steps in other orders {_spread(shuffled, '{:+.2f}'.format)}",
        f"**{'a motion' if sure > len(chosen) / 2 else 'not shown'}**: the tangential number is above its permutations "
        f"by two standard errors in {sure} of {len(chosen)} runs; the rest of the first is push against decay.",
        "persistence",
        "Persistence",
    )


# ------------------------------------------------------------------------------------------------- commutators


def _explodes(runs: Sequence[ResidueRun]) -> Claim | None:
    changes = [(run, change) for run in runs if run.decay and (change := change_at_grok(run)) is not None]
    grokked = [change for run, change in changes if run.groks]
    others = [change.before for run, change in changes if not run.groks]
    if not grokked:
        return None
    before, after = ([getattr(change, name) for change in grokked] for name in ("before", "after"))
    gradient, c, defect = (
        median([getattr(change, name) for change in grokked]) for name in ("gradient", "c", "defect")
    )
    factors = f"median factors from plateau to after: D × {defect:.2g}, ‖g‖ × {gradient:.2g}, c × {c:.2g}"
    if math.isnan(defect):
        factors = "none has records behind its stop"
    null = f"operations that do not: × {_spread(others, '{:.0f}'.format)}" if others else "no other operation"
    return Claim(
        "The defect explodes at grokking: 500 to 2,000 × its baseline, 30 to 50 × without grokking",
        f"× {_spread(before, '{:.0f}'.format)} before t90, × {_spread(after, '{:.0f}'.format)} behind it (float64)",
        f"{null}; {factors}",
        _jump(gradient, c, defect),
        "commutators",
        "Explosion of the defect",
    )


def _jump(gradient: float, c: float, defect: float) -> str:
    """Read factors from the plateau to behind the stop; NaN where runs have no records there."""
    if math.isnan(defect):
        return "**undecided**: no records behind the stop; train on after it."
    if gradient < 1 and c < 1 < defect:
        return "**1/‖g‖**: D jumps as gradients vanish, and c, which has no 1/‖g‖ in it, falls."
    if defect > 1:
        return "**reproduces**: c, which has no 1/‖g‖ in it, does not fall while D rises."
    return "**does not reproduce**: D is no larger behind the stop."


def _warns(runs: Sequence[ResidueRun]) -> Claim | None:
    rate = rate_of(runs)
    runs = [run for run in runs if run.rate == rate]
    signs = sign_of(runs)
    if signs is None:
        return None
    test, ahead, count = signs
    leads = [_lead_of_memory(run) for run in sides(runs, DO_NOT)[0]]
    placebo = sum(lead is not None and lead > 0 for lead in leads)
    split, control = (separation(runs, clock) for clock in (ONSET, PLACEBO))
    plain_area = "" if control is None else f", AUC {control.auc:.2f}"
    return Claim(
        "The onset of the defect precedes grokking in 12 of 12 runs, p = 2^-12",
        f"in {ahead} of {count}{_area(split)}; {test.positive} of {test.units} operations, p {test.p:.2g}",
        f"{_fired(runs)}; 99 % of the training set leads in {placebo} of {count}{plain_area}",
        _warning(split) + " That it comes first is shared with whatever happens early.",
        "onset",
        "Early warning",
    )


def _area(split: Discrimination | None) -> str:
    """An AUC against operations that do not generalise, with its p where it has one."""
    if split is None:
        return ""
    p = "no p" if math.isnan(split.p) else f"p {split.p:.2g}, at best {split.smallest:.2g}"
    return f"; AUC {split.auc:.2f} ({p})"


def _fired(runs: Sequence[ResidueRun]) -> str:
    """Say in how many runs of each kind that do not generalise the onset comes."""
    words = {DO_NOT: "runs that do not generalise", "no decay": "without decay"}
    kinds = []
    for kind in OTHERS:
        others = sides(runs, kind)[1]
        if others:
            fired = sum(clock_steps(run)[ONSET] is not None for run in others)
            kinds.append(f"{fired} of {len(others)} {words[kind]}")
    return f"it also comes in {' and '.join(kinds)}" if kinds else "all runs generalise"


def _lead_of_memory(run: ResidueRun) -> float | None:
    """Steps from 99 % of the training set to t90, the lead of the placebo."""
    first, last = run.steps["train_99"], run.steps["test_90"]
    return None if first is None or last is None else last - first


def _warning(split: Discrimination | None) -> str:
    """What an AUC allows to say; a high one of few operations allows nothing."""
    if split is None:
        return "**undecided**: it takes operations that generalise and operations that do not."
    if split.auc <= _TELLS_APART:
        return "**no warning**: it does not tell the two kinds of runs apart."
    if math.isnan(split.p):
        return "**undecided**: of an operation some seeds generalise and others do not, so operations have no p."
    if split.p < 0.05:
        return "**a warning**: it tells the two kinds of runs apart."
    return f"**undecided**: {split.units} operations are too few to tell."


def _orthogonal(runs: Sequence[ResidueRun]) -> Claim | None:
    values = {
        name: [v for run in runs if run.decay for v in inside(run.commutator(f"on_path{name}"), run.cut).tolist()]
        for name in ("", "_isotropic", "_ratio", "_below")
    }
    if not values["_ratio"]:
        return None
    isotropic = median([v for run in runs if run.decay for v in _over_isotropic(run).tolist()])
    ratio, below = median(values["_ratio"]), median(values["_below"])
    # The published rho is a ratio of lengths, not a share of energy, which would be its square.
    across, by_chance = (math.sqrt(1 - median(values[name]) ** 2) for name in ("", "_isotropic"))
    verdict = "a null" if 0.05 < below < 0.95 else "more than chance" if below >= 0.95 else "less than chance"
    return Claim(
        "The commutator is orthogonal to the path's subspace, 99.996 to 99.999 %, and 1.4 to 2.2 × random on it",
        f"{100 * across:.3f} % of its length across; inside {isotropic:.2f} × isotropic, {ratio:.2f} × the same "
        "matrices (medians)",
        f"any vector: {100 * by_chance:.3f} % across, 1.00 inside; the measured share is above {_share(below)} of "
        "matched random subspaces",
        f"**{verdict}** for the path so far.",
        "commutators",
        "Where the commutator points",
    )


def _over_isotropic(run: ResidueRun) -> pd.Series:
    """Length inside the path's subspace over that of isotropic vectors, record by record."""
    value, null = (run.commutator(f"on_path{name}") for name in ("", "_isotropic"))
    return inside((value / null).dropna(), run.cut)


def _aligned(runs: Sequence[ResidueRun]) -> Claim | None:
    ratios = []
    for run in runs:
        value, null = (run.commutator(name) for name in ("alignment_rms", "alignment_flip"))
        ratios += (value / null).dropna().tolist() if run.decay else []
    if not ratios:
        return None
    above = statistics.fmean(ratio > 1 for ratio in ratios)
    verdict = "does not reproduce" if above > _MORE_THAN_HALF else "reproduces"
    return Claim(
        "The last increment is no more aligned with the commutator than a random direction",
        f"root mean square of the cosine {median(ratios):.2f} × its null (median), above it in {_share(above)} of "
        f"{len(ratios)} records",
        "coins for the signs of the coordinates, sizes kept: above it in less than half",
        f"**{verdict}** against a null that has the sizes of the coordinates.",
        "commutators",
        "Alignment",
    )


def _zeros(runs: Sequence[ResidueRun]) -> Claim | None:
    chosen = [run for run in runs if run.is_free and run.reported]
    if not chosen:
        return None
    defects = [v for run in chosen for v in run.commutator("defect").tolist()]
    below = [v < 1 for run in chosen for v in run.commutator("float32_signal").tolist()]
    unresolved = [v < 1 for run in chosen for v in run.commutator("resolved").tolist()]
    if not below or not unresolved:
        return None
    spread = _spread(defects, "{:.2g}".format) if defects else "no record resolved"
    return Claim(
        "Without weight decay the defect is mostly small, 0 in 90 of 378 records, with spikes to 724",
        f"{spread}, unresolved in {statistics.fmean(unresolved):.0%} of the records",
        f"a difference of float32 weights would have been rounding in {statistics.fmean(below):.0%} of them",
        "**arithmetic**: zeros and spikes are what float32 subtraction makes of small gradients."
        if statistics.fmean(below) > statistics.fmean(unresolved)
        else "**undecided**: float32 would have resolved them.",
        "commutators",
        "Zeros and spikes without decay",
    )


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
