"""What the probes log, against brute force on the snapshot files and on copied gradients."""

from __future__ import annotations

import math
import shutil
import threading
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import one_line_error
from helpers import (
    DECAY,
    LABELS,
    PEAK,
    SCHEDULE,
    SIZE,
    At,
    Spy,
    cache_dir,
    checkpoints,
    cosine,
    drifts,
    first_direction,
    flat,
    metrics,
    part_losses,
    past_backbone,
    probes,
    quiet_trainer,
    read_path,
    recorder,
    same,
    tiny_gpt,
    tiny_stories,
)
from lightning.pytorch import LightningModule
from safetensors.torch import load_file
from tolerances import assert_close

from mini_gpt_pl.callbacks import GradientAlignment, Schedule, StepRange, TrajectoryRecorder
from mini_gpt_pl.geometry.path import snapshots
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.gpt import TRUNK_PATTERN, GPTSize

UNEVEN = Schedule(every=4, ranges=[StepRange(5, 9, 2)], doubling_until=2)
STEPS = [0, 1, 2, 4, 5, 7, 8, 9, 11]  # the last one although the schedule does not name it


@dataclass
class Recorded:
    """One run with an uneven schedule, gradients at every step and split gradients at every third."""

    folder: Path
    trajectory: Trajectory
    spy: Spy
    rows: dict[int, dict[str, float]]


@cache
def _run(accumulate: int) -> Recorded:
    folder = Path(cache_dir()) / f"recorded-{accumulate}"
    follow, spy = TrajectoryRecorder(TRUNK_PATTERN, UNEVEN), Spy()
    callbacks = [spy, follow, GradientAlignment(Schedule(every=1), Schedule(every=3))]
    trainer = quiet_trainer(folder, callbacks, max_steps=11, accumulate_grad_batches=accumulate)
    trainer.fit(tiny_gpt(), datamodule=tiny_stories())
    assert follow.trajectory is not None
    return Recorded(folder, follow.trajectory, spy, metrics(folder))


# ----------------------------------------------------------------------------------------------------- recorder


@pytest.mark.parametrize("accumulate", [1, 3])
def test_steps_follow_the_schedule(accumulate: int) -> None:
    run = _run(accumulate)
    assert run.trajectory.steps == STEPS
    assert read_path(run.folder, "trunk")[0] == STEPS
    assert same(Trajectory.load(run.folder / "trajectory.safetensors").state_dict(), run.trajectory.state_dict())


def test_the_first_snapshot_is_the_initialisation() -> None:
    first = load_file(_run(1).folder / "snapshots/step_000000000.safetensors")
    state = tiny_gpt().state_dict()
    assert same(first, {name: state[name] for name in first})
    assert len(first) == 8


@pytest.mark.parametrize("group", LABELS)
def test_files_rebuild_the_weights(group: str) -> None:
    run = _run(1)
    steps, basis = read_path(run.folder, group)
    for step, weights in zip(steps, np.cumsum(basis, axis=0), strict=True):
        np.testing.assert_allclose(weights, flat(run.spy.weights[step], group), atol=1e-7)


@pytest.mark.parametrize("group", LABELS)
def test_gram_equals_brute_force(group: str) -> None:
    run = _run(1)
    basis = read_path(run.folder, group)[1]
    gram = run.trajectory.gram(None if group == "trunk" else group).numpy()
    np.testing.assert_allclose(gram, basis @ basis.T, rtol=1e-12, atol=1e-13)


def test_survival_is_what_decay_alone_would_leave() -> None:
    left = [math.prod(1 - PEAK * SCHEDULE(t) * DECAY for t in range(1, step + 1)) for step in STEPS]
    assert _run(1).trajectory.survival == pytest.approx(left, rel=1e-12)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("group", LABELS)
def test_live_metrics_know_the_past_only(group: str, accumulate: int) -> None:
    """Singular value decompositions of the snapshots up to each step; the update against those before it."""
    run = _run(accumulate)
    for n, step in enumerate(STEPS[1:], 2):
        basis = read_path(run.folder, group, until=step)[1]
        assert len(basis) == n
        rows = drifts(basis)
        last, v = rows[-1], first_direction(rows)
        squares = np.linalg.svd(rows, compute_uv=False) ** 2
        unit = np.linalg.svd(rows / np.linalg.norm(rows, axis=1, keepdims=True), compute_uv=False) ** 2
        a = last @ v
        expected = {
            "pc1": squares[0] / squares.sum(),
            "pc1_unit": unit[0] / unit.sum(),
            "k95": float(np.searchsorted(np.cumsum(squares) / squares.sum(), 0.95) + 1),
            "drift": np.linalg.norm(last),
            "coordinate": a,
            "residual": np.linalg.norm(last - a * v),
            "fraction": a**2 / (last @ last),
            "cos_theta0": cosine(v, basis[0]),
        }
        found = {name: run.rows[step][f"backbone/{group}/{name}"] for name in expected}
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6), step
        update = f"alignment/{group}/update"
        if n == 2:
            assert update not in run.rows[step]
        else:
            assert run.rows[step][update] == pytest.approx(cosine(basis[-1], first_direction(rows[:-1])), abs=1e-8)
    assert not any(k.startswith(f"backbone/{group}/") for s, row in run.rows.items() if s not in STEPS for k in row)


