"""Bases, projections and their nulls, against dense float64, scipy and many draws."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, basis_of, bent_path, flat_selection, normal, one_line_error, record
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mini_gpt_pl.geometry.directions import subspace
from mini_gpt_pl.geometry.directions.subspace import Basis
from mini_gpt_pl.geometry.directions.subspace_nulls import ShareNull, flipped_cosine
from mini_gpt_pl.geometry.path.snapshots import SnapshotFolder
from mini_gpt_pl.geometry.vectors.selection import FingerprintError, ParameterSelection, Vector

WIDE = ParameterSelection(("a.w", "b.w", "b.v"), ((6, 10), (40,), (5, 8)), ("a", "b", "b"))
ALL = ParameterSelection(("c", "a.w", "b.w", "b.v"), ((7,), (6, 10), (40,), (5, 8)), ("all",) * 4)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dense(basis: Basis) -> Tensor:
    """The directions as rows of D numbers."""
    rows = torch.zeros(basis.size, basis.selection.dim, dtype=torch.float64)
    first = 0
    for block in basis.blocks:
        rows[first : first + len(block.rows), block.span] = block.rows.double()
        first += len(block.rows)
    return rows


def vector(selection: ParameterSelection, seed: int = 9) -> Vector:
    return Vector(normal(selection.dim, seed=seed), selection)


BASES = {
    "isotropic": lambda: subspace.isotropic(WIDE, 5, generator()),
    "rank one": lambda: subspace.rank_one(WIDE, 2, generator()),
    "own": lambda: subspace.own_directions(vector(WIDE)),
    "singular": lambda: subspace.singular(vector(WIDE), 3),
    "path": lambda: principal(bent_path(6, WIDE.dim), k=2),
}


def principal(weights: Tensor, k: int, centred: bool = True) -> Basis:
    rows, trajectory = record(WIDE, weights)
    return subspace.principal(trajectory, rows.combine_all, WIDE, k, centred=centred)


# --------------------------------------------------------------------------------------------------- projecting


@pytest.mark.parametrize("kind", BASES)
def test_directions_are_orthonormal_and_projections_those_of_the_dense_matrix(kind: str) -> None:
    basis, seen = BASES[kind](), vector(WIDE, 3)
    rows = dense(basis)
    torch.testing.assert_close(rows @ rows.T, torch.eye(basis.size, dtype=torch.float64), atol=1e-12, rtol=0)
    inside = rows.T @ (rows @ seen.values)
    torch.testing.assert_close(basis.coefficients(seen), rows @ seen.values)
    torch.testing.assert_close(basis.parallel(seen).values, inside)
    found = basis.project(seen)
    share = float(inside.square().sum() / seen.values.square().sum())
    assert float(found.share) == pytest.approx(share)
    assert float(found.ratio) == pytest.approx(math.sqrt(share))
    assert float(found.residual) == pytest.approx(math.sqrt(1 - share))
    assert found.isotropic == pytest.approx(basis.size / WIDE.dim)
    again = basis.parallel(basis.parallel(seen))
    torch.testing.assert_close(again.values, inside)
    assert float(basis.project(again).residual) == pytest.approx(0.0, abs=1e-7)


def test_a_vector_of_more_weights_in_another_order() -> None:
    """Its energy outside of the basis' weights counts in the whole."""
    seen = vector(ALL, 4)
    cut = subspace.restrict(seen, WIDE)
    assert torch.equal(cut.values, seen.values[7:])
    basis = subspace.isotropic(WIDE, 5, generator())
    inside = dense(basis) @ cut.values
    found = basis.project(seen)
    assert float(found.share) == pytest.approx(float(inside.square().sum() / seen.values.square().sum()))
    assert found.isotropic == 5 / ALL.dim
    with one_line_error("no weight 'c'"):
        subspace.restrict(vector(WIDE), ALL)


def test_a_basis_in_float32_on_request() -> None:
    basis = subspace.rank_one(WIDE, 2, generator()).to(dtype=torch.float32)
    assert basis.blocks[0].rows.dtype == torch.float32
    assert basis.parallel(vector(WIDE)).values.dtype == torch.float64  # the vector's


def test_what_is_no_basis() -> None:
    rows = normal(2, 3)
    with pytest.raises(ValueError, match="overlap"):
        Basis.of(SMALL, [("x", slice(0, 3), rows), ("y", slice(2, 5), rows)])
    with pytest.raises(ValueError, match="depend"):
        Basis.of(SMALL, [("x", slice(0, 3), torch.stack([rows[0], 2 * rows[0]]))])
    with one_line_error("4 directions in x, which has 3 values"):
        Basis.of(SMALL, [("x", slice(0, 3), normal(4, 3))])
    with one_line_error("without directions"):
        subspace.own_directions(Vector(torch.zeros(SMALL.dim), SMALL))


