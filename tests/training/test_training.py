"""Training with Lightning's real Trainer: what the probes leave alone, what a restart brings back, what is logged."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import one_line_error
from helpers import (
    DECAY,
    PEAK,
    SCHEDULE,
    At,
    Spy,
    cache_dir,
    checkpoints,
    drifts,
    first_direction,
    flat,
    metrics,
    part_losses,
    probes,
    quiet_trainer,
    read_path,
    recorder,
    same,
    tiny_gpt,
    tiny_stories,
)
from lightning.pytorch import Callback, LightningModule
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW
from torch.utils.data import DataLoader, TensorDataset

from mini_gpt_pl.callbacks import GradientAlignment, Schedule, StopOnDivergence, TrajectoryRecorder
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection
from mini_gpt_pl.runs.logs import MetricsCSV
from mini_gpt_pl.stories.data.batch import Batch
from mini_gpt_pl.stories.gpt import GPT, TRUNK_PATTERN, GPTSize
from mini_gpt_pl.stories.module import ProbedGPT
from mini_gpt_pl.stories.scoring import Scores
from mini_gpt_pl.training.optimizers import SGDW, ClippedCosine

# --------------------------------------------------------------------------------------------- non-interference


def _final(folder: Path, callbacks: list[Callback], **settings: Any) -> tuple[dict[str, Tensor], Tensor]:
    module = tiny_gpt()
    quiet_trainer(folder, callbacks, **settings).fit(module, datamodule=tiny_stories())
    return module.state_dict(), torch.get_rng_state()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_probes_leave_weights_and_random_state_alone(tmp_path: Path, accumulate: int, precision: Any) -> None:
    """Into the second epoch, behind an accumulation window that the first one's end cuts short."""
    settings: dict[str, Any] = {
        "max_steps": 12 // accumulate + 2,
        "accumulate_grad_batches": accumulate,
        "limit_train_batches": 8,
        "precision": precision,
        "limit_val_batches": 1.0,
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
    }
    bare, bare_rng = _final(tmp_path / "bare", [], logger=False, **settings)
    probed, probed_rng = _final(tmp_path / "probed", probes(every=1), **settings)
    assert same(bare, probed)
    assert torch.equal(bare_rng, probed_rng)
    logged = metrics(tmp_path / "probed")
    assert "alignment/trunk/probe" in logged[3] and "alignment/trunk/gradient" in logged[3]


class Denoiser(LightningModule):
    """Not this project's model: dropout, batch statistics, and noise of its own in its loss."""

    def __init__(self) -> None:
        super().__init__()
        norms = nn.BatchNorm1d(8), nn.BatchNorm1d(8)
        self.layers = nn.Sequential(nn.Linear(4, 8), *norms, nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4))

    def named_losses(self, batch: list[Tensor]) -> dict[str, Tensor]:
        (x,) = batch
        noisy = x + 0.1 * torch.randn_like(x)
        return {"rebuild": (self.layers(noisy) - x).square().mean(), "small": self.layers(noisy).square().mean()}

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return torch.stack(list(self.named_losses(batch).values())).sum()

    def configure_optimizers(self) -> Adam:
        return Adam(self.parameters(), lr=1e-2)


def _denoiser(folder: Path, callbacks: list[Callback]) -> tuple[dict[str, Tensor], Tensor, list[bool]]:
    torch.manual_seed(0)
    module = Denoiser()
    module.layers[1].eval()  # a frozen part must stay frozen
    loader = DataLoader(TensorDataset(torch.randn(40, 4)), batch_size=4, shuffle=True)
    trainer = quiet_trainer(folder, callbacks, max_steps=8, accumulate_grad_batches=3)
    trainer.fit(module, loader)
    return module.state_dict(), torch.get_rng_state(), [part.training for part in module.modules()]


