"""Commutators against closed forms, brute force in float64, and what subtracting float32 weights would have given."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import normal, one_line_error
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mini_gpt_pl.geometry.curvature import commutator
from mini_gpt_pl.geometry.curvature.commutator import Lengths
from mini_gpt_pl.geometry.curvature.two_steps import OptimizerSteps, TwoSteps
from mini_gpt_pl.geometry.vectors.free_weights import FreeWeights, Loss
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection
from mini_gpt_pl.training.optimizers import SGDW, MuonAdamW

D = 7
WAYS = {"hessian": commutator.by_hessian, "differences": commutator.by_differences}


def quadratic(seed: int, dim: int = D) -> tuple[Loss, Tensor, Tensor]:
    """0.5 theta' H theta + b' theta, its H and b."""
    raw = normal(dim, dim, seed=seed)
    hessian, slope = raw @ raw.T / dim, normal(dim, seed=seed + 1)
    return lambda theta: theta @ hessian @ theta / 2 + slope @ theta, hessian, slope


def wavy(seed: int) -> Loss:
    """Curved everywhere, with third derivatives."""
    weights = normal(3 * D, D, seed=seed)
    return lambda theta: torch.tanh(weights @ theta).square().mean() + 0.1 * theta.square().sum().cos()


def lengths(way: str, loss_a: Loss, loss_b: Loss, theta: Tensor, eta: float = 1e-3) -> Lengths:
    found = WAYS[way](loss_a, loss_b, theta)
    return Lengths.of(found, commutator.finite(found, loss_a, loss_b, theta, eta), theta, eta)


def stepped_twice(loss_a: Loss, loss_b: Loss, theta: Tensor, eta: float) -> Tensor:
    """theta_AB - theta_BA by taking the steps and subtracting the weights, as published."""

    def walk(*order: Loss) -> Tensor:
        place = theta
        for loss in order:
            place = place - eta * commutator.gradient(loss, place)
        return place

    return walk(loss_a, loss_b) - walk(loss_b, loss_a)


# ------------------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("way", WAYS)
def test_quadratic_losses_have_a_closed_form(way: str) -> None:
    (loss_a, h_a, b_a), (loss_b, h_b, b_b) = quadratic(0), quadratic(10)
    theta = normal(D, seed=20)
    g_a, g_b = h_a @ theta + b_a, h_b @ theta + b_b
    expected = h_b @ g_a - h_a @ g_b
    found = WAYS[way](loss_a, loss_b, theta)
    torch.testing.assert_close(found.bracket, expected, rtol=1e-8, atol=1e-8)
    # On a quadratic the step size does not matter at all.
    torch.testing.assert_close(commutator.finite(found, loss_a, loss_b, theta, 0.3), expected, rtol=1e-10, atol=1e-10)
    shown = lengths(way, loss_a, loss_b, theta)
    norm_a, norm_b, size = g_a.norm(), g_b.norm(), expected.norm()
    assert float(shown.defect) == pytest.approx(float(size / norm_a / norm_b), rel=1e-7)
    assert float(shown.defect_eta) == pytest.approx(float(size / norm_a / norm_b), rel=1e-7)
    assert float(shown.scaled) == pytest.approx(float(size / (norm_a * norm_b).sqrt()), rel=1e-7)
    assert float(shown.scale_free) == pytest.approx(float(shown.scaled) * float(theta.square().sum()))
    assert float(shown.cosine) == pytest.approx(float(g_a @ g_b / norm_a / norm_b))
    assert float(shown.relative) == pytest.approx(float(size / ((h_b @ g_a).norm() + (h_a @ g_b).norm())), rel=1e-7)
    assert float(shown.step_resolution) == pytest.approx(1e-3 * float(min(norm_a, norm_b) / theta.norm()) * 2**24)


def test_a_linear_loss_has_no_hessian() -> None:
    (loss_a, h_a, _), slope = quadratic(0), normal(D, seed=5)
    found = commutator.by_hessian(loss_a, lambda theta: slope @ theta, normal(D, seed=1))
    torch.testing.assert_close(found.bracket, -h_a @ slope)


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_commutes_with_itself(way: str) -> None:
    """0, and not resolved: rounding is not reported as a defect."""
    shown = lengths(way, wavy(0), wavy(0), normal(D, seed=1))
    assert float(shown.bracket) == 0.0 and float(shown.resolved) == 0.0
    assert shown.defect.isnan().all() and shown.relative.isnan().all()


def test_a_vanished_gradient_has_no_defect() -> None:
    loss, hessian, slope = quadratic(0)
    lowest = -torch.linalg.solve(hessian, slope)
    shown = lengths("hessian", loss, lambda theta: theta.new_zeros(()) * theta.sum(), lowest)
    assert float(shown.resolved) == 0.0 and shown.defect.isnan().all() and shown.cosine.isnan().all()


# ------------------------------------------------------------------------------------------------- properties


@given(st.integers(0, 10**6))
def test_both_ways_agree(seed: int) -> None:
    loss_a, loss_b, theta = wavy(seed), wavy(seed + 1), normal(D, seed=seed + 2)
    exact, near = (way(loss_a, loss_b, theta).bracket for way in WAYS.values())
    torch.testing.assert_close(near, exact, rtol=1e-6, atol=1e-6 * float(exact.norm()))


@given(st.integers(0, 10**6))
def test_it_changes_its_sign_when_the_batches_change_places(seed: int) -> None:
    loss_a, loss_b, theta = wavy(seed), wavy(seed + 1), normal(D, seed=seed + 2)
    forth, back = (commutator.by_hessian(*pair, theta).bracket for pair in ((loss_a, loss_b), (loss_b, loss_a)))
    torch.testing.assert_close(forth, -back)


@given(st.integers(0, 10**6), st.floats(0.1, 10.0), st.floats(0.1, 10.0))
def test_scaling_the_losses(seed: int, p: float, q: float) -> None:
    """D and the relative commutator do not see the scale of a loss; c grows with its geometric mean."""
    loss_a, loss_b, theta = wavy(seed), wavy(seed + 1), normal(D, seed=seed + 2)
    plain = lengths("hessian", loss_a, loss_b, theta)
    scaled = lengths("hessian", lambda t: p * loss_a(t), lambda t: q * loss_b(t), theta)
    assert float(scaled.defect) == pytest.approx(float(plain.defect), rel=1e-9)
    assert float(scaled.relative) == pytest.approx(float(plain.relative), rel=1e-9)
    assert float(scaled.scaled) == pytest.approx((p * q) ** 0.5 * float(plain.scaled), rel=1e-9)


@given(st.integers(0, 10**6), st.floats(0.2, 5.0))
def test_c_times_theta_squared_does_not_see_the_length_of_the_weights(seed: int, factor: float) -> None:
    """In a network that is blind to it: the losses depend on theta / ||theta|| alone."""

    def blind(loss: Loss) -> Loss:
        return lambda theta: loss(theta / theta.norm())

    loss_a, loss_b, theta = blind(wavy(seed)), blind(wavy(seed + 1)), normal(D, seed=seed + 2)
    near, far = (lengths("hessian", loss_a, loss_b, scale * theta) for scale in (1.0, factor))
    assert float(far.scale_free) == pytest.approx(float(near.scale_free), rel=1e-8)
    assert float(far.scaled) == pytest.approx(float(near.scaled) / factor**2, rel=1e-8)


# ------------------------------------------------------------------------------------------------ brute force


@pytest.mark.parametrize("eta", [1e-4, 1e-2, 0.3])
def test_finite_steps_are_those_that_are_taken(eta: float) -> None:
    loss_a, loss_b, theta = wavy(0), wavy(1), normal(D, seed=2)
    found = commutator.by_hessian(loss_a, loss_b, theta)
    exact = commutator.finite(found, loss_a, loss_b, theta, eta)
    taken = stepped_twice(loss_a, loss_b, theta, eta) / eta**2
    torch.testing.assert_close(exact, taken, rtol=1e-6, atol=1e-15 / eta**2)


def test_small_steps_tend_to_the_bracket() -> None:
    loss_a, loss_b, theta = wavy(0), wavy(1), normal(D, seed=2)
    found = commutator.by_hessian(loss_a, loss_b, theta)
    off = [float((commutator.finite(found, loss_a, loss_b, theta, eta) - found.bracket).norm()) for eta in (1e-2, 1e-3)]
    assert off[1] == pytest.approx(off[0] / 10, rel=0.05)  # the next order is linear in eta
    sizes = [float(lengths("hessian", loss_a, loss_b, theta, eta).defect) for eta in (1e-5, 1.0)]
    assert sizes[0] == sizes[1]  # the leading order knows no eta


def test_subtracting_float32_weights_measures_rounding() -> None:
    """Large weights and small gradients: many times the true value, or exactly 0; the signal says so beforehand."""
    dim, eta = 2000, 1e-3
    theta = 0.2 * normal(dim, seed=0)
    curves = [normal(dim, seed=seed) for seed in (1, 2)]

    def loss(curve: Tensor, scale: float) -> Callable[[Tensor], Tensor]:
        return lambda t: scale * (torch.sin(t * curve.to(t.dtype)) * curve.to(t.dtype)).sum()

    for scale, kind in ((1.0, "fine"), (1e-2, "noise"), (1e-7, "zero")):
        loss_a, loss_b = (loss(curve, scale) for curve in curves)
        exact = lengths("hessian", loss_a, loss_b, theta, eta)
        gap = stepped_twice(loss_a, loss_b, theta.float(), eta).norm() / eta**2
        published = float(gap) / float(exact.norm_a * exact.norm_b)
        ratio, signal = published / float(exact.defect), float(exact.float32_signal)
        assert float(exact.resolved) == 1.0  # here nothing is subtracted
        if kind == "fine":
            assert signal > 10 and ratio == pytest.approx(1.0, abs=0.1)
        elif kind == "noise":
            assert signal < 0.3 and ratio > 3
        else:
            assert float(exact.step_resolution) < 1 and ratio == 0.0


def test_medians_and_quartiles() -> None:
    values = torch.tensor([4.0, 1.0, torch.nan, 2.0, 3.0], dtype=torch.float64)
    assert float(commutator.median(values)) == 2.5  # the mean of the middle two of four
    assert commutator.quartiles(values).tolist() == [1.75, 3.25]
    assert commutator.median(torch.full((3,), torch.nan, dtype=torch.float64)).isnan()


# ----------------------------------------------------------------------------------------------------- modules


class Net(nn.Module):
    """Attention, a norm with running statistics, dropout and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(8)
        self.frozen = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self.frozen.requires_grad_(False)

    def loss(self, batch: Tensor) -> Tensor:
        x = self.attention(batch, batch, batch, need_weights=False)[0].mean(1)
        out: Tensor = self.head(torch.tanh(self.frozen(self.norm(x))))
        return out.logsumexp(-1).mean() - out[:, 0].mean()


