"""The recorded weights are the trained ones, in the width that they have; or the run is refused at its start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import one_line_error
from helpers import same
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from witness import Witness
from zoo import BatchNorm, Complex, Parametrized, Plain, batches, fit, trained

from mini_gpt_pl.callbacks import (
    CommutatorProbe,
    FisherProbe,
    GradientAlignment,
    Kick,
    OptimizerAnatomy,
    Schedule,
    SubspaceIntervention,
    TrajectoryRecorder,
)
from mini_gpt_pl.geometry.path.trajectory import Trajectory


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
    settings: dict[str, Any] = {"max_steps": -1, "max_epochs": 2, "val_check_interval": 4}
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


def test_a_weight_that_is_exchanged_while_training_is_followed(tmp_path: Path) -> None:
    class Exchanged(Plain):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                for layer in (self.layers[0], self.layers[2]):
                    weight: Any = layer.weight
                    layer.weight = nn.Parameter(weight.detach().clone())
                self.trainer.optimizers[0].param_groups[0]["params"] = list(self.parameters())

    recorder = TrajectoryRecorder(Plain.pattern, Schedule(every=5))
    fit(Exchanged, [recorder], tmp_path, max_steps=-1, max_epochs=2)
    assert recorder.trajectory is not None and recorder.trajectory.steps == [0, 5, 10, 15, 20, 24]
    assert recorder.trajectory.survival[-1] == pytest.approx(0.999**24, rel=1e-12)


class Bounded(Plain):
    """An embedding whose forward shortens the rows that it reads."""

    pattern = r"(?P<group>table|head)\.weight"

    def build(self) -> None:
        self.table, self.head = nn.Embedding(8, 6, max_norm=0.5), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.table(((x[:, :3] > 0) * torch.tensor([1, 2, 4])).sum(1)))
        return out


class Clamped(Plain):
    """A forward that clamps its weights."""

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.layers[0].weight
        with torch.no_grad():
            weight.clamp_(-0.1, 0.1)
        return super().forward(x)


def test_a_forward_that_writes_its_weights_is_measured_without_a_trace_or_refused(tmp_path: Path) -> None:
    def run(module: Any, *probes: Callback) -> tuple[Any, dict[int, dict[str, float]]]:
        callbacks = [TrajectoryRecorder(module.pattern, Schedule(every=2)), *probes] if probes else []
        found, rows, _ = fit(module, callbacks, tmp_path / f"{module.__name__}-{len(list(tmp_path.iterdir()))}")
        return found.state_dict(), rows

    for module in (Bounded, Clamped):
        probed, rows = run(module, GradientAlignment(Schedule(every=1), None), OptimizerAnatomy(Schedule(every=1)))
        assert same(run(module)[0], probed) and "alignment/trunk/gradient" in rows[12]
    probed, rows = run(Bounded, FisherProbe(Schedule(every=4), batches=2))
    assert same(run(Bounded)[0], probed) and "fisher/trunk/batch_mean/trace" in rows[12]
    with one_line_error("a forward of Clamped writes into its weights"):
        run(Clamped, FisherProbe(Schedule(every=4), batches=2))
    with one_line_error("no derivatives by them"):
        run(Bounded, CommutatorProbe(Schedule(every=4), samples=1, directions=0))


@pytest.mark.parametrize("finder", [LearningRateFinder(num_training_steps=5, update_attr=False), None])
def test_a_search_before_training_leaves_no_trace_in_the_path(finder: Any, tmp_path: Path) -> None:
    class Searched(Plain):
        lr = 1e-2
        size = 2

        def train_dataloader(self) -> Any:
            return DataLoader(batches().dataset, self.size)

    recorder = TrajectoryRecorder(Plain.pattern, Schedule(every=2))
    search = finder or BatchSizeFinder("power", 1, max_trials=1, batch_arg_name="size")
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(callbacks=[search, recorder], max_steps=4, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    trainer.fit(Searched())
    assert recorder.trajectory is not None and recorder.trajectory.steps == [0, 2, 4]


def test_a_path_that_a_run_does_not_go_on_with_is_kept_beside_the_new_one(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    def run(pattern: str, steps: int, resume: Path | None = None) -> list[int]:
        recorder = TrajectoryRecorder(pattern, Schedule(every=2))
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=6, save_top_k=-1, auto_insert_metric_name=False)
        settings: dict[str, Any] = {"max_steps": steps, "logger": False, "enable_progress_bar": False}
        trainer = Trainer(callbacks=[recorder, keep], accelerator="cpu", default_root_dir=tmp_path, **settings)
        trainer.fit(Plain(), batches(), ckpt_path=resume)
        if resume is None:  # and again, with the same trainer
            trainer.fit_loop.epoch_loop.max_steps = steps + 4
            trainer.fit(Plain(), batches())
        assert recorder.trajectory is not None
        return recorder.trajectory.steps

    assert run(Plain.pattern, 6) == [6, 8, 10]
    first = tmp_path / "earlier" / "000000006"
    assert Trajectory.load(first / "trajectory.safetensors").steps == [0, 2, 4, 6]
    again = load_file(first / "snapshots" / "step_000000006.safetensors")
    for _ in range(2):
        assert run(r"layers\.2\.weight", 8, tmp_path / "6.ckpt") == [6, 8]
    kept = [Trajectory.load(tmp_path / "earlier" / f"000000006-{k}" / "trajectory.safetensors").steps for k in (2, 3)]
    assert kept == [[6, 8, 10], [6, 8]]
    assert again.keys() == load_file(first / "snapshots" / "step_000000006.safetensors").keys()
    assert Trajectory.load(tmp_path / "trajectory.safetensors").steps == [6, 8]
    assert len([w for w in recwarn if "is kept in" in str(w.message)]) == 3


def test_lazy_weights_are_refused_before_the_first_step(tmp_path: Path) -> None:
    class Lazy(Plain):
        def build(self) -> None:
            self.layers = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(3))

    with one_line_error("has no shape yet"):
        fit(Lazy, [TrajectoryRecorder(Lazy.pattern, Schedule(every=2))], tmp_path)