def test_probes_leave_a_foreign_model_alone(tmp_path: Path) -> None:
    watch = [
        TrajectoryRecorder(r"layers\.(?P<group>[05])\.weight", Schedule(every=1), name="layers"),
        GradientAlignment(Schedule(every=1), Schedule(every=1)),
        StopOnDivergence(),
    ]
    bare = _denoiser(tmp_path / "bare", [])
    assert same(bare, _denoiser(tmp_path / "probed", list(watch)))
    logged = metrics(tmp_path / "probed")[8]
    assert {"backbone/layers/pc1", "alignment/5/rebuild", "alignment/layers/rebuild_vs_small"} <= logged.keys()


def test_a_gradient_of_its_own_leaves_grad_alone() -> None:
    """Alone, because Lightning would wipe the traces before its own backward."""
    module = Denoiser()
    selection = ParameterSelection.of(module, r"layers\.0\.weight")
    weight = selection.parameters(module)[0]
    weight.grad = torch.full_like(weight, 3.0)
    losses = module.named_losses([torch.randn(6, 4)])
    twin = torch.autograd.grad(losses["rebuild"], [weight], retain_graph=True)[0]
    assert torch.equal(selection.gradient_of(losses["rebuild"], module).values, twin.ravel())
    assert bool((weight.grad == 3.0).all())
    assert all(p.grad is None for p in module.parameters() if p is not weight)


# -------------------------------------------------------------------------------------------------- accumulation


def test_accumulated_batches_equal_the_large_batch(tmp_path: Path) -> None:
    """In float64, where the two differ by the order of sums alone."""
    runs, spies = [], []
    for accumulate, batch_size in ((2, 4), (1, 8)):
        folder, spy, module = tmp_path / str(accumulate), Spy(), tiny_gpt()
        settings: dict[str, Any] = {"precision": "64-true", "max_steps": 7, "accumulate_grad_batches": accumulate}
        quiet_trainer(folder, [spy], **settings).fit(module, datamodule=tiny_stories(batch_size=batch_size))
        runs.append((module.state_dict(), metrics(folder)))
        spies.append(spy)
    asked = [[int(batch.probe_mask.sum()) for batch in spies[0].batches[step]] for step in range(1, 8)]
    assert any(first != second for first, second in asked)
    (small, small_log), (large, large_log) = runs
    for name, value in large.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(small[name], value, rtol=0, atol=1e-10)
    for step, row in large_log.items():
        assert small_log[step] == pytest.approx(row, rel=1e-9), step


# -------------------------------------------------------------------------------------------------------- resume


@dataclass(frozen=True)
class Case:
    """A run of ten micro-batches an epoch that is stopped at step `stop`.

    Snapshots: every 2 steps. Evaluations: every 4 micro-batches.
    """

    accumulate: int
    stop: int
    how: str

    @property
    def total(self) -> int:
        return 13 if self.accumulate == 1 else 8


CASES = [
    Case(1, 3, "exception"),  # in the middle of an epoch
    Case(1, 4, "kill"),  # an evaluation and a snapshot at the checkpoint's step
    Case(1, 10, "exception"),  # at the end of an epoch
    Case(1, 8, "max_steps"),
    Case(2, 1, "kill"),
    Case(2, 2, "exception"),  # an evaluation and a snapshot
    Case(2, 3, "kill"),
    Case(2, 5, "exception"),  # at the end of an epoch
    Case(2, 6, "max_steps"),
]


def _train(folder: Path, case: Case, extra: list[Callback], resume: Path | None = None, steps: int = 0) -> None:
    table = MetricsCSV(folder / "metrics.csv", seconds=3600)
    if resume is not None:
        table.resume(int(torch.load(resume, weights_only=True)["global_step"]))
    trainer = quiet_trainer(
        folder,
        [*probes(every=2, split=3), *extra, checkpoints(folder)],
        logger=table,
        max_steps=steps or case.total,
        accumulate_grad_batches=case.accumulate,
        log_every_n_steps=3,  # a checkpoint finds probes that have not spoken yet
        limit_val_batches=1.0,
        val_check_interval=4,
        check_val_every_n_epoch=None,
    )
    # Another seed: a resumed run must take everything from the checkpoint.
    module = tiny_gpt(seed=1 if resume is None else 2)
    trainer.fit(module, datamodule=tiny_stories(), ckpt_path=resume)


