"""What the anatomy logs, against brute force on copied gradients, weights and snapshot files."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    LABELS,
    PEAK,
    SCHEDULE,
    Spy,
    cache_dir,
    checkpoints,
    cosine,
    drifts,
    first_direction,
    flat,
    metrics,
    past_backbone,
    quiet_trainer,
    read_path,
    recorder,
    same,
    tiny_gpt,
    tiny_stories,
)
from lightning.pytorch import Callback
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer, RMSprop

from mini_gpt_pl.callbacks import Schedule
from mini_gpt_pl.callbacks.anatomy import OptimizerAnatomy, coordinate_subset
from mini_gpt_pl.geometry.optimizer.predictions import averaging
from mini_gpt_pl.geometry.vectors.alignment import noise_floor
from mini_gpt_pl.training.optimizers import SGDW

STEPS, INTERVAL, CLIP = 9, 3, 0.5
BETA1, BETA2, EPS = 0.9, 0.95, 1e-8

Array = np.ndarray[Any, np.dtype[np.float64]]


def anatomy(**settings: Any) -> OptimizerAnatomy:
    return OptimizerAnatomy(Schedule(every=1), **settings)


def fit(folder: Path, callbacks: Sequence[Callback], steps: int = STEPS, ckpt: Path | None = None, **model: Any) -> Any:
    """Two micro-batches a step, clipped hard."""
    trainer = quiet_trainer(
        folder, callbacks, max_steps=steps, accumulate_grad_batches=2, gradient_clip_val=CLIP, log_every_n_steps=2
    )
    module = tiny_gpt(**model)
    trainer.fit(module, datamodule=tiny_stories(), ckpt_path=ckpt)
    return module


class Clips(Callback):
    """Norms of the whole gradient before clipping."""

    def __init__(self) -> None:
        self.norms: dict[int, float] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        grads = [p.grad.double().norm() for p in pl_module.parameters() if p.grad is not None]
        self.norms[trainer.global_step + 1] = float(torch.stack(grads).norm())


@dataclass
class Recorded:
    folder: Path
    spy: Spy
    clips: Clips
    rows: dict[int, dict[str, float]]

    def raw(self, step: int, group: str) -> Array:
        return flat(self.spy.gradients[step], group)

    def clipped(self, step: int, group: str) -> Array:
        return self.raw(step, group) * min(1.0, CLIP / self.clips.norms[step])

    def weights(self, step: int, group: str) -> Array:
        return flat(self.spy.weights[step], group)

    def moments(self, step: int, group: str, beta2: float = BETA2) -> tuple[Array, Array]:
        """m_hat and v_hat by eqs. 13 and 14."""
        m = v = np.zeros_like(self.weights(0, group))
        for t in range(1, step + 1):
            grad = self.clipped(t, group)
            m, v = BETA1 * m + (1 - BETA1) * grad, beta2 * v + (1 - beta2) * grad**2
        return m / (1 - BETA1**step), v / (1 - beta2**step)


@cache
def _run() -> Recorded:
    folder = Path(cache_dir()) / "anatomy"
    spy, clips = Spy(), Clips()
    probe = anatomy(counterfactual_beta2=[0.5, BETA2], split=True)
    fit(folder, [spy, clips, recorder(INTERVAL), probe])
    return Recorded(folder, spy, clips, metrics(folder))


# -------------------------------------------------------------------------------------------------- the ladder


@pytest.mark.parametrize("label", LABELS)
def test_each_rung_beside_the_backbone_of_the_past(label: str) -> None:
    run = _run()
    for step in range(1, STEPS + 1):
        row, direction = run.rows[step], past_backbone(run.folder, label, step)
        if direction is None:
            assert step <= INTERVAL and f"anatomy/{label}/cos_update" not in row
            continue
        m, v = run.moments(step, label)
        before, after = run.weights(step - 1, label), run.weights(step, label)
        rungs = {
            "gradient": -run.raw(step, label),  # clipping by norm keeps the direction
            "momentum": -m,
            "normalised": -m / (np.sqrt(v) + EPS),
            "decay": -before,
            "update": after - before,
        }
        for name, rung in rungs.items():
            tolerance = 1e-3 if name == "update" else 1e-4  # the difference of float32 weights is rounded
            assert row[f"anatomy/{label}/cos_{name}"] == pytest.approx(cosine(rung, direction), abs=tolerance), name
        assert row[f"anatomy/{label}/noise_floor"] == pytest.approx(noise_floor(len(before)))


def test_the_formula_explains_the_update_although_the_rate_changes() -> None:
    assert all(run["anatomy/trunk/unexplained"] < 1e-4 for step, run in _run().rows.items() if step)


@pytest.mark.parametrize("label", LABELS)
def test_other_beta2_from_the_same_gradients(label: str) -> None:
    run = _run()
    for step in range(INTERVAL + 1, STEPS + 1):
        row, direction = run.rows[step], past_backbone(run.folder, label, step)
        assert direction is not None
        m, v = run.moments(step, label, 0.5)
        u = -m / (np.sqrt(v) + EPS)
        rate = PEAK * SCHEDULE(step)
        update = rate * (u - DECAY * run.weights(step - 1, label))
        key = f"anatomy/{label}/cos"
        assert row[f"{key}_normalised_beta2_0.5"] == pytest.approx(cosine(u, direction), abs=1e-4)
        assert row[f"{key}_update_beta2_0.5"] == pytest.approx(cosine(update, direction), abs=1e-4)
        for rung in ("normalised", "update"):
            assert row[f"{key}_{rung}_beta2_{BETA2}"] == pytest.approx(row[f"{key}_{rung}"], abs=1e-6)
        if label == "trunk":
            true, v = run.moments(step, label)
            expected = cosine(u, -true / (np.sqrt(v) + EPS))
            assert row["anatomy/trunk/agreement_beta2_0.5"] == pytest.approx(expected, abs=1e-4)
            assert row[f"anatomy/trunk/agreement_beta2_{BETA2}"] == pytest.approx(1, abs=1e-6)


# ------------------------------------------------------------------------------------------------- predictions


def test_moments_and_their_predictions() -> None:
    run = _run()
    for step in range(3, STEPS + 1):
        row = {name.removeprefix("anatomy/trunk/"): value for name, value in run.rows[step].items()}
        (m, v), (earlier, _) = run.moments(step, "trunk"), run.moments(step - 1, "trunk")
        u = m / (np.sqrt(v) + EPS)
        assert row["memory_beta2"] == pytest.approx(-1 / math.log(BETA2))
        assert row["coherence"] == pytest.approx(np.mean(u**2), rel=1e-4)
        assert row["coherence_median"] == pytest.approx(np.median(u**2), rel=1e-4)
        assert row["update_size"] == pytest.approx(np.mean(np.abs(u)), rel=1e-4)
        low, high = np.quantile(np.sqrt(v) + EPS, [0.1, 0.9])
        assert row["preconditioner_spread"] == pytest.approx(np.log10(high / low), abs=1e-4)
        variance = np.mean((m - earlier) ** 2) / (2 * (1 - BETA1))
        assert row["momentum_variance"] == pytest.approx(variance, rel=1e-3)
        noise = np.mean(v - m**2) / (1 - averaging(BETA1))
        assert row["momentum_variance_predicted"] == pytest.approx(averaging(BETA1) * noise, rel=1e-3)
        assert row["amplification_predicted"] == pytest.approx(math.sqrt(19))
        assert 0 < row["coherence_null"] < 1


def test_the_growth_of_the_fraction_is_told_once_for_every_snapshot() -> None:
    run = _run()
    told = [step for step in range(1, STEPS + 1) if "anatomy/trunk/fraction" in run.rows[step]]
    assert told == [4, 7]  # snapshots at 0, 3, 6 and 9; two are needed
    row, (_, basis) = run.rows[7], read_path(run.folder, "trunk", until=6)
    direction = first_direction(drifts(basis))
    along = basis[1:] @ direction
    across = ((basis[1:] - along[:, None] * direction) ** 2).sum(1).mean()
    top = 4 * along.mean() ** 2
    assert row["anatomy/trunk/fraction_predicted"] == pytest.approx(top / (top + 2 * across), rel=1e-4)
    assert row["anatomy/trunk/fraction"] == pytest.approx(row_fraction(run, 6), rel=1e-5)
    assert {"anatomy/trunk/fraction_walk", "anatomy/trunk/fraction_decaying_walk"} <= row.keys()


def row_fraction(run: Recorded, step: int) -> float:
    return run.rows[step]["backbone/trunk/fraction"]


# --------------------------------------------------------------------------------------------------- the split


@pytest.mark.parametrize("label", LABELS)
def test_the_split_of_an_interval(label: str) -> None:
    run = _run()
    for end in range(2 * INTERVAL, STEPS + 1, INTERVAL):
        row, direction = run.rows[end], past_backbone(run.folder, label, end)
        assert direction is not None
        parts = {name: np.zeros_like(direction) for name in ("gradient", "decay", "clipping")}
        raw = np.zeros_like(direction)
        for t in range(1, end + 1):
            raw = BETA1 * raw + (1 - BETA1) * run.raw(t, label)
            if t <= end - INTERVAL:
                continue
            (m, v), rate = run.moments(t, label), PEAK * SCHEDULE(t)
            scale, shadow = rate / (np.sqrt(v) + EPS), raw / (1 - BETA1**t)
            parts["gradient"] -= scale * shadow
            parts["clipping"] -= scale * (m - shadow)
            parts["decay"] -= rate * DECAY * run.weights(t - 1, label)
        true = run.weights(end, label) - run.weights(end - INTERVAL, label)
        for name, part in parts.items():
            key = f"anatomy/{label}/along_{name}"
            assert row[key] == pytest.approx(part @ direction, rel=1e-3, abs=1e-6)
            if label == "trunk":
                assert row[f"anatomy/trunk/share_{name}"] == pytest.approx(part @ true / (true @ true), abs=1e-4)
        assert sum(row[f"anatomy/{label}/along_{name}"] for name in parts) == pytest.approx(true @ direction, rel=1e-4)
        if label == "trunk":
            assert sum(row[f"anatomy/trunk/share_{name}"] for name in parts) == pytest.approx(1, abs=1e-6)
            assert row["anatomy/trunk/split_unexplained"] < 1e-4


# ------------------------------------------------------------------------------------------------ other rules


def _sgd(params: Any) -> Optimizer:
    return SGD(params, lr=PEAK, momentum=0.9, weight_decay=DECAY)


def _sgdw(params: Any) -> Optimizer:
    return SGDW(params, lr=PEAK, momentum=0.9, nesterov=True, weight_decay=DECAY)


def _fused(params: Any) -> Optimizer:
    return AdamW(params, lr=PEAK, betas=(BETA1, BETA2), weight_decay=DECAY, fused=True)


def _rmsprop(params: Any) -> Optimizer:
    return RMSprop(params, lr=1e-3)


def _amsgrad(params: Any) -> Optimizer:
    return AdamW(params, lr=PEAK, amsgrad=True)


@pytest.mark.parametrize("make", [_sgd, _sgdw, _fused, _rmsprop])
def test_it_speaks_of_other_optimizers_what_it_can(tmp_path: Path, make: Any) -> None:
    fit(tmp_path, [recorder(2), anatomy(split=True, counterfactual_beta2=[0.5])], steps=4, optimizer=make)
    row = metrics(tmp_path)[4]
    known = {name.removeprefix("anatomy/trunk/") for name in row if name.startswith("anatomy/trunk/")}
    assert row["anatomy/trunk/unexplained"] < 1e-3
    assert ("cos_momentum" in known) == (make is not _rmsprop)
    assert ("share_gradient" in known) == (make is not _rmsprop)
    assert ("cos_normalised_beta2_0.5" in known) == (make is _fused)
    assert ("cos_decay" in known) == (make in (_fused, _sgdw))
    assert "cos_update" in known


# --------------------------------------------------------------------------------------------- no side effects


def test_measuring_changes_nothing(tmp_path: Path) -> None:
    plain = fit(tmp_path / "a", [recorder(2)], steps=4)
    probed = fit(tmp_path / "b", [recorder(2), anatomy(split=True, counterfactual_beta2=[0.5])], steps=4)
    assert same(plain.state_dict(), probed.state_dict())
    assert same(*(m.trainer.optimizers[0].state_dict() for m in (plain, probed)))


def test_the_order_of_callbacks_does_not_matter(tmp_path: Path) -> None:
    """A recorder that has already taken the step's snapshot must not lend it."""
    fit(tmp_path / "a", [recorder(2), anatomy(split=True)], steps=5)
    fit(tmp_path / "b", [anatomy(split=True), recorder(2)], steps=5)
    assert metrics(tmp_path / "a").items() == metrics(tmp_path / "b").items()


