"""The benchmarks run and say what they measured; how fast anything is, no test asserts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import cache_dir

from benchmarks import overhead, throughput

TINY = Path(__file__).parent / "tiny.yaml"


def given(*more: str) -> list[str]:
    return ["-c", str(TINY), f"--data.cache_dir={cache_dir()}", *more]


def test_throughput_measures_every_arm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[bool] = []

    def measure(arguments: list[str], steps: int, *, probes: bool, start: int) -> float:
        assert arguments == given() and steps > start
        asked.append(probes)
        return 8.0 if probes else 4.0

    monkeypatch.setattr(throughput, "measure", measure)
    monkeypatch.setattr(throughput, "_WARMUP", 1)
    monkeypatch.setattr(
        sys, "argv", ["throughput", "--steps", "2", "--repeats", "1", "--out", f"{tmp_path}/x.json", *given()]
    )
    throughput.main()
    found = json.loads((tmp_path / "x.json").read_text())
    assert asked == [False, True]
    assert set(found["ms_per_step"]) == {*throughput.PLAIN_ARMS, "lightning", "probes"}
    assert found["probes_over"]["lightning"] == pytest.approx(0.5)
    assert found["tokens_per_second"]["probes"] == pytest.approx(found["positions_per_step"] / 8e-3)
    assert 0 < found["share_computed"] <= 1
    assert all(value > 0 for value in found["ms_per_step"].values())
    assert "with probes over plain" in capsys.readouterr().out


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


@pytest.mark.parametrize("preset", overhead.PRESETS.values())
def test_presets_are_measured_without_a_budget(preset: str, tmp_path: Path) -> None:
    given_preset = yaml.safe_load(Path(preset).read_text())["trainer"]["callbacks"]
    copied = yaml.safe_load(overhead.without_budget(Path(preset), 7, tmp_path).read_text())["trainer"]["callbacks"]
    changed = [new for old, new in zip(given_preset, copied, strict=True) if old != new]
    assert changed == [{"class_path": "callbacks.CostControl", "init_args": {"max_overhead": None, "warmup": 7}}]


def test_the_page_says_what_the_committed_run_measured() -> None:
    root = Path(__file__).parent.parent
    found = json.loads((root / "benchmarks" / "results" / "throughput_h100.json").read_text())
    page = (root / "docs" / "speed.md").read_text()
    for name, milliseconds in found["ms_per_step"].items():
        assert f"{milliseconds:.2f}" in page, name
        assert f"{round(found['tokens_per_second'][name], -3):,.0f}" in page, name
    for ratio in found["probes_over"].values():
        assert f"| {ratio:.2f} |" in page
    assert f"{found['share_computed']:.0%}".replace("%", " %") in page
