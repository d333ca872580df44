"""Every experiment of the paper, scaled down, through the commands that run it in full."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pandas as pd
import pytest
import torch
import yaml

from docs.tools import keep
from mini_gpt_pl import main as cli
from mini_gpt_pl.runs.checkpoints import read_checkpoint
from mini_gpt_pl.runs.folder import Outcome, Run
from mini_gpt_pl.stories.study.contents import comparison_tables
from mini_gpt_pl.sweep import local, read_sweep
from mini_gpt_pl.training import cli as trainer_cli
from mini_gpt_pl.training.optimizers import ClippedCosine

REPOSITORY = Path(cli.__file__).parents[1]
SWEEPS = REPOSITORY / "configs" / "sweeps"
RUN = ("adamw", "adamw_wd0", "sgdw_nesterov", "muon")
OPTIMIZERS = REPOSITORY / "configs" / "paper" / "optimizer"
pytestmark = pytest.mark.timeout(900)  # what all of them look at takes minutes to make


class InThisProcess:
    """Stands in for the process that a sweep starts for a run: loading the libraries takes longer than the run."""

    def __init__(self, command: list[str], stdout: BinaryIO, **settings: Any) -> None:
        program = command.index("mini_gpt_pl")  # behind what starts it
        told = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(told), redirect_stderr(told):
            patch.setattr(trainer_cli, "draw_all", lambda run: [])  # seconds; nobody looks at them
            patch.setattr(sys, "argv", command[program:])
            try:
                cli.main()
                self.returncode = 0
            except SystemExit as end:
                self.returncode = int(end.code or 0)
        stdout.write(told.getvalue().encode())

    def poll(self) -> int:
        return self.returncode


def command(*args: str | Path) -> None:
    """Run `mini_gpt_pl ...` in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)  # sweep files name configurations from there
        patch.setenv("WANDB_MODE", "offline")
        patch.setattr(sys, "argv", ["mini_gpt_pl", *map(str, args)])
        cli.main()


def sweep(file: str | Path, root: Path, *options: str, own: tuple[str, ...] = ()) -> None:
    """Run a sweep with its runs in this process; `test_sweep` has a real one that starts processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": InThisProcess}))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # or it would count GPUs in a process of its own
        command("sweep", SWEEPS / file, "--root", root, "--jobs", "2", *own, "--", *options)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run everything once: seeds, beta2, optimizers, matched SGD, reheats, replay and report."""
    lab = tmp_path_factory.mktemp("lab")
    tiny = ("-c", "configs/paper/tiny.yaml", "--data.cache_dir", str(lab / "cache"))
    few = ("--trainer.max_steps", "8")
    hot = ("--steps", "8", "--eval_every", "4")
    sweep("seeds.yaml", lab / "seeds", *tiny, own=("--report", str(lab / "seeds_report")))
    sweep(_some(lab, "beta2", "0.99", "0.80", "0.0"), lab / "beta2", *tiny)
    sweep(_some(lab, "optimizers", *RUN), lab / "optimizers", *tiny, *few)
    sweep("sgd_matched.yaml", lab / "sgd_matched", *tiny, *few, own=("--point", "sgd-matched-lr0.3"))
    last = lab / "seeds" / "seed42" / "checkpoints" / "000040.ckpt"
    sweep(_some(lab, "reheat", "lr1e-3", "control"), lab / "reheat", "--ckpt_path", str(last), *hot)
    sweep(_scaled(lab), lab / "reheat_beta2", *hot, own=("--point", "0.80-000020_lr1e-3"))
    command("replay", lab / "seeds" / "seed42", "--steps", "4", "40", "--batches", "2", "--fisher_batches", "3")
    command("report", *(lab / name for name in ("seeds", "beta2", "optimizers", "reheat")), "--out", lab / "report")
    return lab


