"""The command line on the second task: whole commands, what they leave behind, and one line for every mistake."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import Command

from mini_gpt_pl import main as cli
from mini_gpt_pl.arithmetic.markers import MarkerTask
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.report.probe_tables import live_probes
from mini_gpt_pl.report.published import NOTHING
from mini_gpt_pl.report.subject import Subject
from mini_gpt_pl.runs.checkpoints import read_checkpoint
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.sweep.grid import read_sweep
from mini_gpt_pl.tasks import task_named, tasks
from mini_gpt_pl.training import cli as trainer_cli

ROOT = Path(cli.__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "grokking"
SWEEPS = ROOT / "configs" / "sweeps"
TINY = ("-c", str(CONFIGS / "smoke.yaml"), "-c", str(CONFIGS / "tiny.yaml"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run of forty steps for the whole module."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_cli, "draw_all", lambda run: [])
        cli.run(f"fit {' '.join(TINY)} --run_dir {folder}")
    return Run(folder)


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Work in a folder of the test's own, and draw nothing."""
    monkeypatch.setattr(trainer_cli, "draw_all", lambda run: [])
    monkeypatch.chdir(tmp_path)


def weights(run: Run, step: int) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = read_checkpoint(run.checkpoints[step])["state_dict"]
    return found


def test_a_run_leaves_what_other_commands_read(finished: Run) -> None:
    assert finished.task == "operations"
    assert finished.config["seed_everything"] == 1
    assert finished.trajectory.steps == [0, 10, 20, 30, 40] and finished.trunk == "attention"
    assert list(finished.series("eval/test_accuracy").index) == [1, 10, 20, 30, 40]
    assert finished.outcome is not None and finished.outcome.step == 40
    told = json.loads((finished.path / "outcome.json").read_text())
    assert told["milestones"]["test_98_thrice"] is None  # it never generalised, and says so


def test_a_resumed_run_is_the_whole_one(finished: Run, command: Command) -> None:
    command("fit", *TINY, "--run_dir", "cut", "--trainer.max_steps", "20")
    command("fit", "--ckpt_path", "cut/checkpoints/000020.ckpt", "--trainer.max_steps", "40")
    cut = Run(Path("cut"))
    found, expected = weights(cut, 40), weights(finished, 40)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(cut.trajectory.grams, finished.trajectory.grams)
    steady = [name for name in finished.metrics if not str(name).startswith("overhead/")]
    assert cut.metrics[steady].equals(finished.metrics[steady])


def test_the_kept_configuration_repeats_the_run(finished: Run, command: Command) -> None:
    command("fit", "--config", str(finished.path / "config.yaml"), "--run_dir", "again")
    assert torch.equal(Run(Path("again")).trajectory.grams, finished.trajectory.grams)


def test_one_seed_is_of_everything(finished: Run, command: Command) -> None:
    command("fit", *TINY, "--run_dir", "other", "--seed_everything", "2", "--trainer.max_steps", "20")
    first, other = (run.series("eval/train_loss")[1] for run in (finished, Run(Path("other"))))
    assert first != other
    initial = [Run(path).trajectory.gram()[0, 0] for path in (finished.path, Path("other"))]
    assert initial[0] != initial[1]


@pytest.mark.parametrize("name", ["validate", "test"])
def test_evaluation_repeats_the_runs_own_numbers(finished: Run, command: Command, name: str) -> None:
    printed = command(name, "--ckpt_path", str(finished.checkpoints[20]))
    told = dict(line.split() for line in printed.splitlines() if line.startswith("eval/"))
    assert set(told) == {name for name in finished.metrics if str(name).startswith("eval/")}
    for metric, value in told.items():
        assert float(value) == pytest.approx(finished.series(metric)[20], abs=6e-5)


