"""The benchmarks run and say what they measured; how fast anything is, no test asserts."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import cache_dir

from benchmarks import overhead, page, throughput

TINY = Path(__file__).parents[1] / "tiny.yaml"


def given(*more: str) -> list[str]:
    return ["-c", str(TINY), f"--data.cache_dir={cache_dir()}", *more]


def test_throughput_measures_every_arm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def timed_run(arguments: list[str], steps: int, start: int) -> overhead.Timing:
        assert arguments[:-2] == given() and (steps, start) == (6, 4)
        asked.append(Path(arguments[-1]).stem)
        return overhead.Timing(4.0 if asked[-1] == "off" else 8.0, {"fraction": 0.25})

    monkeypatch.setattr(overhead, "timed_run", timed_run)
    monkeypatch.setattr(throughput, "_WARMUP", 1)
    few = ["--steps", "2", "--start", "4", "--until", "6", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["throughput", *few, "--out", f"{tmp_path}/x.json", *given()])
    throughput.main()
    found = json.loads((tmp_path / "x.json").read_text())
    assert asked == ["off", "standard", "every_step"]
    assert set(found["ms_per_step"]) == {*throughput.PLAIN_ARMS, "none", "standard", "every_step"}
    assert found["compared"] == "standard" and found["over"]["none"] == pytest.approx(0.5)
    assert found["overhead"]["over_none"] == {"standard": 1.0, "every_step": 1.0}
    assert found["tokens_per_second"]["standard"] == pytest.approx(found["positions_per_step"] / 8e-3)
    assert 0 < found["share_computed"] <= 1
    assert all(value > 0 for value in found["ms_per_step"].values())
    assert "standard over plain" in capsys.readouterr().out
    assert "+100.0%" in page.throughput(found)


def test_the_arms_train_the_same_loss() -> None:
    """Positions with a target are what counts in each of ours, whatever it computes."""
    model, data, _ = throughput.configured(given())
    batch = next(iter(data.train_dataloader()))
    losses = []
    for name in ("plain", "packed"):
        torch.manual_seed(0)
        losses.append(float(throughput.arm(name, model)[1](batch._replace(lm_count=(batch.targets != -100).sum()))))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_overhead_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--steps", "4", "--repeats", "1", "--start", "2", "--out", f"{tmp_path}/x.json"]
    monkeypatch.setattr(sys, "argv", ["overhead", *few, "--presets", "mine=configs/probes/economy.yaml", *given()])
    overhead.main()
    found = json.loads((tmp_path / "x.json").read_text())
    assert set(found["ms_per_step"]) == {"none", "mine"} and found["steps"] == 2
    assert found["over_none"]["mine"] == pytest.approx(found["ms_per_step"]["mine"] / found["ms_per_step"]["none"] - 1)
    assert set(found["shares"]["mine"]) == {"TrajectoryRecorder", "GradientAlignment", "fraction"}
    assert "mine over none" in capsys.readouterr().out


def test_paired_ratios_are_of_runs_side_by_side() -> None:
    """A machine that slows down by half between two pairs changes no ratio."""
    run = overhead.Timing
    none = [run(100.0, {}), run(200.0, {}), run(110.0, {}), run(220.0, {})]
    timings = {"none": none, "a": [run(101.0, {}), run(111.1, {})], "b": [run(220.0, {}), run(242.0, {})]}
    found = overhead.report(timings, paired=True)
    assert found["over_none"] == pytest.approx({"a": 0.01, "b": 0.1})
    assert found["pairs"]["b"] == pytest.approx([0.1, 0.1])
    assert "+1.0% to +1.0%" not in page.overhead(found) and "+1.0%" in page.overhead(found)
    found["pairs"]["a"] = [0.03, -0.01]
    assert "-1.0% to +3.0%" in page.overhead(found)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores are given out where the system can")
@pytest.mark.parametrize("count", [1, 2])
def test_runs_at_once_take_turns_on_the_cores(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[int]] = {}

    def timed_run(arguments: list[str], steps: int, start: int) -> overhead.Timing:
        seen[arguments[0]] = os.sched_getaffinity(0)
        return overhead.Timing(float(len(arguments)), {})

    monkeypatch.setattr(overhead, "timed_run", timed_run)
    before, runs = os.sched_getaffinity(0), [["a"], ["b", "c"]][:count]
    turns = []
    for turn in range(2):
        assert [run.ms_per_step for run in overhead._at_once(runs, 4, 2, turn)] == [1.0, 2.0][:count]
        turns.append(dict(seen))
    assert os.sched_getaffinity(0) == before
    if count == 1 or len(before) == 1:
        assert turns[0] == turns[1] == {run[0]: before for run in runs}
    else:
        assert turns[0]["a"] | turns[0]["b"] == before and not turns[0]["a"] & turns[0]["b"]
        assert len(before) % 2 or turns[1] == {"a": turns[0]["b"], "b": turns[0]["a"]}


@pytest.mark.parametrize("preset", [preset.partition("=")[2] for preset in overhead.PRESETS])
def test_presets_are_measured_without_a_budget(preset: str, tmp_path: Path) -> None:
    given_preset = yaml.safe_load(Path(preset).read_text())["trainer"]["callbacks"]
    copied = yaml.safe_load(overhead.without_budget(Path(preset), 7, tmp_path).read_text())["trainer"]["callbacks"]
    changed = [new for old, new in zip(given_preset, copied, strict=True) if old != new]
    assert changed == [
        {"class_path": "mini_gpt_pl.callbacks.CostControl", "init_args": {"max_overhead": None, "warmup": 7}}
    ]


def test_the_page_says_what_the_committed_runs_measured() -> None:
    text = page.PAGE.read_text()
    assert page.fill(text) == text, "run python -m benchmarks.page"
    with pytest.raises(ValueError, match="throughput_h100"):
        page.fill(text.replace("<!-- throughput_h100 -->", ""))


SAMPLES: dict[str, dict[str, Any]] = {
    "overhead_cpu": {
        "ms_per_step": {"none": 20.0, "standard": 20.2},
        "over_none": {"standard": 0.01},
        "shares": {"standard": {"TrajectoryRecorder": 0.004, "fraction": 0.01}},
    },
    "fisher_h100": {
        "ms": {"passes": 1000.0, "ours, 8": 1040.0},
        "over_passes": {"passes": 1.0, "ours, 8": 1.04},
        "difference_from_curvlinops": {"8": {"float32": 1e-6}},
        "passes": 32,
    },
    "evaluation_h100": {"ms": {"evaluation": 200.0}, "examples": 4000, "lightning_share": 0.1},
    "data_h100": {
        "tokens_per_second": {"threads": 2e6, "prepare": 1e6},
        "positions_per_second": {"4 workers": 5e6},
        "consumed": 1.25e6,
        "data_wait": 0.004,
        "cores": 16,
    },
    "startup_h100": {
        "first_run": {"imports": 3.0},
        "cached": {"imports": 2.0},
        "help": {"--help": 0.2},
        "libraries": {"torch": 1.5},
    },
    "trajectory_cpu": {
        "snapshots": 51,
        "dim": 1000,
        "gram_row": {"row_ms": 2.0, "floor_ms": 1.7},
        **{place: {"handing_over_ms": 0.5, "direct_write_ms": 90.0} for place in ("model", "cpu", "disk")},
        "from_gram_file_ms": 1.5,
    },
    "grokking_cpu": {
        "smoke": {
            "ms_per_step": {"plain": 8.0, "stacked": 16.0, "lightning": 8.4, "watched": 9.6},
            "over_plain": {"plain": 1.0, "stacked": 2.0, "lightning": 1.05, "watched": 1.2},
        }
    },
    "ranks_h200": {
        "ms_per_step": {"one": 24.0, "two": 25.0},
        "tokens_per_second": {"one": 1e6, "two": 1.92e6},
        "times": {"two": 1.92},
        "device": "2 x GPU",
        "gradient_bytes": 204e6,
        "reduce_alone": {"whole_ms": 0.73},
    },
}
SAID = {
    "overhead_cpu": ["+1.0%", "0.40%", "20.20"],
    "fisher_h100": ["1.040", "1.0e-06"],
    "evaluation_h100": ["200", "10.0%"],
    "data_h100": ["0.50 of tiktoken", "4.0 of what training takes", "0.40%"],
    "startup_h100": ["3.0", "2.0", "0.2 s", "`torch` 1.5 s"],
    "trajectory_cpu": ["2.00 ms", "1.70 ms", "0.50 ms", "1.5 ms"],
    "grokking_cpu": ["16.0 (2.00)", "9.6 (1.20)"],
    "ranks_h200": ["1,920,000", "1.92", "2 x GPU", "204 MB; their sum over both by itself: 0.73 ms"],
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_table_says_what_its_result_holds(name: str) -> None:
    found = page.TABLES[name](SAMPLES[name])
    assert all(number in found for number in SAID[name]), found
    rows = [line for line in found.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1 and len(rows) > 2
