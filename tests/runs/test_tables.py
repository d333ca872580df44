"""Runs of one's own Trainer: what is recorded stays, and the table is a logger like any other."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import one_line_error
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mini_gpt_pl import callbacks as house
from mini_gpt_pl.callbacks import MetricsCSV, OptimizerAnatomy, Schedule, TrajectoryRecorder
from mini_gpt_pl.runs.folder import Run


class Fit(LightningModule):
    def __init__(self, rate: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.rate = rate

    def batch_loss(self, batch: list[Tensor]) -> Tensor:
        loss: Tensor = self.net(batch[0]).square().mean()
        return loss

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.batch_loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.batch_loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(40, 3, generator=torch.Generator().manual_seed(0))), 4)


def recorder(pattern: str = "net.*weight", **settings: Any) -> TrajectoryRecorder:
    return TrajectoryRecorder(pattern, Schedule(every=2), **settings)


def fit(
    folder: Path,
    steps: int,
    probes: list[Callback],
    *,
    loggers: list[Logger] | None = None,
    resume: Path | None = None,
    module: LightningModule | None = None,
    **settings: Any,
) -> Trainer:
    keep = ModelCheckpoint(folder / "ck", "{step}", every_n_train_steps=3, save_top_k=-1)
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    trainer = Trainer(
        **{**quiet, "max_steps": steps, "accelerator": "cpu", **settings},
        callbacks=[*probes, keep],
        default_root_dir=folder,
        logger=loggers or [MetricsCSV(folder / "metrics.csv")],
    )
    trainer.fit(module or Fit(), loader(), ckpt_path=resume)
    return trainer


def steps_of(folder: Path) -> list[int]:
    return list(pd.read_csv(folder / "metrics.csv")["step"])


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_finished_run_is_not_overwritten_unless_told_to(tmp_path: Path) -> None:
    fit(tmp_path, 6, [recorder()])
    before = files(tmp_path)
    fit(tmp_path, 1, [recorder()], fast_dev_run=2)
    assert files(tmp_path) == before
    with one_line_error(r"metrics.csv holds a run of 6 steps.*overwrite=True"):
        fit(tmp_path, 4, [recorder()])
    with one_line_error(r"holds the path of a run of 6 steps.*overwrite=True"):
        fit(tmp_path, 4, [recorder()], loggers=[MetricsCSV(tmp_path / "other.csv")])
    assert {name: data for name, data in files(tmp_path).items() if name in before} == before
    fit(tmp_path, 4, [recorder(overwrite=True)], loggers=[MetricsCSV(tmp_path / "metrics.csv", overwrite=True)])
    assert Run(tmp_path).trajectory.steps == [0, 2, 4] and max(steps_of(tmp_path)) == 4
    assert len(list((tmp_path / "snapshots").iterdir())) == 3


def test_a_path_without_its_file_is_not_overwritten_either(tmp_path: Path) -> None:
    """The snapshots can still give it back."""
    fit(tmp_path, 6, [recorder()])
    for name in ("trajectory.safetensors", "metrics.csv"):
        (tmp_path / name).unlink()
    with one_line_error("holds the path of a run of 6 steps"):
        fit(tmp_path, 4, [recorder()])
    assert len(list((tmp_path / "snapshots").iterdir())) == 4


def test_a_smoke_test_of_a_resumed_run_writes_nothing(tmp_path: Path) -> None:
    fit(tmp_path, 6, [recorder()])
    before = files(tmp_path)
    fit(tmp_path, 8, [recorder()], resume=tmp_path / "ck" / "step=6.ckpt", fast_dev_run=True)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (recorder, lambda: recorder("net.2.weight")),
        (None, recorder),
        (recorder, None),
        (recorder, lambda: recorder(name="renamed")),
        (None, None),
    ],
)
def test_a_resumed_run_keeps_its_rows_whatever_records(tmp_path: Path, first: Any, second: Any) -> None:
    def probes(make: Any) -> list[Callback]:
        return [] if make is None else [make()]

    fit(tmp_path, 8, probes(first))
    before = pd.read_csv(tmp_path / "metrics.csv", index_col="step").loc[:6]
    fit(tmp_path, 10, probes(second), resume=tmp_path / "ck" / "step=6.ckpt")
    after = pd.read_csv(tmp_path / "metrics.csv", index_col="step")
    kept = after.loc[:5, before.columns]
    pd.testing.assert_frame_equal(kept, before.loc[:5])
    assert after.index.is_unique and after.index.max() >= 9 and after["loss"].notna().sum() == 10


def test_resuming_a_finished_run_changes_nothing_of_its_table(tmp_path: Path) -> None:
    """Not even where somebody speaks all the same."""

    class Speaks(Callback):
        def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            for logger in trainer.loggers:
                logger.log_metrics({"last/word": 1.0}, step=6)

    fit(tmp_path, 6, [recorder()])
    before = pd.read_csv(tmp_path / "metrics.csv", index_col="step")
    fit(tmp_path, 6, [recorder(), Speaks()], resume=tmp_path / "ck" / "step=6.ckpt")
    after = pd.read_csv(tmp_path / "metrics.csv", index_col="step")
    pd.testing.assert_frame_equal(after.loc[before.index, before.columns], before)


def test_a_table_is_never_written_from_an_empty_memory(tmp_path: Path) -> None:
    """Also by somebody who has no trainer."""
    table = MetricsCSV(tmp_path / "metrics.csv", seconds=0)
    for step in range(3):
        table.log_metrics({"a": step / 4}, step)
    table.finalize("success")
    MetricsCSV(table.path, seconds=0).log_metrics({"b": 1.0}, 2)
    found = pd.read_csv(table.path, index_col="step")
    assert found["a"].tolist() == [0.0, 0.25, 0.5] and found.loc[2, "b"] == 1.0


def test_an_evaluation_elsewhere_leaves_the_table_alone_and_one_after_the_fit_is_in_it(tmp_path: Path) -> None:
    trainer = fit(tmp_path, 6, [])
    trainer.validate(trainer.lightning_module, loader(), verbose=False)
    trainer.loggers[0].finalize("success")
    assert pd.read_csv(tmp_path / "metrics.csv", index_col="step")["val/loss"].notna().sum() == 1
    before = files(tmp_path)
    table = MetricsCSV(tmp_path / "metrics.csv", seconds=0)
    other = Trainer(logger=table, accelerator="cpu", enable_progress_bar=False, default_root_dir=tmp_path)
    other.validate(Fit(), loader(), verbose=False)
    assert files(tmp_path) == before


class Asking(Fit):
    """Uses its first logger as modules do."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        assert isinstance(self.logger, Logger) and self.logger.log_dir is not None
        self.logger.experiment.log_metrics({"direct": 2.0}, step=self.global_step)  # type: ignore[attr-defined]
        self.logger.log_metrics({"mine": 1.0, "text": "words"})  # type: ignore[dict-item]
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("first", [True, False])
def test_the_table_is_a_logger_wherever_it_stands(tmp_path: Path, first: bool) -> None:
    loggers: list[Logger] = [MetricsCSV(tmp_path / "metrics.csv"), CSVLogger(tmp_path)]
    with pytest.warns(UserWarning, match="'text'") if first else pytest.warns(UserWarning):
        fit(tmp_path, 3, [], loggers=loggers if first else loggers[::-1], module=Asking())
    found = pd.read_csv(tmp_path / "metrics.csv", index_col="step")
    assert found["loss"].notna().sum() == 3
    if first:
        assert found["mine"].dropna().index.tolist() == found["direct"].dropna().index.tolist() == [0, 1, 2]
    assert "text" not in found


