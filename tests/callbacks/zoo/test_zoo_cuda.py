"""On a GPU: every probe leaves training alone, bit for bit, and sees each step as what it is."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DECAY, PEAK, metrics, quiet_trainer, same, tiny_gpt, tiny_stories
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.plugins import MixedPrecision
from test_all_probes import every_probe
from test_zoo_steps import Lengths, Observed
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from zoo import Plain, fit, trained

from mini_gpt_pl.callbacks import OptimizerAnatomy, Schedule, TrajectoryRecorder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU: dict[str, Any] = {"accelerator": "gpu", "devices": 1}


def half(init_scale: float) -> dict[str, Any]:
    """Settings of float16 with a loss scaler."""
    scaler = torch.amp.GradScaler("cuda", init_scale=init_scale)
    return {"plugins": [MixedPrecision("16-mixed", "cuda", scaler)]}


def train(
    folder: Path, callbacks: list[Callback], precision: str, fused: bool, compiled: bool
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Ten steps of the tiny GPT: its weights, and the random states afterwards."""
    optimizer = partial(AdamW, lr=PEAK, betas=(0.9, 0.95), weight_decay=DECAY, fused=fused)
    module = tiny_gpt(optimizer=optimizer, compile=compiled)
    settings = half(1024.0) if precision == "16-mixed" else {"precision": precision}
    settings |= {"limit_val_batches": 1.0, "val_check_interval": 4, "check_val_every_n_epoch": None}
    trainer = quiet_trainer(folder, callbacks, max_steps=10, deterministic="warn", **settings, **GPU)
    try:
        trainer.fit(module, datamodule=tiny_stories())
    finally:
        torch.use_deterministic_algorithms(False)
    return module.cpu().state_dict(), torch.get_rng_state(), torch.cuda.get_rng_state()


CASES = [
    pytest.param("32-true", False, False, id="fp32"),
    pytest.param("bf16-mixed", True, False, id="bf16-fused"),
    pytest.param("bf16-mixed", True, True, id="bf16-fused-compiled"),
    pytest.param("16-mixed", False, False, id="fp16"),
    pytest.param("16-mixed", True, False, id="fp16-fused"),
]


@pytest.mark.parametrize(("precision", "fused", "compiled"), CASES)
def test_all_probes_together_leave_training_alone(tmp_path: Path, precision: str, fused: bool, compiled: bool) -> None:
    bare = train(tmp_path / "bare", [], precision, fused, compiled)
    again = train(tmp_path / "again", [], precision, fused, compiled)
    assert same(bare, again), "training does not repeat itself here, so that nothing can be said about probes"
    probed = train(tmp_path / "probed", every_probe(), precision, fused, compiled)
    assert same(bare, probed)
    families = {name.split("/")[0] for row in metrics(tmp_path / "probed").values() for name in row}
    assert families >= {"backbone", "alignment", "fisher", "anatomy", "own", "commutator"}


def adamw(module: LightningModule, **settings: Any) -> AdamW:
    return AdamW(trained(module), lr=1e-2, weight_decay=0.1, **settings)


def momentum(module: LightningModule, **settings: Any) -> SGD:
    return SGD(trained(module), lr=1e-1, momentum=0.9, **settings)


OPTIMIZERS = [
    pytest.param(adamw, id="adamw"),
    pytest.param(partial(adamw, foreach=False), id="adamw-loop"),
    pytest.param(partial(adamw, fused=True), id="adamw-fused"),
    pytest.param(partial(adamw, capturable=True), id="adamw-capturable"),
    pytest.param(partial(momentum, fused=True), id="sgd-fused"),
]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_every_number_is_that_of_a_witness(tmp_path: Path, make: Any) -> None:
    Observed(lambda: Plain(make), tmp_path, max_steps=8, **GPU).check()


class Overflowing(Plain):
    """The third and the sixth step have no finite gradient."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.batch_loss(batch)
        return loss * float("inf") if self.global_step in (2, 5) else loss


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_without_a_finite_gradient_is_seen_as_left_out(tmp_path: Path, fused: bool) -> None:
    """A fused optimizer is called and leaves it out by itself; another one is not called at all."""
    recorder = TrajectoryRecorder(Plain.pattern, Schedule(every=1))
    probes = [recorder, Lengths(Schedule(every=1)), OptimizerAnatomy(Schedule(every=1))]
    make = partial(adamw, fused=fused)
    _, rows, _ = fit(lambda: Overflowing(make), probes, tmp_path, max_steps=8, **half(4.0), **GPU)
    trajectory = recorder.trajectory
    assert trajectory is not None and trajectory.steps == list(range(9))
    still = trajectory.gram().diagonal() < 1e-15  # what is left of roundings, where rows are stored in float32
    assert still.nonzero().flatten().tolist() == [3, 6]
    assert trajectory.survival[-1] == pytest.approx(0.999**6, rel=1e-12)
    assert trajectory.survival[3] == trajectory.survival[2] and trajectory.survival[6] == trajectory.survival[5]
    assert [step for step in rows if "anatomy/trunk/cos_update" in rows[step]] == [2, 4, 5, 7, 8]
    assert [step for step in rows if "length/trunk/update" in rows[step]] == [1, 2, 4, 5, 7, 8]


class Graphed(Plain):
    """Its forward and backward passes are replayed as CUDA graphs, whose memory the next step writes again."""

    def build(self) -> None:
        super().build()
        self.layers.compile(mode="reduce-overhead")


def test_replayed_graphs_give_every_number_of_a_witness(tmp_path: Path) -> None:
    Observed(lambda: Graphed(adamw), tmp_path, max_steps=10, **GPU).check()


def compiled_step(module: LightningModule) -> Optimizer:
    """AdamW whose `step` is compiled, its rate a tensor so that a schedule makes no new graph."""
    optimizer = AdamW(trained(module), lr=torch.tensor(1e-2, device=module.device), weight_decay=0.1)
    optimizer.step = torch.compile(optimizer.step, fullgraph=False)  # type: ignore[method-assign]
    return optimizer


def test_a_compiled_step_gives_every_number_of_a_witness(tmp_path: Path) -> None:
    Observed(lambda: Plain(compiled_step), tmp_path, max_steps=8, **GPU).check()
