"""What the commutator probe logs, against brute force on copied models, snapshot files and batches drawn again."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import one_line_error
from helpers import (
    GROUPS,
    Spy,
    checkpoints,
    flat,
    metrics,
    quiet_trainer,
    read_path,
    recorder,
    same,
    tiny_gpt,
    tiny_stories,
)
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mini_gpt_pl.callbacks import CommutatorProbe, Schedule, TrajectoryRecorder
from mini_gpt_pl.callbacks.measuring import DrawsBatches
from mini_gpt_pl.callbacks.nests import take_samples
from mini_gpt_pl.callbacks.pairs import BatchPairs
from mini_gpt_pl.geometry.curvature import commutator
from mini_gpt_pl.stories.data.batch import Batch
from mini_gpt_pl.stories.gpt import GPT
from mini_gpt_pl.stories.objective import ProbeWeight, combine, count_targets, loss_terms

STEPS, AT = 6, 4
WEIGHT = ProbeWeight(2.0, 4.0, switch_step=3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Spy]:
    """One sample a step, so that medians are the sample itself."""
    folder, spy = tmp_path_factory.mktemp("commutator"), Spy()
    callbacks = [spy, recorder(2), CommutatorProbe(Schedule(every=2), samples=1, optimizer_step=True, seed=3)]
    quiet_trainer(folder, callbacks, max_steps=STEPS).fit(tiny_gpt(), datamodule=tiny_stories())
    return folder, spy


def pair_at(step: int, sample: int = 0, seed: int = 3) -> tuple[Batch, Batch]:
    """The batches of a sample, from the data alone."""
    data = tiny_stories()
    data.setup("fit")
    drawn = []
    for which in (0, 1):
        counter = np.array([0, which, sample, step], dtype=np.uint64)
        key = np.array([seed, 0xC033], dtype=np.uint64)
        drawn.append(data.draw_batch(np.random.Generator(np.random.Philox(key=key, counter=counter))))
    return drawn[0], drawn[1]


def gradient(gpt: GPT, batch: Batch, weight: float) -> Tensor:
    """Of the objective, from its definition."""
    scores = gpt(batch.tokens, batch.targets)
    counts = count_targets(batch.targets, batch.probe_mask)
    loss = combine(loss_terms(scores.nll, batch.targets, batch.probe_mask, counts), counts, weight)
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(gpt.parameters()))])


def split(gpt: GPT, vector: Tensor) -> dict[str, Tensor]:
    parts = vector.split([p.numel() for p in gpt.parameters()])
    return {f"gpt.{name}": part for (name, _), part in zip(gpt.named_parameters(), parts, strict=True)}


@torch.no_grad()
def moved(gpt: GPT, change: Tensor) -> GPT:
    other = copy.deepcopy(gpt)
    for p, part in zip(other.parameters(), split(gpt, change).values(), strict=True):
        p.add_(part.view(p.shape))
    return other


def products(gpt: GPT, gradients: list[Tensor], batches: tuple[Batch, Batch], weight: float) -> list[Tensor]:
    """H_B g_A and H_A g_B by differences."""
    found = []
    for along, batch in zip(gradients, reversed(batches), strict=True):
        ends = [gradient(moved(gpt, sign * 1e-5 * along), batch, weight) for sign in (1, -1)]
        found.append((ends[0] - ends[1]) / 2e-5)
    return found


@pytest.mark.parametrize("step", [0, AT])
def test_defects_are_those_of_steps_that_are_taken(run: tuple[Path, Spy], step: int) -> None:
    folder, spy = run
    logged = {key.rpartition("/")[2]: v for key, v in metrics(folder)[step].items() if key.startswith("commutator/all")}
    gpt = copy.deepcopy(spy.before[step + 1]).double()
    weight, batches = WEIGHT(step + 1), pair_at(step)
    g_a, g_b = (gradient(gpt, batch, weight) for batch in batches)
    ends = [moved(gpt, -1e-3 * first) for first in (g_a, g_b)]
    seconds = [gradient(end, batch, weight) for end, batch in zip(ends, reversed(batches), strict=True)]
    delta = -1e-3 * (g_a + seconds[0]) + 1e-3 * (g_b + seconds[1])
    product = float(g_a.norm() * g_b.norm())
    assert logged["norm_a"] == pytest.approx(float(g_a.norm()), rel=1e-9)
    assert logged["norm_b"] == pytest.approx(float(g_b.norm()), rel=1e-9)
    assert logged["gradient_cosine"] == pytest.approx(float(g_a @ g_b) / product, rel=1e-7)
    assert logged["defect_eta"] == pytest.approx(float(delta.norm()) / 1e-6 / product, rel=1e-7)
    pulled = products(gpt, [g_a, g_b], batches, weight)
    bracket = pulled[0] - pulled[1]
    size, norm = float(bracket.norm()), float(torch.cat([p.detach().flatten() for p in gpt.parameters()]).norm())
    assert logged["bracket"] == pytest.approx(size, rel=1e-5)
    assert logged["defect"] == pytest.approx(size / product, rel=1e-5)
    assert logged["c"] == pytest.approx(size / math.sqrt(product), rel=1e-5)
    assert logged["c_theta2"] == pytest.approx(size / math.sqrt(product) * norm**2, rel=1e-5)
    assert logged["relative"] == pytest.approx(size / float(pulled[0].norm() + pulled[1].norm()), rel=1e-5)
    assert logged["weights"] == pytest.approx(norm, rel=1e-9)
    assert logged["resolved"] == 1.0
    half = 2.0**-24 * norm
    assert logged["step_resolution"] == pytest.approx(1e-3 * float(min(g_a.norm(), g_b.norm())) / half)
    assert logged["float32_signal"] == pytest.approx(float(delta.norm()) / half)


def test_projections_know_the_past_only(run: tuple[Path, Spy]) -> None:
    """Dense directions from the snapshot files up to the step, and the null from the energies in the same blocks."""
    folder, spy = run
    row = metrics(folder)[AT]
    gpt, weight, batches = copy.deepcopy(spy.before[AT + 1]).double(), WEIGHT(AT + 1), pair_at(AT)
    g_a, g_b = (gradient(gpt, batch, weight) for batch in batches)
    pulled = products(gpt, [g_a, g_b], batches, weight)
    bracket = pulled[0] - pulled[1]
    named = split(gpt, bracket)
    total, inside, expected, on_theta0, last = float(bracket.square().sum()), 0.0, 0.0, 0.0, []
    for group in GROUPS:
        own = flat(named, group)
        basis = read_path(folder, group, until=AT)[1]
        weights = np.cumsum(basis, axis=0)
        directions = np.linalg.svd(weights - weights.mean(0), full_matrices=False)[2][:2]
        inside += float(((directions @ own) ** 2).sum())
        on_theta0 += float((basis[0] @ own) ** 2 / (basis[0] @ basis[0]))
        expected += float(own @ own) * 2 / own.size
        last.append((own, basis[-1]))
        share = float(own @ own) / total
        assert row[f"commutator/{group}/share"] == pytest.approx(share, rel=1e-4)
        assert row[f"commutator/{group}/share_null"] == pytest.approx(own.size / bracket.numel())
        squares = sum(float((flat(split(gpt, g), group) ** 2).sum()) for g in (g_a, g_b))
        assert row[f"commutator/{group}/gradient_share"] == pytest.approx(
            squares / float(g_a @ g_a + g_b @ g_b), rel=1e-6
        )
    together = sum(row[f"commutator/{group}/share"] for group in GROUPS)
    assert row["commutator/trunk/share"] == pytest.approx(together, rel=1e-9)  # of one sample
    prefix = "commutator/all/on_path"
    assert row[prefix] == pytest.approx(math.sqrt(inside / total), rel=1e-3)
    assert row[f"{prefix}_null"] == pytest.approx(math.sqrt(expected / total), rel=1e-4)
    assert row[f"{prefix}_ratio"] == pytest.approx(math.sqrt(inside / expected), rel=1e-3)
    assert row[f"{prefix}_isotropic"] == pytest.approx(math.sqrt(4 / bracket.numel()))
    assert row["commutator/all/on_theta0"] == pytest.approx(math.sqrt(on_theta0 / total), rel=1e-3)
    whole, step = (np.concatenate(column) for column in zip(*last, strict=True))
    scale = np.linalg.norm(whole) * np.linalg.norm(step)
    assert row["commutator/all/alignment"] == pytest.approx(whole @ step / scale, rel=1e-3)
    assert row["commutator/all/alignment_rms"] == pytest.approx(abs(whole @ step) / scale, rel=1e-3)
    assert row["commutator/all/alignment_flip"] == pytest.approx(np.linalg.norm(whole * step) / scale, rel=1e-3)
    for name in ("path", "theta0", "singular", "rank_one"):
        assert 0 <= row[f"commutator/all/on_{name}_below"] <= 1
    assert "commutator/all/on_path" not in metrics(folder)[0] and "commutator/all/alignment" not in metrics(folder)[0]
    assert not any(name.startswith("commutator") for step in (1, 3, 5) for name in metrics(folder)[step])
    assert STEPS in metrics(folder) and "commutator/all/defect" in metrics(folder)[STEPS]


def test_steps_of_the_optimizer_are_logged_with_what_its_memory_does(run: tuple[Path, Spy]) -> None:
    row = metrics(run[0])[AT]
    change, memory, curvature = (row[f"commutator/all/step_{name}"] for name in ("defect", "memory", "curvature"))
    assert abs(change - memory) <= curvature * (1 + 1e-9) and change > 0 and memory > 0
    assert abs(row["commutator/all/step_cosine"]) <= 1


# --------------------------------------------------------------------------------------------------- any module


class Plain(LightningModule):
    """No drawer of batches; one frozen layer; a batch norm, a dropout, and a loss that can vanish."""

    def __init__(self, silent: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(4, 6)
        self.layers = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 2))
        self.frozen.requires_grad_(False)
        self.silent = silent

    def batch_loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        loss: Tensor = (self.layers(self.frozen(x)) - y).square().mean()
        return 0.0 * loss if self.silent else loss

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.batch_loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.layers.parameters(), lr=0.05, momentum=0.9)


def plain(folder: Path, callbacks: list[Callback], module: LightningModule | None = None, **settings: Any) -> Plain:
    module = module or Plain()
    torch.manual_seed(5)
    data = TensorDataset(torch.randn(64, 4), torch.randn(64, 2))
    quiet_trainer(folder, callbacks, **{"max_steps": 6, **settings}).fit(module, DataLoader(data, 8))
    assert isinstance(module, Plain)
    return module


def plain_recorder(every: int = 2) -> TrajectoryRecorder:
    return TrajectoryRecorder(r"layers\.(?P<group>0|4)\.weight", Schedule(every=every))


def everything(**settings: Any) -> CommutatorProbe:
    return CommutatorProbe(Schedule(every=2), **{"samples": 3, "optimizer_step": True, **settings})


def test_halves_of_the_training_batch_where_nobody_draws(tmp_path: Path) -> None:
    """With two micro-batches a step: measured once a step, and training does not notice, in float32 either."""
    bare = plain(tmp_path / "bare", [], accumulate_grad_batches=2)
    probe = everything()
    probed = plain(tmp_path / "probed", [plain_recorder(), probe], accumulate_grad_batches=2)
    assert probe.answered == 4
    assert same(bare.state_dict(), probed.state_dict())
    narrow = plain(tmp_path / "narrow", [everything(dtype="float32", size=2)], accumulate_grad_batches=2)
    assert same(bare.state_dict(), narrow.state_dict())
    rows = metrics(tmp_path / "probed")
    assert [step for step, row in rows.items() if "commutator/all/defect" in row] == [0, 2, 4, 6]
    assert (
        rows[2]["commutator/all/defect_low"] < rows[2]["commutator/all/defect"] < rows[2]["commutator/all/defect_high"]
    )
    assert not any("/on_" in name for row in metrics(tmp_path / "narrow").values() for name in row)


def test_both_methods_agree(tmp_path: Path) -> None:
    for method in ("hessian", "differences"):
        plain(tmp_path / method, [everything(method=method)])
    exact, near = (metrics(tmp_path / method)[4] for method in ("hessian", "differences"))
    for name, value in exact.items():
        if name.startswith("commutator"):
            assert near[name] == pytest.approx(value, rel=1e-6), name


def test_a_gradient_that_vanishes_has_no_defect(tmp_path: Path) -> None:
    plain(tmp_path, [plain_recorder(), everything()], Plain(silent=True))
    row = metrics(tmp_path)[2]
    assert row["commutator/all/resolved"] == 0.0 and row["commutator/all/norm_a"] == 0.0
    for name in ("defect", "defect_eta", "c", "relative", "bracket", "on_singular", "gradient_cosine", "step_cosine"):
        assert f"commutator/all/{name}" not in row


def test_a_compiled_model_is_measured_as_plain_operations(tmp_path: Path) -> None:
    """A compiled graph has no second derivative, and training goes on with it as if nothing had happened."""
    found = []
    for name, callbacks in (("bare", []), ("probed", [everything(samples=1, optimizer_step=False)])):
        module = tiny_gpt()
        module.gpt.compile(backend="aot_eager")
        quiet_trainer(tmp_path / name, callbacks, max_steps=3).fit(module, datamodule=tiny_stories())
        found.append(module.state_dict())
    assert same(*found)
    assert metrics(tmp_path / "probed")[2]["commutator/all/resolved"] == 1.0


def test_a_resumed_run_measures_the_same(tmp_path: Path) -> None:
    for name, stops in (("whole", (6,)), ("parts", (3, 6))):
        for stop in stops:
            resume = tmp_path / "parts/checkpoints/000003.ckpt" if stop != stops[0] else None
            callbacks = [recorder(1), everything(samples=2), checkpoints(tmp_path / name, 3)]
            trainer = quiet_trainer(tmp_path / name, callbacks, max_steps=stop)
            trainer.fit(tiny_gpt(), datamodule=tiny_stories(), ckpt_path=resume)
    whole, parts = (
        {
            step: {k: v for k, v in row.items() if k.startswith("commutator")}
            for step, row in metrics(tmp_path / n).items()
        }
        for n in ("whole", "parts")
    )
    assert whole == parts and len(whole[6]) > 40


def test_another_runs_path_as_a_control(tmp_path: Path) -> None:
    plain(tmp_path / "first", [plain_recorder()])
    plain(tmp_path / "second", [plain_recorder(), everything(other_run=str(tmp_path / "first"))])
    row = metrics(tmp_path / "second")[4]
    assert 0 < row["commutator/all/on_other"] < 1 and row["commutator/all/on_other_null"] > 0


def test_errors_are_one_line(tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [{"samples": 0}, {"eta": 0.0}, {"directions": -1}, {"size": 0}, {"method": "guess"}]
    for settings in wrong:
        with one_line_error("CommutatorProbe"):
            CommutatorProbe(**settings)
    with one_line_error("'layers.0.weight' is not among those that move"):
        plain(tmp_path / "a", [plain_recorder(), everything(pattern=r"layers\.4")])
    with one_line_error("cannot be rebuilt from the recorder's sketches"):
        plain(tmp_path / "f", [TrajectoryRecorder(r"layers\.(?P<group>0)\.weight", sketch=8), everything()])
    with one_line_error("are frozen"):
        plain(tmp_path / "b", [everything(pattern="frozen")])
    with one_line_error("training batch of 8 cannot be cut into two of 5"):
        plain(tmp_path / "c", [everything(size=5)])
    with one_line_error("needs a TrajectoryRecorder"):
        plain(tmp_path / "d", [everything(other_run="elsewhere")])
    with one_line_error("no trajectory"):
        plain(tmp_path / "e", [plain_recorder(), everything(other_run=str(tmp_path))])


class Silent(LightningModule):
    """Its loss is in `training_step` alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.layer(batch[0]).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_module_without_a_loss_of_one_batch(tmp_path: Path) -> None:
    with one_line_error(r"Silent has no batch_loss\(batch\)"):
        plain(tmp_path, [everything()], Silent())


