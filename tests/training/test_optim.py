"""Decay groups, SGD with decoupled decay, and the clipped cosine."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.observation.decay import DecayShadows
from mini_gpt_pl.stories.gpt import GPT, PRESETS
from mini_gpt_pl.training.optimizers import SGDW, ClippedCosine, Continued, MuonAdamW, decay_groups, lambda_lr

# --- decay groups ------------------------------------------------------------------------------------------


def test_decay_groups_of_the_51m_model() -> None:
    with torch.device("meta"):
        groups = decay_groups(GPT(PRESETS["51m"], 50257))
    assert [group["kind"] for group in groups] == ["matrices", "tables", "vectors"]
    assert [len(group["params"]) for group in groups] == [32, 2, 34]
    assert [sum(p.numel() for p in group["params"]) for group in groups] == [25_165_824, 25_862_656, 17_408]
    assert ["weight_decay" in group for group in groups] == [False, False, True] and groups[2]["weight_decay"] == 0.0


def test_decay_groups_follow_the_optimizer_default() -> None:
    groups = torch.optim.AdamW(decay_groups(nn.Linear(3, 2)), weight_decay=0.5).param_groups
    assert [g["weight_decay"] for g in groups] == [0.5, 0.0]


def test_decay_groups_list_tied_once_and_skip_frozen_and_empty() -> None:
    a, b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    b.weight = a.weight
    assert [len(g["params"]) for g in decay_groups(nn.Sequential(a, b))] == [1]
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    module[0].requires_grad_(False)
    (exempt,) = decay_groups(module)
    assert exempt["weight_decay"] == 0.0 and len(exempt["params"]) == 2
    assert decay_groups(nn.GELU()) == []


# --- Muon beside AdamW -------------------------------------------------------------------------------------


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 6)).double()


def train(module: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int, first: int = 0) -> None:
    for k in range(first, first + steps):
        ids = torch.arange(6).roll(k)
        nn.functional.cross_entropy(module(ids), (ids + 1) % 6).backward()
        for optimizer in optimizers:
            optimizer.step()
        module.zero_grad()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_muon_adamw_is_torchs_muon_and_torchs_adamw() -> None:
    ours, theirs = tiny(), tiny()
    train(ours, [MuonAdamW(decay_groups(ours), lr=0.01, weight_decay=0.5)], 5)
    matrices, *others = decay_groups(theirs)
    settings: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.5}
    muon = torch.optim.Muon([matrices], adjust_lr_fn="match_rms_adamw", **settings)
    train(theirs, [muon, torch.optim.AdamW(others, betas=(0.9, 0.95), **settings)], 5)
    assert same(ours, theirs) and not same(ours, tiny())


def test_muon_adamw_follows_a_schedule_and_resumes() -> None:
    whole, broken = tiny(), tiny()
    reference = MuonAdamW(decay_groups(whole), lr=0.01)
    train(whole, [reference], 3)
    for group in reference.param_groups:
        group["lr"] = 0.002
    train(whole, [reference], 3, first=3)

    first = MuonAdamW(decay_groups(broken), lr=0.01)
    train(broken, [first], 3)
    again = MuonAdamW(decay_groups(broken), lr=0.01)
    again.load_state_dict(first.state_dict())
    scheduler = lambda_lr(again, lambda step: 0.2)
    train(broken, [again], 3, first=3)
    assert scheduler.get_last_lr() == pytest.approx([0.002] * 3)
    assert same(whole, broken)


def test_muon_adamw_wants_to_know_the_kinds() -> None:
    with pytest.raises(ValueError, match="kind"):
        MuonAdamW([{"params": [start()]}])
    with pytest.raises(ValueError, match="both"):
        MuonAdamW(decay_groups(nn.Linear(3, 3, bias=False)))


def test_decay_of_muon_beside_adamw_is_known() -> None:
    module = tiny()
    optimizer = MuonAdamW(decay_groups(module), lr=0.01, weight_decay=0.5)
    parameters = [group["params"][0] for group in optimizer.param_groups]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    shadows = DecayShadows(parameters)
    shadows.read(optimizer)
    shadows.step()
    assert shadows.taken == pytest.approx([0.005, 0.005, 0.0])


# --- SGDW --------------------------------------------------------------------------------------------------

SETTINGS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.7, "dampening": 0.3},
]


def run(optimizer: torch.optim.Optimizer, theta: Tensor, gradients: Tensor) -> None:
    for g in gradients:
        theta.grad = g.clone()
        optimizer.step()


@pytest.fixture
def gradients() -> Tensor:
    return torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def start() -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 2, 5, dtype=torch.float64))


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("setting", SETTINGS)
def test_sgdw_equals_the_update_by_hand(setting: dict[str, Any], weight_decay: float, gradients: Tensor) -> None:
    lr, m, tau = 0.1, setting.get("momentum", 0.0), setting.get("dampening", 0.0)
    theta = start()
    run(SGDW([theta], lr=lr, weight_decay=weight_decay, **setting), theta, gradients)

    x, b = start().detach().tolist(), [0.0] * 5
    for k, row in enumerate(gradients.tolist()):
        for i, g in enumerate(row):
            b[i] = g if k == 0 else m * b[i] + (1 - tau) * g
            u = g + m * b[i] if setting.get("nesterov") else b[i] if m else g
            x[i] = (x[i] - lr * u) * (1 - lr * weight_decay)
    torch.testing.assert_close(theta.detach(), torch.tensor(x, dtype=torch.float64), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("setting", SETTINGS)
def test_sgdw_without_decay_is_sgd(setting: dict[str, Any], gradients: Tensor) -> None:
    ours, theirs = start(), start()
    run(SGDW([ours], lr=0.1, **setting), ours, gradients)
    run(torch.optim.SGD([theirs], lr=0.1, **setting), theirs, gradients)
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)


def test_sgdw_shrinks_by_lr_wd_whatever_the_momentum() -> None:
    ours, coupled, steps = start(), start(), 300
    zero = torch.zeros(steps, 5, dtype=torch.float64)
    run(SGDW([ours], lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.5), ours, zero)
    run(torch.optim.SGD([coupled], lr=1e-2, momentum=0.9, weight_decay=0.5), coupled, zero)
    torch.testing.assert_close(ours, start() * (1 - 5e-3) ** steps)
    assert coupled.norm() < 1e-3 * ours.norm()  # L2 decay goes through the momentum: ten times the rate


def test_sgdw_decays_by_group_and_keeps_its_options_visible() -> None:
    module = nn.Linear(2, 2).double()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = SGDW(decay_groups(module), lr=0.1, weight_decay=0.5)
    module.weight.grad, module.bias.grad = torch.zeros(2, 2).double(), torch.zeros(2).double()
    optimizer.step()
    torch.testing.assert_close(module.weight.detach(), before["weight"] * 0.95)
    assert torch.equal(module.bias, before["bias"])
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.5, 0.0]


def test_sgdw_skips_parameters_without_gradient() -> None:
    theta = start()
    SGDW([theta], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(theta, start())


def test_sgdw_closure_and_single_hook_call() -> None:
    torch.optim.SGD([start()], lr=0.1)  # from here on PyTorch hooks SGD.step too
    theta, calls = start(), []
    optimizer = SGDW([theta], lr=0.1)
    optimizer.register_step_post_hook(lambda *_: calls.append(1))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = theta.square().sum()
        loss.backward()
        return loss

    expected = start().square().sum().item()
    assert optimizer.step(closure).item() == expected
    assert len(calls) == 1
    torch.testing.assert_close(theta.detach(), 0.8 * start().detach())


def test_sgdw_resumes_from_its_state(gradients: Tensor) -> None:
    setting: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.5}
    straight, resumed = start(), start()
    run(SGDW([straight], **setting), straight, gradients)
    first = SGDW([resumed], **setting)
    run(first, resumed, gradients[:3])
    second = SGDW([resumed], **setting)
    second.load_state_dict(first.state_dict())
    run(second, resumed, gradients[3:])
    assert torch.equal(straight, resumed)


# --- schedule ----------------------------------------------------------------------------------------------


def test_clipped_cosine_warms_up_linearly_to_one() -> None:
    schedule = ClippedCosine()
    assert [schedule(t) for t in (1, 300, 1499, 1500)] == [1 / 1500, 0.2, 1499 / 1500, 1.0]


@pytest.mark.parametrize(("total", "first_floor_step"), [(10000, 8259), (4000, 3488)])
def test_clipped_cosine_reaches_its_floor(total: int, first_floor_step: int) -> None:
    schedule = ClippedCosine(1500, total, 0.1)
    on_floor = [t for t in range(1500, total + 1) if schedule(t) == 0.1]
    assert on_floor == list(range(first_floor_step, total + 1))
    closed_form = 1500 + (total - 1500) * math.acos(2 * 0.1 - 1) / math.pi  # (1 + cos(pi r)) / 2 = 0.1
    assert first_floor_step == math.ceil(closed_form)


def test_clipped_cosine_closed_form() -> None:
    schedule = ClippedCosine(1500, 10000, 0.1)
    assert schedule(5750) == pytest.approx(0.5)  # half way
    assert schedule(1500 + 8500 // 4) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert schedule(10000) == schedule(50000) == 0.1
    assert ClippedCosine(1500, 10000, 0.0)(10000) == 0.0


@given(st.integers(0, 200), st.integers(1, 400), st.floats(0, 1))
def test_clipped_cosine_is_continuous_and_falls_after_the_warmup(warmup: int, decay: int, floor: float) -> None:
    schedule = ClippedCosine(warmup, warmup + decay, floor)
    values = [schedule(t) for t in range(warmup + decay + 50)]
    slope = max(1 / max(1, warmup), math.pi / 2 / decay)
    assert max(abs(b - a) for a, b in itertools.pairwise(values)) <= slope + 1e-12
    assert values[warmup] == 1.0 == max(values)
    tail = values[warmup:]
    assert all(b <= a for a, b in itertools.pairwise(tail)) and min(tail) >= floor


@pytest.mark.parametrize("values", [(-1, 10, 0.1), (11, 10, 0.1), (0, 0, 0.1), (1, 10, -0.1), (1, 10, 1.1)])
def test_impossible_schedules_are_user_errors(values: tuple[int, int, float]) -> None:
    with pytest.raises(UserError, match="schedule"):
        ClippedCosine(*values)


def test_lambda_lr_starts_at_step_one() -> None:
    schedule, theta = ClippedCosine(warmup=4, total=10, floor=0.1), start()
    optimizer = SGDW([theta], lr=0.3)
    scheduler = lambda_lr(optimizer, schedule)
    used = []
    for _ in range(12):
        used.append(optimizer.param_groups[0]["lr"])
        theta.grad = torch.zeros_like(theta)
        optimizer.step()
        scheduler.step()
    assert used == pytest.approx([0.3 * schedule(t) for t in range(1, 13)])


def test_a_checkpoint_does_not_bring_its_schedule_along() -> None:
    old = lambda_lr(SGDW([start()], lr=1.0), ClippedCosine(warmup=4, total=10))
    optimizer = SGDW([start()], lr=1.0)
    new = lambda_lr(optimizer, ClippedCosine(warmup=8, total=20))
    new.load_state_dict(old.state_dict())
    optimizer.step()
    new.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2 / 8)


def test_a_continued_schedule_starts_where_the_other_stood() -> None:
    schedule = ClippedCosine(warmup=10, total=100)
    assert [Continued(schedule, 30, 2.0)(t) for t in range(1, 90)] == [2 * schedule(30 + t) for t in range(1, 90)]