# --------------------------------------------------------------------------------------------------- which basis


@pytest.mark.parametrize("centred", [True, False])
def test_principal_directions_are_those_of_a_singular_value_decomposition(centred: bool) -> None:
    weights = bent_path(7, WIDE.dim)
    basis = principal(weights, 2, centred)
    rows = weights - weights.mean(0) if centred else weights[1:] - weights[0]
    for block, (group, span) in zip(basis.blocks, WIDE.items(), strict=True):
        expected = torch.linalg.svd(rows[:, span], full_matrices=False)[2][:2]
        assert block.label == group
        torch.testing.assert_close(
            (block.rows @ expected.T).abs(), torch.eye(2, dtype=torch.float64), atol=1e-6, rtol=0
        )


def test_groups_that_moved_less_have_fewer_directions() -> None:
    weights = bent_path(5, WIDE.dim)
    a, b = WIDE.slices
    weights[:, a] = weights[:1, a]  # frozen
    weights[2:, b] = weights[1, b] + torch.arange(3.0)[:, None] * (weights[1, b] - weights[0, b])  # a line
    basis = principal(weights, 3)
    assert [(block.label, len(block.rows)) for block in basis.blocks] == [("b", 1)]
    with one_line_error("one snapshot|without directions|nothing has moved"):
        principal(weights[:1], 3)


def test_another_run_is_read_from_its_files(tmp_path: Path) -> None:
    weights = bent_path(5, WIDE.dim).float()
    rows, trajectory = record(WIDE, weights)
    folder = SnapshotFolder(tmp_path, WIDE)
    for step, row in zip(trajectory.steps, basis_of(weights), strict=True):
        folder.write(step, Vector(row, WIDE))
    folder.close()
    found = subspace.of_run(folder, trajectory, 2, torch.device("cpu"))
    expected = subspace.principal(trajectory, rows.combine_all, WIDE, 2)
    torch.testing.assert_close(dense(found), dense(expected))
    with pytest.raises(FingerprintError):
        subspace.of_run(SnapshotFolder(tmp_path, ALL), trajectory, 2, torch.device("cpu"))


def test_singular_directions_rebuild_a_matrix() -> None:
    weights = vector(WIDE)
    full = subspace.singular(weights, 99)
    matrices = [slice(0, 60), slice(100, 140)]
    assert [block.span for block in full.blocks] == matrices
    inside = full.parallel(weights).values
    for span in matrices:
        torch.testing.assert_close(inside[span], weights.values[span])
    assert not inside[60:100].any()
    assert torch.linalg.matrix_rank(full.blocks[0].rows[0].view(6, 10)) == 1


def test_random_ones_follow_the_seed_and_the_blocks() -> None:
    path = BASES["path"]()
    drawn = [subspace.random_like(path, generator(seed)) for seed in (1, 1, 2)]
    assert torch.equal(dense(drawn[0]), dense(drawn[1])) and not torch.equal(dense(drawn[0]), dense(drawn[2]))
    assert [b.span for b in drawn[0].blocks] == [b.span for b in path.blocks]


# ------------------------------------------------------------------------------------------------- two subspaces


def test_overlaps_of_subspaces() -> None:
    a, b = subspace.isotropic(WIDE, 5, generator(1)), BASES["rank one"]()
    between = dense(a) @ dense(b).T
    torch.testing.assert_close(subspace.cross(a, b), between)
    expected = torch.linalg.svdvals(between)
    torch.testing.assert_close(subspace.principal_cosines(a, b), expected)
    assert subspace.overlap(a, b) == pytest.approx(float(expected.square().mean()))
    assert subspace.overlap(a, a) == pytest.approx(1.0)
    with pytest.raises(FingerprintError):
        subspace.cross(a, subspace.isotropic(ALL, 2, generator()))


def test_overlap_by_chance() -> None:
    """The mean over random second bases in the same blocks."""
    a = BASES["path"]()
    drawn = [subspace.overlap(a, subspace.random_like(a, generator(seed))) for seed in range(150)]
    expected = subspace.expected_overlap(a, subspace.random_like(a, generator()))
    assert float(np.mean(drawn)) == pytest.approx(expected, abs=4 * float(np.std(drawn)) / math.sqrt(150))
    whole = subspace.isotropic(WIDE, 4, generator())
    assert subspace.expected_overlap(whole, whole) == pytest.approx(4 / WIDE.dim)


# --------------------------------------------------------------------------------------------------------- nulls


