"""Sketches: what they promise on average, how far off they are, and a run that keeps nothing else."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import SMALL, bent_path, flat_selection, normal, one_line_error, record
from helpers import checkpoints, metrics, quiet_trainer, recorder, same, tiny_gpt, tiny_stories
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from scripts import run_in_full
from test_sharded import PATTERN, RANKS, Weights
from tolerances import assert_close, dims_of
from torch import Tensor

from mini_gpt_pl.callbacks import FisherProbe, GradientAlignment, Schedule
from mini_gpt_pl.geometry.path import nulls, pca
from mini_gpt_pl.geometry.path.sketch import (
    Sketch,
    SketchedRows,
    cosine_error,
    share_error,
)
from mini_gpt_pl.geometry.path.snapshots import SnapshotFolder
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.geometry.vectors.selection import FingerprintError, ParameterSelection, Vector

RUN = Path(__file__).parents[2] / "docs/replication/runs/seeds/seed42/trajectory.safetensors"


def dense(sketch: Sketch) -> Tensor:
    """The map as a matrix, (values, D), one column a unit vector."""
    selection = sketch.weights
    columns = torch.eye(selection.local_dim)
    return torch.stack([sketch(Vector(column, selection)).values for column in columns], 1)


def standard_error(gram: Tensor, width: int) -> Tensor:
    """The bound of the standard deviation of sketched inner products that the module states."""
    squares = gram.diagonal(dim1=-2, dim2=-1)
    return ((squares[..., :, None] * squares[..., None, :] + gram.square()) / width).sqrt()


def participation_bias(participation: float, width: int) -> float:
    """Expected participation ratio of sketched rows: the squares of estimated inner products hold their variance."""
    return 1.0 / (1.0 / participation + (1.0 + 1.0 / participation) / width)


def products(a: Tensor, b: Tensor, width: int, seeds: int) -> Tensor:
    """<Sa, Sb> under many maps."""
    selection = flat_selection(len(a))
    found = []
    for seed in range(seeds):
        sketch = Sketch(selection, width, seed)
        found.append(sketch(Vector(a, selection)).dots(sketch(Vector(b, selection))).sum())
    return torch.stack(found)


# ---- the map ---------------------------------------------------------------------------------------------------------


@given(dim=st.integers(1, 400), width=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_every_value_goes_to_one_place_and_each_block_to_different_ones(dim: int, width: int, seed: int) -> None:
    matrix = dense(Sketch(flat_selection(dim), width, seed))
    assert ((matrix != 0).sum(0) == 1).all() and (matrix.abs().sum(0) == 1).all()
    places = matrix.abs().argmax(0)
    for block in places.split(width):
        assert (block == (block[0] + torch.arange(len(block))) % width).all()  # one rotation


def test_signs_and_rotations_are_even_and_of_their_own() -> None:
    width, dim = 64, 6400
    matrix = dense(Sketch(flat_selection(dim), width))
    signs, turns = matrix.sum(0), matrix.abs().argmax(0)[::width]
    assert abs(float(signs.mean())) < 4 / math.sqrt(dim)
    by_block = signs.view(-1, width)
    assert float((by_block @ by_block.T).fill_diagonal_(0).abs().max()) < 5 * math.sqrt(width)
    assert len(turns.unique()) > 40 and abs(float(turns.double().mean()) - 31.5) < 4 * 18.5 / 10  # of 100 turns
    other = dense(Sketch(flat_selection(dim), width, seed=1))
    assert abs(float((other.sum(0) * signs).mean())) < 4 / math.sqrt(dim)


def test_groups_have_maps_of_their_own() -> None:
    selection = ParameterSelection(("a", "b"), ((320,), (320,)), ("a", "b"))
    matrix = dense(Sketch(selection, 8))
    assert not matrix[:8, 320:].any() and not matrix[8:, :320].any()
    assert not torch.equal(matrix[:8, :320], matrix[8:, 320:])


@given(seed=st.integers(0, 10**6), width=st.integers(1, 30), scale=st.floats(-3, 3))
def test_the_map_is_linear_and_in_float64(seed: int, width: int, scale: float) -> None:
    sketch = Sketch(SMALL, width, seed)
    a, b = (Vector(normal(SMALL.dim, seed=seed + k).float(), SMALL) for k in (1, 2))
    mixed = Vector((a.values.double() + scale * b.values.double()).float(), SMALL)
    expected = sketch(a).values + scale * sketch(b).values
    torch.testing.assert_close(sketch(mixed).values, expected, rtol=1e-5, atol=1e-5)
    assert sketch(a).values.dtype == torch.float64
    exact = dense(sketch) @ a.values.double()
    torch.testing.assert_close(sketch(a).values, exact, rtol=1e-12, atol=1e-12)


def test_chunks_do_not_change_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    selection = flat_selection(5000)
    vector = Vector(normal(5000).float(), selection)
    found = []
    for values in (1, 300, 1 << 20):
        monkeypatch.setattr("mini_gpt_pl.geometry.path.sketch._CPU_VALUES", values)
        found.append(Sketch(selection, 7, seed=3)(vector).values)
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[2], found[0], rtol=1e-12, atol=1e-12)


def test_bfloat16_values_are_taken_as_they_are() -> None:
    sketch, values = Sketch(SMALL, 4), normal(SMALL.dim).bfloat16()
    assert torch.equal(sketch(Vector(values, SMALL)).values, sketch(Vector(values.float(), SMALL)).values)


def test_a_sketch_is_no_weight_vector_and_no_other_sketch() -> None:
    vector = Vector(normal(SMALL.dim).float(), SMALL)
    one, other, wider = Sketch(SMALL, 8), Sketch(SMALL, 8, seed=1), Sketch(SMALL, 9)
    for wrong in (vector, other(vector), wider(vector)):
        with one_line_error("different parameter selections", FingerprintError):
            one(vector).dots(wrong)
    with one_line_error("different parameter selections", FingerprintError):
        one(Vector(normal(15).float(), flat_selection(15)))
    assert one.selection.groups == SMALL.groups and one.selection.dims == (8, 8)
    with one_line_error("give sketch 1 or more"):
        Sketch(SMALL, 0)


# ---- its error -------------------------------------------------------------------------------------------------------


def exact_variance(a: Tensor, b: Tensor, width: int) -> float:
    """1/m sum over pairs of different blocks, by brute force."""
    blocks = [(x.double(), y.double()) for x, y in zip(a.split(width), b.split(width), strict=True)]
    total = 0.0
    for (x, _), (_, w) in itertools.permutations(blocks, 2):
        total += float(x @ x) * float(w @ w)
    for (x, y), (z, w) in itertools.permutations(blocks, 2):
        total += float(x @ y) * float(z @ w)
    return total / width


@pytest.mark.parametrize("kind", ["alike", "apart", "one_value", "one_block", "columns"])
def test_mean_and_variance_are_those_of_the_formula(kind: str) -> None:
    """For dense vectors and for the worst ones: all energy in two values, or always at one place of a block."""
    width, dim, seeds = 8, 80, 2000
    a, b = normal(dim).float(), normal(dim, seed=1).float()
    if kind == "alike":
        b = a + 0.3 * b
    if kind == "one_value":
        a, b = torch.zeros(dim), torch.zeros(dim)
        a[3], b[3], b[50], a[50] = 2.0, 1.0, 3.0, -1.0
    if kind == "one_block":
        a[width:], b[width:] = 0.0, 0.0
    if kind == "columns":
        mask = torch.arange(dim) % width == 2
        a, b = a * mask, b * mask
    found = products(a, b, width, seeds)
    inner, variance = float(a.double() @ b.double()), exact_variance(a, b, width)
    if kind == "one_block":
        assert variance == 0.0
        torch.testing.assert_close(found, torch.full_like(found, inner), rtol=1e-12, atol=1e-12)
        return
    error = math.sqrt(variance / seeds)
    assert abs(float(found.mean()) - inner) < 4 * error
    kurtosis = float(((found - inner) ** 4).mean()) / variance**2
    assert abs(float((found - inner).square().mean()) / variance - 1) < 5 * math.sqrt((kurtosis - 1) / seeds) + 0.02
    both = torch.stack([a, b]).double()
    assert variance <= float(standard_error(both @ both.T, width)[0, 1]) ** 2


@given(dim=st.integers(1, 60), extra=st.integers(0, 20), seed=st.integers(0, 10**6))
def test_a_sketch_as_wide_as_the_weights_is_exact(dim: int, extra: int, seed: int) -> None:
    selection = flat_selection(dim)
    sketch = Sketch(selection, dim + extra, seed)
    a, b = (Vector(normal(dim, seed=seed + k).float(), selection) for k in (1, 2))
    torch.testing.assert_close(sketch(a).dots(sketch(b)), a.dots(b), rtol=1e-12, atol=1e-12)


def test_parts_add_up_with_the_error_of_a_wider_sketch() -> None:
    """Four groups of m values are as good as one of 4 m: as shares of a group on four ranks are."""
    dim, width, seeds = 512, 16, 400
    parts = ParameterSelection(tuple("abcd"), ((dim // 4,),) * 4, tuple("abcd"))
    a, b = (Vector(normal(dim, seed=k).float(), parts) for k in (1, 2))
    inner = float(a.dots(b).sum())
    errors = []
    for seed in range(seeds):
        sketch = Sketch(parts, width, seed)
        errors.append(float(sketch(a).dots(sketch(b)).sum()) - inner)
    ours = torch.tensor(errors)
    wide = products(a.values, b.values, 4 * width, seeds) - inner
    one = products(a.values, b.values, width, seeds) - inner
    assert abs(float(ours.mean())) < 4 * float(ours.std()) / math.sqrt(seeds)
    assert float(ours.std() / wide.std()) == pytest.approx(1, abs=0.2)
    assert float(one.std() / ours.std()) == pytest.approx(2, abs=0.4)


def real_path(dim: int = 2000) -> tuple[Trajectory, Tensor]:
    """Weights (n, D) whose Gram matrix is that of a recorded 51 M run, in directions drawn at random."""
    trajectory = Trajectory.load(RUN)
    energy, axes = torch.linalg.eigh(trajectory.gram())
    frame = torch.linalg.qr(normal(dim, len(energy))).Q
    basis = axes * energy.clamp_min(0).sqrt() @ frame.T
    return trajectory, basis.cumsum(0)


def test_statistics_of_a_real_path_are_within_the_stated_errors() -> None:
    trajectory, weights = real_path()
    exact = nulls.statistics(trajectory.gram(), trajectory.survival)
    width, selection, found = 256, flat_selection(weights.shape[1]), []
    for seed in range(24):
        rows = SketchedRows(selection, width, directions=1, seed=seed)
        for values in weights:
            rows.push(rows.increment(Vector(values.float(), selection)))
        found.append(nulls.statistics(rows.grams.sum(0), trajectory.survival))
    spread = {name: torch.tensor([f[name] for f in found]) for name in exact}
    ratios = pca.pca(trajectory.gram(), pca.drifts(len(trajectory))[1:]).ratios
    stated = {"pc1": share_error(ratios, width), "cos_theta0": cosine_error(exact["cos_theta0"], width)}
    for name, error in stated.items():
        assert float(spread[name].std()) == pytest.approx(error, rel=0.5), name
        assert abs(float(spread[name].mean()) - exact[name]) < error, name
    biased = participation_bias(exact["participation_updates"], width)
    assert float(spread["participation_updates"].mean()) == pytest.approx(biased, rel=0.03)
    assert biased < 0.92 * exact["participation_updates"]  # it is seen


def test_a_flat_spectrum_is_biased_and_drifts_are_not() -> None:
    """T orthogonal steps in m = 2 T values: their own participation falls to a third short, PC1 of the sums stays."""
    steps, width = 64, 128
    selection, frame = flat_selection(4096), torch.linalg.qr(normal(4096, steps + 1)).Q.T
    rows = SketchedRows(selection, width, directions=1)
    for values in frame.cumsum(0):
        rows.push(rows.increment(Vector(values.float(), selection)))
    found = nulls.statistics(rows.grams.sum(0), [1.0] * (steps + 1))
    exact = nulls.statistics(torch.eye(steps + 1, dtype=torch.float64), [1.0] * (steps + 1))
    expected = participation_bias(float(steps), width)
    assert expected == pytest.approx(steps / (1 + steps / width), rel=0.02)
    assert found["participation_updates"] == pytest.approx(expected, rel=0.05)
    assert found["pc1"] == pytest.approx(exact["pc1"], abs=0.1)


def test_the_error_of_a_cosine() -> None:
    assert cosine_error(0.0, 4096) == 1 / 64 and cosine_error(1.0, 10) == 0.0


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_sketched_increments_are_sketches_of_increments() -> None:
    """Also where they are 1e-4 of the weights: sketches are float64."""
    weights = (normal(1, 3000) + 1e-4 * normal(6, 3000, seed=1).cumsum(0)).float()
    selection = flat_selection(3000)
    rows = SketchedRows(selection, 64)
    for k, values in enumerate(weights):
        new = rows.increment(Vector(values, selection))
        rows.push(new)
        change = values if k == 0 else (values.double() - weights[k - 1].double()).float()
        expected = rows.sketch(Vector(change, selection)).values
        torch.testing.assert_close(new.values, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_wide_sketches_give_the_exact_gram_and_backbone() -> None:
    weights = bent_path(8, SMALL.dim).float()
    exact_rows, trajectory = record(SMALL, weights)
    rows = SketchedRows(SMALL, 16, directions=3)
    for values in weights:
        new = rows.increment(Vector(values, SMALL))
        estimate = rows.dots(new)
        rows.push(new)
        torch.testing.assert_close(rows.grams[:, -1], estimate)
        torch.testing.assert_close(rows.grams, trajectory.grams[:, : len(rows), : len(rows)], rtol=1e-5, atol=1e-5)
    path = pca.drifts(8)[1:]
    own = torch.stack([pca.pca(trajectory.gram(g), path).backbone for g in SMALL.groups])
    cosine = rows.combine(own).dots(exact_rows.combine(own)).sum() / 2
    assert float(cosine) == pytest.approx(1, abs=1e-2) and rows.kept(own) == pytest.approx(1, abs=1e-2)
    start = pca.theta0(8).expand(2, 8)
    torch.testing.assert_close(rows.combine(start).values, weights[0], rtol=1e-5, atol=1e-5)
    assert rows.kept(start) == pytest.approx(1)
    with pytest.raises(ValueError, match="9 coefficients for 8 rows"):
        rows.combine(torch.ones(2, 9))
    assert rows.bytes(8) >= 8 * 8 * 2 * 16 + 4 * 4 * SMALL.dim


# ---- a run -----------------------------------------------------------------------------------------------------------

WIDTH = 512


def train(folder: Path, resume: bool = False, **settings: Any) -> dict[str, Tensor]:
    callbacks = [
        recorder(2, **settings),
        GradientAlignment(Schedule(every=1), Schedule(every=4)),
        FisherProbe(Schedule(every=6), batches=2),
        checkpoints(folder, every=6),
    ]
    module = tiny_gpt()
    trainer = quiet_trainer(folder, callbacks, max_steps=12)
    last = folder / "checkpoints" / "000006.ckpt" if resume else None
    trainer.fit(module, datamodule=tiny_stories(), ckpt_path=last)
    return module.state_dict()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One training with exact rows, with sketches, and with sketches on the host."""
    folder = tmp_path_factory.mktemp("sketched")
    kinds: dict[str, dict[str, Any]] = {
        "exact": {},
        "sketched": {"sketch": WIDTH},
        "host": {"sketch": WIDTH, "keep_on": "cpu"},
    }
    weights = [train(folder / name, **settings) for name, settings in kinds.items()]
    assert all(same(weights[0], other) for other in weights[1:])
    return {name: folder / name for name in kinds}


