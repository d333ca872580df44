"""A reader's own probe: what its base logs, against brute force, and what it promises."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, normal, one_line_error
from helpers import (
    DECAY,
    GROUPS,
    LABELS,
    Spy,
    checkpoints,
    cosine,
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

from mini_gpt_pl.callbacks import CalibratedProbe, Schedule, View
from mini_gpt_pl.callbacks.measuring import training_loss
from mini_gpt_pl.geometry.path import pca, surrogates
from mini_gpt_pl.geometry.vectors.alignment import cosines
from mini_gpt_pl.geometry.vectors.selection import Vector

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "write-a-probe.md"


@cache
def page() -> dict[str, Any]:
    """What the code blocks of the documentation's page define."""
    names: dict[str, Any] = {"__name__": "page"}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        exec(block, names)
    return names


class UpdateAlignment(CalibratedProbe):
    """Cosine of the update with the backbone, per group and for the whole; its length, per group."""

    needs = ("update", "backbone")

    def measure(self, seen: View) -> dict[str, Tensor]:
        return {"cosine": seen.backbone_cosines(seen.update), "length": seen.update.dots(seen.update).sqrt()}


class GradientAlong(CalibratedProbe):
    """One number with a null on paper."""

    family = "along"
    needs = ("gradient", "backbone")

    def measure(self, seen: View) -> dict[str, Tensor]:
        return {"cosine": seen.backbone_cosines(seen.gradient)[-1]}

    def null(self, seen: View) -> dict[str, float]:
        return {"cosine": 0.25}


def train(folder: Path, *own: Callback, steps: int = 6, **settings: Any) -> Spy:
    spy = Spy()
    trainer = quiet_trainer(folder, [recorder(2), *own, spy], max_steps=steps, **settings)
    trainer.fit(tiny_gpt(), tiny_stories())
    return spy


@cache
def run() -> tuple[Path, Spy]:
    """One run with the page's probes and two more, two micro-batches a step."""
    folder = Path(tempfile.mkdtemp(prefix="calibrated-"))
    every = Schedule(every=1)
    own = [
        page()["GradientTurn"](every),
        page()["Spread"](every),
        UpdateAlignment(every, draws=64),
        GradientAlong(every),
    ]
    return folder, train(folder, *own, accumulate_grad_batches=2)


# ------------------------------------------------------------------------------------------------ stand-ins


def small(seed: int) -> Vector:
    return Vector(normal(15, seed=seed).float(), SMALL)


def test_isotropic_stand_in_has_each_groups_length_and_no_direction_of_its_own() -> None:
    vector = small(1)
    drawn = [surrogates.isotropic(vector, torch.Generator().manual_seed(seed)) for seed in range(400)]
    for one in drawn[:3]:
        torch.testing.assert_close(one.dots(one), vector.dots(vector), rtol=1e-6, atol=0)
    mean = torch.stack([cosines(one, vector) for one in drawn]).mean(0)
    assert mean.abs().max() < 4 / (6 * 400) ** 0.5  # the smaller group has six dimensions


def test_decaying_step_is_decay_and_an_innovation_across_the_weights() -> None:
    update, weights, rate = small(2), small(3), 0.2
    drawn = surrogates.decaying_step(update, weights, rate, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.dots(drawn), update.dots(update), rtol=1e-5, atol=0)
    torch.testing.assert_close(drawn.dots(weights), -rate * weights.dots(weights), rtol=1e-5, atol=1e-6)


def test_decay_longer_than_the_measured_step_leaves_no_innovation() -> None:
    update, weights = Vector(small(2).values * 1e-3, SMALL), small(3)
    drawn = surrogates.decaying_step(update, weights, 0.5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.values, -0.5 * weights.values)


def test_vanished_weights_and_gradients_have_finite_stand_ins() -> None:
    zero = Vector(torch.zeros(15), SMALL)
    generator = torch.Generator().manual_seed(0)
    assert not surrogates.isotropic(zero, generator).values.any()
    drawn = surrogates.decaying_step(small(1), zero, 0.1, generator)
    torch.testing.assert_close(drawn.dots(drawn), small(1).dots(small(1)), rtol=1e-6, atol=0)


# -------------------------------------------------------------------------------------------------- numbers


def test_the_documented_probe_measures_how_far_the_gradient_turned() -> None:
    folder, spy = run()
    rows = metrics(folder)
    for step in range(2, 7):
        for label in LABELS:
            before, now = (flat(spy.gradients[s], label) for s in (step - 1, step))
            assert rows[step][f"turn/{label}/cosine"] == pytest.approx(cosine(now, before), abs=1e-6)
    assert "turn/trunk/cosine" not in rows[1]


