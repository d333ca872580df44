"""Sweeps: grid files against W&B's own reading, run folders in every state, and points run by a stub and by cli.py."""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
import string
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import wandb
import yaml
from conftest import one_line_error
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mini_gpt_pl import main as cli
from mini_gpt_pl.report import page
from mini_gpt_pl.runs.folder import Outcome
from mini_gpt_pl.runs.record import Record as RunRecord
from mini_gpt_pl.sweep import command, local, main, read_sweep
from mini_gpt_pl.sweep.grid import Sweep
from mini_gpt_pl.sweep.local import Execution, run_all, slots, visible_devices
from mini_gpt_pl.sweep.points import Call, PointRun
from mini_gpt_pl.sweep.progress import Display, Reading, counts, table
from mini_gpt_pl.sweep.remote import cluster_settings, create_wandb, submit, wandb_config

TINY = Path(cli.__file__).resolve().parents[1] / "tests" / "tiny.yaml"
COMMAND = ["${env}", "${interpreter}", "${program}", "fit", "${args}"]

# Stands in for cli.py: notes how it was called, and ends as its parameter `behave` says.
STUB = """
import json, os, pathlib, signal, sys, time
options = dict(a[2:].split("=", 1) for a in sys.argv[2:] if a.startswith("--") and "=" in a)
folder = pathlib.Path(options["run_dir"] if "run_dir" in options else options["ckpt_path"]).resolve()
folder = folder if "run_dir" in options else folder.parent.parent
call = {"args": sys.argv[1:], "name": folder.name, "began": time.time()}
call |= {key: os.environ.get(key) for key in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
behave = options.get("behave", "finish")
if behave == "fail":
    print("mini_gpt_pl: error: no such tokenizer", file=sys.stderr)
    print("wandb: a late word", file=sys.stderr)
else:
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("trainer: {max_steps: 6}")
    (folder / "metrics.csv").write_text("step,val/loss,probe/p_ood\\n3,2.5,0.75\\n6,1.5,0.5\\n")
    (folder / "checkpoints" / "000003.ckpt").touch()
if "meet" in options:  # until two runs are there at once, or have been
    pathlib.Path(f"{folder.name}.here").touch()
    end = time.monotonic() + 30
    while len(list(pathlib.Path().glob("*.here"))) < 2 and time.monotonic() < end:
        time.sleep(0.01)
if behave == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if behave in ("deaf", "hang"):
    (folder / "ready").touch()
    time.sleep(60)
if behave == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if behave in ("finish", "undrawn", "diverge"):
    state = "diverged" if behave == "diverge" else "finished"
    (folder / "outcome.json").write_text(json.dumps({"state": state, "step": 6}))
call["ended"] = time.time()
with open("calls.jsonl", "a") as calls:
    calls.write(json.dumps(call) + "\\n")
if behave == "undrawn":
    raise ValueError("no figure")
sys.exit({"diverge": 2, "fail": 2}.get(behave, 0))
"""


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder of the test's own, on a machine without GPUs, with the stub at hand."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "visible_devices", list)
    Path("stub.py").write_text(STUB)


def write_sweep(parameters: dict[str, Any], **more: Any) -> Path:
    loaded = {"program": "cli.py", "method": "grid", "command": COMMAND, "parameters": parameters, **more}
    path = Path("grid.yaml")
    path.write_text(yaml.safe_dump(loaded, sort_keys=False))
    return path


def sweep_of(parameters: dict[str, Any], **more: Any) -> Sweep:
    return read_sweep(write_sweep(parameters, **more))


def point_runs(parameters: dict[str, Any], *extras: str, **more: Any) -> list[PointRun]:
    sweep = replace(sweep_of(parameters, **more), program=(str(Path("stub.py").resolve()),))
    return Call(sweep, Path("root"), extras).runs


def behaving(*behaviours: str) -> list[PointRun]:
    return point_runs({"behave": {"values": list(behaviours)}})


def run_stub(*args: str) -> None:
    main(["grid.yaml", "--root", "root", "--program", str(Path("stub.py").resolve()), *args])


