"""Principal directions from inner products, against numpy's SVD, closed forms of a random walk, and symmetries."""

from __future__ import annotations

import doctest
import importlib
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import SMALL, basis_of, bent_path, flat_selection, gram_of, normal, record, walk_gram
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor

from mini_gpt_pl.geometry.path import pca as geometry
from mini_gpt_pl.geometry.path.pca import PCA, RollingBackbone, decompose, drifts, pca

T, D = 20, 300
WEIGHTS = bent_path(T + 1, D)
H = gram_of(WEIGHTS)
# (anchor, first row, last row + 1): whole run, later anchors (inside and before the window), windows, a single row
VIEWS = [(0, 1, T + 1), (0, 0, T + 1), (5, 3, 12), (5, 6, T + 1), (0, 8, 18), (T, 0, T), (0, 4, 5)]


def svd(rows: Tensor, normalise: bool = False) -> tuple[Tensor, Tensor]:
    """Brute force: singular values and right vectors of the non-zero rows, last row's coordinate positive."""
    rows = rows[rows.norm(dim=1) > 0]
    if normalise:
        rows = rows / rows.norm(dim=1, keepdim=True)
    _, values, right = np.linalg.svd(rows.numpy(), full_matrices=False)
    right = right * np.where(right @ rows[-1].numpy() < 0, -1.0, 1.0)[:, None]
    return torch.from_numpy(values), torch.from_numpy(right)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(("anchor", "first", "end"), VIEWS)
def test_pca_is_the_svd(anchor: int, first: int, end: int, normalise: bool) -> None:
    values, right = svd(WEIGHTS[first:end] - WEIGHTS[anchor], normalise)
    part = pca(H, drifts(T + 1, anchor)[first:end], normalise=normalise)
    torch.testing.assert_close(part.singular_values, values, rtol=1e-9, atol=0)
    torch.testing.assert_close(part.ratios, values**2 / (values**2).sum(), rtol=0, atol=1e-12)
    torch.testing.assert_close(part.directions @ basis_of(WEIGHTS), right, rtol=0, atol=1e-8)


@pytest.mark.parametrize("normalise", [False, True])
def test_several_paths_at_once_are_each_by_itself(normalise: bool) -> None:
    late = torch.cat([WEIGHTS[:1].expand(4, -1), WEIGHTS[: T - 3]])  # three snapshots without movement first
    line = WEIGHTS[0] + torch.arange(T + 1)[:, None] * WEIGHTS[1]
    stopped = torch.cat([WEIGHTS[: T - 3], WEIGHTS[:1].expand(4, -1)])  # back where it began: the last drifts are zero
    grams = torch.stack([gram_of(path) for path in (WEIGHTS, late, line, stopped)])
    rows = drifts(T + 1)
    found = geometry.spectra(grams, rows, normalise=normalise)
    energies = geometry.energies(grams, rows, normalise=normalise)
    for k, path in enumerate((WEIGHTS, late, line, stopped)):
        alone, (values, right) = pca(grams[k], rows, normalise=normalise), svd(path - path[0], normalise)
        moved = int(((path - path[0]).norm(dim=1) > 0).sum())
        assert int(found.moved[k]) == moved and int(found.ranks[k]) == len(alone.directions) <= moved
        energy = torch.zeros(T + 1, dtype=torch.float64)
        energy[: len(values)] = values.square()
        for one in (found.energy[k], energies[k]):
            torch.testing.assert_close(one, energy, rtol=1e-9, atol=1e-9 * float(energy[0]))
        torch.testing.assert_close(found.directions[k, 0] @ basis_of(path), right[0], rtol=0, atol=1e-8)
        assert not found.directions[k, len(alone.directions) :].any()


def test_directions_become_weights_through_the_recorded_rows() -> None:
    rows, trajectory = record(flat_selection(D), WEIGHTS)
    backbone = pca(trajectory.gram(), drifts(T + 1)).backbone
    _, right = svd(WEIGHTS - WEIGHTS[0])
    torch.testing.assert_close(rows.combine(backbone[None]).values.double(), right[0], rtol=0, atol=1e-6)


def test_rank_deficient_rows_have_few_directions() -> None:
    line = normal(D) + torch.linspace(0, 3, 8, dtype=torch.float64)[:, None] * normal(D, seed=1)
    part = pca(gram_of(line), drifts(8))
    assert part.pc1 == pytest.approx(1.0, abs=1e-12) and len(part.directions) == 1
    plane = normal(8, 2) @ normal(2, D, seed=1)
    assert len(pca(gram_of(plane), drifts(8)).directions) == 2


@pytest.mark.parametrize("normalise", [False, True])
def test_rounding_is_no_direction(normalise: bool) -> None:
    """A line walked to and fro has rows that nearly vanish: scaled to unit length they must not show their rounding."""
    for seed in range(30):
        line = (normal(T + 1, seed=seed)[:, None] * normal(D, seed=99)).cumsum(0)
        assert len(pca(gram_of(line), drifts(T + 1), normalise=normalise).directions) == 1


