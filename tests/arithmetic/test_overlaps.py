"""Overlaps of paths over layers and seeds, against walks that share nothing but the weights they start from."""

from __future__ import annotations

import statistics
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from conftest import flat_selection, normal, one_line_error
from torch import Tensor

from mini_gpt_pl.arithmetic.overlaps import LAYERS, Angles, Overlap, overlaps
from mini_gpt_pl.arithmetic.study.overlaps import main, overlap_sections, overlap_tables
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.directions import subspace
from mini_gpt_pl.geometry.path.rows import IncrementRows
from mini_gpt_pl.geometry.path.snapshots import SnapshotFolder
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector
from mini_gpt_pl.runs.folder import Run

SIDE, STEPS = 40, tuple(range(0, 1001, 50))
KEPT = 0.998
GROUPS = tuple(f"blocks.{layer}.attn.w_{matrix}" for layer in range(2) for matrix in "qv")
WEIGHTS = ParameterSelection(tuple(f"{group}.weight" for group in GROUPS), ((SIDE, SIDE),) * 4, GROUPS)


def weights_of(seed: int, drift: float, start: int, kept: float = KEPT) -> Tensor:
    """Weights (T, D): two blocks that start alike and decay, with innovations of their own and a drift in common."""
    half = WEIGHTS.dim // 2
    theta = [normal(half, seed=start).repeat(2)]
    common = normal(half, seed=99).repeat(2)
    for noise in normal(len(STEPS) - 1, WEIGHTS.dim, seed=seed):
        theta.append(kept**50 * theta[-1] + 0.2 * noise + drift * common)
    return torch.stack(theta)


def run_of(
    folder: Path, seed: int, *, drift: float = 0.0, start: int | None = None, operation: str = "add", kept: float = KEPT
) -> Run:
    """A run folder with the snapshots of such a path."""
    files = SnapshotFolder(folder / "snapshots", WEIGHTS)
    rows, trajectory = IncrementRows(WEIGHTS, torch.float32), Trajectory.empty(WEIGHTS)
    start = 1000 + seed if start is None else start
    for step, values in zip(STEPS, weights_of(seed, drift, start).float(), strict=True):
        new = rows.increment(Vector(values, WEIGHTS))
        trajectory.append(step, rows.dots(new), survival=kept**step)
        rows.push(new)
        files.write(step, new, kept**step)
    files.close()
    trajectory.save(folder / "trajectory.safetensors")
    told = {"task": "operations", "seed_everything": seed, "data": {"operation": operation, "seed": seed}}
    (folder / "config.yaml").write_text(yaml.safe_dump(told))
    return Run(folder)


def kinds(found: list[Overlap]) -> dict[str, list[Overlap]]:
    parts: dict[str, list[Overlap]] = {}
    for one in found:
        parts.setdefault(one.kind, []).append(one)
    return parts


