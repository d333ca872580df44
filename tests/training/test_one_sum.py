"""The strategy `one_sum`: what it leaves on the gradients, when, and what it does without one.

That two ranks under it train what one rank trains with twice the batch, `test_distributed.py` shows.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import quiet_trainer, tiny_gpt, tiny_stories
from lightning.pytorch import Callback, LightningModule, Trainer
from scripts import run_in_full, run_script
from torch import Tensor, nn

from mini_gpt_pl.training.one_sum import OneSumStrategy

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)


class Seen(Callback):
    """Write down the length of the gradient behind each backward pass, and the first weights."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.found: dict[str, list[float]] = {"gradients": [], "weights": []}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(trainer.strategy, OneSumStrategy)
        assert trainer.strategy.model is pl_module  # nothing wraps it
        self.found["weights"] = [float(parameter.sum()) for parameter in pl_module.parameters()]

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        norms = [p.grad.double().norm() for p in pl_module.parameters() if p.grad is not None]
        self.found["gradients"].append(float(torch.stack(norms).norm()))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (self.folder / f"rank_{trainer.global_rank}.json").write_text(json.dumps(self.found))


def fit(folder: Path, kind: str) -> None:
    """Train on this rank: two micro-batches a step, from weights of the rank's own."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    module = tiny_gpt(seed=1 + rank)
    if kind == "unused":
        module.unused = nn.Parameter(torch.zeros(3))
    settings: dict[str, Any] = {"strategy": "one_sum", "devices": 2, "accumulate_grad_batches": 2}
    trainer = quiet_trainer(folder, [Seen(folder)], max_steps=2, **settings)
    trainer.fit(module, datamodule=tiny_stories(batch_size=2))


# Lightning starts this file again for the second rank.
SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from test_one_sum import fit

fit(Path(sys.argv[1]), sys.argv[2])
"""


def test_callbacks_see_what_the_ranks_share(tmp_path: Path) -> None:
    """Ranks begin with rank 0's weights, gather gradients of their own, and share the mean before a probe looks."""
    run_in_full(SCRIPT, tmp_path, "plain")
    one, two = (json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in (0, 1))
    assert one["weights"] == two["weights"]
    (a1, a2, a3, a4), (b1, b2, b3, b4) = one["gradients"], two["gradients"]
    assert a1 != b1 and a3 != b3  # of the first micro-batch: each rank's own
    assert a2 == b2 and a4 == b4


def test_a_parameter_without_gradient_is_named(tmp_path: Path) -> None:
    done = run_script(SCRIPT, tmp_path, "unused")
    assert done.returncode != 0
    assert "unused got no gradient, and the strategy one_sum takes one of every parameter: use" in done.stderr


def test_a_frozen_parameter_needs_none() -> None:
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    layer(torch.ones(1, 2)).sum().backward()
    strategy = OneSumStrategy()
    strategy.model = layer
    found: list[Tensor] = list(strategy._gradients())
    assert len(found) == 1 and found[0] is layer.weight.grad
