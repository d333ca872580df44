"""The ladder, the split and the counterfactuals against the weights themselves and against the written recursions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from conftest import SMALL, normal
from helpers import same
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from mini_gpt_pl.geometry.optimizer.counterfactual import OtherSecondMoments
from mini_gpt_pl.geometry.optimizer.displacement import DisplacementSplit
from mini_gpt_pl.geometry.optimizer.moments import BeforeStep, Ladder, copies
from mini_gpt_pl.geometry.optimizer.predictions import averaging_metrics, memory_metrics, spread, white_noise
from mini_gpt_pl.geometry.vectors.alignment import Products
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection
from mini_gpt_pl.training.optimizers import SGDW

Make = Callable[[Sequence[nn.Parameter]], Optimizer]

RULES: dict[str, Make] = {
    "adamw": lambda p: AdamW(p, lr=0.1, betas=(0.9, 0.95), weight_decay=0.5, foreach=False),
    "adamw-foreach": lambda p: AdamW(p, lr=0.1, betas=(0.9, 0.95), weight_decay=0.5, foreach=True),
    "adamw-fused": lambda p: AdamW(p, lr=0.1, betas=(0.9, 0.95), weight_decay=0.5, fused=True),
    "adamw-amsgrad": lambda p: AdamW(p, lr=0.1, betas=(0.9, 0.5), weight_decay=0.5, amsgrad=True),
    "adamw-maximize": lambda p: AdamW(p, lr=0.1, weight_decay=0.5, maximize=True, foreach=True),
    "adam": lambda p: Adam(p, lr=0.1, betas=(0.8, 0.9)),
    "adam-l2": lambda p: Adam(p, lr=0.1, betas=(0.8, 0.9), weight_decay=0.5, eps=1e-3),
    "adam-l2-fused": lambda p: Adam(p, lr=0.1, betas=(0.8, 0.9), weight_decay=0.5, fused=True),
    "adam-decoupled": lambda p: Adam(p, lr=0.1, weight_decay=0.5, decoupled_weight_decay=True),
    "adam-forgetful": lambda p: AdamW(p, lr=0.1, betas=(0.0, 0.0), weight_decay=0.5),
    "sgd": lambda p: SGD(p, lr=0.1, weight_decay=0.5),
    "sgd-momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5),
    "sgd-dampening": lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.5),
    "sgd-nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.5),
    "sgd-nesterov-foreach": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "sgd-nesterov-fused": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "sgd-maximize-foreach": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, maximize=True, foreach=True),
    "sgdw": lambda p: SGDW(p, lr=0.1, momentum=0.9, weight_decay=0.5),
    "sgdw-nesterov": lambda p: SGDW(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.5),
}
ADAPTIVE = [name for name in RULES if name.startswith("adam")]
LIMIT = 1.5  # of the gradient's norm


def gradients_of(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return copies([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])


@dataclass
class Run:
    """A few clipped steps on random gradients, all in float64."""

    make: Make
    selection: ParameterSelection = SMALL
    step: int = 0
    parameters: list[nn.Parameter] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.parameters = [nn.Parameter(normal(*shape, seed=i)) for i, shape in enumerate(self.selection.shapes)]
        self.optimizer = self.make(self.parameters)
        self.clipped: list[Tensor] = []
        self.raw: list[Tensor] = []
        self.path = [self.flat(self.parameters)]

    def flat(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.detach().reshape(-1).clone() for t in tensors])

    def advance(self, skip: Sequence[int] = (), gradients: bool = True) -> BeforeStep:
        """One step, the learning rate changed before and after it as a scheduler would."""
        self.step += 1
        for i, parameter in enumerate(self.parameters):
            parameter.grad = None if i in skip else normal(*parameter.shape, seed=100 * self.step + i)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.1 / self.step
        self.raw.append(self.flat([torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]))
        raw = gradients_of(self.parameters) if gradients else ()
        before = BeforeStep.of(self.optimizer, self.parameters, gradients=raw)
        torch.nn.utils.clip_grad_norm_(self.parameters, LIMIT)
        self.clipped.append(self.flat([torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]))
        self.optimizer.step()
        for group in self.optimizer.param_groups:
            group["lr"] = 77.0
        self.path.append(self.flat(self.parameters))
        return before

    def ladder(self, before: BeforeStep) -> Ladder:
        return Ladder.of(self.optimizer, before, self.selection)


def close(found: Tensor, expected: Tensor, share: float = 1e-10) -> bool:
    return float((found - expected).norm()) <= share * float(expected.norm())


# ------------------------------------------------------------------------------------------------- the ladder


@pytest.mark.parametrize("rule", RULES)
def test_the_last_rung_is_the_step_that_was_made(rule: str) -> None:
    run = Run(RULES[rule])
    sign = -1.0 if "maximize" in rule else 1.0
    for k in range(6):
        ladder = run.ladder(run.advance())
        assert close(ladder.update.values, run.path[k + 1] - run.path[k])
        assert close(ladder.difference.values, run.path[k + 1] - run.path[k])
        assert close(ladder.gradient.values, -sign * run.clipped[k])


@pytest.mark.parametrize("rule", RULES)
def test_reading_touches_nothing(rule: str) -> None:
    run, twin = Run(RULES[rule]), Run(RULES[rule])
    split = DisplacementSplit(run.optimizer, run.parameters)
    others = OtherSecondMoments(run.optimizer, run.parameters, [0.5]) if rule in ADAPTIVE else None
    for _ in range(3):
        before = run.advance()
        gradients = [p.grad.clone() for p in run.parameters if p.grad is not None]
        ladder = run.ladder(before)
        split.account(run.optimizer, before)
        split.close(SMALL)
        if others is not None:
            others.feed(run.optimizer, before)
            others.steps(before, ladder)
        assert same(gradients, [p.grad for p in run.parameters])
        twin.advance()
    assert same(run.optimizer.state_dict(), twin.optimizer.state_dict())
    assert same(run.path, twin.path)


@pytest.mark.parametrize(("rule", "beta1", "beta2", "l2", "eps"), [
    ("adamw-fused", 0.9, 0.95, 0.0, 1e-8), ("adamw-foreach", 0.9, 0.95, 0.0, 1e-8), ("adam-l2", 0.8, 0.9, 0.5, 1e-3)
])  # fmt: skip
def test_adams_rungs_are_equations_13_to_16(rule: str, beta1: float, beta2: float, l2: float, eps: float) -> None:
    run, m, v = Run(RULES[rule]), torch.zeros(SMALL.dim), torch.zeros(SMALL.dim)
    for t in range(1, 7):
        ladder = run.ladder(run.advance())
        grad = run.clipped[-1] + l2 * run.path[-2]
        m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad**2
        hat, root = m / (1 - beta1**t), (v / (1 - beta2**t)).sqrt() + eps
        assert ladder.momentum is not None and ladder.normalised is not None and ladder.denominator is not None
        assert close(ladder.momentum.values, -hat)
        assert close(ladder.denominator.values, root)
        assert close(ladder.normalised.values, -hat / root)


def test_sgds_rungs() -> None:
    run, buffer = Run(RULES["sgd-dampening"]), None
    for _ in range(4):
        ladder = run.ladder(run.advance())
        grad = run.clipped[-1] + 0.5 * run.path[-2]
        buffer = grad if buffer is None else 0.9 * buffer + 0.7 * grad
        assert ladder.momentum is not None and ladder.decay is not None
        assert close(ladder.momentum.values, -buffer)
        assert ladder.normalised is None
        assert not ladder.decay.values.any()  # L2 is in the momentum


def test_of_an_unknown_optimizer_there_is_gradient_and_update() -> None:
    run = Run(lambda p: RMSprop(p, lr=0.1, momentum=0.9))
    ladder = run.ladder(run.advance())
    assert list(ladder.rungs()) == ["gradient", "update"]
    assert close(ladder.update.values, run.path[1] - run.path[0])
    assert close(ladder.gradient.values, -run.clipped[0])


def test_each_group_has_its_own_settings_and_what_does_not_move_has_no_update() -> None:
    def make(p: Sequence[nn.Parameter]) -> Optimizer:
        return AdamW([{"params": p[:1], "weight_decay": 0.9}, {"params": p[1:2], "eps": 0.5, "betas": (0.5, 0.6)}])

    run = Run(make)  # the third parameter belongs to no group
    for k, skip in enumerate([(), (0,), (), (1,), ()]):
        before = run.advance(skip=skip)
        ladder = run.ladder(before)
        assert close(ladder.update.values, run.path[k + 1] - run.path[k])
        assert not ladder.update.values[-4:].any()


# -------------------------------------------------------------------------------------------------- the split


@pytest.mark.parametrize("rule", RULES)
def test_parts_sum_to_the_displacement(rule: str) -> None:
    run = Run(RULES[rule])
    split = DisplacementSplit(run.optimizer, run.parameters)
    for start, steps in ((0, 20), (20, 3)):
        for k in range(steps):
            split.account(run.optimizer, run.advance(skip=(1,) if k == 2 else ()))
        parts = split.close(SMALL)
        true = run.path[start + steps] - run.path[start]
        assert close(parts["displacement"].values, true)
        assert close(sum(parts[name].values for name in split.PARTS), true)  # type: ignore[arg-type]
        assert float(parts["rounding"].values.norm()) < 1e-10 * float(true.norm())  # the formulas sum to it, too
        assert float(parts["clipping"].values.norm()) > 0.05 * float(true.norm())


def test_the_parts_of_adamw_are_those_of_the_written_recursion() -> None:
    run = Run(RULES["adamw"])
    split = DisplacementSplit(run.optimizer, run.parameters)
    m, raw, v, moved = (torch.zeros(SMALL.dim, dtype=torch.float64) for _ in range(4))
    decay, clipping = torch.zeros_like(m), torch.zeros_like(m)
    for t in range(1, 11):
        split.account(run.optimizer, run.advance())
        m, raw = 0.9 * m + 0.1 * run.clipped[-1], 0.9 * raw + 0.1 * run.raw[-1]
        v = 0.95 * v + 0.05 * run.clipped[-1] ** 2
        scale = 0.1 / t / (1 - 0.9**t) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        moved, clipping = moved - scale * raw, clipping - scale * (m - raw)
        decay = decay - 0.1 / t * 0.5 * run.path[-2]
    parts = split.close(SMALL)
    for name, expected in (("gradient", moved), ("clipping", clipping), ("decay", decay)):
        assert close(parts[name].values, expected)


def test_of_plain_sgd_clipping_took_what_the_gradients_lost() -> None:
    run = Run(lambda p: SGD(p, lr=0.1, weight_decay=0.5))
    split = DisplacementSplit(run.optimizer, run.parameters)
    for _ in range(5):
        split.account(run.optimizer, run.advance())
    parts = split.close(SMALL)
    rates = [0.1 / (k + 1) for k in range(5)]
    assert close(parts["gradient"].values, -sum(r * g for r, g in zip(rates, run.raw, strict=True)))  # type: ignore[arg-type]
    lost = sum(r * (c - g) for r, c, g in zip(rates, run.clipped, run.raw, strict=True))
    assert close(parts["clipping"].values, -lost)  # type: ignore[arg-type]
    assert close(parts["decay"].values, -sum(r * 0.5 * w for r, w in zip(rates, run.path, strict=False)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "rule", ["adamw", "adamw-maximize", "adam-l2", "sgd-dampening", "sgd-maximize-foreach", "sgdw-nesterov"]
)
def test_without_clipping_there_is_no_clipping_part(rule: str) -> None:
    run = Run(RULES[rule])
    global LIMIT
    kept, LIMIT = LIMIT, 1e9
    try:
        run.advance()  # a split that begins late takes up the momentum as it is
        split = DisplacementSplit(run.optimizer, run.parameters)
        for _ in range(4):
            split.account(run.optimizer, run.advance())
    finally:
        LIMIT = kept
    parts = split.close(SMALL)
    assert float(parts["clipping"].values.norm()) < 1e-12
    assert close(parts["gradient"].values + parts["decay"].values, run.path[-1] - run.path[1])


@pytest.mark.parametrize("rule", ["adamw", "adam-l2", "sgd-nesterov", "sgd"])
def test_split_and_counterfactual_continue_from_their_state(rule: str) -> None:
    run = Run(RULES[rule])
    split = DisplacementSplit(run.optimizer, run.parameters)
    others = OtherSecondMoments(run.optimizer, run.parameters, [0.5, 0.7])
    adaptive = rule in ADAPTIVE
    for k in range(9):
        before = run.advance()
        split.account(run.optimizer, before)
        if adaptive:
            others.feed(run.optimizer, before)
        if k == 4:
            kept = copy.deepcopy({"split": split.state_dict(), "others": others.state_dict()})
            again = DisplacementSplit(run.optimizer, run.parameters)
            again.load_state_dict(kept["split"])
            fresh = OtherSecondMoments(run.optimizer, run.parameters, [0.7])
            fresh.load_state_dict(kept["others"])
        elif k > 4:
            again.account(run.optimizer, before)
            if adaptive:
                fresh.feed(run.optimizer, before)
    one, two = split.close(SMALL), again.close(SMALL)
    assert all(torch.equal(one[name].values, two[name].values) for name in one)
    if adaptive:
        assert same(others.values[1], fresh.values[0])


# --------------------------------------------------------------------------------------------- counterfactuals


@pytest.mark.parametrize(("rule", "beta2"), [
    ("adamw", 0.95), ("adamw-fused", 0.95), ("adam-l2", 0.9), ("adam-forgetful", 0.0)
])  # fmt: skip
@pytest.mark.parametrize("late", [0, 3])
def test_the_counterfactual_of_the_true_beta2_is_the_update(rule: str, beta2: float, late: int) -> None:
    run = Run(RULES[rule])
    for _ in range(late):
        run.advance()
    others = OtherSecondMoments(run.optimizer, run.parameters, [beta2])
    for k in range(4):
        before = run.advance(skip=(2,) if k == 1 else ())
        others.feed(run.optimizer, before)
        ladder = run.ladder(before)
        normalised, update = others.steps(before, ladder)[beta2]
        assert ladder.normalised is not None
        assert close(normalised.values, ladder.normalised.values)
        assert close(update.values, run.path[-1] - run.path[-2])


def test_the_counterfactual_of_another_beta2_is_the_recursion_with_it() -> None:
    run, v = Run(RULES["adamw"]), torch.zeros(SMALL.dim)
    others = OtherSecondMoments(run.optimizer, run.parameters, [0.0, 0.6])
    for t in range(1, 7):
        before = run.advance()
        others.feed(run.optimizer, before)
        ladder = run.ladder(before)
        found = others.steps(before, ladder)
        v = 0.6 * v + 0.4 * run.clipped[-1] ** 2
        assert ladder.momentum is not None and ladder.decay is not None
        forgetful = ladder.momentum.values / (run.clipped[-1].abs() + 1e-8)
        other = ladder.momentum.values / ((v / (1 - 0.6**t)).sqrt() + 1e-8)
        assert close(found[0.0][0].values, forgetful)
        assert close(found[0.6][0].values, other)
        assert close(found[0.6][1].values, 0.1 / t * other - 0.1 / t * 0.5 * run.path[-2])


def test_a_late_counterfactual_begins_with_the_second_moment_there_is() -> None:
    run = Run(RULES["adamw"])
    for _ in range(3):
        before = run.advance()
    ladder, others = run.ladder(before), OtherSecondMoments(run.optimizer, run.parameters, [0.5])
    assert ladder.normalised is not None
    assert close(others.steps(before, ladder)[0.5][0].values, ladder.normalised.values)


# --------------------------------------------------------------------------------------------------- optimizers


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rule", ["adamw", "adamw-fused", "adamw-amsgrad", "adamw-maximize", "adam", "adam-forgetful"])
def test_the_kernels_account_as_plain_operations_do(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(70, 64), (3,), (5000,)]  # less than a block, and several with a part of one
    found = []
    for place in ("cuda", "cpu"):
        parameters = [nn.Parameter(normal(*shape, seed=i).float().to(place)) for i, shape in enumerate(shapes)]
        if rule == "adamw-fused" and place == "cpu":
            monkeypatch.setitem(RULES, rule, RULES["adamw"])
        optimizer = RULES[rule](parameters)
        split, others = (
            DisplacementSplit(optimizer, parameters),
            OtherSecondMoments(optimizer, parameters, [0.5, 0.9, 0.0]),
        )
        for k in range(4):
            for i, parameter in enumerate(parameters):
                parameter.grad = normal(*parameter.shape, seed=10 * k + i).float().to(place)
            before = BeforeStep.of(optimizer, parameters, gradients=gradients_of(parameters))
            torch.nn.utils.clip_grad_norm_(parameters, 0.7 * len(shapes))
            optimizer.step()
            split.account(optimizer, before)
            others.feed(optimizer, before)
        tensors = [
            *others.state_dict()["values"],
            *(t for part in split.moved.values() for t in part),
            *split._raw.values,
        ]
        found.append([tensor.cpu().reshape(-1).double() for tensor in tensors])
    for here, there in zip(*found, strict=True):
        assert close(here, there, 1e-5)  # the two clip by norms that are rounded differently, and parts cancel


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rule", ["adamw", "adamw-foreach", "adamw-fused", "adam-l2", "sgd-nesterov", "sgdw"])
def test_on_a_gpu_nothing_waits_and_the_formula_holds(rule: str) -> None:
    parameters = [nn.Parameter(normal(*shape, seed=i).cuda()) for i, shape in enumerate(SMALL.shapes)]
    optimizer = RULES[rule](parameters)
    split = DisplacementSplit(optimizer, parameters)
    others = OtherSecondMoments(optimizer, parameters, [0.5]) if rule in ADAPTIVE else None
    for k in range(3):
        for i, parameter in enumerate(parameters):
            parameter.grad = normal(*parameter.shape, seed=10 * k + i).cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            before = BeforeStep.of(optimizer, parameters, gradients=gradients_of(parameters))
            optimizer.step()
            ladder = Ladder.of(optimizer, before, SMALL)
            split.account(optimizer, before)
            cosine = Products({"a": ladder.update, "b": ladder.difference}).cosine("a", "b")
            if others is not None:
                assert ladder.normalised is not None and ladder.denominator is not None
                others.feed(optimizer, before)
                others.steps(before, ladder)
                memory_metrics(ladder.normalised.values, white_noise(0.9, 0.95, 5))
                averaging_metrics(ladder.normalised.values, ladder.gradient.values, ladder.denominator.values, 0.9, 2)
                spread(ladder.denominator.values)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert close(ladder.update.values, ladder.difference.values)
        assert cosine.tolist() == pytest.approx([1, 1, 1])
