"""What W&B gets beside the metrics: the step axis, artifacts, and the link to a parent. Read from offline files."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from conftest import one_line_error
from helpers import (
    checkpoints,
    drifts,
    first_direction,
    probes,
    quiet_trainer,
    read_path,
    recorder,
    tiny_gpt,
    tiny_stories,
)
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from safetensors.torch import load_file
from wandb.proto import wandb_internal_pb2

from mini_gpt_pl.callbacks import WandbSegments
from mini_gpt_pl.callbacks.wandb_run import TYPE, basis_tensors, use_parent
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.runs.logs import MetricsCSV, log_now

AXIS = "trainer/global_step"
_HEADER, _BLOCK = 7, 32768


def records(folder: Path) -> list[Any]:
    """Read the one offline run in a run folder, once W&B's own process has written the end of it."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    for _ in range(300):
        found = list(parse(file.read_bytes()))
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        time.sleep(0.1)
    raise AssertionError(f"{file} has no end")


def parse(raw: bytes) -> Iterator[Any]:
    """Cut a file into its records: LevelDB's log format behind a header of seven bytes."""
    at, part = _HEADER, b""
    while at + 7 <= len(raw):
        if (left := _BLOCK - at % _BLOCK) < 7:
            at += left
            continue
        size, kind = struct.unpack_from("<HB", raw, at + 4)
        if at + 7 + size > len(raw):
            return  # it is still being written
        part += raw[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            part = b""
            yield record


def history(folder: Path) -> list[dict[str, Any]]:
    """Rows that W&B was given, nested names joined."""
    rows = [record.history.item for record in records(folder) if record.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]


def artifacts(folder: Path) -> list[Any]:
    return [record.artifact for record in records(folder) if record.WhichOneof("record_type") == "artifact"]


def geometry_of(folder: Path) -> list[Any]:
    return [artifact for artifact in artifacts(folder) if artifact.type == TYPE]


def config_of(folder: Path) -> dict[str, Any]:
    """The run's configuration as W&B has it at the end."""
    found: dict[str, Any] = {}
    for record in records(folder):
        kind = record.WhichOneof("record_type")
        updates = record.run.config.update if kind == "run" else record.config.update if kind == "config" else []
        for item in updates:
            found[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return found


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "home"))
    yield
    wandb.finish()