def calls() -> list[dict[str, Any]]:
    file = Path("calls.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def quiet(total: int = 1) -> Display:
    return Display(Console(file=io.StringIO()), total)


def begun(
    run: PointRun, *, checkpoint: bool = True, outcome: str | None = None, failure: str | None = None
) -> PointRun:
    """Fake what a run leaves behind."""
    (run.folder / "checkpoints").mkdir(parents=True)
    (run.folder / "config.yaml").write_text("{}")
    if checkpoint:
        for step in (3, 6):
            (run.folder / "checkpoints" / f"{step:06d}.ckpt").touch()
    if outcome is not None:
        Outcome(outcome, 6).write(run.folder)  # type: ignore[arg-type]
    replace(run.wanted, seconds=5.0, failure=failure).write(run.folder)
    return run


# ---------------------------------------------------------------------------------------------- the grid file

SCALARS = st.one_of(
    st.text(max_size=60), st.integers(-99, 99), st.booleans(), st.floats(allow_nan=False, allow_infinity=False)
)
VALUES = st.lists(SCALARS, min_size=1, max_size=4, unique_by=lambda v: v if isinstance(v, str) else json.dumps(v))
KEYS = st.text(string.ascii_lowercase + "_", min_size=1, max_size=6)
GRIDS = st.dictionaries(
    st.lists(KEYS, min_size=1, max_size=3).map(".".join).filter(lambda key: key not in ("c", "config")),
    VALUES,
    min_size=1,
    max_size=3,
)


def grid_of(values: dict[str, list[Any]]) -> Sweep:
    lists = {key: tuple(found) for key, found in values.items()}
    return Sweep(Path("f.yaml"), "f", tuple(COMMAND), lists, tuple(lists))


@given(GRIDS)
def test_points_are_the_product_and_have_names_of_their_own(values: dict[str, list[Any]]) -> None:
    points = grid_of(values).points
    assert len(points) == math.prod(map(len, values.values()))
    assert len({json.dumps(point.parameters) for point in points}) == len(points)
    assert len({point.name.casefold() for point in points}) == len(points)
    assert all(re.fullmatch(r"[A-Za-z0-9_=+-][A-Za-z0-9._=+-]{0,160}", point.name) for point in points)


@given(GRIDS, st.data())
def test_a_point_keeps_its_name_when_values_are_added(values: dict[str, list[Any]], data: st.DataObject) -> None:
    texts = {key: [v if isinstance(v, str) else json.dumps(v) for v in found] for key, found in values.items()}
    more = {
        key: found + [v for v in data.draw(st.lists(st.text(max_size=3), unique=True)) if v not in texts[key]]
        for key, found in values.items()
    }
    names = {json.dumps(point.parameters): point.name for point in grid_of(more).points}
    for point in grid_of(values).points:
        assert names[json.dumps(point.parameters)] == point.name


def test_names_are_short_and_say_what_varies() -> None:
    Path("beta2").mkdir()
    for name in ("0.95", "decay_late"):
        Path("beta2", f"{name}.yaml").touch()
    sweep = sweep_of(
        {
            "config": {"values": ["beta2/0.95.yaml", "beta2/decay_late.yaml"]},
            "seed_everything": {"value": 42},
            "model.optimizer.init_args.weight_decay": {"values": [0.5]},
            "model.optimizer.init_args.betas": {"values": [[0.9, 0.95]]},
        }
    )
    assert [point.name for point in sweep.points] == [
        "0.95_weight_decay-0.5_betas-0.9-0.95",
        "decay-late_weight_decay-0.5_betas-0.9-0.95",
    ]


def test_checkpoints_are_named_by_run_and_step() -> None:
    parents = [f"runs/{run}/checkpoints/{step}.ckpt" for run in ("0.95", "0.80") for step in ("002000", "004000")]
    sweep = sweep_of({"ckpt_path": {"values": [*parents, "other/0.95/checkpoints/002000.ckpt", "alone.ckpt"]}})
    names = [point.name for point in sweep.points]
    assert names[:4] == ["0.95-002000", "0.95-004000", "0.80-002000", "0.80-004000"]
    assert re.fullmatch("0.95-002000-[0-9a-f]{8}", names[4])
    assert names[5] == "alone"


def test_keys_with_one_end_are_told_apart() -> None:
    sweep = sweep_of({"model.schedule.total": {"values": [1]}, "data.total": {"values": [2]}})
    assert sweep.points[0].name == "schedule.total-1_data.total-2"


def test_a_sweep_without_varying_parameters_is_one_point() -> None:
    (point,) = sweep_of({"seed_everything": {"value": 1}}, name="just one").points
    assert (point.name, point.options) == ("just-one", ["--seed_everything=1"])


def test_nested_parameters_are_dotted_ones() -> None:
    nested = {"model": {"parameters": {"probe": {"parameters": {"p": {"values": [1, 2]}}}, "q": {"value": None}}}}
    assert sweep_of(nested).values == sweep_of({"model.probe.p": {"values": [1, 2]}, "model.q": {"value": None}}).values


def test_commands_are_those_of_wandbs_own_agent() -> None:
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    parameters = {"a.b": {"values": ["x y", 3, 0.5]}, "n": {"value": 1}}
    for point in sweep_of(parameters).points:
        theirs = utils.create_sweep_command_args({"args": {k: {"value": v} for k, v in point.parameters.items()}})
        assert point.options == theirs["args"]


def test_macros_and_structured_values() -> None:
    parameters = {"b": {"value": [0.9, 0.95]}, "t": {"value": True}, "n": {"value": None}}
    command = ["${interpreter}", "${program}", "reheat", "${args}", "--last", 1]
    sweep = sweep_of(parameters, command=command)
    words = sweep.expand(sweep.points[0].options)
    run = ["reheat", "--b=[0.9, 0.95]", "--t=true", "--n=null", "--last", "1"]
    assert words == [sys.executable, "-m", "mini_gpt_pl", *run]


def test_run_cap_is_obeyed() -> None:
    assert len(sweep_of({"a": {"values": [1, 2, 3]}}, run_cap=2).points) == 2


GOOD = {"a": {"values": [1, 2]}}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"methd": "grid"}, "unknown key methd: did you mean method"),
        ({"early_terminate": {}}, "unknown key early_terminate: the keys are"),
        ({"method": "bayes"}, "method is 'bayes': only 'grid'"),
        ({"program": "train.py"}, "program is 'train.py'"),
        ({"run_cap": 0}, "run_cap is 0"),
        ({"parameters": {}}, "parameters must list"),
        ({"parameters": {"a": {"value": 1, "values": [1]}}}, r"parameters\.a needs one of"),
        ({"parameters": {"a": {"valeus": [1]}}}, r"unknown key parameters\.a\.valeus: did you mean values"),
        ({"parameters": {"a": {"min": 0, "max": 1}}}, r"parameters\.a\.min: a grid takes"),
        ({"parameters": {"a": {"distribution": "uniform"}}}, r"parameters\.a\.distribution"),
        ({"parameters": {"a": {"values": []}}}, r"parameters\.a\.values must be a list"),
        ({"parameters": {"a": {"values": 3}}}, r"parameters\.a\.values must be a list"),
        ({"parameters": {"a": {"values": [1, 2, 1]}}}, r"parameters\.a\.values holds 1 twice"),
        ({"parameters": {"a": 3}}, r"parameters\.a is 3: write"),
        ({"parameters": {"a": {"parameters": {"b": {"valu": 1}}}}}, r"parameters\.a\.b\.valu: did you mean value"),
        ({"parameters": {"a.b": {"value": 1}, "a": {"parameters": {"b": {"value": 2}}}}}, r"a\.b is given twice"),
        ({"parameters": {"run_dir": {"values": ["x"]}}}, r"run_dir cannot be swept"),
        ({"parameters": {"config": {"values": ["none.yaml"]}}}, "no configuration none.yaml"),
        ({"command": None}, "command must be a list"),
        ({"command": COMMAND[:-1]}, r"must hold \$\{args\} once"),
        ({"command": [*COMMAND[:-1], "${args_no_hyphens}"]}, r"cannot use .*args_no_hyphens.*did you mean \$\{args\}"),
        ({"command": ["${programme}", "fit", "${args}"]}, r"did you mean \$\{program\}"),
        ({"command": ["${program}", "fti", "${args}"]}, "fit or reheat must follow"),
        ({"command": ["${program}", "fit", "-c", "none.yaml", "${args}"]}, "no configuration none.yaml"),
    ],
)  # fmt: skip
def test_mistakes_in_the_file(change: dict[str, Any], told: str) -> None:
    with one_line_error(rf"^grid\.yaml: .*{told}"):
        sweep_of(change.get("parameters", GOOD), **{k: v for k, v in change.items() if k != "parameters"})


