"""The scale model runs at a small size and says what follows from what; how fast anything is, no test asserts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import scale

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")


def test_everything_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--sizes", "32", "48", "--layers", "2", "--rows", "2", "3", "--sketch", "16", "--megabytes", "1"]
    there = ["--folder", str(tmp_path), "--out", str(tmp_path / "x.json")]
    monkeypatch.setattr(sys, "argv", ["scale", *small, *there])
    scale.main()
    found = json.loads((tmp_path / "x.json").read_text())
    assert [part["values"] for part in found["simulations"]] == [24 * 32**2, 24 * 48**2]
    assert all(value > 0 for part in found["simulations"] for value in part.values())
    first, second = found["predicted_over_measured"]
    calibrated = {"increment", "product", "sketch", "directions", "file"}
    assert [first[name] for name in calibrated] == pytest.approx([1.0] * 5)
    assert second.keys() == calibrated | {"snapshot", "sketched"}
    shared = found["two_ranks"]
    assert shared["row_bytes"] == shared["whole_bytes"] / 2
    assert shared["sketched_bytes"] == shared["predicted_sketched_bytes"]
    # Rows of 1, 2 and 3 products for 2 groups, exact once and sketched twice (the directions need them as well).
    assert shared["values_sent"] == 3 * 2 * (1 + 2 + 3)
    cases = [(part["ranks"], part["snapshots"]) for part in found["targets"]]
    assert cases == [(8, 51), (8, 500), (64, 51), (64, 500)]
    for part in found["targets"]:
        assert part["values"] == 32 * 12 * 4096**2 and part["local"] == part["values"] // part["ranks"]
        assert part["exact_bytes"]["disk"] == 4 * part["local"] * part["snapshots"]
    assert list(tmp_path.iterdir()) == [tmp_path / "x.json"]
    assert capsys.readouterr().out.count("GB |") > 4


def test_predictions_are_linear_in_values_and_rows() -> None:
    costs = scale.Costs(increment=1.0, product=2.0, sketch=3.0, directions=4.0, file=5.0)
    found = scale.predict(costs, 10.0, 7)
    assert found["snapshot"] == 10 + 8 * 20 and found["sketched"] == 70 and found["file"] == 50
    machine = {"to_host": 4.0, "disk": 2.0, "all_reduce": 0.5}
    place = {"values": 80, "local": 10, "groups": 2}
    seen = scale.target(costs, machine, place, ranks=8, snapshots=8, sketch=16)
    assert seen["exact_seconds"] == {"device": 170.5, "to_host": 10.0, "host": 80.0, "disk": 160.0, "file": 20.0}
    assert seen["sketch_seconds"] == {"sketch": 30.0, "directions": 40.0, "all_reduce": 1.0, "file": 128.0}
    assert seen["exact_bytes"] == {"memory": 360, "memory_bf16": 220, "disk": 320, "gram": 1024}
    assert seen["sketch_bytes"]["memory"] == 8 * 2 * 16 * 8 + 3 * 40 and seen["cosine_error"] == 1 / 16


def test_the_page_has_the_numbers_of_the_committed_result(tmp_path: Path) -> None:
    page, result = ROOT / "docs/concepts/scale.md", ROOT / "benchmarks/results/scale.json"
    copy = tmp_path / "page.md"
    copy.write_text(page.read_text())
    scale.show(result, copy)
    assert copy.read_text() == page.read_text() and "| 64 | 500 |" in page.read_text()
