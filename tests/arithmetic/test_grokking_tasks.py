"""Operations, splits, marker sums, and batches as functions of (seed, step)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from conftest import one_line_error
from hypothesis import given
from hypothesis import strategies as st

from mini_gpt_pl.arithmetic.data import MarkerSums, ModularArithmetic, ResidueData
from mini_gpt_pl.arithmetic.draws import BLOCK, generator
from mini_gpt_pl.arithmetic.markers import MarkerTask
from mini_gpt_pl.arithmetic.operations import OPERATIONS, OperationName, all_pairs, split_pairs
from mini_gpt_pl.callbacks.measuring import DrawsBatches

FORMULAS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "x2_y2": lambda a, b: a * a + b * b,
    "x2_xy_y2": lambda a, b: a * a + a * b + b * b,
    "x3_xy": lambda a, b: a * a * a + a * b,
}
SYMMETRIC = ("add", "mul", "x2_y2", "x2_xy_y2")

# ------------------------------------------------------------------------------------------------- operations


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_pair_has_its_result(name: OperationName) -> None:
    pairs = all_pairs(name, 7)
    operands = range(1 if name == "mul" else 0, 7)
    expected = [(a, b, FORMULAS[name](a, b) % 7) for a in operands for b in operands]
    found = torch.cat([pairs.tokens, pairs.labels[:, None]], 1).tolist()
    assert [tuple(row) for row in found] == expected


@pytest.mark.parametrize(("name", "train", "test"), [("add", 4704, 4705), ("mul", 4608, 4608)])
def test_half_of_the_pairs_are_trained_on(name: OperationName, train: int, test: int) -> None:
    data = ModularArithmetic(name)
    data.setup()
    assert [len(examples.labels) for examples in data.sets.values()] == [train, test]
    together = torch.cat([examples.tokens for examples in data.sets.values()])
    assert len(together.unique(dim=0)) == train + test  # every pair on one side, once


def mirrored(train: torch.Tensor, test: torch.Tensor) -> int:
    """Test pairs whose mirror image is a training pair."""
    known = {tuple(pair) for pair in train.tolist()}
    return sum((b, a) in known for a, b in test.tolist())


@given(seed=st.integers(0, 10**6), fraction=st.floats(0.1, 0.9), modulus=st.integers(5, 11))
def test_mirror_pairs_stay_together_if_asked(seed: int, fraction: float, modulus: int) -> None:
    tokens = all_pairs("add", modulus).tokens
    train, test = split_pairs(tokens, fraction, seed, mirror_together=True)
    assert len(train) in (int(fraction * modulus**2), int(fraction * modulus**2) - 1)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(modulus**2))
    assert mirrored(tokens[train], tokens[test]) == 0


def test_else_half_of_them_are_divided() -> None:
    tokens = all_pairs("add", 59).tokens
    train, test = split_pairs(tokens, 0.5, 1)
    assert mirrored(tokens[train], tokens[test]) == pytest.approx(len(test) / 2, rel=0.1)


def test_a_split_is_a_function_of_its_seed() -> None:
    tokens = all_pairs("add", 11).tokens
    first, again, other = (split_pairs(tokens, 0.5, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    drawn = torch.stack([torch.zeros(121).index_fill(0, split_pairs(tokens, 0.5, s)[0], 1) for s in range(300)])
    assert drawn.mean(0).std() == pytest.approx((0.25 / 300) ** 0.5, rel=0.3)  # every pair as often as any other


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"modulus": 2}, "modulus=2: give 3 or more"),
        ({"train_fraction": 0.0}, "train_fraction=0.0: 0 of 9409 pairs"),
        ({"train_fraction": 1.0}, "train_fraction=1.0"),
        ({"batch_size": 0}, "batch_size=0: give 1 or more, or null"),
    ],
)
def test_mistakes_in_a_split_are_one_line(options: dict[str, float], told: str) -> None:
    with one_line_error(told):
        ModularArithmetic(**options).setup()  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------- batches


def small(**options: object) -> ModularArithmetic:
    data = ModularArithmetic(**{"modulus": 11, "batch_size": 8, "seed": 3, **options})  # type: ignore[arg-type]
    data.setup()
    return data


@pytest.mark.parametrize("make", [small, lambda: MarkerSums(batch_size=4, eval_examples=4)], ids=["pairs", "markers"])
def test_a_batch_is_a_function_of_seed_and_step(make: object) -> None:
    data = make()  # type: ignore[operator]
    assert isinstance(data, ResidueData)
    data.setup()
    steps = [0, 1, BLOCK - 1, BLOCK, 3 * BLOCK + 5]
    stream, again = data.batches(), data.batches()
    forwards = {step: stream.batch(step) for step in steps}
    for step in reversed(steps):
        assert all(map(torch.equal, again.batch(step), forwards[step]))
    for a, b in itertools.combinations(steps, 2):
        assert not torch.equal(forwards[a].tokens, forwards[b].tokens)


@pytest.mark.parametrize("make", [small, lambda: MarkerSums(batch_size=4, eval_examples=4)], ids=["pairs", "markers"])
def test_a_probe_draws_batches_of_its_own_like_those_of_training(make: object) -> None:
    data = make()  # type: ignore[operator]
    assert isinstance(data, ResidueData) and isinstance(data, DrawsBatches)
    data.setup()
    stream = data.batches()
    drawn = [data.draw_batch(np.random.Generator(np.random.Philox(key=key))) for key in (1, 1, 2)]
    assert all(map(torch.equal, drawn[0], drawn[1])) and not torch.equal(drawn[0].tokens, drawn[2].tokens)
    assert drawn[0].tokens.shape == stream.batch(0).tokens.shape
    assert len(data.draw_batch(np.random.Generator(np.random.Philox(key=1)), 3).labels) == 3
    if isinstance(data, ModularArithmetic):
        train = {tuple(pair) for pair in data.sets["train"].tokens.tolist()}
        assert {tuple(pair) for pair in drawn[0].tokens.tolist()} <= train
    assert all(map(torch.equal, data.batches().batch(0), stream.batch(0)))


def test_pairs_are_drawn_uniformly_with_replacement_from_the_training_pairs() -> None:
    data = small()
    train = [tuple(pair) for pair in data.sets["train"].tokens.tolist()]
    counts = dict.fromkeys(train, 0)
    repeated, stream = 0, data.batches()
    for step in range(1500):
        batch = stream.batch(step)
        assert torch.equal(batch.tokens.sum(1) % 11, batch.labels)
        drawn = [tuple(pair) for pair in batch.tokens.tolist()]
        repeated += len(set(drawn)) < len(drawn)
        for pair in drawn:
            counts[pair] += 1  # no other pair
    mean = 8 * 1500 / len(train)
    spread = sum((count - mean) ** 2 / mean for count in counts.values())
    assert spread == pytest.approx(len(train) - 1, abs=4 * (2 * len(train)) ** 0.5)  # chi squared
    assert repeated / 1500 == pytest.approx(1 - np.prod(1 - np.arange(8) / len(train)), abs=0.05)


def test_a_full_batch_is_all_training_pairs() -> None:
    data = small(batch_size=None)
    for step in (0, BLOCK):
        assert all(map(torch.equal, data.batches().batch(step), data.sets["train"]))


def test_a_stream_goes_on_where_its_state_says() -> None:
    data = small()
    whole, stream = data.batches(), data.batches()
    for step in range(5):
        reader = iter(stream)
        next(reader)
        resumed = data.batches()
        resumed.load_state_dict(stream.state_dict())
        assert torch.equal(next(iter(resumed)).tokens, whole.batch(step + 1).tokens)
    with one_line_error("batch_size=8 and this one 16"):
        small(batch_size=16).batches().load_state_dict(stream.state_dict())


# -------------------------------------------------------------------------------------------------- markers


def read(tokens: np.ndarray, task: MarkerTask) -> tuple[list[int], list[int]]:
    """Positions of the markers, in order of their number, and the values behind them."""
    at = [int(i) for i in np.flatnonzero((tokens >= task.first_marker) & (tokens < task.first_marker + 4))]
    return at, [int(tokens[i + 1]) for i in at]


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_the_label_is_the_sum_of_the_marked_values(m: int) -> None:
    task = MarkerTask(vocab_size=128)
    tokens, labels = task.per_number(400, m, generator(1, 0, m))
    for row, label in zip(tokens, labels, strict=True):
        in_use = np.flatnonzero((row >= 100) & (row < 100 + m))
        assert row[in_use].tolist() == list(range(100, 100 + m))
        assert in_use.min() >= 1 and in_use.max() <= 14 and np.diff(in_use).min(initial=2) >= 2
        values = row[in_use + 1]
        assert values.max() < 8 and values.sum() % 8 == label
        noise = np.delete(row, [*in_use, *in_use + 1])
        assert noise.min() >= 8  # no other token looks like a value
    assert set(labels) == set(range(8))


def test_every_layout_is_equally_likely() -> None:
    task, rng = MarkerTask(length=8, markers=(2,)), generator(5, 0, 0)
    layouts = [tuple(task._layout(2, rng)) for _ in range(4000)]
    valid = [pair for pair in itertools.combinations(range(1, 7), 2) if pair[1] - pair[0] >= 2]
    assert set(layouts) == set(valid)
    mean = 4000 / len(valid)
    assert sum((layouts.count(pair) - mean) ** 2 / mean for pair in valid) < 30  # chi squared, 9 degrees


def test_a_batch_shares_one_layout_unless_told_otherwise() -> None:
    task = MarkerTask(vocab_size=512, first_marker=500)
    numbers = set()
    for step in range(30):
        tokens, _ = task.batch(16, step, generator(1, 0, step))
        layouts = {tuple(np.flatnonzero(row >= 500)) for row in tokens[:, :] if (row >= 504).sum() == 0}
        shared = set.intersection(*({*np.flatnonzero(row >= 500)} for row in tokens))
        assert layouts and shared
        numbers.add(len(shared))
    assert numbers >= {1, 2, 3, 4}
    tokens, _ = MarkerTask(vocab_size=512, first_marker=500, per_example=True).batch(64, 0, generator(1, 0, 0))
    assert not set.intersection(*({*np.flatnonzero(row >= 500)} for row in tokens))


def test_a_curriculum_goes_through_the_numbers() -> None:
    task = MarkerTask(schedule="curriculum", steps_each=10)
    found = [int(task.markers_at(step, generator(1, 0, step), 3)[0]) for step in (0, 9, 10, 25, 39, 40, 1000)]
    assert found == [1, 1, 2, 3, 4, 4, 4]
    mixed = [int(MarkerTask().markers_at(step, generator(1, 0, step), 3)[0]) for step in range(200)]
    assert all(mixed.count(m) > 30 for m in (1, 2, 3, 4))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"markers": ()}, r"markers=\[\]"),
        ({"length": 8}, "4 markers need 9 tokens or more"),
        ({"first_marker": 7}, "first_marker=7: give 8 to 252"),
        ({"first_marker": 253}, "first_marker=253"),
        ({"classes": 1}, "classes 1"),
        ({"vocab_size": 12, "first_marker": 8}, "no token is left for noise"),
    ],
)
def test_mistakes_in_a_marker_task_are_one_line(options: dict[str, int], told: str) -> None:
    with one_line_error(told):
        MarkerTask(**options)  # type: ignore[arg-type]
