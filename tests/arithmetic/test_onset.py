"""Onset rules on made series, tests with honest units, survival curves, and the published leads."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from conftest import one_line_error
from hypothesis import given
from hypothesis import strategies as st

from mini_gpt_pl.arithmetic.milestones import BEGUN, reached
from mini_gpt_pl.arithmetic.statistics import discrimination, lifetimes, onset, scaling

NAN = math.nan
# Onset and t90 of the nine add, sub and mul runs of arXiv 2602.16746, seeds 42, 137, 2024 (published result files).
ONSET = [1800, 1800, 1900, 2100, 2000, 2000, 1900, 1900, 1900]
T90 = [3100, 3200, 2500, 3200, 3600, 3500, 2500, 2800, 2600]
OPERATIONS = ["add"] * 3 + ["sub"] * 3 + ["mul"] * 3
# Onsets of the runs of two operations that never generalised.
NEVER = [2000, 1800, 1900, 2000, 2300, 2100]


def every(values: list[float], step: int = 100) -> pd.Series[float]:
    return pd.Series(values, index=[step * k for k in range(len(values))], dtype=float)


# ------------------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("rule", "values", "expected"),
    [
        (onset.tenfold, [2, 2, 2, 19, 20, 21], 500),  # above 10 x 2 and above 20, strictly
        (onset.tenfold, [2, 900, 2, 3, 20.5], 400),  # the median, and no crossing before the third record
        (onset.tenfold, [2, 2, 900, 3], 200),  # the third may cross
        (onset.tenfold, [3, 3, 3, 25, 29, 31, 1], 500),  # the baseline, not the level, decides; one record suffices
        (onset.tenfold, [0.001, 0.001, 0.001, 19, 20.1], 400),  # baseline floored at 0.1, level 20
        (onset.tenfold, [0, 0, 0, 20.1], 300),
        (onset.tenfold, [2, NAN, 2, 2, NAN, 30], 500),  # unresolved records are left out
        (onset.tenfold, [2, 2], None),
        (onset.tenfold, [2, 2, 2, 2], None),
        (onset.tenfold_slow, [0.3, 0.3, 0.3, 2, 4.9, 5.1], 500),
        (onset.tenfold_slow, [120, 2.8, 2863, 1100, 1300], 200),  # the published slow run: its third record
        (onset.threefold, [1, 1, 1, 3.1, 3.1, 2, 3.1, 3.2, 3.3, 9], 600),
        (onset.threefold, [1, 3, 1, 1, 9, 9, 1, 9, 9, 1], None),
        (onset.threefold, [4, 4, 4, 4, 9, 9, 9, 4, 9, 9], None),
        (onset.threefold, [], None),
        (onset.three_sigma, [1, 3] * 5 + [5.01, 4, 5.01, 6], 1200),  # mean 2, sd 1 (over ten, not nine)
        (onset.three_sigma, [1, 3] * 5 + [4.99, 4.99], None),
        (onset.three_sigma, [1, 3] * 5 + [9], None),  # eleven records
        (onset.three_sigma, [1, 3, 1, 3, 1, 3, 1, 3, 9, 9, 2, 2], None),  # not inside the baseline
    ],
)
def test_rules_on_made_series(rule: onset.Rule, values: list[float], expected: int | None) -> None:
    assert rule(every(values)) == expected


@pytest.mark.parametrize("name", sorted(onset.RULES))
def test_no_rule_fires_without_a_rise(name: str) -> None:
    rng = np.random.Generator(np.random.Philox(key=1))
    flat = (2 + 0.1 * rng.standard_normal(60)).tolist()
    assert onset.RULES[name](every(flat)) is None
    assert onset.RULES[name](every(flat + [500.0] * 20)) == 6000


def test_only_the_rule_with_look_ahead_depends_on_where_the_run_is_cut() -> None:
    values = [2.0, 2.1, 1.9] * 6 + [7.0] * 4 + [40.0] * 160
    for name, rule in onset.RULES.items():
        onsets = {rule(every(values[:cut])) for cut in (30, 50, 180)}
        assert (len(onsets) > 1) == (name == "threefold"), name


def test_generalisation_steps() -> None:
    accuracy = [0.1, 0.5, 0.91, 0.96, 0.985, 0.97, 0.98, 0.99, 0.995, 1.0]
    steps = reached(every(accuracy).index.tolist(), {"test": accuracy})
    assert steps == {"test_50": 100, "test_90": 200, "test_95": 300, "test_98": 400, "test_98_thrice": 800}
    assert list(reached([0, 100], {"test": [0.1, 0.92]}).values()) == [100, 100, None, None, None]
    assert BEGUN.in_series(pd.Series([0.05, 0.1], index=[0, 100])) == 100


def test_leads() -> None:
    assert onset.lead(1800, 3100) == 1300 and onset.lead(1800, 3100, 3300) == pytest.approx(0.394, abs=1e-3)
    assert onset.lead(2000, 1500) == -500
    assert onset.lead(None, 1500) == -math.inf and onset.lead(100, None) is None and onset.lead(None, None) is None


# ---------------------------------------------------------------------------------------------- discrimination

runs = st.lists(st.integers(1, 6) | st.none(), min_size=1, max_size=5)


@given(runs, runs)
def test_auc_is_mann_whitney_s_and_its_p_counts_relabellings(a: list[int | None], b: list[int | None]) -> None:
    found = discrimination.auc(a, b)
    x, y = ([10**6 if t is None else t for t in times] for times in (a, b))
    u = scipy.stats.mannwhitneyu(y, x).statistic  # pairs in which the run that generalises is earlier
    assert found.auc == pytest.approx(u / (len(a) * len(b)))
    whole = np.array(x + y)
    far = []
    for chosen in combinations(range(len(whole)), len(a)):
        rest = np.delete(whole, chosen)
        pairs = np.sign(rest[:, None] - whole[list(chosen)])
        far.append(abs(pairs.mean() / 2) >= abs(found.auc - 0.5) - 1e-12)
    assert found.p == pytest.approx(np.mean(far)) and found.p >= found.smallest


def test_published_onsets_do_not_tell_the_runs_apart() -> None:
    free = discrimination.auc(ONSET, NEVER)
    assert free.auc == pytest.approx(0.676, abs=1e-3) and free.p > 0.2 and free.units == 15
    units = discrimination.auc(ONSET, NEVER, (OPERATIONS, ["x2_xy_y2"] * 3 + ["x3_xy"] * 3))
    assert units.auc == free.auc and units.units == 5
    assert units.smallest == pytest.approx(1 / 10)  # 5 over 3: nothing could be significant


def test_a_perfect_onset_of_few_units_is_no_proof() -> None:
    early, late = [1, 2, 3, 4, 5, 6], [11, 12, 13, None, 15, 16]
    assert discrimination.auc(early, late).p == pytest.approx(2 / math.comb(12, 6))
    units = discrimination.auc(early, late, ("aaabbb", "cccddd"))
    assert units.auc == 1.0 and units.p == pytest.approx(2 / 6)
    drawn = discrimination.auc(list(range(12)), list(range(20, 32)), draws=999)
    assert drawn.p == pytest.approx(1 / 1000) and drawn == discrimination.auc(
        list(range(12)), list(range(20, 32)), draws=999
    )
    with one_line_error("unit b has runs of both kinds"):
        discrimination.auc([1, 2], [3], ("ab", "b"))
    with one_line_error("at least one"):
        discrimination.auc([], [3])
    with one_line_error("3 runs have 2 units"):
        discrimination.auc([1, 2], [3], ("a", "b"))


def test_an_event_that_is_merely_early_leads_and_knows_nothing() -> None:
    rng = np.random.Generator(np.random.Philox(key=4))
    memorised = rng.normal(450, 30, 40)
    t90 = 2000 + 2 * memorised + rng.normal(0, 300, 40)
    clocks = {
        "train99": memorised.tolist(),
        "warning": (0.6 * t90 + rng.normal(0, 50, 40)).tolist(),
        "placebo": (memorised * 1.5 + rng.normal(0, 40, 40)).tolist(),
    }
    found = discrimination.compare_clocks(clocks, t90.tolist(), controls=["train99"])
    assert all(clock.ahead == clock.runs == 40 for clock in found.values())  # everything early leads
    assert found["warning"].partial > 0.9 and found["warning"].p < 0.01
    assert abs(found["placebo"].partial) < 0.35 and found["placebo"].p > 0.05
    assert found["train99"].partial == pytest.approx(found["train99"].correlation)  # nothing else is given
    some = discrimination.compare_clocks({"a": [1, None, 9, 2], "b": [5, 5, 5, 5]}, [3, 4, 5, None], controls=["b"])
    assert (some["a"].runs, some["a"].ahead, some["a"].lead) == (2, 1, -4.0)
    assert math.isnan(some["a"].partial) and math.isnan(some["b"].correlation)
    with one_line_error("no clock 'norm'"):
        discrimination.compare_clocks({"a": [1]}, [2], controls=["norm"])


def test_published_onsets_hardly_follow_t90() -> None:
    found = discrimination.compare_clocks({"onset": ONSET, "constant": [500] * 9}, T90)
    assert found["onset"].correlation == pytest.approx(0.37, abs=0.005)
    assert found["constant"].ahead == 9 and found["constant"].lead > found["onset"].lead


def test_partial_correlation_by_regression() -> None:
    rng = np.random.Generator(np.random.Philox(key=5))
    z = rng.standard_normal((30, 2))
    x, y = z @ [1, 2] + rng.standard_normal(30), z @ [3, -1] + rng.standard_normal(30)
    precision = np.linalg.inv(np.corrcoef(np.column_stack([x, y, z]).T))
    value, p = discrimination.partial_correlation(x, y, z)
    assert value == pytest.approx(-precision[0, 1] / math.sqrt(precision[0, 0] * precision[1, 1]))
    exact = 2 * scipy.stats.t.sf(abs(value) * math.sqrt(26 / (1 - value**2)), 26)
    assert p == pytest.approx(exact, abs=0.05)
    null = [rng.standard_normal((8, 5)) for _ in range(200)]  # few runs, many controls: p is still one
    shares = [discrimination.partial_correlation(t[:, 0], t[:, 1], t[:, 2:], draws=99)[1] for t in null]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.06) and np.mean(np.array(shares) <= 0.1) < 0.16
    found = discrimination.partial_correlation(x, y, np.empty((30, 0)))[0]
    assert found == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert math.isnan(discrimination.partial_correlation(x, z[:, 0] * 3 + 1, z)[0])  # nothing is left of y
    assert math.isnan(discrimination.partial_correlation(x[:5], y[:5], z[:5])[0])


def test_signs_are_counted_over_units() -> None:
    leads = [onset.lead(a, b) for a, b in zip(ONSET, T90, strict=True)]
    assert discrimination.sign_test(leads).p == pytest.approx(2**-9)
    units = discrimination.sign_test(leads, OPERATIONS)
    assert (units.positive, units.units, units.p) == (3, 3, 1 / 8)
    mixed = [1.0, -math.inf, 2.0, None, 0.0]  # a warning that never came counts, a run without the event does not
    found = discrimination.sign_test(mixed)
    assert (found.positive, found.units) == (2, 3)
    assert found.p == pytest.approx(scipy.stats.binomtest(2, 3, alternative="greater").pvalue)
    assert discrimination.sign_test([]).p == 1.0
    with one_line_error("2 runs have 1 units"):
        discrimination.sign_test([1.0, 2.0], ["add"])


# ----------------------------------------------------------------------------------------------------- scaling


def test_a_power_law_takes_four_scales() -> None:
    x = [float(s * k) for s in (1, 10, 100, 1000) for k in (1.0, 1.1, 1.2)]
    scales = [s for s in (1, 10, 100, 1000) for _ in range(3)]
    found = scaling.scaling(x, [3 * v**1.5 for v in x], scales)
    assert found.whole.exponent == pytest.approx(1.5) and found.whole.prefactor == pytest.approx(3)
    assert found.within == pytest.approx({1: 1.5, 10: 1.5, 100: 1.5, 1000: 1.5})
    with one_line_error("9 runs have 3 scales"):
        scaling.scaling(x[:9], x[:9], scales[:9])
    with one_line_error("1 of 12 runs have a value that is not positive"):
        scaling.scaling(x, [-1.0, *x[1:]], scales)
    with one_line_error("same x"):
        scaling.scaling([2.0] * 4, [1.0, 2.0, 3.0, 4.0], [1, 2, 3, 4])
    clusters = scaling.scaling(x, [float(s) for s in scales], scales)  # a line through clusters, flat within each
    assert clusters.whole.exponent > 0.9 and all(abs(e or 0) < 1e-9 for e in clusters.within.values())


# --------------------------------------------------------------------------------------------------- lifetimes


def test_the_interval_is_that_of_greenwood_s_error_on_the_scale_of_ln_minus_ln() -> None:
    """Kaplan and Meier by hand: six runs, four events, two censored."""
    found = lifetimes.kaplan_meier([2, 3, None, 5, None, 7], [9, 9, 4, 9, 6, 9])
    survivors, at_risk, events = [5 / 6, 2 / 3, 2 / 3, 4 / 9, 4 / 9, 0.0], [6, 5, 4, 3, 2, 1], [1, 1, 0, 1, 0, 1]
    assert found.times.tolist() == [2, 3, 4, 5, 6, 7] and found.at_risk.tolist() == at_risk
    assert found.surviving.tolist() == pytest.approx(survivors)
    variance = 0.0
    for k in range(5):
        variance += events[k] / (at_risk[k] * (at_risk[k] - events[k]))
        scale = math.exp(1.959963984540054 * math.sqrt(variance) / abs(math.log(survivors[k])))
        assert found.low[k] == pytest.approx(survivors[k] ** scale)
        assert found.high[k] == pytest.approx(survivors[k] ** (1 / scale))
    assert math.isnan(found.low[5]) and math.isnan(found.high[5])


def test_a_cap_censors() -> None:
    found = lifetimes.kaplan_meier([1500, 1800, None, 1600, None], 3000)
    assert found.times.tolist() == [1500, 1600, 1800, 3000] and found.at_risk.tolist() == [5, 4, 3, 2]
    assert found.surviving.tolist() == pytest.approx([0.8, 0.6, 0.4, 0.4])
    assert found.median == 1800
    nobody = lifetimes.kaplan_meier([None, None], 3000)
    assert nobody.surviving.tolist() == [1.0] and nobody.median is None and np.isnan(nobody.low).all()
    with one_line_error("after the run was stopped"):
        lifetimes.kaplan_meier([3500], 3000)
    with one_line_error("0 runs"):
        lifetimes.kaplan_meier([], 3000)
