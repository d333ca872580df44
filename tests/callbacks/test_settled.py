"""What stays is no garbage, and after training everything is as before."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from helpers import quiet_trainer, tiny_gpt, tiny_stories
from lightning.pytorch import Callback

from mini_gpt_pl.callbacks import SettledObjects


class Frozen(Callback):
    """How many objects are exempt, by step."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.counts.append(gc.get_freeze_count())


def test_after_some_steps_what_is_alive_is_exempt_until_training_ends(tmp_path: Path) -> None:
    gc.unfreeze()
    seen = Frozen()
    trainer = quiet_trainer(tmp_path, [SettledObjects(after=3), seen], max_steps=5)
    trainer.fit(tiny_gpt(), datamodule=tiny_stories())
    assert seen.counts[:2] == [0, 0] and seen.counts[2] > 10_000
    assert all(0 < count <= seen.counts[2] for count in seen.counts[2:])  # once: it does not grow
    assert gc.get_freeze_count() == 0


def test_a_run_that_ends_before_leaves_the_collector_alone(tmp_path: Path) -> None:
    gc.unfreeze()
    seen = Frozen()
    quiet_trainer(tmp_path, [SettledObjects(after=9), seen], max_steps=2).fit(tiny_gpt(), datamodule=tiny_stories())
    assert seen.counts == [0, 0]