def test_files_that_are_none() -> None:
    with one_line_error("no sweep file nope.yaml"):
        read_sweep(Path("nope.yaml"))
    Path("bad.yaml").write_text("a: [1\nb")
    with one_line_error("bad.yaml is no valid YAML"):
        read_sweep(Path("bad.yaml"))
    Path("bad.yaml").write_text("- 1\n")
    with one_line_error("bad.yaml holds no keys"):
        read_sweep(Path("bad.yaml"))


# ------------------------------------------------------------------------------------------------- run folders


def test_states_are_read_from_the_folders() -> None:
    new, broken, empty, done, lost, failed = behaving("a", "b", "c", "d", "e", "f")
    begun(broken)
    begun(empty, checkpoint=False)
    begun(done, outcome="finished")
    begun(lost, outcome="diverged")
    begun(failed, failure="no luck")
    states = [run.state for run in (new, broken, empty, done, lost, failed)]
    assert states == ["new", "broken off", "broken off", "finished", "diverged", "failed"]
    assert not new.folder.exists()  # looking makes nothing


def test_commands_by_state() -> None:
    new, broken, empty = behaving("a", "b", "c")
    fresh = new.command()
    assert fresh[-2:] == ["--behave=a", "--run_dir=root/behave-a"]
    assert begun(broken).command()[1:] == [
        *broken.call.sweep.program,
        "fit",
        "--ckpt_path=root/behave-b/checkpoints/000006.ckpt",
    ]
    assert broken.command(afresh=True)[-2:] == ["--run_dir=root/behave-b", "--overwrite=true"]
    assert begun(empty, checkpoint=False).command()[-2:] == ["--run_dir=root/behave-c", "--overwrite=true"]


