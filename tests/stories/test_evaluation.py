"""Evaluation and measurement keep the device busy: nothing is cut, compiled or waited for twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import metrics, quiet_trainer, recorder, same, tiny_gpt, tiny_stories
from lightning.pytorch import Callback, LightningModule, Trainer
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from mini_gpt_pl.callbacks import FisherProbe, Schedule
from mini_gpt_pl.callbacks.fixed_gradients import FixedGradients, Kind
from mini_gpt_pl.geometry.curvature import fisher
from mini_gpt_pl.geometry.directions.axes import Axes
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection
from mini_gpt_pl.stories.gpt import TRUNK_PATTERN


class NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU: values, and shapes that depend on values."""

    FORBIDDEN = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal", "aten.unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith(self.FORBIDDEN):
            raise AssertionError(f"{func} waits for the device")
        if str(func) == "aten.index.Tensor" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            raise AssertionError("indexing by a mask waits for the device")
        return func(*args, **(kwargs or {}))


def _fit(folder: Path, callbacks: list[Callback], **settings: Any) -> LightningModule:
    module = tiny_gpt()
    module.gpt.compile(backend="eager")
    trainer = quiet_trainer(folder, callbacks, max_steps=4, limit_val_batches=1.0, val_check_interval=2, **settings)
    trainer.fit(module, datamodule=tiny_stories())
    return module


def test_training_and_measuring_share_a_graph_and_all_evaluation_batches_another(tmp_path: Path) -> None:
    """Batches of 4, 6 and 2 sequences, an unequal number of rows in each; a probe that takes gradients."""
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    _fit(tmp_path, [recorder(2), FisherProbe(Schedule(every=2), batches=2)])
    assert counters["stats"]["unique_graphs"] - before == 2
    assert {"val/loss", "probe/p_ood", "fisher/trunk/batch_mean/trace"} <= set().union(*metrics(tmp_path).values())


def test_an_evaluation_step_does_not_wait() -> None:
    module, data = tiny_gpt().eval(), tiny_stories()
    data.setup("validate")
    for index, loader in enumerate(data.val_dataloader()):
        for number, batch in enumerate(loader):
            with NoWaiting(), torch.inference_mode():
                module.validation_step(batch, number, index)


@pytest.mark.parametrize("kind", ["batch_mean", "per_sample", "monte_carlo"])
def test_a_fisher_measurement_does_not_wait(kind: Kind, tmp_path: Path) -> None:
    module, data = tiny_gpt(), tiny_stories()
    trainer = quiet_trainer(tmp_path, max_steps=1)
    trainer.fit(module, datamodule=data)
    selection = ParameterSelection.of(module, TRUNK_PATTERN)
    batches = [batch for batch, _ in zip(data.train_dataloader(), range(3), strict=False)]
    gradients = FixedGradients(trainer, module, selection, batches, kind)
    axes = Axes(torch.ones(2, selection.dim), {"backbone": (0, 1)}, selection)
    with NoWaiting():
        fisher.survey(gradients, 3, axes, block=2, gram=True)


def test_what_waits_is_refused() -> None:
    values = torch.arange(3.0)
    for wait in (lambda: values.sum().item(), lambda: values[values > 1], lambda: bool(values.any())):
        with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
            wait()


def test_evaluation_batches_are_cut_once() -> None:
    data = tiny_stories()
    data.setup("validate")
    hashes = data.validation_hashes
    first, again = ([batch for loader in data.val_dataloader() for batch in loader] for _ in range(2))
    assert all(a is b for a, b in zip(first, again, strict=True))
    assert data.validation_hashes == hashes
    other = tiny_stories()
    other.setup("validate")
    assert same(list(map(list, first)), [list(batch) for loader in other.val_dataloader() for batch in loader])


class Interrupted(Exception):
    """Stands for whatever ends an evaluation in its middle."""


class Interrupts(Callback):
    """Ends the first evaluation after one batch."""

    def __init__(self) -> None:
        self.done = False

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if not self.done:
            self.done = True
            raise Interrupted


def test_an_evaluation_that_was_broken_off_does_not_count(tmp_path: Path) -> None:
    module, data, folders = tiny_gpt(), tiny_stories(), (tmp_path / "a", tmp_path / "b")
    trainers = [quiet_trainer(folders[0], [Interrupts()], limit_val_batches=1.0)]
    trainers.append(quiet_trainer(folders[1], limit_val_batches=1.0))
    with pytest.raises(Interrupted):
        trainers[0].validate(module, datamodule=data)
    trainers[0].validate(module, datamodule=data, verbose=False)
    trainers[1].validate(tiny_gpt(), datamodule=tiny_stories(), verbose=False)
    found, expected = (trainer.callback_metrics for trainer in trainers)
    assert found == expected and "probe/p_ood" in found