@cache
def _uninterrupted(accumulate: int) -> Path:
    folder = Path(cache_dir()) / f"whole-{accumulate}"
    _train(folder, Case(accumulate, 0, ""), [])
    return folder


class Stop(Exception):
    pass


def _interrupted(folder: Path, case: Case) -> Path:
    """Train up to some steps behind the checkpoint, and give the folder that is left."""

    def fail(module: LightningModule) -> None:
        raise Stop

    def kill(module: LightningModule) -> None:
        shutil.copytree(folder / "running", folder / "left")
        raise Stop

    if case.how == "max_steps":
        _train(folder / "running", case, [], steps=case.stop)
    elif case.how == "kill":  # the disk as it was at that moment, without any goodbye
        with pytest.raises(Stop):
            _train(folder / "running", case, [At(case.stop, kill)])
        return folder / "left"
    else:  # two steps too far
        with pytest.raises(Stop):
            _train(folder / "running", case, [At(case.stop + 2, fail)])
    return folder / "running"


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"accumulate{c.accumulate}-step{c.stop}-{c.how}")
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, case: Case) -> None:
    whole = _uninterrupted(case.accumulate)
    left = _interrupted(tmp_path, case)
    _train(left, case, [], resume=left / "checkpoints" / f"{case.stop:06d}.ckpt")
    last = f"checkpoints/{case.total:06d}.ckpt"
    here, there = (torch.load(folder / last, weights_only=True) for folder in (left, whole))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "callbacks"):
        kept = [
            {key: value for key, value in state[part].items() if not key.startswith("ModelCheckpoint")}
            if part == "callbacks"
            else state[part]
            for state in (here, there)
        ]
        assert same(*kept), part
    paths = (Trajectory.load(folder / "trajectory.safetensors").state_dict() for folder in (left, whole))
    assert same(*paths)
    files = {file.relative_to(whole) for file in (*whole.glob("snapshots/*"), whole / "metrics.csv")}
    assert files == {file.relative_to(left) for file in (*left.glob("snapshots/*"), left / "metrics.csv")}
    for file in files:  # safetensors orders a file's header by chance
        read: Any = load_file if file.suffix == ".safetensors" else Path.read_bytes
        assert same(read(left / file), read(whole / file)), file


def test_resuming_discards_what_lies_behind_the_checkpoint(tmp_path: Path) -> None:
    """Also the snapshots and rows that the resumed run does not overwrite."""
    case = Case(1, 4, "")
    _train(tmp_path, case, [], steps=8)
    _train(tmp_path, case, [], resume=tmp_path / "checkpoints/000004.ckpt", steps=5)
    assert read_path(tmp_path, "trunk")[0] == [0, 2, 4, 5]
    assert Trajectory.load(tmp_path / "trajectory.safetensors").steps == [0, 2, 4, 5]
    assert max(metrics(tmp_path)) == 5


def test_resuming_does_not_touch_the_table_before_something_is_logged(tmp_path: Path) -> None:
    table = MetricsCSV(tmp_path / "metrics.csv")
    for step in range(4):
        table.log_metrics({"a": step / 3}, step=step)
    table.finalize("success")
    before = table.path.read_bytes()
    again = MetricsCSV(table.path)
    again.resume(2)
    assert table.path.read_bytes() == before  # the resumed run may still fail to start
    again.log_metrics({"a": 1.0}, step=3)
    again.finalize("success")
    assert table.path.read_bytes() == before


# ------------------------------------------------------------------------------------------- what ProbedGPT logs


def test_a_long_table_is_written_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("mini_gpt_pl.runs.logs.time.monotonic", lambda: clock[0])
    table = MetricsCSV(tmp_path / "metrics.csv", seconds=5)
    replace = os.replace

    def slow(source: Path, target: Path) -> None:
        clock[0] += 0.1
        replace(source, target)

    monkeypatch.setattr("mini_gpt_pl.atomic.os.replace", slow)
    rows = []
    for step in range(600):
        clock[0] += 0.1
        table.log_metrics({"x": 1.0}, step)
        rows.append(len(table.path.read_text().splitlines()) - 1 if table.path.is_file() else 0)
    writes = [step for step in range(1, 600) if rows[step] > rows[step - 1]]
    assert writes[0] in (49, 50) and all(later - earlier >= 199 for earlier, later in itertools.pairwise(writes))
    table.finalize("failed")
    assert len(table.path.read_text().splitlines()) == 601


