"""The trajectory's benchmark runs and says what it measured; how fast anything is, no test asserts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import trajectory


def test_every_part_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ["--blocks", "2", "--width", "8", "--snapshots", "4", "--repeats", "1", "--dtype", "bfloat16"]
    given = ["--folder", str(tmp_path), "--svd", "--out", f"{tmp_path}/x.json", *sizes]
    monkeypatch.setattr(sys, "argv", ["trajectory", *given])
    trajectory.main()
    found = json.loads((tmp_path / "x.json").read_text())
    dim = 2 * 12 * 8**2
    assert found["dim"] == dim and found["dtype"] == "bfloat16"
    read = found["from_files"]
    assert read["bytes"] > (4 + 3 * 2) * dim
    for place in ("from the disk", "from the page cache"):
        assert read[place]["ratio"] == pytest.approx(read[place]["pca_s"] / read[place]["read_s"])
        assert 0 < read[place]["pca_peak_gb"] < 2
    row = found["gram_row"]
    assert row["bytes"] == 4 * dim * 4 and row["error"] < 1e-14 and row["row_ms"] > 0 and row["floor_ms"] > 0
    for place in ("model", "cpu", "disk"):
        assert all(found[place][f"{name}_ms"] > 0 for name in ("row", "handing_over", "directions", "direct_write"))
        assert found[place]["bytes"]["disk"] == 4 * dim * 4
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]  # the snapshots are gone
