"""The recorded weights are the trained ones, in the width that they have; or the run is refused at its start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import one_line_error
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging
from safetensors.torch import load_file
from torch import Tensor, nn
from witness import Witness
from zoo import BatchNorm, Complex, Parametrized, Plain, batches, fit, trained

from mini_gpt_pl.callbacks import Kick, Schedule, SubspaceIntervention, TrajectoryRecorder


class Averages(Callback):
    """Puts an exponential average in place of the weights for each validation, and for good at the end."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.average = [p.detach().clone() for p in pl_module.parameters()]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        for held, p in zip(self.average, pl_module.parameters(), strict=True):
            held.lerp_(p.detach(), 0.2)

    def swap(self, module: LightningModule) -> None:
        with torch.no_grad():
            for held, p in zip(self.average, module.parameters(), strict=True):
                value = p.clone()
                p.copy_(held)
                held.copy_(value)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.swap(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.swap(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.swap(pl_module)


class Evaluated(Plain):
    """Has a validation in the middle of an epoch."""

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def val_dataloader(self) -> Any:
        return batches()


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("averaging", [Averages, lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=1)])
def test_averages_in_place_of_the_weights_are_not_recorded(averaging: Any, first: bool, tmp_path: Path) -> None:
    recorder, witness = TrajectoryRecorder(Plain.pattern, Schedule(every=5)), Witness(Plain.pattern)
    order = [averaging(), recorder] if first else [recorder, averaging()]
    settings = {"max_steps": -1, "max_epochs": 2, "val_check_interval": 4}
    fit(Evaluated, [*order, witness], tmp_path, **settings)
    assert recorder.trajectory is not None and recorder.trajectory.steps == [0, 5, 10, 15, 20, 24]
    check_rows(tmp_path, witness, [5, 10, 15, 20, 24])


def check_rows(folder: Path, witness: Witness, steps: list[int], tolerance: float = 1e-6) -> None:
    """Compare the weights that the snapshots add up to with the true ones."""
    total = torch.zeros(())
    for step in [0, *steps]:
        row = load_file(folder / "snapshots" / f"step_{step:09d}.safetensors")
        names = sorted(row)
        total = total + torch.cat([row[name].double().flatten() for name in names])
        true = witness.start if step == 0 else witness.steps[step - 1].after
        torch.testing.assert_close(total, true, rtol=tolerance, atol=tolerance)


def test_averages_that_stay_before_the_end_leave_the_end_of_the_path_out(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """With batch norm, Lightning's averaging takes another epoch with its averages in place."""
    recorder = TrajectoryRecorder(BatchNorm.pattern, Schedule(every=5))
    callbacks = [recorder, StochasticWeightAveraging(1e-2, swa_epoch_start=1)]
    fit(BatchNorm, callbacks, tmp_path, max_steps=-1, max_epochs=2)
    assert recorder.trajectory is not None and recorder.trajectory.steps == [0, 5, 10, 15, 20]
    said = [str(warning.message) for warning in recwarn if "in place of the trained ones" in str(warning.message)]
    assert len(said) == 1


def test_rows_keep_the_width_of_the_weights(tmp_path: Path) -> None:
    class Fine(Plain):
        def batch_loss(self, batch: Any) -> Tensor:
            return super().batch_loss([batch[0].double(), batch[1]])

    recorder, witness = TrajectoryRecorder(Plain.pattern, Schedule(every=2)), Witness(Plain.pattern)
    module = lambda: Fine(lambda m: torch.optim.Adam(trained(m), lr=1e-9))  # noqa: E731
    _, rows, _ = fit(module, [recorder, witness], tmp_path, precision="64-true")
    assert rows[12]["backbone/trunk/pc1"] == pytest.approx(witness.pc1(2, 12), rel=1e-9)
    assert rows[12]["alignment/trunk/update"] == pytest.approx(witness.update_alignment(2, 12), rel=1e-6)
    sketched = TrajectoryRecorder(Plain.pattern, Schedule(every=2), sketch=64)
    _, rows, _ = fit(module, [sketched], tmp_path / "sketched", precision="64-true")
    assert rows[12]["backbone/trunk/pc1"] == pytest.approx(witness.pc1(2, 12), rel=1e-6)  # wide enough to be exact


def test_complex_weights_are_recorded_as_pairs(tmp_path: Path) -> None:
    recorder, witness = TrajectoryRecorder(Complex.pattern, Schedule(every=2)), Witness(Complex.pattern)
    fit(Complex, [recorder, witness], tmp_path)
    assert recorder.selection.dims == (96, 24)
    check_rows(tmp_path, witness, [2, 4, 6, 8, 10, 12])
    for callback in (Kick("gaussian", length=0.1), SubspaceIntervention(0.5, 0.5)):
        with one_line_error("complex weights"):
            fit(Complex, [callback], tmp_path / "refused")


def test_weights_that_are_pruned_while_training_stay_the_same_weights(tmp_path: Path) -> None:
    recorder = TrajectoryRecorder(Plain.pattern, Schedule(every=5))
    pruning = ModelPruning("l1_unstructured", amount=0.3)
    fit(Plain, [recorder, pruning], tmp_path, max_steps=-1, max_epochs=2)
    assert recorder.trajectory is not None and recorder.trajectory.steps == [0, 5, 10, 15, 20, 24]
    assert recorder.selection.names == ("layers.0.weight", "layers.2.weight")


def test_a_parametrized_weight_is_selected_by_its_own_name(tmp_path: Path) -> None:
    class Both(Parametrized):
        pattern = Plain.pattern

    recorder = TrajectoryRecorder(Both.pattern, Schedule(every=4))
    fit(Both, [recorder], tmp_path)
    stem = "layers.0.parametrizations.weight.original"
    assert recorder.selection.names == (f"{stem}0", f"{stem}1", "layers.2.weight")
    assert recorder.selection.groups == ("layers.0", "layers.2")


def test_lazy_weights_are_refused_before_the_first_step(tmp_path: Path) -> None:
    class Lazy(Plain):
        def build(self) -> None:
            self.layers = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(3))

    with one_line_error("has no shape yet"):
        fit(Lazy, [TrajectoryRecorder(Lazy.pattern, Schedule(every=2))], tmp_path)
