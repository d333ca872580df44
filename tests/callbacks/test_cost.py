"""What the probes cost, and that a budget is kept."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers import Clock
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from mini_gpt_pl.callbacks.cost import CostControl
from mini_gpt_pl.callbacks.probe import Deferred, Estimate, Probe, Stopwatch
from mini_gpt_pl.callbacks.schedule import Schedule
from mini_gpt_pl.runs.logs import MetricsCSV

STEP, PROBE = 0.004, 0.004
QUIET: dict[str, Any] = {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}


CLOCK = Clock()


@pytest.fixture(autouse=True)
def _virtual_time(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "real_time" not in request.keywords:
        monkeypatch.setattr("mini_gpt_pl.callbacks.cost.time", CLOCK)
        monkeypatch.setattr("mini_gpt_pl.callbacks.probe.time", CLOCK)


class Slow(LightningModule):
    """A model whose step takes a known time."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        CLOCK.now += STEP
        return (self.weight * batch.sum()).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Sleeper(Probe):
    """A probe that costs as much as a step, every step."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__(schedule)
        self.at: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self.due(trainer.global_step):
            with self.watch.running():
                self.at.append(trainer.global_step)
                CLOCK.now += PROBE


def train(path: Path, budget: float | None, steps: int = 300) -> tuple[Sleeper, pd.DataFrame]:
    probe = Sleeper(Schedule(every=1))
    logger = MetricsCSV(path / "metrics.csv")
    control = CostControl(budget, warmup=5)
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", callbacks=[probe, control], logger=logger, log_every_n_steps=10, **QUIET
    )
    trainer.fit(Slow(), DataLoader(torch.ones(steps, 1), 1))  # type: ignore[arg-type]
    return probe, pd.read_csv(path / "metrics.csv", index_col="step")


def test_without_a_budget_the_cost_is_only_told(tmp_path: Path) -> None:
    probe, metrics = train(tmp_path, None, steps=60)
    assert probe.at == list(range(1, 61))
    last = metrics["overhead/fraction"].iloc[-1]
    assert last == pytest.approx(1.0, abs=0.03)  # as long as the step, but for where the clock starts
    assert metrics["overhead/Sleeper"].iloc[-1] == last
    assert "overhead/stretch" not in metrics


def test_probes_of_one_class_are_one_number_and_a_resumed_run_warms_up_again(tmp_path: Path) -> None:
    class Started(CostControl):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            super().on_train_start(trainer, pl_module)
            self._first = 50  # as after a restart from step 50

    probes: list[Callback] = [Sleeper(Schedule(every=1)), Sleeper(Schedule(every=1)), Started(warmup=20)]
    logger = MetricsCSV(tmp_path / "metrics.csv")
    trainer = Trainer(max_steps=100, accelerator="cpu", callbacks=probes, logger=logger, log_every_n_steps=10, **QUIET)
    trainer.fit(Slow(), DataLoader(torch.ones(100, 1), 1))  # type: ignore[arg-type]
    rows = pd.read_csv(tmp_path / "metrics.csv").dropna(subset=["overhead/Sleeper"])
    assert rows["step"].min() == 80
    assert rows["overhead/Sleeper"].iloc[-1] == pytest.approx(2 * PROBE / STEP, rel=0.1)
    assert rows["overhead/Sleeper"].iloc[-1] == pytest.approx(rows["overhead/fraction"].iloc[-1], rel=1e-9)


def test_budget_is_kept(tmp_path: Path) -> None:
    budget = 0.1
    probe, metrics = train(tmp_path, budget)
    tail = [step for step in probe.at if step > 100]
    assert min(b - a for a, b in pairwise(tail)) > 1
    assert 0 < len(tail) * PROBE / (200 * STEP) <= budget * 1.1
    assert metrics["overhead/stretch"].iloc[-1] > 1


class Heavy(Sleeper):
    """A probe that says what it will take."""

    def estimate(self, steps: int, dim: int) -> Estimate:
        return Estimate("Heavy", bytes=3 * 2**20, passes=0.5)


def test_the_start_says_what_memory_and_time_to_expect(tmp_path: Path) -> None:
    told: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mini_gpt_pl.callbacks.cost.rank_zero_info", told.append)
        quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_checkpointing": False, "logger": False}
        trainer = Trainer(
            max_steps=1,
            accelerator="cpu",
            accumulate_grad_batches=2,
            callbacks=[Heavy(Schedule(every=1)), CostControl()],
            enable_model_summary=False,
            **quiet,
        )
        trainer.fit(Slow(), DataLoader(torch.ones(4, 1), 1))  # type: ignore[arg-type]
    assert len(told) == 1 and "3 MiB" in told[0] and "25.0%" in told[0]


def test_due_counts_each_schedule_apart() -> None:
    probe = Probe(Schedule(every=2))
    probe.stretch = 3
    own = [step for step in range(1, 25) if probe.due(step)]
    assert own == [2, 8, 14, 20]
    second = Schedule(every=5)
    assert [step for step in range(1, 60) if probe.due(step, second, "second")] == [5, 20, 35, 50]
    assert probe.asked == 12 + 11 and probe.answered == 4 + 4


@pytest.mark.real_time
def test_stopwatch_adds_up() -> None:
    watch = Stopwatch()
    for _ in range(3):
        with watch.running():
            time.sleep(0.01)
    with pytest.raises(RuntimeError), watch.running():
        time.sleep(0.01)
        raise RuntimeError
    assert 0.04 <= watch.seconds < 0.2


def test_deferred_numbers_keep_step_and_name() -> None:
    deferred = Deferred()
    deferred.add(3, ["a", "b"], torch.tensor([1.0, 2.0]))
    deferred.add(5, ["a"], torch.tensor([4.0]))
    assert deferred
    assert deferred.take() == [(3, {"a": 1.0, "b": 2.0}), (5, {"a": 4.0})]
    assert not deferred and deferred.take() == []
    with pytest.raises(AssertionError):
        deferred.add(1, ["a"], torch.zeros(2))


def test_a_second_fit_is_measured_by_itself(tmp_path: Path) -> None:
    """Neither the time between two fits nor the stretching of the first one counts."""
    probe, control = Sleeper(Schedule(every=1)), CostControl(0.1, warmup=5)
    for name in ("first", "second"):
        before = len(probe.at)
        logger = MetricsCSV(tmp_path / name / "metrics.csv")
        trainer = Trainer(
            max_steps=60, accelerator="cpu", callbacks=[probe, control], logger=logger, log_every_n_steps=10, **QUIET
        )
        trainer.fit(Slow(), DataLoader(torch.ones(60, 1), 1))  # type: ignore[arg-type]
        rows = pd.read_csv(tmp_path / name / "metrics.csv", index_col="step")["overhead/fraction"].dropna()
        assert rows.index[0] == 10 and rows.iloc[0] == pytest.approx(1.0, abs=0.03)
        assert probe.at[before : before + 5] == [1, 2, 3, 4, 5]
        CLOCK.now += 1000.0


@pytest.mark.parametrize("settings", [{"max_time": {"minutes": 5}}, {"max_epochs": -1, "limit_train_batches": 3}])
def test_the_number_of_steps_may_be_unknown(tmp_path: Path, settings: dict[str, Any]) -> None:
    told: list[str] = []

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            trainer.should_stop = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mini_gpt_pl.callbacks.cost.rank_zero_info", told.append)
        callbacks = [Heavy(Schedule(every=1)), CostControl(), Stop()]
        trainer = Trainer(
            max_steps=-1, accelerator="cpu", callbacks=callbacks, logger=False, log_every_n_steps=1, **QUIET, **settings
        )
        trainer.fit(Slow(), DataLoader(torch.ones(4, 1), 1))  # type: ignore[arg-type]
    assert told == [
        "Heavy: about 3 MiB with the model, and 50.0% of the time that a step's forward and backward passes take, "
        "in the first 10,000 steps"
    ]