def _some(lab: Path, name: str, *wanted: str) -> Path:
    """Return a sweep with some of its configurations: each run is a process, which takes seconds to start."""
    config = yaml.safe_load((SWEEPS / f"{name}.yaml").read_text())
    values = config["parameters"]["config"]["values"]
    config["parameters"]["config"]["values"] = [value for value in values if Path(value).stem in wanted]
    assert len(config["parameters"]["config"]["values"]) == len(wanted)
    file = lab / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def _scaled(lab: Path) -> Path:
    """Return the grid of beta2 reheats with the checkpoints of the small runs."""
    text = (SWEEPS / "reheat_beta2.yaml").read_text().replace("runs/beta2", str(lab / "beta2"))
    file = lab / "reheat_beta2.yaml"
    file.write_text(re.sub(r"00([24])000\.ckpt", r"0000\g<1>0.ckpt", text))
    return file


def ended(root: Path) -> dict[str, str]:
    runs = [Run(file.parent) for file in root.glob("*/config.yaml")]
    return {run.path.name: run.outcome.state if run.outcome else "broken" for run in runs}


def test_every_run_of_every_experiment_ends(lab: Path) -> None:
    seeds, beta2 = ended(lab / "seeds"), ended(lab / "beta2")
    assert seeds == {"seed42": "finished", "seed271": "finished"}
    assert beta2.pop("0.0") in ("finished", "diverged")
    assert beta2 == dict.fromkeys(("0.99", "0.80"), "finished")
    assert set(ended(lab / "optimizers").values()) == {"finished"}
    assert len(ended(lab / "optimizers")) == len(RUN)
    assert ended(lab / "sgd_matched") == {"sgd-matched-lr0.3": "finished"}
    assert ended(lab / "reheat") == dict.fromkeys(("lr1e-3", "control"), "finished")
    assert ended(lab / "reheat_beta2") == {"0.80-000020_lr1e-3": "finished"}


def test_runs_differ_in_what_their_sweep_varies(lab: Path) -> None:
    for name, beta2 in (("0.99", 0.99), ("0.80", 0.8), ("0.0", 0.0)):
        assert Run(lab / "beta2" / name).config["model"]["optimizer"]["init_args"]["betas"] == [0.9, beta2]
    assert {name: Run(lab / "seeds" / name).config["data"]["seed"] for name in ("seed42", "seed271")} == {
        "seed42": 42,
        "seed271": 271,
    }
    for file in (lab / "optimizers").glob("*/config.yaml"):
        run = Run(file.parent)
        decayed = run.config["model"]["optimizer"]["init_args"]["weight_decay"] > 0
        assert decayed == ("wd0" not in run.path.name)
        assert (run.trajectory.survival[-1] < 1) == decayed


@pytest.mark.parametrize("name", sorted({file.stem for file in OPTIMIZERS.glob("*.yaml")} - set(RUN)))
def test_every_optimizer_of_the_sweeps_trains(name: str, tmp_path: Path) -> None:
    listed = "".join((SWEEPS / f"{file}.yaml").read_text() for file in ("optimizers", "sgd_matched"))
    assert f"optimizer/{name}.yaml" in listed
    files = ("base.yaml", "short.yaml", f"optimizer/{name}.yaml", "tiny.yaml")
    options = [word for file in files for word in ("-c", f"configs/paper/{file}")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_cli, "draw_all", lambda run: [])
        command("fit", *options, "--data.cache_dir", str(tmp_path), "--run_dir", tmp_path / "run",
                "--trainer.max_steps", "3", "--trainer.limit_val_batches", "0")  # fmt: skip
    run = Run(tmp_path / "run")
    assert run.outcome == Outcome("finished", 3)
    assert run.series("train/lr").iloc[-1] > 0