def test_the_probe_loss_alone_computes_the_sequences_with_a_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    module, stories = tiny_gpt().double(), tiny_stories(batch_size=40, p_probe=0.1)
    stories.setup("fit")
    batch = next(iter(stories.train_dataloader()))
    asked = batch.probe_mask.any(-1)
    assert 0 < int(asked.sum()) < len(asked)
    whole, _ = module.batch_terms(batch)
    expected = torch.autograd.grad(whole.probe, list(module.parameters()))
    computed: list[int] = []
    scores = ProbedGPT._scores

    def watched(self: ProbedGPT, given: Batch) -> Scores:
        computed.append(len(given.rows))
        return scores(self, given)

    monkeypatch.setattr(ProbedGPT, "_scores", watched)
    losses = module.named_losses(batch)
    assert set(losses) == {"lm", "probe"} and computed == []
    found = losses["probe"]
    torch.testing.assert_close(found, whole.probe, rtol=1e-12, atol=0)
    for gradient, other in zip(torch.autograd.grad(found, list(module.parameters())), expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-12)
    assert computed[0] < len(batch.rows)
    torch.testing.assert_close(losses["lm"], whole.lm, rtol=1e-12, atol=0)


def test_numbers_for_the_progress_bar_lie_on_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # On a GPU, Lightning's look at them after every batch would wait for the device each time.
    shown: dict[str, Any] = {}
    monkeypatch.setattr(ProbedGPT, "log", lambda self, name, value, **options: shown.update({name: value}))
    trainer = quiet_trainer(tmp_path, [], max_steps=4, limit_val_batches=1.0, val_check_interval=2)
    trainer.fit(tiny_gpt(), datamodule=tiny_stories())
    assert {"loss", "val/loss", "probe/p_ood"} <= set(shown)
    assert all(isinstance(value, torch.Tensor) and value.device.type == "cpu" for value in shown.values())


def test_training_metrics_are_those_of_the_whole_optimizer_batch(tmp_path: Path) -> None:
    spy, module = Spy(), tiny_gpt()
    trainer = quiet_trainer(tmp_path, [spy], max_steps=5, accumulate_grad_batches=3, limit_train_batches=8)
    trainer.fit(module, datamodule=tiny_stories())
    logged = metrics(tmp_path)
    assert sorted(logged) == [1, 2, 3, 4, 5]
    assert [len(spy.batches[step]) for step in (1, 2, 3, 4, 5)] == [3, 3, 2, 3, 3]
    for step, row in logged.items():
        gpt, batches = spy.before[step], spy.batches[step]
        lm, probe = part_losses(gpt, batches)
        loss = lm + (2.0 if step < 3 else 4.0) * probe
        grads = torch.autograd.grad(loss, list(gpt.parameters()))
        assert row["train/loss"] == pytest.approx(float(loss), rel=1e-5)
        assert row["train/lm_loss"] == pytest.approx(float(lm), rel=1e-5)
        assert row["train/probe_loss"] == pytest.approx(float(probe), rel=1e-5)
        assert row["train/grad_norm"] == pytest.approx(float(torch.cat([g.ravel() for g in grads]).norm()), rel=1e-4)
        assert row["train/probe_weight"] == (2.0 if step < 3 else 4.0)
        assert row["train/lr"] == pytest.approx(PEAK * SCHEDULE(step))
        hits = [gpt(b.tokens).argmax(-1)[b.probe_mask] == b.targets[b.probe_mask] for b in batches]
        assert row["train/probe_accuracy"] == pytest.approx(float(torch.cat(hits).float().mean()))