def test_a_sketched_run_agrees_within_the_stated_error(runs: dict[str, Path]) -> None:
    exact, sketched = (Trajectory.load(runs[name] / "trajectory.safetensors") for name in ("exact", "sketched"))
    assert exact.steps == sketched.steps and exact.fingerprint == sketched.fingerprint
    z = (sketched.grams - exact.grams) / standard_error(exact.grams, WIDTH)
    assert 0.1 < float(z.square().mean().sqrt()) < 1.5 and float(z.abs().max()) < 5
    logged, expected = metrics(runs["sketched"]), metrics(runs["exact"])
    effective = WIDTH * len(exact.groups)
    path = pca.pca(exact.gram(), pca.drifts(len(exact))[1:])
    last = exact.steps[-1]
    assert logged[last]["backbone/trunk/pc1"] == pytest.approx(path.pc1, abs=5 * share_error(path.ratios, effective))
    for name in ("backbone/trunk/cos_theta0", "alignment/trunk/update"):
        assert logged[last][name] == pytest.approx(expected[last][name], abs=5 / math.sqrt(effective))
    assert logged[last].keys() == expected[last].keys() | {"backbone/trunk/kept"}


def test_gradients_meet_the_kept_backbone(runs: dict[str, Path]) -> None:
    """Its error is the little that the direction is off, not that of a sketch."""
    logged, expected = metrics(runs["sketched"]), metrics(runs["exact"])
    kept = {step: row["backbone/trunk/kept"] for step, row in logged.items() if "backbone/trunk/kept" in row}
    assert min(kept.values()) > 0.999
    for step, row in expected.items():
        for name in ("alignment/trunk/gradient", "alignment/blocks.0/gradient", "alignment/trunk/lm"):
            if name in row:
                assert logged[step][name] == pytest.approx(row[name], abs=0.03), (step, name)
    fisher = {name: value for name, value in logged[12].items() if name.endswith("batch_mean/q_backbone")}
    assert fisher and all(value == pytest.approx(expected[12][name], rel=0.1) for name, value in fisher.items())