@pytest.fixture(scope="module")
def decaying(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    root = tmp_path_factory.mktemp("decaying")
    return [run_of(root / f"seed{seed}", seed) for seed in (1, 2)] + [
        run_of(root / "other", 3, start=1001, operation="mul")
    ]


def test_paths_that_only_decay_overlap_across_layers_as_their_null_says(decaying: list[Run]) -> None:
    found = kinds(overlaps(decaying, ["one", "two", "other"]))
    assert {kind: len(part) for kind, part in found.items()} == {
        LAYERS: 6,
        "one setting, other initial weights": 4,
        "two settings, same initial weights": 4,
        "two settings, other initial weights": 4,
    }
    for kind in (LAYERS, "two settings, same initial weights"):
        for one in found[kind]:
            assert one.cos_theta0 == pytest.approx(1.0)
            for null in ("decaying_walk", "innovation_walk"):
                assert one.path.overlap == pytest.approx(getattr(one, null), rel=0.1)
            assert one.path.overlap > 100 * one.path.chance
            assert one.rest.cosines[0] < 2 * one.rest.level
    for one in found["one setting, other initial weights"]:
        assert one.path.overlap < 10 * one.path.chance == pytest.approx(10 * 2 / SIDE**2)
        assert one.decaying_walk == pytest.approx(one.path.chance, rel=1.5)


def test_a_motion_in_common_is_left_when_theta0_is_taken_out(tmp_path: Path, decaying: list[Run]) -> None:
    found = overlaps([run_of(tmp_path / "a", 1, drift=0.1)], ["a"])
    assert all(one.rest.overlap > 0.2 and one.rest.cosines[0] > 5 * one.rest.level for one in found)
    alone = overlaps(decaying[:1], ["one"])
    assert statistics.fmean(one.rest.overlap for one in alone) < 0.01


def test_overlaps_are_those_of_dense_centred_pca(decaying: list[Run]) -> None:
    (one, _) = overlaps(decaying[:1], ["one"], k=3, until=600)
    theta = weights_of(1, 0.0, 1001)[: STEPS.index(600) + 1]
    bases = []
    for group in ("blocks.0.attn.w_q", "blocks.1.attn.w_q"):
        part = theta[:, WEIGHTS.slices[GROUPS.index(group)]]
        bases.append(torch.linalg.svd(part - part.mean(0), full_matrices=False)[2][:3])
    cosines = torch.linalg.svdvals(bases[0] @ bases[1].T)
    assert list(one.path.cosines) == pytest.approx(cosines.tolist(), abs=1e-5)
    assert one.path.overlap == pytest.approx(float(cosines.square().mean()), abs=1e-5)


@pytest.mark.parametrize(("ka", "kb", "dim"), [(1, 1, 60), (2, 3, 60), (3, 1, 30)])
def test_the_level_of_the_largest_cosine_is_that_of_random_subspaces(ka: int, kb: int, dim: int) -> None:
    selection, draw = flat_selection(dim), torch.Generator().manual_seed(0)
    fixed, levels = subspace.isotropic(selection, ka, draw), []
    for _ in range(2000):
        found = Angles.between(fixed, subspace.isotropic(selection, kb, draw))
        levels.append(found.cosines[0])
    assert found.level == pytest.approx(float(torch.tensor(levels).quantile(0.95)), rel=0.04)


def test_the_command_writes_means_and_every_pair(
    decaying: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*(str(run.path) for run in decaying), "--k", "1", "--out", str(tmp_path / "out")])
    assert "| two layers of one run | L0 Q and L1 Q | 3 | 1.000 |" in capsys.readouterr().out
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == {f"grokking_overlap{part}.{kind}" for part in ("s", "_pairs") for kind in ("csv", "md")}
    pairs = pd.read_csv(tmp_path / "out" / "grokking_overlap_pairs.csv")
    means = pd.read_csv(tmp_path / "out" / "grokking_overlaps.csv")
    assert len(pairs) == 18 and int(means["pairs"].sum()) == 18
    chosen = pairs[(pairs["paths"] == LAYERS) & (pairs["weights"] == "L0 Q and L1 Q")]
    assert float(means.iloc[0]["overlap"]) == pytest.approx(float(chosen["overlap"].mean()))


def test_runs_without_decay_stay_out_of_a_reports_means(decaying: list[Run], tmp_path: Path) -> None:
    free = [run_of(tmp_path / f"free{seed}", seed, kept=1.0) for seed in (1, 2)]
    alone, mixed = (
        int(overlap_sections(runs)[0].frame["pairs"].astype(int).sum()) for runs in (decaying, [*decaying, *free])
    )
    assert alone == mixed == 18
    assert int(overlap_sections(free)[0].frame["pairs"].astype(int).sum()) == 8


def test_what_cannot_be_compared_is_said_in_one_line(decaying: list[Run], tmp_path: Path) -> None:
    bare = run_of(tmp_path / "kept", 1)
    for file in bare.snapshot_folder.iterdir():
        file.unlink()
    with one_line_error("has no snapshots, which the directions of a path are rebuilt from"):
        overlap_tables([decaying[0], bare])
    assert overlap_sections([decaying[0], bare]) == []
    with one_line_error("no recorded group matches 'embedding'"):
        overlap_tables(decaying, pattern="embedding")
    with one_line_error("up to step 50: a path takes 3"):
        overlap_tables(decaying, until=50)
    with pytest.raises(UserError, match="give 1 direction or more"):
        overlap_tables(decaying, 0)
