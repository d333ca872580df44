"""What decay alone leaves of the weights: measured on shadows, against closed forms and against runs of noise alone."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from zoo import Lion, Lookahead, Plain, ScheduleFree, Sharp, Silent, Trusted, fit, trained

from mini_gpt_pl.callbacks import Schedule, TrajectoryRecorder
from mini_gpt_pl.geometry.path import nulls
from mini_gpt_pl.geometry.path.trajectory import Rates, Trajectory
from mini_gpt_pl.observation.decay import PROBATION, DecayShadows
from mini_gpt_pl.training.optimizers import SGDW, MuonAdamW

STEPS = 60
Make = Callable[[list[nn.Parameter]], Optimizer]


def noise(
    make: Make, shapes: Iterable[tuple[int, ...]] = ((300, 100),), steps: int = STEPS, each: Any = None
) -> tuple[DecayShadows, list[float], Optimizer]:
    """Train on noise alone: the shadows, and the regression of the last weights on the first, which is what is left."""
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes]
    first = [weight.detach().clone() for weight in weights]
    optimizer, shadows = make(weights), DecayShadows(weights)

    def closure() -> Any:
        for weight in weights:
            if weight.requires_grad:
                weight.grad = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        return torch.zeros(())

    for step in range(steps):
        if each is not None:
            each(step, optimizer)
        closure()
        shadows.read(optimizer)
        optimizer.step(closure)
        shadows.step()
    pairs = zip(weights, first, strict=True)
    return shadows, [float((w.detach() * f).sum() / f.square().sum()) for w, f in pairs], optimizer


def hugging_face(**settings: Any) -> Make:
    transformers = pytest.importorskip("transformers.optimization")
    return lambda weights: transformers.Adafactor(weights, **settings)


KNOWN: dict[str, tuple[Callable[[], Make], float | None]] = {
    "adamw": (lambda: lambda w: AdamW(w, lr=0.01, weight_decay=0.5), 0.995**STEPS),
    "adamw, lr a tensor": (lambda: lambda w: AdamW(w, lr=torch.tensor(0.01), weight_decay=0.5), None),  # a float32
    "adamw, fused": (lambda: lambda w: AdamW(w, lr=0.01, weight_decay=0.5, fused=True), 0.995**STEPS),
    "nadam, decoupled": (
        lambda: lambda w: torch.optim.NAdam(w, lr=0.01, weight_decay=0.5, decoupled_weight_decay=True),
        0.995**STEPS,
    ),
    "sgdw": (lambda: lambda w: SGDW(w, lr=0.01, momentum=0.9, weight_decay=0.5), 0.995**STEPS),
    "lion": (lambda: lambda w: Lion(w, lr=0.01, weight_decay=0.5), 0.995**STEPS),
    "muon": (lambda: lambda w: torch.optim.Muon(w, lr=0.01, weight_decay=0.5), 0.995**STEPS),
    "adafactor": (lambda: lambda w: torch.optim.Adafactor(w, lr=0.01, weight_decay=0.5), 0.995**STEPS),
    "adafactor, relative steps": (lambda: hugging_face(weight_decay=0.5, scale_parameter=False), 0.995**STEPS),
    "adafactor, relative steps without decay": (lambda: hugging_face(), 1.0),
    "sgd": (lambda: lambda w: SGD(w, lr=0.01, weight_decay=0.5), 0.995**STEPS),
    "sgd with momentum": (lambda: lambda w: SGD(w, lr=0.01, momentum=0.9, weight_decay=0.1), None),
    "sgd with dampening": (lambda: lambda w: SGD(w, lr=0.01, momentum=0.9, dampening=0.9, weight_decay=0.5), None),
    "sgd with nesterov": (lambda: lambda w: SGD(w, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1), None),
    "schedule-free": (lambda: lambda w: ScheduleFree(w, lr=0.01, weight_decay=0.5), None),
    "sam": (lambda: lambda w: Sharp(w, lr=0.01, weight_decay=0.5), 0.995**STEPS),
    "asgd": (lambda: lambda w: torch.optim.ASGD(w, lr=0.01, weight_decay=0.5), None),
    "adagrad, no decay": (lambda: lambda w: torch.optim.Adagrad(w, lr=0.01), 1.0),
    "rprop": (lambda: lambda w: torch.optim.Rprop(w, lr=1e-4), 1.0),
    "own, without a rate": (lambda: lambda w: Silent(w), 1.0),
    "lbfgs": (lambda: lambda w: torch.optim.LBFGS(w, lr=1e-3, max_iter=2), 1.0),
}


@pytest.mark.parametrize("name", KNOWN)
def test_what_decay_leaves_is_what_a_run_of_noise_keeps(name: str) -> None:
    make, closed = KNOWN[name]
    shadows, kept, _ = noise(make())
    assert not shadows.reasons
    assert shadows.left[0] == pytest.approx(kept[0], abs=0.02)
    if closed is not None:
        assert shadows.left[0] == pytest.approx(closed, rel=1e-12)


def test_momentum_and_dampening_follow_their_recursion() -> None:
    for momentum, dampening, nesterov in ((0.9, 0.0, False), (0.9, 0.9, False), (0.9, 0.0, True)):
        settings = {"momentum": momentum, "dampening": dampening, "nesterov": nesterov}
        shadows, _, _ = noise(lambda w, s=settings: SGD(w, lr=0.02, weight_decay=0.1, **s), [(2, 2)], 40)  # type: ignore[misc]
        theta, buffer = 1.0, None
        for _ in range(40):
            pull = 0.1 * theta
            buffer = pull if buffer is None else momentum * buffer + (1 - dampening) * pull
            theta -= 0.02 * (pull + momentum * buffer if nesterov else buffer)
        assert shadows.left[0] == pytest.approx(theta, rel=1e-12)


class Tall(Lion):
    """Its rate depends on a weight's shape."""

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.mul_(1 - 0.01 * len(p))
        return super().step(closure)