def test_excess_is_the_difference_from_the_null() -> None:
    folder, _ = run()
    checked = 0
    for row in metrics(folder).values():
        excesses = [name for name in row if name.endswith("_excess")]
        for name in [name for name in excesses if not name.startswith(("backbone/", "alignment/"))]:
            value, null = (row[name.removesuffix("_excess") + end] for end in ("", "_null"))
            assert row[name] == pytest.approx(value - null, abs=1e-12)
            checked += 1
    assert checked == 5 * 3 + 2 + 4 * (3 + 2) + 4  # what each of the four probes said, by step and label


def test_a_gradients_null_scatters_as_isotropic_vectors_do() -> None:
    folder, spy = run()
    rows = metrics(folder)
    dim = flat(spy.gradients[1], "trunk").size
    null = [rows[step]["turn/trunk/cosine_null"] for step in range(2, 7)]
    spread = [rows[step]["turn/trunk/cosine_null_sd"] for step in range(2, 7)]
    assert np.abs(null).max() < 5 / (8 * dim) ** 0.5  # eight draws
    # The lengths of two groups are shared out unequally, so the whole has fewer dimensions in effect.
    assert 0.3 / dim**0.5 < np.mean(spread) < 3 / dim**0.5
    assert len(set(null)) == 5


def test_an_updates_null_has_its_length_and_the_pull_of_decay() -> None:
    folder, spy = run()
    rows = metrics(folder)
    for step in (4, 6):
        backbone = past_backbone(folder, "trunk", step)
        assert backbone is not None
        before, after = (flat(spy.weights[s], "trunk") for s in (step - 1, step))
        update, row = after - before, rows[step]
        assert row["update_alignment/trunk/cosine"] == pytest.approx(cosine(update, backbone), abs=1e-5)
        pull = -row["train/lr"] * DECAY * (before @ backbone) / np.linalg.norm(update)
        surely = 5 * row["update_alignment/trunk/cosine_null_sd"] / 8  # sixty-four draws
        assert row["update_alignment/trunk/cosine_null"] == pytest.approx(pull, abs=surely)
        for group in GROUPS:
            length = np.linalg.norm(flat(spy.weights[step], group) - flat(spy.weights[step - 1], group))
            assert row[f"update_alignment/{group}/length"] == pytest.approx(length, rel=1e-4)
            assert row[f"update_alignment/{group}/length_null"] == pytest.approx(length, rel=1e-4)
    assert "update_alignment/trunk/length" not in rows[6]  # one value per group and none for the whole


def test_a_measure_of_the_trajectory_has_the_decaying_walks_null_of_the_past() -> None:
    folder, _ = run()
    rows = metrics(folder)
    for step in (5, 6):  # both before the snapshot of step 6
        assert rows[step]["spread/trunk/participation"] == rows[4]["backbone/trunk/participation"]
        assert "spread/trunk/participation_null_sd" not in rows[step]
    _, basis = read_path(folder, "trunk", until=4)
    gram = torch.from_numpy(basis @ basis.T)
    assert rows[6]["spread/trunk/participation"] == pytest.approx(_participation(gram), rel=1e-6)
    assert rows[6]["spread/trunk/participation_null"] < 2.0


def _participation(gram: Tensor) -> float:
    rows = pca.drifts(len(gram))[1:]
    values = torch.linalg.eigvalsh(rows @ gram @ rows.T)
    return float(values.sum() ** 2 / values.square().sum())


def test_a_null_on_paper_replaces_the_draws() -> None:
    folder, spy = run()
    row = metrics(folder)[6]
    assert row["along/trunk/cosine_null"] == 0.25
    assert "along/trunk/cosine_null_sd" not in row
    backbone = past_backbone(folder, "trunk", 6)
    assert backbone is not None
    assert row["along/trunk/cosine"] == pytest.approx(cosine(flat(spy.gradients[6], "trunk"), backbone), abs=1e-6)


# ------------------------------------------------------------------------------------------------- promises