def test_clipping_bounds_the_gradient_that_is_used_not_the_norm_that_is_logged(tmp_path: Path) -> None:
    """One step of plain SGD moves the weights by lr times the clipped gradient."""
    spy, module = Spy(), tiny_gpt(optimizer=lambda p: SGD(p, lr=1.0), schedule=ClippedCosine(0, 10, 1.0))
    quiet_trainer(tmp_path, [spy], max_steps=1, gradient_clip_val=0.25).fit(module, datamodule=tiny_stories())
    moved = torch.cat([(spy.weights[1][k] - spy.weights[0][k]).ravel() for k in spy.weights[0]])
    raw = torch.cat([g.ravel() for g in spy.gradients[1].values()])
    assert metrics(tmp_path)[1]["train/grad_norm"] == pytest.approx(float(raw.norm()), rel=1e-5)
    assert float(raw.norm()) > 0.25
    assert float(moved.norm()) == pytest.approx(0.25, rel=1e-4)


def _brute_force_validation(gpt: GPT, data: Any) -> dict[str, float]:
    """Example by example, in float64."""
    gpt = gpt.double().eval()
    sets = []
    for loader in data.val_dataloader():
        lm: list[float] = []
        probe: list[float] = []
        right: list[float] = []
        for batch in loader:
            for tokens, targets, mask in zip(batch.tokens, batch.targets, batch.probe_mask, strict=True):
                with torch.no_grad():
                    logp = gpt(tokens[None])[0].log_softmax(-1)
                for t in range(len(tokens)):
                    if targets[t] != -100:
                        (probe if mask[t] else lm).append(-float(logp[t, targets[t]]))
                if mask.any():
                    right.append(float((logp.argmax(-1)[mask] == targets[mask]).all()))
        sets.append((np.mean(lm), np.mean(probe) if probe else 0.0, np.mean(right) if right else 0.0))
    (nll, _, _), (_, nll_in, p_in), (lm_ood, nll_ood, p_ood) = sets
    return {
        "val/loss": nll,
        "val/perplexity": np.exp(nll),
        "probe/p_in": p_in,
        "probe/p_ood": p_ood,
        "probe/nll_in": nll_in,
        "probe/nll_ood": nll_ood,
        "probe/lm_ood": lm_ood,
        "probe/r_ood": nll_ood / lm_ood,
    }


@pytest.mark.parametrize("original", [False, True])
def test_validation_equals_brute_force_over_the_fixed_sets(tmp_path: Path, original: bool) -> None:
    """With two codewords the model soon guesses right half of the time; the original mask covers several tokens."""
    module, data = tiny_gpt(), tiny_stories(n_codewords=2, p_probe=1.0, original_mask=original)
    settings: dict[str, Any] = {"limit_val_batches": 1.0, "val_check_interval": 4, "check_val_every_n_epoch": None}
    quiet_trainer(tmp_path, max_steps=12, **settings).fit(module, datamodule=data)
    logged = metrics(tmp_path)
    assert [step for step, row in logged.items() if "val/loss" in row] == [4, 8, 12]
    expected = _brute_force_validation(module.gpt, data)
    assert original or 0 < expected["probe/p_ood"] < 1 or 0 < expected["probe/p_in"] < 1
    found = {name: value for name, value in logged[12].items() if name.startswith(("val/", "probe/"))}
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_the_sanity_check_logs_nothing_and_leaves_nothing_behind(tmp_path: Path) -> None:
    rows = []
    for sanity in (0, 1):
        folder = tmp_path / str(sanity)
        trainer = quiet_trainer(folder, max_steps=2, num_sanity_val_steps=sanity, limit_val_batches=1.0)
        trainer.val_check_interval, trainer.check_val_every_n_epoch = 2, None
        trainer.fit(tiny_gpt(), datamodule=tiny_stories())
        rows.append(metrics(folder))
    assert rows[0] == rows[1] and set(rows[0]) == {1, 2}