def free(net: Net, pattern: str = r"(?P<group>attention|norm|head)") -> FreeWeights:
    return FreeWeights(net, ParameterSelection.of(net, pattern))


def test_a_module_is_evaluated_elsewhere_and_left_alone() -> None:
    net = Net().eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    batches = [normal(5, 4, 8, seed=seed) for seed in (0, 1)]
    twin = free(net)
    loss_a, loss_b = (twin.loss(partial(net.loss, batch)) for batch in batches)
    theta = twin.weights.values
    found = commutator.by_hessian(loss_a, loss_b, theta)
    near = commutator.by_differences(loss_a, loss_b, theta)
    torch.testing.assert_close(near.bracket, found.bracket, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    net.double()  # and its value is that of the module with these weights
    moved = theta + 0.1 * normal(len(theta), seed=3)
    selection = twin.selection
    with torch.no_grad():
        for p, part in zip(selection.parameters(net), moved.split(selection.sizes), strict=True):
            p.copy_(part.view(p.shape))
    torch.testing.assert_close(loss_a(moved), net.loss(batches[0]))


def test_running_statistics_of_the_module_stay(tmp_path: Any) -> None:
    net = Net().train()
    before = net.norm.running_mean.clone() if net.norm.running_mean is not None else None
    twin = free(net)
    twin.loss(partial(net.loss, normal(5, 4, 8)))(twin.weights.values)
    assert before is not None and net.norm.running_mean is not None and torch.equal(net.norm.running_mean, before)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


@pytest.mark.parametrize("beside", [0.0, 1.0])
def test_a_kernel_without_second_derivative_is_named(beside: float) -> None:
    """Torch itself does not see it here: the cut lies where no path to the weights leads over it."""
    smooth, theta = wavy(0), normal(D)

    def loss(t: Tensor) -> Tensor:
        value: Tensor = _Once.apply(torch.tanh(t)) + beside * t.square().sum()
        return value

    for first, second in ((loss, smooth), (smooth, loss)):
        with one_line_error("cannot be differentiated twice", commutator.NotTwiceError):
            commutator.by_hessian(first, second, theta)
    found = commutator.by_differences(loss, smooth, theta)
    expected = commutator.by_hessian(lambda t: torch.tanh(t).square().sum() + beside * t.square().sum(), smooth, theta)
    torch.testing.assert_close(found.bracket, expected.bracket, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------- the optimizer's own steps


def trained(make: Callable[[Any], torch.optim.Optimizer], steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    optimizer = make(net)
    for step in range(steps):
        net.zero_grad()
        net(normal(6, 4, seed=step).float()).square().mean().backward()
        optimizer.step()
    return net, optimizer


def apart(net: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = (net(x) - x[:, :2]).square().mean()
    return loss


def order(net: nn.Module, optimizer: torch.optim.Optimizer, clip: float | None = None) -> tuple[TwoSteps, Lengths, Any]:
    selection = ParameterSelection.of(net, "")
    twin = FreeWeights(net, selection)
    batches = [normal(6, 4, seed=seed) for seed in (10, 11)]
    loss_a, loss_b = (twin.loss(partial(apart, net, batch)) for batch in batches)
    theta = twin.weights.values
    grads = [commutator.gradient(loss, theta) for loss in (loss_a, loss_b)]
    found = OptimizerSteps(optimizer, net, selection, theta, clip).order(loss_a, loss_b, *grads)
    eta = float(optimizer.param_groups[0]["lr"])
    return found, lengths("hessian", loss_a, loss_b, theta, eta), (loss_a, loss_b, theta)


def test_plain_sgd_gives_the_defect_at_its_learning_rate() -> None:
    found, shown, (loss_a, loss_b, theta) = order(*trained(lambda net: torch.optim.SGD(net.parameters(), lr=0.02)))
    torch.testing.assert_close(found.change, stepped_twice(loss_a, loss_b, theta, 0.02), rtol=1e-8, atol=1e-14)
    assert float(found.memory.norm()) < 1e-15
    defect = found.change.norm() / (found.step_a.norm() * found.step_b.norm())
    assert float(defect) == pytest.approx(float(shown.defect_eta), rel=1e-8)


def test_momentum_alone_tells_the_orders_apart() -> None:
    """-lr beta (g_A - g_B), with no curvature in it."""
    found, _, (loss_a, loss_b, theta) = order(
        *trained(lambda net: torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9))
    )
    g_a, g_b = commutator.gradient(loss_a, theta), commutator.gradient(loss_b, theta)
    torch.testing.assert_close(found.memory, -0.02 * 0.9 * (g_a - g_b), rtol=1e-8, atol=1e-14)
    assert 0 < float(found.curvature.norm()) < float(found.memory.norm())


def adamw_by_hand(p: Tensor, state: dict[str, Tensor], grads: list[Tensor], group: dict[str, Any]) -> Tensor:
    """AdamW's formula in float64, from a state."""
    beta1, beta2 = group["betas"]
    m, v, t = state["exp_avg"].double(), state["exp_avg_sq"].double(), int(state["step"])
    for grad in grads:
        t += 1
        m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad**2
        ratio = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + group["eps"])
        p = p * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * ratio
    return p


def test_adamw_from_its_own_state() -> None:
    """Against the formula, with constant gradients; the real optimizer and the weights do not move."""
    net, optimizer = trained(lambda net: torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.3))
    states = {p: {k: v.clone() for k, v in optimizer.state[p].items()} for p in net.parameters()}
    weights = [p.detach().clone() for p in net.parameters()]
    # A scheduler wraps `step`, and hooks hang on it: neither may be reached through a copy.
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    optimizer.register_step_post_hook(lambda *_: pytest.fail("the copy called the original's hook"))
    found, _, (loss_a, loss_b, theta) = order(net, optimizer)
    for p, before in zip(net.parameters(), weights, strict=True):
        assert torch.equal(p, before) and all(torch.equal(optimizer.state[p][k], v) for k, v in states[p].items())
        assert optimizer.state[p]["exp_avg"].dtype == torch.float32
    selection = ParameterSelection.of(net, "")
    grads = [commutator.gradient(loss, theta).split(selection.sizes) for loss in (loss_a, loss_b)]
    sizes = theta.split(selection.sizes)
    expected = []
    for i, p in enumerate(net.parameters()):
        ab, ba = ([grads[k][i].view(p.shape) for k in pair] for pair in ((0, 1), (1, 0)))
        start = sizes[i].view(p.shape)
        args = (states[p], optimizer.param_groups[0])
        ends = [adamw_by_hand(start, args[0], pair, args[1]) for pair in (ab, ba)]
        expected.append((ends[0] - ends[1]).reshape(-1))
    torch.testing.assert_close(found.memory, torch.cat(expected), rtol=1e-7, atol=1e-13)
    assert float(found.curvature.norm()) > 0


def kinds(net: nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in net.parameters() if p.ndim == 2], "kind": "matrices"},
        {"params": [p for p in net.parameters() if p.ndim < 2], "kind": "vectors", "weight_decay": 0.0},
    ]


