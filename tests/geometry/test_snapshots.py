"""Writing behind training's back, parts of files, rows that stay on disk, and trajectories out of files alone."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import get_args

import pytest
import torch
from conftest import SMALL, bent_path, flat_selection, normal, one_line_error, record
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from mini_gpt_pl.geometry.path import rows, snapshots
from mini_gpt_pl.geometry.path.rebuild import rebuild
from mini_gpt_pl.geometry.path.rows import IncrementRows, Place, memory_of
from mini_gpt_pl.geometry.path.snapshots import SnapshotFolder
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.geometry.vectors import files
from mini_gpt_pl.geometry.vectors.files import FlatFile
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector

WEIGHTS = bent_path(7, SMALL.dim).float()


@pytest.fixture
def folder(tmp_path: Path) -> SnapshotFolder:
    return SnapshotFolder(tmp_path / "snapshots", SMALL)


class SlowDisk:
    """A disk that writes no snapshot until it is let."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = threading.Semaphore(0)
        write = snapshots.write_flat

        def write_late(*arguments: object) -> None:
            assert self.free.acquire(timeout=30)
            write(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(snapshots, "write_flat", write_late)


def written(folder: SnapshotFolder, weights: Tensor = WEIGHTS, dtype: torch.dtype = torch.float32) -> Trajectory:
    """Record weights into a folder as a run would, and return what it had in memory."""
    basis, found = record(folder.selection, weights, dtype)
    for step, row, left in zip(found.steps, basis.rows, found.survival, strict=True):
        folder.write(step, Vector(row[:], folder.selection), left)
    folder.close()
    return found


# ---- the side thread -------------------------------------------------------------------------------------------------


def test_a_slow_disk_holds_nobody_up_whose_rows_are_in_memory(
    folder: SnapshotFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch)
    for step in range(5):
        folder.write(step, Vector(WEIGHTS[step], SMALL))
    assert folder.backlog == 5 and folder.steps() == [] and folder.waited == 0
    disk.free.release(5)
    folder.close()
    assert folder.backlog == 0 and folder.steps() == list(range(5))


def test_no_more_rows_wait_than_allowed_and_none_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, disk = SnapshotFolder(tmp_path, SMALL, limit=2), SlowDisk(monkeypatch)
    for step in range(2):
        folder.write(step, Vector(WEIGHTS[step], SMALL))
    assert folder.waited == 0
    for step in range(2, 6):
        threading.Timer(0.05, disk.free.release).start()
        folder.write(step, Vector(WEIGHTS[step], SMALL))  # waits for the timer
        assert folder.backlog == 2 and folder.steps() == list(range(step - 1))
    assert folder.waited > 0.05
    disk.free.release(2)
    folder.close()
    for step in range(6):
        assert torch.equal(folder.read(step).values, WEIGHTS[step])


def test_a_full_disk_ends_the_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(snapshots, "write_flat", full)
    folder = SnapshotFolder(tmp_path, SMALL, limit=1)
    folder.write(0, Vector(WEIGHTS[0], SMALL))
    with one_line_error("No space left"):
        folder.write(1, Vector(WEIGHTS[1], SMALL))
    folder.close()


def test_the_trajectory_never_names_a_snapshot_that_is_not_on_disk(
    folder: SnapshotFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, file = SlowDisk(monkeypatch), folder.root / "trajectory.safetensors"
    _, whole = record(SMALL, WEIGHTS)
    for step in (0, 100):
        folder.write(step, Vector(WEIGHTS[0], SMALL))
        folder.write_trajectory(file, whole.until(step))
    assert not file.exists()
    disk.free.release()
    while folder.backlog > 1 or not file.exists():
        pass
    assert Trajectory.load(file).steps == [0] and folder.steps() == [0]
    disk.free.release()
    folder.flush()
    assert Trajectory.load(file).steps == [0, 100]


def test_the_trajectory_on_its_way_to_the_disk_is_the_one_that_was_given(
    folder: SnapshotFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, file = SlowDisk(monkeypatch), folder.root / "trajectory.safetensors"
    _, growing = record(SMALL, WEIGHTS[:3])
    folder.write(0, Vector(WEIGHTS[0], SMALL))
    folder.write_trajectory(file, growing)
    growing.append(900, torch.ones(2, 4))
    disk.free.release()
    folder.close()
    assert Trajectory.load(file).steps == [0, 100, 200]


# ---- files and their parts -------------------------------------------------------------------------------------------


def test_a_file_holds_the_flat_vector_behind_its_header(folder: SnapshotFolder) -> None:
    folder.write(0, Vector(WEIGHTS[0], SMALL))
    folder.close()
    content = folder.file(0).read_bytes()
    assert content.endswith(WEIGHTS[0].numpy().tobytes())
    assert (len(content) - 4 * SMALL.dim) % 8 == 0
    loaded = load_file(folder.file(0))  # the library reads it
    assert torch.equal(torch.cat([loaded[name].flatten() for name in SMALL.names]), WEIGHTS[0])


def in_library_order(folder: SnapshotFolder, step: int, values: Tensor) -> None:
    """Write a snapshot as earlier versions did: the library sorts the tensors by name."""
    parts = {name: part.clone() for name, part in SMALL.unflatten(Vector(values, SMALL)).items()}
    folder.path.mkdir(parents=True, exist_ok=True)
    meta = {"format": "mini_gpt_pl snapshot 1", "fingerprint": SMALL.fingerprint, "step": str(step)}
    save_file(parts, folder.file(step), metadata=meta)


@pytest.mark.parametrize("library", [False, True])
@given(first=st.integers(0, 15), last=st.integers(0, 15))
def test_any_part_of_a_row_can_be_read(
    first: int, last: int, library: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = SnapshotFolder(tmp_path_factory.mktemp("rows"), SMALL)
    if library:
        in_library_order(folder, 0, WEIGHTS[0])
        assert list(FlatFile.open(folder.file(0), "file").begins) != list(SMALL.names)
    else:
        folder.write(0, Vector(WEIGHTS[0], SMALL))
        folder.close()
    last = max(first, last)
    assert torch.equal(folder.stored(0)[first:last], WEIGHTS[0, first:last])
    assert torch.equal(folder.read(0).values, WEIGHTS[0])


def test_neighbours_are_one_read(folder: SnapshotFolder) -> None:
    folder.write(0, Vector(WEIGHTS[0], SMALL))
    folder.close()
    file = FlatFile.open(folder.file(0), "file")
    assert [count for count, _ in file.pieces(SMALL.names)] == [SMALL.dim]
    assert [count for count, _ in file.pieces(SMALL.names[::2])] == [6, 4]


def test_a_row_is_read_from_the_queue_until_it_is_on_disk(
    folder: SnapshotFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, row = SlowDisk(monkeypatch), folder.stored(0)
    with one_line_error("there is no snapshot of step 0"):
        row[0:3]
    folder.write(0, Vector(WEIGHTS[0], SMALL))
    assert not folder.file(0).exists() and torch.equal(row[2:9], WEIGHTS[0, 2:9])
    disk.free.release()
    folder.close()
    assert torch.equal(row[2:9], WEIGHTS[0, 2:9])
    folder.file(0).write_bytes(folder.file(0).read_bytes()[:-8])
    with one_line_error("snapshot of step 0 .* cannot be read"):
        row[0:15]


# ---- rows that stay on disk ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", [1, 4, 100])
def test_rows_on_disk_give_the_same_products_and_directions(
    part: int, dtype: torch.dtype, folder: SnapshotFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "_PART", part)
    in_memory, on_disk = IncrementRows(SMALL, dtype), IncrementRows(SMALL, dtype)
    for step, values in enumerate(WEIGHTS):
        weights = Vector(values, SMALL)
        new = in_memory.increment(weights)
        assert torch.equal(on_disk.increment(weights).values, new.values)
        assert torch.equal(on_disk.dots(new), in_memory.dots(new))
        folder.write(step, new)
        in_memory.push(new)
        on_disk.push(new, folder.stored(step))
    folder.close()
    assert torch.equal(on_disk.dots(new), in_memory.dots(new))
    wanted = [normal(2, 5, seed=3), normal(2, 5, seed=4)]
    for one, other in zip(in_memory.combine_all(wanted), on_disk.combine_all(wanted), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(in_memory.combine(wanted[1]).values, in_memory.combine_all(wanted)[1])


def test_rows_that_no_direction_holds_are_not_read(folder: SnapshotFolder) -> None:
    basis = IncrementRows(SMALL)
    for step, values in enumerate(WEIGHTS[:3]):
        row = basis.increment(Vector(values, SMALL))
        folder.write(step, row)
        basis.push(row, folder.stored(step))
    folder.close()
    folder.file(1).unlink()
    found = basis.combine(torch.tensor([[1.0, 0.0, 2.0]] * 2)).values
    torch.testing.assert_close(found, WEIGHTS[0] + 2 * (WEIGHTS[2] - WEIGHTS[1]))
    with one_line_error("there is no snapshot of step 1"):
        basis.combine(torch.ones(2, 3))


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_the_stated_bytes_are_those_of_rows_and_files(dtype: torch.dtype, size: int, tmp_path: Path) -> None:
    dim, count = 4096, 9
    folder = SnapshotFolder(tmp_path, flat_selection(dim))
    written(folder, bent_path(count, dim).float(), dtype)
    values = (4 + size * (count - 1)) * dim
    stored = sum(path.stat().st_size for path in tmp_path.glob("step_*"))
    assert values < stored < values + 1000 * count
    assert {memory_of(place, count, dim, size).disk for place in get_args(Place)} == {values}
    on_model, on_host = memory_of("model", count, dim, size), memory_of("cpu", count, dim, size)
    assert on_model.device - on_host.device == values + 8 * dim and on_host.host >= values
    more = memory_of("disk", 2 * count, dim, size)
    assert more.device == memory_of("disk", count, dim, size).device  # does not grow with the snapshots
    assert memory_of("model", count, dim, size, writes=False).disk == 0


# ---- trajectories out of files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("part", "tile"), [(1 << 18, 1 << 12), (4, 3), (5, 8), (1, 1)])
def test_files_alone_give_the_trajectory(
    part: int, tile: int, dtype: torch.dtype, folder: SnapshotFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mini_gpt_pl.geometry.path.rebuild._PART", part)
    monkeypatch.setattr("mini_gpt_pl.geometry.path.rebuild._TILE", tile)
    expected, threads = written(folder, dtype=dtype), torch.get_num_threads()
    found = rebuild(folder.path)
    torch.testing.assert_close(found.grams, expected.grams, rtol=1e-12, atol=1e-12)
    for name in ("fingerprint", "groups", "dims", "steps", "survival"):
        assert getattr(found, name) == getattr(expected, name), name
    assert torch.get_num_threads() == threads
    some = rebuild(folder.path, steps=[100, 0])
    torch.testing.assert_close(some.grams, found.grams[:, :2, :2], rtol=1e-12, atol=1e-12)
    assert some.steps == [0, 100] and torch.equal(found.grams, found.grams.mT)


def test_other_groups_and_fewer_weights(folder: SnapshotFolder) -> None:
    expected = written(folder)
    found = rebuild(folder.path, r"(?P<group>[wv])$")
    assert found.groups == ("w", "v") and found.dims == (11, 4) and found.survival == expected.survival
    torch.testing.assert_close(found.gram(), expected.gram(), rtol=1e-12, atol=1e-12)
    basis = torch.stack([folder.read(step).values.double() for step in expected.steps])
    torch.testing.assert_close(found.gram("v"), basis[:, 11:] @ basis[:, 11:].T, rtol=1e-12, atol=1e-12)
    part = rebuild(folder.path, r"(?P<group>b)\.")
    torch.testing.assert_close(part.grams[0], expected.gram("b"), rtol=1e-12, atol=1e-12)
    assert part.fingerprint != expected.fingerprint
    assert rebuild(folder.path, r"^(?P<group>\w)\.").fingerprint == expected.fingerprint


def test_files_of_earlier_versions(folder: SnapshotFolder) -> None:
    expected, basis = record(SMALL, WEIGHTS)[1], record(SMALL, WEIGHTS)[0]
    for step, row in zip(expected.steps, basis.rows, strict=True):
        in_library_order(folder, step, row[:])
    with one_line_error("does not say in which groups"):
        rebuild(folder.path)
    with one_line_error("does not say what weight decay left"):
        rebuild(folder.path, r"^(?P<group>\w)\.")
    found = rebuild(folder.path, r"^(?P<group>\w)\.", expected.survival)
    torch.testing.assert_close(found.grams, expected.grams, rtol=1e-12, atol=1e-12)


def test_snapshots_that_give_no_trajectory(folder: SnapshotFolder, tmp_path: Path) -> None:
    with one_line_error("there are no snapshots in"):
        rebuild(tmp_path)
    written(folder)
    with one_line_error("selects none of the recorded weights, such as a.w"):
        rebuild(folder.path, "layers")
    with one_line_error("there is no snapshot of step 50"):
        rebuild(folder.path, steps=[0, 50])
    other = SnapshotFolder(folder.path, ParameterSelection(SMALL.names, SMALL.shapes, ("a", "a", "b")))
    other.write(900, Vector(WEIGHTS[0], other.selection))
    other.close()
    with one_line_error("snapshots of different models"):
        rebuild(folder.path)
    (tmp_path / "sharded" / "shard_2_of_2").mkdir(parents=True)
    with one_line_error("shard_1_of_2: the snapshots of all ranks"):
        rebuild(tmp_path / "sharded")


def test_shares_of_the_weights_add_up(folder: SnapshotFolder, tmp_path: Path) -> None:
    """The files of two ranks, the second of which has none of `b.w`."""
    expected = written(folder)
    cuts = {"a.w": ((1, 3), (1, 3)), "b.w": ((5,), (0,)), "b.v": ((1, 2), (1, 2))}
    for rank in range(2):
        for step in expected.steps:
            whole = SMALL.unflatten(folder.read(step))
            parts = []
            for name, of_ranks in cuts.items():
                flat, count = whole[name].flatten(), torch.Size(of_ranks[rank]).numel()
                parts.append(flat[:count] if rank == 0 else flat[len(flat) - count :])
            shapes = {name: of_rank[rank] for name, of_rank in cuts.items()}
            target = tmp_path / "sharded" / f"shard_{rank + 1}_of_2" / folder.file(step).name
            files.write_flat(target, shapes, torch.cat(parts), FlatFile.open(folder.file(step), "file").meta)
    found = rebuild(tmp_path / "sharded")
    torch.testing.assert_close(found.grams, expected.grams, rtol=1e-12, atol=1e-12)
    assert found.fingerprint == expected.fingerprint and found.dims == expected.dims
