"""Tables of one run, against singular value decompositions of explicit weights, and with parts of a run missing."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import one_line_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_runs import (
    BLOCKS,
    DECAY,
    Array,
    backbone,
    components,
    config,
    cosine,
    learning_curve,
    numbers,
    path_of,
    ratios,
    three_paths,
    write_replay,
    write_run,
    written,
)

from mini_gpt_pl.report.published import Beside
from mini_gpt_pl.report.sheet import Table, number, tabulate, word, write_tables
from mini_gpt_pl.report.subject import Subject, thin, update_span
from mini_gpt_pl.runs.folder import Run, require_reportable
from mini_gpt_pl.stories.study.contents import run_tables
from mini_gpt_pl.stories.study.learning import fit_of
from mini_gpt_pl.stories.study.optimizers import window_of
from mini_gpt_pl.stories.study.runs import BOOK, MAIN, SHORT, beta2_beside, control_beside, main_run

# Evenly spaced but for a dense stretch, as the paper's beta2 runs have it.
STEPS = [0, 200, 400, 600, 650, 700, 800, *range(1000, 4001, 200)]
WEIGHTS = path_of(STEPS)
EVERY_200 = [step for step in STEPS if step % 200 == 0]
PARTS: dict[str, slice] = {**dict(BLOCKS.items()), "trunk": slice(None)}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return write_run(tmp_path / "run", STEPS, WEIGHTS, metrics=learning_curve({4000: (1.5, 0.25)}))


def tables_of(run: Run) -> dict[str, Table]:
    return {table.name: table for table in run_tables(Subject.of(run, bootstrap=5))}


def weights_of(part: str, steps: list[int] = STEPS) -> Array:
    chosen = [STEPS.index(step) for step in steps]
    found: Array = WEIGHTS[chosen][:, PARTS[part]].numpy()
    return found


def paths(part: str, steps: list[int] = STEPS) -> dict[str, Array]:
    """By column: the measured weights and those of the nulls."""
    found = three_paths(weights_of(part, steps), DECAY ** np.array(steps, dtype=float))
    return dict(zip(("measured", "walk", "decaying walk"), found, strict=True))


# ---------------------------------------------------------------------------------------------------- brute force


@pytest.mark.parametrize(("name", "unit"), [("table2_pc1_blocks", False), ("table2_pc1_blocks_unit", True)])
def test_pc1_and_k95_of_every_block_are_those_of_a_decomposition(run: Run, name: str, unit: bool) -> None:
    table = tables_of(run)[name]
    found = numbers(table, "group")
    assert list(found.index) == list(PARTS)
    for part in PARTS:
        for column, path in paths(part).items():
            drifts = (path - path[0])[1:]
            assert found.loc[part, column] == pytest.approx(ratios(drifts, unit=unit)[0])
            k95 = found.loc[part, "k95" if column == "measured" else f"k95, {column}"]
            assert k95 == components(drifts, 0.95, unit=unit)
        excess = found.loc[part, "measured"] - found.loc[part, "decaying walk"]
        assert found.loc[part, "excess"] == pytest.approx(excess)
        assert found.loc[part, "95 % low"] <= found.loc[part, "95 % high"]
    shown = written(table, "group").loc["blocks.0"]
    assert shown["measured"] == f"{found.loc['blocks.0', 'measured']:.1%}"
    assert shown["excess"] == f"{100 * found.loc['blocks.0', 'excess']:+.1f} pt"


def phase(middle: float) -> str:
    """Of a schedule of 4,000 steps."""
    return "early" if middle < 800 else "middle" if middle <= 2400 else "late"


def test_update_alignment_by_phase_is_that_of_explicit_updates(run: Run) -> None:
    found = numbers(tables_of(run)["table3_update_alignment"], "phase", "group")
    middles = [(before + after) / 2 for before, after in pairwise(EVERY_200)]
    for part in PARTS:
        for column, path in paths(part, EVERY_200).items():
            drifts, updates = (path - path[0])[1:], np.diff(path, axis=0)
            whole = [abs(cosine(update, backbone(drifts))) for update in updates]
            past = [np.nan, *(cosine(updates[k], backbone(drifts[:k])) for k in range(1, len(updates)))]
            for name in ("early", "middle", "late"):
                inside = [index for index, middle in enumerate(middles) if phase(middle) == name]
                row = found.loc[(name, part)]
                assert row[column] == pytest.approx(np.mean([whole[index] for index in inside]))
                expected = np.nanmean([past[index] for index in inside])
                if column != "walk":  # a walk gives zero, and has no column
                    assert row["past" if column == "measured" else f"past, {column}"] == pytest.approx(expected)
                else:
                    assert expected == pytest.approx(0, abs=1e-12)


def test_the_sign_flips_where_the_first_update_points_back(tmp_path: Path) -> None:
    """Out along one axis, then back a little, so that C is 1 and then -1."""
    steps = [200 * k for k in range(11)]
    weights = torch.zeros(11, BLOCKS.dim, dtype=torch.float64)
    weights[:, 0] = 1.0 + torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 6, 5, 4], dtype=torch.float64)
    weights[:, 7] = weights[:, 0]
    table = tables_of(write_run(tmp_path, steps, weights, config(steps=2000)))["table4_sign_flip"]
    found = numbers(table, "group")
    assert list(found["flip"]) == [1600.0] * 3
    # late are three updates back and the last one out
    assert found.loc["trunk", "early C"] == pytest.approx(1) and found.loc["trunk", "late C"] == pytest.approx(-0.5)
    assert any("sign" in note and "arbitrary" in note for note in table.notes)


def test_a_run_that_broke_off_keeps_the_phases_of_its_schedule(tmp_path: Path) -> None:
    """4,000 of 10,000 steps hold the whole early phase, to step 2,000, and no late one."""
    run = write_run(tmp_path, STEPS, WEIGHTS, config(steps=10_000))
    found = numbers(tables_of(run)["table3_update_alignment"], "phase", "group")
    assert set(found.index.get_level_values("phase")) == {"early", "middle"}
    path = weights_of("trunk", EVERY_200)
    v, updates = backbone((path - path[0])[1:]), np.diff(path, axis=0)
    expected = np.mean([abs(cosine(update, v)) for update in updates[:10]])
    assert found.loc[("early", "trunk"), "measured"] == pytest.approx(expected)
    growth = tables_of(run)["growth"].frame
    assert "(0, 2,000]" in set(growth["steps"]) and "(4,000, 6,000]" not in set(growth["steps"])


@pytest.mark.parametrize(("lo", "hi"), [(600, 2000), (0, 400), (200, 1000)])
@pytest.mark.parametrize("part", list(PARTS))
def test_a_window_is_that_of_unit_drifts_from_its_first_snapshot(run: Run, lo: int, hi: int, part: str) -> None:
    found = window_of(run.trajectory, lo, hi, None if part == "trunk" else part)
    assert found is not None
    first, last = STEPS.index(lo), STEPS.index(hi)
    assert found.rows == last - first
    for column, path in paths(part).items():
        rows = path[first + 1 : last + 1] - path[first]
        which = {"measured": "value", "walk": "walk", "decaying walk": "decay"}[column]
        shown = {name: getattr(value, which) for name, value in found.numbers.items()}
        assert shown["pc1"] == pytest.approx(ratios(rows, unit=True)[0])
        assert shown["k95"] == components(rows, 0.95, unit=True)
        assert shown["k99"] == components(rows, 0.99, unit=True)
        assert shown["drift"] == pytest.approx(np.linalg.norm(rows[-1]))
    alone = np.linalg.norm(weights_of(part)[0]) * (DECAY**lo - DECAY**hi)
    assert found.decay == pytest.approx(alone)


def test_a_window_without_its_snapshots_is_none(run: Run) -> None:
    assert window_of(run.trajectory, 600, 2100) is None
    assert window_of(run.trajectory, 600, 600) is None
    still = torch.ones(3, BLOCKS.dim, dtype=torch.float64)
    assert window_of(write_run(run.path / "still", [0, 200, 400], still).trajectory, 0, 400) is None


def test_the_fraction_is_a_squared_over_x_squared(run: Run) -> None:
    found = numbers(tables_of(run)["backbone_fraction"], "quantity")
    drifts = (weights_of("trunk") - weights_of("trunk")[0])[1:]
    unit = drifts / np.linalg.norm(drifts, axis=1, keepdims=True)
    fraction = (unit @ backbone(drifts)) ** 2
    assert found.loc["fraction along raw v_b, at the end", "measured"] == pytest.approx(fraction[-1])
    of_unit = (unit @ backbone(unit)) ** 2
    last = found.loc["fraction along v_b of unit rows, at the end"]
    assert last["measured"] == pytest.approx(of_unit[-1])
    # The mean over snapshots is the share of PC1 of unit rows, by algebra.
    means = found.loc["the same, mean over snapshots", "measured"].to_list()
    assert means == pytest.approx([fraction.mean(), of_unit.mean()])
    assert of_unit.mean() == pytest.approx(ratios(drifts, unit=True)[0])


def test_thinning_a_path_is_not_having_looked_in_between(run: Run) -> None:
    found = thin(run.trajectory, 200)
    assert found.steps == EVERY_200
    expected = write_run(run.path / "sparse", EVERY_200, WEIGHTS[[STEPS.index(step) for step in EVERY_200]]).trajectory
    torch.testing.assert_close(found.grams, expected.grams)
    assert found.survival == pytest.approx(expected.survival)


@pytest.mark.parametrize(
    ("steps", "span"),
    [(STEPS, 200), ([0, 2, 4, 6], 2), ([0, 50, 100, 150, 400], 50), ([0, 10, 30], 20), ([0], 1), ([0, 200, 250], 200)],
)
def test_updates_are_taken_every_200_steps_or_as_often_as_most_snapshots(steps: list[int], span: int) -> None:
    assert update_span(steps) == span


# ------------------------------------------------------------------------------------------------------ learning


def test_over_fitting_is_where_validation_leaves_training_for_good(tmp_path: Path) -> None:
    text = "step,val/loss,train/lm_loss\n50,,9\n100,4,5\n150,,3\n200,3,3\n250,,3.2\n300,2,3.2\n350,,1.5\n400,2.5,0.5\n"
    run = write_run(tmp_path, STEPS, WEIGHTS, metrics=text + "450,,0.2\n500,2.6,0.4\n")
    found = fit_of(run)
    assert found is not None
    assert (found.best, found.best_step, found.last) == (2, 300, 2.6)
    assert found.train == pytest.approx(0.3) and found.parted == 400  # at 300 validation lay below training
    shown = written(tables_of(run)["learning"], "quantity")
    assert shown.loc["rise since its lowest", "measured"] == "+0.600"
    assert shown.loc["step from which validation stays above training loss", "measured"] == "400"
    assert found.overfits and found.rise == pytest.approx(0.6)
    assert any("risen by 0.60 nats per token since step 300" in note for note in tables_of(run)["learning"].notes)


def test_a_run_that_fits_no_better_than_it_validates_has_not_parted(tmp_path: Path) -> None:
    run = write_run(tmp_path, STEPS, WEIGHTS, metrics="step,val/loss,train/lm_loss\n100,4,5\n200,3,3\n")
    found = fit_of(run)
    assert found is not None and found.parted is None and not found.overfits
    assert not any("Over-fitting" in note for note in tables_of(run)["learning"].notes)


# ---------------------------------------------------------------------------------------------- gradients, replayed


def record(scale: float) -> dict[str, object]:
    labels = list(PARTS)
    norms = {label: {"abs_cos": [0.2 * scale, 0.1], "cos": [0.1, 0.1], "norm": [2 * scale, 0.0]} for label in labels}
    shown = {
        "q": {"backbone": [4e-4, 1e-4]},
        "trace": [1, 0],
        "random": 2e-4,
        "anisotropy": [2.0, 0.5],
        "overlap": -0.3,
    }
    return {
        "event": "peak",
        "bias": {label: [0.01 * scale, 0.002] for label in labels},
        "gradient": {"combined": norms, "lm": norms},
        "interference": {"trunk": [-0.25, 0.125]},
        "settings": {"batches": 4},
        "fisher": dict.fromkeys(labels, shown),
        "logit_lens": {"ood": [0.0, 0.25, 0.75]},
    }


def test_replayed_quantities_are_shown_as_recorded(run: Run) -> None:
    for step, scale in ((200, 1.0), (1800, 2.0)):
        write_replay(run, step, record(scale))
    found = tables_of(run)
    bias = written(found["table5_signed_bias"], "step", "source")
    source = "this run"
    assert bias.loc[("1,800", source), "blocks.0"] == "+0.0200 ± 0.0020"
    assert bias.loc[("sum B", source), "trunk"] == "+0.0300"
    chance = 3.0 * np.sqrt(2 / np.pi / 6)
    assert bias.loc[("|b| by chance", source), "blocks.0"] == f"{chance:.4f}"
    assert any("cannot" in note or "sum" in note for note in found["table5_signed_bias"].notes)
    fisher = written(found["table6_fisher"], "step", "source").loc[("200", source)]
    assert (fisher["q(v_b)"], fisher["anisotropy"], fisher["event"]) == ("4.0e-04 ± 1.0e-04", "2.0 ± 0.5", "peak")
    assert (fisher["|<u_1, v_b>|"], fisher["by chance"]) == ("3.0e-01", f"{np.sqrt(2 / np.pi / 15):.1e}")
    assert BOOK.notes["fisher"] in found["table6_fisher"].notes
    aligned = numbers(found["gradient_alignment"], "group").loc["trunk"]
    assert aligned["combined, |cos|"] == pytest.approx(0.3)
    assert aligned["combined, / floor"] == pytest.approx(0.3 / np.sqrt(2 / np.pi / 15))
    assert found["interference"].frame["cos(g_LM, g_probe)"].to_list() == ["-0.2500 ± 0.1250"] * 2
    assert found["interference"].frame["/ standard error"].to_list() == ["-4.0"] * 2  # -0.25 / (0.125 / 2)
    lens = found["logit_lens"].frame.iloc[0]
    assert lens.to_dict() | {"embedding": "0.000", "block 0": "0.250", "block 1": "0.750"} == lens.to_dict()


def test_without_a_replay_the_live_metrics_stand_in_and_say_so(tmp_path: Path) -> None:
    text = (
        "step,alignment/trunk/bias,alignment/trunk/bias_sum,alignment/trunk/gradient,fisher/trunk/batch_mean/q_backbone,"
        "fisher/trunk/batch_mean/trace,fisher/trunk/batch_mean/anisotropy\n100,0.5,0.5,0.25,,,\n900,0.3,0.8,-0.1,3,17,2\n"
    )
    found = tables_of(write_run(tmp_path, STEPS, WEIGHTS, metrics=text))
    bias = numbers(found["table5_signed_bias"], "group").loc["trunk"]
    assert (bias["b, early"], bias["b, middle"], bias["sum B"]) == (0.5, 0.3, 0.8)
    assert bias["|b| by chance"] == pytest.approx(2.5 * np.sqrt(2 / np.pi / 15))  # ||g|| is 2, then 3
    random = numbers(found["table6_fisher"], "step").loc["900", "random"]
    assert random == 14 / 14
    for name in ("table5_signed_bias", "table6_fisher", "gradient_alignment"):
        assert any("has not been replayed" in note for note in found[name].notes)


# ------------------------------------------------------------------------------------------------------ switching


def test_switches_are_placed_against_whole_run_and_past(tmp_path: Path) -> None:
    values = dict.fromkeys(EVERY_200, 0.2) | {1400: 0.6, 1800: 0.05}
    curve = learning_curve({step: (3.0, value) for step, value in values.items() if step})
    found = tables_of(write_run(tmp_path, STEPS, WEIGHTS, metrics=curve))
    (row,) = numbers(found["switching"], "peak").reset_index().to_dict("records")
    assert (row["peak"], row["trough"]) == (1400, 1800)
    path = weights_of("trunk")
    drifts, moved = (path - path[0])[1:], path[STEPS.index(1400)] - path[STEPS.index(1800)]
    assert row["|cos|"] == pytest.approx(abs(cosine(moved, backbone(drifts))))
    assert row["past, |cos|"] == pytest.approx(abs(cosine(moved, backbone(drifts[: STEPS.index(1400)]))))
    assert set(found["switching_blocks"].frame["group"]) == set(PARTS)
    blocks = numbers(found["switching_blocks"], "group")
    for part in PARTS:  # the decaying walk over the same steps
        walk = paths(part)["decaying walk"]
        drifts, moved = (walk - walk[0])[1:], walk[STEPS.index(1400)] - walk[STEPS.index(1800)]
        expected = abs(cosine(moved, backbone(drifts)))
        assert blocks.loc[part, "|cos|, decaying walk"] == pytest.approx(expected)
    assert row["|cos|, decaying walk"] == pytest.approx(expected)
    # the control stretches keep clear of the switch
    assert row["controls"] == sum(step + 400 in STEPS and (step + 400 <= 1400 or step >= 1800) for step in STEPS)


# ------------------------------------------------------------------------------------------------------ published


def test_every_footnote_of_a_published_value_exists_and_is_one_paragraph() -> None:
    used = {published.note for published in BOOK.values.values()} - {None}
    assert used <= set(BOOK.notes)
    for text in BOOK.notes.values():
        assert text.endswith(".") and "\n" not in text
    for published in BOOK.values.values():
        ends = published.value if isinstance(published.value, tuple) else (published.value,)
        assert all(isinstance(end, int | float) and np.isfinite(end) for end in ends)
        assert published.definition and published.source.split(",")[0] in {"paper", "original repository"}


@pytest.mark.parametrize(
    ("setting", "key", "value", "topic"),
    [
        ("seed42", "pc1/blocks.0", 0.805, "pc1"),
        ("seed271", "pc1/blocks.7", 0.783, "pc1"),
        ("seed42", "pc1_unit", 0.6926, "pc1_unit"),
        ("seed42", "windows_origin_anchored", (0.997, 0.998), "windows"),
        ("seed271", "fraction_last", 0.872, "fraction"),
        ("seed42", "highest_coordinate", 5800, "monotone"),
        ("seed42", "early_signed/blocks.0", -0.27, "sign"),
        ("seed42", "bias/2000/blocks.0", 0.029, "bias"),
        ("seed42", "gradient/combined", (0.008, 0.012), "gradient"),
        ("seed42", "fisher/9600/backbone", 8.1e-3, "fisher"),
        ("seed271", "fisher/4400/anisotropy", 40.8, "fisher"),
        ("seed271", "switch_cosine", (0.28, 0.31), "switching"),
        ("seed42", "correlation_6000_10000", -0.734, "correlation"),
        ("B", "drift/600_2000", 40.2, "sgd"),
        ("C", "pc1/2000_2400", 0.981, "sgd"),
        ("A", "pc1/0_400", 0.774, "few_rows"),
        ("beta2/0.95", "p_ood_best", 0.939, "beta2"),
        ("beta2/0", "pc1_unit", 0.5248, "beta2_rows"),
        ("reheat/42/0.0006", "peak", 0.782, "reheating"),
        ("reheat/271/0.001", "gain", 0.224, "reheating"),
    ],
)
def test_published_values_carry_what_is_known_of_them(
    setting: str, key: str, value: float | tuple[float, float], topic: str
) -> None:
    found = BOOK.values[setting, key]
    assert found.value == value and found.note == topic
    assert BOOK.notes[topic] in Beside(setting, (), MAIN, BOOK).notes(key)


def test_the_run_of_the_paper_stands_beside_its_own_seed(tmp_path: Path) -> None:
    for seed, pc1 in ((42, "80.5%"), (271, "78.6%")):
        run = write_run(tmp_path / str(seed), STEPS, WEIGHTS, config(seed=seed, steps=10_000))
        assert main_run(run) == Beside(f"seed{seed}", (), MAIN, BOOK)
        table = tables_of(run)["table2_pc1_blocks"]
        assert written(table, "group").loc["blocks.0", "paper"] == pc1
        assert not any("another setting" in note for note in table.notes)


def test_another_setting_is_named_in_head_and_note(run: Run) -> None:
    table = tables_of(run)["table2_pc1_blocks"]
    assert "paper (51 M, 10,000 steps)" in table.frame
    assert any("schedule length 4,000 instead of 10,000" in note for note in table.notes)
    other = config(seed=7, steps=10_000)
    assert main_run(write_run(run.path, STEPS, WEIGHTS, other)).differs == ("seed 7 instead of 42",)


def test_a_control_is_known_by_its_optimizer(tmp_path: Path) -> None:
    sgd = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.05}
    for name, settings_of, expected in (
        ("torch.optim.AdamW", {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.5}, "A"),
        ("torch.optim.AdamW", {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.0}, None),
        ("torch.optim.SGD", {"lr": 1e-3, "momentum": 0, "weight_decay": 0.5}, "B"),
        ("torch.optim.SGD", sgd, "C"),
        ("mini_gpt_pl.training.optimizers.SGDW", sgd | {"weight_decay": 0.5}, "C'"),
    ):
        found = control_beside(write_run(tmp_path, STEPS, WEIGHTS, config(name, settings_of)))
        assert (found.setting if found else None) == expected
    assert beta2_beside(write_run(tmp_path, STEPS, WEIGHTS, config())) == Beside(
        "beta2/0.95", ("share of probe sequences 0.1 instead of 0.2",), SHORT, BOOK
    )


# --------------------------------------------------------------------------------------------------- what is missing


def test_a_run_without_trajectory_cannot_be_reported(run: Run) -> None:
    (run.path / "trajectory.safetensors").unlink()
    with one_line_error(r"has no trajectory\.safetensors: train it with"):
        require_reportable(run)
    with one_line_error(r"has no trajectory\.safetensors"):
        run_tables(run)
    with one_line_error("no run folder"):
        require_reportable(Run(run.path / "nowhere"))


@pytest.mark.parametrize("snapshots", [1, 2, 3, 4])
def test_short_and_still_paths_have_fewer_tables(tmp_path: Path, snapshots: int) -> None:
    curve = learning_curve({200: (3.0, 0.5)})
    steps = STEPS[:snapshots]
    short = tables_of(write_run(tmp_path / "short", steps, metrics=curve))
    assert ("overview" in short) == (snapshots > 2)
    still = torch.ones(snapshots, BLOCKS.dim, dtype=torch.float64)
    assert list(tables_of(write_run(tmp_path / "still", steps, still, metrics=curve))) == ["learning"]


def test_a_frozen_block_is_left_out(run: Run) -> None:
    weights = WEIGHTS.clone()
    weights[:, :6] = weights[0, :6]
    found = tables_of(write_run(run.path / "frozen", STEPS, weights))
    assert list(found["table2_pc1_blocks"].frame["group"]) == ["blocks.1", "trunk"]


def test_one_group_is_shown_once(run: Run) -> None:
    trajectory = run.trajectory
    trajectory.groups, trajectory.dims, trajectory.grams = ("all",), (15,), trajectory.grams.sum(0, keepdim=True)
    assert list(Subject.of(run).parts) == ["trunk"]


COLUMNS = ("val/loss", "train/lm_loss", "probe/p_ood", "alignment/trunk/bias", "fisher/trunk/batch_mean/q_backbone")
REPLAYED = ("bias", "gradient", "fisher", "interference", "logit_lens", "event")


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    columns=st.sets(st.sampled_from(COLUMNS)),
    kept=st.none() | st.sets(st.sampled_from(REPLAYED)),
    parts=st.sets(st.sampled_from(["trainer", "model", "data"])),
    metrics=st.booleans(),
)
def test_tables_never_fall_over_what_is_missing(
    tmp_path: Path, columns: set[str], kept: set[str] | None, parts: set[str], metrics: bool
) -> None:
    names = sorted(columns)
    rows = "".join(f"{step},{','.join('0.5' for _ in names)}\n" for step in (200, 400)) if names else ""
    configuration = {key: value for key, value in config().items() if key not in parts}
    run = write_run(tmp_path, STEPS[:9], None, configuration, ",".join(["step", *names]) + "\n" + rows)
    if not metrics:
        (tmp_path / "metrics.csv").unlink()
    (tmp_path / "replay" / "000200.json").unlink(missing_ok=True)
    if kept is not None:
        write_replay(run, 200, {key: value for key, value in record(1.0).items() if key in kept})
    found = run_tables(Subject.of(run, bootstrap=0))
    assert {"overview", "table2_pc1_blocks", "growth"} <= {table.name for table in found}
    for table in found:
        assert len(table.frame) and len(table.frame.columns) > 1
        assert table.numbers is None or len(table.numbers) == len(table.frame)


def test_a_replay_with_nothing_but_nulls_is_shown_as_dashes(run: Run) -> None:
    (run.path / "replay").mkdir()
    empty = {"bias": {"trunk": [None, None]}, "fisher": {"trunk": {"q": {"backbone": None}, "overlap": None}}}
    (run.path / "replay" / "000200.json").write_text(json.dumps(empty))
    fisher = tables_of(run)["table6_fisher"].frame
    assert fisher.loc[fisher["source"] == "this run", "q(v_b)"].to_list() == ["-"]


# ------------------------------------------------------------------------------------------------------------ sheets


def test_a_table_is_written_as_numbers_and_as_shown(tmp_path: Path) -> None:
    rows = [
        {
            "what": word("a|b"),
            "share": number(0.12345, "{:.1%}"),
            "gone": number(None),
            "both": number(2.0, "{:.1f}", 0.5),
        },
        {"what": word("c"), "share": number(float("nan"), "{:.1%}"), "both": number(-0.001, "{:+.1f}")},
    ]
    table = tabulate("small", "A title", rows, ["One.", None, "One."])
    csv, text = write_tables([table], tmp_path / "new")
    assert (csv.name, text.name) == ("small.csv", "small.md")
    found = pd.read_csv(csv)
    assert list(found.columns) == ["what", "share", "both", "both sd"]
    assert found["share"].to_list()[0] == 0.12345 and np.isnan(found["share"][1])
    assert found["both sd"].to_list()[0] == 0.5
    lines = text.read_text().splitlines()
    assert lines[0] == "## A title"
    assert lines[4] == "| a\\|b | 12.3% | 2.0 ± 0.5 |" and lines[5] == "| c | - | +0.0 |"
    assert lines[-1] == "* One." and lines.count("* One.") == 1


def test_every_table_of_a_run_can_be_written(run: Run) -> None:
    tables = run_tables(Subject.of(run, bootstrap=5))
    assert len({table.name for table in tables}) == len(tables)
    for file in write_tables(tables, run.path / "report" / "tables"):
        assert file.stat().st_size > 0
