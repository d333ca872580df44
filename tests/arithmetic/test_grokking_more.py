"""Tables of what probes logged at milestones, of marker sums, and of a path's shape, against numbers of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import bent_path, record

from mini_gpt_pl.arithmetic.study.contents import CONTENTS, comparison_tables, run_tables
from mini_gpt_pl.arithmetic.study.moments import (
    fourier_runs,
    marker_runs,
    marker_table,
    moment_tables,
    moments,
    product,
    recorded_at,
)
from mini_gpt_pl.arithmetic.study.paths import rank_tables
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection
from mini_gpt_pl.report.contents import MORE, claimed
from mini_gpt_pl.report.sheet import Table
from mini_gpt_pl.runs.folder import Run

GROUPS = ("blocks.0.attn.w_q", "blocks.0.attn.w_k")
WEIGHTS = ParameterSelection(tuple(f"{group}.weight" for group in GROUPS), ((6, 5), (6, 5)), GROUPS)
Series = Callable[[int], float]
STEPS = range(0, 1001, 100)


def run_of(folder: Path, series: Mapping[str, Series], data: Mapping[str, Any], snapshots: int = 11) -> Run:
    """A run folder with metrics at `STEPS` (a series that raises KeyError was not logged there), and a path."""
    folder.mkdir(parents=True)
    recorder = {"class_path": "mini_gpt_pl.callbacks.TrajectoryRecorder", "init_args": {"name": "attention"}}
    told = {"task": "operations", "seed_everything": 1, "trainer": {"callbacks": [recorder]}, "data": dict(data)}
    (folder / "config.yaml").write_text(yaml.safe_dump(told))
    frame = pd.DataFrame({name: [_value(one, step) for step in STEPS] for name, one in series.items()}, index=STEPS)
    frame.rename_axis("step").to_csv(folder / "metrics.csv")
    _, trajectory = record(WEIGHTS, bent_path(snapshots, WEIGHTS.dim))
    trajectory.save(folder / "trajectory.safetensors")
    return Run(folder)


def _value(series: Series, step: int) -> float:
    try:
        return series(step)
    except KeyError:
        return float("nan")


def rises(at: int, low: float = 0.0, high: float = 1.0) -> Series:
    return lambda step: high if step >= at else low


def every(gap: int, value: Series) -> Series:
    def logged(step: int) -> float:
        if step % gap:
            raise KeyError(step)
        return value(step)

    return logged


SETS = {"eval/train_accuracy": rises(300), "eval/test_accuracy": rises(700)}
MODULUS = {"operation": "add", "modulus": 97}


def fourier(prefix: str, largest: Series) -> dict[str, Series]:
    values: dict[str, Series] = {
        "largest": largest,
        "largest_null": lambda s: 0.05,
        "largest_level": lambda s: 0.08,
        "frequency": lambda s: float(5 + s // 500),
        "effective": lambda s: 12.5,
        "effective_null": lambda s: 40.0,
    }
    return {f"fourier/{prefix}/{name}": every(200, value) for name, value in values.items()}


# ------------------------------------------------------------------------------------------------------- moments


def test_records_are_taken_at_or_before_their_moment(tmp_path: Path) -> None:
    run = run_of(tmp_path / "a", {**SETS, "probe": every(400, lambda s: float(s))}, MODULUS)
    assert moments(run) == {"99 % of the training set": 300, "90 % of the test set": 700}
    assert recorded_at(run, "probe") == {
        0: "first, 99 % of the training set",
        400: "90 % of the test set",
        800: "end",
    }


def test_moments_of_marker_sums_are_by_number_of_markers(tmp_path: Path) -> None:
    sets = {"eval/m10_accuracy": rises(2000), "eval/m2_accuracy": rises(500, 0.25, 0.95)}
    run = run_of(tmp_path / "a", sets, {"task": {"classes": 4}})
    assert moments(run) == {"90 % with m = 2": 500, "90 % with m = 10": None}
    (table,) = marker_table(run)
    assert numbers(table)["m = 2"].tolist() == [0.25, 0.95, 0.95] and "Never at 90 %: m = 10." in table.notes
    assert table.frame["step"].tolist() == ["0", "500", "1,000"] and "25.0%" in table.notes[0]
    (over,) = marker_runs([run, run_of(tmp_path / "b", SETS, MODULUS)])
    assert over.frame[["run", "90 %, m = 2", "90 %, m = 10"]].to_numpy().tolist() == [["a", "500", "never"]]
    assert marker_table(run_of(tmp_path / "c", SETS, MODULUS)) == []


# ------------------------------------------------------------------------------------------------------- probes


def test_frequencies_stand_beside_chance_at_each_moment(tmp_path: Path) -> None:
    probes = fourier("additive/embedding", rises(600, 0.05, 0.5)) | fourier("multiplicative/head.mul", rises(9999))
    run = run_of(tmp_path / "a", SETS | probes, MODULUS)
    table = by_name(moment_tables(run))["grokking_fourier"]
    frame = numbers(table)
    assert frame["table"].tolist() == ["E"] * 4 + ["head of mul"] * 4
    assert frame["step"].tolist() == [0, 200, 600, 1000] * 2
    assert frame["share at k"].tolist() == [0.05, 0.05, 0.5, 0.5, 0, 0, 0, 0]
    assert frame["k"].tolist()[:4] == [5, 5, 6, 7] and frame["95 % of chance"].tolist() == [0.08] * 8
    assert "2.08% over 97 residues, 2.11% over the 96 without 0" in table.notes[0]
    (over,) = fourier_runs([run])
    assert over.frame[["characters", "E", "head of mul"]].to_numpy().tolist() == [
        ["additive", "10.0 ×", "-"],
        ["multiplicative", "-", "0.0 ×"],
    ]
    assert product("blocks.1.value_output") == "E W_V' W_O', block 1"


def attention(batch: str) -> dict[str, Series]:
    layer, moved = f"attention/{batch}/layer0/", "routing/pc1/layer0/"
    plain: dict[str, Series] = {
        f"{layer}entropy": lambda s: 2.0 - s / 1000,
        f"{layer}entropy_null": lambda s: 2.3,
        f"{layer}top2": lambda s: s / 1000,
        f"{layer}top2_null": lambda s: 0.2,
        f"attention/{batch}/accuracy": rises(700),
        f"attention/{batch}/accuracy_top2": rises(900),
        f"attention/{batch}/accuracy_top2_null": lambda s: 0.1,
        f"{moved}odd": lambda s: -0.01,
        f"{moved}odd_null": lambda s: 0.02,
        f"{moved}odd_below": lambda s: 0.25,
        f"{moved}even": lambda s: 0.003,
        f"{moved}even_null": lambda s: 0.004,
    }
    return plain


def numbers(table: Table) -> Any:
    """The unformatted cells."""
    assert table.numbers is not None
    return table.numbers


def by_name(tables: list[Table]) -> dict[str, Table]:
    return {table.name: table for table in tables}


def test_attention_stands_beside_even_attention_and_weights_kept_by_chance(tmp_path: Path) -> None:
    found = by_name(moment_tables(run_of(tmp_path / "a", SETS | attention("drawn"), MODULUS)))
    assert set(found) == {"grokking_attention", "grokking_attention_answers", "grokking_routing"}
    shapes, answers, moves = (numbers(found[name]) for name in sorted(found))
    assert shapes["step"].tolist() == answers["step"].tolist() == moves["step"].tolist() == [0, 300, 700, 1000]
    assert shapes["entropy"].tolist() == pytest.approx([2.0, 1.7, 1.3, 1.0])
    assert shapes["top 2"].tolist() == [0, 0.3, 0.7, 1.0] and shapes["top 2, even"].tolist() == [0.2] * 4
    assert answers["all attention"].tolist() == [0, 0, 1, 1] and answers["top 2"].tolist() == [0, 0, 0, 1]
    assert answers["top 2, random"].tolist() == [0.1] * 4
    assert moves.iloc[0][["odd", "odd, random", "above", "even", "even, random"]].tolist() == [
        *(-0.01, 0.02, 0.25),
        *(0.003, 0.004),
    ]


def test_scores_that_share_the_entropys_steps_are_correlated(tmp_path: Path) -> None:
    never = {"eval/train_accuracy": rises(9999), "eval/test_accuracy": rises(9999)}
    run = run_of(tmp_path / "a", never | attention("drawn"), MODULUS)
    found = by_name(moment_tables(run))["grokking_routing_scores"]
    assert set(numbers(found)["entropy of"]) == {"drawn/layer0"} and set(numbers(found)["changes"]) == {9}


# --------------------------------------------------------------------------------------------------------- paths


def test_ranks_are_those_of_dense_centred_pca(tmp_path: Path) -> None:
    table = by_name(rank_tables(run_of(tmp_path / "a", SETS, MODULUS)))["grokking_ranks"]
    frame = numbers(table).set_index("weights")
    weights = bent_path(11, WEIGHTS.dim).numpy()
    for place, label in enumerate(("L0 Q", "L0 K")):
        path = weights[:, WEIGHTS.slices[place]]
        values = np.linalg.svd(path - path.mean(0), compute_uv=False)
        for shares, column in ((values**2, "effective, variances"), (values, "effective, singular values")):
            shares = shares[values > 1e-9] / shares.sum()
            assert frame.loc[label, column] == pytest.approx(float(np.exp(-(shares * np.log(shares)).sum())), rel=1e-4)
        held = np.cumsum(values**2) / (values**2).sum()
        assert frame.loc[label, "r_90"] == int((held < 0.9).sum()) + 1


def test_the_turnover_is_where_a_growing_windows_pc1_turns(tmp_path: Path) -> None:
    run = run_of(tmp_path / "a", SETS, MODULUS, snapshots=30)
    frame = by_name(rank_tables(run))["grokking_turnover"].frame.set_index("weights")
    weights, ends = bent_path(30, WEIGHTS.dim).numpy(), np.unique(np.linspace(5, 30, 20).round().astype(int))
    for place, label in enumerate(("L0 Q", "L0 K")):
        curve = []
        for end in ends:
            path = weights[:end, WEIGHTS.slices[place]]
            energy = np.linalg.svd(path - path.mean(0), compute_uv=False) ** 2
            curve.append(energy[0] / energy.sum())
        low = int(np.argmin(curve))
        falls = np.diff(curve) < 0
        later = range(low + int(np.argmax(curve[low:])), len(falls) - 1)
        turn = next((k for k in later if falls[k] and falls[k + 1]), None)
        assert frame.loc[label, "measured"] == ("none" if turn is None else f"{100 * (ends[turn] - 1):,}")
    assert set(frame.columns) == {"measured", "walk", "decay, ‖d‖", "decay, ‖e‖", "AR(1)"}


def test_every_table_has_a_section(tmp_path: Path) -> None:
    probes = fourier("additive/embedding", rises(600)) | attention("drawn")
    sets = {"eval/m1_accuracy": rises(300)}
    runs = [run_of(tmp_path / "a", SETS | probes, MODULUS), run_of(tmp_path / "b", sets, {"task": {"classes": 4}})]
    of_run = [table.name for run in runs for table in run_tables(run)]
    assert {"grokking_fourier", "grokking_attention", "grokking_markers", "grokking_ranks"} <= set(of_run)
    over = [table.name for table in comparison_tables(runs)]
    assert {"grokking_fourier_runs", "grokking_markers_runs"} <= set(over)
    assert not claimed(CONTENTS.of_run, of_run).get(MORE.anchor)
    assert not claimed(CONTENTS.of_runs, over).get(MORE.anchor)
