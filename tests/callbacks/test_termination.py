"""A SIGTERM to one of two ranks ends both at one batch; without one nothing changes, and nothing waits."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import quiet_trainer, tiny_gpt, tiny_stories
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from scripts import run_script

from mini_gpt_pl.callbacks import AgreedTermination

needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)
TOLD, LAG, STEPS = 5, 3, 40


class Told(Callback):
    """Send this process a SIGTERM at a step, and write down at which one training ended, and how."""

    def __init__(self, folder: Path, rank: int | None) -> None:
        super().__init__()
        self.folder = folder
        self.rank = rank

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == TOLD:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._write(trainer, type(exception).__name__)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, "end")

    def _write(self, trainer: Trainer, how: str) -> None:
        (self.folder / f"rank_{trainer.global_rank}").write_text(f"{how} {trainer.global_step}")


def count_broadcasts(folder: Path) -> None:
    """Leave a file if anything is broadcast while training runs."""
    broadcast = torch.distributed.broadcast

    def counted(*args: Any, **kwargs: Any) -> Any:
        (folder / "broadcast").touch()
        return broadcast(*args, **kwargs)

    torch.distributed.broadcast = counted


# Lightning starts this file again for the second rank.
SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from helpers import quiet_trainer, tiny_gpt, tiny_stories
from mini_gpt_pl.callbacks import AgreedTermination
from test_termination import LAG, STEPS, Told, count_broadcasts

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
count_broadcasts(folder)
watched = [AgreedTermination(LAG), Told(folder, None if rank < 0 else rank)]
trainer = quiet_trainer(folder, watched, max_steps=STEPS, strategy="ddp", devices=2)
trainer.fit(tiny_gpt(), datamodule=tiny_stories(batch_size=2))
"""


@needs_gloo
@pytest.mark.parametrize("rank", [-1, 0, 1])
def test_two_ranks_stop_at_one_batch(tmp_path: Path, rank: int) -> None:
    done = run_script(SCRIPT, tmp_path, str(rank))
    ends = [(tmp_path / f"rank_{k}").read_text() for k in (0, 1)]
    # Sent before the next batch, and read before the one that comes LAG batches later.
    expected = f"end {STEPS}" if rank < 0 else f"SIGTERMException {TOLD + LAG}"
    assert ends == [expected, expected], done.stderr[-3000:]
    assert not (tmp_path / "broadcast").exists()


def test_one_rank_stops_as_lightning_stops_it(tmp_path: Path) -> None:
    told = Told(tmp_path, 0)
    trainer = quiet_trainer(tmp_path, [AgreedTermination(LAG), told], max_steps=STEPS)
    with pytest.raises(SIGTERMException):
        trainer.fit(tiny_gpt(), datamodule=tiny_stories())
    assert (tmp_path / "rank_0").read_text() == f"SIGTERMException {TOLD}"


def test_lightnings_own_way_is_there_to_be_replaced_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = quiet_trainer(tmp_path, max_steps=1)
    loop, connector = trainer.fit_loop.epoch_loop, trainer._signal_connector
    own = loop._broadcast_sigterm_tensor, connector._sigterm_notifier_fn
    agreed = AgreedTermination()
    monkeypatch.setattr(type(trainer), "world_size", 2)
    agreed.setup(trainer, tiny_gpt(), "validate")
    assert (loop._broadcast_sigterm_tensor, connector._sigterm_notifier_fn) == own
    agreed.setup(trainer, tiny_gpt(), "fit")
    assert loop._broadcast_sigterm_tensor != own[0]
    assert connector._sigterm_notifier_fn != own[1]
    agreed.teardown(trainer, tiny_gpt(), "fit")
    assert (loop._broadcast_sigterm_tensor, connector._sigterm_notifier_fn) == own
