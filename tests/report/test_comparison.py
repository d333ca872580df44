"""Tables over several runs: who belongs with whom, and the numbers that only several runs have."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from conftest import one_line_error
from hypothesis import given
from hypothesis import strategies as st
from report_runs import (
    ADAMW,
    DECAY,
    components,
    config,
    learning_curve,
    numbers,
    path_of,
    ratios,
    walk_path,
    write_run,
    written,
)

from mini_gpt_pl.report.comparison import grouped, require_comparable
from mini_gpt_pl.report.families import names
from mini_gpt_pl.report.settings import plain
from mini_gpt_pl.report.sheet import Table
from mini_gpt_pl.report.statistics import t_interval
from mini_gpt_pl.report.subject import Subject
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.study.beta2 import direction, spearman
from mini_gpt_pl.stories.study.contents import comparison_tables
from mini_gpt_pl.stories.study.optimizers import common_window
from mini_gpt_pl.stories.study.runs import main_run, one_beta2

STEPS = [0, 200, 400, *range(600, 2001, 100), 3000, 4000]
SGD = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.05}
CURVE = learning_curve({1000: (3.0, 0.2), 2000: (2.0, 0.6), 4000: (1.5, 0.4)})


def tables_of(*runs: Run) -> dict[str, Table]:
    return {table.name: table for table in comparison_tables(runs, bootstrap=5)}


def adamw(folder: Path, beta2: float = 0.95, seed: int = 42, path: int = 0, curve: str = CURVE) -> Run:
    settings = {**ADAMW, "betas": [0.9, beta2]}
    return write_run(folder, STEPS, path_of(STEPS, seed=path), config(settings=settings, seed=seed), curve)


def sgd(folder: Path, curve: str = CURVE) -> Run:
    return write_run(folder, STEPS, path_of(STEPS, seed=9), config("torch.optim.SGD", SGD), curve)


# --------------------------------------------------------------------------------------------------- who belongs


def test_one_run_is_no_comparison(tmp_path: Path) -> None:
    assert comparison_tables([adamw(tmp_path)]) == []


def test_runs_are_put_with_those_that_differ_in_one_thing(tmp_path: Path) -> None:
    runs = [adamw(tmp_path / f"{beta2}_{seed}", beta2, seed) for beta2 in (0.99, 0.9) for seed in (1, 2)]
    found = tables_of(*runs)
    assert {"beta2_outcome", "beta2_geometry", "seeds", "seeds_2"} <= set(found)
    assert not any(name.startswith("table") for name in found)  # one optimizer, nothing reheated
    paths = [Subject.of(run) for run in runs]
    names = [[path.path.name for path in part] for part in grouped(paths, ("seed",))]
    assert names == [["0.99_1", "0.99_2"], ["0.9_1", "0.9_2"]]
    assert grouped(paths, ()) == []


def test_a_lone_setting_joins_no_group(tmp_path: Path) -> None:
    other = write_run(tmp_path / "b", STEPS, None, config(seed=2, batch_size=32), CURVE)
    assert set(tables_of(adamw(tmp_path / "a"), other)) == {"runs", "runs_geometry"}
    shown = tables_of(adamw(tmp_path / "a"), other)["runs"].frame
    assert shown["sequences a step"].to_list() == ["128", "64"]


def test_optimizers_may_differ_in_length_and_in_decay(tmp_path: Path) -> None:
    no_decay = config(settings={**ADAMW, "weight_decay": 0.0}, steps=4000)
    no_decay["trainer"]["max_steps"] = 2000
    found = tables_of(adamw(tmp_path / "a"), write_run(tmp_path / "b", STEPS, None, no_decay, CURVE))
    assert found["table9_optimizers"].frame["optimizer"].to_list() == [
        "AdamW, lr 1e-3, decay 0.5, β₂ 0.95",
        "AdamW, lr 1e-3, decay 0, β₂ 0.95",
    ]
    assert found["runs"].frame["steps"].to_list() == ["4,000", "4,000"]  # past what one of them was to take
    assert "runs_geometry" not in found  # the table of whole runs says the same


def test_runs_that_do_not_belong_together_are_one_line(tmp_path: Path) -> None:
    first = adamw(tmp_path / "a")
    with one_line_error("a and .*b/.*/a are the same folder"):
        (tmp_path / "b").mkdir()
        require_comparable([first, Run(tmp_path / "b" / ".." / "a")])
    small = config()
    small["model"]["size"] = "16m"
    with one_line_error("a and .*small cannot be compared: model 8 blocks.* and 4 blocks"):
        require_comparable([first, write_run(tmp_path / "small", STEPS, None, small)])
    with one_line_error("tokenizer gpt2 and builtin"):
        require_comparable([first, write_run(tmp_path / "words", STEPS, None, config(tokenizer="builtin"))])
    other = adamw(tmp_path / "c")
    other.trajectory.fingerprint = "another"
    with one_line_error("recorders select different weights"):
        require_comparable([first, other])
    (tmp_path / "c" / "trajectory.safetensors").unlink()
    with one_line_error("c has no trajectory"):
        require_comparable([first, Run(tmp_path / "c")])


def test_one_rank_file_under_two_paths_is_one_tokenizer(tmp_path: Path) -> None:
    files = config(tokenizer="data/gpt2.tiktoken")
    require_comparable([adamw(tmp_path / "a"), write_run(tmp_path / "b", STEPS, None, files)])


# ----------------------------------------------------------------------------------------------- optimizers, windows


def test_the_standard_window_is_measured_as_published(tmp_path: Path) -> None:
    table = tables_of(adamw(tmp_path / "adamw"), sgd(tmp_path / "sgd"))["table9_optimizers"]
    found = numbers(table, "run")
    for run, seed in (("adamw", 0), ("sgd", 9)):
        path = path_of(STEPS, seed=seed).numpy()
        first, last = STEPS.index(600), STEPS.index(2000)
        for column, weights in (("PC1, measured", path), ("PC1, walk", walk_path(path))):
            rows = weights[first + 1 : last + 1] - weights[first]
            assert found.loc[run, column] == pytest.approx(ratios(rows, unit=True)[0])
        rows = path[first + 1 : last + 1] - path[first]
        assert found.loc[run, "k95"] == components(rows, 0.95, unit=True)
        assert found.loc[run, "k99"] == components(rows, 0.99, unit=True)
        assert found.loc[run, "drift"] == pytest.approx(np.linalg.norm(rows[-1]))
        alone = np.linalg.norm(path[0]) * (DECAY**600 - DECAY**2000)
        assert found.loc[run, "drift, decay alone"] == pytest.approx(alone)
    paper = "paper (51 M, 4,000 steps)"
    assert found[f"PC1, {paper}"].to_list() == [0.615, 1.0]
    assert found[f"drift, {paper}"].to_list() == [113.7, 54.2]
    assert table.frame[f"PC1, {paper}"].to_list() == ["61.5% (walk 59.9%)", "100.0%"]
    assert any("weight decay alone" in note for note in table.notes)


def test_the_published_windows_are_shown_where_snapshots_allow(tmp_path: Path) -> None:
    found = numbers(tables_of(adamw(tmp_path / "a"), sgd(tmp_path / "b"))["table10_windows"], "window", "run")
    assert set(found.index.get_level_values("window")) == {
        "0 to 400",
        "0 to 600",
        "200 to 600",
        "200 to 1,000",
        "600 to 2,000",
    }
    assert found.loc[("0 to 400", "a"), "rows"] == 2
    path = path_of(STEPS).numpy()
    u, v = path[1] - path[0], path[2] - path[0]
    cos = abs(u @ v) / np.linalg.norm(u) / np.linalg.norm(v)
    assert found.loc[("0 to 400", "a"), "PC1, measured"] == pytest.approx((1 + cos) / 2)


def test_pairs_are_matched_at_the_loss_that_the_worse_one_reaches(tmp_path: Path) -> None:
    slow = sgd(tmp_path / "slow", learning_curve({1000: (5.0, 0.0), 2000: (2.5, 0.1), 4000: (2.6, 0.05)}))
    found = tables_of(adamw(tmp_path / "fast"), slow)["table10_matched"]
    shown = numbers(found, "matched", "run")
    assert list(found.frame["matched"].unique()) == ["step", "loss 2.50"]
    # the fast one is first at or below 2.5 at step 2,000, the slow one at its own best
    assert written(found, "matched", "run").loc[("loss 2.50", "fast"), "step"] == "2,000"
    assert written(found, "matched", "run").loc[("loss 2.50", "slow"), "step"] == "2,000"
    assert shown.loc[("loss 2.50", "slow"), "p_ood"] == 0.1
    assert shown.loc[("step", "fast"), "p_ood"] == 0.4 and shown.loc[("step", "fast"), "rows"] == len(STEPS) - 1
    path = path_of(STEPS).numpy()
    drifts = (path - path[0])[1:]
    assert shown.loc[("step", "fast"), "PC1, measured"] == pytest.approx(ratios(drifts, unit=True)[0])
    until = drifts[: STEPS.index(2000)]
    assert shown.loc[("loss 2.50", "fast"), "PC1, measured"] == pytest.approx(ratios(until, unit=True)[0])


def diverge(folder: Path, beta2: float = 0.0) -> Run:
    """A run of which little is left: three snapshots, and a loss beyond all others."""
    settings = {**ADAMW, "betas": [0.9, beta2]}
    run = write_run(
        folder, STEPS[:3], 1e4 * path_of(STEPS[:3]), config(settings=settings), learning_curve({200: (9e3, 0)})
    )
    (folder / "outcome.json").write_text('{"state": "diverged", "step": 450}')
    return run


def test_a_run_that_diverged_does_not_shrink_the_window(tmp_path: Path) -> None:
    runs = [adamw(tmp_path / str(beta2), beta2) for beta2 in (0.8, 0.95)]
    found = tables_of(*runs, diverge(tmp_path / "0.0"))
    shown = written(found["beta2_geometry"], "quantity", "run")
    assert shown.loc[("PC1 in the window", "0.0"), "measured"] == "-"
    assert shown.loc[("PC1 in the window", "0.95"), "measured"] != "-"
    assert shown.loc[("PC1, raw", "0.0"), "rows"] == "2"
    notes = found["beta2_geometry"].notes
    assert "Window: unit drifts from step 600 to 2,000." in notes
    lacking = "Without the window of steps 600 to 2,000: 0.0 (diverged at step 450, last snapshot at step 400)."
    assert lacking in notes
    table = tables_of(sgd(tmp_path / "sgd"), runs[1], diverge(tmp_path / "wild", 0.95))["table9_optimizers"]
    assert "steps 600 to 2,000" in table.title and any("wild (diverged" in note for note in table.notes)
    assert written(table, "run").loc["wild", ["steps", "PC1, measured"]].to_list() == ["450 of 4,000", "-"]


def test_the_window_of_short_runs_is_a_share_of_the_shortest(tmp_path: Path) -> None:
    steps = STEPS[:5]  # 0 to 700
    paths = [Subject.of(write_run(tmp_path / "a", steps)), Subject.of(adamw(tmp_path / "b"))]
    assert common_window(paths) == (200, 400)  # nearest to 0.15 and 0.5 of 700
    assert common_window([paths[1], Subject.of(adamw(tmp_path / "c")), paths[0]]) == (600, 2000)
    lost = Subject.of(diverge(tmp_path / "lost"))
    assert common_window([paths[0], lost]) == (200, 400)
    assert common_window([lost]) == (0, 200)


def test_of_several_beta2_the_optimizers_are_compared_at_one(tmp_path: Path) -> None:
    runs = [adamw(tmp_path / str(beta2), beta2) for beta2 in (0.8, 0.95, 0.99)]
    found = tables_of(*runs, sgd(tmp_path / "sgd"), diverge(tmp_path / "0.0"))
    table = found["table9_optimizers"]
    assert table.frame["run"].to_list() == ["0.95", "sgd"]
    assert "Left out, as they differ from a run here in beta2 only: 0.8, 0.99, 0.0." in table.notes
    assert set(found["table10_matched"].frame["pair"]) == {"0.95 and sgd"}
    others = [adamw(tmp_path / "x" / str(k), beta2, seed=k) for k, beta2 in enumerate((0.8, 0.99, 0.99))]
    assert [run.path.name for run in one_beta2(others)] == ["1", "2"]  # without 0.95, the commonest


def test_what_diverged_is_matched_with_nothing(tmp_path: Path) -> None:
    found = tables_of(adamw(tmp_path / "a"), sgd(tmp_path / "b"), diverge(tmp_path / "wild", 0.95))["table10_matched"]
    assert set(found.frame["pair"]) == {"a and b"}
    assert "Without what diverged: wild." in found.notes


def test_runs_of_one_folder_name_are_told_apart_by_their_parents(tmp_path: Path) -> None:
    runs = [adamw(tmp_path / parent / "run", seed=seed) for seed, parent in enumerate("ab")]
    other = adamw(tmp_path / "c", seed=3)
    assert list(names([*runs, other]).values()) == ["a/run", "b/run", "c"]
    found = tables_of(*runs, other)
    assert found["runs"].frame["run"].to_list() == ["a/run", "b/run", "c"]
    assert any("0 (a/run), 1 (b/run), 3 (c)" in note for note in found["seeds"].notes)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xy")), unique=True, min_size=1))
def test_no_two_runs_have_one_name(folders: list[tuple[str, str]]) -> None:
    runs = [Run(Path("/nowhere").joinpath(*parts)) for parts in folders]
    found = names(runs)
    assert len(set(found.values())) == len(runs)
    assert all(name.split("/")[-1] == run.path.name for run, name in found.items())


@given(st.floats(1e-9, 1e3))
def test_settings_are_written_short_and_read_back(value: float) -> None:
    assert float(plain(value)) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(
    ("value", "text"),
    [(3e-4, "3e-4"), (1e-3, "1e-3"), (0.01, "1e-2"), (0.05, "0.05"), (0.95, "0.95"), (0.0, "0"), (10_000, "10,000")],
)
def test_learning_rates_are_powers_of_ten_and_probabilities_are_not(value: float, text: str) -> None:
    assert plain(value) == text


def test_runs_never_evaluated_are_matched_by_step_only(tmp_path: Path) -> None:
    found = tables_of(adamw(tmp_path / "a", curve="step,train/loss\n1,2\n"), sgd(tmp_path / "b"))
    assert list(found["table10_matched"].frame["matched"].unique()) == ["step"]


# ------------------------------------------------------------------------------------------------------------ beta2


def test_beta2_is_shown_with_excess_and_its_trend(tmp_path: Path) -> None:
    runs = [adamw(tmp_path / str(beta2), beta2, path=index) for index, beta2 in enumerate((0.8, 0.9, 0.95, 0.99))]
    found = tables_of(*runs)
    geometry = numbers(found["beta2_geometry"], "quantity", "run")
    values = geometry.loc["PC1, unit rows"]
    assert values.index.to_list() == ["0.99", "0.95", "0.9", "0.8"]
    for run, seed in zip(("0.8", "0.9", "0.95", "0.99"), range(4), strict=True):
        path = path_of(STEPS, seed=seed).numpy()
        assert values.loc[run, "measured"] == pytest.approx(ratios((path - path[0])[1:], unit=True)[0])
    trend = numbers(found["beta2_trend"], "quantity").loc["PC1, unit rows"]
    order = values.loc[["0.8", "0.9", "0.95", "0.99"]]
    for name in ("measured", "excess"):
        expected = scipy.stats.spearmanr([0.8, 0.9, 0.95, 0.99], order[name]).statistic
        assert trend[f"Spearman, {name}"] == pytest.approx(expected)
    assert any("over 4 values" in note and "p = 0.083" in note for note in found["beta2_trend"].notes)
    assert any("20 % of the sequences" in note for note in found["beta2_outcome"].notes)


def test_a_diverged_run_is_shown_and_takes_no_part_in_the_trend(tmp_path: Path) -> None:
    runs = [adamw(tmp_path / str(beta2), beta2, path=index) for index, beta2 in enumerate((0.8, 0.9, 0.95, 0.0))]
    (runs[-1].path / "outcome.json").write_text('{"state": "diverged", "step": 4000}')
    found = tables_of(*runs)
    assert "diverged" in found["beta2_outcome"].frame["ended"].to_list()
    assert set(found["beta2_trend"].frame["values of beta2"]) == {"3"}
    assert any("0.0" in note and "diverged" in note for note in found["beta2_trend"].notes)


def test_two_values_have_no_trend(tmp_path: Path) -> None:
    assert "beta2_trend" not in tables_of(adamw(tmp_path / "a", 0.9), adamw(tmp_path / "b", 0.99))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=12))
def test_rank_correlation_is_scipys(pairs: list[tuple[int, int]]) -> None:
    x, y = (list(map(float, values)) for values in zip(*pairs, strict=True))
    found = spearman(x, y)
    if len(set(x)) < 2 or len(set(y)) < 2:
        assert np.isnan(found)
    else:
        assert found == pytest.approx(scipy.stats.spearmanr(x, y).statistic)


def test_a_direction_is_one_only_throughout() -> None:
    assert [direction(values) for values in ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [1.0, 1.0, 2.0])] == [
        "rises",
        "falls",
        "neither",
        "neither",
    ]


# ------------------------------------------------------------------------------------------------------------ seeds


def test_seeds_have_a_mean_and_an_interval(tmp_path: Path) -> None:
    curves = [learning_curve({4000: (loss, 0.5)}) for loss in (1.0, 2.0, 4.0)]
    runs = [adamw(tmp_path / f"s{k}", seed=k, path=k, curve=curve) for k, curve in enumerate(curves)]
    again = adamw(tmp_path / "again", seed=1, path=7, curve=learning_curve({4000: (9.0, 0.5)}))
    table = tables_of(*runs, again)["seeds"]  # a seed that ran twice counts once
    assert "again" not in " ".join(table.notes)
    found = numbers(table, "quantity")
    shares = []
    for k in range(3):
        path = path_of(STEPS, seed=k).numpy()
        shares.append(ratios((path - path[0])[1:], unit=False)[0])
    low, high = scipy.stats.t.interval(0.95, 2, np.mean(shares), scipy.stats.sem(shares))
    row = found.loc["PC1 of the drift, raw"]
    assert row["mean"] == pytest.approx(np.mean(shares))
    assert (row["95 % low"], row["95 % high"]) == pytest.approx((low, high), abs=1e-5)
    assert found.loc["validation loss at the end", "mean"] == pytest.approx(7 / 3)
    assert row["excess"] == pytest.approx(row["mean"] - row["decaying walk"])
    assert any("n = 3" in note for note in table.notes)
    mean, half = t_interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3) and half == pytest.approx(
        scipy.stats.t.ppf(0.975, 2) * np.sqrt(7 / 9), abs=1e-3
    )


# ---------------------------------------------------------------------------------------------------------- reheats


def reheated(folder: Path, parent: Path, seed: int = 42, **record: object) -> Run:
    run = adamw(folder, seed=seed)
    found = {"parent": str(parent), "parent_step": 2000, "lr": 6e-4, "p0": 0.1, "peak": 0.7, "gain": 0.6, **record}
    (folder / "reheat.json").write_text(json.dumps(found))
    return run


def test_reheats_stand_beside_the_published_ones_and_their_parent(tmp_path: Path) -> None:
    parent = adamw(tmp_path / "parent")
    found = tables_of(
        parent, reheated(tmp_path / "hot", parent.path), reheated(tmp_path / "cold", parent.path, lr=1e-9)
    )
    table = found["table11_reheating"]
    shown = written(table, "run")
    paper = "paper (51 M, from step 10,000)"
    assert shown.loc["hot", "peak"] == "0.700" and shown.loc["hot", f"peak, {paper}"] == "0.782"
    assert shown.loc["cold", f"peak, {paper}"] == "-"  # nothing published at this learning rate
    assert "recovery" not in shown  # not recorded, by none
    # the parent went on from 0.6 at step 2,000 to 0.4
    assert shown.loc["parent", ["kind", "p0", "gain", "final"]].to_list() == [
        "not reheated",
        "0.600",
        "+0.000",
        "0.400",
    ]
    assert any("reheated step 2,000 instead of 10,000" in note for note in table.notes)
    assert "runs" not in found  # a reheated run is no run from scratch
    assert main_run(Run(tmp_path / "hot")).differs[0].startswith("reheated from a checkpoint")


def test_reheats_are_sorted_and_controls_come_last(tmp_path: Path) -> None:
    parent = adamw(tmp_path / "parent")
    control = reheated(tmp_path / "a", parent.path, lr=None, factor=1.0, steps=4000)
    low = reheated(tmp_path / "b", parent.path, lr=3e-4, steps=5000)
    high = reheated(tmp_path / "c", parent.path, lr=1e-3, steps=4000)
    (high.path / "outcome.json").write_text('{"state": "finished", "step": 4000}')
    table = tables_of(control, low, parent, high)["table11_reheating"]
    assert table.frame["run"].to_list() == ["c", "b", "a", "parent"]
    assert table.frame["kind"].to_list() == ["reheated", "reheated", "control", "not reheated"]
    assert table.frame["lr"].to_list() == ["1e-3", "3e-4", "-", "-"]
    assert table.frame["steps"].to_list() == ["4,000", "4,000 of 5,000", "4,000", "-"]
    assert "Broke off, so that their last values are no final ones: b." in table.notes
    assert any(note.startswith("Control:") for note in table.notes)


def test_a_reheat_with_hardly_a_record_is_all_dashes(tmp_path: Path) -> None:
    run = adamw(tmp_path / "odd")
    (run.path / "reheat.json").write_text("{}")
    (row,) = tables_of(adamw(tmp_path / "other"), run)["table11_reheating"].frame.to_dict("records")
    assert row == {"run": "odd", "kind": "reheated"}


def test_a_parent_that_was_moved_is_found_by_its_name(tmp_path: Path) -> None:
    found = tables_of(adamw(tmp_path / "parent"), reheated(tmp_path / "hot", Path("elsewhere/parent")))
    assert found["table11_reheating"].frame["kind"].to_list() == ["reheated", "not reheated"]


# --------------------------------------------------------------------------------------------------- what is missing


def test_runs_without_metrics_or_movement_are_left_out(tmp_path: Path) -> None:
    runs = [adamw(tmp_path / name, seed=seed) for seed, name in enumerate("abc")]
    (runs[1].path / "metrics.csv").unlink()
    still = write_run(tmp_path / "still", STEPS, path_of([0]).expand(len(STEPS), -1), config(seed=9), CURVE)
    found = tables_of(*runs, still)
    assert found["runs"].frame["run"].to_list() == ["a", "c"]
    assert any("n = 2" in note for note in found["seeds"].notes)