def test_steps_between_readings_are_seen_all_the_same(tmp_path: Path) -> None:
    probe = OptimizerAnatomy(Schedule(every=4), counterfactual_beta2=[0.5, BETA2], split=True)
    fit(tmp_path, [recorder(INTERVAL), probe])
    rows, dense = metrics(tmp_path), _run().rows
    assert "anatomy/trunk/unexplained" not in rows[6]
    lagged = ("momentum_variance", "amplification", "fraction")  # these look back to the last reading
    for step in (4, 6, 8, 9):
        names = {name for name in rows[step] if name.startswith("anatomy/")}
        names = {name for name in names if not name.split("/")[-1].startswith(lagged)}
        assert len(names) > 5
        assert {name: rows[step][name] for name in names} == {name: dense[step][name] for name in names}, step


def test_a_resumed_run_says_the_same(tmp_path: Path) -> None:
    def parts() -> list[Callback]:
        return [recorder(INTERVAL), anatomy(split=True, counterfactual_beta2=[0.5])]

    fit(tmp_path, [*parts(), checkpoints(tmp_path)], steps=8)
    whole = metrics(tmp_path)
    fit(tmp_path / "again", [_Taken(tmp_path, 5), *parts()], steps=8, ckpt=tmp_path / "checkpoints/000005.ckpt")
    again = metrics(tmp_path / "again")
    for step in (6, 7, 8):
        found = {name: value for name, value in again[step].items() if name.startswith("anatomy/")}
        expected = {name: value for name, value in whole[step].items() if name.startswith("anatomy/")}
        assert len(found) > 20
        assert found == expected, step