def test_nothing_is_left_of_pure_decay_once_corrected() -> None:
    survival = 0.9 ** torch.arange(T + 1, dtype=torch.float64)
    rows = drifts(T + 1) + (1 - survival)[:, None] * geometry.theta0(T + 1)
    with pytest.raises(ValueError, match="every row is zero"):
        pca(gram_of(survival[:, None] * normal(D)), rows, normalise=True)


@pytest.mark.parametrize("share", [0.5, 0.95, 0.99, 1.0])
@pytest.mark.parametrize("gram", [H, walk_gram(T), walk_gram(1)], ids=["bent", "walk", "one"])
def test_components_for_a_share(gram: Tensor, share: float) -> None:
    part = pca(gram, drifts(len(gram)))
    ratios = part.ratios.tolist()
    fewest = next(k for k in range(1, len(ratios) + 1) if math.fsum(ratios[:k]) >= share - 1e-12)
    assert part.components_for(share) == fewest


def test_components_for_a_share_reached_exactly() -> None:
    assert PCA(torch.tensor([3.0, 1.0, 0.0]).double().sqrt(), torch.eye(3).double()).components_for(0.75) == 1


def test_decomposition_is_the_projection() -> None:
    direction = pca(H, drifts(T + 1)).backbone
    split = decompose(H, drifts(T + 1), direction)
    drift, (_, right) = WEIGHTS - WEIGHTS[0], svd(WEIGHTS - WEIGHTS[0])
    along = drift @ right[0]
    torch.testing.assert_close(split.coordinate, along, rtol=1e-9, atol=1e-8)
    residual = (drift - along[:, None] * right[0]).norm(dim=1)
    torch.testing.assert_close(split.residual_norm, residual, rtol=1e-9, atol=1e-8)
    torch.testing.assert_close(split.drift_norm, drift.norm(dim=1), rtol=1e-9, atol=0)
    square = split.coordinate**2 + split.residual_norm**2
    torch.testing.assert_close(square, split.drift_norm**2, rtol=1e-10, atol=0)
    assert split.fraction[0] == 0  # no drift yet


def test_mean_fraction_is_the_first_ratio_of_unit_rows() -> None:
    part = pca(H, drifts(T + 1), normalise=True)
    fraction = decompose(H, drifts(T + 1)[1:], part.backbone).fraction
    assert float(fraction.mean()) == pytest.approx(part.pc1, abs=1e-12)


def test_update_alignment_is_the_cosine_with_each_increment() -> None:
    cosines = torch.cosine_similarity(WEIGHTS.diff(dim=0), svd(WEIGHTS - WEIGHTS[0])[1][:1])
    found = geometry.update_alignment(H, 3.0 * pca(H, drifts(T + 1)).backbone)
    torch.testing.assert_close(found, cosines, rtol=0, atol=1e-10)


def test_past_alignment_knows_no_future() -> None:
    found = geometry.past_update_alignment(H)
    assert found[0].isnan() and len(found) == T
    assert math.isnan(geometry.latest_update_alignment(H[:1, :1]))  # theta_0 alone
    for k in range(2, T + 1):
        past = svd(WEIGHTS[1:k] - WEIGHTS[0])[1][0]
        assert float(found[k - 1]) == pytest.approx(
            float(torch.cosine_similarity(WEIGHTS[k] - WEIGHTS[k - 1], past, dim=0)), abs=1e-9
        )


def test_alignment_where_nothing_moves() -> None:
    still = WEIGHTS[[0, 0, 1, 1, 2]]
    past = geometry.past_update_alignment(gram_of(still))
    assert past.isnan().tolist() == [True, True, False, False] and past[2] == 0  # d_3 = 0; d_2 has no past
    assert geometry.update_alignment(gram_of(still), pca(gram_of(still), drifts(5)).backbone)[0] == 0
    with pytest.raises(ValueError, match="every row is zero"):
        pca(gram_of(WEIGHTS[[0, 0, 0]]), drifts(3))


# ---- rolling windows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [2, 5, T])
@pytest.mark.parametrize(
    ("rolling", "self_anchored", "adjacent"),
    [
        (geometry.rolling_origin_anchored, False, True),
        (geometry.rolling_self_anchored, True, True),
        (geometry.rolling_against_global, False, False),
    ],
)
def test_rolling_windows(
    rolling: Callable[[Tensor, int], RollingBackbone], self_anchored: bool, adjacent: bool, width: int
) -> None:
    ends = list(range(width, T + 1))
    firsts, shares = [], []
    for end in ends:
        window = WEIGHTS[end - width + 1 : end + 1]
        values, right = svd(window - (window[0] if self_anchored else WEIGHTS[0]), normalise=self_anchored)
        firsts.append(right[0])
        shares.append(float(values[0] ** 2 / (values**2).sum()))
    if adjacent:
        cosines = [abs(float(u @ w)) for u, w in itertools.pairwise(firsts)]
        ends, shares = ends[1:], shares[1:]
    else:
        cosines = [abs(float(u @ svd(WEIGHTS - WEIGHTS[0])[1][0])) for u in firsts]
    found = rolling(H, width)
    assert found.ends == ends
    assert found.cosines.tolist() == pytest.approx(cosines, abs=1e-9)
    assert found.pc1.tolist() == pytest.approx(shares, abs=1e-9)