UNKNOWN: dict[str, tuple[Callable[[], Make], str]] = {
    "adam, L2": (lambda: lambda w: Adam(w, lr=0.01, weight_decay=0.5), "other shares of large"),
    "rmsprop, L2": (lambda: lambda w: torch.optim.RMSprop(w, lr=0.01, weight_decay=0.5), "other shares of large"),
    "adagrad, L2": (lambda: lambda w: torch.optim.Adagrad(w, lr=0.01, weight_decay=0.5), "other shares of large"),
    "adadelta, L2": (lambda: lambda w: torch.optim.Adadelta(w, weight_decay=0.5), "other shares of large"),
    "adamax, L2": (lambda: lambda w: torch.optim.Adamax(w, lr=0.01, weight_decay=0.5), "other shares of large"),
    "radam, L2": (lambda: lambda w: torch.optim.RAdam(w, lr=0.01, weight_decay=0.5), "no shrinkage"),
    "nadam, L2": (lambda: lambda w: torch.optim.NAdam(w, lr=0.01, weight_decay=0.5), "other shares of large"),
    "adafactor, scaled by the weight": (lambda: hugging_face(weight_decay=0.5), "other shares of large"),
    "a trust ratio": (lambda: lambda w: Trusted(w), "depends on the gradient"),
    "a rate of the shape": (lambda: lambda w: Tall(w), "depends on a weight's shape"),
    "lookahead": (lambda: lambda w: Lookahead(SGD(w, lr=0.1)), "holds a Tensor of its own"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_where_no_rate_exists_the_share_is_unknown_and_the_reason_one_line(name: str) -> None:
    make, text = UNKNOWN[name]
    shadows, _, _ = noise(make(), [(4, 3)], 12)  # RAdam's first five steps are those of SGD
    assert math.isnan(shadows.left[0]) and math.isnan(shadows.taken[0])
    assert len(shadows.reasons) == 1 and text in shadows.reasons[0] and "\n" not in shadows.reasons[0]


def test_each_group_and_each_history_has_its_own_share() -> None:
    """Two rates, a rate that changes, a weight without gradients at times, one of another optimizer."""

    def each(step: int, optimizer: Optimizer) -> None:
        first, second = optimizer.param_groups[0]["params"], optimizer.param_groups[1]["params"]
        first[1].requires_grad_(step >= 10)
        first[1].grad = None
        optimizer.param_groups[1]["lr"] = 0.1 / (1 + step)
        second[0].grad = None

    def make(weights: list[nn.Parameter]) -> Optimizer:
        groups: list[dict[str, Any]] = [
            {"params": weights[:2], "lr": 0.01, "momentum": 0.9},
            {"params": weights[2:3], "lr": 0.1},
        ]
        return SGD(groups, weight_decay=0.2)

    shadows, _, _ = noise(make, [(2, 2), (2, 2), (3,), (2,)], 40, each)
    theta, buffer, late, late_buffer, product = 1.0, 0.0, 1.0, 0.0, 1.0
    for step in range(40):
        buffer = 0.9 * buffer + 0.2 * theta
        theta -= 0.01 * buffer
        if step >= 10:
            late_buffer = 0.9 * late_buffer + 0.2 * late
            late -= 0.01 * late_buffer
        product *= 1 - 0.1 / (1 + step) * 0.2
    assert shadows.left == pytest.approx([theta, late, product, 1.0], rel=1e-12)


def test_decay_that_begins_late_is_seen_and_asked_again() -> None:
    def each(step: int, optimizer: Optimizer) -> None:
        optimizer.param_groups[0]["weight_decay"] = 0.5 if step >= PROBATION + 5 else 0.0

    shadows, _, _ = noise(lambda w: AdamW(w, lr=0.01, weight_decay=0.0), [(2, 2)], PROBATION + 15, each)
    assert shadows.left[0] == pytest.approx(0.995**10, rel=1e-12)
    shadows, _, _ = noise(lambda w: Adam(w, lr=0.01, weight_decay=0.0), [(2, 2)], PROBATION + 15, each)
    assert math.isnan(shadows.left[0])


def test_a_step_that_is_left_out_decays_nothing() -> None:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer, shadows = AdamW([weight], lr=0.1, weight_decay=0.5), DecayShadows([weight])
    for taken in (True, False, True):
        shadows.read(optimizer)
        if taken:
            shadows.step()
    assert shadows.left == [0.95**2] and shadows.taken == [pytest.approx(0.05)]


@pytest.mark.parametrize(
    "make",
    [
        lambda w: AdamW(w, lr=0.01, weight_decay=0.5),
        lambda w: Sharp(w, lr=0.01, weight_decay=0.5),
        lambda w: MuonAdamW([{"params": w[:1], "kind": "matrices"}, {"params": w[1:], "kind": "vectors"}]),
        lambda w: torch.optim.Adagrad(w, lr=0.01, weight_decay=0.1),
        lambda w: torch.optim.LBFGS(w, lr=1e-3),
    ],
)
def test_twins_touch_nothing_of_training(make: Make) -> None:
    """Weights, states, settings and every random state are those of a run without shadows; a scheduler wraps `step`."""

    def run(watched: bool) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(0)
        weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (3,))]
        optimizer, shadows = make(weights), DecayShadows(weights)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for part in (torch.manual_seed, np.random.seed, random.seed):
            part(0)
        for _ in range(20):

            def closure() -> Any:
                for weight in weights:
                    weight.grad = torch.randn(weight.shape, generator=generator)
                return torch.zeros(())

            closure()
            if watched:
                shadows.read(optimizer)
            optimizer.step(closure)
            if watched:
                shadows.step()
            schedule.step()
        state = copy.deepcopy(optimizer.state_dict())
        return [w.detach() for w in weights], state, torch.rand(1), np.random.rand(), random.random()

    from helpers import same

    assert same(list(run(False)), list(run(True)))


