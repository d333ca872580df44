"""Interventions against what they should do in closed form, on a module that the library knows nothing about."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import one_line_error
from helpers import checkpoints, metrics, quiet_trainer, same
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from mini_gpt_pl.callbacks import BasisSource, Kick, Schedule, SubspaceIntervention, TrajectoryRecorder
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.directions.steering import Steering
from mini_gpt_pl.geometry.directions.subspace import Basis
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector

PATTERN = r"(?P<group>first|second)\.weight"
Make = Callable[[Any], Optimizer]


def sgd(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.5)


def adamw(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=1e-2, betas=(0.9, 0.98), weight_decay=1.0)


class Own(LightningModule):
    """Two layers, of which a basis sees the weights and not the biases."""

    def __init__(self, make: Make = sgd) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)
        self.make = make

    def batch_loss(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self.second(torch.tanh(self.first(batch[0]))), batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.batch_loss(batch)

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(64, 6, generator=generator)
        y = torch.randint(0, 3, (64,), generator=generator)
        return DataLoader(TensorDataset(x, y), batch_size=8, generator=torch.Generator())

    def configure_optimizers(self) -> Optimizer:
        return self.make(self.parameters())


class Diary(Callback):
    """Weights after every step, and the gradients that the optimizer saw, after clipping and intervention."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        named = pl_module.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        self._note(pl_module)

    def _note(self, module: LightningModule) -> None:
        self.weights.append({name: p.detach().clone() for name, p in module.named_parameters()})


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors.values()])