# ---- closed forms of a random walk -----------------------------------------------------------------------------------


def test_walk_has_a_first_component_of_eight_over_pi_squared() -> None:
    assert pca(walk_gram(400), drifts(401)).pc1 == pytest.approx(8 / math.pi**2, abs=1e-3)
    # The exact eigenvalues of min(s, t): 1 / (4 sin^2((2k - 1) pi / (4T + 2))).
    k = torch.arange(1, 51, dtype=torch.float64)
    energy = 0.25 / torch.sin((2 * k - 1) * math.pi / 202) ** 2
    torch.testing.assert_close(pca(walk_gram(50), drifts(51)).singular_values, energy.sqrt(), rtol=1e-10, atol=0)


def test_walk_of_unit_rows() -> None:
    assert pca(walk_gram(50), drifts(51), normalise=True).pc1 == pytest.approx(0.699, abs=1e-3)


def test_walk_looks_stable_through_windows_from_the_origin() -> None:
    found = geometry.rolling_origin_anchored(walk_gram(50), width=10)
    assert len(found.cosines) == 40 and float(found.cosines.mean()) == pytest.approx(0.9978, abs=1e-4)


@pytest.mark.parametrize("increments", [2, 10, 50])
def test_walk_aligns_with_its_own_backbone_but_not_with_its_past(increments: int) -> None:
    gram = walk_gram(increments)
    own = geometry.update_alignment(gram, pca(gram, drifts(increments + 1)).backbone)
    assert float(own.square().mean().sqrt()) == pytest.approx(1 / math.sqrt(increments), abs=1e-12)
    assert torch.equal(geometry.past_update_alignment(gram)[1:], torch.zeros(increments - 1, dtype=torch.float64))


# ---- symmetries ------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6), snapshots=st.integers(2, 12), normalise=st.booleans())
def test_ratios_are_shares(seed: int, snapshots: int, normalise: bool) -> None:
    ratios = pca(gram_of(bent_path(snapshots, 30, seed)), drifts(snapshots), normalise=normalise).ratios
    assert float(ratios.sum()) == pytest.approx(1.0, abs=1e-12)
    assert (ratios.diff() <= 0).all() and (ratios >= 0).all()


@given(seed=st.integers(0, 10**6), scale=st.floats(1e-6, 1e6), normalise=st.booleans())
def test_turning_and_scaling_weight_space_changes_no_share(seed: int, scale: float, normalise: bool) -> None:
    weights = bent_path(9, 40, seed)
    turned = scale * weights @ torch.linalg.qr(normal(40, 40, seed=seed + 2)).Q
    before, after = (pca(gram_of(w), drifts(9), normalise=normalise) for w in (weights, turned))
    torch.testing.assert_close(after.ratios, before.ratios, rtol=0, atol=1e-10)
    factor = 1.0 if normalise else scale
    torch.testing.assert_close(after.singular_values, factor * before.singular_values, rtol=1e-6, atol=0)
    first, second = (geometry.rolling_self_anchored(gram_of(w), 4).cosines for w in (weights, turned))
    torch.testing.assert_close(second, first, rtol=0, atol=1e-7)


@given(seed=st.integers(0, 10**6))
def test_coefficients_stand_for_vectors(seed: int) -> None:
    weights, (u, w) = bent_path(6, 25, seed), normal(2, 6, seed=seed + 2)
    gram, x, y = gram_of(weights), u @ basis_of(weights), w @ basis_of(weights)
    scale = float(x.norm() * y.norm())
    assert float(geometry.inner(gram, u, w)) == pytest.approx(float(x @ y), abs=1e-10 * scale)
    assert geometry.cosine(gram, u, w) == pytest.approx(float(x @ y) / scale, abs=1e-10)
    assert geometry.cosine(gram, u, torch.zeros_like(w)) == 0.0


def test_shapes_are_checked_while_tests_run() -> None:
    """The import hook of conftest.py is at work, in functions and in dataclasses."""
    with pytest.raises(TypeCheckError):
        geometry.norms(walk_gram(4), drifts(3))
    with pytest.raises(TypeCheckError):
        PCA(torch.ones(2, 2), torch.ones(2, 2))
    with pytest.raises(TypeCheckError):
        record(SMALL, torch.ones(2, SMALL.dim, 1))


@pytest.mark.parametrize("name", ["path.pca", "path.centred", "vectors.selection"])
def test_examples_in_the_docstrings_run(name: str) -> None:
    outcome = doctest.testmod(importlib.import_module(f"mini_gpt_pl.geometry.{name}"))
    assert outcome.attempted > 0 and outcome.failed == 0
