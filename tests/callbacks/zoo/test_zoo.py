"""Optimizers and modules of every kind beside a witness, and the page that says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from combinations import COMBINATIONS, WAYS, Combination, compare, compare_way, page
from zoo import Trainer  # noqa: F401 (marks this file as one that trains)

PAGE = Path(__file__).parents[3] / "docs" / "what-works.md"


@pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda c: f"{c.module}-{c.optimizer}".replace(" ", "_"))
def test_a_combination_is_as_the_witness_has_it(combination: Combination) -> None:
    compare(combination)


@pytest.mark.parametrize("name", WAYS, ids=lambda name: name.replace(" ", "_"))
def test_a_way_to_train_is_as_the_witness_has_it(name: str) -> None:
    compare_way(name)


def test_the_page_says_what_the_combinations_give() -> None:
    assert PAGE.read_text() == page(), "run python -m docs.tools.what_works"


def test_there_are_enough_of_each() -> None:
    optimizers = {c.optimizer.split(",")[0] for c in COMBINATIONS}
    assert len(optimizers) >= 20
    tried = {
        module: len([c for c in COMBINATIONS if c.module == module]) for module in {c.module for c in COMBINATIONS}
    }
    assert all(count >= 3 for module, count in tried.items() if module not in ("GAN", "sparse gradients"))