class OwnProbe(Callback):
    """A reader's own probe, of a family that nobody has heard of."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        log_now(trainer, {"mine/trunk/x": 1.0}, trainer.global_step)


def train(folder: Path, *callbacks: Callback, steps: int = 4, **settings: Any) -> Trainer:
    """A tiny run with a CSV and an offline W&B run."""
    loggers = [MetricsCSV(folder / "metrics.csv"), WandbLogger(project="test", offline=True, save_dir=str(folder))]
    trainer = quiet_trainer(folder, list(callbacks), max_steps=steps, logger=loggers, **settings)
    try:
        trainer.fit(tiny_gpt(), datamodule=tiny_stories())
    finally:
        wandb.finish()
    return trainer


def test_every_number_comes_with_its_step_even_of_a_readers_own_probe(tmp_path: Path) -> None:
    """One rule for all families: nothing has to know their names."""
    train(tmp_path, WandbSegments(), *probes(), OwnProbe())
    metrics = [record.metric for record in records(tmp_path) if record.WhichOneof("record_type") == "metric"]
    assert [metric.step_metric for metric in metrics if metric.glob_name == "*"] == [AXIS, AXIS]  # logger's, and ours
    best = {metric.name: metric.summary for metric in metrics if metric.name != AXIS and not metric.glob_name}
    assert best["val/loss"].min and best["probe/p_ood"].max
    table, rows = Run(tmp_path).metrics, history(tmp_path)
    for name in ("mine/trunk/x", "backbone/trunk/pc1_excess", "alignment/trunk/gradient_z"):
        sent = {row[AXIS]: row[name] for row in rows if name in row}
        assert sent == table[name].dropna().to_dict(), name
    assert all(AXIS in row for row in rows)


def test_an_open_run_gets_the_axis_too(tmp_path: Path) -> None:
    """In a notebook the logger finds a run open and defines nothing."""
    wandb.init(project="test", dir=str(tmp_path), mode="offline")
    with pytest.warns(UserWarning, match="already in progress"):
        train(tmp_path, WandbSegments(artifact="never"), recorder())
    metrics = [record.metric for record in records(tmp_path) if record.WhichOneof("record_type") == "metric"]
    assert [metric.step_metric for metric in metrics if metric.glob_name == "*"] == [AXIS]


def test_the_gram_matrices_are_an_artifact_of_the_run(tmp_path: Path) -> None:
    train(tmp_path, WandbSegments(), recorder())
    (artifact,) = geometry_of(tmp_path)
    (entry,) = artifact.manifest.contents
    (started,) = (record.run for record in records(tmp_path) if record.WhichOneof("record_type") == "run")
    assert artifact.name == f"geometry-{started.run_id}"
    assert entry.path == "trajectory.safetensors"
    assert entry.size == (tmp_path / "trajectory.safetensors").stat().st_size
    assert Path(entry.local_path).read_bytes() == (tmp_path / "trajectory.safetensors").read_bytes()
    assert Path(entry.local_path).is_relative_to(tmp_path / "wandb")
    assert not [file for file in (tmp_path / "home").rglob("*") if file.is_file()]
    known, path = json.loads(artifact.metadata), Run(tmp_path).trajectory
    assert (known["snapshots"], known["last_step"], known["dim"]) == (len(path), 4, path.dim)
    assert known["groups"] == list(path.groups) and known["fingerprint"] == path.fingerprint
    assert set(artifact.aliases) == {"latest", "step-4"}


def test_the_artifact_at_checkpoints_and_never(tmp_path: Path) -> None:
    train(
        tmp_path / "often", WandbSegments(artifact="checkpoints"), recorder(), checkpoints(tmp_path / "often", every=2)
    )
    found = [json.loads(artifact.metadata)["last_step"] for artifact in geometry_of(tmp_path / "often")]
    assert found == [2, 4, 4]
    (first, *_) = geometry_of(tmp_path / "often")
    early = Trajectory.load(Path(first.manifest.contents[0].local_path))  # not the file that training went on with
    assert early.steps == [0, 2]
    train(tmp_path / "never", WandbSegments(artifact="never"), recorder())
    assert not geometry_of(tmp_path / "never")
    with one_line_error("artifact is 'often': choose from end, checkpoints, never"):
        WandbSegments(artifact="often")  # type: ignore[arg-type]


def test_a_run_that_breaks_off_leaves_what_it_has(tmp_path: Path) -> None:
    class Breaks(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 3:
                raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        train(tmp_path, WandbSegments(), recorder(every=1), Breaks())
    (artifact,) = geometry_of(tmp_path)
    assert json.loads(artifact.metadata)["last_step"] == 3


def test_the_last_one_listed_acts(tmp_path: Path) -> None:
    """The command line puts its own in front of a configured one."""
    first, second = WandbSegments(), WandbSegments(artifact="never")
    trainer = quiet_trainer(
        tmp_path, [recorder()], max_steps=2, logger=WandbLogger(offline=True, save_dir=str(tmp_path))
    )
    trainer.callbacks[:0] = [first, second]  # type: ignore[attr-defined]
    trainer.fit(tiny_gpt(), datamodule=tiny_stories())
    wandb.finish()
    assert not first.run_id and second.run_id
    assert not geometry_of(tmp_path)


def test_without_wandb_it_does_nothing(tmp_path: Path) -> None:
    segments = WandbSegments(artifact="checkpoints", basis=True)
    trainer = quiet_trainer(tmp_path, [segments, recorder(), checkpoints(tmp_path)], max_steps=2)
    trainer.fit(tiny_gpt(), datamodule=tiny_stories())
    assert segments.run_id == ""
    assert wandb.run is None and not list(tmp_path.rglob("*.wandb"))


# ----------------------------------------------------------------------------------------------------- the basis


def test_the_basis_is_that_of_the_snapshots(tmp_path: Path) -> None:
    """v_b by SVD of the snapshot files in float64; theta_0 as it was recorded, weight by weight."""
    train(tmp_path, WandbSegments(basis=True), recorder(every=1), steps=4)
    (artifact,) = geometry_of(tmp_path)
    (entry,) = (entry for entry in artifact.manifest.contents if entry.path == "basis.safetensors")
    stored = load_file(entry.local_path)
    steps, basis = read_path(tmp_path, "trunk")
    assert steps == [0, 1, 2, 3, 4]
    names = [name.removeprefix("v_b/") for name in stored if name.startswith("v_b/")]
    first = load_file(min((tmp_path / "snapshots").glob("*.safetensors")))
    assert set(names) == set(first)
    assert all(torch.equal(stored[f"theta_0/{name}"], first[name]) for name in names)
    matrices = ("attn.qkv", "attn.out_proj", "mlp.w_up", "mlp.w_down")
    ordered = [f"gpt.blocks.{k}.{matrix}.weight" for k in (0, 1) for matrix in matrices]
    found = np.concatenate([stored[f"v_b/{name}"].double().numpy().ravel() for name in ordered])
    assert found @ found == pytest.approx(1.0, abs=1e-5)
    assert found @ first_direction(drifts(basis)) == pytest.approx(1.0, abs=1e-5)


def test_no_basis_before_a_second_snapshot_or_of_shared_weights(tmp_path: Path) -> None:
    found = recorder()
    quiet_trainer(tmp_path, [found], max_steps=2).fit(tiny_gpt(), datamodule=tiny_stories())
    assert len(basis_tensors(found)) == 2 * 8
    shared = SimpleNamespace(shards=object())
    assert basis_tensors(SimpleNamespace(backbone=found.backbone, selection=shared, trajectory=found.trajectory)) == {}  # type: ignore[arg-type]
    assert basis_tensors(SimpleNamespace(backbone=lambda: None, selection=shared, trajectory=None)) == {}  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------- the parent


class FakeRun:
    def __init__(self, *, offline: bool, missing: bool = False) -> None:
        self.offline, self.missing, self.disabled = offline, missing, False
        self.config: dict[str, Any] = {}
        self.used: list[tuple[str, str]] = []

    def use_artifact(self, name: str, type: str) -> None:
        if self.missing:
            raise wandb.errors.CommError("artifact not found\nin project")
        self.used.append((name, type))


def fake(**settings: Any) -> Any:
    run = FakeRun(**settings)
    run.config = SimpleNamespace(update=lambda values, **options: run.__dict__.update(values))  # type: ignore[assignment]
    return run


def test_online_a_reheated_run_uses_its_parents_artifact() -> None:
    run = fake(offline=False)
    use_parent(run, "geometry-abc:latest")
    assert run.used == [("geometry-abc:latest", "geometry")]
    assert run.parent_artifact == "geometry-abc:latest"


def test_offline_the_configuration_names_it() -> None:
    run = fake(offline=True)
    use_parent(run, "geometry-abc:latest")
    assert run.used == [] and run.parent_artifact == "geometry-abc:latest"


def test_a_missing_artifact_does_not_end_training() -> None:
    run = fake(offline=False, missing=True)
    with pytest.warns(UserWarning, match=r"no artifact geometry-abc:latest .*\(artifact not found\)"):
        use_parent(run, "geometry-abc:latest")
    assert run.parent_artifact == "geometry-abc:latest"
