"""Every probe at once: training must not notice, in any precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import metrics, probes, quiet_trainer, same, tiny_gpt, tiny_stories
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from callbacks import CostControl, FisherProbe, OptimizerAnatomy, Schedule, StreamingFisher, SwitchingProbe


def every_probe() -> list[Callback]:
    return [
        *probes(every=2),
        SwitchingProbe(prominence=0.0),
        StreamingFisher(Schedule(every=1)),
        FisherProbe(Schedule(every=4), kinds=("batch_mean", "per_sample", "monte_carlo"), batches=2),
        OptimizerAnatomy(Schedule(every=1), counterfactual_beta2=[0.5], split=True),
        CostControl(warmup=1),
    ]


def train(folder: Path, callbacks: list[Callback], accumulate: int, precision: str) -> tuple[dict[str, Tensor], Tensor]:
    settings: dict[str, Any] = {"precision": precision}
    if precision == "16-scaled":
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        settings = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
    module = tiny_gpt()
    trainer = quiet_trainer(
        folder,
        callbacks,
        max_steps=10,
        accumulate_grad_batches=accumulate,
        limit_val_batches=1.0,
        val_check_interval=2 * accumulate,
        check_val_every_n_epoch=None,
        **settings,
    )
    trainer.fit(module, datamodule=tiny_stories())
    return module.state_dict(), torch.get_rng_state()


@pytest.mark.parametrize(("accumulate", "precision"), [(1, "32-true"), (2, "32-true"), (2, "bf16-mixed")])
def test_all_probes_together_leave_training_alone(tmp_path: Path, accumulate: int, precision: str) -> None:
    bare, bare_rng = train(tmp_path / "bare", [], accumulate, precision)
    probed, probed_rng = train(tmp_path / "probed", every_probe(), accumulate, precision)
    assert same(bare, probed)
    assert torch.equal(bare_rng, probed_rng)
    families = {name.split("/")[0] for row in metrics(tmp_path / "probed").values() for name in row}
    assert families >= {"backbone", "alignment", "fisher", "anatomy", "overhead", "probe", "val", "train"}


def test_a_loss_scaler_changes_neither_training_nor_what_is_measured(tmp_path: Path) -> None:
    """float16 with a scaler of 1024: projections and norms are those of the unscaled gradient."""
    bare, _ = train(tmp_path / "bare", [], 2, "16-scaled")
    probed, _ = train(tmp_path / "probed", every_probe(), 2, "16-scaled")
    assert same(bare, probed)
    train(tmp_path / "full", every_probe(), 2, "32-true")
    scaled, full = metrics(tmp_path / "probed"), metrics(tmp_path / "full")
    for name in ("alignment/trunk/bias", "fisher/trunk/streaming/trace", "anatomy/trunk/cos_update"):
        step = min(step for step, row in full.items() if name in row)
        assert scaled[step][name] == pytest.approx(full[step][name], rel=0.1), name
