"""When the numbers of a probe that measures at every step reach the loggers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers import checkpoints, quiet_trainer, recorder, tiny_gpt, tiny_stories
from lightning.pytorch import Callback, Trainer

from mini_gpt_pl.callbacks import GradientAlignment, Schedule
from mini_gpt_pl.runs.logs import MetricsCSV

NAME = "alignment/trunk/gradient"


class Arrivals(MetricsCSV):
    """Remembers after how many steps of training each row of the alignment came."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.trainer: Trainer | None = None
        self.came: dict[int, int] = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, step)
        if NAME in metrics and step is not None:
            assert self.trainer is not None and step not in self.came
            self.came[step] = self.trainer.global_step


class StopHere(Callback):
    """Raises in the middle of an interval between two logs."""

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 7:
            raise RuntimeError("enough")


def arrivals(folder: Path, *others: Callback, **settings: Any) -> dict[int, int]:
    logger = Arrivals(folder / "metrics.csv")
    watch = [recorder(1), GradientAlignment(Schedule(every=1), None), *others]
    trainer = quiet_trainer(folder, watch, logger=logger, log_every_n_steps=4, **settings)
    logger.trainer = trainer
    try:
        trainer.fit(tiny_gpt(), datamodule=tiny_stories())
    except RuntimeError as error:
        assert str(error) == "enough"
    return logger.came


def test_rows_are_spread_over_the_steps_until_the_next_log(tmp_path: Path) -> None:
    came = arrivals(tmp_path, max_steps=13)
    # The first interval has three rows, as two snapshots come before them; the end brings what is left.
    assert came == {2: 4, 3: 5, 4: 6, 5: 8, 6: 9, 7: 10, 8: 11, 9: 12, 10: 13, 11: 13, 12: 13, 13: 13}


@pytest.mark.parametrize(("settings", "by"), [({"val_check_interval": 6, "limit_val_batches": 1}, 6)])
def test_an_evaluation_finds_all_of_them(tmp_path: Path, settings: dict[str, Any], by: int) -> None:
    came = arrivals(tmp_path, max_steps=9, check_val_every_n_epoch=None, **settings)
    assert all(came[step] == by for step in (5, 6))


def test_a_checkpoint_and_an_exception_lose_none(tmp_path: Path) -> None:
    came = arrivals(tmp_path / "checkpoint", checkpoints(tmp_path, every=6), max_steps=9)
    assert came[5] == came[6] == 6
    assert sorted(arrivals(tmp_path / "exception", StopHere(), max_steps=13)) == [2, 3, 4, 5, 6, 7]