def test_the_end_of_a_run_names_its_milestones(command: Command) -> None:
    script = ["--trainer.callbacks", "[{class_path: mini_gpt_pl.arithmetic.milestones.Evaluation}]"]
    told = command("fit", *TINY, *script, "--run_dir", "short", "--trainer.max_steps", "3")
    line = next(line for line in told.splitlines() if line.startswith("milestones"))
    assert line == ("milestones not within 3 steps: train_99, test_50, test_90, test_95, test_98, test_98_thrice")


def test_marker_sums_run_through_the_same_command(command: Command) -> None:
    small = ["--model.size", "{n_layer: 2, n_head: 2, d_model: 8, d_ff: 0}", "--data.eval_examples", "8"]
    data = ["--data.batch_size", "4", "--data.task.per_example", "true", "--trainer.max_steps", "5"]
    every = ["--trainer.callbacks", "[{class_path: mini_gpt_pl.arithmetic.milestones.Evaluation}]"]
    command("fit", "-c", str(CONFIGS / "markers.yaml"), *small, *data, *every, "--run_dir", "markers")
    run = Run(Path("markers"))
    assert {f"eval/m{m}_accuracy" for m in (1, 2, 3, 4)} <= set(run.metrics)
    assert json.loads((run.path / "outcome.json").read_text()) == {"state": "finished", "step": 5}


def test_the_report_and_the_table_read_such_a_run(finished: Run, command: Command) -> None:
    copied = Path(shutil.copytree(finished.path, "copied"))
    command("report", str(copied), "--out", "page")
    assert "eval/test_accuracy" in command("explain", str(copied))
    assert list(Path("page").rglob("*.html"))


# ---------------------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_every_preset_can_be_parsed(name: str, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    composed = {f"{name}.yaml" for name in ("nodecay", "tied_norm", "fixed", "tiny", "attention", "fourier")} | {
        f"commutator{kind}.yaml" for kind in ("", "_full", "_sparse")
    }
    first = dict.fromkeys(("multitask_small.yaml", "multitask_three.yaml"), "multitask.yaml")
    first |= dict.fromkeys((*composed, "all_weights.yaml"), "smoke.yaml") | {"slow.yaml": "paper.yaml"}
    first |= dict.fromkeys(("curriculum.yaml", "commutator_markers.yaml"), "markers.yaml")
    base = ["-c", str(CONFIGS / first[name])] if name in first else []
    with pytest.raises(SystemExit) as caught:
        command("fit", *base, "-c", str(CONFIGS / name), "--print_config")
    assert not caught.value.code
    config: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    kinds = [callback["class_path"].rpartition(".")[2] for callback in config["trainer"]["callbacks"]]
    assert {"Evaluation", "TrajectoryRecorder", "ModelCheckpoint"} <= set(kinds)
    decay = config["model"]["optimizer"]["init_args"]["weight_decay"]
    of_markers = "markers.yaml" in (name, first.get(name))
    expected = {"nodecay.yaml": 0.0, "slow.yaml": 0.1}
    assert decay == expected.get(name, 0.01 if of_markers else 1.0)
    assert config["trainer"]["gradient_clip_val"] == (None if of_markers else 1.0)


