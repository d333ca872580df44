"""On two GPUs, under DDP, `one_sum` and FSDP2: every probe leaves training alone, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import metrics, quiet_trainer, same, tiny_gpt, tiny_stories
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from scripts import run_in_full
from test_all_probes import every_probe
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

KINDS = ("ddp", "one_sum", "fsdp")


class Shared:  # a mixin, as the class under it is the tests' own
    """Shared out block by block, then the rest, in the precision that it has."""

    def configure_model(self: Any) -> None:
        if not hasattr(self.gpt, "reshard"):
            mesh = self.device_mesh["data_parallel"]
            for block in self.gpt.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.gpt, mesh=mesh)


def train_ranks(folder: Path, kind: str, watched: bool, precision: str) -> None:
    """Five steps of two micro-batches on two ranks, with every probe or none."""
    callbacks = every_probe(whole_weights=kind != "fsdp") if watched else []
    settings: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":  # a power of two that does not overflow on these weights
        settings = {"plugins": [MixedPrecision("16-mixed", "cuda", torch.amp.GradScaler("cuda", init_scale=1024.0))]}
    module, strategy = tiny_gpt(), kind
    if kind == "fsdp":
        settings["strategy"] = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        module.__class__ = type("SharedGPT", (Shared, type(module)), {})
    else:
        settings["strategy"] = strategy
    settings |= {"limit_val_batches": 1.0, "val_check_interval": 4, "check_val_every_n_epoch": None}
    settings |= {"accelerator": "gpu", "devices": 2, "deterministic": "warn"}
    trainer = quiet_trainer(folder, callbacks, max_steps=5, accumulate_grad_batches=2, **settings)
    trainer.fit(module, datamodule=tiny_stories(batch_size=2))
    last = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in module.named_parameters()}
    if trainer.is_global_zero:
        torch.save({name: p.detach().cpu() for name, p in last.items()}, folder / "last.pt")


SCRIPT = """
import sys
from pathlib import Path
from test_two_gpus import train_ranks

precision, kind = sys.argv[2:4]
for watched in (False, True):
    train_ranks(Path(sys.argv[1]) / str(watched), kind, watched, precision)
"""


@pytest.mark.parametrize(
    ("kind", "precision"),
    [(kind, precision) for precision in ("32-true", "bf16-mixed") for kind in KINDS]
    + [("ddp", "16-mixed"), ("one_sum", "16-mixed")],
)
def test_all_probes_on_two_gpus_leave_training_alone(tmp_path: Path, kind: str, precision: str) -> None:
    run_in_full(SCRIPT, tmp_path, precision, kind)
    bare, watched = (torch.load(tmp_path / str(flag) / "last.pt", weights_only=True) for flag in (False, True))
    assert same(bare, watched)
    families = {name.split("/")[0] for row in metrics(tmp_path / "True").values() for name in row}
    assert families >= {"backbone", "alignment", "fisher", "anatomy", "own"}
