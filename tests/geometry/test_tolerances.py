"""The tolerances let rounding pass and nothing else."""

from __future__ import annotations

import math

import pytest
from conftest import SMALL
from tolerances import COSINE, assert_close, dims_of, tolerance

from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.geometry.vectors.alignment import noise_floor

DIMS = {"trunk": 16384, "blocks.1": 8192}
NAMES = ("alignment/trunk/lm", "alignment/trunk/lm_z", "alignment/blocks.1/lm_z", "fisher/trunk/streaming/anisotropy")


def of_cosine(name: str, cosine: float) -> float:
    """The number that a cosine makes."""
    dim = DIMS[name.split("/")[1]]
    if name.endswith("_z"):
        return abs(cosine) / noise_floor(dim)
    return dim * cosine**2 if name.endswith("anisotropy") else cosine


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cosine", [0.0, 1e-3, 0.3])
def test_an_error_of_the_cosine_passes_and_twice_as_much_does_not(name: str, cosine: float) -> None:
    value = of_cosine(name, cosine)
    assert_close({name: of_cosine(name, cosine + 0.99 * COSINE)}, {name: value}, DIMS, rel=0)
    with pytest.raises(AssertionError):
        assert_close({name: of_cosine(name, cosine + 2.01 * COSINE)}, {name: value}, DIMS, rel=0)


def test_other_numbers_are_held_to_the_tolerance_as_it_is() -> None:
    assert tolerance("backbone/trunk/pc1", 0.8, DIMS) == COSINE == tolerance("alignment/trunk/lm_vs_probe", 0.8, DIMS)
    assert_close({"train/loss": 2.0}, {"train/loss": 2.0 + 0.9 * COSINE}, DIMS, rel=0)
    with pytest.raises(AssertionError, match="train/loss"):
        assert_close({"train/loss": 2.0}, {"train/loss": 2.0 + 1.1 * COSINE}, DIMS, rel=0)


def test_names_must_be_the_same_and_labels_known() -> None:
    with pytest.raises(AssertionError, match="step 3"):
        assert_close({"train/loss": 2.0}, {}, DIMS, rel=1.0, where="step 3")
    with pytest.raises(KeyError, match="elsewhere"):
        tolerance("alignment/elsewhere/lm_z", 1.0, DIMS)


def test_labels_are_those_of_the_trajectory() -> None:
    assert dims_of(Trajectory.empty(SMALL), "all") == {"a": 6, "b": 9, "all": 15}
    assert tolerance("alignment/a/lm_z", 1.0, {"a": 6}) == pytest.approx(COSINE * math.sqrt(3 * math.pi))