@pytest.mark.parametrize("name", ["sgd with momentum", "schedule-free", "adamw", "lion"])
def test_a_resumed_run_goes_on_with_its_shadows(name: str) -> None:
    make = KNOWN[name][0]()
    whole, _, _ = noise(make, [(2, 2), (3,)], 30)
    weights = [nn.Parameter(torch.ones(shape)) for shape in ((2, 2), (3,))]
    optimizer, shadows = make(weights), DecayShadows(weights)
    for step in range(30):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        if step == 12:
            kept = shadows.state_dict()
            shadows = DecayShadows(weights)
            shadows.load_state_dict(kept)
        shadows.read(optimizer)
        optimizer.step()
        shadows.step()
    assert shadows.left == whole.left and not shadows.reasons


# ------------------------------------------------------------------------------------------------ several rates


def test_the_walk_of_several_rates_is_that_of_its_parts_side_by_side() -> None:
    """Against coordinates: each part walks in directions of its own."""
    generator = torch.Generator().manual_seed(0)
    squares = torch.rand(2, 5, generator=generator, dtype=torch.float64) + 0.5
    curves = torch.tensor([[1.0, 0.9, 0.7, 0.6, 0.5], [1.0, 1.0, 0.99, 0.98, 0.98]], dtype=torch.float64)
    rows = torch.zeros(5, 10, dtype=torch.float64)
    for part in range(2):
        position = torch.zeros(10, dtype=torch.float64)
        position[5 * part] = squares[part, 0].sqrt()
        rows[0] += position
        for k in range(1, 5):
            increment = (curves[part, k] / curves[part, k - 1] - 1) * position
            increment[5 * part + k] = (squares[part, k] - increment.square().sum()).clamp_min(0).sqrt()
            position, rows[k] = position + increment, rows[k] + increment
    found = nulls.decaying_walk_of_parts(squares, curves)
    torch.testing.assert_close(found, rows @ rows.T, rtol=1e-12, atol=1e-12)
    alike = nulls.decaying_walk_of_parts(squares, curves[:1].expand(2, -1))
    one = nulls.decaying_walk(squares.sum(0).diag_embed(), curves[0].tolist())
    torch.testing.assert_close(alike, one, rtol=1e-12, atol=1e-12)


