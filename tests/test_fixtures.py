"""Run folders of version 0.1.0 open with every command, and go on where they were left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "tests" / "fixtures" / "0.1.0"
TASKS = ("stories", "operations")
EVALUATED = {"stories": 12, "operations": 40}  # the last step, which is a checkpoint and an evaluation
RESUMED = {"stories": (6, 12, 16), "operations": (20, 40, 60)}  # from, by way of, to


def mini_gpt_pl(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does, where nothing has been imported yet."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "WANDB_MODE": "offline", "NO_COLOR": "1"}
    command = [sys.executable, str(ROOT / "cli.py"), *args]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to read from, and to write beside."""
    return Path(shutil.copytree(KEPT, tmp_path_factory.mktemp("runs") / "0.1.0"))


def checkpoint(folder: Path, step: int) -> dict[str, Any]:
    """Read a checkpoint as anyone can: it holds tensors and primitives."""
    loaded: dict[str, Any] = torch.load(folder / "checkpoints" / f"{step:06d}.ckpt", weights_only=True)
    return loaded


def metrics(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "metrics.csv", index_col="step")


def numbers(record: Any) -> list[float]:
    """All numbers of a nested record, in its order."""
    if isinstance(record, dict):
        return [number for key in sorted(record) for number in numbers(record[key])]
    if isinstance(record, list):
        return [number for item in record for number in numbers(item)]
    return [float(record)] if isinstance(record, int | float) else []


def pc1(folder: Path) -> float:
    """Share of the first component of the drift, by SVD of what the snapshot files hold: increments."""
    increments = []
    for file in sorted((folder / "snapshots").glob("*.safetensors"))[1:]:
        weights = load_file(file)
        increments.append(np.concatenate([weights[name].astype(np.float64).ravel() for name in sorted(weights)]))
    energy = np.linalg.svd(np.cumsum(increments, axis=0), compute_uv=False) ** 2
    return float(energy[0] / energy.sum())


def test_the_kept_configurations_name_classes_as_0_1_0_did() -> None:
    paths = [
        callback["class_path"]
        for task in TASKS
        for callback in yaml.safe_load((KEPT / task / "config.yaml").read_text())["trainer"]["callbacks"]
    ]
    assert sum(path.startswith("callbacks.") for path in paths) == 15
    assert {path for path in paths if path.startswith("mini_gpt_pl.")} == {
        "mini_gpt_pl.grokking.milestones.Evaluation",
        "mini_gpt_pl.grokking.fourier_probe.FourierProbe",
    }


@pytest.mark.parametrize("task", TASKS)
def test_validate_repeats_what_the_run_logged(task: str, runs: Path) -> None:
    step = EVALUATED[task]
    done = mini_gpt_pl("validate", "--ckpt_path", f"{task}/checkpoints/{step:06d}.ckpt", cwd=runs)
    lines = [line.split() for line in done.stdout.splitlines()]
    printed = {line[0]: float(line[1]) for line in lines if len(line) == 2 and "/" in line[0]}
    logged = metrics(KEPT / task).loc[step]
    known = [name for name in printed if name in logged.index]  # what 0.1.0 evaluated too
    assert len(known) >= 5
    for name in known:
        assert printed[name] == pytest.approx(logged[name], rel=1e-3, abs=1e-3), name


def test_predict_continues_a_prompt(runs: Path) -> None:
    done = mini_gpt_pl(
        "predict", "--ckpt_path", "stories/checkpoints/000012.ckpt", "--prompt", "One day, Mia", cwd=runs
    )
    _, found, rest = done.stdout.partition("One day, Mia")
    assert found and len(rest.strip()) > 20


