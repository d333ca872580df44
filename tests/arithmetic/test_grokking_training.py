"""Training of the second task: the same numbers as a plain loop, evaluations, milestones, resume, tied norms."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import one_line_error
from helpers import checkpoints, metrics, quiet_trainer, same
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file
from torch import Tensor

from mini_gpt_pl.arithmetic.data import MarkerSums, ModularArithmetic
from mini_gpt_pl.arithmetic.encoder import ATTENTION_PATTERN, EncoderSize
from mini_gpt_pl.arithmetic.markers import MarkerTask
from mini_gpt_pl.arithmetic.milestones import MILESTONES, Evaluation, Milestone, reached
from mini_gpt_pl.arithmetic.module import ADAMW, ResidueClassifier
from mini_gpt_pl.arithmetic.operations import Examples
from mini_gpt_pl.arithmetic.tied_norm import TiedNorm
from mini_gpt_pl.callbacks import FisherProbe, GradientAlignment, Schedule, TrajectoryRecorder
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection
from mini_gpt_pl.runs.folder import Run

SIZE = EncoderSize(n_layer=2, n_head=2, d_model=8, d_ff=16)
EVERY = Schedule(every=10, steps=[1])


def tiny(seed: int = 3, **settings: Any) -> ResidueClassifier:
    return ResidueClassifier(SIZE, vocab_size=11, classes=11, seed=seed, **settings)


def pairs(**settings: Any) -> ModularArithmetic:
    return ModularArithmetic(**{"modulus": 11, "batch_size": 16, "seed": 3, **settings})


def fit(folder: Path, steps: int, callbacks: Sequence[Callback] = (), **settings: Any) -> Trainer:
    module, data = settings.pop("module", None) or tiny(), settings.pop("data", None) or pairs()
    resume = settings.pop("resume", None)
    trainer = quiet_trainer(folder, callbacks, max_steps=steps, **settings)
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    return trainer


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.lightning_module.state_dict().items()}


def attention_recorder(every: int = 10) -> TrajectoryRecorder:
    return TrajectoryRecorder(ATTENTION_PATTERN, Schedule(every=every), name="attention")


def by_hand(steps: int, batch_size: int | None = 16) -> dict[str, Tensor]:
    """The same training without Lightning."""
    module, data = tiny(), pairs(batch_size=batch_size)
    data.setup()
    optimizer = torch.optim.AdamW(module.parameters(), **ADAMW)
    stream = data.batches()
    for step in range(steps):
        tokens, labels = stream.batch(step)
        optimizer.zero_grad()
        F.cross_entropy(module.encoder(tokens), labels).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    return module.state_dict()


@pytest.mark.parametrize("batch_size", [16, None])
def test_training_is_that_of_a_plain_loop_whatever_is_measured(tmp_path: Path, batch_size: int | None) -> None:
    probes = [attention_recorder(), Evaluation(EVERY), GradientAlignment(Schedule(every=5), Schedule(every=10))]
    kinds = FisherProbe(Schedule(every=20), ["batch_mean", "per_sample"], batches=3)
    trainer = fit(tmp_path, 70, [*probes, kinds, checkpoints(tmp_path, 30)], data=pairs(batch_size=batch_size))
    assert same(weights(trainer), by_hand(70, batch_size))


def test_all_parameters_are_decayed_alike() -> None:
    optimizer = tiny().configure_optimizers()
    (group,) = optimizer.param_groups
    assert len(group["params"]) == len(list(tiny().parameters()))
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-3, (0.9, 0.98), 1e-8, 1.0)


def test_the_path_begins_at_the_initial_weights_and_knows_their_decay(tmp_path: Path) -> None:
    module = tiny()
    initial = copy.deepcopy(module.state_dict())
    fit(tmp_path, 30, [attention_recorder()], module=module)
    trajectory = Run(tmp_path).trajectory
    assert trajectory.steps == [0, 10, 20, 30]
    assert trajectory.groups == tuple(f"encoder.blocks.{i}.attn.w_{m}"[8:] for i in range(2) for m in "qkvo")
    assert list(trajectory.survival) == pytest.approx([(1 - 1e-3) ** step for step in trajectory.steps], rel=1e-12)
    first = load_file(sorted((tmp_path / "snapshots").glob("*.safetensors"))[0])
    selection = ParameterSelection.of(module, ATTENTION_PATTERN)
    assert set(selection.names) <= set(first)
    assert all(torch.equal(first[name], initial[name]) for name in selection.names)


# ----------------------------------------------------------------------------------------------- evaluation


class Kept(Callback):
    """The weights after every step."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.states[trainer.global_step] = copy.deepcopy(pl_module.state_dict())