def test_measuring_changes_no_bit_of_training(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", accumulate_grad_batches=2)
    assert same(plain.weights[6], run()[1].weights[6])


def test_a_resumed_run_remembers(tmp_path: Path) -> None:
    every = Schedule(every=1)

    def fit(folder: Path, steps: int, resume: Path | None = None) -> dict[int, dict[str, float]]:
        own = [recorder(2), page()["GradientTurn"](every), checkpoints(folder, every=3)]
        trainer = quiet_trainer(folder, own, max_steps=steps)
        trainer.fit(tiny_gpt(), tiny_stories(), ckpt_path=resume)
        return metrics(folder)

    whole = fit(tmp_path / "whole", 6)
    fit(tmp_path / "broken", 3)
    (tmp_path / "broken" / "metrics.csv").unlink()
    rest = fit(tmp_path / "broken", 6, tmp_path / "broken" / "checkpoints" / "000003.ckpt")
    for step in (4, 5, 6):
        ours = {name: value for name, value in rest[step].items() if name.startswith("turn/")}
        assert ours == {name: value for name, value in whole[step].items() if name.startswith("turn/")}
        assert len(ours) == 3 * 4


def test_a_budget_can_stretch_it() -> None:
    probe = UpdateAlignment(Schedule(every=1))
    probe.stretch = 3
    assert [step for step in range(1, 8) if probe.due(step)] == [1, 4, 7]
    assert probe.estimate(100, 1000).bytes > 0


def _measures(what: Callable[[View], Mapping[str, Any]], *needs: str) -> CalibratedProbe:
    kind = type("Own", (CalibratedProbe,), {"measure": lambda self, seen: what(seen), "needs": needs})
    probe: CalibratedProbe = kind(Schedule(every=1))
    return probe


@pytest.mark.parametrize(
    ("what", "needs", "message"),
    [
        (lambda seen: {"a": seen.update.values.sum()}, (), "does not declare: add 'update' to its `needs`"),
        (lambda seen: {"a": seen.weights.values.sum()}, (), "does not declare: add 'update' to its `needs`"),
        (lambda seen: {"a": torch.ones(7)}, (), "give a number, 2 values \\(one per group\\) or 3"),
    ],
)
def test_what_a_probe_gets_wrong_is_one_line(
    tmp_path: Path, what: Callable[[View], Mapping[str, Any]], needs: tuple[str, ...], message: str
) -> None:
    with one_line_error(message):
        train(tmp_path, _measures(what, *needs), steps=2)


def test_a_measure_that_says_less_on_a_stand_in_is_refused(tmp_path: Path) -> None:
    said: list[int] = []

    def once(seen: View) -> dict[str, float]:
        said.append(1)
        return {"a": 1.0} if len(said) == 1 else {}

    with one_line_error("the null of 'a' is missing"):
        train(tmp_path, _measures(once, "gradient"), steps=2)


def test_options_out_of_range_are_refused() -> None:
    with one_line_error("without a null"):
        UpdateAlignment(draws=0)
    with one_line_error("needs hessian; there is gradient, update, backbone"):
        _measures(lambda seen: {}, "hessian")


def test_it_asks_for_a_recorder(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, [UpdateAlignment()], max_steps=1)
    with one_line_error("UpdateAlignment needs a TrajectoryRecorder"):
        trainer.fit(tiny_gpt(), tiny_stories())


class LossAfter(CalibratedProbe):
    """The loss of the step's own batch after it, which is a measure of the module; keeps what it was measured with."""

    family = "loss"

    def __init__(self, needs: tuple[str, ...]) -> None:
        super().__init__(Schedule(steps=[4]), draws=5)
        self.needs = needs  # type: ignore[misc, assignment]
        self.views: list[View] = []
        self.state: dict[str, Tensor] = {}

    def measure(self, seen: View) -> dict[str, Tensor]:
        if seen.original is None:
            self.state = {name: value.clone() for name, value in seen.module.state_dict().items()}
        self.views.append(seen)
        return {"after": training_loss(seen.module, seen.batch)}


def test_the_null_of_a_measure_of_the_module_is_taken_where_chance_would_have_led(tmp_path: Path) -> None:
    probe = LossAfter(("update",))
    train(tmp_path / "with", probe)
    train(tmp_path / "without")
    losses = []
    twin = probe.views[0].module.eval()
    twin.load_state_dict(probe.state)
    for view in probe.views:
        after = view.selection.unflatten(Vector(view.weights.values + view.update.values, view.selection))
        with torch.no_grad():
            for name, weight in twin.named_parameters():
                if name in after:
                    weight.copy_(after[name])
            losses.append(float(training_loss(twin, view.batch)))
    row = metrics(tmp_path / "with")[4]
    assert row["loss/trunk/after"] == pytest.approx(losses[0], rel=1e-5)
    assert row["loss/trunk/after_null"] == pytest.approx(float(np.mean(losses[1:])), rel=1e-6)
    assert row["loss/trunk/after_excess"] == pytest.approx(losses[0] - float(np.mean(losses[1:])), rel=1e-2)
    assert len(losses) == 6 and len(set(losses)) == 6
    bare, probed = (read_path(tmp_path / name, "trunk")[1] for name in ("without", "with"))
    assert np.array_equal(bare, probed)


def test_without_the_update_the_null_of_a_measure_of_the_module_is_unknown(tmp_path: Path) -> None:
    train(tmp_path, LossAfter(("gradient",)))
    assert [name for name in metrics(tmp_path)[4] if name.startswith("loss/")] == ["loss/trunk/after"]
