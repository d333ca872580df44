"""A run folder as an object: what it finds, and what it says when something is missing or damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import SMALL, bent_path, one_line_error, record

from mini_gpt_pl.runs.folder import Run, runs_below

KEPT = Path(__file__).parents[2] / "docs" / "replication" / "runs" / "seeds" / "seed42"


def run_with(folder: Path, **files: str) -> Run:
    """A run folder with `config.yaml` and the like, by their stems."""
    suffixes = {"config": ".yaml", "metrics": ".csv"}
    folder.mkdir(parents=True, exist_ok=True)
    for stem, text in files.items():
        (folder / f"{stem}{suffixes[stem]}").write_text(text)
    return Run(folder)


@pytest.mark.parametrize("place", ["a.ckpt", "checkpoints/a.ckpt"])
def test_a_checkpoint_leads_to_its_run(tmp_path: Path, place: str) -> None:
    run = run_with(tmp_path / "run", config="model: {}")
    found = Run.of_checkpoint(run.path / place)
    assert found is not None
    assert found.path == run.path.resolve()


@pytest.mark.parametrize("place", ["a.ckpt", "run/checkpoints/deeper/a.ckpt"])
def test_a_checkpoint_elsewhere_has_no_run(tmp_path: Path, place: str) -> None:
    run_with(tmp_path / "run", config="model: {}")
    assert Run.of_checkpoint(tmp_path / place) is None


@pytest.mark.parametrize(
    ("product", "begun"),
    [
        ("config.yaml", True),
        ("metrics.csv", True),
        ("trajectory.safetensors", True),
        ("notes.txt", False),
        ("wandb", False),
    ],
)
def test_a_run_exists_once_it_has_written_something(tmp_path: Path, product: str, begun: bool) -> None:
    assert not Run(tmp_path / "nowhere").exists
    (tmp_path / product).touch()
    assert Run(tmp_path).exists == begun


def test_metrics_are_read_by_step_and_unlogged_values_are_left_out(tmp_path: Path) -> None:
    run = run_with(tmp_path, metrics="step,a,b\n0,1.5,\n2,,7\n4,2.5,\n")
    assert run.series("a").to_dict() == {0: 1.5, 4: 2.5}
    assert run.last("a") == 2.5
    assert run.last("b") == 7.0
    assert run.series("c").empty
    assert run.last("c") != run.last("c")


def test_checkpoints_are_found_by_their_step_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in (
        "000100.ckpt",
        "step=20.ckpt",
        "000003.ckpt",
        "000003-v9.ckpt",
        "000003-v10.ckpt",
        "last.ckpt",
        "7.txt",
    ):
        (folder / name).touch()
    found = Run(tmp_path).checkpoints
    assert list(found) == [3, 20, 100]
    assert found[20] == folder / "step=20.ckpt"
    assert found[3] == folder / "000003-v10.ckpt"


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (
            "trainer: {callbacks: [{class_path: x.Y}, {class_path: a.TrajectoryRecorder, init_args: {name: net}}]}",
            "net",
        ),
        ("trainer: {callbacks: {class_path: a.TrajectoryRecorder, init_args: {name: net}}}", "net"),
        ("trainer: {callbacks: [{class_path: a.TrajectoryRecorder, init_args: {pattern: w}}]}", "trunk"),
        ("trainer: {callbacks: null}", "trunk"),
        ("model: {}", "trunk"),
    ],
)
def test_the_recorder_names_the_trunk(tmp_path: Path, config: str, name: str) -> None:
    assert run_with(tmp_path, config=config).trunk == name


@pytest.mark.parametrize(
    ("callbacks", "found"),
    [
        ("[{class_path: x.Y}, {class_path: a.b.Probe, init_args: {k: 1}}, {class_path: Probe}]", [{"k": 1}, {}]),
        ("{class_path: a.Probe, init_args: null}", [{}]),
        ("[]", []),
    ],
)
def test_callbacks_are_found_by_their_class(tmp_path: Path, callbacks: str, found: list[dict[str, int]]) -> None:
    assert run_with(tmp_path, config=f"trainer: {{callbacks: {callbacks}}}").callback_settings("Probe") == found


def test_runs_are_found_at_any_depth_but_not_in_one_another(tmp_path: Path) -> None:
    for place in ("b", "a/deep/er", "a/deep/er/inside", "b/wandb", "wandb/run", ".hidden"):
        run_with(tmp_path / place, config="model: {}")
    (tmp_path / "empty").mkdir()
    assert runs_below(tmp_path) == [tmp_path / "a/deep/er", tmp_path / "b"]
    assert runs_below(tmp_path / "b") == [tmp_path / "b"]
    with one_line_error("there is no run folder"):
        runs_below(tmp_path / "c")
    with one_line_error("is no run folder and holds none"):
        runs_below(tmp_path / "empty")


def test_a_folder_without_a_run_says_so(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with one_line_error(r"is no run folder: it has no config\.yaml"):
        _ = run.config
    with one_line_error(r"has no metrics\.csv"):
        _ = run.metrics
    with one_line_error(r"no trajectory \(Gram\) file at"):
        _ = run.trajectory


@pytest.mark.parametrize("text", ["model: [1\n", "", "- 1\n", "just words"])
def test_a_damaged_configuration_is_one_line(tmp_path: Path, text: str) -> None:
    with one_line_error("configuration .*config.yaml"):
        _ = run_with(tmp_path, config=text).config


@pytest.mark.parametrize("text", ["", "no,columns,of,ours\n1,2,3,4\n", 'step,a\n0,"1\n'])
def test_a_damaged_table_is_one_line(tmp_path: Path, text: str) -> None:
    with one_line_error(r"metrics\.csv cannot be read"):
        _ = run_with(tmp_path, metrics=text).metrics


def test_a_damaged_trajectory_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "trajectory.safetensors").write_bytes(b"not a tensor")
    with one_line_error("cannot be read"):
        _ = Run(tmp_path).trajectory


def test_drift_rows_are_those_of_every_snapshot_after_the_first(tmp_path: Path) -> None:
    weights = bent_path(4, SMALL.dim)
    _, trajectory = record(SMALL, weights)
    trajectory.save(tmp_path / "trajectory.safetensors")
    run = Run(tmp_path)
    drifts = weights[1:] - weights[0]
    assert torch.allclose(run.drift_rows @ run.trajectory.gram() @ run.drift_rows.T, drifts @ drifts.T)


@pytest.mark.parametrize("snapshots", [1, 3])
def test_a_run_that_never_moved_has_no_drift(tmp_path: Path, snapshots: int) -> None:
    _, trajectory = record(SMALL, bent_path(1, SMALL.dim).expand(snapshots, -1))
    trajectory.save(tmp_path / "trajectory.safetensors")
    with one_line_error("have not moved"):
        _ = Run(tmp_path).drift_rows


def test_a_run_of_ones_own_trainer_needs_no_configuration(tmp_path: Path) -> None:
    own = tmp_path / "runs" / "mine"
    own.mkdir(parents=True)
    for name in ("metrics.csv", "trajectory.safetensors"):
        shutil.copy(KEPT / name, own / name)
    run = Run(own)
    assert run.settings == {} and run.trunk == "trunk"
    assert run.task == ""
    assert runs_below(tmp_path) == [own]
