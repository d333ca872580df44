"""The benchmark of commutators runs, its methods agree, and it says what it measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from test_benchmarks import given

from benchmarks import commutator


def test_commutators_are_measured_every_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--size", "3", "--repeats", "1", "--out", f"{tmp_path}/x.json"]
    monkeypatch.setattr(sys, "argv", ["commutator", *few, *given()])
    commutator.main()
    found = json.loads((tmp_path / "x.json").read_text())
    arms = {f"{way}, {dtype}" for way in commutator.WAYS for dtype in ("float64", "float32")} | {commutator.SUBTRACTED}
    assert set(found["defect"]) == arms and set(found["ms"]) == arms | {commutator.GRADIENT}
    assert all(value > 0 for value in found["ms"].values()) and found["samples"] == 3
    assert found["over_exact"]["differences, float64"] == pytest.approx(1.0, abs=1e-6)
    assert found["over_exact"]["hessian, float32"] == pytest.approx(1.0, abs=1e-3)
    assert "of the exact" in capsys.readouterr().out