def train(
    folder: Path, callbacks: list[Callback], make: Make = sgd, steps: int = 6, ckpt: Path | None = None, **more: Any
) -> Diary:
    diary = Diary()
    trainer = quiet_trainer(folder, [*callbacks, diary], max_steps=steps, **more)
    trainer.fit(Own(make), ckpt_path=None if ckpt is None else str(ckpt))
    return diary


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose path gives a subspace."""
    folder = tmp_path_factory.mktemp("recorded") / "seed-3"
    train(folder, [TrajectoryRecorder(PATTERN, Schedule(every=2))], steps=12)
    return folder


@pytest.fixture
def source(recorded: Path) -> BasisSource:
    return BasisSource("path", run=str(recorded), k=2)


def projection(source: BasisSource, module: Own) -> Tensor:
    """P over all weights, dense, from the definition."""
    basis = source.build(module)
    names = [name for name, _ in module.named_parameters()]
    sizes = [p.numel() for p in module.parameters()]
    starts = dict(zip(names, torch.tensor([0, *sizes]).cumsum(0).tolist(), strict=False))
    rows = torch.zeros(basis.size, sum(sizes), dtype=torch.float64)
    for i in range(basis.size):
        unit = torch.zeros(basis.size).index_fill(0, torch.tensor(i), 1.0)
        for name, part in basis.selection.unflatten(basis.combine(unit)).items():
            rows[i, starts[name] : starts[name] + part.numel()] = part.double().flatten()
    return rows.T @ rows


# --------------------------------------------------------------------------------------------- closed forms

ARMS = {"suppress": (1.0, 0.25), "keep": (1.0, 0.0), "remove": (0.0, 1.0), "scale": (0.3, 0.3), "amplify": (4.0, 1.0)}


@pytest.mark.parametrize("space", ["gradient", "update"])
@pytest.mark.parametrize("arm", ARMS)
def test_a_step_is_put_together_from_its_parts(tmp_path: Path, source: BasisSource, arm: str, space: Any) -> None:
    """For plain SGD gradient and update are parallel, so both spaces have one closed form; clipping comes first."""
    a, b = ARMS[arm]
    bare = train(tmp_path / "bare", [], steps=3, gradient_clip_val=0.05)
    change = SubspaceIntervention(a, b, source, space, start=2)
    changed = train(tmp_path / "changed", [change], steps=3, gradient_clip_val=0.05)
    assert same(bare.weights[:3], changed.weights[:3])  # nothing before the start
    p, g = projection(source, Own()), flat(bare.gradients[2])
    assert float(g.norm()) == pytest.approx(0.05, rel=1e-3)
    expected = a * p @ g + b * (g - p @ g)
    moved = flat(changed.weights[2]) - flat(changed.weights[3])
    assert torch.allclose(moved, 0.5 * expected, atol=1e-7)
    row = metrics(tmp_path / "changed")[3]
    seen = g if space == "gradient" else -0.5 * g
    assert row["intervention/subspace/parallel"] == pytest.approx(float((p @ seen).norm() / seen.norm()), rel=1e-4)
    assert row["intervention/subspace/change"] == pytest.approx(float((expected - g).norm() / g.norm()), rel=1e-4)
    named = bare.gradients[2]
    null = sum(
        float(named[f"{n}.weight"].square().sum()) * 2 / named[f"{n}.weight"].numel() for n in ("first", "second")
    )
    assert row["intervention/subspace/parallel_null"] == pytest.approx(math.sqrt(null / float(g @ g)), rel=1e-4)
    assert list(metrics(tmp_path / "changed")) == [3]


def test_every_nth_step(tmp_path: Path) -> None:
    diary = train(tmp_path, [SubspaceIntervention(0.0, 0.0, start=1, every=2)], steps=6)
    still = [same(a, b) for a, b in zip(diary.weights, diary.weights[1:], strict=False)]
    assert still == [False, True, False, True, False, True]


def test_changed_steps_are_told_between_those_of_the_log(tmp_path: Path) -> None:
    """Steps 2, 5, 8, ... are changed, and 4, 8, 12 are logged: told are the first ones from there on."""
    change = SubspaceIntervention(0.5, 0.5, start=1, every=3)
    train(tmp_path, [change], steps=14, log_every_n_steps=4)
    assert [step for step, row in metrics(tmp_path).items() if "intervention/subspace/change" in row] == [2, 5, 8, 14]


def test_other_weights_can_be_left_alone(tmp_path: Path, source: BasisSource) -> None:
    bare = train(tmp_path / "bare", [], steps=1)
    inside = SubspaceIntervention(1.0, 0.0, source, others="untouched")
    changed = train(tmp_path / "changed", [inside], steps=1)
    assert all(torch.equal(bare.weights[1][name], changed.weights[1][name]) for name in ("first.bias", "second.bias"))
    p, g = projection(source, Own()), flat(bare.gradients[0])
    seen = flat(changed.gradients[0])
    weights = torch.cat([torch.full_like(v, "weight" in k).flatten() for k, v in bare.gradients[0].items()]).double()
    assert torch.allclose(seen, p @ g + (1 - weights) * g, atol=1e-7)
    share = float((seen - g).norm() / g.norm())
    assert metrics(tmp_path / "changed")[1]["intervention/subspace/change"] == pytest.approx(share, rel=1e-4)


def test_the_change_is_of_the_accumulated_gradient(tmp_path: Path, source: BasisSource) -> None:
    bare = train(tmp_path / "bare", [], steps=1, accumulate_grad_batches=3)
    changed = train(tmp_path / "changed", [SubspaceIntervention(0.0, 1.0, source)], steps=1, accumulate_grad_batches=3)
    p, g = projection(source, Own()), flat(bare.gradients[-1])
    assert torch.allclose(flat(changed.gradients[-1]), g - p @ g, atol=1e-7)


@pytest.mark.parametrize("space", ["gradient", "update"])
def test_unit_gains_change_nothing_bit_for_bit(tmp_path: Path, source: BasisSource, space: Any) -> None:
    bare = train(tmp_path / "bare", [], adamw)
    assert same(bare.weights, train(tmp_path / "with", [SubspaceIntervention(1.0, 1.0, source, space)], adamw).weights)


def test_two_interventions_act_in_their_order(tmp_path: Path) -> None:
    both = [SubspaceIntervention(g, g, name=str(g)) for g in (0.5, 0.25)]
    bare, changed = train(tmp_path / "bare", [], steps=1), train(tmp_path / "changed", [*both], steps=1)
    assert torch.allclose(flat(changed.gradients[0]), 0.125 * flat(bare.gradients[0]))


# ------------------------------------------------------------------------------------- what Adam makes of them


def test_adam_does_not_see_a_scale(tmp_path: Path, source: BasisSource) -> None:
    """(1 - s) g is g to it, and g_par + (1 - s) g_perp is g + s / (1 - s) g_par; the update's scale it cannot undo."""

    def after(name: str, *arm: Any) -> Tensor:
        return flat(train(tmp_path / name, [SubspaceIntervention(*arm)] if arm else [], adamw, steps=8).weights[-1])

    bare, scaled = after("bare"), after("scaled", 0.25, 0.25)
    suppressed, amplified = after("suppressed", 1.0, 0.25, source), after("amplified", 4.0, 1.0, source)
    moved = float((bare - flat(Own().state_dict())).norm())
    assert float((scaled - bare).norm()) < 1e-4 * moved
    assert float((suppressed - amplified).norm()) < 1e-4 * moved
    assert float((suppressed - bare).norm()) > 1e-2 * moved
    assert float((after("update", 0.25, 0.25, None, "update") - bare).norm()) > 0.1 * moved