def test_extras_go_with_a_fresh_run_only() -> None:
    (run,) = point_runs({"a": {"values": [1]}}, "--x", "2")
    assert run.command()[-4:] == ["--a=1", "--x", "2", "--run_dir=root/a-1"]
    assert not {"--x", "2"} & set(begun(run).command())


def test_a_lock_is_held_and_let_go() -> None:
    (run,) = behaving("a")
    held = run.lock()
    assert held is not None
    assert (run.state, run.lock()) == ("running", None)
    os.close(held)
    assert run.state == "new"


@pytest.mark.parametrize(
    ("parameters", "extras", "told"),
    [
        ({"a": {"values": [1]}, "b": {"value": 4}}, (), "b was 3 and is now 4"),
        ({"a": {"values": [1]}}, (), "b was 3 and is now nothing"),
        ({"a": {"values": [1]}, "b": {"value": 3}}, ("--x=1",), "had nothing else and now has --x=1"),
    ],
)
def test_a_changed_point_is_refused(parameters: dict[str, Any], extras: tuple[str, ...], told: str) -> None:
    (before,) = point_runs({"a": {"values": [1]}, "b": {"value": 3}})
    begun(before, outcome="finished")
    assert before.conflict() is None
    (after,) = point_runs(parameters, *extras)
    assert re.search(rf"^root/a-1 was run with other options \(.*{told}\)", after.conflict() or "")


def test_a_run_that_no_sweep_began_is_refused_and_a_failed_start_is_not() -> None:
    (run,) = point_runs({"a": {"values": [1]}})
    begun(run, outcome="finished")
    (run.folder / "point.json").unlink()
    assert "no sweep began" in (run.conflict() or "")
    (run.folder / "outcome.json").unlink()
    assert run.conflict() is not None  # its checkpoints would be lost
    for file in (run.folder / "checkpoints").iterdir():
        file.unlink()
    assert run.conflict() is None


def test_a_damaged_record_is_one_line() -> None:
    (run,) = point_runs({"a": {"values": [1]}})
    run.folder.mkdir(parents=True)
    (run.folder / "point.json").write_text('{"a": 1}')
    with one_line_error("point.json cannot be read"):
        assert run.state


# ------------------------------------------------------------------------------------------ running, by a stub


def test_every_point_runs_once(capsys: pytest.CaptureFixture[str]) -> None:
    behaving("finish", "diverge")
    run_stub()
    assert [call["name"] for call in calls()] == ["behave-finish", "behave-diverge"]
    told = capsys.readouterr().out
    assert "2 points below root (2 new): 2 to run" in told
    assert re.search(r"begun +behave-finish: root/behave-finish\n", told)
    assert re.search(r"diverged +behave-diverge: step 6, val/loss 1.500, p_ood 0.500, \d+ s\n", told)
    assert re.search(r"behave-finish *│ *finished *│ *6 *│ *1.500 *│ *0.750 *│", told)
    run_stub()  # finished and diverged: nothing to do
    assert len(calls()) == 2
    assert "(1 finished, 1 diverged): 0 to run" in capsys.readouterr().out


def test_a_report_is_written_once_every_point_has_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(page, "main", asked.append)
    runs = behaving("finish", "diverge", "fail")
    with pytest.raises(SystemExit):
        run_stub("--report", "told")
    assert asked == []  # the failed one is tried again
    behaving("finish", "diverge")
    run_stub("--report", "told")
    run_stub("--report", "told", "--dry_run")
    assert asked == [["root", "--out", "told"]]
    (runs[0].folder / "outcome.json").unlink()
    held = runs[0].lock()
    assert held is not None
    capsys.readouterr()
    run_stub("--report", "told")
    os.close(held)
    assert len(asked) == 1
    assert "no report yet: 1 point of another process not ended, such as behave-finish" in capsys.readouterr().out


def test_diverged_points_run_again_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    behaving("finish", "diverge")
    run_stub()
    run_stub("--retry_diverged")
    assert [call["name"] for call in calls()] == ["behave-finish", "behave-diverge", "behave-diverge"]
    assert calls()[-1]["args"][-1] == "--overwrite=true"
    assert (Path("root/behave-diverge") / "point.json").is_file()


def test_a_retry_that_fails_at_once_has_not_diverged(capsys: pytest.CaptureFixture[str]) -> None:
    (run,) = behaving("fail")
    begun(run, outcome="diverged")
    RunRecord("Model", 1, ended=6).write(run.folder)
    with pytest.raises(SystemExit):
        run_stub("--retry_diverged")
    assert run.state == "failed"