# ---------------------------------------------------------------------------------------------------------- copies


ARGUMENTS: dict[str, dict[str, Any]] = {
    "TrajectoryRecorder": {"pattern": "net"},
    "Kick": {"length": 0.1},
    "SubspaceIntervention": {"basis": house.BasisSource("isotropic")},
}


def callbacks() -> list[str]:
    kinds = {name: getattr(house, name) for name in house.__all__}
    return [name for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Callback)]


@pytest.mark.parametrize("name", callbacks())
def test_callbacks_can_be_pickled_and_copied(name: str) -> None:
    callback = getattr(house, name)(**ARGUMENTS.get(name, {}))
    for again in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
        assert type(again) is type(callback)
        assert set(vars(again)) == set(vars(callback))


def test_tables_can_be_pickled_and_copied(tmp_path: Path) -> None:
    trainer = fit(tmp_path, 3, [])
    table = trainer.loggers[0]
    assert isinstance(table, MetricsCSV)
    for again in (pickle.loads(pickle.dumps(table)), copy.deepcopy(table)):
        assert again.rows == table.rows and again.path == table.path


# ------------------------------------------------------------------------------------------------------ nothing moves


def test_where_nothing_moves_no_number_is_nan(tmp_path: Path) -> None:
    undefined: list[str] = []
    told: list[str] = []

    class Told(CSVLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            told.extend(metrics)
            undefined.extend(name for name, value in metrics.items() if value != value)
            super().log_metrics(metrics, step)

    probes: list[Callback] = [
        recorder(),
        OptimizerAnatomy(Schedule(every=2)),
        house.GradientAlignment(Schedule(every=1)),
        house.StreamingFisher(Schedule(every=1)),
        house.FisherProbe(Schedule(every=2), batches=2),
        house.CommutatorProbe(Schedule(every=2), samples=1, size=2),
        house.SwitchingProbe(),
    ]
    fit(tmp_path, 6, probes, loggers=[Told(tmp_path)], module=Fit(rate=0.0))
    assert undefined == [] and any("anatomy/" in name for name in told)