def test_evaluations_are_of_the_whole_sets(tmp_path: Path) -> None:
    kept, data = Kept(), pairs()
    fit(tmp_path, 25, [kept, Evaluation(EVERY)], data=data, log_every_n_steps=5)
    rows = metrics(tmp_path)
    assert [step for step, row in rows.items() if "eval/test_accuracy" in row] == [1, 10, 20]
    assert [step for step, row in rows.items() if "train/loss" in row] == [1, 5, 10, 15, 20, 25]
    for step in (1, 10, 20):
        module = tiny()
        module.load_state_dict(kept.states[step])
        for name in ("train", "test"):
            known = [((a, b), (a + b) % 11) for a, b in data.sets[name].tokens.tolist()]
            logits = torch.stack([module(torch.tensor([pair]))[0] for pair, _ in known]).detach()
            right = sum(int(row.argmax()) == label for row, (_, label) in zip(logits, known, strict=True))
            nll = [-float(row.log_softmax(0)[label]) for row, (_, label) in zip(logits, known, strict=True)]
            assert rows[step][f"eval/{name}_accuracy"] == pytest.approx(right / len(known))
            assert rows[step][f"eval/{name}_loss"] == pytest.approx(sum(nll) / len(nll), rel=1e-4)
        norm = math.sqrt(sum(float((value.double() ** 2).sum()) for value in kept.states[step].values()))
        assert rows[step]["eval/weight_norm"] == pytest.approx(norm, rel=1e-6)


def test_validate_measures_the_same(tmp_path: Path) -> None:
    trainer = fit(tmp_path, 10, [Evaluation(EVERY)])
    module = trainer.lightning_module
    again = quiet_trainer(tmp_path / "again", logger=False, limit_val_batches=1.0)
    again.validate(module, datamodule=pairs(), verbose=False)
    logged = {name: value for name, value in metrics(tmp_path)[10].items() if name.startswith("eval/")}
    assert {name: float(again.callback_metrics[name]) for name in logged} == pytest.approx(logged)


def test_accumulated_batches_are_one_step_of_one_evaluation(tmp_path: Path) -> None:
    evaluation = Evaluation(EVERY)
    fit(tmp_path, 20, [evaluation], accumulate_grad_batches=3, log_every_n_steps=10)
    assert evaluation.steps == [1, 10, 20]
    assert [step for step, row in metrics(tmp_path).items() if "train/loss" in row] == [1, 10, 20]


# ----------------------------------------------------------------------------------------------- milestones

