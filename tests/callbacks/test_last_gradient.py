"""One copy of a step's gradient serves every probe, and never an old one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import normal
from helpers import metrics, quiet_trainer, recorder, tiny_gpt, tiny_stories
from lightning.pytorch import Callback
from torch import Tensor, nn

from mini_gpt_pl.callbacks import GradientAlignment, OptimizerAnatomy, Schedule, StreamingFisher
from mini_gpt_pl.callbacks.last_gradient import LastGradient
from mini_gpt_pl.geometry.directions.axes import BACKBONE, Axes
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection


def layers(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, LastGradient]:
    module = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)).to(dtype)
    for i, weight in enumerate(module.parameters()):
        weight.grad = normal(*weight.shape, seed=i).to(dtype)
    return module, LastGradient(ParameterSelection.of(module, r"(?P<group>\d)\.weight"))


def flat(module: nn.Module) -> Tensor:
    return torch.cat([torch.zeros_like(w).ravel() if w.grad is None else w.grad.ravel() for w in module.parameters()])


def test_it_is_copied_once_as_long_as_nothing_writes_into_it() -> None:
    module, last = layers()
    first = last.of(module)
    assert last.of(module) is first and torch.equal(first.values, flat(module))
    torch.nn.utils.clip_grad_norm_(module.parameters(), 0.1)
    clipped = last.of(module)
    assert clipped is not first and torch.equal(clipped.values, flat(module))
    assert not torch.equal(first.values, clipped.values)  # whoever still holds the old one keeps it
    assert last.of(module, scale=4.0) is not clipped  # a loss scaler divides its factor out without a trace
    next(module.parameters()).grad = None
    assert torch.equal(last.of(module).values, flat(module))
    last.forget()
    assert last.of(module) is not clipped


def test_it_meets_each_direction_once() -> None:
    module, last = layers()
    selection = last.selection
    rows = normal(2, selection.dim, seed=7).float()
    axes, others = (Axes(rows[k:], {BACKBONE: (0, 0)}, selection) for k in (0, 1))
    square, along = last.meet(module, axes)
    assert last.meet(module, axes)[0] is square
    direction = rows[0].double() / rows[0].double().norm()
    assert float(square[-1]) == pytest.approx(float(flat(module).double().square().sum()))
    assert float(along[0, -1]) == pytest.approx(float(flat(module).double() @ direction))
    assert not torch.equal(last.meet(module, others)[1], along)
    torch.nn.utils.clip_grad_norm_(module.parameters(), 0.1)
    assert float(last.meet(module, axes)[0][-1]) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_its_parts_have_the_width_of_the_gradients_and_outlive_them(dtype: torch.dtype) -> None:
    module, last = layers(dtype)
    before = flat(module).clone()
    parts = last.parts(module)
    torch.nn.utils.clip_grad_norm_(module.parameters(), 0.1)
    assert all(part.dtype == dtype for part in parts)
    assert torch.equal(torch.cat([part.ravel() for part in parts]), before)


def test_a_new_gradient_is_no_old_one_wherever_it_lies() -> None:
    """Of modules that call `loss.backward()` themselves no hook tells."""
    module, last = layers()
    for step in range(20):
        module.zero_grad()
        sum((float(step + 1) * weight).sum() for weight in module.parameters()).backward()  # type: ignore[union-attr]
        assert bool((last.of(module).values == step + 1).all())


class Counting(Callback):
    """Counts how often the gradient is flattened, by optimizer step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: dict[int, int] = {}
        self.step = 0
        original = ParameterSelection.gradients

        def counted(selection: ParameterSelection, module: nn.Module) -> Any:
            self.counts[self.step] = self.counts.get(self.step, 0) + 1
            return original(selection, module)

        monkeypatch.setattr(ParameterSelection, "gradients", counted)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        self.step = trainer.global_step + 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_probes_of_one_step_share_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int) -> None:
    count = Counting(monkeypatch)
    always = Schedule(every=1)
    owner = recorder(2)
    watch = [
        owner,
        GradientAlignment(always, None),
        StreamingFisher(always),
        OptimizerAnatomy(always, split=True),
        count,
    ]
    trainer = quiet_trainer(tmp_path, watch, max_steps=6, accumulate_grad_batches=accumulate)
    trainer.fit(tiny_gpt(), datamodule=tiny_stories())
    # Until there are two snapshots only the split asks; then a micro-batch's gradient is copied once.
    assert count.counts == {1: 1, 2: 1, **dict.fromkeys(range(3, 7), accumulate)}
    logged = metrics(tmp_path)
    assert all("alignment/trunk/gradient" in logged[step] for step in range(3, 7))
    assert owner.gradient._vector is None  # nothing is held behind the end