def test_full_strength_erases_what_is_outside(tmp_path: Path, source: BasisSource) -> None:
    """Weights without gradient shrink as decay says, by 1 - lr wd a step; without decay they stay."""
    kept = train(tmp_path / "kept", [SubspaceIntervention(1.0, 0.0, source)], adamw, steps=20)
    off = train(tmp_path / "off", [SubspaceIntervention(1.0, 0.0, source, decay="none")], adamw, steps=20)
    for name in ("first.bias", "second.bias"):
        assert torch.allclose(kept.weights[20][name], 0.99**20 * kept.weights[0][name], rtol=1e-5)
        assert torch.equal(off.weights[20][name], off.weights[0][name])


def test_adam_leaves_the_subspace_and_a_projected_update_does_not(tmp_path: Path, source: BasisSource) -> None:
    p = projection(source, Own())

    def outside(name: str, space: Any, decay: Any) -> tuple[float, Tensor]:
        diary = train(tmp_path / name, [SubspaceIntervention(1.0, 0.0, source, space, decay=decay)], adamw, steps=5)
        moved = flat(diary.weights[5]) - flat(diary.weights[0])
        return float((moved - p @ moved).norm() / moved.norm()), flat(diary.weights[5])

    assert outside("gradient", "gradient", "none")[0] > 0.3
    assert outside("update", "update", "none")[0] < 1e-5
    assert outside("span", "update", "span")[0] < 1e-5
    # With decay, what is outside is what decay leaves.
    _, end = outside("all", "update", "all")
    start = flat(Own().state_dict())
    assert torch.allclose(end - p @ end, 0.99**5 * (start - p @ start), atol=1e-6)