def test_a_failure_is_told_and_the_sweep_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    runs = behaving("fail", "finish", "killed", "nothing")
    with pytest.raises(SystemExit) as caught:
        run_stub()
    assert caught.value.code == 1
    assert [run.state for run in runs] == ["failed", "finished", "failed", "failed"]
    failures = [run.record.failure for run in runs if run.record is not None]
    assert failures[0] == "mini_gpt_pl: error: no such tokenizer"  # not what was said after it
    assert failures[1] is None
    assert failures[2] == "killed by SIGKILL"
    assert failures[3] == "it ended without an outcome"
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "3 of 4 runs failed: behave-fail (mini_gpt_pl: error: no such tokenizer) and 2 more" in told
    assert "root/POINT.log" in told
    with pytest.raises(SystemExit):
        run_stub()  # tried again: from the start, or from the checkpoint
    assert {call["name"] for call in calls()[3:]} == {"behave-fail", "behave-killed", "behave-nothing"}
    assert calls()[-1]["args"] == ["fit", "--ckpt_path=root/behave-nothing/checkpoints/000003.ckpt"]


def test_a_run_that_finished_but_could_not_draw_is_told_of_once(capsys: pytest.CaptureFixture[str]) -> None:
    (run,) = behaving("undrawn")
    with pytest.raises(SystemExit) as caught:
        run_stub()
    assert caught.value.code == 1
    assert "ValueError: no figure" in capsys.readouterr().err
    assert run.state == "finished"  # nothing that was trained is trained again
    run_stub()
    assert len(calls()) == 1


def test_a_broken_off_point_is_resumed(capsys: pytest.CaptureFixture[str]) -> None:
    broken, empty = behaving("finish", "diverge")
    begun(broken)
    begun(empty, checkpoint=False)
    run_stub()
    first, second = calls()
    assert first["args"] == ["fit", "--ckpt_path=root/behave-finish/checkpoints/000006.ckpt"]
    assert second["args"][-1] == "--overwrite=true"
    assert broken.record is not None
    assert broken.record.seconds > 5.0  # those before count too
    assert broken.log.read_text().startswith("=== ")
    told = capsys.readouterr().out
    assert "resumed   behave-finish:" in told
    assert "begun     behave-diverge:" in told


def test_a_reheat_is_resumed_by_fit(capsys: pytest.CaptureFixture[str]) -> None:
    parameters = {"ckpt_path": {"value": "parent/checkpoints/000006.ckpt"}, "lr": {"values": [1, 2]}}
    first, _ = point_runs(parameters, command=["${interpreter}", "${program}", "reheat", "${args}"])
    begun(first)
    run_stub()
    assert calls()[0]["args"] == ["fit", f"--ckpt_path={first.folder}/checkpoints/000006.ckpt"]
    assert calls()[1]["args"] == [
        "reheat",
        "--ckpt_path=parent/checkpoints/000006.ckpt",
        "--lr=2",
        "--run_dir=root/lr-2",
    ]
    told = capsys.readouterr().out
    assert "resumed   lr-1:" in told
    assert "begun     lr-2:" in told


def test_a_changed_point_stops_the_sweep_before_it_begins() -> None:
    begun(behaving("finish", "diverge")[1], outcome="finished")
    with one_line_error("root/behave-diverge was run with other options .*--x=1"):
        run_stub("--", "--x=1")
    assert calls() == []


def test_gpus_are_dealt_out_one_a_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "visible_devices", lambda: ["1", "3"])
    point_runs({"meet": {"value": True}, "a": {"values": [1, 2, 3, 4]}})
    run_stub()
    done = calls()
    assert len(done) == 4
    assert {call["CUDA_VISIBLE_DEVICES"] for call in done} == {"1", "3"}
    pairs = [(a, b) for a in done for b in done if a["name"] < b["name"]]
    together = [(a, b) for a, b in pairs if a["began"] < b["ended"] and b["began"] < a["ended"]]
    assert ("a-1", "a-2") in [(a["name"], b["name"]) for a, b in together]
    assert all(a["CUDA_VISIBLE_DEVICES"] != b["CUDA_VISIBLE_DEVICES"] for a, b in together)
    assert "on GPU 3" in capsys.readouterr().out


def test_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert slots(None, []) == [{"OMP_NUM_THREADS": "8"}]
    assert slots(3, []) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert slots(None, ["0", "1"]) == [{"CUDA_VISIBLE_DEVICES": device} for device in "01"]
    assert slots(3, ["0", "1"]) == [{"CUDA_VISIBLE_DEVICES": device} for device in "010"]
    assert slots(1, ["0", "1"]) == [{"CUDA_VISIBLE_DEVICES": "0"}]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert slots(3, []) == [{"OMP_NUM_THREADS": "5"}] * 3