def test_rows_are_the_same_wherever_they_are_kept(tmp_path: Path) -> None:
    found = []
    for place in ("model", "cpu", "disk"):
        folder = tmp_path / place
        follow = recorder(keep_on=place)
        callbacks = [follow, GradientAlignment(Schedule(every=1))]
        quiet_trainer(folder, callbacks, max_steps=6).fit(tiny_gpt(), datamodule=tiny_stories())
        assert follow.trajectory is not None
        found.append((follow.trajectory.state_dict(), (folder / "metrics.csv").read_bytes()))
    assert same(found[0], found[1]) and same(found[0], found[2])


def test_a_slow_disk_is_waited_for_only_where_rows_stay_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    write = snapshots.write_flat

    def write_slowly(*arguments: Any) -> None:
        time.sleep(0.2)
        write(*arguments)

    monkeypatch.setattr(snapshots, "write_flat", write_slowly)
    grams = []
    for place in ("model", "disk"):
        follow = recorder(1, keep_on=place, max_pending=1)
        quiet_trainer(tmp_path / place, [follow], max_steps=4).fit(tiny_gpt(), datamodule=tiny_stories())
        assert follow.trajectory is not None and read_path(tmp_path / place, "trunk")[0] == [0, 1, 2, 3, 4]
        grams.append(follow.trajectory.grams)
        told = [str(warning.message) for warning in recwarn if "for the disk of" in str(warning.message)]
        assert bool(told) == (place == "disk")
    assert torch.equal(*grams)
    assert "raise max_pending or take fewer snapshots" in told[-1] and "\n" not in told[-1]


def test_a_checkpoint_names_snapshots_that_are_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, free = snapshots.write_flat, threading.Event()
    found: list[tuple[list[int], list[int]]] = []

    def write_when_let(*arguments: Any) -> None:
        assert free.wait(30)
        write(*arguments)

    def look(module: LightningModule) -> None:
        assert not (tmp_path / "snapshots").exists()
        threading.Timer(0.3, free.set).start()
        state = follow.state_dict()  # what a checkpoint takes
        found.append((state["trajectory"]["steps"], read_path(tmp_path, "trunk")[0]))

    monkeypatch.setattr(snapshots, "write_flat", write_when_let)
    follow = recorder(1)
    quiet_trainer(tmp_path, [follow, At(2, look)], max_steps=3).fit(tiny_gpt(), datamodule=tiny_stories())
    assert found == [([0, 1, 2], [0, 1, 2])]


def test_everything_is_on_disk_after_an_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = snapshots.write_flat

    def write_slowly(*arguments: Any) -> None:
        time.sleep(0.1)
        write(*arguments)

    def fail(module: LightningModule) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(snapshots, "write_flat", write_slowly)
    with pytest.raises(RuntimeError, match="planted"):
        quiet_trainer(tmp_path, [recorder(1), At(3, fail)], max_steps=9).fit(tiny_gpt(), datamodule=tiny_stories())
    assert Trajectory.load(tmp_path / "trajectory.safetensors").steps == [0, 1, 2, 3] == read_path(tmp_path, "trunk")[0]


def test_a_run_gives_its_trajectory_from_its_snapshots(tmp_path: Path) -> None:
    run = _run(1)
    found = Run(run.folder).rebuild_trajectory()
    assert found.survival == run.trajectory.survival and found.fingerprint == run.trajectory.fingerprint
    torch.testing.assert_close(found.grams, run.trajectory.grams, rtol=1e-12, atol=1e-12)
    shutil.copytree(run.folder / "snapshots", tmp_path / "snapshots")  # and the file is lost
    assert same(Run(tmp_path).rebuild_trajectory().state_dict(), found.state_dict())
    cut = Run(run.folder).rebuild_trajectory(r"(?P<group>attn|mlp)\.")
    assert cut.groups == ("attn", "mlp") and cut.steps == STEPS
    torch.testing.assert_close(cut.gram(), found.gram(), rtol=1e-12, atol=1e-12)


