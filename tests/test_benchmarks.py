"""The benchmarks run and say what they measured; how fast anything is, no test asserts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
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


def test_overhead_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["overhead", "--steps", "4", "--repeats", "1", "--start", "2", *given()])
    overhead.main()
    assert "ratio:" in capsys.readouterr().out


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