def test_decay_of_matched_sgd_is_that_of_adamw(lab: Path) -> None:
    """Once the momentum buffer has filled: until then its decay is a transient, which the survival follows."""
    adamw, sgd = Run(lab / "optimizers" / "adamw"), Run(lab / "sgd_matched" / "sgd-matched-lr0.3")
    fast, slow = (run.config["model"]["optimizer"]["init_args"] for run in (adamw, sgd))
    filled = slow["lr"] * slow["weight_decay"] / (1 - slow["momentum"])
    assert filled == pytest.approx(fast["lr"] * fast["weight_decay"], rel=1e-4)
    weight, buffer, left = 1.0, 0.0, {0: 1.0}
    factor = ClippedCosine(**sgd.config["model"]["schedule"])
    for step in range(1, sgd.trajectory.steps[-1] + 1):
        buffer = slow["momentum"] * buffer + slow["weight_decay"] * weight
        weight -= slow["lr"] * factor(step) * buffer
        left[step] = weight
    assert sgd.trajectory.survival == pytest.approx([left[step] for step in sgd.trajectory.steps], rel=1e-6)
    assert all(late >= early for late, early in zip(sgd.trajectory.survival, adamw.trajectory.survival, strict=True))


def test_the_control_of_the_reheats_goes_on_with_its_parents_moments(lab: Path) -> None:
    control, parent = Run(lab / "reheat" / "control"), Run(lab / "seeds" / "seed42")
    found = control.lineage
    assert found is not None and Path(found["parent"]) == parent.path.resolve()
    schedule = parent.series("train/lr")
    assert control.series("train/lr").iloc[0] == pytest.approx(schedule.min(), rel=1e-6)  # the parent is on its floor
    assert Run(lab / "reheat" / "lr1e-3").series("train/lr").max() == pytest.approx(
        1e-3
    )  # the warm-up is cut to the run


def test_replayed_weights_are_the_checkpoints(lab: Path) -> None:
    run = Run(lab / "seeds" / "seed42")
    assert set(run.replayed) == {4, 40}
    assert set(run.checkpoints) == {20, 40} and {4, 40} <= set(run.stored_weights)
    full, light = (read_checkpoint(file)["state_dict"] for file in (
        run.checkpoints[20], run.path / "checkpoints" / "weights-000020.ckpt"))  # fmt: skip
    assert all(torch.equal(full[name], light[name]) for name in full)


def test_the_report_compares_them(lab: Path) -> None:
    tables = {file.stem: pd.read_csv(file) for file in (lab / "report" / "tables").glob("*.csv")}
    assert {"runs", "seeds", "beta2_geometry", "table9_optimizers", "table11_reheating"} <= tables.keys()
    assert "control" in set(tables["table11_reheating"]["kind"])
    page = (lab / "report" / "report.html").read_text()
    for name in ("seed42", "seed271", "adamw-wd0", "muon", "lr1e-3"):
        assert name in page


def test_a_sweep_ends_with_the_report_on_its_runs(lab: Path) -> None:
    page = (lab / "seeds_report" / "report.html").read_text()
    assert "seed42" in page and "seed271" in page
    assert (lab / "seeds_report" / "tables" / "seeds.csv").is_file()


def test_the_page_lists_every_sweep_with_its_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    told = (REPOSITORY / "docs" / "how-to" / "experiments.md").read_text()
    listed = {name: int(runs) for name, runs in re.findall(r"^\| `(grokking\w*)` \|[^|]+\| (\d+) \|", told, re.M)}
    assert listed == {file.stem: len(read_sweep(file).points) for file in SWEEPS.glob("grokking*.yaml")}
    others = {file.name for file in SWEEPS.glob("*.yaml") if not file.name.startswith("grokking")}
    assert all(f"configs/sweeps/{name}" in told for name in others)


def test_what_is_kept_of_them_gives_the_same_tables(lab: Path) -> None:
    keep.main([str(lab / "seeds"), "--out", str(lab / "kept")])
    kept = lab / "kept" / "seeds" / "seed42"
    assert not any(str(lab) in file.read_text() for file in kept.rglob("*.yaml"))
    assert not (kept / "checkpoints").exists()
    tables = []
    for root in (lab / "seeds", lab / "kept" / "seeds"):
        found = comparison_tables([Run(root / "seed42"), Run(root / "seed271")], bootstrap=0)
        tables.append(next(table.frame for table in found if table.name == "seeds"))
    first, again = tables
    pd.testing.assert_frame_equal(first, again)