def test_decay_in_the_span_is_of_the_parallel_part(tmp_path: Path, source: BasisSource) -> None:
    """With a gradient of zero, decay and Adam's memory of the first step are all that moves."""
    diary = train(tmp_path, [SubspaceIntervention(0.0, 0.0, source, decay="span", start=1)], adamw, steps=4)
    frozen = train(tmp_path / "off", [SubspaceIntervention(0.0, 0.0, source, decay="none", start=1)], adamw, steps=4)
    p, start = projection(source, Own()), flat(diary.weights[1])
    assert same(diary.weights[:2], frozen.weights[:2])
    theta = start
    for t in range(1, 4):
        step = flat(frozen.weights[t + 1]) - flat(frozen.weights[t])
        theta = theta - 0.01 * (p @ theta) + step
    assert torch.allclose(flat(diary.weights[4]), theta, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ kicks


@pytest.mark.parametrize("size", [{"length": -1.0}, {"multiple": 0.0}])
def test_a_kick_backwards_or_of_no_length_is_refused(size: dict[str, Any]) -> None:
    with one_line_error("give one above 0"):
        Kick("gaussian", **size)


def test_a_kick_is_as_long_as_it_says_and_across_the_basis(tmp_path: Path, source: BasisSource) -> None:
    found = {}
    for direction in ("commutator", "gaussian"):
        kick = Kick(direction, source, multiple=30.0, eta=1e-2, samples=3, start=2, size=3)
        before, after = Before(), Before()
        train(tmp_path / direction, [before, kick, after], steps=4)
        moved = flat(after.seen[2]) - flat(before.seen[2])
        p = projection(source, Own())
        assert float((p @ moved).norm()) < 1e-5 * float(moved.norm())
        row = metrics(tmp_path / direction)[2]
        assert row["intervention/kick/length"] == pytest.approx(float(moved.norm()), rel=1e-4)
        relative = float(moved.norm() / flat(before.seen[2]).norm())
        assert row["intervention/kick/relative"] == pytest.approx(relative, rel=1e-4)
        assert all(same(before.seen[step], after.seen[step]) for step in (0, 1, 3))  # once
        found[direction] = row["intervention/kick/length"]
    assert found["commutator"] == found["gaussian"] > 0.0  # matched


class Before(Callback):
    """Weights and gradients when a batch begins, at this place in the list of callbacks."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []
        self.grads: list[list[Tensor | None]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.seen.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})
        self.grads.append([None if p.grad is None else p.grad.clone() for p in pl_module.parameters()])


def test_a_kick_follows_the_commutator_by_brute_force(tmp_path: Path) -> None:
    """One pair, the two orders of two tiny steps on the halves that the probe's own cut gives, in float64."""
    kick = Kick("commutator", None, length=0.5, samples=1, start=1)
    before, after = Before(), Before()
    train(tmp_path, [before, kick, after], steps=2)
    moved = flat(after.seen[1]) - flat(before.seen[1])
    assert float(moved.norm()) == pytest.approx(0.5, rel=1e-5)
    assert same(before.grads, after.grads)
    module = Own().double()
    module.load_state_dict(before.seen[1])
    assert kick._pairs is not None
    batches = list(Own().train_dataloader())
    pair = kick._pairs(1, 0, [batches[1][0], batches[1][1]])

    def gradient(theta: Tensor, batch: Any) -> Tensor:
        nn.utils.vector_to_parameters(theta, module.parameters())
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(module.batch_loss(batch), list(module.parameters()))]
        )

    theta, eta, ends = flat(before.seen[1]), 1e-4, []
    for one, other in (pair, pair[::-1]):
        place = theta - eta * gradient(theta, one)
        ends.append(place - eta * gradient(place, other))
    delta = ends[0] - ends[1]
    assert float(delta @ moved / delta.norm() / moved.norm()) == pytest.approx(1.0, abs=1e-4)


def test_noise_comes_again_and_again(tmp_path: Path) -> None:
    before, after = Before(), Before()
    train(tmp_path, [before, Kick("gaussian", length=0.1, start=1, every=2), after], steps=6)
    lengths = [float((flat(b) - flat(a)).norm()) for a, b in zip(before.seen, after.seen, strict=True)]
    assert lengths == pytest.approx([0.0, 0.1, 0.0, 0.1, 0.0, 0.1], rel=1e-5, abs=1e-12)
    kicks = [flat(after.seen[t]) - flat(before.seen[t]) for t in (1, 3)]
    assert abs(float(kicks[0] @ kicks[1])) < 0.9 * 0.01  # another direction each time


# ------------------------------------------------------------------------------------------- resuming, bases


def test_a_resumed_run_is_the_whole_one(tmp_path: Path, source: BasisSource) -> None:
    """Eight batches are an epoch; before its end, Lightning would begin a plain loader anew."""

    def arms() -> list[Callback]:
        return [
            SubspaceIntervention(1.0, 0.3, source, decay="span", start=1),
            SubspaceIntervention(0.5, 1.0, source, "update", start=3, name="update"),
            Kick("commutator", source, multiple=20.0, samples=2, size=3, start=2, every=3),
        ]

    whole = train(tmp_path / "whole", arms(), adamw, steps=12)
    train(tmp_path / "cut", [*arms(), checkpoints(tmp_path / "cut")], adamw, steps=8)
    rest = train(tmp_path / "rest", arms(), adamw, steps=12, ckpt=tmp_path / "cut" / "checkpoints" / "000008.ckpt")
    assert same(whole.weights[-1], rest.weights[-1])


