"""The benchmark of the second task runs, and says what it measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import grokking


def test_it_measures_every_arm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--models", "smoke", "--steps", "4", "--start", "2", "--repeats", "1", "--out", f"{tmp_path}/x.json"]
    monkeypatch.setattr(sys, "argv", ["grokking", *few])
    grokking.main()
    found = json.loads((tmp_path / "x.json").read_text())
    assert set(found["smoke"]["ms_per_step"]) == set(grokking.ARMS) and found["steps"] == 2
    assert all(value > 0 for value in found["smoke"]["ms_per_step"].values())
    assert found["smoke"]["over_plain"]["plain"] == 1.0
    assert "x plain" in capsys.readouterr().out
