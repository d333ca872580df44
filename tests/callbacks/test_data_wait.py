"""What share of training goes by waiting for data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers import Clock
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import SimpleProfiler
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from mini_gpt_pl.callbacks import DataWait
from mini_gpt_pl.runs.logs import MetricsCSV

STEP, FETCH, EVALUATION = 0.03, 0.01, 5.0


CLOCK = Clock()


class Slow(IterableDataset[Tensor]):
    """Batches that take a known time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            CLOCK.now += self.seconds
            yield torch.ones(1)


class Module(LightningModule):
    """A model whose step and evaluation take a known time."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        CLOCK.now += STEP
        return (self.weight * batch).sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        CLOCK.now += EVALUATION

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(folder: Path, *more: Callback, profiler: Any = None) -> Trainer:
    trainer = Trainer(
        max_steps=40,
        accelerator="cpu",
        callbacks=[DataWait(warmup=5), *more],
        logger=MetricsCSV(folder / "metrics.csv"),
        log_every_n_steps=5,
        val_check_interval=10,
        check_val_every_n_epoch=None,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        profiler=profiler,
    )
    training, evaluation = (DataLoader(Slow(seconds), batch_size=None) for seconds in (FETCH, EVALUATION))
    trainer.fit(Module(), training, evaluation)
    return trainer


@pytest.fixture(autouse=True)
def _virtual_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("cost", "data_wait"):
        monkeypatch.setattr(f"mini_gpt_pl.callbacks.{module}.time", CLOCK)


def test_share_of_fetches_without_evaluations(tmp_path: Path) -> None:
    fit(tmp_path)
    waits = pd.read_csv(tmp_path / "metrics.csv", index_col="step")["overhead/data_wait"].dropna()
    assert waits.index.tolist() == list(range(10, 45, 5))  # the clock starts at step 5
    assert waits.to_numpy() == pytest.approx(FETCH / (FETCH + STEP))


def test_the_profiler_of_the_trainer_still_hears_everything_and_is_left_alone(tmp_path: Path) -> None:
    profiler = SimpleProfiler()
    trainer = fit(tmp_path, profiler=profiler)
    assert trainer.profiler is profiler  # type: ignore[attr-defined]
    assert profiler.start.__func__ is SimpleProfiler.start
    assert len(profiler.recorded_durations["[_TrainingEpochLoop].train_dataloader_next"]) >= 40


def test_an_error_leaves_the_profiler_alone(tmp_path: Path) -> None:
    class Fails(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            raise RuntimeError("on purpose")

    profiler = SimpleProfiler()
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(tmp_path, Fails(), profiler=profiler)
    assert profiler.stop.__func__ is SimpleProfiler.stop  # type: ignore[attr-defined]