def test_the_configured_optimizer_settings_win_over_the_checkpoint(tmp_path: Path) -> None:
    first = [checkpoints(tmp_path / "first")]
    quiet_trainer(tmp_path / "first", first, max_steps=4).fit(tiny_gpt(), datamodule=tiny_stories())
    spy = Spy()
    module = tiny_gpt(
        optimizer=lambda p: AdamW(p, lr=3e-3, betas=(0.8, 0.9), weight_decay=0.3),
        schedule=ClippedCosine(warmup=2, total=9, floor=0.5),
    )
    trainer = quiet_trainer(tmp_path / "second", [spy], max_steps=7)
    trainer.fit(module, datamodule=tiny_stories(), ckpt_path=tmp_path / "first/checkpoints/000004.ckpt")
    assert next(float(state["step"]) for state in spy.optimizer["state"].values()) == 4  # the moments go on
    groups = trainer.optimizers[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.3, 0.0]
    assert {group["betas"] for group in groups} == {(0.8, 0.9)}
    rates = {step: row["train/lr"] for step, row in metrics(tmp_path / "second").items()}
    assert rates == pytest.approx({t: 3e-3 * ClippedCosine(2, 9, 0.5)(t) for t in (5, 6, 7)})


def decoupled(rate: float) -> list[float]:
    """The product of 1 - lr(t) wd, with the learning rate of each step."""
    return [float(np.prod([1 - rate * SCHEDULE(t) for t in range(1, step + 1)])) for step in range(6)]


def through_momentum(lr: float, momentum: float) -> list[float]:
    """What is left of a weight of 1 without a gradient, whose L2 term goes through SGD's momentum buffer."""
    weight, buffer, left = 1.0, 0.0, [1.0]
    for step in range(1, 6):
        buffer = momentum * buffer + DECAY * weight
        weight -= lr * SCHEDULE(step) * buffer
        left.append(weight)
    return left


@pytest.mark.parametrize(
    ("optimizer", "left"),
    [
        (lambda p: SGDW(p, lr=0.1, momentum=0.9, weight_decay=DECAY), decoupled(0.1 * DECAY)),
        (lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=DECAY), through_momentum(0.1, 0.9)),
        (lambda p: Adam(p, lr=0.1, weight_decay=DECAY), [1.0] + [float("nan")] * 5),
        (lambda p: AdamW(p, lr=0.1, weight_decay=DECAY), decoupled(0.1 * DECAY)),
        (lambda p: Adagrad(p, lr=0.1), decoupled(0.0)),
    ],
    ids=["sgdw", "sgd", "adam", "adamw", "adagrad"],
)
def test_any_optimizer_trains_and_its_decay_is_known(tmp_path: Path, optimizer: Any, left: list[float]) -> None:
    """Survival is what decay alone leaves; an L2 term inside an adaptive gradient has no rate, and is unknown."""
    follow = recorder(1)
    quiet_trainer(tmp_path, [follow, *probes()[2:]], max_steps=5).fit(
        tiny_gpt(optimizer=optimizer), datamodule=tiny_stories()
    )
    assert follow.trajectory is not None
    assert follow.trajectory.survival == pytest.approx(left, rel=1e-12, nan_ok=True)


# --------------------------------------------------------------------------------------------------- divergence


def _poison(module: LightningModule) -> None:
    with torch.no_grad():
        next(module.parameters()).fill_(float("nan"))


@pytest.mark.parametrize(("every", "noticed"), [(1, 6), (4, 8)])
def test_a_diverged_run_ends_and_keeps_its_records(tmp_path: Path, every: int, noticed: int) -> None:
    """Weights are spoilt after step 5: the loss of step 6 is the first bad one."""
    stop, follow = StopOnDivergence(), recorder(2)
    callbacks = [stop, follow, GradientAlignment(Schedule(every=1), Schedule(every=1)), At(5, _poison)]
    trainer = quiet_trainer(tmp_path, callbacks, max_steps=20, log_every_n_steps=every)
    trainer.fit(tiny_gpt(), datamodule=tiny_stories())
    assert stop.step == trainer.global_step == noticed
    kept = Trajectory.load(tmp_path / "trajectory.safetensors")
    assert kept.steps == [0, 2, 4]
    assert read_path(tmp_path, "trunk")[0] == kept.steps
    assert bool(torch.isfinite(kept.grams).all())
    rows = metrics(tmp_path)
    assert np.isfinite(rows[4]["train/loss"]) and np.isfinite(rows[5]["alignment/trunk/gradient"])
    assert not np.isfinite(rows[noticed].get("train/loss", np.nan))