def test_where_directions_are_kept_changes_nothing(runs: dict[str, Path]) -> None:
    one, other = (Trajectory.load(runs[name] / "trajectory.safetensors") for name in ("sketched", "host"))
    assert same(one.grams, other.grams) and metrics(runs["sketched"]) == metrics(runs["host"])


def test_what_lies_on_disk(runs: dict[str, Path]) -> None:
    """T sketches, theta_0 once, and the directions of each checkpoint; no snapshot."""
    folder = runs["sketched"]
    assert not (folder / "snapshots").exists()
    files = sorted(file.name for file in (folder / "sketches").iterdir())
    assert files == [f"step_{step:09d}.safetensors" for step in range(0, 13, 2)]
    assert all(file.stat().st_size < 3 * WIDTH * 8 for file in (folder / "sketches").iterdir())
    kept = sorted(str(file.relative_to(folder / "directions")) for file in (folder / "directions").glob("*/*"))
    steps = ("000000006", "000000012")
    expected = [f"direction_{k}/step_{step}.safetensors" for k in (1, 2) for step in steps]
    assert kept == [*expected, "theta_0/step_000000000.safetensors"]
    start = load_file(folder / "directions" / "theta_0" / "step_000000000.safetensors")
    assert same(start, load_file(runs["exact"] / "snapshots" / "step_000000000.safetensors"))


