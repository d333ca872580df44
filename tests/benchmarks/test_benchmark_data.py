"""The benchmarks of data and of start-up run and say what they measured; how fast anything is, no test asserts."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path

import pytest
from helpers import cache_dir

from benchmarks import data, startup

TINY = Path(__file__).parents[1] / "tiny.yaml"


def run(script: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, dict[str, float]]:
    given = ["-c", str(TINY), f"--data.cache_dir={cache_dir()}"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *options, "--out", f"{tmp_path}/x.json", *given])
    script.main()  # type: ignore[attr-defined]
    found: dict[str, dict[str, float]] = json.loads((tmp_path / "x.json").read_text())
    return found


def test_data_measures_every_arm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--workers", "1", "--batches", "4", "--repeats", "1", "--steps", "30", "--consumed", "1000"]
    found = run(data, tmp_path, monkeypatch, *options)
    assert set(found["tokens_per_second"]) == {"one thread", "threads", "processes", "tokenize", "prepare"}
    rates = found["positions_per_second"]
    assert set(rates) == {"one by one", "0 workers", "1 worker"}
    assert found["times_consumed"]["0 workers"] == pytest.approx(rates["0 workers"] / 1000)
    tokens = found["tokens_per_second"]
    assert found["prepare_over"]["threads"] == pytest.approx(tokens["prepare"] / tokens["threads"])
    assert 0 < float(found["data_wait"]) < 1  # type: ignore[arg-type]
    assert "waiting for data" in capsys.readouterr().out


def test_startup_cuts_the_whole_into_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = startup.measure
    once = cache(lambda arguments: measure(list(arguments)))  # a process that starts takes seconds
    monkeypatch.setattr(startup, "HELPS", ("--help",))
    monkeypatch.setattr(startup, "LIBRARIES", ("json",))
    monkeypatch.setattr(startup, "measure", lambda arguments: once(tuple(arguments)))
    found = run(startup, tmp_path, monkeypatch, "--repeats", "1")
    assert tuple(found["cached"]) == startup.PARTS
    assert all(seconds >= 0 for seconds in found["cached"].values())
    assert found["cached_total"] == pytest.approx(sum(found["cached"].values()))
    assert set(found["help"]) == {"--help"}
    assert 0 < found["libraries"]["json"] < found["cached"]["imports"]
    assert "first_step" in capsys.readouterr().out