def test_a_far_too_high_learning_rate_is_a_divergence(tmp_path: Path) -> None:
    stop = StopOnDivergence()
    module = tiny_gpt(optimizer=lambda p: SGD(p, lr=1e30), schedule=ClippedCosine(0, 10, 1.0))
    trainer = quiet_trainer(tmp_path, [stop, recorder(1)], max_steps=20, gradient_clip_val=None)
    trainer.fit(module, datamodule=tiny_stories())
    assert stop.step is not None and stop.step == trainer.global_step < 10


def test_a_sound_run_is_not_stopped(tmp_path: Path) -> None:
    stop = StopOnDivergence()
    quiet_trainer(tmp_path, [stop], max_steps=3).fit(tiny_gpt(), datamodule=tiny_stories())
    assert stop.step is None


# -------------------------------------------------------------------------------------------------------- reheat

_DATA: dict[str, Any] = {"n_codewords": 2, "p_probe": 1.0}


@cache
def _parent() -> Path:
    """A run folder with snapshots every 2 steps and a checkpoint at each step."""
    folder = Path(cache_dir()) / "parent"
    trainer = quiet_trainer(folder, [recorder(2), checkpoints(folder)], max_steps=9)
    trainer.fit(tiny_gpt(), datamodule=tiny_stories(**_DATA))
    (folder / "config.yaml").write_text("run_dir: parent\n")
    return folder


@pytest.mark.parametrize("accumulate", [1, 2])
def test_reheat(tmp_path: Path, accumulate: int) -> None:
    checkpoint = _parent() / "checkpoints/000007.ckpt"
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    data, module, spy = tiny_stories(**_DATA), tiny_gpt(seed=9), Spy()
    original = tiny_gpt()
    original.load_state_dict(weights)
    trainer = quiet_trainer(
        tmp_path, [spy, recorder(3)], accumulate_grad_batches=accumulate, limit_val_batches=1.0, max_steps=1
    )
    summary = trainer.reheat(
        module, data, str(checkpoint), steps=6, lr=5e-3, warmup=2, floor=0.5, probe_weight=3.0, eval_every=2
    )
    # the checkpoint's weights and nothing else of it
    assert same(spy.weights[0], weights)
    assert spy.optimizer["state"] == {}
    rows = metrics(tmp_path)
    assert sorted(rows) == [0, 1, 2, 3, 4, 5, 6]
    rates = {t: row["train/lr"] for t, row in rows.items() if t}
    assert rates == pytest.approx({t: 5e-3 * ClippedCosine(2, 6, 0.5)(t) for t in rates})
    assert {row["train/probe_weight"] for t, row in rows.items() if t} == {3.0}
    # the gain
    measured = {t: row["probe/p_ood"] for t, row in rows.items() if "probe/p_ood" in row}
    assert sorted(measured) == [0, 2, 4, 6]
    data.setup("fit")
    p0 = _brute_force_validation(original.gpt, data)["probe/p_ood"]
    assert measured[0] == summary["p0"] == pytest.approx(p0)
    assert summary["peak"] == max(measured.values())
    assert summary["gain"] == summary["peak"] - summary["p0"]
    assert summary["peak_step"] == min(t for t, p in measured.items() if p == summary["peak"])
    # the parent's basis: its snapshots up to the checkpoint's step, not later ones
    steps, basis = read_path(_parent(), "trunk", until=7)
    assert steps == [0, 2, 4, 6]
    direction = first_direction(drifts(basis))
    start = flat(spy.weights[0], "trunk")
    for t in measured:
        here = flat(spy.weights[t], "trunk")
        for vector, along, across in (
            (here - basis[0], "reheat/coordinate", "reheat/residual"),
            (here - start, "reheat/along", "reheat/across"),
        ):
            a = vector @ direction
            assert rows[t][along] == pytest.approx(a, rel=1e-4, abs=1e-6)
            assert rows[t][across] == pytest.approx(np.linalg.norm(vector - a * direction), rel=1e-4, abs=1e-6)
    assert summary["coordinate_before"] == rows[0]["reheat/coordinate"]
    assert summary["coordinate_after"] == rows[6]["reheat/coordinate"]
    assert summary["residual_before"] == rows[0]["reheat/residual"]
    assert summary["residual_after"] == rows[6]["reheat/residual"]
    recorded = json.loads((tmp_path / "reheat.json").read_text())
    assert {name: recorded[name] for name in summary} == summary