class TwoRates(Plain):
    """The weights and biases of each layer decay at rates of their own."""

    pattern = r"(?P<group>layers\.\d)\."

    def configure_optimizers(self) -> Any:
        named = dict(self.named_parameters())
        weights = [p for name, p in named.items() if "weight" in name]
        groups: list[dict[str, Any]] = [
            {"params": weights, "weight_decay": 20.0},
            {"params": [p for p in named.values() if p.ndim == 1]},
        ]
        return AdamW(groups, lr=5e-3, weight_decay=0.0)


def test_a_group_of_two_rates_has_the_null_of_both(tmp_path: Path) -> None:
    recorder = TrajectoryRecorder(TwoRates.pattern, Schedule(every=2))
    _, rows, _ = fit(TwoRates, [recorder], tmp_path)
    trajectory = Trajectory.load(tmp_path / "trajectory.safetensors")
    assert trajectory.rates is not None and trajectory.decay_known() and trajectory.decay_known("layers.0")
    files = [load_file(file) for file in sorted((tmp_path / "snapshots").glob("*.safetensors"))]
    for group in ("layers.0", "layers.2", None):
        expected = torch.zeros(7, 7, dtype=torch.float64)
        for kind, left in (("weight", 0.9), ("bias", 1.0)):
            names = [name for name in files[0] if name.endswith(kind) and (group is None or name.startswith(group))]
            vectors = [torch.cat([file[name].double().flatten() for name in names]) for file in files]
            squares = torch.tensor([float(v @ v) for v in vectors], dtype=torch.float64)
            expected += nulls.decaying_walk(squares.diag_embed(), [left ** (2 * k) for k in range(7)])
        torch.testing.assert_close(trajectory.decaying_walk(group), expected, rtol=1e-9, atol=1e-12)
        label = group or "trunk"
        null = nulls.statistics_of(expected[None], [1.0] * 7)
        assert rows[12][f"backbone/{label}/pc1_null"] == pytest.approx(float(null["pc1"][0]), rel=1e-9)
        assert f"backbone/{label}/pc1_corrected" not in rows[12]
    assert trajectory.until(6).decaying_walk().shape == (4, 4)
    first = {
        kind: [v.double().flatten() for n, v in files[0].items() if n.endswith(kind)] for kind in ("weight", "bias")
    }
    length = {kind: float(torch.cat(parts).norm()) for kind, parts in first.items()}
    whole = math.hypot(0.9**12 * length["weight"], length["bias"]) / math.hypot(*length.values())
    assert trajectory.survival[-1] == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("inside", [False, True])
