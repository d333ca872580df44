"""One step is one step of the optimizer that trains the recorded weights, whoever calls what how often."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from conftest import one_line_error
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor
from torch.nn import functional as F
from torch.optim import SGD, AdamW
from witness import Seen, Witness, flat
from zoo import Gan, Lookahead, Manual, Plain, Sharp, Silent, batches, fit, trained

from mini_gpt_pl.callbacks import (
    CalibratedProbe,
    CommutatorProbe,
    FisherProbe,
    GradientAlignment,
    OptimizerAnatomy,
    Schedule,
    StreamingFisher,
    TrajectoryRecorder,
    View,
)


class Lengths(CalibratedProbe):
    """The gradient and the update as a reader's probe is given them."""

    family = "length"
    needs = ("gradient", "update")

    def measure(self, seen: View) -> Mapping[str, Tensor | float]:
        both = {"gradient": seen.gradient, "update": seen.update}
        return {name: vector.dots(vector).sum().sqrt() for name, vector in both.items()}


class Observed:
    """A run with probes at every step, a snapshot at every second, and a witness."""

    ladder = True  # whether the optimizer moves by the gradient that is at the weights

    def __init__(self, module: Callable[[], Any], folder: Path, *others: Callback, **settings: Any) -> None:
        pattern = module().pattern
        self.recorder = TrajectoryRecorder(pattern, Schedule(every=2))
        probes = [GradientAlignment(Schedule(every=1), None), OptimizerAnatomy(Schedule(every=1))]
        self.witness = Witness(pattern)
        more = [StreamingFisher(Schedule(every=1)), Lengths(Schedule(every=1), draws=1)]
        _, self.rows, _ = fit(module, [*others, *probes, self.witness, *more, self.recorder], folder, **settings)

    def check(self, numbers: list[int] | None = None) -> None:
        """Compare every number of every step.

        Args:
            numbers: The row of each step of these weights; 1, 2, ... for None.
        """
        steps, rows = self.witness.steps, self.rows
        numbers = numbers or list(range(1, len(steps) + 1))
        assert len(numbers) == len(steps) >= 4
        assert self.recorder.trajectory is not None
        taken = [numbers[k - 1] for k in range(2, len(steps) + 1, 2)]
        last = [] if taken[-1] == numbers[-1] else [numbers[-1]]
        assert self.recorder.trajectory.steps == [0, *taken, *last]
        for count, (number, seen) in enumerate(zip(numbers, steps, strict=True), start=1):
            assert rows[number]["length/trunk/update"] == pytest.approx(
                float((seen.after - seen.before).norm()), rel=2e-4
            )
            assert rows[number]["length/trunk/gradient"] == pytest.approx(float(seen.gradient.norm()), rel=1e-5)
            past = (count - 1) // 2 * 2
            if past:
                cosine = self.witness.cosine(seen.gradient, 2, past)
                assert rows[number]["alignment/trunk/gradient"] == pytest.approx(cosine, abs=1e-4)
                if self.ladder:
                    assert rows[number]["anatomy/trunk/cos_gradient"] == pytest.approx(-cosine, abs=1e-4)
                cosine = self.witness.cosine(seen.after - seen.before, 2, past)
                assert rows[number]["anatomy/trunk/cos_update"] == pytest.approx(cosine, abs=2e-3)
            if count % 2 == 0:
                assert rows[number]["backbone/trunk/pc1"] == pytest.approx(self.witness.pc1(2, count), abs=1e-5)
            if count % 2 == 0 and count > 2:
                found = rows[number]["alignment/trunk/update"]
                assert found == pytest.approx(self.witness.update_alignment(2, count), abs=1e-4)
        squares = [float(seen.gradient.square().sum()) for seen in steps]
        for count in range(4, len(steps) + 1, 2):  # between two snapshots, logged at the last step measured
            found = rows[numbers[count - 1]]["fisher/trunk/streaming/trace"]
            assert found == pytest.approx(sum(squares[count - 2 : count]) / 2, rel=1e-4)


def sharp(module: LightningModule) -> Sharp:
    return Sharp(trained(module), lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda module: AdamW(trained(module), lr=1e-2), id="adamw"),
        pytest.param(sharp, id="sam"),
        pytest.param(lambda module: torch.optim.LBFGS(trained(module), lr=0.5, max_iter=4), id="lbfgs"),
        pytest.param(lambda module: Lookahead(SGD(trained(module), lr=0.3)), id="lookahead"),
    ],
)
def test_a_closure_may_be_called_several_times_and_an_optimizer_be_wrapped(make: Any, tmp_path: Path) -> None:
    Observed(lambda: Plain(make), tmp_path).check()


