"""The command line: whole commands, what they leave behind, and one line for every mistake."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import wandb
import yaml
from conftest import SMALL, Command, normal
from jsonargparse import Namespace
from lightning.pytorch.loggers import WandbLogger
from safetensors.torch import load_file
from torch import Tensor

from mini_gpt_pl import main as cli
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.path.snapshots import SnapshotFolder
from mini_gpt_pl.geometry.vectors.selection import Vector
from mini_gpt_pl.runs.checkpoints import read_checkpoint
from mini_gpt_pl.runs.folder import Outcome, Run
from mini_gpt_pl.stories.data.datamodule import ProbedStories
from mini_gpt_pl.stories.data.probe import ProbeConfig
from mini_gpt_pl.training import cli as trainer_cli
from mini_gpt_pl.training.optimizers import ClippedCosine
from mini_gpt_pl.training.run_folder import direct_wandb

ROOT = Path(cli.__file__).resolve().parents[1]
TINY = str(ROOT / "tests" / "tiny.yaml")
OFFLINE = str(ROOT / "configs" / "logger" / "wandb_offline.yaml")
RECORDER = "[{class_path: mini_gpt_pl.callbacks.TrajectoryRecorder, init_args: {pattern: '%s'}}]"


def shell(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does, from some folder, without the caller's W&B settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *args],
        cwd=cwd,
        env={**kept, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Keep the builtin corpus out of the user's own cache."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: str) -> tuple[Run, subprocess.CompletedProcess[str]]:
    """One run for the whole module; a test that writes into it takes a copy (`parent`)."""
    folder = tmp_path_factory.mktemp("finished")
    options = ["-c", TINY, "-c", OFFLINE, "--run_dir", "tiny", "--data.cache_dir", cache]
    done = shell("fit", *options, cwd=folder)  # a relative run_dir
    assert done.returncode == 0, done.stderr
    return Run(folder / "tiny"), done


@pytest.fixture
def parent(finished: tuple[Run, object], tmp_path: Path) -> Run:
    """A copy of the run."""
    return Run(shutil.copytree(finished[0].path, tmp_path / "parent", symlinks=True))


@pytest.fixture(autouse=True)
def one_process_many_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Put back what a command changes in its process; work in a folder of the test's own."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(trainer_cli, "draw_all", lambda run: [])  # seconds; the whole command of `finished` draws them
    monkeypatch.chdir(tmp_path)


Reheated = tuple[Run, Run, str, list[dict[str, str]]]


def checkpoint(run: Run, step: int = 3) -> str:
    return str(run.checkpoints[step])


def weights(run: Run, step: int) -> dict[str, Tensor]:
    state: dict[str, Tensor] = read_checkpoint(checkpoint(run, step))["state_dict"]
    return state


def assert_same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def files(folder: Path) -> dict[str, str]:
    """Every file below a folder with its hash."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def trunk(state: dict[str, Tensor]) -> Tensor:
    """The recorded weights of a checkpoint as one vector in float64, block by block as they lie in the model."""
    pattern = r"blocks\.\d+\.(attn\.(qkv|out_proj)|mlp\.(w_up|w_down))\.weight"
    return torch.cat([state[name].double().flatten() for name in state if re.search(pattern, name)])


# ---------------------------------------------------------------------------------------------------- fit


def test_fit_leaves_a_whole_run_behind(finished: tuple[Run, object]) -> None:
    run = finished[0]
    assert list(run.checkpoints) == [3, 6]
    assert sorted(file.name for file in run.snapshot_folder.iterdir()) == [
        f"step_{step:09d}.safetensors" for step in (0, 2, 4, 6)
    ]
    assert run.trajectory.steps == [0, 2, 4, 6]
    assert set(run.series("val/loss").index) == {3, 6}
    figures = sorted((run.path / "figures").iterdir())
    assert [file.name for file in figures] == [
        "alignment.png",
        "backbone.png",
        "growth.png",
        "learning.png",
        "spectrum.png",
    ]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in figures)
    assert len(list((run.path / "wandb").glob("offline-run-*"))) == 1


def test_fit_closes_with_its_table_and_paths(finished: tuple[Run, subprocess.CompletedProcess[str]]) -> None:
    run, done = finished
    for told in ("validation loss", "p_ood", "PC1, unit rows", "decaying walk", "cos(v_b, theta_0)"):
        assert told in done.stdout
    assert f"{run.last('val/loss'):.3f}" in done.stdout
    for product in ("config.yaml", "metrics.csv", "checkpoints/", "snapshots/", "trajectory.safetensors", "wandb/"):
        assert f"tiny/{product}" in done.stdout
    assert done.stdout.rstrip().endswith("tiny/figures/growth.png")


def test_fit_says_nothing_beside_the_point(finished: tuple[Run, subprocess.CompletedProcess[str]]) -> None:
    told = finished[1].stdout + finished[1].stderr
    for noise in ("Traceback", "litlogger", "LeafSpec", "wandb sync", "View run"):
        assert noise not in told