def test_sketches_have_the_null_of_groups_of_one_rate_each(
    inside: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    class Layers(TwoRates):
        def configure_optimizers(self) -> Any:
            own = [self.layers[0].weight, self.layers[0].bias] if not inside else [self.layers[0].weight]
            rest = [p for p in self.parameters() if all(p is not mine for mine in own)]
            groups: list[dict[str, Any]] = [{"params": own, "weight_decay": 20.0}, {"params": rest}]
            return AdamW(groups, lr=5e-3, weight_decay=0.0)

    exact, sketched = (TrajectoryRecorder(Layers.pattern, Schedule(every=2), sketch=s) for s in (None, 64))
    _, rows, _ = fit(Layers, [exact], tmp_path / "exact")
    _, found, _ = fit(Layers, [sketched], tmp_path / "sketched")
    assert exact.trajectory is not None and sketched.trajectory is not None
    nulls_of = {key: value for key, value in rows[12].items() if key.endswith("_null")}
    assert nulls_of and exact.trajectory.decay_known()
    if inside:
        assert not sketched.trajectory.decay_known() and not [key for key in found[12] if key.endswith("_null")]
        assert len([w for w in recwarn if "no sketch tells apart" in str(w.message)]) == 1
    else:  # 64 values hold each group exactly
        assert {key: found[12][key] for key in nulls_of} == pytest.approx(nulls_of, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("settings", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_a_decay_below_the_rounding_of_the_weights_is_unknown(settings: dict[str, Any]) -> None:
    """A run of noise alone keeps all of its weights where each product is rounded, and decays where sums are."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(0.05 * torch.randn(300, 100, generator=generator).bfloat16())
    first, shadows = weight.detach().double(), DecayShadows([weight])
    optimizer = AdamW([weight], lr=2e-3, weight_decay=0.5, **settings)
    for _ in range(200):
        weight.grad = torch.randn(weight.shape, generator=generator).bfloat16()
        shadows.read(optimizer)
        optimizer.step()
        shadows.step()
    kept = float((weight.detach().double() * first).sum() / first.square().sum())
    assert kept == pytest.approx(0.999**200 if "fused" in settings else 1.0, abs=0.03)
    assert math.isnan(shadows.left[0]) and "below the rounding of weights in torch.bfloat16" in shadows.reasons[0]


def test_two_optimizers_of_one_weight_each_take_their_share() -> None:
    """At once, and one after the other."""
    weight = nn.Parameter(torch.ones(2))
    shadows = DecayShadows([weight])
    both = [AdamW([weight], lr=0.01, weight_decay=0.5), SGD([weight], lr=0.01, weight_decay=1.0)]
    for step in range(30):
        for optimizer in both if step < 20 else both[1:]:
            weight.grad = torch.ones(2)
            shadows.read(optimizer)
            optimizer.step()
            shadows.step()
        if step == 9:
            kept = shadows.state_dict()
            shadows = DecayShadows([weight])
            shadows.load_state_dict(kept)
    assert shadows.left == [pytest.approx(0.995**20 * 0.99**30, rel=1e-12)]


def test_a_decay_by_hand_is_said_to_be_none_of_the_null(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    class ByHand(Plain):
        def on_train_batch_end(self, *_: Any) -> None:
            with torch.no_grad():
                for p in self.parameters():
                    p.mul_(0.99)

    fit(ByHand, [TrajectoryRecorder(Plain.pattern, Schedule(every=2))], tmp_path)
    assert len([w for w in recwarn if "not only optimizers move the weights" in str(w.message)]) == 1


def test_a_weight_in_the_place_of_another_has_no_history() -> None:
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer, shadows = SGD(weights, lr=0.01, momentum=0.9, weight_decay=0.2), DecayShadows(weights)
    expected = [1.0, 1.0]
    buffers = [0.0, 0.0]
    for step in range(30):
        if step == 10:
            weights[1] = nn.Parameter(torch.ones(2))
            optimizer.param_groups[0]["params"][1] = weights[1]
            shadows.rebind(weights)
            buffers[1] = 0.0
        for weight in weights:
            weight.grad = torch.ones(2)
        shadows.read(optimizer)
        optimizer.step()
        shadows.step()
        # The twin of the new weight begins at 1, as all shadows do; shares multiply.
        buffers = [0.9 * b + 0.2 * e for b, e in zip(buffers, expected, strict=True)]
        expected = [e - 0.01 * b for e, b in zip(expected, buffers, strict=True)]
    assert shadows.left == pytest.approx(expected, rel=1e-12)


def test_rates_are_kept_in_files_and_states(tmp_path: Path) -> None:
    curves = torch.tensor([[1.0, 0.5], [1.0, 1.0]], dtype=torch.float64)
    squares = torch.rand(1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grams = squares.sum(1).diag_embed()
    one = Trajectory("a", ("a",), (4,), [0, 1], grams, [1.0, 0.8], Rates(curves, squares))
    one.save(tmp_path / "t.safetensors")
    for again in (Trajectory.load(tmp_path / "t.safetensors"), Trajectory.from_state(one.state_dict())):
        assert again.rates is not None
        assert torch.equal(again.rates.curves, curves) and torch.equal(again.rates.squares, squares)


def test_an_unknown_decay_leaves_no_null_no_excess_and_no_nan(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    recorder = TrajectoryRecorder(Plain.pattern, Schedule(every=2))
    _, rows, _ = fit(lambda: Plain(lambda m: Adam(trained(m), lr=1e-2, weight_decay=0.1)), [recorder], tmp_path)
    assert "backbone/trunk/pc1" in rows[12] and "alignment/trunk/update" in rows[12]
    names = [name for row in rows.values() for name in row]
    assert not [name for name in names if name.endswith(("_null", "_excess", "_corrected"))]
    assert all(value == value for row in rows.values() for value in row.values())
    assert recorder.trajectory is not None and not recorder.trajectory.decay_known()
    said = [str(warning.message) for warning in recwarn if "is unknown" in str(warning.message)]
    assert len(said) == 1 and "\n" not in said[0] and "Adam" in said[0]