def test_rows_that_are_to_stay_in_files_that_nobody_writes() -> None:
    with one_line_error("keep_on disk keeps the rows in their files"):
        recorder(keep_on="disk", write_snapshots=False)
    with one_line_error("max_pending >= 1"):
        recorder(keep_on="disk", max_pending=0)


def test_the_estimate_says_where_the_bytes_go() -> None:
    dim, snapshots_taken = 1 << 18, 6
    found = {place: recorder(2, keep_on=place).estimate(10, dim) for place in ("model", "cpu", "disk")}
    rows = 4 * dim * snapshots_taken
    assert {estimate.disk for estimate in found.values()} == {rows}
    assert found["model"].bytes >= rows > found["model"].host
    assert found["cpu"].host >= rows and found["cpu"].bytes == 12 * dim
    assert "6 MiB on disk" in found["disk"].memory and "3 MiB with the model" in found["cpu"].memory


def test_bfloat16_rows_lose_little_and_never_drift_away(tmp_path: Path) -> None:
    """An increment keeps 8 bits, and its rounding is fed back: the path stays near the weights at every snapshot."""
    spy, follow = Spy(), recorder(1, dtype="bfloat16")
    quiet_trainer(tmp_path, [spy, follow], max_steps=10).fit(tiny_gpt(), datamodule=tiny_stories())
    files = sorted((tmp_path / "snapshots").glob("*.safetensors"))
    kinds = [{value.dtype for value in load_file(file).values()} for file in files]
    assert kinds == [{torch.float32}] + [{torch.bfloat16}] * 10
    basis = read_path(tmp_path, "trunk")[1]
    assert follow.trajectory is not None
    np.testing.assert_allclose(follow.trajectory.gram().numpy(), basis @ basis.T, rtol=1e-10, atol=1e-12)
    for step, weights in enumerate(np.cumsum(basis, axis=0)):
        off = np.abs(weights - flat(spy.weights[step], "trunk"))
        assert off.max() <= 2.0**-8 * max(np.abs(basis[1:]).max(), 1e-30)
    assert off.max() > 0


@pytest.mark.parametrize("place", ["model", "cpu", "disk"])
def test_resuming_bfloat16_rows_continues_them_exactly(place: str, tmp_path: Path) -> None:
    grams = []
    for stops in ((8,), (5, 8)):
        folder = tmp_path / str(len(stops))
        for steps in stops:
            follow = recorder(1, dtype="bfloat16", keep_on=place)
            align = GradientAlignment(Schedule(every=1))
            trainer = quiet_trainer(folder, [follow, align, checkpoints(folder)], max_steps=steps)
            resume = folder / "checkpoints/000005.ckpt" if steps != stops[0] else None
            trainer.fit(tiny_gpt(), datamodule=tiny_stories(), ckpt_path=resume)
        assert follow.trajectory is not None
        grams.append(follow.trajectory.state_dict())
    assert same(*grams)


def test_no_snapshot_files_if_none_are_wanted(tmp_path: Path) -> None:
    follow = recorder(write_snapshots=False, dirpath=str(tmp_path / "elsewhere"))
    quiet_trainer(tmp_path, [follow], max_steps=4).fit(tiny_gpt(), datamodule=tiny_stories())
    assert {file.name for file in (tmp_path / "elsewhere").iterdir()} == {"run.json", "trajectory.safetensors"}
    assert Trajectory.load(tmp_path / "elsewhere/trajectory.safetensors").steps == [0, 2, 4]


def test_weights_that_are_not_finite_are_no_snapshot(tmp_path: Path) -> None:
    """One bad value, for one step only: the trajectory goes on from the last good one."""
    kept: list[torch.Tensor] = []

    def spoil(module: LightningModule) -> None:
        weight = module.gpt.blocks[1].mlp.w_up.weight  # type: ignore[union-attr,index]
        kept.append(weight.detach().clone())
        weight.data[0, 0] = float("inf")

    def mend(module: LightningModule) -> None:
        module.load_state_dict(before)

    before = tiny_gpt(seed=4).state_dict()
    follow = recorder(1)
    callbacks = [follow, At(2, spoil), At(4, mend)]
    module = tiny_gpt(optimizer=lambda p: torch.optim.SGD(p, lr=1e-3))
    quiet_trainer(tmp_path, callbacks, max_steps=6).fit(module, datamodule=tiny_stories())
    assert follow.trajectory is not None
    assert follow.trajectory.steps == [0, 1, 2, 5, 6] == read_path(tmp_path, "trunk")[0]
    assert bool(torch.isfinite(follow.trajectory.grams).all())
    assert "backbone/trunk/pc1" not in metrics(tmp_path)[3]


