"""The report on a run of somebody's own Trainer: what it logged, its settings, its path, and no word of a study."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import one_line_error
from lightning.pytorch import LightningModule, Trainer
from report_runs import path_of, write_run
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mini_gpt_pl.callbacks import Schedule, TrajectoryRecorder
from mini_gpt_pl.report.contents import contents_of
from mini_gpt_pl.report.general import GENERAL
from mini_gpt_pl.report.learning import learning_curves, own_metrics, panels
from mini_gpt_pl.report.page import Steps, write_report
from mini_gpt_pl.report.settings import facts
from mini_gpt_pl.report.subject import Subject
from mini_gpt_pl.report.summary import headline, lines
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.runs.logs import MetricsCSV
from mini_gpt_pl.runs.record import Record

STEPS = [50 * k for k in range(9)]
METRICS = """step,train_loss,val_loss,val/acc,alignment/trunk/gradient,epoch
50,2.5,,,0.2,0
100,2.0,2.25,0.25,0.1,0
200,1.5,1.75,0.5,0.3,1
400,1.0,2.0,0.75,0.1,2
"""
RECORD = Record(
    "VisionTransformer",
    123_456,
    ({"class": "AdamW", "lr": 0.002, "betas": [0.9, 0.99], "weight_decay": 0.1},),
    batch_size=64,
    accumulation=2,
    precision="bf16-mixed",
    max_steps=400,
    ended=400,
)
STUDIES = re.compile(
    r"paper|p_ood|retriev|codeword|stor(?:y|ies)|nats|grok|1\.216|lambda_?[^_1]|cli\.py", re.IGNORECASE
)


@pytest.fixture
def foreign(tmp_path: Path) -> Run:
    run = write_run(tmp_path / "mine", STEPS, path_of(STEPS), metrics=METRICS)
    (run.path / "config.yaml").unlink()
    RECORD.write(run.path)
    return Run(run.path)


def page_of(run: Run, folder: Path) -> str:
    with Steps(Console(quiet=True)) as steps:
        text = write_report([run], folder, None, steps).read_text()
    body = re.sub(r"<style>.*?</style>|data:image/[^\"]*", "", text, flags=re.DOTALL)
    return re.sub(r"<[^>]+>", " ", body)


def test_the_page_holds_what_was_logged_and_the_settings_and_no_word_of_a_study(foreign: Run, tmp_path: Path) -> None:
    text = page_of(foreign, tmp_path / "out")
    assert not STUDIES.findall(text)
    for said in ("train_loss", "val_loss", "val/acc", "VisionTransformer", "123,456", "2e-3", "128", "bf16-mixed"):
        assert said in text
    assert "finished at step 400" in text and "not on record" not in text
    assert "val_loss fell from 2.25 to 2; its lowest was 1.75 at step 200." in text
    assert "all recorded weights" in text and not re.search(r"\btrunk\b", text)  # nobody gave them a name
    assert "and the run itself from its resolved configuration" not in text
    assert not STUDIES.findall(" ".join(file.stem for file in (tmp_path / "out").rglob("*.*")))


def test_each_number_of_the_whole_path_has_a_sentence(foreign: Run) -> None:
    table = next(table for table in GENERAL.run_tables(foreign) if table.name == "overview")
    assert len(table.rows) > 20 and all(len(row["in words"].text.split()) > 4 for row in table.rows)
    assert all(row["in words"].text for row in headline(foreign).verdicts.rows)


def test_facts_are_those_of_the_record(foreign: Run) -> None:
    found = facts(foreign)
    assert (found["model"], found["weights"], found["examples a step"]) == ("VisionTransformer", 123_456, 128)
    assert (found["optimizer"], found["learning rate"], found["beta2"], found["seed"]) == ("AdamW", 0.002, 0.99, None)
    assert headline(foreign).sentence.startswith("AdamW, lr 2e-3, decay 0.1")


@pytest.mark.parametrize(
    ("config", "task"),
    [
        (None, ""),
        ({"task": "somebody's", "model": {"class_path": "theirs.ViT", "init_args": {"depth": 2}}}, ""),
        ({"model": {"class_path": "theirs.ViT"}, "optimizer": {"class_path": "torch.optim.SGD"}}, ""),
        ({"model": {"size": "51m", "probe_weight": {"first": 2.0}}}, "stories"),
        ({"task": "operations"}, "operations"),
    ],
)
def test_a_task_is_what_the_configuration_says(foreign: Run, config: dict[str, object] | None, task: str) -> None:
    if config is not None:
        (foreign.path / "config.yaml").write_text(yaml.safe_dump(config))
    run = Run(foreign.path)
    assert run.task == task
    assert (contents_of([run]) is GENERAL) == (task == "")


def test_a_configuration_of_somebodys_own_command_line_is_read(foreign: Run) -> None:
    (foreign.path / "run.json").unlink()
    config = {
        "seed_everything": 3,
        "model": {"class_path": "theirs.ViT"},
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}},
        "trainer": {"max_steps": -1, "max_epochs": 5, "precision": "32-true"},
        "data": {"class_path": "theirs.Images", "init_args": {"batch_size": 32}},
    }
    (foreign.path / "config.yaml").write_text(yaml.safe_dump(config))
    shown = headline(Run(foreign.path))
    wanted = {"model": "ViT", "optimizer": "SGD", "epochs": "5", "examples a step": "32"}
    assert {name: shown.facts[name] for name in wanted} == wanted
    assert (
        shown.sentence == "SGD, lr 0.1, momentum 0.9; ViT; seed 3; recorded up to step 400, its end is not on record."
    )


def test_curves_of_one_quantity_share_a_panel(foreign: Run) -> None:
    assert own_metrics(foreign) == ["train_loss", "val_loss", "val/acc"]
    assert panels(own_metrics(foreign)) == {"loss": ["train_loss", "val_loss"], "acc": ["val/acc"]}
    left, right = learning_curves(foreign).axes
    assert [line.get_label() for line in (*left.lines, *right.lines)] == ["train_loss", "val_loss", "val/acc"]
    (foreign.path / "metrics.csv").write_text("step,alignment/trunk/gradient\n1,0.5\n")
    with one_line_error("logged nothing of its own"):
        learning_curves(Run(foreign.path))


def test_the_closing_table_has_the_runs_own_metrics(foreign: Run) -> None:
    assert [(line["quantity"], line["value"]) for line in lines(foreign)[:3]] == [
        ("train_loss", "1"),
        ("val_loss", "2"),
        ("val/acc", "0.75"),
    ]


class Small(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 3), nn.Linear(3, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.head(self.body(batch[0])).pow(2).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [
            {"params": self.body.parameters(), "weight_decay": 0.1},
            {"params": self.head.parameters()},
        ]
        return torch.optim.AdamW(groups, lr=torch.tensor(0.01), weight_decay=0.0)


@pytest.mark.parametrize("stops", [False, True])
def test_the_recorder_leaves_the_settings_of_a_run_and_its_end(tmp_path: Path, stops: bool) -> None:
    class Stopping(Small):
        def on_train_batch_start(self, batch: list[Tensor], batch_idx: int) -> None:
            if stops and self.global_step == 3:
                raise RuntimeError("broken off")

    trainer = Trainer(
        max_steps=6,
        accelerator="cpu",
        logger=MetricsCSV(tmp_path / "metrics.csv"),
        callbacks=[TrajectoryRecorder(r"(?P<group>body|head)\.weight", Schedule(every=2))],
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        accumulate_grad_batches=2,
    )
    data = DataLoader(TensorDataset(torch.rand(64, 4)), 4)
    if stops:
        with pytest.raises(RuntimeError, match="broken off"):
            trainer.fit(Stopping(), data)
    else:
        trainer.fit(Stopping(), data)
    record = Run(tmp_path).record
    assert record is not None
    assert (record.model, record.weights, record.batch_size, record.accumulation) == ("Stopping", 19, 4, 2)
    assert (record.max_steps, record.ended) == (6, None if stops else 6)
    (optimizer,) = record.optimizers
    assert optimizer["class"] == "AdamW" and optimizer["weight_decay"] == [0.1, 0.0]
    assert optimizer["lr"] == pytest.approx(0.01) and optimizer["betas"] == [0.9, 0.999]
    outcome = Run(tmp_path).outcome
    assert outcome is None if stops else outcome is not None and (outcome.state, outcome.step) == ("finished", 6)


def test_a_damaged_record_is_one_line(foreign: Run) -> None:
    (foreign.path / "run.json").write_text(json.dumps({"model": "ViT"}))
    with one_line_error("run.json cannot be read"):
        facts(foreign)


def test_what_a_replay_did_not_measure_is_read_live(foreign: Run) -> None:
    found = Subject.of(foreign).estimates(("gradient", "combined", "trunk", "abs_cos"), "alignment/trunk/gradient")
    assert found.live and [value for value, _ in found.values.values()] == [0.2, 0.1, 0.3, 0.1]
