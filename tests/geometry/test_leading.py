"""Directions that are followed from snapshot to snapshot, beside the exact ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, bent_path, flat_selection, normal, record
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mini_gpt_pl.geometry.path import pca
from mini_gpt_pl.geometry.path.leading import LeadingDirections, LeadingFiles, leading_mix
from mini_gpt_pl.geometry.vectors.selection import FingerprintError, ParameterSelection, Vector

RUNS = sorted((Path(__file__).parents[2] / "docs/replication/runs").glob("**/trajectory.safetensors"))


def followed(
    weights: Tensor, selection: ParameterSelection = SMALL, count: int = 2
) -> tuple[LeadingDirections, Tensor]:
    """Directions after the last of some weights (n, D), and the exact Gram matrices."""
    leading = LeadingDirections(selection, count)
    rows, trajectory = record(selection, weights[:1])
    leading.grow(trajectory.grams, Vector(weights[0], selection))
    for k, values in enumerate(weights[1:], 1):
        new = rows.increment(Vector(values, selection))
        trajectory.append(100 * k, rows.dots(new))
        rows.push(new)
        leading.grow(trajectory.grams, Vector(values, selection))
    return leading, trajectory.grams


def least_kept(grams: Tensor, count: int) -> tuple[float, float]:
    """Smallest cosine of the first and of the second direction with the kept span, over groups and snapshots."""
    first = second = 1.0
    for gram in grams:
        kept = torch.zeros(count, 1, dtype=torch.float64)
        for n in range(2, len(gram) + 1):
            h, path = gram[:n, :n], pca.drifts(n)[1:]
            found = torch.cat([F.pad(kept, (0, 1)), path[-1:]])
            kept = leading_mix(h, found, path, count) @ found
            exact = pca.pca(h, path).directions
            inside = (kept @ h @ exact[:2].T).square().sum(0).sqrt()
            first = min(first, float(inside[0]))
            second = min(second, float(inside[1])) if n > 4 and len(inside) > 1 else second
    return first, second


@pytest.mark.parametrize("run", RUNS, ids=lambda path: path.parent.name)
def test_the_backbone_of_every_recorded_run_is_kept(run: Path) -> None:
    from mini_gpt_pl.geometry.path.trajectory import Trajectory

    trajectory = Trajectory.load(run)
    grams = torch.cat([trajectory.grams, trajectory.gram()[None]])
    assert least_kept(grams, 1)[0] > 0.999
    first, second = least_kept(grams, 2)
    assert first > 0.9999 and second > 0.96


def test_the_backbone_of_a_long_walk_is_kept() -> None:
    first, second = least_kept(torch.eye(301, dtype=torch.float64)[None], 2)
    assert first > 0.9999 and second > 0.98


@given(seed=st.integers(0, 10**6), count=st.integers(1, 3))
def test_kept_vectors_are_what_their_coefficients_say(seed: int, count: int) -> None:
    """Orthonormal, in float32, and those of a path whose dimensions they cover are exact."""
    weights = bent_path(7, SMALL.dim, seed).float()
    leading, grams = followed(weights, count=count)
    basis = torch.cat([weights[:1], weights.diff(dim=0)]).double()
    for group, (span, gram) in enumerate(zip(SMALL.slices, grams, strict=True)):
        expected = leading.coefficients[group] @ basis[:, span]
        torch.testing.assert_close(leading.values[:, span].double(), expected, rtol=1e-3, atol=1e-4)
        inner = leading.coefficients[group] @ gram @ leading.coefficients[group].T
        torch.testing.assert_close(inner, torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-6)


def test_a_path_in_as_many_dimensions_as_are_kept_loses_nothing() -> None:
    frame = torch.linalg.qr(normal(SMALL.dim, 2)).Q
    weights = (normal(1, SMALL.dim, seed=3) + bent_path(9, 2) @ frame.T).float()
    leading, grams = followed(weights)
    path = pca.drifts(9)[1:]
    for k in (0, 1):
        own = torch.stack([pca.pca(gram, path).directions[k] for gram in grams])
        assert leading.kept(grams, own) == pytest.approx(1, abs=1e-5)
    drift = path[3:4].expand(2, -1)
    torch.testing.assert_close(leading.nearest(grams, drift).values, weights[4] - weights[0], rtol=1e-3, atol=1e-3)


def test_frozen_groups_and_tiny_steps() -> None:
    """A group that does not move has no direction; one whose steps are 1e-6 of the weights has."""
    weights = bent_path(6, SMALL.dim).float()
    weights[:, :6] = weights[0, :6]
    leading, _ = followed(weights)
    assert not leading.values[:, :6].any() and leading.values.isfinite().all()
    still, none = followed(weights[:1].expand(4, -1))
    assert not still.values.any()
    assert not still.nearest(none, pca.drifts(4)[-1].expand(2, -1)).values.any()
    path = pca.drifts(6)[1:]
    selection, small = flat_selection(50), normal(1, 50) + 1e-6 * bent_path(6, 50)
    tiny, gram = followed(small, selection)
    assert tiny.kept(gram, pca.pca(gram[0], path).backbone[None]) > 0.99


def test_files_round_trip(tmp_path: Path) -> None:
    leading, grams = followed(bent_path(5, SMALL.dim).float())
    files = LeadingFiles(tmp_path, SMALL, 2)
    files.save(100, leading)
    files.save(400, leading)
    again = LeadingDirections(SMALL, 2)
    again.coefficients = leading.coefficients.clone()
    LeadingFiles(tmp_path, SMALL, 2).load(400, again, torch.device("cpu"))
    assert again.theta0 is not None and torch.equal(again.values, leading.values)
    wanted = pca.drifts(5)[-1].expand(2, -1)
    assert torch.equal(again.nearest(grams, wanted).values, leading.nearest(grams, wanted).values)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["direction_1", "direction_2", "theta_0"]


def test_refusals() -> None:
    leading, grams = followed(bent_path(3, SMALL.dim).float())
    with pytest.raises(FingerprintError):
        leading.grow(F.pad(grams, (0, 1, 0, 1)), Vector(normal(15), flat_selection(15)))
    with pytest.raises(ValueError, match="no snapshot yet"):
        LeadingDirections(SMALL, 1).nearest(grams, torch.ones(2, 3))


def test_followed_directions_are_those_of_the_whole_path() -> None:
    """On a path of more dimensions than are kept, against an SVD of its rows."""
    weights, selection = normal(25, 400).cumsum(0).float(), flat_selection(400)
    leading, grams = followed(weights, selection)
    exact = torch.linalg.svd(weights[1:] - weights[0], full_matrices=False).Vh[:2]
    cosines = (leading.values @ exact.T).abs()
    assert float(cosines[0, 0]) > 0.9995 and float(cosines[1, 1]) > 0.98
    assert leading.kept(grams, pca.pca(grams[0], pca.drifts(25)[1:]).backbone[None]) > 0.9995