STEPS = [1, 100, 200, 300, 400, 500, 600, 700, 800]
TRAIN = [0.1, 0.8, 0.99, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
TEST = [0.0, 0.0, 0.5, 0.91, 0.985, 0.97, 0.98, 0.99, 0.98]


def test_the_four_definitions_of_the_grok_step_differ() -> None:
    assert reached(STEPS, {"train": TRAIN, "test": TEST}) == {
        "train_99": 200,
        "test_50": 200,
        "test_90": 300,
        "test_95": 400,
        "test_98": 400,
        "test_98_thrice": 800,
    }
    assert reached(STEPS[:8], {"train": TRAIN[:8], "test": TEST[:8]})["test_98_thrice"] is None
    assert reached(STEPS, {"m1": TEST}) == {}
    assert Milestone("x", "test", 0.9, in_a_row=9).reached(STEPS, TEST) is None


class Scripted(ResidueClassifier):
    """Its accuracies are known beforehand, one pair an evaluation."""

    script: list[tuple[float, float]]

    def evaluate(self, sets: dict[str, Examples]) -> dict[str, Tensor]:
        train, test = self.script.pop(0)
        return {"eval/train_accuracy": torch.tensor(train), "eval/test_accuracy": torch.tensor(test)}


def scripted(values: Sequence[tuple[float, float]]) -> Scripted:
    module = Scripted(SIZE, 11, 11, seed=3)
    module.script = list(values)
    return module


def play(folder: Path, evaluation: Evaluation, values: Sequence[tuple[float, float]], steps: int = 60) -> Trainer:
    return fit(folder, steps, [evaluation], module=scripted(values), log_every_n_steps=10)


@pytest.mark.parametrize(
    ("stop_at", "extra", "end"),
    [("test_98_thrice", 0, 50), ("test_98_thrice", 7, 57), ("test_90", 0, 20), ("train_99", 3, 13), (None, 5, 60)],
)
def test_training_ends_where_it_is_told(tmp_path: Path, stop_at: str | None, extra: int, end: int) -> None:
    values = list(zip([0.1, 1.0, *[1.0] * 5], [0.0, 0.5, 0.98, 0.99, 0.99, 0.99, 1.0], strict=True))
    evaluation = Evaluation(Schedule(every=10, steps=[1]), stop_at, extra)
    values = [values[0], values[1], (1.0, 0.97), *values[2:]]
    trainer = play(tmp_path, evaluation, values)
    assert trainer.global_step == end
    told = {name: value for row in metrics(tmp_path).values() for name, value in row.items() if "milestone" in name}
    assert told == {f"milestone/{name}": step for name, step in evaluation.milestones.items() if step is not None}
    rows = metrics(tmp_path)
    assert all(f"milestone/{name}" in rows[step] for name, step in evaluation.milestones.items() if step is not None)


def test_a_run_that_never_generalises_ends_at_its_last_step(tmp_path: Path) -> None:
    evaluation = Evaluation(Schedule(every=10), "test_98_thrice")
    trainer = play(tmp_path, evaluation, [(1.0, 0.01)] * 6)
    assert trainer.global_step == 60
    assert evaluation.milestones["train_99"] == 10
    assert all(evaluation.milestones[m.name] is None for m in MILESTONES if m.of == "test")


def test_milestones_survive_a_restart(tmp_path: Path) -> None:
    """Two evaluations in a row before the restart, the third behind it."""
    whole = Evaluation(Schedule(every=10), "test_98_thrice")
    play(tmp_path / "whole", whole, [(1.0, 0.5), *[(1.0, 0.99)] * 5])
    before = Evaluation(Schedule(every=10), "test_98_thrice")
    fit(tmp_path, 30, [before, checkpoints(tmp_path, 30)], module=scripted([(1.0, 0.5), *[(1.0, 0.99)] * 2]))
    after = Evaluation(Schedule(every=10), "test_98_thrice")
    resume = tmp_path / "checkpoints/000030.ckpt"
    trainer = fit(tmp_path, 60, [after], module=scripted([(1.0, 0.99)] * 3), resume=resume)
    assert trainer.global_step == 40
    assert (after.milestones, after.steps, after.accuracy) == (whole.milestones, whole.steps, whole.accuracy)
    assert "milestone/test_98" not in metrics(tmp_path)[40]  # it was known before


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"stop_at": "grok"}, "no milestone 'grok' to stop at; give one of train_99"), ({"continue_steps": -1}, "-1")],
)
def test_mistakes_in_an_evaluation_are_one_line(settings: dict[str, Any], told: str) -> None:
    with one_line_error(told):
        Evaluation(**settings)


# ------------------------------------------------------------------------------------------------- restarts


@pytest.mark.parametrize("at", [7, 64, 65])
def test_a_restart_anywhere_changes_nothing(tmp_path: Path, at: int) -> None:
    def callbacks(folder: Path) -> list[Callback]:
        return [attention_recorder(), Evaluation(EVERY), checkpoints(folder, at)]

    whole = fit(tmp_path / "whole", 80, callbacks(tmp_path / "whole"))
    fit(tmp_path / "cut", at + 3, callbacks(tmp_path / "cut"))  # lost from its checkpoint on
    checkpoint = tmp_path / f"cut/checkpoints/{at:06d}.ckpt"
    resumed = fit(tmp_path / "cut", 80, callbacks(tmp_path / "cut"), module=tiny(seed=9), resume=checkpoint)
    assert same(weights(resumed), weights(whole))
    assert same(resumed.optimizers[0].state_dict(), whole.optimizers[0].state_dict())
    assert torch.equal(Run(tmp_path / "cut").trajectory.grams, Run(tmp_path / "whole").trajectory.grams)


def test_a_restart_in_other_data_or_of_another_shape_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, 5, [checkpoints(tmp_path, 5)])
    checkpoint = tmp_path / "checkpoints/000005.ckpt"
    with one_line_error("seed=3 and this one 4"):
        fit(tmp_path, 9, data=pairs(seed=4), resume=checkpoint)
    for other_pairs in (
        pairs(operation="sub"),
        pairs(split_seed=4),
    ):  # test pairs of the one are trained on in the other
        with one_line_error("the checkpoint's training data has training set="):
            fit(tmp_path, 9, data=other_pairs, resume=checkpoint)
    other = ResidueClassifier(EncoderSize(2, 2, 4, 16), 11, 11)
    with one_line_error(r"encoder.position is \(2, 8\), the configured model's \(2, 4\)"):
        fit(tmp_path, 9, module=other, resume=checkpoint)
    deeper = ResidueClassifier(EncoderSize(3, 2, 8, 16), 11, 11)
    with one_line_error("blocks.2.norm1.weight is missing"):
        fit(tmp_path, 9, module=deeper, resume=checkpoint)


