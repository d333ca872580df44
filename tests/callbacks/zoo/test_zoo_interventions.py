"""What an intervention takes for decay, whatever the optimizer is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import one_line_error
from helpers import same
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader
from zoo import Derived, Lion, Lookahead, Plain, ScheduleFree, Trusted, batches, fit, trained

from mini_gpt_pl.callbacks import SubspaceIntervention

ERASED: dict[str, tuple[Any, float]] = {
    "adamw": (AdamW, 0.95),
    "lion": (Lion, 0.95),
    "adafactor": (torch.optim.Adafactor, 0.95),
    "schedule-free": (ScheduleFree, 0.95),  # in its first step
    "adam, L2": (torch.optim.Adam, 1.0),  # part of the update
    "nadam, L2": (torch.optim.NAdam, 1.0),
    "a trust ratio": (Trusted, 1.0),
    "own, derived from AdamW": (Derived, 0.9),
}


def module_of(make: Any) -> Plain:
    return Plain(lambda module: make(trained(module), lr=0.1, weight_decay=0.5))


@pytest.mark.parametrize("name", ERASED)
def test_an_erased_update_leaves_what_decay_leaves(tmp_path: Path, name: str) -> None:
    make, left = ERASED[name]
    after, _, _ = fit(lambda: module_of(make), [SubspaceIntervention(0.0, 0.0, space="update")], tmp_path, max_steps=1)
    torch.manual_seed(0)
    for moved, start in zip(after.parameters(), module_of(make).parameters(), strict=True):
        torch.testing.assert_close(moved, left * start, rtol=1e-5, atol=0.0)


class Elsewhere(Lion):
    """Keeps its decay where nobody can switch it off."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["weight_decay"] = 0.5
        return super().step(closure)


def test_a_decay_that_is_not_known_or_not_switched_off_is_refused(tmp_path: Path) -> None:
    arms = [
        (SubspaceIntervention(0.0, 0.0, space="update"), lambda p, **_: Lookahead(SGD(p, lr=0.1)), "holds a Tensor"),
        (SubspaceIntervention(1.0, 1.0, decay="none"), Elsewhere, "decays with a weight_decay of 0"),
    ]
    for arm, make, words in arms:
        with one_line_error(words):
            fit(lambda make=make: module_of(make), [arm], tmp_path, max_steps=2)  # type: ignore[misc]


def test_a_resumed_intervention_knows_what_decay_takes(tmp_path: Path) -> None:
    def run(name: str, epochs: int, *more: Callback, resume: Path | None = None) -> dict[str, torch.Tensor]:
        quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        arm = SubspaceIntervention(0.5, 0.5, space="update")
        folder = tmp_path / name
        trainer = Trainer(
            callbacks=[arm, *more], max_epochs=epochs, accelerator="cpu", default_root_dir=folder, **quiet
        )
        torch.manual_seed(0)
        module = module_of(ScheduleFree)
        trainer.fit(module, DataLoader(batches().dataset, 8), ckpt_path=resume)
        return module.state_dict()

    run("cut", 1, ModelCheckpoint(tmp_path, "half"))
    assert same(run("whole", 2), run("rest", 2, resume=tmp_path / "half.ckpt"))