@pytest.mark.parametrize(("k", "dim"), [(1, 2), (1, 50), (2, 7), (16, 290_401), (30, 64)])
def test_quantiles_of_one_block_are_those_of_the_beta_distribution(k: int, dim: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    a, b = k / 2, (dim - k) / 2
    null = ShareNull(a / (a + b), a * b / ((a + b) ** 2 * (a + b + 1)))
    assert null.parameters == pytest.approx((a, b))
    exact = stats.beta(a, b)
    for q in (0.01, 0.25, 0.5, 0.95, 0.999):
        assert null.quantile(q) == pytest.approx(exact.ppf(q), rel=2e-3, abs=1e-3 * exact.std())
        assert null.below(float(exact.ppf(q))) == pytest.approx(q, abs=1e-3)


def test_the_matched_null_is_what_random_directions_in_the_blocks_give() -> None:
    seen = vector(ALL, 5)
    seen.values[7:67] *= 6  # most of the energy in a block with few values
    basis = BASES["path"]()
    found = basis.project(seen)
    null = found.null()[0]
    drawn = np.array([float(subspace.random_like(basis, generator(s)).project(seen).share) for s in range(800)])
    assert null.mean == pytest.approx(float(found.matched)) == pytest.approx(drawn.mean(), rel=0.08)
    assert math.sqrt(null.variance) == pytest.approx(drawn.std(), rel=0.12)
    for q in (0.05, 0.5, 0.95):
        assert (drawn < null.quantile(q)).mean() == pytest.approx(q, abs=0.04)
    # Isotropic directions would have held less: the difference that an unmatched control takes for a finding.
    assert null.mean > 1.15 * found.isotropic


@given(st.integers(0, 10**6), st.integers(1, 5))
def test_isotropic_directions_hold_k_over_p_on_average(seed: int, k: int) -> None:
    seen, count = vector(flat_selection(30), seed), 40
    drawn = [subspace.isotropic(seen.selection, k, generator(seed + i)).project(seen) for i in range(count)]
    null = drawn[0].null()[0]
    mean = sum(float(found.share) for found in drawn) / count
    assert abs(mean - k / 30) < 5 * math.sqrt(null.variance / count)


def test_stacked_projections_keep_each_vector() -> None:
    basis = BASES["path"]()
    parts = [basis.project(vector(WIDE, seed)) for seed in range(3)]
    stacked = type(parts[0]).stack(parts).cpu()
    assert stacked.share.tolist() == [float(part.share) for part in parts]
    assert [null.mean for null in stacked.null()] == pytest.approx([part.null()[0].mean for part in parts])


def test_a_zero_vector_has_no_share() -> None:
    found = BASES["path"]().project(Vector(torch.zeros(WIDE.dim), WIDE))
    assert found.share.isnan() and found.matched.isnan() and math.isnan(found.null()[0].quantile(0.5))
    assert math.isnan(found.null()[0].below(float(found.share)))


def test_flipping_signs_keeps_what_both_vectors_concentrate_on() -> None:
    u, v = normal(500, seed=1), normal(500, seed=2)
    u[:5], v[:5] = 30 * u[:5], 30 * v[:5]
    signs = torch.from_numpy(np.random.Generator(np.random.Philox(key=3)).choice([-1.0, 1.0], (4000, 500)))
    cosines = (signs * u) @ v / (u.norm() * v.norm())
    assert float(flipped_cosine(u, v)) == pytest.approx(float(cosines.square().mean().sqrt()), rel=0.04)
    assert float(flipped_cosine(u, v)) > 5 / math.sqrt(500)
    flat = torch.ones(500, dtype=torch.float64)
    assert float(flipped_cosine(flat, flat)) == pytest.approx(1 / math.sqrt(500))


@pytest.mark.parametrize("centred", [True, False])
def test_directions_without_theta0_are_those_of_the_path_off_that_axis(centred: bool) -> None:
    weights = bent_path(7, WIDE.dim)
    rows, trajectory = record(WIDE, weights)
    found = subspace.principal(trajectory, rows.combine_all, WIDE, 2, centred=centred, without_theta0=True)
    for block in found.blocks:
        path = weights[:, block.span]
        theta0 = path[0] / path[0].norm()
        path = path - path.mean(0) if centred else (path - path[0])[1:]
        wanted = torch.linalg.svd(path - (path @ theta0)[:, None] * theta0, full_matrices=False)[2][:2]
        torch.testing.assert_close(block.rows @ theta0, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-6)
        assert torch.linalg.svdvals(wanted @ block.rows.T).tolist() == pytest.approx([1.0, 1.0], abs=1e-6)