@pytest.mark.parametrize(
    ("given_devices", "count", "wanted"),
    [(None, "2", ["0", "1"]), ("4,GPU-x,6", "2", ["4", "GPU-x"]), ("", "9", []), ("-1", "9", []), (None, "0", [])],
)
def test_devices_are_counted_elsewhere(
    monkeypatch: pytest.MonkeyPatch, given_devices: str | None, count: str, wanted: list[str]
) -> None:
    done = SimpleNamespace(stdout=f"{count}\n", returncode=0)
    monkeypatch.setattr(local.subprocess, "run", lambda *args, **settings: done)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given_devices is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given_devices)
    assert visible_devices() == wanted


class Interrupting(Display):
    """Is interrupted once every run is on its way."""

    def update(self) -> None:
        if all((run.folder / "ready").exists() for run, _ in self._running.values()):
            raise KeyboardInterrupt


@pytest.mark.parametrize("behaviour", ["hang", "deaf"])
def test_an_interrupted_sweep_ends_its_runs_and_goes_on_later(monkeypatch: pytest.MonkeyPatch, behaviour: str) -> None:
    monkeypatch.setattr(local, "PATIENCE", 1.0)
    runs = point_runs({"behave": {"value": behaviour}, "a": {"values": [1, 2, 3]}})
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_all(runs, [{}] * 2, Interrupting(Console(file=io.StringIO()), 3))
    assert time.monotonic() - started < 20
    assert [run.state for run in runs] == ["broken off", "broken off", "new"]  # no lock is left: none lives on
    assert runs[0].record is not None
    assert runs[0].record.failure is None
    assert "--ckpt_path" in runs[0].command()[-1]


def test_interruption_is_told_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "Display", Interrupting)
    behaving("hang")
    with pytest.raises(SystemExit) as caught:
        run_stub()
    assert caught.value.code == 130
    assert "the same command goes on from there" in capsys.readouterr().err


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals are the main thread's")
def test_a_request_to_end_is_an_interrupt() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), local._end_is_interrupt():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_run_itself_holds_the_lock() -> None:
    """A sweep that is killed leaves its runs going: no other sweep may start them a second time."""
    (run,) = behaving("hang")
    held = run.lock()
    assert held is not None
    execution = Execution(run, {}, held, afresh=False)
    os.close(held)
    assert run.state == "running"
    display = quiet()
    run_all([run], [{}], display)
    assert "passed over" in display.console.file.getvalue()  # type: ignore[attr-defined]
    execution.process.kill()
    execution.process.wait()
    assert run.state != "running"


def test_a_point_that_another_process_finished_meanwhile_is_passed_over() -> None:
    (run,) = behaving("finish")
    begun(run, outcome="finished")
    run_all([run], [{}], quiet())
    assert calls() == []


# ------------------------------------------------------------------------------------------------ command line


def test_dry_run_lists_and_makes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    new, broken, done, changed = behaving("a", "b", "c", "d")
    begun(broken)
    begun(done, outcome="finished")
    begun(changed, outcome="finished")
    replace(changed.wanted, parameters={"behave": "x"}).write(changed.folder)
    before = sorted(map(str, Path().rglob("*")))
    run_stub("--dry_run")
    told = capsys.readouterr().out
    assert sorted(map(str, Path().rglob("*"))) == before
    assert "behave-a: new, root/behave-a\n" in told
    assert f"stub.py fit --behave=a --run_dir={new.folder}\n" in told
    assert "behave-b: broken off" in told
    assert "fit --ckpt_path=root/behave-b/checkpoints/000006.ckpt\n" in told
    assert "fit --behave=c --run_dir=root/behave-c\n" in told
    assert "cannot be run: root/behave-d was run with other options" in told
    assert "2 finished, 1 broken off, 1 new" in told