@pytest.mark.parametrize("name", sorted(path.stem for path in SWEEPS.glob("grokking*.yaml")))
def test_every_sweep_can_be_parsed(
    name: str, command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    sweep = read_sweep(SWEEPS / f"{name}.yaml")
    for point in (sweep.points[0], sweep.points[-1]):
        words = sweep.expand(point.options)
        with pytest.raises(SystemExit) as caught:
            command(*words[words.index(sweep.program[-1]) + 1 :], "--print_config")
        assert not caught.value.code
        config: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
        for key, value in point.parameters.items():
            if key.startswith("trainer.callbacks."):
                assert config["trainer"]["callbacks"][-1]["init_args"][key.removeprefix("trainer.callbacks.")] == value
        assert config["seed_everything"] == point.parameters["seed_everything"]


def test_all_the_commutator_probe_can_do_beside_another_seed_s_path(finished: Run, command: Command) -> None:
    full = ["-c", str(CONFIGS / "commutator_full.yaml"), "--trainer.callbacks.other_run", str(finished.path)]
    few = ["--trainer.callbacks.schedule.every", "10", "--trainer.callbacks.samples", "2", "--trainer.max_steps", "20"]
    command("fit", *TINY, *full, *few, "--seed_everything", "2", "--run_dir", "full")
    logged = Run(Path("full")).metrics.filter(regex="^commutator/all/").loc[20].dropna()
    bases = ("path", "theta0", "singular", "rank_one", "other")
    wanted = [f"on_{basis}{end}" for basis in bases for end in ("", "_null", "_ratio", "_below")]
    wanted += ["step_defect", "step_memory", "step_curvature", "step_cosine", "alignment", "alignment_flip"]
    assert {f"commutator/all/{name}" for name in wanted} <= set(logged.index)


def test_all_weights_are_groups_of_one_path(finished: Run, command: Command) -> None:
    both = ["-c", str(CONFIGS / "all_weights.yaml"), "-c", str(CONFIGS / "commutator.yaml")]
    command("fit", *TINY, *both, "--trainer.max_steps", "20", "--run_dir", "all")
    run = Run(Path("all"))
    own = [f"blocks.{layer}{part}" for layer in (0, 1) for part in ("", *(f".attn.w_{m}" for m in "qkvo"))]
    assert set(run.trajectory.groups) == {"embedding", "position", "norm", "head", *own}
    assert run.trunk == "all"
    assert run.trajectory.dim == sum(weight.numel() for weight in weights(run, 20).values())
    attention = [run.trajectory.groups.index(group) for group in finished.trajectory.groups]
    assert torch.equal(run.trajectory.grams[attention], finished.trajectory.grams[:, :3, :3])
    assert len(run.series("commutator/embedding/share")) > 0


def test_two_recorders_need_two_folders(mistake: Command, command: Command, tmp_path: Path) -> None:
    second = tmp_path / "second.yaml"
    recorder = "class_path: mini_gpt_pl.callbacks.TrajectoryRecorder, init_args: {pattern: embedding, name: embedding"
    second.write_text(f"trainer: {{callbacks+: [{{{recorder}}}}}]}}")
    told = mistake("fit", *TINY, "-c", str(second), "--run_dir", "two")
    assert "'attention' and 'embedding' would write to one folder" in told
    second.write_text(f"trainer: {{callbacks+: [{{{recorder}, dirpath: elsewhere}}}}]}}")
    command("fit", *TINY, "-c", str(second), "--trainer.max_steps", "3", "--run_dir", "two_folders")
    assert Run(Path("two_folders")).trajectory.groups == tuple(f"blocks.{b}.attn.w_{m}" for b in (0, 1) for m in "qkvo")
    assert Path("elsewhere/trajectory.safetensors").is_file()


def test_the_curriculum_goes_from_one_number_of_markers_to_the_next(command: Command) -> None:
    small = ["--model.size", "{n_layer: 1, n_head: 2, d_model: 8, d_ff: 0}", "--data.eval_examples", "8"]
    few = ["--data.batch_size", "4", "--data.task.steps_each", "2", "--trainer.max_steps", "5"]
    every = ["--trainer.callbacks", "[{class_path: mini_gpt_pl.arithmetic.milestones.Evaluation}]"]
    both = ["-c", str(CONFIGS / "markers.yaml"), "-c", str(CONFIGS / "curriculum.yaml")]
    command("fit", *both, *small, *few, *every, "--run_dir", "curriculum")
    task = MarkerTask(**Run(Path("curriculum")).config["data"]["task"])
    drawn = [task.markers_at(step, np.random.default_rng(0), 1)[0] for step in range(9)]
    assert drawn == [1, 1, 2, 2, 3, 3, 4, 4, 4]


def test_commutators_on_stories_are_in_the_report_and_explained(command: Command) -> None:
    preset = ["-c", str(ROOT / "tests" / "tiny.yaml"), "-c", str(ROOT / "configs" / "probes" / "commutator.yaml")]
    few = ["--trainer.callbacks.schedule.every", "3", "--trainer.callbacks.samples", "1"]
    command("fit", *preset, *few, "--run_dir", "stories")
    run = Run(Path("stories"))
    assert run.task == "stories" and list(run.series("commutator/all/defect").index) == [0, 3, 6]
    told = command("explain", "stories")
    assert "commutator/all/defect" in told and "on_path_null" in told
    (made,) = live_probes(Subject.of(run), NOTHING)
    shown = made.frame.set_index("quantity")
    assert shown.loc["commutator on the past path's directions", "null"] != "-"
    assert shown.loc["commutator: c, without 1/||g||", "null"] == "-"


def test_a_preset_without_decay_can_follow_a_decayed_run(finished: Run, command: Command) -> None:
    alone = ["-c", str(CONFIGS / "nodecay.yaml"), "-c", str(CONFIGS / "tied_norm.yaml")]
    command("fit", *TINY, *alone, "--trainer.callbacks.run", str(finished.path), "--run_dir", "tied")
    found, target = (run.series("eval/weight_norm") for run in (Run(Path("tied")), finished))
    assert found.to_list() == pytest.approx(target.to_list(), rel=1e-5)


# ---------------------------------------------------------------------------------------------------- the task


def test_the_last_word_on_the_task_counts(tmp_path: Path) -> None:
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    a.write_text("task: operations\n")
    b.write_text("trainer: {max_steps: 3}\n")
    assert task_named(["fit"]) == "stories"
    assert task_named(["fit", "-c", str(a), "-c", str(b)]) == "operations"
    assert task_named(["fit", f"--config={a}", "--task", "markers"]) == "markers"
    assert task_named(["fit", "--task=markers", "--config", "task: operations\nseed_everything: 1\n"]) == "operations"
    assert task_named(["fit", "-c", str(tmp_path / "none.yaml"), "-c", "{: no yaml"]) == "stories"
    with pytest.raises(UserError, match=r"there is no task 'marker': did you mean markers\?"):
        task_named(["fit", "--task", "marker"])


@pytest.mark.parametrize("task", tasks())
def test_help_is_of_the_task(task: str, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command("fit", "--task", task, "--help")
    told = capsys.readouterr().out
    assert ("--data.operation " in told) == (task == "operations")
    assert ("--data.operations" in told) == (task == "multitask")
    assert ("--data.task.length" in told) == (task == "markers")
    assert ("--data.corpus" in told) == (task == "stories")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["fit", *TINY, "--data.operation", "div"], "--data.operation: expected one of 'add', 'sub'"),
        (["fit", *TINY, "--data.seed", "3"], 'must be given via "seed_everything"'),
        (["fit", *TINY, "--seed_everything", "true"], "error: --seed_everything: this task needs a number"),
        (["fit", *TINY, "--data.train_fraction", "1.5"], "--data.train_fraction=1.5"),
        (["fit", *TINY, "--task", "story"], "there is no task 'story': did you mean stories"),
        (["reheat", "--task", "operations"], "reheat is for stories, and this is the task operations"),
        (["fit", *TINY, "--model.optimizer.init_args.lr", "-1"], "the optimizer refuses its settings"),
        (["fit", *TINY, "--trainer.gradient_clip_algorithm", "value"], "this task clips the norm"),
    ],
)
def test_mistakes_are_one_line(mistake: Command, args: list[str], told: str) -> None:
    assert told in mistake(*args, "--run_dir", "mine")


def test_other_commands_refuse_such_a_run(finished: Run, mistake: Command) -> None:
    assert "replay reads runs of stories" in mistake("replay", str(finished.path))
    assert "predict is for stories" in mistake("predict", "--ckpt_path", str(finished.checkpoints[20]))
