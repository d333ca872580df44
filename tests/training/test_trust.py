"""A run folder that somebody sent: what its configuration and its checkpoint may ask for, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import one_line_error

from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.training.trust import OwnCheckpoints, require_no_way_out, split_trust, trusted_config


def sent(folder: Path, **config: Any) -> Run:
    """A run folder with a configuration of somebody's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"run_dir": "runs/theirs", **config}))
    return Run(folder)


def callback(name: str, /, **arguments: Any) -> dict[str, Any]:
    return {"trainer": {"callbacks": [{"class_path": name, "init_args": arguments}]}}


PLANTED = (
    {"model": {"optimizer": {"class_path": "os.system", "init_args": {"command": "true"}}}},
    {"model": {"optimizer": "os.system"}},
    {"model": {"optimizer": {"class_path": "planted.Optimizer"}}},
    {"trainer": {"logger": {"class_path": "planted.Logger"}}},
    {"trainer": {"profiler": "subprocess.Popen"}},
    {"trainer": {"plugins": [{"class_path": "planted.Plugin"}]}},
    {"trainer": {"strategy": {"class_path": "planted.Strategy"}}},
    callback("planted.Probe"),
    callback("callbacks.planted.Probe"),
    callback("lightning.pytorch.callbacks.LambdaCallback", on_fit_start="os.abort"),
    callback("lightning.pytorch.callbacks.LambdaCallback", on_fit_start="torch.hub.load"),
    callback("torch.hub.load", repo_or_dir="x", model="y"),
    callback("torch.utils.cpp_extension.load", name="x", sources=[]),
    callback("torch.os.system", command="true"),
    callback("mini_gpt_pl.training.cli.os.system", command="true"),
    callback("mini_gpt_pl.training.cli.shutil.rmtree", path="x"),
    callback("mini_gpt_pl.main.run", line="fit"),
    callback("mini_gpt_pl.callbacks.Nothing"),
    {"data": {"class_path": "planted.Data"}},
    {"model": {"size": {"class_path": "planted.Size"}}},
)


@pytest.mark.parametrize("config", PLANTED, ids=lambda config: str(config)[:60])
def test_what_is_none_of_a_trainings_classes_is_refused_and_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "planted.py").write_text("raise SystemExit('planted code ran')")
    with one_line_error("config.yaml: .* names "):
        trusted_config(sent(tmp_path / "run", **config))
    assert "planted" not in sys.modules


def test_what_runs_of_this_project_ask_for_passes(tmp_path: Path) -> None:
    kept = Path(__file__).parents[2] / "docs"
    files = [file for file in kept.rglob("config.yaml") if "runs" in file.parts or "h100_full" in file.parts]
    assert len(files) > 20
    for file in files:
        trusted_config(Run(file.parent))
    ours = callback("callbacks.TrajectoryRecorder", pattern="x.y")  # a pattern is no name of a class
    ours["trainer"]["callbacks"][0]["init_args"]["pattern"] = r"(?P<group>blocks\.\d+)"
    trusted_config(sent(tmp_path, **ours))


def test_a_package_is_trusted_by_name_and_with_what_is_below_it(tmp_path: Path) -> None:
    run = sent(tmp_path, **callback("planted.probes.Probe"))
    assert trusted_config(run, ["planted"])["trainer"] == run.config["trainer"]
    for other in ("plan", "planted.other", "probes"):
        with one_line_error("--trust planted"):
            trusted_config(run, [other])


def test_what_a_command_makes_nothing_of_is_left_out_and_not_looked_at(tmp_path: Path) -> None:
    run = sent(tmp_path, model={"optimizer": "os.system", "width": 3}, trainer={"profiler": "os.system"}, data={})
    unused = [("trainer",), ("model", "optimizer"), ("model", "absent", "deeper")]
    kept = trusted_config(run, unused=unused)
    assert kept == {"run_dir": "runs/theirs", "model": {"width": 3}, "data": {}}
    assert run.config["model"]["optimizer"] == "os.system"  # the run's own record is as it was


def test_trust_is_taken_out_of_the_command_line() -> None:
    words, packages = split_trust(["fit", "--trust", "a", "--ckpt_path", "x", "--trust=b.c"])
    assert (words, packages) == (["fit", "--ckpt_path", "x"], ["a", "b.c"])
    for wrong in (["--trust"], ["--trust", "--other"], ["--trust="]):
        with one_line_error("name a package"):
            split_trust(wrong)


@pytest.mark.parametrize("option", ["dirpath", "save_dir"])
def test_folders_to_write_to_lie_in_the_runs_own(tmp_path: Path, option: str) -> None:
    name = "lightning.pytorch.callbacks.ModelCheckpoint"
    for elsewhere in (str(tmp_path / "other"), "../other", "/", "runs/theirs/../../other"):
        with one_line_error("outside of the run's folder"):
            trusted_config(sent(tmp_path / "run", **callback(name, **{option: elsewhere})))
    for inside in (str(tmp_path / "run" / "checkpoints"), "runs/theirs/checkpoints", None):
        trusted_config(sent(tmp_path / "run", **callback(name, **{option: inside})))


def test_a_cache_elsewhere_is_the_readers_own_instead(tmp_path: Path) -> None:
    run = sent(tmp_path, data={"cache_dir": "/somewhere", "seed": 1})
    assert trusted_config(run)["data"] == {"cache_dir": None, "seed": 1}


def test_a_link_that_leads_out_is_refused(tmp_path: Path) -> None:
    run = sent(tmp_path / "run")
    (tmp_path / "outside").mkdir()
    (run.path / "inside").mkdir()
    (run.path / "figures").symlink_to(run.path / "inside")
    require_no_way_out(run)
    (run.path / "snapshots").symlink_to(tmp_path / "outside")
    with one_line_error("snapshots is a link to .*outside"):
        require_no_way_out(run)


def test_a_checkpoint_remembers_checkpoints_of_its_own_run_alone(tmp_path: Path) -> None:
    own, other = str(tmp_path / "run/checkpoints/1.ckpt"), str(tmp_path / "precious.txt")
    state = {"best_model_path": other, "last_model_path": own, "best_k_models": {own: 1.0, other: 2.0}}
    checkpoint = {"callbacks": {"ModelCheckpoint{}": state, "Other": 3}}
    OwnCheckpoints(tmp_path / "run").on_load_checkpoint(SimpleNamespace(), SimpleNamespace(), checkpoint)  # type: ignore[arg-type]
    assert state == {"best_model_path": "", "last_model_path": own, "best_k_models": {own: 1.0}}