def test_several_devices_are_refused(tmp_path: Path) -> None:
    data = pairs()
    data.trainer = type("Two", (), {"world_size": 2})()
    with one_line_error("one device, not on 2: give --trainer.devices 1"):
        data.setup()


# ------------------------------------------------------------------------------------------------- the norm


@pytest.fixture
def decayed(tmp_path: Path) -> Path:
    def strong(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=1.0)

    fit(tmp_path / "decayed", 40, [Evaluation(EVERY)], module=tiny(optimizer=strong))
    return tmp_path / "decayed"


def undecayed(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)


@pytest.mark.parametrize("first", [True, False])
def test_a_tied_norm_follows_the_other_runs(tmp_path: Path, decayed: Path, first: bool) -> None:
    kept, tied = Kept(), TiedNorm(str(decayed))
    order: list[Callback] = [tied, kept] if first else [kept, tied]
    fit(tmp_path / "tied", 50, [*order, Evaluation(EVERY)], module=tiny(optimizer=undecayed))
    target, own = (Run(folder).series("eval/weight_norm") for folder in (decayed, tmp_path / "tied"))
    pd.testing.assert_series_equal(own.loc[:40], target, rtol=1e-5)
    assert own[50] == pytest.approx(target[40], rel=1e-5)
    norm = {step: math.sqrt(sum(float((v**2).sum()) for v in state.values())) for step, state in kept.states.items()}
    assert norm[15] == pytest.approx(math.sqrt(target[10] * target[20]), rel=1e-5)  # half-way, on a log scale
    free = fit(tmp_path / "free", 40, module=tiny(optimizer=undecayed))
    assert math.sqrt(sum(float((v**2).sum()) for v in weights(free).values())) > 1.2 * target[40]


def test_a_tied_norm_goes_on_from_its_own_initial_norm(tmp_path: Path, decayed: Path) -> None:
    """Resumed before the first norm that the other run recorded, which is taken to be that of step 10."""

    def late() -> TiedNorm:
        tied = TiedNorm(str(decayed))
        tied._steps, tied._logs = tied._steps[1:], tied._logs[1:]
        return tied

    once = fit(tmp_path / "whole", 10, [late()], module=tiny(optimizer=undecayed))
    fit(tmp_path / "cut", 5, [checkpoints(tmp_path / "cut", 5), late()], module=tiny(optimizer=undecayed))
    resume = tmp_path / "cut/checkpoints/000005.ckpt"
    twice = fit(tmp_path / "cut", 10, [late()], module=tiny(optimizer=undecayed), resume=resume)
    assert same(weights(once), weights(twice))


def test_a_tied_norm_needs_a_norm_and_no_decay(tmp_path: Path, decayed: Path) -> None:
    with one_line_error("replaces weight decay: give the optimizer weight_decay 0"):
        fit(tmp_path / "both", 5, [TiedNorm(str(decayed))])
    fit(tmp_path / "none", 5)
    with one_line_error("recorded no eval/weight_norm"):
        TiedNorm(str(tmp_path / "none"))


# -------------------------------------------------------------------------------------------------- markers


def test_marker_sums_are_learned(tmp_path: Path) -> None:
    task = MarkerTask(length=6, vocab_size=40, classes=3, markers=(1,), first_marker=20)
    data = MarkerSums(task, batch_size=64, eval_examples=64, seed=3)
    module = ResidueClassifier(
        EncoderSize(2, 2, 32, 0), 40, 3, 6, causal=True, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), seed=3
    )
    fit(tmp_path, 300, [Evaluation(Schedule(every=50, steps=[1]))], module=module, data=data, log_every_n_steps=50)
    accuracy = Run(tmp_path).series("eval/m1_accuracy")
    assert accuracy[1] < 0.6 and accuracy[300] > 0.95
    assert not [name for name in Run(tmp_path).metrics if "milestone" in str(name)]


def test_a_milestone_of_a_set_that_is_not_there_is_refused(tmp_path: Path) -> None:
    task = MarkerTask(length=6, vocab_size=40, classes=3, markers=(1,), first_marker=20)
    data = MarkerSums(task, batch_size=8, eval_examples=8, seed=3)
    module = ResidueClassifier(EncoderSize(1, 2, 8, 0), 40, 3, 6, causal=True, seed=3)
    with one_line_error("the sets m1 have no milestone 'test_98': give stop_at null"):
        fit(tmp_path, 5, [Evaluation(EVERY, stop_at="test_98")], module=module, data=data)