class Halves(Manual):
    """A SAM step in two halves, each with a backward pass of the module's own."""

    seen: ClassVar[list[Seen]] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        self.backward_of(batch)
        self.seen.append(Seen(all_of(self), grads_of(self), torch.zeros(0)))
        self.first_half(optimizer)
        optimizer.zero_grad()
        self.backward_of(batch)
        self.second_half(optimizer)
        optimizer.zero_grad()
        self.seen[-1] = self.seen[-1]._replace(after=all_of(self))

    def backward_of(self, batch: Any) -> None:
        self.manual_backward(self.batch_loss(batch))

    def first_half(self, optimizer: Any) -> None:
        optimizer.first_step()

    def second_half(self, optimizer: Any) -> None:
        optimizer.second_step()


class Unnoticed(Halves):
    """Writes through `.data`, which counts no version of the weights."""

    def first_half(self, optimizer: Any) -> None:
        self.old = [p.data.clone() for p in self.parameters()]
        for p in self.parameters():
            assert p.grad is not None
            p.data.add_(p.grad, alpha=0.3)

    def second_half(self, optimizer: Any) -> None:
        for p, old in zip(self.parameters(), self.old, strict=True):
            p.data.copy_(old)
        optimizer.step()


class Exchanged(Unnoticed):
    """Puts other tensors in the weights' place."""

    def first_half(self, optimizer: Any) -> None:
        super().first_half(optimizer)
        for p in self.parameters():
            p.data = p.data.clone()


class Unannounced(Halves):
    """Calls `backward` itself."""

    def backward_of(self, batch: Any) -> None:
        self.batch_loss(batch).backward()


def all_of(module: Any) -> Tensor:
    return flat([module.layers[i].weight.detach() for i in (0, 2)])


def grads_of(module: Any) -> Tensor:
    return flat([module.layers[i].weight.grad for i in (0, 2)])