def test_one_point_by_name_or_by_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    point_runs({"a": {"values": [1, 2]}, "b.c": {"value": 1.0}})
    run_stub("--point", "a-2")
    run_stub("--point", '{"a": 1, "b.c": 1}')  # a server may hand out 1 for 1.0
    assert [call["name"] for call in calls()] == ["a-2", "a-1"]
    assert all(call["CUDA_VISIBLE_DEVICES"] == os.environ.get("CUDA_VISIBLE_DEVICES") for call in calls())
    for wanted, told in (
        ("a-3", "did you mean a-2"),
        ('{"a": true, "b.c": 1}', "no such point"),
        ("{", "no valid JSON"),
    ):
        with one_line_error(told):
            run_stub("--point", wanted)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--dryrun"], "unrecognized arguments: --dryrun; did you mean --dry_run.*sweep --help"),
        (["--trainer.max_steps=3"], "options of the runs go behind --"),
        (["--jobs", "0"], "--jobs must be 1"),
        (["--jobs", "two"], "invalid int value: 'two'"),
        (["--launcher", "wandb", "--jobs", "2"], "--jobs belongs to --launcher local, not wandb"),
        (["--launcher", "slurm", "--report", "x"], "--report belongs to --launcher local, not slurm"),
        (["--point", "a-1", "--report", "x"], "--report is of all points: leave --point out"),
        (["--report", "grid.yaml"], "--report grid.yaml is a file: give a folder"),
        (["--agent"], "--agent belongs to --launcher wandb"),
        (["--slurm", "gpus=1"], "--slurm belongs to --launcher slurm"),
        (["--", "--a", "3"], "-- --a would override the parameter a of grid.yaml"),
        (["--", "--run_dir=x"], "choose their folder with --root"),
    ],
)
def test_options_that_cannot_be(args: list[str], told: str) -> None:
    write_sweep(GOOD)
    with one_line_error(told):
        run_stub(*args)


def test_a_root_that_cannot_be() -> None:
    behaving("finish")
    Path("root").touch()
    with one_line_error("root/behave-finish cannot be made"):
        run_stub()


