"""The benchmarks of measurements and evaluations run and say what they measured; how fast, no test asserts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from test_benchmarks import given

from benchmarks import evaluation, fisher
from mini_gpt_pl.geometry.directions.axes import Axes
from mini_gpt_pl.stories.data.datamodule import EVALUATION_SETS


def test_fisher_measures_every_arm_and_agrees_with_its_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("curvlinops")
    few = ["--passes", "3", "--directions", "1", "2", "--peer_directions", "2", "--columns", "2", "--snapshots", "4"]
    monkeypatch.setattr(sys, "argv", ["fisher", *few, "--repeats", "1", "--out", f"{tmp_path}/x.json", *given()])
    fisher.main()
    found = json.loads((tmp_path / "x.json").read_text())
    arms = {"passes", "ours, 1", "ours, 2", "ours, 2, spectrum", "curvlinops, 2", "directions"}
    assert set(found["ms"]) == arms and all(value > 0 for value in found["ms"].values())
    assert found["over_passes"]["ours, 2"] == pytest.approx(found["ms"]["ours, 2"] / found["ms"]["passes"])
    assert all(value < 1e-4 for value in found["difference_from_curvlinops"]["2"].values())
    assert "of the passes" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["per_sample", "monte_carlo"])
def test_other_kinds_of_fisher_are_measured_without_a_peer(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ["--passes", "2", "--directions", "1", "--snapshots", "3", "--repeats", "1", "--kind", kind]
    monkeypatch.setattr(sys, "argv", ["fisher", *few, "--out", f"{tmp_path}/x.json", *given()])
    fisher.main()
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["kind"] == kind and not found["difference_from_curvlinops"]
    assert not any(name.startswith("curvlinops") for name in found["ms"])


def test_the_measured_quotients_are_those_of_the_losses() -> None:
    case = fisher.Case(given(), 2)
    axes = case.directions(2)
    weights = case.selection.parameters(case.module)
    losses = [fisher.BatchLoss(case.module)(batch._asdict()) for batch in case.batches]
    flat = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]) for loss in losses]
    unit = axes.rows / axes.rows.norm(dim=1, keepdim=True)
    expected = (torch.stack(flat) @ unit.T).square().mean(0).tolist()
    assert isinstance(axes, Axes) and case.measure(axes) == pytest.approx(expected, rel=1e-3)
    assert case.measure_in_float32(axes, 2) == pytest.approx(expected, rel=1e-3)


def test_evaluation_says_what_its_parts_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluation", "--repeats", "2", "--out", f"{tmp_path}/x.json", *given()])
    evaluation.main()
    found = json.loads((tmp_path / "x.json").read_text())
    assert set(found["ms"]) == {"evaluation", "lm", "probe_in", "probe_ood", "steps", "floor"}
    assert all(len(values) == 2 and min(values) > 0 for values in found["repeats_ms"].values())
    for whole, *parts in zip(*(found["repeats_ms"][name] for name in ("evaluation", *EVALUATION_SETS)), strict=True):
        assert sum(parts) < whole
    assert found["examples"] == 4 + 8 + 8 and 0 < found["computed"] <= found["positions"] == 20 * 64
    assert "Lightning's share" in capsys.readouterr().out
