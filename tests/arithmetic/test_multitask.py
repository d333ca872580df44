"""Several operations on one trunk: data, loss, heads, commutators across tasks, and the command line."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import one_line_error
from helpers import checkpoints, metrics, quiet_trainer, same
from lightning.pytorch import Callback
from torch import Tensor

from mini_gpt_pl import main as cli
from mini_gpt_pl.arithmetic.data import ModularArithmetic
from mini_gpt_pl.arithmetic.encoder import EncoderSize
from mini_gpt_pl.arithmetic.fourier_probe import FourierProbe
from mini_gpt_pl.arithmetic.milestones import Evaluation
from mini_gpt_pl.arithmetic.module import ResidueClassifier
from mini_gpt_pl.arithmetic.multitask import MultiTaskArithmetic, MultiTaskClassifier, milestones_of
from mini_gpt_pl.arithmetic.operations import Examples
from mini_gpt_pl.callbacks import CommutatorProbe, GradientAlignment, Schedule, TrajectoryRecorder
from mini_gpt_pl.callbacks.pairs import BatchPairs
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.training import cli as trainer_cli

SMALL = EncoderSize(n_layer=2, n_head=2, d_model=16, d_ff=32)
CONFIGS = Path(cli.__file__).resolve().parents[1] / "configs" / "grokking"
PATTERN = r"(?P<group>blocks\.\d+\.attn\.w_[qkvo](?=\.weight)|blocks\.\d+|embedding|position|norm|head)"


def data(**settings: object) -> MultiTaskArithmetic:
    return MultiTaskArithmetic(**{"operations": ["add", "mul"], "modulus": 11, "batch_size": 16, **settings})  # type: ignore[arg-type]


def module(tasks: tuple[str, ...] = ("add", "mul")) -> MultiTaskClassifier:
    return MultiTaskClassifier(size=SMALL, vocab_size=11, classes=11, tasks=tasks)


# ---------------------------------------------------------------------------------------------------------- data


def test_every_pair_has_a_class_for_each_operation() -> None:
    made = data(operations=["mul", "x2_y2", "add"])
    made.setup()
    for examples in made.sets.values():
        a, b = examples.tokens.T
        assert int(examples.tokens.min()) == 1
        assert torch.equal(examples.labels, torch.stack([a * b % 11, (a**2 + b**2) % 11, (a + b) % 11], 1))
    assert {name: len(examples.labels) for name, examples in made.sets.items()} == {"train": 50, "test": 50}


def test_operations_that_know_zero_keep_it() -> None:
    made = data(operations=["add", "sub"])
    made.setup()
    assert sum(len(examples.labels) for examples in made.sets.values()) == 121


def test_one_operation_is_the_single_task_but_for_its_zero() -> None:
    alone, among = ModularArithmetic("mul", 11, batch_size=16), data(operations=["mul"])
    for made in (alone, among):
        made.setup()
    assert torch.equal(alone.sets["train"].tokens, among.sets["train"].tokens)
    assert torch.equal(alone.batches().batch(70).labels, among.batches().batch(70).labels[:, 0])
    one, other = ResidueClassifier(SMALL, 11, 11), module(("mul",))
    assert same(one.state_dict(), other.state_dict())
    batch = alone.batches().batch(0)
    torch.testing.assert_close(
        one.batch_loss(batch), other.batch_loss(Examples(batch.tokens, batch.labels[:, None])), rtol=0, atol=0
    )


def test_a_full_batch_is_the_training_set() -> None:
    made = data(batch_size=None)
    made.setup()
    assert torch.equal(made.batches().batch(3).labels, made.sets["train"].labels)


@pytest.mark.parametrize("operations", [[], ["add", "add"]])
def test_operations_are_named_once(operations: list[str]) -> None:
    with pytest.raises(UserError, match="give one or more, each once"):
        data(operations=operations)


# --------------------------------------------------------------------------------------------------------- model


def test_published_sizes() -> None:
    sizes = [sum(p.numel() for p in MultiTaskClassifier(tasks="ab" + "c" * more).parameters()) for more in (0, 1)]
    assert sizes == [302_914, 315_427]


def test_the_loss_is_the_sum_over_heads() -> None:
    made, net = data(), module()
    made.setup()
    batch = made.batches().batch(0)
    heads = net(batch.tokens).split(11, dim=-1)
    wanted = {
        name: F.cross_entropy(head, labels)
        for name, head, labels in zip(("add", "mul"), heads, batch.labels.T, strict=True)
    }
    found = net.named_losses(batch)
    assert list(found) == ["add", "mul"]
    for name in found:
        torch.testing.assert_close(found[name], wanted[name])
    torch.testing.assert_close(net.batch_loss(batch), sum(wanted.values(), torch.tensor(0.0)))
    assert float(net.batch_loss(batch)) == pytest.approx(2 * math.log(11), rel=0.2)


def test_accuracy_of_a_set_is_that_of_its_worst_task() -> None:
    made, net = data(), module()
    made.setup()
    with torch.no_grad():
        net.encoder.head.weight.zero_()
        net.encoder.head.bias[:11] = torch.arange(11.0)  # add always answers 10
        net.encoder.head.bias[11:] = -torch.arange(11.0)  # mul always answers 0, which is no product
    found = net.evaluate(made.sets)
    assert set(found) == {"eval/weight_norm"} | {
        f"eval/{part}{task}_{what}"
        for part in ("train", "test")
        for task in ("", "_add", "_mul")
        for what in ("loss", "accuracy")
    }
    labels = made.sets["test"].labels
    assert float(found["eval/test_add_accuracy"]) == pytest.approx(float((labels[:, 0] == 10).float().mean())) != 0
    assert found["eval/test_accuracy"] == 0 == net.score(made.sets["test"])[1]
    torch.testing.assert_close(found["eval/test_loss"], found["eval/test_add_loss"] + found["eval/test_mul_loss"])


# -------------------------------------------------------------------------------------------------------- probes


def cross(a: str, b: str, every: int = 4) -> CommutatorProbe:
    return CommutatorProbe(
        Schedule(every=every), samples=2, name=f"{a}_{b}", losses=(a, b), directions=0, seed=5, size=8
    )


def fit(folder: Path, *callbacks: Callback, steps: int = 4) -> MultiTaskClassifier:
    net = module()
    quiet_trainer(folder, callbacks, max_steps=steps).fit(net, datamodule=data())
    return net


def test_probes_of_two_tasks_change_nothing(tmp_path: Path) -> None:
    bare = fit(tmp_path / "bare")
    callbacks: list[Callback] = [
        Evaluation(Schedule(every=2)),
        TrajectoryRecorder(PATTERN, Schedule(every=1), name="all"),
        GradientAlignment(Schedule(every=1), Schedule(every=1)),
        cross("add", "mul"),
        cross("add", "add"),
        FourierProbe(Schedule(every=2)),
        checkpoints(tmp_path / "probed", 2),
    ]
    probed = fit(tmp_path / "probed", *callbacks)
    assert same(bare.state_dict(), probed.state_dict())
    logged = {name for row in metrics(tmp_path / "probed").values() for name in row}
    assert logged >= {
        "alignment/all/add_vs_mul",
        "alignment/blocks.1.attn.w_o/add_vs_mul",
        "commutator/add_mul/c",
        "commutator/add_add/gradient_cosine",
        "fourier/additive/head.add/largest",
        "eval/test_mul_accuracy",
    }


def test_commutators_across_tasks_take_each_batch_with_its_own_task(tmp_path: Path) -> None:
    fit(tmp_path, cross("add", "mul"), cross("mul", "mul"), steps=1)
    logged = metrics(tmp_path)[0]
    made, net = data(), module().double()
    made.setup()
    probe = cross("add", "mul")
    pairs = BatchPairs.__new__(BatchPairs)
    pairs._seed = probe.seed

    def gradient(task: str, batch: Examples) -> Tensor:
        loss = net.named_losses(batch)[task]
        found = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
        return torch.cat(
            [
                torch.zeros_like(p).flatten() if g is None else g.flatten()
                for p, g in zip(net.parameters(), found, strict=True)
            ]
        )

    def cosine(tasks: tuple[str, str], sample: int) -> float:
        a, b = (
            gradient(task, made.draw_batch(pairs._generator(0, sample, which), 8)) for which, task in enumerate(tasks)
        )
        return float(torch.nn.functional.cosine_similarity(a, b, dim=0))

    for tasks in (("add", "mul"), ("mul", "mul")):
        wanted = (cosine(tasks, 0) + cosine(tasks, 1)) / 2
        assert logged[f"commutator/{tasks[0]}_{tasks[1]}/gradient_cosine"] == pytest.approx(wanted, rel=1e-6)


def test_a_loss_that_is_not_there_is_named(tmp_path: Path) -> None:
    with one_line_error("has no loss 'div': its named_losses are add, mul"):
        fit(tmp_path, cross("add", "div"))


# -------------------------------------------------------------------------------------------------- command line


def test_the_command_line_trains_two_tasks_and_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_cli, "draw_all", lambda run: [])
    monkeypatch.chdir(tmp_path)
    files = f"-c {CONFIGS}/multitask.yaml -c {CONFIGS}/multitask_small.yaml"
    tiny = "--model.size.d_model 16 --model.size.d_ff 32 --data.modulus 11 --data.batch_size 32"
    often = "--trainer.log_every_n_steps 5 --trainer.callbacks.every_n_train_steps 5"
    cli.run(f"fit {files} {tiny} {often} --run_dir whole --trainer.max_steps 10")
    cli.run(f"fit {files} {tiny} {often} --run_dir cut --trainer.max_steps 5")
    cli.run("fit --ckpt_path cut/checkpoints/000005.ckpt --trainer.max_steps 10")
    whole, cut = Run(Path("whole")), Run(Path("cut"))
    assert whole.task == "multitask" and whole.config["data"]["operations"] == ["add", "mul"]
    assert torch.equal(whole.trajectory.grams, cut.trajectory.grams)
    assert milestones_of(whole, "mul")["test_90"] is None
    with one_line_error("no accuracy of a task 'sub'"):
        milestones_of(whole, "sub")


def test_selected_groups_hold_every_weight_once() -> None:
    net = module()
    selection = ParameterSelection.of(net, PATTERN)
    assert selection.dim == sum(p.numel() for p in net.parameters())
    assert {"blocks.0", "blocks.1.attn.w_q", "embedding", "head", "norm", "position"} <= set(selection.groups)