def test_a_sketched_run_resumes_bit_for_bit(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(runs["sketched"], folder)
    train(folder, resume=True, sketch=WIDTH)
    whole, resumed = (Trajectory.load(path / "trajectory.safetensors") for path in (runs["sketched"], folder))
    assert same(whole.grams, resumed.grams) and whole.steps == resumed.steps
    ours, theirs = metrics(folder), metrics(runs["sketched"])
    for step in range(7, 13):
        assert_close(ours[step], theirs[step], dims_of(whole), rel=1e-5, absolute=1e-7, where=step)


def test_no_sketch_of_nothing() -> None:
    with one_line_error("a sketch of 0 values holds nothing"):
        recorder(2, sketch=0)


# ---- ranks that share the weights ------------------------------------------------------------------------------------

# Forked from a process that has used nothing yet, as in test_sharded.
FORK = """
import sys
from torch.multiprocessing import start_processes
from test_sharded import RANKS
from test_sketch import work

start_processes(work, (sys.argv[1],), nprocs=RANKS, start_method="fork")
"""
LAYOUT_NAMES = ("fsdp", "hsdp", "two_axes", "some_copied")


def follow(modules: list[Weights], width: int) -> SketchedRows:
    """Sketches of the weights of several modules, in turn."""
    rows = SketchedRows(ParameterSelection.of(modules[0], PATTERN), width)
    for module in modules:
        rows.push(rows.increment(rows.selection.weights(module)))
    return rows


def work(rank: int, folder: str) -> None:
    """One of the ranks: sketches that are exact, and sketches under many maps, of weights that lie in many ways."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    try:
        found = {}
        for layout in LAYOUT_NAMES:
            modules = [Weights(seed).spread(layout) for seed in range(3)]
            rows = follow(modules, 64)
            files = SnapshotFolder(Path(folder) / layout, rows.stored)
            if rows.selection.shards is not None and rows.selection.shards.first_replica:
                first = rows._rows.rows[0]
                assert isinstance(first, torch.Tensor)
                files.write(0, Vector(first, rows.stored))
                files.close()
            backbone = pca.pca(rows.grams.sum(0), pca.drifts(3)[1:]).backbone.expand(2, 3)
            direction = rows.combine(backbone)
            found[layout] = {
                "grams": rows.grams,
                "dims": rows.stored.dims,
                "kept": rows.kept(backbone),
                "norm": direction.dots(direction).sum(),
                "fingerprint": rows.stored.fingerprint,
                "narrow": follow(modules, 2).grams,
            }
        torch.save(found, Path(folder) / f"rank_{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")
def test_shares_on_ranks_add_up(tmp_path: Path) -> None:
    """Grams of the ranks' own sketches are that of the whole; all ranks have the same, and directions are shares."""
    run_in_full(FORK, tmp_path)
    exact = follow([Weights(seed) for seed in range(3)], 64)
    ranks = [torch.load(tmp_path / f"rank_{rank}.pt", weights_only=True) for rank in range(RANKS)]
    for layout in LAYOUT_NAMES:
        for found in (rank[layout] for rank in ranks):
            torch.testing.assert_close(found["grams"], exact.grams, rtol=1e-6, atol=1e-6)
            assert same(found["narrow"], ranks[0][layout]["narrow"])
            assert found["dims"] == (64 * (2 if layout == "hsdp" else RANKS),) * 2
            assert found["fingerprint"] == ranks[0][layout]["fingerprint"] != exact.stored.fingerprint
            assert found["kept"] == pytest.approx(1, abs=1e-6) and float(found["norm"]) == pytest.approx(1, rel=1e-5)
        error = (ranks[0][layout]["narrow"] - exact.grams) / standard_error(exact.grams, 2)
        assert 0 < float(error.abs().max()) < 5
        assert (tmp_path / layout).is_dir()