# ------------------------------------------------------------------------------------------------------- batches


def test_a_pair_is_a_function_of_seed_step_and_sample(tmp_path: Path) -> None:
    module, data = tiny_gpt(), tiny_stories()
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(module)
    data.setup("fit")
    trainer.datamodule = data  # type: ignore[attr-defined]
    assert isinstance(data, DrawsBatches)
    pairs = BatchPairs(trainer, module, 3, None, torch.float64)
    first, again, other = pairs(4, 1, None), pairs(4, 1, None), pairs(4, 2, None)
    assert same(list(first[0]), list(again[0])) and same(list(first[1]), list(again[1]))
    assert not torch.equal(first[0].tokens, first[1].tokens) and not torch.equal(first[0].tokens, other[0].tokens)
    assert same(list(first[0]), list(pair_at(4, 1)[0]))
    assert len(BatchPairs(trainer, module, 3, 3, torch.float64)(0, 0, None)[0].tokens) == 3
    floats = BatchPairs(trainer, module, 0, None, torch.float64)
    floats.drawer = None
    passing = [torch.arange(7.0), torch.arange(7)]
    a, b = floats(0, 0, passing)
    assert a[0].dtype == torch.float64 and a[1].dtype == torch.int64
    assert sorted([*a[1].tolist(), *b[1].tolist()]) == sorted({*a[1].tolist(), *b[1].tolist()}) and len(a[1]) == 3
    assert passing[0].dtype == torch.float32