def test_replay_measures_what_0_1_0_measured(runs: Path) -> None:
    few = ("--accelerator", "cpu", "--batches", "2", "--fisher_batches", "2")
    mini_gpt_pl("replay", "stories", *few, "--out", "again", cwd=runs)
    for step in (6, 12):
        old, new = (
            json.loads((folder / f"{step:06d}.json").read_text())
            for folder in (KEPT / "stories/replay", runs / "again")
        )
        assert old.keys() == new.keys()
        expected = numbers(old)
        assert len(expected) > 50
        assert numbers(new) == pytest.approx(expected, rel=2e-2, abs=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_report_has_the_numbers_of_the_snapshots(task: str, runs: Path) -> None:
    mini_gpt_pl("report", task, "--out", f"report-{task}", cwd=runs)
    assert "</html>" in (runs / f"report-{task}" / "report.html").read_text()
    table = pd.read_csv(runs / f"report-{task}" / "tables" / "overview.csv", index_col=0)
    (measured,) = table.loc[[str(row).startswith("PC1 of the drift, raw") for row in table.index], "measured"]
    assert float(measured) == pytest.approx(pc1(KEPT / task), rel=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_explain_lists_what_0_1_0_logged_with_the_values_of_its_last_step(task: str, runs: Path) -> None:
    done = mini_gpt_pl("explain", task, cwd=runs)
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in done.stdout.splitlines() if line[:1] == "│"
    ]
    # Groups are folded into one row, which says how many more there are.
    values = {row[0].partition(" (+")[0]: float(row[1].replace(",", "")) for row in rows if row[0]}
    logged = metrics(KEPT / task)
    assert {name.partition("/")[0] for name in values} == {str(name).partition("/")[0] for name in logged}
    assert "not in the glossary" not in done.stdout
    for name, value in values.items():
        assert value == pytest.approx(logged[name].dropna().iloc[-1], rel=1e-3), name


@pytest.mark.parametrize("task", TASKS)
def test_fit_goes_on_from_a_checkpoint(task: str, tmp_path: Path) -> None:
    here = Path(shutil.copytree(KEPT, tmp_path / "0.1.0"))
    run, (start, middle, end) = here / task, RESUMED[task]
    (run / "checkpoints" / f"{middle:06d}.ckpt").unlink()
    done = mini_gpt_pl(
        "fit", "--ckpt_path", f"{task}/checkpoints/{start:06d}.ckpt", "--trainer.max_steps", str(end), cwd=here
    )
    # Lightning says so of each callback whose state nobody took.
    assert "Please add the following callbacks" not in done.stderr
    old, new = checkpoint(KEPT / task, middle), checkpoint(run, middle)
    assert new["callbacks"].keys() >= old["callbacks"].keys()  # some callbacks keep a state only since then
    assert new["state_dict"].keys() == old["state_dict"].keys()
    for name, weights in old["state_dict"].items():
        # The same steps again, up to the rounding of another processor.
        assert torch.linalg.vector_norm(new["state_dict"][name] - weights) <= 0.02 * torch.linalg.vector_norm(weights)
    was, now = metrics(KEPT / task), metrics(run)
    assert now.index[-1] == end and set(was.columns) <= set(now.columns)
    # Rows up to the checkpoint stay as they are.
    pd.testing.assert_frame_equal(now.loc[:start, was.columns], was.loc[:start])
    # The recorder went on from the state that 0.1.0 kept, and wrote what 0.1.0 wrote.
    before, after = (load_file(folder / "trajectory.safetensors") for folder in (KEPT / task, run))
    known = int((before["steps"] <= start).sum())
    assert after["steps"][-1] == end
    assert np.array_equal(after["grams"][:, :known, :known], before["grams"][:, :known, :known])
    length = len(before["steps"])
    assert after["survival"][:length] == pytest.approx(before["survival"], rel=1e-12)
    assert after["grams"][:, :length, :length] == pytest.approx(before["grams"], rel=0.1, abs=1e-4)
    steps = [int(file.stem.removeprefix("step_")) for file in sorted((run / "snapshots").glob("*.safetensors"))]
    assert steps[-1] == end
    for step in steps:
        kept = KEPT / task / "snapshots" / f"step_{step:09d}.safetensors"
        if step <= start:
            assert (run / "snapshots" / kept.name).read_bytes() == kept.read_bytes()
