"""Two processes on the CPU measure and train what one does with twice the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import checkpoints, metrics, probes, quiet_trainer, same, tiny_gpt, tiny_stories
from scripts import run_in_full
from tolerances import assert_close, dims_of

from mini_gpt_pl.callbacks import TrajectoryRecorder
from mini_gpt_pl.geometry.path.rows import Place
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.stories.module import ProbedGPT

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)

STEPS = 7


def train(
    folder: Path,
    batch_size: int,
    accumulate: int,
    resume: Path | None = None,
    keep_on: Place = "model",
    **settings: Any,
) -> None:
    """Twenty stories on each of two ranks, or forty on one: a few micro-batches an epoch, evaluated every four."""
    callbacks = [*probes(every=2), checkpoints(folder)]
    next(c for c in callbacks if isinstance(c, TrajectoryRecorder)).keep_on = keep_on
    # In float64, where sums over ranks differ from sums over examples by nothing that could be seen.
    settings |= {
        "precision": "64-true",
        "limit_val_batches": 1.0,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
    }
    trainer = quiet_trainer(folder, callbacks, max_steps=STEPS, accumulate_grad_batches=accumulate, **settings)
    if resume is not None:
        trainer.logger.resume(4)  # type: ignore[union-attr]
    module = tiny_gpt(seed=1 if resume is None else 2)
    # As many probes as chance gives: the ranks' counts differ.
    data = tiny_stories(batch_size=batch_size, eval_examples=8)
    trainer.fit(module, datamodule=data, ckpt_path=resume)


def count_barriers() -> None:
    """Leave a file beside a run's folder where the ranks wait for one another on the host in a training step."""
    step, barrier = ProbedGPT.training_step, torch.distributed.barrier
    inside: list[Path] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        if inside:
            (inside[-1] / "barriers").touch()
        return barrier(*args, **kwargs)

    def watched(self: ProbedGPT, batch: Any, batch_idx: int) -> torch.Tensor:
        inside.append(Path(self.trainer.default_root_dir).parent)
        try:
            return step(self, batch, batch_idx)
        finally:
            (inside.pop() / "steps").touch()

    torch.distributed.barrier = counted
    ProbedGPT.training_step = watched  # type: ignore[method-assign]


# Lightning starts this file again for the second rank.
SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from test_distributed import count_barriers, train

count_barriers()
for strategy in ("ddp", "one_sum"):
    root, two = Path(sys.argv[1]) / strategy, {"strategy": strategy, "devices": 2}
    train(root / "1", 2, 1, **two)
    train(root / "2", 2, 2, keep_on="disk", **two)  # the second rank reads what the first has written
    train(root / "1", 2, 1, resume=root / "1" / "checkpoints" / "000004.ckpt", **two)
"""


@pytest.fixture(scope="module")
def strategies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs under both strategies, in one script: the ranks' imports take longer than the runs."""
    folder = tmp_path_factory.mktemp("two")
    run_in_full(SCRIPT, folder)
    return folder


@pytest.fixture(params=["ddp", "one_sum"])
def two_ranks(strategies: Path, request: pytest.FixtureRequest) -> Path:
    """Runs with 1 and 2 micro-batches a step; the first is resumed in the same folder, behind its snapshots."""
    return strategies / str(request.param)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_are_one_with_the_double_batch(tmp_path: Path, two_ranks: Path, accumulate: int) -> None:
    folder = two_ranks / str(accumulate)
    train(tmp_path, 4, accumulate)
    last = f"checkpoints/{STEPS:06d}.ckpt"
    one, two = (torch.load(path / last, weights_only=True)["state_dict"] for path in (tmp_path, folder))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-10)
    here, there = (Trajectory.load(path / "trajectory.safetensors") for path in (tmp_path, folder))
    assert here.steps == there.steps == [0, 2, 4, 6, 7]
    assert same(here.survival, there.survival)
    torch.testing.assert_close(there.grams, here.grams, rtol=1e-6, atol=1e-9)
    logged = metrics(folder)
    assert {step: row.keys() for step, row in logged.items()} == {s: r.keys() for s, r in metrics(tmp_path).items()}
    assert {"alignment/trunk/gradient", "alignment/trunk/lm_vs_probe", "train/loss"} <= logged[STEPS].keys()
    for step, row in metrics(tmp_path).items():
        assert_close(logged[step], row, dims_of(here), rel=1e-5, where=step)


def test_no_training_step_waits_on_the_host(two_ranks: Path) -> None:
    """A barrier there would empty the device's queue at every step."""
    assert (two_ranks / "steps").exists() and not (two_ranks / "barriers").exists()


def test_probes_of_the_two_ranks_differ() -> None:
    """Else the comparison would not see whether counts are taken over both."""
    data = tiny_stories(batch_size=2)
    data.prepare_data()
    data.setup("fit")
    stream = iter(data.train_dataloader())
    counts = [int(next(stream).probe_count) for _ in range(8)]
    assert any(a != b for a, b in zip(counts[::2], counts[1::2], strict=True))
