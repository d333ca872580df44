"""The probes on models that are not this project's GPT."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mini_gpt_pl.callbacks import Schedule, TrajectoryRecorder
from mini_gpt_pl.geometry.path import pca
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.report import page
from mini_gpt_pl.runs.logs import MetricsCSV

EXAMPLES = {
    "image_classifier": {"layers.0", "layers.1", "layers.4", "layers.8"},
    "huggingface_gpt2": {"transformer.h.0", "transformer.h.1"},
    "recurrent_network": {"rnn", "head"},
}
FOLDER = Path(__file__).parents[2] / "notebooks"


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_records_its_own_groups(name: str, tmp_path: Path) -> None:
    if name == "huggingface_gpt2":
        pytest.importorskip("transformers")
    importlib.import_module(f"notebooks.{name}").main(steps=60, folder=str(tmp_path))
    trajectory = Trajectory.load(tmp_path / "trajectory.safetensors")
    assert set(trajectory.groups) == EXAMPLES[name]
    assert trajectory.steps == [0, 20, 40, 60]
    metrics = pd.read_csv(tmp_path / "metrics.csv", index_col="step")
    whole = pca.pca(trajectory.gram(), pca.drifts(4)[1:])
    assert metrics.loc[60, "backbone/trunk/pc1"] == pytest.approx(whole.pc1, rel=1e-12)
    assert metrics["alignment/trunk/gradient"].notna().sum() == 8  # every 5 steps once step 20 has made a backbone
    if name == "recurrent_network":
        assert metrics["alignment/trunk/following_vs_energy"].notna().sum() == 2


@pytest.mark.parametrize("name", EXAMPLES)
def test_attaching_the_probes_takes_under_forty_lines(name: str) -> None:
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    lines = [node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    assert sum((node.end_lineno or 0) - node.lineno + 1 for node in lines) < 40


class Tuned(LightningModule):
    """A frozen layer, a trained one, and a head with an optimizer of its own."""

    def __init__(self, optimizers: int) -> None:
        super().__init__()
        self.automatic_optimization = optimizers == 1
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.head = nn.Linear(3, 2)
        self.layers[0].requires_grad_(False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.head(self.layers(batch[0])).square().mean()
        if not self.automatic_optimization:
            self.manual_backward(loss)
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.step()
                optimizer.zero_grad()
        return loss

    def configure_optimizers(self) -> Any:
        if self.automatic_optimization:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
        trunk = torch.optim.AdamW(self.layers[2].parameters(), lr=0.1, weight_decay=0.5)
        return [trunk, torch.optim.SGD(self.head.parameters(), lr=0.1, weight_decay=0.9)]


def tune(folder: Path, optimizers: int = 1, steps: int = 4, resume: Path | None = None) -> Trajectory:
    recorder = TrajectoryRecorder(r"(?P<group>layers\.\d)\.weight", Schedule(every=1))
    keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1, auto_insert_metric_name=False)
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    table = MetricsCSV(folder / "metrics.csv")
    trainer = Trainer(
        max_steps=steps, callbacks=[recorder, keep], logger=table, default_root_dir=folder, accelerator="cpu", **quiet
    )
    torch.manual_seed(0)
    trainer.fit(Tuned(optimizers), DataLoader(TensorDataset(torch.ones(8, 4)), 2), ckpt_path=resume)
    return Trajectory.load(folder / "trajectory.safetensors")


def test_a_frozen_weight_decays_not_and_a_trained_one_beside_it_does(tmp_path: Path) -> None:
    trajectory = tune(tmp_path)
    assert trajectory.survival_of("layers.0") == [1.0] * 5
    assert trajectory.survival_of("layers.2") == pytest.approx([0.95**step for step in range(5)])


def test_only_the_optimizer_of_the_recorded_weights_decays_them(tmp_path: Path) -> None:
    trajectory = tune(tmp_path, optimizers=2)
    assert trajectory.steps == [0, 1, 3]  # Lightning counts the steps of both, and these weights move at 1 and 3
    assert trajectory.survival_of("layers.2") == pytest.approx([1.0, 0.95, 0.95**2])


def test_a_resumed_run_of_ones_own_trainer_keeps_its_table(tmp_path: Path) -> None:
    tune(tmp_path, steps=4)
    before = pd.read_csv(tmp_path / "metrics.csv", index_col="step")
    tune(tmp_path, steps=6, resume=tmp_path / "2.ckpt")
    after = pd.read_csv(tmp_path / "metrics.csv", index_col="step")
    assert after.index[0] == before.index[0] and after.index[-1] == 6
    pd.testing.assert_frame_equal(after.loc[:2].dropna(axis=1, how="all"), before.loc[:2].dropna(axis=1, how="all"))


def test_a_run_of_ones_own_trainer_has_a_report(tmp_path: Path) -> None:
    tune(tmp_path / "mine", steps=4)
    page.main([str(tmp_path / "mine"), "--out", str(tmp_path / "report")])
    text = (tmp_path / "report" / "report.html").read_text()
    assert "PC1" in text