def test_initial_weights_that_are_not_finite_end_in_no_trajectory(tmp_path: Path) -> None:
    module, follow = tiny_gpt(), recorder()
    module.gpt.blocks[0].mlp.w_up.weight.data.fill_(float("nan"))  # type: ignore[union-attr,operator]
    quiet_trainer(tmp_path, [follow], max_steps=3).fit(module, datamodule=tiny_stories())
    assert follow.trajectory is not None and follow.trajectory.steps == []


def test_a_second_fit_starts_a_new_trajectory(tmp_path: Path) -> None:
    """Also after a checkpoint has been validated, which loads the callbacks' states."""
    follow, align = recorder(), GradientAlignment(Schedule(every=1))
    survivals = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        trainer = quiet_trainer(folder, [follow, align, checkpoints(folder)], max_steps=4, limit_val_batches=1)
        trainer.fit(tiny_gpt(), datamodule=tiny_stories())
        assert follow.trajectory is not None and follow.trajectory.steps == [0, 2, 4]
        survivals.append((follow.trajectory.survival, align.state_dict()))
        trainer.validate(tiny_gpt(), tiny_stories(), ckpt_path=folder / "checkpoints/000002.ckpt", verbose=False)
    assert survivals[0] == survivals[1]


# ------------------------------------------------------------------------------------------------ recorder: errors


def test_a_pattern_that_selects_nothing(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, [TrajectoryRecorder("layers")], max_steps=1)
    with one_line_error("selects no parameter of ProbedGPT; its names look like: gpt.tok_emb.weight"):
        trainer.fit(tiny_gpt(), datamodule=tiny_stories())


def _stopped(folder: Path) -> Path:
    callbacks = [*probes(), checkpoints(folder)]
    quiet_trainer(folder, callbacks, max_steps=4).fit(tiny_gpt(), datamodule=tiny_stories())
    return folder / "checkpoints/000004.ckpt"


def _resume(folder: Path, checkpoint: Path) -> None:
    trainer = quiet_trainer(folder, probes(), max_steps=6)
    trainer.fit(tiny_gpt(), datamodule=tiny_stories(), ckpt_path=checkpoint)


def test_resuming_without_the_snapshots(tmp_path: Path) -> None:
    checkpoint = _stopped(tmp_path)
    (tmp_path / "snapshots/step_000000002.safetensors").unlink()
    with one_line_error("there is no snapshot of step 2 at .*step_000000002"):
        _resume(tmp_path, checkpoint)
    assert read_path(tmp_path, "trunk")[0] == [0, 4]  # nothing else was deleted


def test_resuming_with_a_corrupt_snapshot(tmp_path: Path) -> None:
    checkpoint = _stopped(tmp_path)
    file = tmp_path / "snapshots/step_000000002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with one_line_error("snapshot of step 2 .* cannot be read"):
        _resume(tmp_path, checkpoint)


def test_resuming_with_the_snapshots_of_another_model(tmp_path: Path) -> None:
    checkpoint = _stopped(tmp_path / "here")
    size = GPTSize(n_layer=1, n_head=2, d_model=32, d_ff=64)
    trainer = quiet_trainer(tmp_path / "there", [recorder()], max_steps=2)
    trainer.fit(tiny_gpt(size=size), datamodule=tiny_stories())
    other = tmp_path / "there/snapshots/step_000000002.safetensors"
    other.replace(tmp_path / "here/snapshots" / other.name)
    with one_line_error("belongs to another model or weight pattern"):
        _resume(tmp_path / "here", checkpoint)


def test_resuming_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    checkpoint = _stopped(tmp_path)
    trainer = quiet_trainer(tmp_path, probes(), max_steps=6)
    with one_line_error("d_ff 64, the configured one 96"):
        module = tiny_gpt(size=GPTSize(n_layer=2, n_head=2, d_model=SIZE.d_model, d_ff=96))
        trainer.fit(module, datamodule=tiny_stories(), ckpt_path=checkpoint)


