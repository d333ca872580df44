"""Grams grown row by row, the precision of increments, and the files that keep them."""

from __future__ import annotations

import inspect
import io
import itertools
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from conftest import SMALL, bent_path, flat_selection, gram_of, normal, one_line_error, record
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from mini_gpt_pl.geometry.path import pca, snapshots, trajectory
from mini_gpt_pl.geometry.path import rows as rows_module
from mini_gpt_pl.geometry.path.rows import IncrementRows
from mini_gpt_pl.geometry.path.snapshots import SnapshotFolder
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.geometry.vectors import alignment, files, selection, staging
from mini_gpt_pl.geometry.vectors.selection import FingerprintError, ParameterSelection, Vector

WEIGHTS = bent_path(7, SMALL.dim)


def assert_same(one: Trajectory, other: Trajectory) -> None:
    assert torch.equal(one.grams, other.grams) and one.grams.dtype == other.grams.dtype == torch.float64
    for name in ("fingerprint", "groups", "dims", "steps", "survival"):
        assert getattr(one, name) == getattr(other, name), name


# ---- Grams -----------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6), snapshots=st.integers(1, 8))
def test_grams_grow_row_by_row_and_add_up(seed: int, snapshots: int) -> None:
    weights = bent_path(snapshots, SMALL.dim, seed)
    _, found = record(SMALL, weights)
    assert len(found) == snapshots and found.dim == 15
    for name, part in SMALL.items():
        torch.testing.assert_close(found.gram(name), gram_of(weights[:, part]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.gram(), gram_of(weights), rtol=1e-9, atol=1e-9)
    assert [found.dim_of(name) for name in (None, "a", "b")] == [15, 6, 9]


@pytest.mark.parametrize("chunk", [1, 4, 6, 9, 100])
def test_chunks_do_not_reach_into_the_next_group(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mini_gpt_pl.geometry.path.rows._TILE", chunk)
    expected = torch.stack([gram_of(WEIGHTS[:, part]) for part in SMALL.slices])
    torch.testing.assert_close(record(SMALL, WEIGHTS)[1].grams, expected, rtol=1e-10, atol=1e-10)


def test_until_is_what_had_been_recorded_by_then() -> None:
    _, whole = record(SMALL, WEIGHTS)
    for step, count in ((-1, 0), (0, 1), (299, 3), (300, 4), (10**6, 7)):
        part = whole.until(step)
        assert part.steps == whole.steps[:count] and part.grams.shape == (2, count, count)
        assert torch.equal(part.grams, record(SMALL, WEIGHTS[:count])[1].grams)
        assert part.survival == [0.9**k for k in range(count)]
    part.append(10**7, torch.ones(2, 8))
    assert len(whole) == 7 and whole.grams.shape == (2, 7, 7)


@pytest.mark.parametrize(
    ("step", "row", "message"),
    [
        (700, torch.ones(2, 7), "shape"),
        (700, torch.ones(3, 8), "shape"),
        (600, torch.ones(2, 8), "does not come after"),
        (700, torch.full((2, 8), torch.nan), "not finite"),
        (700, torch.full((2, 8), torch.inf), "not finite"),
    ],
)
def test_rows_that_do_not_continue(step: int, row: Tensor, message: str) -> None:
    _, found = record(SMALL, WEIGHTS)
    kept = found.state_dict()
    with pytest.raises(ValueError, match=message):
        found.append(step, row)
    assert_same(found, Trajectory.from_state(kept))


def test_unknown_group() -> None:
    _, found = record(SMALL, WEIGHTS)
    for ask in (found.gram, found.dim_of):
        with one_line_error("no group 'c'; it has a, b"):
            ask("c")


# ---- precision -------------------------------------------------------------------------------------------------------


def test_late_increments_keep_their_digits() -> None:
    """Increments of 1e-4 of the drift: float32 rows hold their squares to 1e-6, a float32 Gram of drifts holds none."""
    dim, late = 4000, 6
    steps = torch.cat([normal(1, dim), 1e-4 * normal(late, dim, seed=1)])
    weights = torch.cat([normal(1, dim, seed=2), normal(1, dim, seed=2) + steps.cumsum(0)]).float()
    exact = weights.double().diff(dim=0).square().sum(1)[1:]
    _, found = record(flat_selection(dim), weights)
    torch.testing.assert_close(found.gram().diagonal()[2:], exact, rtol=1e-6, atol=0)
    drift = weights[1:] - weights[0]
    naive = drift @ drift.T
    squares = naive.diagonal()[1:] + naive.diagonal()[:-1] - 2 * naive.diagonal(1)
    assert (((squares.double() - exact) / exact).abs() > 1e-6).all()
    assert (((squares.double() - exact) / exact).abs() > 0.1).any()


def test_rounding_of_bfloat16_rows_never_adds_up() -> None:
    """Rebuilt weights are within one rounding (2^-8 of it) of the last increment, after a hundred as after one."""
    dim, count = 500, 100
    weights = (normal(1, dim) + 0.01 * normal(count + 1, dim, seed=1).add(1.0).cumsum(0)).float()
    rows, found = record(flat_selection(dim), weights, torch.bfloat16)
    assert rows.rows[0][:].dtype == torch.float32 and {row[:].dtype for row in rows.rows[1:]} == {torch.bfloat16}
    for k in range(1, count + 1):
        rebuilt = rows.combine(torch.ones(1, k + 1)).values
        allowed = 2.0**-8 * rows.rows[k][:].float().abs() + 4 * torch.finfo(torch.float32).eps * weights[k].abs()
        assert ((rebuilt - weights[k]).abs() <= allowed).all(), k
    exact = torch.stack([row[:].double() for row in rows.rows])
    torch.testing.assert_close(found.gram(), exact @ exact.T, rtol=1e-9, atol=1e-9)  # of what is stored


def test_rows_read_back_continue_the_same_way() -> None:
    rows, _ = record(SMALL, WEIGHTS[:4].float(), torch.bfloat16)
    resumed = IncrementRows(SMALL, torch.bfloat16)
    for row in rows.rows:
        resumed.push(Vector(row[:], SMALL))
    new = Vector(WEIGHTS[4].float(), SMALL)
    assert len(resumed) == 4 and torch.equal(resumed.increment(new).values, rows.increment(new).values)
    assert torch.equal(resumed.dots(rows.increment(new)), rows.dots(rows.increment(new)))


def test_the_first_row_is_a_copy() -> None:
    rows, values = IncrementRows(SMALL), normal(SMALL.dim).float()
    first = rows.increment(Vector(values, SMALL))
    rows.push(first)
    values.zero_()
    assert torch.equal(rows.rows[0][:], normal(SMALL.dim).float())


def test_combine_weighs_each_group_apart() -> None:
    rows, _ = record(SMALL, WEIGHTS.float())
    basis, weights = torch.stack([row[:] for row in rows.rows]).double(), normal(2, 5, seed=3)
    expected = torch.cat([weights[g] @ basis[:5, part] for g, part in enumerate(SMALL.slices)])
    torch.testing.assert_close(rows.combine(weights).values.double(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="8 coefficients for 7 rows"):
        rows.combine(torch.ones(2, 8))


def test_rows_of_another_selection_are_refused() -> None:
    rows, _ = record(SMALL, WEIGHTS)
    foreign = Vector(WEIGHTS[0], flat_selection(SMALL.dim))
    for operation in (rows.increment, rows.push, rows.dots):
        with one_line_error("different parameter selections", FingerprintError):
            operation(foreign)


# ---- trajectory files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 7])
def test_trajectory_round_trips(count: int, tmp_path: Path) -> None:
    _, found = record(SMALL, WEIGHTS[:count])
    found.save(tmp_path / "new" / "trajectory.safetensors")
    assert_same(Trajectory.load(tmp_path / "new" / "trajectory.safetensors"), found)
    _, longer = record(SMALL, WEIGHTS)
    longer.until(100 * count - 1).save(tmp_path / "part")  # a view of a larger Gram
    assert_same(Trajectory.load(tmp_path / "part"), found)
    buffer = io.BytesIO()
    torch.save(found.state_dict(), buffer)
    buffer.seek(0)
    assert_same(Trajectory.from_state(torch.load(buffer, weights_only=True)), found)


def test_state_is_no_view() -> None:
    _, found = record(SMALL, WEIGHTS)
    state = found.state_dict()
    restored = Trajectory.from_state(state)
    state["grams"].zero_()
    state["steps"].clear()
    assert_same(restored, record(SMALL, WEIGHTS)[1])
    assert_same(found, restored)


def spoil(path: Path, how: str) -> None:
    """Make a good file bad."""
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "foreign":
        save_file({"x": torch.ones(1)}, path)
    else:
        path.write_bytes({"empty": b"", "text": b"step,loss\n1,2\n" * 9, "cut": content[:-5]}[how])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "there is no trajectory"),
        ("empty", "cannot be read"),
        ("text", "cannot be read"),
        ("cut", "cannot be read"),
        ("foreign", "is no trajectory file"),
    ],
)
def test_bad_trajectory_files(how: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "trajectory.safetensors"
    record(SMALL, WEIGHTS)[1].save(path)
    spoil(path, how)
    with one_line_error(message):
        Trajectory.load(path)


# ---- snapshot folders ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> SnapshotFolder:
    return SnapshotFolder(tmp_path / "snapshots", SMALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_snapshots_round_trip(dtype: torch.dtype, folder: SnapshotFolder) -> None:
    rows, _ = record(SMALL, WEIGHTS.float(), dtype)
    for k, row in enumerate(rows.rows):
        folder.write(100 * k, Vector(row[:], SMALL))
    folder.close()
    assert folder.steps() == list(range(0, 700, 100))
    for k, row in enumerate(rows.rows):
        read = folder.read(100 * k)
        assert read.values.dtype == row[:].dtype and torch.equal(read.values, row[:])
    stored = {name: tuple(part.shape) for name, part in load_file(folder.file(100)).items()}
    assert stored == dict(zip(SMALL.names, SMALL.shapes, strict=True))


def test_a_failed_write_leaves_no_file(folder: SnapshotFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Vector(WEIGHTS[0].float(), SMALL)
    folder.write(0, row)
    folder.flush()

    def full_disk(values: Tensor) -> bytes:
        raise OSError("No space left on device")

    monkeypatch.setattr("mini_gpt_pl.geometry.vectors.files._bytes_of", full_disk)  # behind the header
    for step in (0, 100):  # an old file survives, a new one does not appear
        folder.write(step, row)
        with one_line_error("could not be written to .*No space left"):
            folder.flush()
    folder.flush()  # told once
    assert [file.name for file in folder.path.iterdir()] == ["step_000000000.safetensors"]
    folder.write(200, row)
    with one_line_error("could not be written"):
        folder.close()
    monkeypatch.undo()
    assert torch.equal(folder.read(0).values, row.values)
    folder.write(300, row)  # a closed folder opens again
    folder.close()
    assert folder.steps() == [0, 300]


def test_an_earlier_failure_shows_at_the_next_write(folder: SnapshotFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.path.write_text("a file where the folder should be")
    row = Vector(WEIGHTS[0].float(), SMALL)
    folder.write(0, row)
    folder._pending[0].exception()  # waits
    with one_line_error("could not be written"):
        folder.write(100, row)
    folder.close()


def test_a_mistake_in_the_program_is_not_blamed_on_the_disk(
    folder: SnapshotFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mini_gpt_pl.geometry.vectors.files._bytes_of", lambda _: 1 / 0)
    folder.write(0, Vector(WEIGHTS[0].float(), SMALL))
    with pytest.raises(ZeroDivisionError):
        folder.close()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "there is no snapshot of step 0"),
        ("empty", "cannot be read"),
        ("text", "cannot be read"),
        ("cut", "cannot be read"),
        ("foreign", "another model or weight pattern"),
    ],
)
def test_bad_snapshots(how: str, message: str, folder: SnapshotFolder) -> None:
    folder.write(0, Vector(WEIGHTS[0].float(), SMALL))
    folder.close()
    spoil(folder.file(0), how)
    with one_line_error(message):
        folder.read(0)


def test_snapshots_of_another_model(folder: SnapshotFolder) -> None:
    folder.write(0, Vector(WEIGHTS[0].float(), SMALL))
    folder.close()
    regrouped = ParameterSelection(SMALL.names, SMALL.shapes, ("a", "a", "b"))
    with one_line_error("another model or weight pattern"):
        SnapshotFolder(folder.path, regrouped).read(0)


def test_steps_ignore_foreign_files_and_discard_what_is_late(folder: SnapshotFolder) -> None:
    assert folder.steps() == []
    for step in (300, 0, 100):
        folder.write(step, Vector(WEIGHTS[0].float(), SMALL))
    folder.close()
    foreign = ["step_12.safetensors", "step_000000400.safetensors.bak", "old_step_000000500.safetensors", "notes.txt"]
    for name in [*foreign, ".step_000000600.safetensors.partial"]:
        (folder.path / name).touch()
    assert folder.steps() == [0, 100, 300]
    folder.discard_after(100)
    assert folder.steps() == [0, 100] and all((folder.path / name).exists() for name in foreign)


def test_every_annotation_can_be_evaluated() -> None:
    """An annotation that raises is skipped by the run-time checks without a word."""
    for module in (alignment, files, pca, rows_module, selection, snapshots, staging, trajectory):
        own = [x for x in vars(module).values() if getattr(x, "__module__", "") == module.__name__]
        members = itertools.chain.from_iterable(vars(x).values() for x in own if inspect.isclass(x))
        for found in [*own, *(getattr(m, "fget", getattr(m, "__func__", getattr(m, "func", m))) for m in members)]:
            if inspect.isclass(found) or inspect.isfunction(found):
                get_type_hints(found)