def test_samples_of_a_packed_batch_are_packed_again() -> None:
    data = tiny_stories()
    data.setup("fit")
    batch = data.draw_batch(np.random.default_rng(0), 6)
    index = torch.tensor([4, 1])
    cut = take_samples(batch, index)
    assert same(list(cut), list(Batch.of(batch.tokens[index], batch.targets[index], batch.probe_mask[index])))
    assert torch.equal(take_samples(torch.arange(5), index), index)  # a tensor's own `take` is something else


# ------------------------------------------------------------------------------------- schedules, and runs that fail


def test_a_stretched_schedule_counts_steps_and_not_micro_batches(tmp_path: Path) -> None:
    probe = everything(directions=0)
    probe.stretch = 2
    plain(tmp_path, [probe], accumulate_grad_batches=2)
    measured = [step for step, row in metrics(tmp_path).items() if "commutator/all/norm_a" in row]
    assert measured == [0, 4]
    assert (probe.asked, probe.answered) == (4, 2)  # at steps 0, 2, 4 and 6


def test_weights_that_are_not_finite_are_not_measured(tmp_path: Path) -> None:
    class Spoiled(Callback):
        @torch.no_grad()
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step == 2:
                next(pl_module.parameters()).fill_(math.nan)

    plain(tmp_path, [plain_recorder(), Spoiled(), everything()])
    assert [step for step, row in metrics(tmp_path).items() if "commutator/all/norm_a" in row] == [0]


def test_two_probes_do_not_write_over_each_other(tmp_path: Path) -> None:
    with one_line_error("left and right both tell of the recorder's groups"):
        plain(tmp_path, [plain_recorder(), everything(name="left"), everything(name="right")])


def test_an_error_of_the_loss_is_told_as_it_is() -> None:
    def wrong(theta: Tensor) -> Tensor:
        return theta @ torch.ones(3, dtype=theta.dtype)

    with pytest.raises(RuntimeError, match="size"):
        commutator.by_hessian(wrong, wrong, torch.ones(2, dtype=torch.float64))