def test_the_basis_is_the_run_s_centred_pca(recorded: Path) -> None:
    diary = Own()
    basis = BasisSource("path", run=str(recorded), k=2).build(diary)
    assert basis.selection.groups == ("first", "second") and basis.size == 4
    redone = train(recorded.parent / "redone", [], steps=12)
    for block, name in zip(basis.blocks, ("first.weight", "second.weight"), strict=True):
        path = torch.stack([redone.weights[step][name].double().flatten() for step in range(0, 13, 2)])
        expected = torch.linalg.svd(path - path.mean(0), full_matrices=False)[2][:2]
        assert torch.allclose(expected.T @ expected, block.rows.double().T @ block.rows.double(), atol=1e-4)
    early = BasisSource("path", run=str(recorded), k=2, until=2).build(diary)
    assert early.size == 2  # two snapshots, one direction each


def test_every_kind_of_basis(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, module = str(recorded), Own()
    theta0 = BasisSource("theta0", run=run).build(module)
    own = theta0.parallel(Vector(theta0.selection.weights(module).values, theta0.selection)).values
    assert torch.allclose(own, theta0.selection.weights(module).values, atol=1e-5)
    path, blocks = (BasisSource(kind, run=run).build(module) for kind in ("path", "blocks"))
    assert [len(b.rows) for b in path.blocks] == [len(b.rows) for b in blocks.blocks]
    assert BasisSource("isotropic", k=5).build(module).selection.dim == sum(p.numel() for p in module.parameters())
    assert BasisSource("rank_one", pattern=PATTERN, k=1).build(module).size == 2
    seed_everything(3, verbose=False)
    assert BasisSource("path", run=str(recorded.parent / "seed-{seed}")).build(module).size == path.size
    drawn = BasisSource("isotropic", k=2)
    first = drawn.build(module).blocks[0].rows
    assert torch.equal(first, drawn.build(module).blocks[0].rows)
    seed_everything(4, verbose=False)
    assert not torch.equal(first, drawn.build(module).blocks[0].rows)
    monkeypatch.delenv("PL_GLOBAL_SEED")
    with one_line_error("asks for a seed"):
        BasisSource("path", run="runs/{seed}").build(module)


def test_gains_without_a_basis_must_agree() -> None:
    with pytest.raises(ValueError, match="basis"):
        Steering(None, 1.0, 0.5)
    selection = ParameterSelection(("w",), ((2,),), ("all",))
    basis = Basis.of(selection, [("w", slice(0, 2), torch.tensor([[1.0, 1.0]]))])
    tensors = {"bias": torch.tensor([1.0])}
    Steering(basis, 3.0, 2.0).apply_(tensors)  # a frozen weight has no gradient, and counts as zero
    assert tensors["bias"].item() == 2.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda run: SubspaceIntervention(1.0, 0.5), "needs a basis"),
        (lambda run: SubspaceIntervention(start=-1), "start -1"),
        (lambda run: Kick(), "length"),
        (lambda run: Kick(length=1.0, multiple=1.0), "not both"),
        (lambda run: Kick(length=1.0, samples=0), "samples 0"),
        (lambda run: BasisSource("path"), "recorded run"),
        (lambda run: BasisSource("isotropic", run=run), "pattern"),
        (lambda run: BasisSource("isotropic", k=0), "0 directions"),
        (lambda run: BasisSource("path", run=run + "x").build(Own()), "no snapshots"),
        (lambda run: BasisSource("path", run=run).build(nn.Linear(6, 5)), "no parameter"),
    ],
)
def test_mistakes_are_one_line(recorded: Path, make: Callable[[str], Any], words: str) -> None:
    with one_line_error(words):
        make(str(recorded))


def test_what_cannot_be_changed_is_refused(tmp_path: Path, source: BasisSource) -> None:
    span = SubspaceIntervention(1.0, 1.0, source, decay="span")
    with pytest.raises(UserError, match="use AdamW"):
        train(tmp_path, [span], lambda p: SGD(p, lr=0.1, weight_decay=0.1))