@pytest.mark.parametrize(
    ("message", "kept"),
    [
        ("💡 Tip: try [litlogger](https://example.org/) now", False),
        ("Tip: your loss is not finite", True),
        ("GPU available: False", True),
    ],
)
def test_only_the_advertisement_is_dropped(message: str, kept: bool) -> None:
    assert trainer_cli._no_advertisement(logging.LogRecord("l", logging.INFO, "f", 1, message, (), None)) == kept


def test_the_kept_configuration_repeats_the_run(finished: tuple[Run, object], command: Command) -> None:
    run = finished[0]
    command("fit", "--config", str(run.path / "config.yaml"), "--run_dir", "again", "--trainer.logger", "false")
    again = Run(Path("again"))
    assert_same_weights(weights(again, 6), weights(run, 6))
    assert torch.equal(again.trajectory.grams, run.trajectory.grams)
    kept, kept_again = dict(run.config), dict(again.config)
    for config in (kept, kept_again):
        config.pop("run_dir")
        config["trainer"] = {
            key: value for key, value in config["trainer"].items() if key not in ("logger", "default_root_dir")
        }
    assert kept == kept_again


def test_the_kept_configuration_is_whole(finished: tuple[Run, object]) -> None:
    config = finished[0].config
    assert config["seed_everything"] == 7
    assert config["data"]["probe"]["codeword_seed"] == 42  # a default that nobody named
    assert config["model"]["optimizer"]["init_args"]["eps"] == 1e-8
    assert config["trainer"]["gradient_clip_val"] == 1.0
    arguments = config["trainer"]["logger"]["init_args"]
    assert (arguments["id"], arguments["save_dir"]) == (None, ".")  # of the segment, not of the configuration


# --------------------------------------------------------------------------------------- composing, help


def resolved(command: Command, capsys: pytest.CaptureFixture[str], *args: str) -> Any:
    with pytest.raises(SystemExit) as caught:
        command(*args, "--print_config")
    assert not caught.value.code
    return yaml.safe_load(capsys.readouterr().out)