def test_reheat_without_a_learning_rate_takes_the_optimizers(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, limit_val_batches=1.0)
    with pytest.warns(UserWarning, match="not split"):
        checkpoint = str(_parent() / "checkpoints/000007.ckpt")
        summary = trainer.reheat(tiny_gpt(), tiny_stories(**_DATA), checkpoint, steps=1, warmup=200, eval_every=1)
    assert {"p0", "peak", "peak_step", "gain", "final"} <= summary.keys()
    assert metrics(tmp_path)[1]["train/lr"] == pytest.approx(PEAK)  # the warm-up is cut to the run


def test_reheat_before_the_parent_has_moved_goes_without_its_basis(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, [recorder()], limit_val_batches=1.0)
    with pytest.warns(UserWarning, match="not split"):
        checkpoint = str(_parent() / "checkpoints/000001.ckpt")
        summary = trainer.reheat(tiny_gpt(), tiny_stories(**_DATA), checkpoint, steps=1, warmup=0, eval_every=1)
    assert "coordinate_before" not in summary


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": GPTSize(n_layer=1, n_head=2, d_model=32, d_ff=64)}, "n_layer 2, the configured one 1"),
        ({"vocab_size": 3000}, "vocab_size 2560, the configured one 3000"),
        ({"size": GPTSize(n_layer=2, n_head=4, d_model=32, d_ff=64)}, "n_head 2, the configured one 4"),
    ],
)
def test_reheat_refuses_a_checkpoint_of_another_model(tmp_path: Path, settings: Any, message: str) -> None:
    trainer = quiet_trainer(tmp_path, [recorder()], limit_val_batches=1.0)
    with one_line_error(message):
        trainer.reheat(tiny_gpt(**settings), tiny_stories(), str(_parent() / "checkpoints/000007.ckpt"), steps=1)


def test_reheat_refuses_a_broken_checkpoint(tmp_path: Path) -> None:
    whole = (_parent() / "checkpoints/000007.ckpt").read_bytes()
    broken = tmp_path / "broken.ckpt"
    trainer = quiet_trainer(tmp_path, [recorder()], limit_val_batches=1.0)
    with one_line_error("no checkpoint"):
        trainer.reheat(tiny_gpt(), tiny_stories(), str(broken), steps=1)
    broken.write_bytes(whole[: len(whole) // 2])
    with one_line_error("cut short or corrupt"):
        trainer.reheat(tiny_gpt(), tiny_stories(), str(broken), steps=1)
    torch.save({"weights": torch.ones(2)}, broken)
    with one_line_error("no Lightning checkpoint"):
        trainer.reheat(tiny_gpt(), tiny_stories(), str(broken), steps=1)


# ------------------------------------------------------------------------------------------------------- compile


def test_a_compiled_model_keeps_names_weights_and_selection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled without a code generator, so that the arithmetic, too, is that of the plain model."""
    monkeypatch.setattr(GPT, "compile", lambda gpt: nn.Module.compile(gpt, backend="eager"))
    states = []
    for compiled in (False, True):
        folder, module, follow = tmp_path / str(compiled), tiny_gpt(compile=compiled), recorder()
        callbacks = [follow, *probes()[2:], checkpoints(folder, 3)]
        quiet_trainer(folder, callbacks, max_steps=3).fit(module, datamodule=tiny_stories())
        assert (module.gpt._compiled_call_impl is not None) is compiled
        assert follow.selection == ParameterSelection.of(tiny_gpt(), TRUNK_PATTERN)
        states.append(module.state_dict())
    assert same(*states)
    plain = tiny_gpt(seed=3)
    plain.load_state_dict(torch.load(tmp_path / "True/checkpoints/000003.ckpt", weights_only=True)["state_dict"])
    assert same(plain.state_dict(), states[0])
