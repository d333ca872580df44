"""Flipped bits, cut files and old files: what a run folder holds is whole, or is said not to be."""

from __future__ import annotations

import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import one_line_error
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from mini_gpt_pl.callbacks import TrajectoryRecorder
from mini_gpt_pl.callbacks.schedule import Schedule
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.path.snapshots import SnapshotFolder
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.geometry.vectors.files import read_tensors, write_tensors
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection
from mini_gpt_pl.runs.checkpoints import WholeCheckpoints, read_checkpoint


class Net(LightningModule):
    """Four layers whose loss is their size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(20, 20) for _ in range(4))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return torch.stack([layer(batch[0]).square().mean() for layer in self.layers]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps with snapshots and a checkpoint at every second one."""
    folder = tmp_path_factory.mktemp("whole")
    kept = ModelCheckpoint(
        folder / "checkpoints", "{step:06d}", every_n_train_steps=2, save_top_k=-1, auto_insert_metric_name=False
    )
    recorder = TrajectoryRecorder(r"(?P<group>layers\.\d)\.weight", schedule=Schedule(every=2))
    trainer = Trainer(
        max_steps=8, default_root_dir=folder, callbacks=[recorder, kept], plugins=[WholeCheckpoints()], logger=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(Net(), _loader())
    return folder


def _loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(64, 20)), batch_size=4)


def _read_all(folder: Path) -> list[Tensor]:
    """Everything that a reader takes from the run's files."""
    selection = ParameterSelection.of(Net(), r"(?P<group>layers\.\d)\.weight")
    snapshots = SnapshotFolder(folder / "snapshots", selection)
    trajectory = Trajectory.load(folder / "trajectory.safetensors")
    rows = [snapshots.read(step).values for step in trajectory.steps]
    states = [read_checkpoint(file) for file in sorted((folder / "checkpoints").glob("*.ckpt"))]
    weights = [value for state in states for value in state["state_dict"].values()]
    moments = [
        part for state in states for one in state["optimizer_states"][0]["state"].values() for part in one.values()
    ]
    return [trajectory.grams, torch.tensor(trajectory.survival), *rows, *weights, *moments]


@pytest.mark.parametrize(
    "what", ["snapshots/step_000000004.safetensors", "trajectory.safetensors", "checkpoints/000004.ckpt"]
)
def test_every_flipped_bit_is_noticed_or_harmless(trained: Path, tmp_path: Path, what: str) -> None:
    """Twenty bits of each kind of file, the headers' among them."""
    whole = _read_all(trained)
    copy = shutil.copytree(trained, tmp_path / "run")
    file, draw = copy / what, random.Random(7)
    content = file.read_bytes()
    noticed = 0
    for trial in range(20):
        place = draw.randrange(len(content)) if trial else 40  # the first one in the header
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                found = _read_all(copy)
        except (UserError, UserWarning) as error:
            assert len(str(error).splitlines()) == 1
            noticed += 1
        else:
            assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True)), f"byte {place} was used"
    assert noticed >= 15


@pytest.mark.parametrize(
    "what", ["snapshots/step_000000004.safetensors", "trajectory.safetensors", "checkpoints/000004.ckpt"]
)
def test_files_that_were_cut_short_are_named(trained: Path, tmp_path: Path, what: str) -> None:
    copy = shutil.copytree(trained, tmp_path / "run")
    content = (copy / what).read_bytes()
    (copy / what).write_bytes(content[: len(content) // 2])
    with one_line_error(Path(what).name):
        _read_all(copy)


def test_the_last_whole_checkpoint_before_a_broken_one_is_named(trained: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    for name in ("000006.ckpt", "000008.ckpt"):
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 4
        (copy / name).write_bytes(content)
    with one_line_error(r"000008\.ckpt cannot be read.*whole: .*000004\.ckpt"):
        read_checkpoint(copy / "000008.ckpt")


def test_lightning_resumes_from_whole_checkpoints_alone(trained: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(trained, tmp_path / "run")
    last = copy / "checkpoints" / "000008.ckpt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    trainer = Trainer(
        max_steps=10, plugins=[WholeCheckpoints()], logger=False, enable_progress_bar=False, accelerator="cpu",
        enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with one_line_error("is damaged"):
        trainer.fit(Net(), _loader(), ckpt_path=last)


def test_a_checkpoint_that_cannot_be_finished_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, path = WholeCheckpoints(), tmp_path / "a.ckpt"
    writer.save_checkpoint({"state_dict": {}, "global_step": 1}, path)
    before = path.read_bytes()

    def full(content: object, file: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        writer.save_checkpoint({"state_dict": {}, "global_step": 2}, path)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]


def test_files_without_checksums_open_with_one_line(trained: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(trained, tmp_path / "run")
    for file in [copy / "trajectory.safetensors", *(copy / "snapshots").glob("*.safetensors")]:
        _, meta = read_tensors(file, "file")
        save_file(load_file(file), file, {key: value for key, value in meta.items() if key != "checksum"})
    with pytest.warns(UserWarning, match="carry no checksum, as version 0.1.0 wrote them") as caught:
        Trajectory.load(copy / "trajectory.safetensors")
    assert len(caught) == 1


def test_kinds_of_tensors_have_checksums(tmp_path: Path) -> None:
    tensors = {
        "a": torch.tensor(3.0),
        "b": torch.arange(6).reshape(2, 3).T,
        "c": torch.zeros(0),
        "d": torch.tensor([True]),
    }
    write_tensors(tmp_path / "x", tensors, {"format": "mine"})
    found, meta = read_tensors(tmp_path / "x", "file")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items()) and len(meta["checksum"]) == 64
