"""A final point from few directions: closed forms on small paths, and a whole run rebuilt."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import one_line_error
from torch import Tensor

from mini_gpt_pl import main as cli
from mini_gpt_pl.arithmetic import reconstruction
from mini_gpt_pl.arithmetic.reconstruction import fewest_directions, main, rebuild, restore
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.training import cli as trainer_cli

CONFIGS = Path(cli.__file__).resolve().parents[1] / "configs" / "grokking"

TINY = r"""
model: {size: {d_model: 16, d_ff: 32}}
data: {modulus: 11, batch_size: 32}
trainer:
  max_steps: 40
  callbacks:
    - class_path: mini_gpt_pl.arithmetic.milestones.Evaluation
      init_args: {schedule: {every: 5, steps: [1]}}
    - class_path: mini_gpt_pl.callbacks.TrajectoryRecorder
      init_args: {pattern: '(?P<group>embedding|head)|.*', name: all, schedule: {every: 5}}
"""


def path(steps: int = 12, dim: int = 40, seed: int = 0) -> Tensor:
    """Basis rows theta_0, d_1, ..., d_T."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(steps + 1, dim, generator=draw, dtype=torch.float64)


def test_all_directions_rebuild_the_end_and_few_hold_the_largest_share() -> None:
    basis = path()
    gram, drift = basis @ basis.T, basis[1:].sum(0)
    found = list(reconstruction.rebuilt(reconstruction.principal(gram, 20) @ basis, drift))
    assert [part.k for part in found] == list(range(1, 13))
    torch.testing.assert_close(found[-1].drift, drift)
    assert found[-1].share == pytest.approx(1.0)
    drifts = basis[1:].cumsum(0)
    directions = torch.linalg.svd(drifts, full_matrices=False)[2]
    for part in found:
        wanted = directions[: part.k].T @ (directions[: part.k] @ drift)
        torch.testing.assert_close(part.drift, wanted, rtol=1e-6, atol=1e-8)


def test_directions_of_the_first_part_do_not_know_the_end() -> None:
    basis = path()
    gram, drift = basis @ basis.T, basis[1:].sum(0)
    early = reconstruction.principal(gram, 20, until=6)
    assert len(early) == 6 and not early[:, 7:].any()
    share = list(reconstruction.rebuilt(early @ basis, drift))[-1].share
    first = basis[1:7]
    wanted = torch.linalg.lstsq(first.T, drift[:, None]).solution
    assert share == pytest.approx(float((first.T @ wanted).square().sum() / drift.square().sum()))
    assert share < 0.9


def test_random_directions_of_the_span_hold_an_even_share_and_all_of_them_everything() -> None:
    basis = path(steps=10)
    gram, drift = basis @ basis.T, basis[1:].sum(0)
    shares = [
        [p.share for p in reconstruction.rebuilt(reconstruction.in_span(gram, 10, draw) @ basis, drift)]
        for draw in (torch.Generator().manual_seed(seed) for seed in range(300))
    ]
    mean = torch.tensor(shares).mean(0)
    assert mean[3] == pytest.approx(0.4, abs=0.04) and mean[-1] == pytest.approx(1.0)


def test_a_shortened_drift_holds_the_share_that_is_asked_for() -> None:
    drift = torch.randn(50, generator=torch.Generator().manual_seed(0))
    (found,) = reconstruction.shortened(drift, [0.25])
    torch.testing.assert_close(found.drift, drift / 2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    root = tmp_path_factory.mktemp("rebuilt")
    (root / "tiny.yaml").write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_cli, "draw_all", lambda run: [])
        for seed in (1, 2):
            cli.run(
                f"fit -c {CONFIGS}/multitask.yaml -c {CONFIGS}/multitask_small.yaml -c {root}/tiny.yaml "
                f"--run_dir {root}/{seed} --seed_everything {seed}"
            )
        cli.run(f"fit -c {CONFIGS}/smoke.yaml -c {CONFIGS}/tiny.yaml --run_dir {root}/few")
    return [Run(root / name) for name in ("1", "2", "few")]


def test_a_run_is_rebuilt_from_its_folder(runs: list[Run]) -> None:
    first, second, _ = runs
    assert first.trajectory.steps == list(range(0, 41, 5))
    table = rebuild(first, second, k=8)
    assert set(table["basis"]) == {"whole", "until_20", "until_35", "other", "span", "random", "shortened", "end"}

    def at(basis: str, k: int, column: str) -> float:
        (found,) = table[(table["basis"] == basis) & (table["k"] == k)][column].tolist()
        return float(found)

    assert at("whole", 8, "share") == pytest.approx(1.0, abs=1e-6)
    for name in ("train_accuracy", "test_loss", "test_mul_loss"):
        assert at("whole", 8, name) == pytest.approx(first.last(f"eval/{name}"), rel=1e-3)
    assert at("other", 8, "share") < at("until_35", 7, "share") < 1 and at("random", 8, "share") < 0.02
    assert at("shortened", 2, "share") == pytest.approx(at("whole", 2, "share"))
    assert at("shortened", 2, "test_loss") != at("whole", 2, "test_loss")


def test_the_command_prints_and_writes_it(runs: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(runs[0].path), "--k", "2", "--out", str(tmp_path / "table.csv")])
    told = capsys.readouterr().out
    assert "shortened" in told and "k*, directions from which on 98%" in told
    fewest = pd.read_csv(tmp_path / "table_fewest.csv")
    assert fewest["basis"].tolist() == ["whole", "until_20", "until_35", "span", "random", "shortened"]
    assert fewest["k"].tolist() == [2] * 6
    assert (tmp_path / "table.csv").read_text().startswith("basis,k,share,weight_norm,train_loss")


def test_fewest_directions_are_counted_against_the_end() -> None:
    scores = {"whole": [0.2, 0.6, 0.5, 0.6], "random": [0.1, 0.1, 0.1, 0.1], "span": [0.6, 0.6, 0.6, 0.6]}
    rows = [(name, k, value) for name, values in scores.items() for k, value in enumerate(values, 1)]
    found = pd.DataFrame([*rows, ("end", 9, 0.6)], columns=["basis", "k", "test_accuracy"])
    assert fewest_directions(found)["test_accuracy"].tolist() == [4, pd.NA, 1]
    assert fewest_directions(found, 0.8)["test_accuracy"].tolist() == [2, pd.NA, 1]
    assert fewest_directions(found, 0.1)["test_accuracy"].tolist() == [1, 1, 1]


def test_what_cannot_be_rebuilt_is_said_in_one_line(runs: list[Run]) -> None:
    with one_line_error("not all: record all of them"):
        rebuild(runs[2])
    with one_line_error("give --k 1 or more"):
        rebuild(runs[0], k=0)
    with one_line_error("there is no run folder nowhere"):
        rebuild(Run(Path("nowhere")))
    with one_line_error("there is no folder missing"):
        main([str(runs[0].path), "--out", "missing/table.csv"])


def test_a_restored_run_starts_from_its_own_weights_and_split(runs: list[Run]) -> None:
    module, data = restore(runs[0])
    square = float(torch.cat([p.detach().double().flatten() for p in module.parameters()]).square().sum())
    assert square == pytest.approx(float(runs[0].trajectory.gram()[0, 0]), rel=1e-6)
    assert data.sets["train"].labels.shape == (50, 2)