def plain(module: LightningModule) -> AdamW:
    return AdamW(trained(module), lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize(("halves", "make"), [(Halves, sharp), (Unnoticed, plain), (Exchanged, plain)])
def test_a_sam_step_in_two_halves_has_the_gradient_of_its_first(halves: Any, make: Any, tmp_path: Path) -> None:
    # Lightning does not count such steps of `sharp`: they have the numbers 1, 2, ... of their own.
    observed = Observed.__new__(Observed)
    observed.ladder = False  # AdamW inside of it is given the gradient of the perturbed weights
    witness = observed.witness = Witness(Halves.pattern)
    observed.recorder = TrajectoryRecorder(Halves.pattern, Schedule(every=2))
    probes: list[Callback] = [GradientAlignment(Schedule(every=1), None), OptimizerAnatomy(Schedule(every=1))]
    probes += [StreamingFisher(Schedule(every=1)), Lengths(Schedule(every=1), draws=1), observed.recorder, witness]
    halves.seen = []
    _, observed.rows, _ = fit(lambda: halves(make), probes, tmp_path, max_steps=-1, max_epochs=1)
    witness.steps = halves.seen
    observed.check()


def test_a_gradient_that_no_backward_pass_announced_is_not_taken_for_another(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    Unannounced.seen = []
    probes = [TrajectoryRecorder(Halves.pattern, Schedule(every=2)), GradientAlignment(Schedule(every=1), None)]
    _, rows, _ = fit(lambda: Unannounced(sharp), probes, tmp_path, max_steps=-1, max_epochs=1)
    assert "backbone/trunk/pc1" in rows[12]
    assert not [name for row in rows.values() for name in row if "alignment/trunk/gradient" in name]
    assert len([w for w in recwarn if "without `manual_backward`" in str(w.message)]) == 1


@pytest.mark.parametrize("ratio", [1, 3])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("network", ["generator", "critic"])
def test_two_optimizers_in_any_order_and_ratio(ratio: int, first: bool, network: str, tmp_path: Path) -> None:
    class Both(Gan):
        pattern = rf"(?P<group>{network})\b.*weight"

    Both.ratio, Both.generator_first = ratio, first
    turns = ["generator"] + ["critic"] * ratio
    order = (turns if first else turns[::-1]) * 6  # Lightning counts the steps of both
    numbers = [number for number, who in enumerate(order, start=1) if who == network]
    Observed(Both, tmp_path, max_steps=len(order)).check(numbers)


@pytest.mark.parametrize("network", ["generator", "critic"])
def test_probes_between_the_steps_count_those_of_their_own_weights(network: str, tmp_path: Path) -> None:
    """Fisher and commutators; two optimizers whose steps Lightning counts together, the critic's three to one."""

    class Asked(Gan):
        pattern = rf"(?P<group>{network})\b.*weight"
        ratio = 3

        def batch_loss(self, batch: Any) -> Tensor:
            return F.softplus(-self.critic(self.generator(batch[0][:, :4]))).mean()

    fisher, pairs = FisherProbe(Schedule(every=2), batches=2), CommutatorProbe(Schedule(every=2), 1, pattern=network)
    pairs.directions, pairs.optimizer_step = 0, True
    recorder = TrajectoryRecorder(Asked.pattern, Schedule(every=1))
    _, rows, _ = fit(Asked, [recorder, fisher, pairs], tmp_path, max_steps=48)
    # A batch takes four steps. The generator is at an even one before every second batch; the critic has passed one.
    # The Fisher's batches are complete with the second one, at step 4.
    due = list(range(0, 49, 8 if network == "generator" else 4))
    assert [step for step in rows if "commutator/all/step_defect" in rows[step]] == due
    assert [step for step in rows if "fisher/trunk/batch_mean/trace" in rows[step]] == [s for s in due if s > 4]


def test_the_optimizers_own_steps_are_those_of_one(tmp_path: Path) -> None:
    class Asked(Gan):
        def batch_loss(self, batch: Any) -> Tensor:
            return self.critic(self.generator(batch[0][:, :4])).mean()

    with one_line_error("2 optimizers train the weights that move"):
        fit(Asked, [CommutatorProbe(Schedule(every=1), 1, optimizer_step=True)], tmp_path)


@pytest.mark.parametrize("make", [None, lambda module: Silent(trained(module))])
def test_own_accumulation_and_a_step_that_ignores_its_closure(make: Any, tmp_path: Path) -> None:
    class Accumulates(Manual):
        parts = 3

    Observed(lambda: Accumulates(make), tmp_path, max_steps=8).check()


def test_lightnings_accumulation_with_clipping(tmp_path: Path) -> None:
    Observed(Plain, tmp_path, accumulate_grad_batches=2, gradient_clip_val=1e6, max_steps=8).check()


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_leaves_out_decay_nothing(tmp_path: Path, fused: bool) -> None:
    """They count, as for Lightning, and the weights stay where they are; a fused optimizer is called for them."""

    class Overflowing(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = self.batch_loss(batch)
            return loss * float("inf") if self.global_step in (2, 5) else loss

    def make(module: LightningModule) -> AdamW:
        return AdamW(trained(module), lr=1e-2, weight_decay=0.1, fused=fused)

    recorder = TrajectoryRecorder(Plain.pattern, Schedule(every=1))
    settings: dict[str, Any] = {
        "plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))],
        "max_steps": 8,
    }
    _, rows, _ = fit(lambda: Overflowing(make), [recorder, Lengths(Schedule(every=1))], tmp_path, **settings)
    trajectory = recorder.trajectory
    assert trajectory is not None and trajectory.steps == list(range(9))
    still = trajectory.gram().diagonal() == 0
    assert still.nonzero().flatten().tolist() == [3, 6]
    assert trajectory.survival[-1] == pytest.approx(0.999**6, rel=1e-12)
    assert trajectory.survival[3] == trajectory.survival[2] and trajectory.survival[6] == trajectory.survival[5]
    assert [step for step in rows if "length/trunk/update" in rows[step]] == [1, 2, 4, 5, 7, 8]


def test_a_resumed_run_of_two_optimizers_goes_on_counting(tmp_path: Path) -> None:
    def run(folder: Path, steps: int, resume: Path | None = None) -> list[int]:
        recorder = TrajectoryRecorder(Gan.pattern, Schedule(every=2))
        keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1, auto_insert_metric_name=False)
        settings: dict[str, Any] = {"max_steps": steps, "logger": False, "enable_progress_bar": False}
        trainer = Trainer(
            callbacks=[recorder, keep], accelerator="cpu", default_root_dir=folder, max_epochs=-1, **settings
        )
        torch.manual_seed(0)
        trainer.fit(Gan(), batches(), ckpt_path=resume)
        assert recorder.trajectory is not None
        return recorder.trajectory.steps

    run(tmp_path, 6)
    assert run(tmp_path, 16, next(tmp_path.glob("6*.ckpt"))) == [0, 4, 8, 12, 16]  # every second of its own steps


def test_what_cannot_be_observed_is_refused_in_one_line(tmp_path: Path) -> None:
    class Foreign:
        def __init__(self, params: Any) -> None:
            inner = SGD(params, lr=0.1)
            self.param_groups, self.state, self.defaults = inner.param_groups, inner.state, inner.defaults

        def step(self, closure: Any = None) -> None: ...

        def zero_grad(self, set_to_none: bool = True) -> None: ...

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: Any) -> None: ...

    class Ahead(SGD):
        def step(self, closure: Any = None) -> Any:
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.add_(1e-3)
            return super().step(closure)

    class ForeignOne(Plain):
        def configure_optimizers(self) -> Any:
            return Foreign(self.parameters())

    class AheadOne(Plain):
        def configure_optimizers(self) -> Any:
            return Ahead(self.parameters(), lr=0.1)

    with one_line_error("FSDPStrategy steps flat copies"):
        shared: Any = SimpleNamespace(strategy=FSDPStrategy())
        TrajectoryRecorder(Plain.pattern).setup(shared, Plain(), "fit")
    for module, text in ((ForeignOne, "cannot be observed"), (AheadOne, "moves the weights")):
        with one_line_error(text):
            fit(module, [TrajectoryRecorder(Plain.pattern, Schedule(every=2))], tmp_path)
