"""What a user or a machine gets wrong: one line that names it and the remedy, true exit statuses, whole paths."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Command

from mini_gpt_pl import main as entry
from mini_gpt_pl.command_line import expanded, one_line_errors
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.training import cli as trainer_cli
from mini_gpt_pl.training.lock import LOCK

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "tests" / "tiny.yaml")
QUICK = ("fit", "-c", TINY, "--trainer.max_steps", "2")


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trainer_cli, "draw_all", lambda run: [])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")


def test_a_tilde_is_the_home_folder_everywhere(
    tmp_path: Path, command: Command, mistake: Command, monkeypatch: Any
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    assert expanded("--run_dir=~/a") == f"--run_dir={home}/a" and expanded("~/a") == f"{home}/a"
    assert expanded("a~b") == "a~b" and expanded("--x=a~") == "--x=a~"
    (tmp_path / "home.yaml").write_text("run_dir: ~/mine\n")
    command(*QUICK, "-c", "home.yaml")
    assert Run(home / "mine").outcome is not None
    assert "already holds a run" in mistake(*QUICK, "-c", "home.yaml")
    assert not (tmp_path / "~").exists()


def test_files_of_the_data_are_recorded_with_their_whole_path(tmp_path: Path, command: Command) -> None:
    lines = [f"Once upon a time number {i} went out to see what numbers do all day long." for i in range(60)]
    (tmp_path / "train.txt").write_text("\n".join(lines))
    options = (
        "--data.corpus.name",
        "files",
        "--data.corpus.train_files",
        "[train.txt]",
        "--data.corpus.train_rows",
        "null",
    )
    command(*QUICK, "--run_dir", "mine", "--data.cache_dir", "cache", *options)
    kept = yaml.safe_load((tmp_path / "mine" / "config.yaml").read_text())
    assert kept["data"]["corpus"]["train_files"] == [str(tmp_path / "train.txt")]
    assert kept["data"]["tokenizer"] == "builtin"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seed_everything", "-1"], "--seed_everything=-1: give a number from 0"),
        (["--trainer.accumulate_grad_batches", "0"], "--trainer.accumulate_grad_batches=0: give 1 or more"),
        (["--ckpt_path="], "--ckpt_path is empty"),
        (["-c", "latin.yaml"], "latin.yaml is no UTF-8 text"),
        (["-c", "empty.yaml"], "empty.yaml holds no options"),
    ],
)
def test_options_that_make_no_sense_are_one_line(options: list[str], words: str, mistake: Command) -> None:
    Path("latin.yaml").write_bytes(b"# caf\xe9\nseed_everything: 1\n")
    Path("empty.yaml").write_text("# nothing\n")
    assert words in mistake(*QUICK, "--run_dir", "mine", *options)
    assert not Path("mine").exists()


@pytest.mark.parametrize("options", [[], ["--trainer.max_steps", "3"], ["--run_dir=runs/a"]])
def test_a_bare_fit_names_what_can_be_trained(options: list[str], mistake: Command) -> None:
    assert "fit: say what is to be trained, as in -c quickstart" in mistake("fit", *options)
    assert list(Path.cwd().iterdir()) == []


def test_wandb_has_its_modes_and_names(mistake: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    logged = (*QUICK, "--run_dir", "mine", "-c", str(ROOT / "configs" / "logger" / "wandb_offline.yaml"))
    assert "W&B refuses the run" in mistake(*logged, "--trainer.logger.init_args.project", "a/b")
    monkeypatch.setenv("WANDB_MODE", "ofline")
    assert "WANDB_MODE=ofline: give online" in mistake(*logged, "--overwrite", "true")


def test_brackets_in_a_folders_name_are_text(command: Command) -> None:
    assert "runs/[/b]x/metrics.csv" in command(*QUICK, "--run_dir", "runs/[/b]x")


def test_a_cluster_that_is_not_there_is_refused(
    mistake: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "there is no Slurm here" in mistake("sweep", "beta2", "--root", "s", "--launcher", "slurm")


def test_the_folder_that_one_stands_in_can_be_imported_from(command: Command) -> None:
    Path("mine_here.py").write_text(
        "from lightning.pytorch import Callback\n"
        "from mini_gpt_pl.geometry.alignment import cosines\n"  # where it was in 0.1.0
        "class Turn(Callback):\n"
        "    def on_train_start(self, trainer, pl_module):\n"
        "        print('turned', cosines.__name__)\n"
    )
    assert "turned cosines" in command(*QUICK, "--run_dir", "r", "--trainer.callbacks+=mine_here.Turn")


def test_a_folder_is_trained_in_by_one_process_at_a_time(tmp_path: Path, mistake: Command, command: Command) -> None:
    """Refused while another process holds it, also with --overwrite; a lock that a killed one left holds nothing."""
    script = (
        "import sys, time; from pathlib import Path; from mini_gpt_pl.training.lock import hold; hold(Path('mine'))"
    )
    holder = [sys.executable, "-c", f"{script}; print('held', flush=True); time.sleep(100)"]
    with subprocess.Popen(holder, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        for more in ([], ["--overwrite", "true"]):
            assert "mine is being trained by another process" in mistake(*QUICK, "--run_dir", "mine", *more)
        other.kill()
    assert (tmp_path / "mine" / LOCK).exists()
    command(*QUICK, "--run_dir", "mine")
    assert Run(tmp_path / "mine").outcome is not None and not (tmp_path / "mine" / LOCK).exists()


def test_a_folder_is_importable_only_for_what_its_user_names(tmp_path: Path) -> None:
    """In a received folder, a module stands in for no package that is not installed."""
    (tmp_path / "turn.py").write_text("")
    (tmp_path / "lightning").mkdir()
    (tmp_path / "lightning" / "__init__.py").write_text("")
    (tmp_path / "config.py").write_text("")
    (tmp_path / "mine.yaml").write_text("trainer: {callbacks: [{class_path: turn.Turn}]}")
    named = (["--trainer.callbacks+=turn.Turn"], ["fit", "-c", "mine.yaml"])
    others: tuple[list[str], ...] = (
        ["fit", "-c", "config.yaml"],
        ["--trainer.callbacks=lightning.pytorch.callbacks.Timer"],
        ["a/turn.Turn"],
        [],
    )
    assert all(entry._names_a_module_here(args) for args in named)
    assert not any(entry._names_a_module_here(args) for args in others)


@pytest.mark.parametrize(("raised", "status"), [(KeyboardInterrupt, 130), (BrokenPipeError, 141)])
def test_interrupts_have_their_status(
    raised: type[BaseException], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise raised
    assert ended.value.code == status


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_training_that_is_told_to_end_says_how_to_go_on(tmp_path: Path, sent: signal.Signals, status: int) -> None:
    options = ("--trainer.max_steps", "100000", "--trainer.val_check_interval", "500", "--run_dir", "run")
    line = [sys.executable, "-m", "mini_gpt_pl", "fit", "-c", TINY, *options, "--data.cache_dir", "cache"]
    # A shell's background job ignores interrupts, and so would what it starts.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True, preexec_fn=heard
    ) as job:
        try:
            until = time.monotonic() + 120
            while not list(tmp_path.glob("run/checkpoints/*.ckpt")) and time.monotonic() < until:
                time.sleep(0.1)
            job.send_signal(sent)
            _, errors = job.communicate(timeout=60)
        finally:
            job.kill()
    assert job.returncode == status, errors
    assert "go on from step" in errors and "mini_gpt_pl fit --ckpt_path" in errors
