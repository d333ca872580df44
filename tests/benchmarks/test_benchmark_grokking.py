"""The benchmark of the second task runs, and says what it measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

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


def test_seeds_at_once_are_clipped_as_one_by_one() -> None:
    shapes = [(4, 3), (5,)]
    weights = [torch.zeros(2, *shape, requires_grad=True) for shape in shapes]
    for weight in weights:
        drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.dim()))
        weight.grad = drawn * torch.tensor([1.0, 0.01]).view(2, *[1] * (weight.dim() - 1))  # the second below the limit
    expected: list[list[torch.Tensor | None]] = []
    for seed in range(2):
        alone = [torch.zeros(shape, requires_grad=True) for shape in shapes]
        for one, gradient in zip(alone, [weight.grad for weight in weights], strict=True):
            assert gradient is not None
            one.grad = gradient[seed].clone()
        torch.nn.utils.clip_grad_norm_(alone, 1.0)
        expected.append([one.grad for one in alone])
    grokking._clip_each(weights)
    for seed in range(2):
        for clipped, weight in zip(expected[seed], weights, strict=True):
            assert weight.grad is not None
            torch.testing.assert_close(weight.grad[seed], clipped)
