"""Cosines and their noise floor, against brute force and sampling."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import SMALL, flat_selection, normal, one_line_error

from mini_gpt_pl.geometry.vectors.alignment import Products, cosines, noise_floor
from mini_gpt_pl.geometry.vectors.selection import FingerprintError, ParameterSelection, Vector


def test_noise_floor_is_the_mean_of_sampled_cosines() -> None:
    dim = 200
    sampled = torch.cosine_similarity(normal(20_000, dim), normal(20_000, dim, seed=1)).abs().mean()
    assert noise_floor(dim) == pytest.approx(float(sampled), rel=0.02)
    exact = math.exp(math.lgamma(dim / 2) - math.lgamma((dim + 1) / 2)) / math.sqrt(math.pi)
    assert noise_floor(dim) == pytest.approx(exact, rel=0.5 / dim)


def test_cosines_per_group_then_whole() -> None:
    x, y = normal(2, SMALL.dim).float()
    vector, direction = Vector(x, SMALL), Vector(y, SMALL)
    parts = [*SMALL.slices, slice(None)]
    expected = [float(torch.cosine_similarity(x[p].double(), y[p].double(), dim=0)) for p in parts]
    assert cosines(vector, direction).tolist() == pytest.approx(expected, abs=1e-12)


def test_a_vanishing_part_has_cosine_zero() -> None:
    x, y = normal(2, SMALL.dim).float()
    x[SMALL.slices[0]] = 0
    y[SMALL.slices[1]] = 0
    assert cosines(Vector(x, SMALL), Vector(y, SMALL)).tolist() == [0.0, 0.0, 0.0]
    assert cosines(Vector(0 * x, SMALL), Vector(x, SMALL)).tolist() == [0.0, 0.0, 0.0]


def test_a_broken_gradient_is_no_zero_cosine() -> None:
    x, y = normal(2, SMALL.dim).float()
    x[0] = torch.nan
    assert cosines(Vector(x, SMALL), Vector(y, SMALL)).isnan().tolist() == [True, False, True]


def test_other_coordinates_are_refused() -> None:
    values = normal(SMALL.dim).float()
    with one_line_error("different parameter selections", FingerprintError):
        cosines(Vector(values, SMALL), Vector(values, flat_selection(SMALL.dim)))


def test_products_are_those_of_each_group_and_their_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mini_gpt_pl.geometry.vectors.alignment._CHUNK", 4)
    a, b = normal(SMALL.dim, seed=1), normal(SMALL.dim, seed=2)
    products = Products({"a": Vector(a, SMALL), "b": Vector(b, SMALL), "zero": Vector(0 * a, SMALL)})
    cut = [slice(0, 6), slice(6, 15), slice(0, 15)]
    assert products.dot("a", "b").tolist() == pytest.approx([float(a[c] @ b[c]) for c in cut])
    expected = [float(a[c] @ b[c] / (a[c].norm() * b[c].norm())) for c in cut]
    assert products.cosine("a", "b").tolist() == pytest.approx(expected)
    assert products.cosine("a", "zero").tolist() == [0, 0, 0]


def test_products_across_selections_are_refused() -> None:
    other = ParameterSelection(("w",), ((15,),), ("all",))
    with pytest.raises(FingerprintError):
        Products({"a": Vector(normal(15), SMALL), "b": Vector(normal(15), other)})
