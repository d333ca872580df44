"""Growth exponents and phases: closed forms, explicit vectors, and what a walk gives."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import basis_of, bent_path, gram_of, normal, walk_gram
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.polynomial import polynomial
from torch import Tensor

from mini_gpt_pl.geometry.path import growth, pca
from mini_gpt_pl.geometry.path.growth import WINDOWS, PowerLaw, power_law

STEPS = list(range(0, 10_001, 200))


def fitted(fit: PowerLaw | None) -> PowerLaw:
    assert fit is not None
    return fit


# ------------------------------------------------------------------------------------------------ power laws


@given(st.floats(-3, 3), st.floats(1e-4, 1e4), st.sampled_from(WINDOWS))
def test_a_power_law_is_found(exponent: float, prefactor: float, window: tuple[int, int]) -> None:
    values = [prefactor * step**exponent if step else math.nan for step in STEPS]
    fit = fitted(power_law(STEPS, values, *window))
    assert fit.exponent == pytest.approx(exponent, abs=1e-9)
    assert fit.prefactor == pytest.approx(prefactor, rel=1e-7)
    assert fit.r2 == pytest.approx(1.0, abs=1e-6) or abs(exponent) < 1e-9
    assert fit.points == sum(window[0] < step <= window[1] for step in STEPS)


def test_a_parabola_has_exponent_two() -> None:
    assert fitted(power_law(STEPS, [3e-5 * t**2 for t in STEPS], 0, 2000)).exponent == pytest.approx(2.0, abs=1e-12)


def test_a_constant_has_exponent_zero_and_is_explained() -> None:
    for value in (1.0, 0.1, 1e-8, 37.123):
        fit = fitted(power_law(STEPS, [value] * len(STEPS), 0, 10_000))
        assert fit.exponent == pytest.approx(0.0, abs=1e-12) and fit.r2 == 1.0
        assert fit.prefactor == pytest.approx(value)


@given(st.lists(st.floats(0.01, 100), min_size=3, max_size=30))
def test_the_fit_is_the_least_squares_line(values: list[float]) -> None:
    steps = list(range(1, len(values) + 1))
    fit = fitted(power_law(steps, values, 0, math.inf))
    intercept, slope = polynomial.polyfit(np.log(steps), np.log(values), 1)
    assert [fit.exponent, math.log(fit.prefactor)] == pytest.approx([slope, intercept], abs=1e-9)
    assume(np.ptp(np.log(values)) > 1e-6)
    r2 = np.corrcoef(np.log(steps), np.log(values))[0, 1] ** 2
    assert fit.r2 == pytest.approx(r2, abs=1e-9)


@given(st.lists(st.floats(0.01, 100), min_size=5, max_size=20), st.floats(0.1, 50))
def test_units_change_the_prefactor_only(values: list[float], unit: float) -> None:
    steps = list(range(1, len(values) + 1))
    own, scaled = (fitted(power_law(steps, [k * v for v in values], 0, math.inf)) for k in (1.0, unit))
    assert scaled.exponent == pytest.approx(own.exponent, abs=1e-9)
    assert scaled.prefactor == pytest.approx(unit * own.prefactor, rel=1e-9)


def test_windows_are_open_below_and_closed_above() -> None:
    values = [float(t) if t <= 2000 else 7.0 for t in STEPS]
    assert fitted(power_law(STEPS, values, 0, 2000)).exponent == pytest.approx(1.0)
    after = fitted(power_law(STEPS, values, 2000, 4000))
    assert after.exponent == pytest.approx(0.0, abs=1e-12) and after.points == 10


def test_the_sign_is_dropped_and_what_has_no_logarithm_left_out() -> None:
    values = [math.nan, 0.0, -2.0, math.inf, 4.0, -6.0]
    fit = fitted(power_law([0, 1, 2, 3, 4, 6], values, 0, 10))
    assert fit.exponent == pytest.approx(1.0) and fit.points == 3


def test_two_points_are_no_fit() -> None:
    assert power_law([1, 2, 3], [1.0, 2.0, math.nan], 0, 10) is None
    assert power_law([1, 2, 3], [1.0, 2.0, 3.0], 3, 10) is None


def test_windows_scale_with_the_run() -> None:
    assert growth.scaled_windows(10_000) == WINDOWS
    assert growth.scaled_windows(500)[:2] == ((0, 100), (100, 200))


# -------------------------------------------------------------------------------------- from a trajectory's Gram

T, D = 50, 80
WEIGHTS = bent_path(T + 1, D, seed=11)
H = gram_of(WEIGHTS)


def first_direction(rows: Tensor) -> Tensor:
    """PC1 of unit rows, by SVD."""
    rows = rows[rows.norm(dim=1) > 0]
    return torch.linalg.svd(rows / rows.norm(dim=1, keepdim=True), full_matrices=False).Vh[0]


def test_drift_is_split_along_the_backbone_of_unit_rows() -> None:
    drift, v = WEIGHTS[1:] - WEIGHTS[0], first_direction(WEIGHTS[1:] - WEIGHTS[0])
    split = growth.split_drift(H)
    torch.testing.assert_close(split.coordinate.abs(), (drift @ v).abs(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(split.residual_norm, (drift - (drift @ v)[:, None] * v).norm(dim=1))
    raw = torch.linalg.svd(drift, full_matrices=False).Vh[0]
    found = growth.split_drift(H, normalise=False).coordinate.abs()
    torch.testing.assert_close(found, (drift @ raw).abs(), rtol=1e-8, atol=1e-8)


def test_regimes_fit_both_parts_in_every_window() -> None:
    """x(t) = t^2 u + t w with u and w orthonormal, along u and across it in windows by hand."""
    u, w = torch.linalg.qr(normal(D, 2))[0].T
    t = torch.tensor(STEPS, dtype=torch.float64)[:, None] / 1000
    path = t**2 * u + t * w
    along = u @ torch.linalg.pinv(basis_of(path), rtol=1e-9)  # coefficients of u itself
    split = pca.decompose(gram_of(path), pca.drifts(T + 1)[1:], along)
    found = growth.regimes(STEPS[1:], split)
    assert [(regime.lo, regime.hi) for regime in found] == list(WINDOWS)
    for regime in found:
        assert fitted(regime.coordinate).exponent == pytest.approx(2.0, abs=1e-6)
        assert fitted(regime.residual).exponent == pytest.approx(1.0, abs=1e-6)


def test_windows_beyond_the_run_have_no_fit() -> None:
    found = growth.regimes(STEPS[1:11], growth.split_drift(H[:11, :11]))
    assert found[0].coordinate is not None and found[3].coordinate is None and found[3].residual is None


def test_a_free_walk_drifts_as_the_square_root() -> None:
    gram = walk_gram(400)
    length = pca.norms(gram, pca.drifts(401)[1:]).tolist()
    assert fitted(power_law(range(1, 401), length, 0, 400)).exponent == pytest.approx(0.5, abs=1e-9)


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=3, max_size=20))
def test_correlation_is_pearsons(pairs: list[tuple[float, float]]) -> None:
    x, y = map(list, zip(*pairs, strict=True))
    assume(np.ptp(x) > 1e-3 and np.ptp(y) > 1e-3)
    found = growth.correlation(range(1, len(x) + 1), x, y)
    expected = np.mean((x - np.mean(x)) * (y - np.mean(y))) / np.std(x) / np.std(y)
    assert found == pytest.approx(expected, abs=1e-9)


def test_correlation_in_a_window_and_without_one() -> None:
    x = [0.0, 1.0, 2.0, 3.0, 5.0, math.nan]
    y = [9.0, 1.0, 2.0, 3.0, 0.0, 1.0]
    assert growth.correlation(range(6), x, y, 0, 3) == pytest.approx(1.0)
    assert growth.correlation(range(6), x, y, 0, 2) is None  # two points
    assert growth.correlation(range(6), [0.1] * 6, y) is None  # constant


def test_series_meet_at_common_steps() -> None:
    found = growth.at_steps([2, 4, 6], [0.2, 0.4, 0.6], [4, 5, 6])
    assert found[0] == 0.4 and math.isnan(found[1]) and found[2] == 0.6


# ---------------------------------------------------------------------------------------------------- phases


def by_vectors(border: int, middle: int) -> tuple[Tensor, Tensor]:
    return first_direction(WEIGHTS[1 : middle + 1] - WEIGHTS[0]), first_direction(
        WEIGHTS[middle + 1 :] - WEIGHTS[middle]
    )


@pytest.mark.parametrize(("border", "middle"), [(4000, 20), (4100, 20), (200, 1), (9800, 49)])
def test_phase_alignment_is_the_cosine_of_the_vectors(border: int, middle: int) -> None:
    early, late = by_vectors(border, middle)
    found = growth.phase_alignment(H, STEPS, border)
    assert found == pytest.approx(float((early @ late).abs()), abs=1e-9)


@pytest.mark.parametrize("border", [0, 199, 10_000, 12_000])
def test_no_phase_no_alignment(border: int) -> None:
    assert math.isnan(growth.phase_alignment(H, STEPS, border))
    assert growth.alignment_curves(H, STEPS, border) is None


def test_a_walk_has_no_memory_of_its_early_phase() -> None:
    assert growth.phase_alignment(walk_gram(T), STEPS, 4000) == pytest.approx(0.0, abs=1e-12)


def test_a_line_keeps_its_direction_and_a_corner_loses_it() -> None:
    u, w = torch.linalg.qr(normal(D, 2))[0].T
    t = torch.arange(T + 1, dtype=torch.float64)[:, None]
    assert growth.phase_alignment(gram_of(t * u), STEPS, 4000) == pytest.approx(1.0)
    bend = t.clamp_max(20) * u + (t - 20).clamp_min(0) * (0.6 * u + 0.8 * w)
    assert growth.phase_alignment(gram_of(bend), STEPS, 4000) == pytest.approx(0.6)


@pytest.mark.parametrize("width", [4, 10])
def test_curves_compare_windows_with_both_phases(width: int) -> None:
    early, late = by_vectors(4000, 20)
    curves = growth.alignment_curves(H, STEPS, 4000, width)
    assert curves is not None and len(curves.centres) == T - width + 1
    for k, first in enumerate(range(1, T - width + 2)):
        window = WEIGHTS[first + 1 : first + width] - WEIGHTS[first]
        v = first_direction(window)
        assert curves.centres[k] == pytest.approx(np.mean(STEPS[first : first + width]))
        assert float(curves.early[k]) == pytest.approx(float((v @ early).abs()), abs=1e-8)
        assert float(curves.late[k]) == pytest.approx(float((v @ late).abs()), abs=1e-8)


def test_curves_of_the_paper_have_41_windows() -> None:
    curves = growth.alignment_curves(H, STEPS, 4000)
    assert curves is not None and len(curves.early) == 41 and curves.centres[0] == 1100


def test_a_short_run_has_no_curve_and_a_still_window_no_value() -> None:
    assert growth.alignment_curves(H[:6, :6], STEPS[:6], 400) is None
    still = WEIGHTS[:12].clone()
    still[6:10] = still[6]
    curves = growth.alignment_curves(gram_of(still), STEPS[:12], 600, width=3)
    assert curves is not None
    assert curves.early.isnan().tolist() == [first in (6, 7) for first in range(1, 10)]


def test_a_side_that_did_not_move_has_no_phase() -> None:
    stopped = WEIGHTS[:12].clone()
    stopped[6:] = stopped[5]
    assert growth.phases(gram_of(stopped), STEPS[:12], 1000) is None


# --------------------------------------------------------------------------------------------------- summary


def test_summary_names_what_was_fitted() -> None:
    found = growth.summary(H[:21, :21], STEPS[:21], 2000)
    named = {f"{k}_{p}_{w}" for k in ("exponent", "r2") for p in "ar" for w in ("0_2000", "2000_4000", "0_4000")}
    assert set(found) == named | {"early_late"}
    assert found["early_late"] == growth.phase_alignment(H[:21, :21], STEPS[:21], 2000)
    regime = growth.regimes(STEPS[1:21], growth.split_drift(H[:21, :21]))[1]
    assert found["exponent_r_2000_4000"] == fitted(regime.residual).exponent
    assert found["r2_a_2000_4000"] == fitted(regime.coordinate).r2


def test_summary_of_nothing_is_empty() -> None:
    assert growth.summary(gram_of(torch.ones(5, 3).double()), STEPS[:5], 400) == {}
    assert growth.summary(H[:2, :2], STEPS[:2], 400) == {}