def test_the_command_line_knows_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_sweep(GOOD, name="mine")
    monkeypatch.setattr(sys, "argv", ["mini_gpt_pl", "sweep", "grid.yaml", "--dry_run"])
    cli.main()
    assert "a-1: new, runs/sweeps/mine/a-1" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["mini_gpt_pl", "sweep", "nope.yaml"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("mini_gpt_pl: error: no sweep file nope.yaml")


# -------------------------------------------------------------------------------------------------- what shows


def test_a_reading_is_of_the_last_and_the_best() -> None:
    Path("metrics.csv").write_text("step,probe/p_ood,train/loss,val/loss\n1,,9,\n2,0.5,8,3\n4,0.25,7,2\n5,,6,\n")
    last = {"val/loss": 2.0, "probe/p_ood": 0.25}
    assert Reading.of(Path()) == Reading(step=5, last=last, best={"probe/p_ood": 0.5})
    Path("metrics.csv").write_text("step,train/loss\n1,9\n")
    assert Reading.of(Path()).step == 1
    Path("metrics.csv").write_text("")
    assert Reading.of(Path()).step == Reading.of(Path("nowhere")).step == 0


def test_bars_on_a_terminal() -> None:
    (run,) = behaving("[a]")
    begun(run)
    (run.folder / "config.yaml").write_text("trainer: {max_steps: 40}")
    (run.folder / "metrics.csv").write_text("step,val/loss,probe/p_ood\n10,1.25,0.5\n")
    screen = io.StringIO()
    with Display(Console(file=screen, force_terminal=True, width=150, color_system=None), 3) as display:
        display.begun(run, "2")
        display.update()
        display._bars.refresh()
        (_, task) = display._running[run.name]
        assert display._bars.tasks[1].completed == 10
        assert display._bars.tasks[1].id == task
        display.ended(run, "finished")
    told = screen.getvalue()
    assert f"{run.name} on GPU 2" in told
    assert "step 10/40, val/loss 1.250, p_ood 0.500" in told
    assert "1/3" in told


def test_counts_and_table() -> None:
    assert counts(["new", "failed", "new", "finished"]) == "1 finished, 1 failed, 2 new"
    (run,) = behaving("[b]")
    screen = io.StringIO()
    Console(file=screen, width=100).print(table([run], "[title]"))
    assert re.search(rf"{re.escape(run.name)} *│ *new *│ *- *│ *- *│", screen.getvalue())


# --------------------------------------------------------------------------------------------- W&B and clusters


def invocation(*extras: str) -> Call:
    sweep = sweep_of(
        {"a.b": {"values": [1, 0.5]}, "n": {"value": "x y"}}, name="mine", project="p", run_cap=9, metric={"name": "v"}
    )
    return Call(sweep, Path("root"), extras, ("--program", str(Path("stub.py").resolve())))


def test_an_agent_runs_points_that_skip_and_resume(capsys: pytest.CaptureFixture[str]) -> None:
    """W&B's own agent code puts the command together."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    config = wandb_config(invocation("--x", "1"))
    assert {key: config[key] for key in ("method", "program", "name", "run_cap")} == {
        "method": "grid",
        "program": "cli.py",
        "name": "mine",
        "run_cap": 9,
    }
    assert config["parameters"] == {"a.b": {"values": [1, 0.5]}, "n": {"value": "x y"}}
    assert config["command"][:2] == ["${env}", "WANDB_MODE=online"]
    handed = {"a.b": {"value": 0.5}, "n": {"value": "x y"}}
    macros = utils.create_sweep_command_args({"args": handed})
    words = [w for piece in config["command"] for w in macros.get(piece[2:-1], [piece])]
    assert words[3:6] == ["-m", "mini_gpt_pl", "sweep"]
    for _ in range(2):  # an agent may be handed a point again
        main(words[6:])
    (call,) = calls()
    assert call["name"] == "b-0.5"
    assert call["args"] == ["fit", "--a.b=0.5", "--n=x y", "--x", "1", "--run_dir=root/b-0.5"]


def test_creating_a_wandb_sweep(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: dict[str, Any] = {}

    def create(config: dict[str, Any], project: str, entity: str | None) -> str:
        seen.update(config=config, project=project, entity=entity)
        return "abc"

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_ENTITY", raising=False)
    monkeypatch.setattr(wandb, "sweep", create)
    monkeypatch.setattr(wandb, "agent", lambda sweep_id, **settings: seen.update(agent=sweep_id, **settings))
    write_sweep(GOOD, project="p", entity="me")
    run_stub("--launcher", "wandb")
    assert "wandb agent me/p/abc" in capsys.readouterr().out
    assert "agent" not in seen
    assert seen["project"] == "p"
    assert seen["config"]["command"][5:11] == ["sweep", "grid.yaml", "--root", "root", "--point", "${args_json}"]
    run_stub("--launcher", "wandb", "--agent")
    assert seen["agent"] == "abc"
    assert calls() == []


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_wandb_needs_a_server(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    with one_line_error(f"WANDB_MODE is {mode}: unset it"):
        create_wandb(invocation())


def test_wandb_needs_a_login(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **settings: Any) -> str:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb, "sweep", refuse)
    with one_line_error("No API key configured.*wandb login"):
        create_wandb(invocation())


def test_cluster_settings() -> None:
    given_settings = ["partition=gpu", "gpus=1", "time=8:00:00", "cpus=4", "mem=32GB", "timeout_min=60"]
    assert cluster_settings(given_settings) == (
        None,
        {
            "slurm_partition": "gpu",
            "gpus_per_node": 1,
            "slurm_time": "8:00:00",
            "cpus_per_task": 4,
            "slurm_mem": "32GB",
            "timeout_min": 60,
        },
    )
    assert cluster_settings(["cluster=debug"]) == ("debug", {})
    with one_line_error("--slurm gpus: write key=value"):
        cluster_settings(["gpus"])


def test_submitit_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    write_sweep(GOOD)
    with one_line_error("pip install submitit"):
        run_stub("--launcher", "slurm")


def test_a_job_runs_its_point(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("submitit", reason="submitit is not installed")
    first, second = behaving("finish", "diverge")
    begun(first, outcome="finished")
    run_stub("--launcher", "slurm", "--slurm", "cluster=debug", "partition=gpu", "gpus=1")
    assert [call["name"] for call in calls()] == ["behave-diverge"]
    assert second.state == "diverged"
    told = capsys.readouterr().out
    assert "1 to run" in told
    assert re.search(r"job DEBUG_\d+: behave-diverge\n", told)
    run_stub("--launcher", "slurm", "--slurm", "cluster=debug")
    assert len(calls()) == 1


def test_a_cluster_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit", reason="submitit is not installed")
    call = invocation()
    with one_line_error("did not take the jobs .*Unknown argument 'colour'"):
        submit(call, call.runs, ["cluster=debug", "colour=red"])
    with one_line_error("did not take the jobs .*no executor named nowhere|any executor named nowhere"):
        submit(call, call.runs, ["cluster=nowhere"])


# ----------------------------------------------------------------------------------------- the whole, for real


def test_a_real_sweep_broken_off_in_the_middle_ends_as_if_it_had_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = ["${interpreter}", "${program}", "fit", "-c", str(TINY), "${args}"]
    write_sweep({"model.optimizer.init_args.lr": {"values": [0.003, 0.001]}}, command=command)
    args = ["grid.yaml", "--root", "root", "--jobs", "2", "--", "--data.cache_dir", "cache"]
    main(args)
    sweep = read_sweep(Path("grid.yaml"))
    first, second = Call(sweep, Path("root"), tuple(args[-2:])).runs
    assert [first.state, second.state] == ["finished", "finished"]
    assert first.run.config["model"]["optimizer"]["init_args"]["lr"] == 0.003
    whole, log = second.run.metrics, first.log.read_text()
    for record in ("outcome.json", "run.json"):
        (second.folder / record).unlink()
    second.run.checkpoints[6].unlink()
    main(args)
    assert first.log.read_text() == log  # not run again
    assert f"fit --ckpt_path={second.folder}/checkpoints/000003.ckpt" in second.log.read_text()
    assert second.state == "finished"
    pd.testing.assert_frame_equal(second.run.metrics, whole, check_exact=True)
    assert re.search(r"lr-0.001 *│ *finished *│ *6 *│", capsys.readouterr().out)