@pytest.mark.parametrize(
    "make",
    [
        lambda net: SGDW(net.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1),
        lambda net: MuonAdamW(kinds(net)),
        lambda net: torch.optim.Adam(net.parameters(), lr=0.01, fused=True),
        lambda net: torch.optim.RMSprop(net.parameters(), lr=0.01, foreach=True),
    ],
)
@pytest.mark.parametrize("steps", [0, 3])
def test_other_optimizers_and_a_state_that_does_not_exist_yet(make: Any, steps: int) -> None:
    """The first step on A is the one that the optimizer itself would take."""
    net, optimizer = trained(make, steps)
    found, _, (loss_a, _, theta) = order(net, optimizer, clip=0.05)
    selection = ParameterSelection.of(net, "")
    grad = commutator.gradient(loss_a, theta)
    assert float(grad.norm()) > 0.05
    for p, part in zip(net.parameters(), grad.split(selection.sizes), strict=True):
        p.grad = part.view(p.shape).float()
    nn.utils.clip_grad_norm_(net.parameters(), 0.05)
    optimizer.step()
    moved = selection.weights(net).values.double() - theta
    torch.testing.assert_close(found.step_a, moved, rtol=1e-3, atol=1e-6)
    assert torch.isfinite(found.change).all() and float(found.change.norm()) > 0


def test_weights_outside_of_the_selection_stay() -> None:
    net, optimizer = trained(lambda net: torch.optim.AdamW(net.parameters(), lr=0.01))
    selection = ParameterSelection.of(net, "2")
    twin = FreeWeights(net, selection)
    loss = twin.loss(lambda: net(normal(6, 4)).square().mean())
    after = OptimizerSteps(optimizer, net, selection, twin.weights.values).path([partial(commutator.gradient, loss)])
    assert after[0].shape == (selection.dim,) and float((after[0] - twin.weights.values).norm()) > 0
