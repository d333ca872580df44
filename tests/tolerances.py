"""How far a logged number may lie from its twin where the two differ by the order of sums alone.

Directions are kept in float32, so that a cosine with one is known to a few of that format's epsilons, on any machine
and whatever the order of the sums. What is derived from a cosine carries its error: a z is the cosine over its floor
sqrt(2 / (pi D)), an anisotropy is D times its square.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest

from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.geometry.vectors.alignment import noise_floor

# Eight epsilons of float32.
COSINE = 1e-6


def dims_of(trajectory: Trajectory, whole: str = "trunk") -> dict[str, int]:
    """Number of weights under each label that metrics carry: the groups, and all of them together."""
    return {**dict(zip(trajectory.groups, trajectory.dims, strict=True)), whole: sum(trajectory.dims)}


def tolerance(
    name: str, value: float, dims: Mapping[str, int], cosine: float = COSINE, absolute: float = COSINE
) -> float:
    """Absolute error that a number has where a cosine has the error `cosine`.

    Args:
        name: Of the metric, `<family>/<label>/...`.
        value: What the number should be.
        dims: Number of weights by label.
        cosine: Error of a cosine.
        absolute: Error of a number that is derived from none.

    Raises:
        KeyError: A z or an anisotropy has a label that is not in `dims`.
    """
    label, quantity = name.split("/")[1], name.rpartition("/")[2]
    if quantity.endswith("_z"):
        return cosine / noise_floor(dims[label])
    if quantity == "anisotropy":
        dim = dims[label]
        return 2 * math.sqrt(dim * abs(value)) * cosine + dim * cosine**2
    return cosine if quantity == "overlap" else absolute


def assert_close(
    found: Mapping[str, float],
    expected: Mapping[str, float],
    dims: Mapping[str, int],
    *,
    rel: float,
    cosine: float = COSINE,
    absolute: float = COSINE,
    where: object = "",
) -> None:
    """Compare logged numbers name by name; the names must be the same.

    Args:
        found: Name -> value.
        expected: Name -> value.
        dims: Number of weights by label.
        rel: Relative error that is allowed beside `tolerance`.
        cosine: Error of a cosine.
        absolute: Error of a number that is derived from none.
        where: Shown where a number differs, for instance the step.
    """
    assert found.keys() == expected.keys(), where
    for name, value in expected.items():
        error = tolerance(name, value, dims, cosine, absolute)
        assert found[name] == pytest.approx(value, rel=rel, abs=error), (where, name)