# ------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("group", LABELS)
def test_the_combined_gradient_is_the_accumulated_unclipped_one(group: str, accumulate: int) -> None:
    run = _run(accumulate)
    total = 0.0
    for step, row in run.rows.items():
        v = past_backbone(run.folder, group, step)
        if v is None:
            assert not any(key.startswith(f"alignment/{group}/") for key in row)
            continue
        g = flat(run.spy.gradients[step], group)
        total += float(g @ v)
        expected = {
            "gradient": cosine(g, v),
            "gradient_z": abs(cosine(g, v)) / math.sqrt(2 / (math.pi * len(g))),
            "bias": float(g @ v),
            "bias_sum": total,
        }
        named = {f"alignment/{group}/{name}": value for name, value in expected.items()}
        assert_close({name: row[name] for name in named}, named, {group: len(g)}, rel=1e-4, where=step)
    assert sorted(run.rows) == list(range(1, 12))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("group", LABELS)
def test_split_gradients_are_those_of_the_first_micro_batch(group: str, accumulate: int) -> None:
    run = _run(accumulate)
    measured = 0
    for step, row in run.rows.items():
        if step % 3:
            assert f"alignment/{group}/lm" not in row
            continue
        gpt, batch = run.spy.before[step], run.spy.batches[step][0]
        names, weights = zip(*[(f"gpt.{name}", p) for name, p in gpt.named_parameters()], strict=True)
        vectors = {}
        for part, loss in zip(("lm", "probe"), part_losses(gpt, [batch]), strict=True):
            if loss.requires_grad:
                grads = torch.autograd.grad(loss, weights, retain_graph=True)
                vectors[part] = flat(dict(zip(names, grads, strict=True)), group)
        v = past_backbone(run.folder, group, step)
        assert v is not None
        expected = {part: cosine(g, v) for part, g in vectors.items()}
        expected |= {f"{part}_z": abs(c) / math.sqrt(2 / (math.pi * len(v))) for part, c in expected.items()}
        if len(vectors) == 2:
            measured += 1
            expected["lm_vs_probe"] = cosine(vectors["lm"], vectors["probe"])
        logged = [f"alignment/{group}/{name}" for name in ("lm", "probe", "lm_z", "probe_z", "lm_vs_probe")]
        named = {f"alignment/{group}/{name}": value for name, value in expected.items()}
        found = {name: row[name] for name in logged if name in row}
        assert_close(found, named, {group: len(v)}, rel=1e-3, cosine=1e-5, absolute=1e-5, where=step)
    assert measured


def test_a_batch_without_the_probe_has_no_probe_gradient(tmp_path: Path) -> None:
    callbacks = [recorder(1), GradientAlignment(Schedule(every=1), Schedule(every=1))]
    quiet_trainer(tmp_path, callbacks, max_steps=3).fit(tiny_gpt(), datamodule=tiny_stories(p_probe=0.0))
    names = set(metrics(tmp_path)[3])
    assert "alignment/trunk/lm" in names
    assert not any("probe" in name for name in names if name.startswith("alignment/"))


def test_numbers_wait_for_the_trainer_to_log_and_keep_their_steps(tmp_path: Path) -> None:
    """With a row every third step, every number of `_run` is there, under its own step, the last ones included."""
    follow = TrajectoryRecorder(TRUNK_PATTERN, UNEVEN)
    callbacks = [follow, GradientAlignment(Schedule(every=1), Schedule(every=3))]
    trainer = quiet_trainer(tmp_path, callbacks, max_steps=11, log_every_n_steps=3)
    trainer.fit(tiny_gpt(), datamodule=tiny_stories())
    here = metrics(tmp_path)
    for step, row in _run(1).rows.items():
        expected = {name: value for name, value in row.items() if not name.startswith("train/")}
        assert {name: value for name, value in here[step].items() if not name.startswith("train/")} == expected
        assert ("train/loss" in here[step]) == (step % 3 == 0 or step == 1)


def test_numbers_that_wait_survive_an_exception(tmp_path: Path) -> None:
    def fail(module: LightningModule) -> None:
        raise RuntimeError("planted")

    callbacks = [recorder(1), GradientAlignment(Schedule(every=1)), At(4, fail)]
    trainer = quiet_trainer(tmp_path, callbacks, max_steps=9, log_every_n_steps=100)
    with pytest.raises(RuntimeError, match="planted"):
        trainer.fit(tiny_gpt(), datamodule=tiny_stories())
    assert [step for step, row in metrics(tmp_path).items() if "alignment/trunk/gradient" in row] == [2, 3, 4]
    assert read_path(tmp_path, "trunk")[0] == [0, 1, 2, 3, 4]


def test_gradient_alignment_without_a_recorder(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, [GradientAlignment()], max_steps=1)
    with one_line_error("GradientAlignment needs a TrajectoryRecorder"):
        trainer.fit(tiny_gpt(), datamodule=tiny_stories())
