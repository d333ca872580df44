"""Every probe at once: training must not notice, in any precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import metrics, probes, quiet_trainer, same, tiny_gpt, tiny_stories
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from scripts import run_in_full
from test_sharded import Sharded
from tolerances import dims_of, tolerance
from torch import Tensor
from torch.distributed.tensor import DTensor

from mini_gpt_pl.callbacks import (
    CalibratedProbe,
    CommutatorProbe,
    CostControl,
    DataWait,
    FisherProbe,
    OptimizerAnatomy,
    Schedule,
    StreamingFisher,
    SwitchingProbe,
    View,
)
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.geometry.vectors.alignment import cosines
from mini_gpt_pl.geometry.vectors.selection import Vector


class Own(CalibratedProbe):
    """A reader's probe that asks for everything and remembers a vector."""

    needs = ("gradient", "update", "backbone")

    def measure(self, seen: View) -> dict[str, Tensor]:
        found = {"update": seen.backbone_cosines(seen.update), "norm": seen.gradient.dots(seen.gradient).sum()}
        before = self.memory.get("gradient")
        return found | ({"turn": cosines(seen.gradient, before)} if isinstance(before, Vector) else {})

    def remember(self, seen: View) -> None:
        self.memory["gradient"] = seen.gradient


def every_probe(whole_weights: bool = True) -> list[Callback]:
    """All of them; some need all of the weights on each rank."""
    whole = CommutatorProbe(Schedule(every=4), samples=2, size=2, optimizer_step=True)
    return [
        *([whole] if whole_weights else []),
        *probes(every=2),
        SwitchingProbe(prominence=0.0),
        StreamingFisher(Schedule(every=1)),
        FisherProbe(Schedule(every=4), kinds=("batch_mean", "per_sample", "monte_carlo"), batches=2),
        OptimizerAnatomy(Schedule(every=1), counterfactual_beta2=[0.5], split=True),
        Own(Schedule(every=1), draws=2),
        CostControl(warmup=1),
        DataWait(warmup=1),
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
    assert families >= {
        "backbone",
        "alignment",
        "fisher",
        "anatomy",
        "overhead",
        "own",
        "probe",
        "val",
        "train",
        "commutator",
    }


def test_a_loss_scaler_changes_neither_training_nor_what_is_measured(tmp_path: Path) -> None:
    """float16 with a scaler of 1024: projections and norms are those of the unscaled gradient."""
    bare, _ = train(tmp_path / "bare", [], 2, "16-scaled")
    probed, _ = train(tmp_path / "probed", every_probe(), 2, "16-scaled")
    assert same(bare, probed)
    train(tmp_path / "full", every_probe(), 2, "32-true")
    scaled, full = metrics(tmp_path / "probed"), metrics(tmp_path / "full")
    for name in ("alignment/trunk/bias", "fisher/trunk/streaming/trace", "anatomy/trunk/cos_update", "own/trunk/norm"):
        step = min(step for step, row in full.items() if name in row)
        assert scaled[step][name] == pytest.approx(full[step][name], rel=0.1), name


# ---------------------------------------------------------------------------------------------------- two ranks


def train_ranks(folder: Path, kind: str, watched: bool) -> None:
    """Five steps of two micro-batches on two ranks (or one, with twice the batch), in float64, with every probe."""
    callbacks = every_probe(whole_weights=kind != "fsdp") if watched else []
    settings: dict[str, Any] = {"precision": "64-true"}
    module = tiny_gpt()
    if kind in ("ddp", "one_sum"):
        settings |= {"strategy": kind, "devices": 2}
    if kind == "fsdp":
        settings = {"strategy": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1), "devices": 2}
        module.__class__ = type("SharedGPT", (Sharded, type(module)), {})
    settings |= {"limit_val_batches": 1.0, "val_check_interval": 4, "check_val_every_n_epoch": None}
    trainer = quiet_trainer(folder, callbacks, max_steps=5, accumulate_grad_batches=2, **settings)
    trainer.fit(module, datamodule=tiny_stories(batch_size=4 if kind == "one" else 2))
    last = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in module.named_parameters()}
    if trainer.is_global_zero:
        torch.save({name: p.detach() for name, p in last.items()}, folder / "last.pt")


SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from test_all_probes import train_ranks

for kind in ("ddp", "one_sum", "fsdp"):
    for watched in (False, True):
        train_ranks(Path(sys.argv[1]) / f"{kind}_{watched}", kind, watched)
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All kinds of runs on two ranks, watched and not, and a watched one on one rank."""
    folder = tmp_path_factory.mktemp("two")
    run_in_full(SCRIPT, folder)  # once: the ranks' imports take longer than the runs
    train_ranks(folder / "one", "one", watched=True)
    return folder


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("kind", ["ddp", "one_sum", "fsdp"])
def test_all_probes_on_two_ranks(two_ranks: Path, kind: str) -> None:
    """They leave training alone, none waits for another rank for ever, and most numbers are those of one rank."""
    bare, watched = (torch.load(two_ranks / f"{kind}_{flag}" / "last.pt", weights_only=True) for flag in (False, True))
    assert same(bare, watched)
    alone, ranks = metrics(two_ranks / "one"), metrics(two_ranks / f"{kind}_True")
    # On weights that ranks share, each rank samples coordinates of its own for these.
    sampled = ("coherence", "snr", "preconditioner", "update_size", "momentum_variance", "amplification")
    drawn = ("_null", "_null_sd", "_excess")  # each rank draws for the coordinates that it holds
    families = ("backbone/", "alignment/", "anatomy/", "switching/", "fisher/trunk/streaming/", "own/", "commutator/")
    dims = dims_of(Trajectory.load(two_ranks / "one" / "trajectory.safetensors"))
    compared = 0
    for step, row in ranks.items():
        for name, value in row.items():
            if kind == "fsdp" and any(f"/{quantity}" in name for quantity in sampled):
                continue
            if kind == "fsdp" and name.startswith("own/") and name.endswith(drawn):
                continue
            if name.startswith(families) and "unexplained" not in name:
                expected = alone[step][name]
                error = tolerance(name, expected, dims)
                assert value == pytest.approx(expected, rel=1e-6, abs=error), (step, name)
                compared += 1
    assert compared > 200 and "own/trunk/turn" in ranks[5]
    assert any(name.startswith("fisher/trunk/batch_mean/q_backbone") for row in ranks.values() for name in row)