class _Taken(Callback):
    """Gives a second folder the snapshots that a checkpoint points at."""

    def __init__(self, source: Path, step: int) -> None:
        self.source, self.step = source / "snapshots", step

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        target = Path(trainer.default_root_dir) / "snapshots"
        target.mkdir(parents=True, exist_ok=True)
        for file in self.source.glob("*.safetensors"):
            if int(file.stem.removeprefix("step_")) <= self.step:
                (target / file.name).write_bytes(file.read_bytes())


def test_state_without_extras_is_small(tmp_path: Path) -> None:
    probe = anatomy(coordinates=50)
    fit(tmp_path, [recorder(2), probe], steps=3)
    state = probe.state_dict()
    assert state["split"] is None and state["others"] is None
    values: Tensor = state["earlier"]["values"]
    assert 0 < len(values) <= 50


# ------------------------------------------------------------------------------------------------------ errors


def test_errors_are_one_line(tmp_path: Path) -> None:
    with one_line_error("counterfactual_beta2"):
        anatomy(counterfactual_beta2=[0.9, 1.0])
    with one_line_error("coordinates"):
        anatomy(coordinates=0)
    with one_line_error("TrajectoryRecorder"):
        fit(tmp_path, [anatomy()], steps=1)
    with one_line_error("amsgrad"):
        fit(tmp_path, [recorder(2), anatomy(counterfactual_beta2=[0.9])], steps=1, optimizer=_amsgrad)


def test_the_subset_of_coordinates() -> None:
    assert torch.equal(coordinate_subset(7, 7, 3), torch.arange(7))
    drawn = coordinate_subset(10**6, 1000, 3)
    assert torch.equal(drawn, coordinate_subset(10**6, 1000, 3))
    assert not torch.equal(drawn[:10], coordinate_subset(10**6, 1000, 4)[:10])
    assert len(drawn) > 990 and bool((drawn.diff() > 0).all()) and int(drawn[-1]) > 0.98 * 10**6