def test_later_configs_win_and_options_win_over_them(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    Path("b.yaml").write_text("model: {optimizer: {init_args: {lr: 0.5}}}\ndata: {context: 99, batch_size: 3}\n")
    options = ("-c", TINY, "-c", "b.yaml", "--data.context", "77")
    config = resolved(command, capsys, "fit", *options)
    assert config["data"]["context"] == 77
    assert config["data"]["batch_size"] == 3
    assert config["model"]["optimizer"]["init_args"]["lr"] == 0.5
    assert config["model"]["optimizer"]["init_args"]["betas"] == [0.9, 0.95]
    config = resolved(command, capsys, "fit", *options, "--model.optimizer.init_args.lr", "0.25")
    assert config["model"]["optimizer"]["init_args"]["lr"] == 0.25


def test_any_optimizer_goes(command: Command, cache: str) -> None:
    sgd = ("--model.optimizer", "torch.optim.SGD", "--model.optimizer.init_args.lr", "0.01")
    stopped = ("--trainer.max_steps", "3", "--run_dir", "sgd", "--data.cache_dir", cache)
    command("fit", "-c", TINY, *sgd, *stopped)
    state = read_checkpoint(checkpoint(Run(Path("sgd"))))["optimizer_states"][0]
    assert "momentum" in state["param_groups"][0]
    assert state["param_groups"][0]["initial_lr"] == 0.01


def test_reheat_prints_the_configuration_of_its_parent(
    finished: tuple[Run, object], command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished[0]
    config = resolved(command, capsys, "reheat", "--ckpt_path", checkpoint(run), "--steps", "5")
    assert config["data"]["context"] == 64
    assert config["steps"] == 5
    assert Path(str(config["run_dir"])) == (run.path / "reheat" / "000003").resolve()


def test_help_explains_the_fields(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command("fit", "--help")
    assert not caught.value.code
    told = " ".join(capsys.readouterr().out.split())
    for docs in ("runs with different training seeds share their codewords", "Weight from the switch on", "run_dir"):
        assert docs in told


# ------------------------------------------------------------------------------- validate, test, predict


@pytest.mark.parametrize("name", ["validate", "test"])
def test_evaluation_repeats_the_runs_own_numbers_and_writes_nothing(
    finished: tuple[Run, object], command: Command, name: str
) -> None:
    run = finished[0]
    before = files(run.path)
    told = dict(line.split() for line in command(name, "--ckpt_path", checkpoint(run)).splitlines() if "/" in line)
    for metric in ("val/loss", "probe/p_in", "probe/p_ood", "probe/nll_ood"):
        assert float(told[metric]) == pytest.approx(run.series(metric)[3], abs=6e-5)
    assert files(run.path) == before
    assert list(Path.cwd().iterdir()) == []


def test_predict_goes_on_from_the_prompt(finished: tuple[Run, object], command: Command) -> None:
    run = finished[0]
    before = files(run.path)
    options = ("--ckpt_path", checkpoint(run), "--prompt", "Lily had a red ball", "--max_new_tokens", "6")
    told = command("predict", *options)
    assert told.startswith("Lily had a red ball")
    assert len(told.strip()) > len("Lily had a red ball")
    assert command("predict", *options) == told
    assert files(run.path) == before


# -------------------------------------------------------------------------------------------------- resume


def test_a_resumed_run_ends_as_if_it_had_never_stopped(
    finished: tuple[Run, object], parent: Run, command: Command
) -> None:
    whole = finished[0]
    Path("elsewhere").mkdir()
    os.chdir("elsewhere")
    command("fit", "--ckpt_path", f"../parent/checkpoints/{Path(checkpoint(parent)).name}")
    resumed = Run(parent.path)
    assert checkpoint(resumed, 6) != checkpoint(whole, 6)  # the first one stays beside it
    assert_same_weights(weights(resumed, 6), weights(whole, 6))
    assert torch.equal(resumed.trajectory.grams, whole.trajectory.grams)
    assert resumed.trajectory.steps == whole.trajectory.steps
    pd.testing.assert_frame_equal(resumed.metrics, whole.metrics, check_exact=True)
    assert list(Path.cwd().iterdir()) == []


def test_the_command_line_wins_over_the_checkpoint(parent: Run, command: Command) -> None:
    overrides = ("--model.optimizer.init_args.lr", "0.5", "--trainer.max_steps", "5", "--trainer.logger", "false")
    command("fit", "--ckpt_path", checkpoint(parent), *overrides)
    run = Run(parent.path)
    assert run.metrics.index.max() == 5
    rates = run.series("train/lr")
    assert rates[3] < 0.01
    assert rates[4] == pytest.approx(0.5 * (1 + np.cos(np.pi / 2)) / 2)  # warmup 2, total 6
    assert run.config["trainer"]["max_steps"] == 5


def test_a_finished_run_is_left_alone_and_says_so(
    parent: Run, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    command("fit", "--ckpt_path", checkpoint(parent))
    before = files(parent.path)
    with pytest.raises(SystemExit) as ended:
        command("fit", "--ckpt_path", checkpoint(parent, 6))
    assert ended.value.code == 0 and "is finished, at step 6: nothing was changed" in capsys.readouterr().out
    assert files(parent.path) == before
    command("fit", "--ckpt_path", checkpoint(parent, 6), "--trainer.max_steps", "7")
    assert Run(parent.path).outcome == Outcome("finished", 7)


def test_a_refused_resume_leaves_the_run_as_it_was(parent: Run, mistake: Command) -> None:
    (parent.snapshot_folder / "step_000000002.safetensors").unlink()
    before = files(parent.path)
    assert "snapshot of step 2" in mistake("fit", "--ckpt_path", checkpoint(parent), "--trainer.logger", "false")
    assert files(parent.path) == before


# -------------------------------------------------------------------------------------------------- reheat


@pytest.fixture(scope="module")
def reheated(finished: tuple[Run, object], tmp_path_factory: pytest.TempPathFactory) -> Reheated:
    """A parent, its reheated run, what was printed, and the parent's files before and after."""
    parent = Run(shutil.copytree(finished[0].path, tmp_path_factory.mktemp("hot") / "parent", symlinks=True))
    before = files(parent.path)
    options = ["--steps", "3", "--lr", "0.01", "--warmup", "1", "--probe_weight", "7", "--eval_every", "1"]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(trainer_cli, "draw_all", lambda run: [])
        patch.setattr(
            sys, "argv", ["", "reheat", "--ckpt_path", checkpoint(parent), "--trainer.logger", "false", *options]
        )
        cli.main()
    return parent, Run(parent.path / "reheat" / "000003"), printed.getvalue(), [before, files(parent.path)]


def test_a_reheat_writes_into_a_folder_of_its_own(reheated: Reheated) -> None:
    before, after = reheated[3]
    assert {name: after[name] for name in before} == before  # nothing of the parent's has changed
    assert after.keys() - before.keys()
    assert all(name.startswith("reheat/000003/") for name in after.keys() - before.keys())


def test_reheat_follows_its_options(reheated: Reheated) -> None:
    run = reheated[1]
    assert list(run.series("probe/p_ood").index) == [0, 1, 2, 3]
    assert set(run.series("train/probe_weight")) == {7.0}
    assert run.series("train/lr")[1] == pytest.approx(0.01)
    assert run.config["steps"] == 3


def test_the_gain_is_over_the_checkpoint_itself(reheated: Reheated) -> None:
    parent, run, told, _ = reheated
    found = json.loads((run.path / "reheat.json").read_text())
    accuracy = run.series("probe/p_ood")
    assert found["p0"] == accuracy[0] == parent.series("probe/p_ood")[3]
    assert found["gain"] == accuracy.max() - accuracy[0]
    assert f"re-entry gain G = {found['gain']:+.3f}" in told


def test_places_are_those_in_the_parents_basis(reheated: Reheated) -> None:
    """The basis of snapshots 0 and 2 is one line: theta_2 - theta_0."""
    parent, run, told, _ = reheated
    found = json.loads((run.path / "reheat.json").read_text())
    start = trunk(weights(parent, 3))
    rows = [load_file(parent.snapshot_folder / f"step_{step:09d}.safetensors") for step in (0, 2)]
    theta0, moved = (trunk({name: row[name] for name in weights(parent, 3) if name in row}) for row in rows)
    v = moved / moved.norm()
    for when, place in (("before", start), ("after", trunk(weights(run, 3)))):
        drift = place - theta0
        a = float(drift @ v)
        assert found[f"coordinate_{when}"] == pytest.approx(a, rel=1e-5)
        assert found[f"residual_{when}"] == pytest.approx(float((drift - a * v).norm()), rel=1e-5)
    assert f"a {found['coordinate_before']:.2f} -> {found['coordinate_after']:.2f}" in told


def test_a_checkpoint_apart_from_its_run_still_gives_the_gain(
    finished: tuple[Run, object], command: Command, cache: str
) -> None:
    shutil.copy(checkpoint(finished[0]), "alone.ckpt")
    options = ("-c", TINY, "--data.cache_dir", cache, "--run_dir", "hot", "--steps", "2", "--eval_every", "1")
    with pytest.warns(UserWarning, match="no parent run"):
        told = command("reheat", *options, "--ckpt_path", "alone.ckpt")
    found = json.loads(Path("hot/reheat.json").read_text())
    assert (found["parent"], found["parent_step"]) == ("../alone.ckpt", 3)
    assert not {"coordinate_before", "along", "recovery"} & found.keys()
    assert "re-entry gain" in told
    assert "basis" not in told


def test_a_checkpoint_before_the_first_step_of_the_path_has_no_basis(parent: Run, command: Command) -> None:
    trajectory = parent.trajectory.until(0)
    trajectory.save(parent.path / "trajectory.safetensors")
    with pytest.warns(UserWarning, match="no path before step 3"):
        told = command("reheat", "--ckpt_path", checkpoint(parent), "--steps", "1", "--trainer.logger", "false")
    assert "re-entry gain" in told


def test_without_reheating_a_reheat_is_its_parents_own_continuation(parent: Run, command: Command) -> None:
    control = ["--factor", "1", "--moments", "kept", "--data_order", "continue", "--probe_weight", "null"]
    options = ["--steps", "3", "--eval_every", "3", "--trainer.logger", "false", "--run_dir", "control"]
    command("reheat", "--ckpt_path", checkpoint(parent), *control, *options)
    assert_same_weights(weights(Run(Path("control")), 3), weights(parent, 6))
    for name in ("train/loss", "train/lr", "train/probe_weight"):
        assert Run(Path("control")).series(name).tolist() == parent.series(name).loc[4:].tolist()


@pytest.mark.parametrize(
    "change", [("--factor", "2"), ("--moments", "zeroed"), ("--data_order", "restart"), ("--probe_weight", "9")]
)
def test_each_setting_of_the_control_matters(parent: Run, command: Command, change: tuple[str, str]) -> None:
    control = {"--factor": "1", "--moments": "kept", "--data_order": "continue", "--probe_weight": "null"}
    options = [word for pair in {**control, change[0]: change[1]}.items() for word in pair]
    command(
        "reheat", "--ckpt_path", checkpoint(parent), *options, "--steps", "3", "--trainer.logger", "false",
        "--run_dir", "other",
    )  # fmt: skip
    theirs, ours = weights(parent, 6), weights(Run(Path("other")), 3)
    assert any(not torch.equal(theirs[name], ours[name]) for name in theirs)


def test_moments_of_another_optimizer_are_not_kept(parent: Run, mistake: Command) -> None:
    options = ["--moments", "kept", "--model.optimizer", "torch.optim.SGD", "--run_dir", "other"]
    assert "of another form" in mistake("reheat", "--ckpt_path", checkpoint(parent), *options)
    assert not Run(Path("other")).exists


def test_the_optimizer_that_nobody_chose_is_in_the_configuration(command: Command, cache: str) -> None:
    config = yaml.safe_load(Path(TINY).read_text())
    del config["model"]["optimizer"]
    Path("plain.yaml").write_text(yaml.safe_dump(config))
    command("fit", "-c", "plain.yaml", "--data.cache_dir", cache, "--run_dir", "plain", "--trainer.max_steps", "3")
    run = Run(Path("plain"))
    assert run.config["model"]["optimizer"]["class_path"] == "torch.optim.AdamW"
    assert set(run.series("train/lr")) == {1e-3 * ClippedCosine(2, 6, 0.1)(t) for t in (1, 2, 3)}
    assert "val/loss" in command("validate", "--ckpt_path", checkpoint(run))


def test_a_reheat_says_where_it_comes_from(reheated: Reheated) -> None:
    parent, run, _, _ = reheated
    found = run.lineage
    assert found is not None
    assert (found["parent"], found["parent_step"], found["basis_step"]) == (str(parent.path), 3, 2)
    assert found["basis_fingerprint"] == parent.trajectory.fingerprint
    assert (found["moments"], found["data_order"], found["factor"]) == ("zeroed", "restart", None)
    assert found["along"] == run.series("reheat/along").iloc[-1]


def test_a_reheat_that_broke_off_goes_on_by_itself(parent: Run, command: Command) -> None:
    options = ["--steps", "5", "--lr", "0.01", "--warmup", "1", "--eval_every", "1", "--trainer.logger", "false"]
    command("reheat", "--ckpt_path", checkpoint(parent), *options, "--run_dir", "whole")
    whole, again = Run(Path("whole")), Run(Path(shutil.copytree("whole", "again")))
    for product in ("outcome.json", "reheat.json"):
        (again.path / product).unlink()
    command("fit", "--ckpt_path", str(again.path / "checkpoints" / "000003.ckpt"))
    assert whole.outcome == again.outcome == Outcome("finished", 5)
    assert again.lineage == whole.lineage
    for name in ("probe/p_ood", "reheat/across", "train/loss", "train/lr"):
        assert again.series(name).tolist() == whole.series(name).tolist()


@pytest.mark.parametrize(
    ("option", "value", "needed"), [("factor", "1", "--lr"), ("probe_weight", "null", "give --pro")]
)
def test_what_a_reheat_made_is_not_continued(
    reheated: Reheated, mistake: Command, option: str, value: str, needed: str
) -> None:
    told = mistake("reheat", "--ckpt_path", checkpoint(reheated[1]), f"--{option}", value, "--run_dir", "twice")
    assert "itself a reheated run" in told and needed in told


# ------------------------------------------------------------------------------------------ run folders


def test_a_run_is_not_lost_by_mistake(parent: Run, mistake: Command, cache: str) -> None:
    before = files(parent.path)
    told = mistake("fit", "-c", TINY, "--data.cache_dir", cache, "--run_dir", str(parent.path))
    assert f"--ckpt_path {checkpoint(parent, 6)}" in told
    assert "--overwrite true" in told
    assert files(parent.path) == before


def test_overwriting_removes_the_products_and_nothing_else(parent: Run, command: Command, cache: str) -> None:
    (parent.path / "notes.txt").write_text("mine")
    (parent.path / "reheat" / "000003").mkdir(parents=True)
    (parent.path / "reheat" / "000003" / "metrics.csv").write_text("step\n")
    (parent.path / "figures" / "old.png").touch()
    (parent.path / "checkpoints" / "old.ckpt").touch()
    (parent.path / "reheat.json").touch()
    short = ("--trainer.max_steps", "2", "--run_dir", str(parent.path), "--overwrite", "true")
    command("fit", "-c", TINY, "--data.cache_dir", cache, *short)
    left = set(files(parent.path))
    assert {"notes.txt", "reheat/000003/metrics.csv"} <= left
    assert not {"figures/old.png", "checkpoints/old.ckpt", "reheat.json"} & left
    assert not [name for name in left if name.startswith(("wandb/", "checkpoints/"))]  # this run has none
    assert sorted(name for name in left if name.startswith("snapshots/")) == [
        f"snapshots/step_{step:09d}.safetensors" for step in (0, 2)
    ]


def test_a_mistake_does_not_cost_the_run_that_was_to_be_replaced(parent: Run, mistake: Command) -> None:
    before = files(parent.path)
    mistake("fit", "-c", TINY, "--run_dir", str(parent.path), "--overwrite", "true", "--data.tokenizer", "bogus")
    mistake("fit", "-c", TINY, "--run_dir", str(parent.path), "--overwrite", "true", "--trainer.accelerator", "bogus")
    assert files(parent.path) == before


def test_the_checkpoints_own_run_is_never_overwritten(parent: Run, mistake: Command) -> None:
    before = files(parent.path)
    options = ("--ckpt_path", checkpoint(parent), "--run_dir", str(parent.path), "--overwrite", "true")
    assert "--run_dir" in mistake("reheat", *options)
    assert "its own folder" in mistake("fit", "--ckpt_path", checkpoint(parent), "--run_dir", "other")
    assert files(parent.path) == before


@pytest.mark.parametrize(
    ("callback", "settings", "told"),
    [
        ("mini_gpt_pl.callbacks.CommutatorProbe", {"samples": 0}, "samples 0"),
        ("mini_gpt_pl.callbacks.TrajectoryRecorder", {"pattern": "w", "sketch": 0}, "sketch"),
        ("mini_gpt_pl.callbacks.SubspaceIntervention", {"parallel": 0.0}, "needs a basis"),
        ("mini_gpt_pl.callbacks.Kick", {"length": -1.0}, "give one above 0"),
        ("mini_gpt_pl.arithmetic.milestones.Evaluation", {"stop_at": "foo"}, "no milestone 'foo'"),
        ("mini_gpt_pl.arithmetic.tied_norm.TiedNorm", {"run": "nowhere"}, "nowhere"),
    ],
)
def test_what_a_callback_says_of_its_settings_is_one_line(
    callback: str, settings: dict[str, Any], told: str, mistake: Command
) -> None:
    file = Path("callback.yaml")
    file.write_text(yaml.safe_dump({"trainer": {"callbacks+": [{"class_path": callback, "init_args": settings}]}}))
    assert told in mistake("fit", "-c", TINY, "-c", str(file))


def test_a_folder_that_cannot_be_one(mistake: Command) -> None:
    Path("file").touch()
    assert "cannot be a run folder" in mistake("fit", "-c", TINY, "--run_dir", "file")


# --------------------------------------------------------------------------------------------------- W&B


def in_process(monkeypatch: pytest.MonkeyPatch, *args: str) -> trainer_cli.ProbedCLI:
    """Run a command and return it, for what it does not print."""
    monkeypatch.setattr(sys, "argv", ["mini_gpt_pl"])
    return trainer_cli.run_cli(trainer_cli.with_run_config(args))


def test_an_offline_resume_is_a_new_segment_in_the_group_of_the_first(
    parent: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read_checkpoint(checkpoint(parent, 6))["callbacks"]["WandbSegments"]
    assert first["run_id"] == first["group"] != ""
    (offline,) = (parent.path / "wandb").glob("offline-run-*")
    assert offline.name.endswith(first["run_id"])
    done = in_process(monkeypatch, "fit", "--ckpt_path", checkpoint(parent))
    second = read_checkpoint(checkpoint(Run(parent.path), 6))["callbacks"]["WandbSegments"]
    assert second["group"] == first["group"]
    assert second["run_id"] != first["run_id"]
    assert len(list((parent.path / "wandb").glob("offline-run-*"))) == 2
    (logger,) = (x for x in done.trainer.loggers if isinstance(x, WandbLogger))
    assert logger._wandb_init["group"] == first["group"]
    kept = Run(parent.path).config["trainer"]["logger"]
    assert "group" not in (kept.get("dict_kwargs") or {})  # or every later run from this configuration would join


def test_a_reheat_names_its_parent(parent: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read_checkpoint(checkpoint(parent))["callbacks"]["WandbSegments"]
    done = in_process(monkeypatch, "reheat", "--ckpt_path", checkpoint(parent), "--steps", "1")
    (logger,) = (x for x in done.trainer.loggers if isinstance(x, WandbLogger))
    assert logger._wandb_init["group"] == first["group"]
    assert logger._wandb_init["job_type"] == "reheat"
    assert logger._wandb_init["config"]["parent_run"] == first["run_id"]
    assert len(list((parent.path / "reheat" / "000003" / "wandb").glob("offline-run-*"))) == 1


def test_two_runs_of_one_process_are_two(command: Command, cache: str) -> None:
    short = ("-c", TINY, "-c", OFFLINE, "--data.cache_dir", cache, "--trainer.max_steps", "1", "--run_dir", "twice")
    command("fit", *short)
    (first,) = Path("twice/wandb").glob("offline-run-*")
    command("fit", *short, "--overwrite", "true")
    (second,) = Path("twice/wandb").glob("offline-run-*")
    assert first != second


def test_a_run_that_failed_is_not_logged_into(mistake: Command, cache: str) -> None:
    options = ("-c", TINY, "-c", OFFLINE, "--data.cache_dir", cache, "--run_dir", "failed")
    mistake("fit", *options, "--trainer.callbacks", RECORDER % "nothing")
    assert list(Path("failed/wandb").glob("offline-run-*"))
    assert wandb.run is None


def test_disabled_means_disabled(command: Command, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    options = ("-c", TINY, "-c", OFFLINE, "--data.cache_dir", cache, "--trainer.max_steps", "1", "--run_dir", "off")
    command("fit", *options)
    assert not list(Path("off").rglob("offline-run-*"))
    assert Run(Path("off")).metrics.index.max() == 1


def test_the_environment_wins_over_the_configured_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    for mode, offline in (("offline", True), ("dryrun", True), ("online", False), ("disabled", False)):
        monkeypatch.setenv("WANDB_MODE", mode)
        logger = Namespace(class_path="x.WandbLogger", init_args=Namespace(offline=not offline))
        config = Namespace(trainer=Namespace(logger=logger), ckpt_path=None)
        direct_wandb(config, Run(Path("run")), None, None)
        assert logger.init_args.offline == offline
        assert logger.init_args.save_dir == "run"


def test_online_a_resumed_run_goes_on_under_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    state = {"callbacks": {"WandbSegments": {"run_id": "two", "group": "one"}}}
    for name, resume, wanted in (("fit", None, "two"), ("reheat", None, None), ("reheat", "y", "two")):
        logger = Namespace(class_path="x.WandbLogger", init_args=Namespace(offline=True, id=None))
        config = Namespace(trainer=Namespace(logger=[logger]), ckpt_path="x", resume=resume)
        direct_wandb(config, Run(Path("run")), None if name == "fit" else name, state)
        assert logger.init_args.id == wanted
        assert logger.dict_kwargs["group"] == "one"


# --------------------------------------------------------------------------------- mistakes: the options


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["fitt"], r"no command 'fitt': did you mean fit\?.*mini_gpt_pl --help"),
        (["fit", "--model.schedule.warmupp", "1"], r"schedule\.warmupp.*did you mean --model\.schedule\.warmup\?"),
        (["fit", "--model.optimizer", "torch.optim.Bogus"], r"--model\.optimizer: module 'torch\.optim' .*'Bogus'"),
        (["fit", "--model.optimizer", "torch.nn.Linear"], r"--model\.optimizer: .*subclass of Optimizer"),
        (["fit", "--model.optimizer.init_args.lr", "abc"], r"--model\.optimizer: lr: expected float; Given value: abc"),
        (["fit", "--data.batch_size", "x"], r"--data\.batch_size: expected int.*x; see mini_gpt_pl fit --help"),
        (["fit", "--model.size", "52m"], r"--model\.size: expected one of 'quickstart', '16m', '51m'; .*52m"),
        (["fit", "-c", "nope.yaml"], r"--config: File does not exist.*nope\.yaml"),
        (["fit", "-c", "broken.yaml"], "parsing config"),
        (["fit", "-c", "typo.yaml"], r"'model\.sizee'; did you mean --model\.size\?"),
        (["fit", "--trainer.accelerator", "bogus"], "accelerator.*bogus.*--trainer"),
        (["fit", "--trainer.callbacks", "[{class_path: torch.Bogus}]"], r"trainer\.callbacks: .*torch\.Bogus"),
        (["validate"], "needs a checkpoint: give --ckpt_path"),
        (["reheat"], "needs a checkpoint: give --ckpt_path"),
        (["fit", "--data.probe.p_probe", "2"], r"--data\.probe\.p_probe=2"),
        (["fit", "--data.probe.n_codewords", "100000"], "100,?000"),
        (["fit", "--data.tokenizer", "bogus"], "tokenizer 'bogus'.*--data.tokenizer="),
        (["fit", "--data.tokenizer", "missing.tiktoken"], r"missing\.tiktoken"),
    ],
)  # fmt: skip
def test_options_that_cannot_be(mistake: Command, options: list[str], told: str) -> None:
    Path("broken.yaml").write_text("model: [1\n")
    Path("typo.yaml").write_text("model: {sizee: 16m}\n")
    base = ["-c", TINY] if options[0] == "fit" else []
    line = mistake(options[0], *base, *options[1:])
    assert re.search(told, line), line
    assert len(line) < 400


def test_a_name_without_network_asks_for_a_file(mistake: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str) -> None:
        raise ConnectionError(f"no route to {name}")

    monkeypatch.setattr("tiktoken.get_encoding", unreachable)
    assert "cannot be downloaded; give a rank file" in mistake("fit", "-c", TINY, "--data.tokenizer", "gpt2")


def test_a_short_context_names_the_longest_gap_that_fits(mistake: Command) -> None:
    line = mistake("fit", "-c", TINY, "--data.context", "40", "--data.probe.ood_gap", "[100, 200]")
    found = re.search(r"longest gap that fits is (\d+)", line)
    assert found
    fits = int(found[1])
    ProbedStories(context=40, probe=ProbeConfig(n_codewords=16, train_gap=(2, 8), ood_gap=(fits, fits)))
    with pytest.raises(UserError, match="too short"):
        ProbedStories(context=40, probe=ProbeConfig(n_codewords=16, train_gap=(2, 8), ood_gap=(fits + 1, fits + 1)))


# ------------------------------------------------------------------------------ mistakes: inside training


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--data.corpus.train_rows", "2"], "2 training stories.*4 are needed"),
        (["--data.corpus.name", "files", "--data.corpus.train_files", "[missing.txt]"], r"no file missing\.txt"),
        (["--data.corpus.name", "files", "--data.corpus.train_files", "[empty.txt]"], r"empty\.txt is empty"),
        (["--data.corpus.name", "files"], "needs --data.corpus.train_files"),
        (["--trainer.callbacks", RECORDER % "nothing"], "'nothing' selects no parameter.*gpt.tok_emb.weight"),
        (["--trainer.callbacks", RECORDER % "(x"], "is no regular expression"),
        (["--trainer.callbacks", "[{class_path: callbacks.GradientAlignment}]"], "needs a TrajectoryRecorder"),
    ],
)  # fmt: skip
def test_what_only_shows_in_training_leaves_no_run(mistake: Command, cache: str, options: list[str], told: str) -> None:
    Path("empty.txt").touch()
    line = mistake("fit", "-c", TINY, "--data.cache_dir", cache, "--run_dir", "run", *options)
    assert re.search(told, line), line
    assert not Run(Path("run")).exists  # so that the next attempt is not refused


def test_a_mistake_in_a_shell_shows_one_line_last(tmp_path: Path, cache: str) -> None:
    options = ("--data.cache_dir", cache, "--trainer.callbacks", RECORDER % "nothing")
    done = shell("fit", "-c", TINY, "--run_dir", "run", *options, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("mini_gpt_pl: error: the weight pattern 'nothing' selects no")


# --------------------------------------------------------------------------------- mistakes: checkpoints


@pytest.mark.parametrize("name", ["fit", "validate", "predict", "reheat"])
@pytest.mark.parametrize("kind", ["missing", "cut short", "text", "other"])
def test_checkpoints_that_are_none(finished: tuple[Run, object], mistake: Command, name: str, kind: str) -> None:
    path = Path("bad.ckpt")
    if kind == "cut short":
        whole = Path(checkpoint(finished[0])).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "text":
        path.write_text("no checkpoint at all\n")
    elif kind == "other":
        torch.save({"weights": torch.zeros(2)}, path)
    told = {"missing": "no checkpoint at", "other": "no Lightning checkpoint"}.get(kind, "cannot be read")
    line = mistake(name, "-c", TINY, "--run_dir", "run", "--ckpt_path", str(path))
    assert told in line
    assert "bad.ckpt" in line
    assert not Path("run").exists()


@pytest.mark.parametrize("name", ["fit", "validate", "reheat"])
def test_another_tokenizer_is_not_the_checkpoints(parent: Run, mistake: Command, name: str) -> None:
    ranks = resources.files("mini_gpt_pl.stories.data") / "assets" / "builtin.tiktoken"
    Path("fewer.tiktoken").write_bytes(b"".join(ranks.read_bytes().splitlines(keepends=True)[:-5]))
    before = files(parent.path)
    options = ("--data.tokenizer", "fewer.tiktoken", "--trainer.logger", "false")
    line = mistake(name, "--ckpt_path", checkpoint(parent), *options)
    assert re.search(r"vocab_size \d+, the configured one \d+: use the tokenizer", line)
    assert files(parent.path) == before


@pytest.mark.parametrize("name", ["fit", "validate", "reheat"])
def test_another_size_is_not_the_checkpoints(parent: Run, mistake: Command, name: str) -> None:
    options = ("--model.size.n_layer", "3", "--trainer.logger", "false")
    assert "n_layer 2, the configured one 3" in mistake(name, "--ckpt_path", checkpoint(parent), *options)


@pytest.mark.parametrize(
    ("file", "damage", "told"),
    [
        ("trajectory.safetensors", None, r"no trajectory \(Gram\) file"),
        ("trajectory.safetensors", b"damaged", r"trajectory \(Gram\) file .* cannot be read"),
        ("snapshots/step_000000002.safetensors", None, "no snapshot of step 2 at"),
        ("snapshots/step_000000002.safetensors", b"damaged", "snapshot of step 2 .* cannot be read"),
    ],
)
def test_a_damaged_basis_is_not_reheated_against(
    parent: Run, mistake: Command, file: str, damage: bytes | None, told: str
) -> None:
    path = parent.path / file
    path.unlink()
    if damage is not None:
        path.write_bytes(damage)
    line = mistake("reheat", "--ckpt_path", checkpoint(parent), "--trainer.logger", "false")
    assert re.search(told, line), line


def test_snapshots_of_another_model_are_refused(parent: Run, mistake: Command) -> None:
    folder = SnapshotFolder(parent.snapshot_folder, SMALL)
    folder.write(0, Vector(normal(SMALL.dim).float(), SMALL))
    folder.close()
    line = mistake("reheat", "--ckpt_path", checkpoint(parent), "--trainer.logger", "false")
    assert "step_000000000.safetensors belongs to another model" in line


@pytest.mark.parametrize("options", [["--steps", "0"], ["--eval_every", "0"], ["--lr", "-1"], ["--warmup", "-1"]])
def test_reheat_settings_that_cannot_be(finished: tuple[Run, object], mistake: Command, options: list[str]) -> None:
    path = checkpoint(finished[0])
    mistake("reheat", "--ckpt_path", path, "--run_dir", "hot", "--trainer.logger", "false", *options)
    assert not Run(Path("hot")).exists


def test_an_empty_prompt_has_no_continuation(finished: tuple[Run, object], mistake: Command) -> None:
    assert "--prompt" in mistake("predict", "--ckpt_path", checkpoint(finished[0]), "--prompt", "")


def test_a_damaged_run_configuration_is_named(parent: Run, mistake: Command) -> None:
    (parent.path / "config.yaml").write_text("")
    assert "config.yaml holds no options" in mistake("validate", "--ckpt_path", checkpoint(parent))


def test_help_imports_nothing_that_takes_seconds() -> None:
    code = "import sys, cli; sys.argv = ['cli', '--help']; cli.main(); print({'torch', 'lightning'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert told.rstrip().endswith("set()")
    for command in ("fit", "reheat", "sweep", "explain", "dashboard"):
        assert f"\n  {command} " in told


@pytest.mark.parametrize(
    ("given", "answer"),
    [([], "give a command: fit, validate"), (["reprot"], "did you mean report?"), (["x"], "there is fit, validate")],
)
def test_no_command_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: list[str], answer: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["cli", *given])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr().err
    assert ended.value.code == 2 and answer in told and told.count("\n") == 1
