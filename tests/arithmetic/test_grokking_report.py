"""The report on runs that grok: windows, nulls against numpy, published numbers, claims that can go either way."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from grokking_runs import (
    GROUPS,
    KEPT,
    STEPS,
    Series,
    commutator,
    config,
    constant,
    grokking,
    memorising,
    rises,
    weights_of,
    write,
)
from report_runs import numbers, written
from rich.console import Console

from docs.tools import place
from mini_gpt_pl import main as cli
from mini_gpt_pl.arithmetic.study import claims as grokking_claims
from mini_gpt_pl.arithmetic.study.claims import claims
from mini_gpt_pl.arithmetic.study.commutators import defect_at_grok, last_defects
from mini_gpt_pl.arithmetic.study.contents import comparison_tables, run_tables
from mini_gpt_pl.arithmetic.study.onsets import ONSET, clock_steps, onsets, separation
from mini_gpt_pl.arithmetic.study.paths import excess_at_stop, fall_of_c, overview, seed_by_seed, short
from mini_gpt_pl.arithmetic.study.runs import (
    Phase,
    ResidueRun,
    common_windows,
    distinct,
    groups_of,
    phases,
    residue_runs,
)
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.report.claims import Claim
from mini_gpt_pl.report.comparison import require_comparable
from mini_gpt_pl.report.page import Steps, write_report
from mini_gpt_pl.report.sheet import Table
from mini_gpt_pl.runs.folder import Run

# Gradients vanish at the grok step while c falls: D jumps.
VANISHING = commutator(rises(1200, 8.0, 400.0), rises(1200, 1.0, 0.01))


def one(run: Run) -> ResidueRun:
    (found,) = residue_runs([run])
    return found


def tables(runs: Sequence[Run]) -> dict[str, Table]:
    return {table.name: table for table in comparison_tables(runs)}


def family(folder: Path, defects: Mapping[bool, Mapping[str, Series]], seeds: int = 3) -> list[Run]:
    """Runs of two operations that generalise and of two that do not, with commutators by kind."""
    kinds = {"add": True, "mul": True, "x3_xy": False, "x2_xy_y2": False}
    return [
        write(
            folder / f"{operation}{seed}",
            grokking(1200 + 100 * seed) if groks else memorising(),
            defects[groks],
            config(operation, seed=seed),
        )
        for operation, groks in kinds.items()
        for seed in range(1, seeds + 1)
    ]


# ----------------------------------------------------------------------------------------------- steps, windows


def test_milestones_and_phases_of_a_run(tmp_path: Path) -> None:
    run = one(write(tmp_path / "a", grokking(1200), VANISHING))
    assert run.steps == {
        "train_99": 300,
        "test_10": 1200,
        "test_50": 1200,
        "test_90": 1200,
        "test_95": 1200,
        "test_98": 1200,
        "test_98_thrice": 1400,
    }
    assert run.cut == Phase("to the stop", 0, 1400)
    assert [(w.name, w.first, w.last) for w in run.phases[1:]] == [
        ("memorisation", 0, 300),
        ("plateau", 300, 1200),
        ("transition", 1200, 1400),
        ("after", 1400, 2000),
    ]


def test_a_run_that_only_memorises_ends_on_its_plateau(tmp_path: Path) -> None:
    run = one(write(tmp_path / "a", memorising(), VANISHING))
    assert not run.groks and run.cut.last == 2000
    assert [w.name for w in run.phases[1:]] == ["memorisation", "plateau"]
    assert phases({"train_99": None, "test_10": 100, "test_98_thrice": None}, 500) == []


def test_runs_are_compared_over_the_same_steps_whatever_their_own(tmp_path: Path) -> None:
    runs = residue_runs(family(tmp_path, {True: VANISHING, False: VANISHING}))
    found = {w.name: (w.first, w.last) for w in common_windows(runs)}
    assert found == {
        "all runs alike": (0, 2000),
        "memorisation": (0, 300),
        "plateau": (300, 1400),
        "transition": (1400, 1600),
        "after": (1600, 2000),
    }
    window = common_windows(runs)[0]
    assert {len(run.within(window)) for run in runs} == {len(STEPS)}
    table = tables(runs)["grokking_pc1_windows"]
    # A window of three snapshots has no PC1 worth the name, and is left out.
    assert set(table.frame["window"]) == {w.words for w in common_windows(runs) if w.name != "transition"}


def test_runs_of_other_cadences_are_thinned_to_the_snapshots_that_all_have(tmp_path: Path) -> None:
    often, rarely = (write(tmp_path / str(k), memorising(), {}, config(seed=k), every=k) for k in (1, 2))
    (window, *_) = common_windows(residue_runs([often, rarely]))
    paths = [run.within(window) for run in residue_runs([often, rarely])]
    assert [path.steps for path in paths] == [list(STEPS[::2])] * 2
    found = tables([often, rarely])
    assert list(found["grokking_pc1_published"].frame["snapshots"].unique()) == ["11 to 21"]
    assert list(found["grokking_pc1_windows"].frame["snapshots"].unique()) == ["11"]
    own = weights_of(1, 1.0).numpy()[::2, 20:40]
    alone = numbers(
        tables([often, write(tmp_path / "b", memorising(), {}, config("sub"), every=2)])["grokking_pc1_windows"],
        "operation",
        "weights",
    )
    assert alone.loc[("add", "L0 K"), "measured"] == pytest.approx(centred_pc1(own), rel=1e-9)


def test_seeds_of_a_setting_differ_in_nothing_else_and_count_once(tmp_path: Path) -> None:
    told = [config(seed=1), config(seed=2), config(seed=3, batch_size=64), config(seed=1)]
    runs = residue_runs([write(tmp_path / str(k), grokking(1200), VANISHING, c) for k, c in enumerate(told)])
    assert [[run.seed for run in group] for group in groups_of(distinct(runs))] == [[1, 2], [3]]
    found = tables(runs)
    assert "not counted again: 3." in found["grokking_runs"].notes[1]
    rows = found["grokking_pc1_published"].frame.drop_duplicates("else")
    assert rows[["else", "seeds"]].to_numpy().tolist() == [
        ["sequences a step 512", "2"],
        ["sequences a step 64", "1"],
    ]


def test_of_several_commutators_the_one_within_a_task_is_reported_and_named(tmp_path: Path) -> None:
    told = config()
    for name, losses in (("add_mul", ["add", "mul"]), ("mul_mul", ["mul", "mul"])):
        probe = {"class_path": "mini_gpt_pl.callbacks.CommutatorProbe", "init_args": {"name": name, "losses": losses}}
        told["trainer"]["callbacks"].append(probe)
    values = {f"{name}/{k}": v for name in ("add_mul", "mul_mul") for k, v in VANISHING.items()}
    run = one(write(tmp_path / "a", grokking(1200), values, told))
    assert (run.commutators, run.reported) == (("add_mul", "mul_mul"), "mul_mul")
    note = "The commutator is mul_mul; a also measured add_mul, which this does not show."
    for name in ("grokking_onsets", "grokking_discrimination", "grokking_last_defect"):
        assert note in tables([run])[name].notes, name
    assert note in {table.name: table for table in run_tables(run)}["grokking_defect"].notes


# --------------------------------------------------------------------------------------------------- the paths


def centred_pc1(weights: np.ndarray) -> float:
    energy = np.linalg.svd(weights - weights.mean(0), compute_uv=False) ** 2
    return float(energy[0] / energy.sum())


def decaying(weights: np.ndarray, share: float) -> np.ndarray:
    """Decay with the lengths of the measured innovations, each in a direction of its own."""
    lengths = np.linalg.norm(weights[1:] - share * weights[:-1], axis=1)
    path = [np.r_[np.linalg.norm(weights[0]), np.zeros(len(lengths))]]
    for k, length in enumerate(lengths, 1):
        path.append(share * path[-1] + length * np.eye(len(lengths) + 1)[k])
    return np.array(path)


def test_pc1_and_its_null_are_those_of_the_weights_themselves(tmp_path: Path) -> None:
    run = write(tmp_path / "a", grokking(1200), VANISHING)
    found = {table.name: table for table in run_tables(run)}["grokking_pc1"]
    cells = numbers(found, "window", "weights")
    weights = weights_of(42, 1.0).numpy()
    for window, rows in (("to the stop, 0 to 1,400", slice(0, 15)), ("plateau, 300 to 1,200", slice(3, 13))):
        own = weights[rows, 20:40]  # the second matrix
        row = cells.loc[window, "L0 K"]
        assert row["measured"] == pytest.approx(centred_pc1(own), rel=1e-9)
        assert row["decay, ‖e‖"] == pytest.approx(centred_pc1(decaying(own, KEPT**100)), rel=1e-9)
        assert row["excess, ‖e‖"] == pytest.approx(row["measured"] - row["decay, ‖e‖"], abs=1e-12)
        assert row["excess, ‖d‖"] == pytest.approx(row["measured"] - row["decay, ‖d‖"], abs=1e-12)
        assert abs(row["decay, ‖d‖"] - row["decay, ‖e‖"]) > 0.01  # they are two nulls


def test_tangential_and_whole_persistence_stand_side_by_side(tmp_path: Path) -> None:
    run = write(tmp_path / "a", grokking(1200), VANISHING)
    found = {table.name: table for table in run_tables(run)}["grokking_persistence"]
    row = numbers(found, "window", "weights").loc["to the stop, 0 to 1,400", "attention"]
    theta, share = weights_of(42, 1.0).numpy()[:15], KEPT**100
    steps = theta[1:] - share * theta[:-1]
    start = theta[:-1] / np.linalg.norm(theta[:-1], axis=1, keepdims=True)
    for column, e in (("innovations", steps), ("tangential", steps - (steps * start).sum(1, keepdims=True) * start)):
        lengths = np.linalg.norm(e, axis=1)
        expected = (e[1:] * e[:-1]).sum() / (lengths[1:] * lengths[:-1]).sum()
        assert row[column] == pytest.approx(expected, rel=1e-9), column


def test_short_names_of_matrices() -> None:
    assert [short(name) for name in (GROUPS[0], GROUPS[7], "attention")] == ["L0 Q", "L1 O", "attention"]


# ------------------------------------------------------------------------------------------- published numbers


def test_published_numbers_stand_beside_runs_that_repeat_the_paper_alone(tmp_path: Path) -> None:
    same = write(tmp_path / "same", grokking(1200), VANISHING, config("sub", 137))
    found = tables([same])
    pc1 = numbers(found["grokking_pc1_published"], "weights")
    assert pc1.loc["L0 Q", "paper"] == 0.684 and pc1.loc["L1 O", "paper"] == 0.671
    onsets = numbers(found["grokking_onsets"], "seed")
    # Another draw than the paper's run of that seed: the range of its three seeds is beside it.
    assert [onsets.loc[137, f"onset, paper {end}"] for end in ("low", "high")] == [2000, 2100]
    assert written(found["grokking_onsets"], "seed").loc["137", "lead, paper"] == "1,100 to 1,600"
    assert written(found["grokking_last_defect"], "seed").loc["137", "D, paper"] == "219 to 513"
    for changed in (
        {"modulus": 59},
        {"lr": 3e-3},
        {"train_fraction": 0.3},
        {"batch_size": None},
        {"mirror_together": True},
        {"split_seed": 5},
    ):
        other = write(tmp_path / str(changed), grokking(1200), VANISHING, config("sub", 137, **changed))
        for table in tables([other]).values():
            assert not [column for column in table.frame if "paper" in str(column)], (table.name, changed)


def test_what_is_turned_off_is_a_difference_and_what_is_not_said_is_none(tmp_path: Path) -> None:
    def told(name: str, part: str, key: str, value: Any) -> tuple[str, ...]:
        configuration = config()
        configuration[part][key] = value
        return one(write(tmp_path / name, grokking(1200), {}, configuration)).differs

    assert told("clip", "trainer", "gradient_clip_val", None) == ("clipping none instead of 1",)
    assert told("batch", "data", "batch_size", None) == ("sequences a step all instead of 512",)
    assert told("blocks", "model", "identical_blocks", False) == ("identical blocks False instead of True",)
    assert told("split", "data", "split_seed", 42) == told("same", "data", "split_seed", None) == ()
    silent = config()
    del silent["trainer"]["gradient_clip_val"], silent["data"]["batch_size"]
    assert one(write(tmp_path / "silent", grokking(1200), {}, silent)).differs == ()


def test_snapshots_of_another_cadence_are_no_repetition(tmp_path: Path) -> None:
    for decay, expected in ((1.0, ("steps a snapshot 50 instead of 100",)), (0.0, ())):
        told = config(decay=decay)
        told["trainer"]["callbacks"][0]["init_args"]["schedule"] = {"every": 50}
        assert one(write(tmp_path / str(decay), grokking(1200), {}, told)).differs == expected


def tie(run: Run) -> Run:
    """The run with its weights held to another's length."""
    told = yaml.safe_load((run.path / "config.yaml").read_text())
    told["trainer"]["callbacks"].append(
        {"class_path": "mini_gpt_pl.arithmetic.tied_norm.TiedNorm", "init_args": {"run": "other"}}
    )
    (run.path / "config.yaml").write_text(yaml.safe_dump(told))
    return Run(run.path)


def test_a_run_of_tied_norm_is_no_control_without_decay(tmp_path: Path) -> None:
    runs = family(tmp_path / "runs", {True: VANISHING, False: VANISHING})
    free = write(tmp_path / "free", memorising(), VANISHING, config(decay=0.0))
    tied = tie(write(tmp_path / "tied", memorising(), VANISHING, config(decay=0.0)))
    controls = {"Without weight decay", "Zeros and spikes without decay"}
    assert controls & set(judged([*runs, tied])) == set()
    assert controls & set(judged([*runs, free])) == controls
    assert one(tied).unit != one(free).unit and "tied norm" in one(tied).kind
    assert one(tied).differs == ("norm tied to another run's instead of free",)


def test_without_decay_the_published_value_is_that_of_the_control(tmp_path: Path) -> None:
    run = write(tmp_path / "a", memorising(), VANISHING, config("add", 42, decay=0.0))
    found = numbers(tables([run])["grokking_pc1_published"], "weights")
    assert found.loc["L0 Q", "paper"] == 0.654
    assert found.loc["L0 Q", "decay, ‖d‖"] == pytest.approx(found.loc["L0 Q", "walk"], rel=1e-12)


def test_rates_have_means_and_an_exponent_from_four_on(tmp_path: Path) -> None:
    rates = (1e-4, 1e-3, 3e-3, 1e-2)
    runs = [
        write(tmp_path / f"{k}{seed}", grokking(1000 + 100 * (k + 2 * seed)), VANISHING, config("add", seed, lr=lr))
        for k, lr in enumerate(rates)
        for seed in (1, 2, 3)
    ]
    three, four = (tables(runs[: 3 * count])["grokking_rates"] for count in (3, 4))
    assert any("a power law takes at least 4" in note for note in three.notes)
    assert not any("a power law takes at least 4" in note for note in four.notes)
    shown = numbers(four, "operation", "lr")
    assert shown.loc[("add", "1e-3"), "t90"] == shown.loc[("all that generalise", "1e-3"), "t90"] == 1500
    assert shown.loc[("all that generalise", "1e-3"), "t90, paper"] == 2717
    assert np.isnan(shown.loc[("add", "1e-3"), "t90, paper"])
    assert written(four, "operation", "lr").loc[("all that generalise", "1e-3"), "onsets, paper"] == "500 to 2,100"


# ------------------------------------------------------------------------------------------------------ claims


def judged(runs: list[Run]) -> dict[str, Claim]:
    return {claim.topic: claim for claim in claims(runs)}


def test_a_defect_that_jumps_because_gradients_vanish_is_told_from_one_that_does_not(tmp_path: Path) -> None:
    flat = commutator(constant(8.0), constant(1.0))
    # The bracket itself grows: gradients stay.
    growing = commutator(rises(1200, 8.0, 400.0), constant(1.0))
    vanishing, real = (
        judged(family(tmp_path / name, {True: kind, False: flat}))["Explosion of the defect"]
        for name, kind in (("vanishing", VANISHING), ("growing", growing))
    )
    assert vanishing.reading.startswith("**1/‖g‖**")
    assert "‖g‖ × 0.01" in vanishing.null and "c × 0.5" in vanishing.null
    assert real.reading.startswith("**reproduces**")


def test_runs_that_ended_at_their_stop_say_nothing_of_what_comes_behind(tmp_path: Path) -> None:
    # The third evaluation with 98 % is the last one: there is no record behind the stop.
    run = write(tmp_path / "a", grokking(1800), VANISHING)
    assert one(run).cut.last == STEPS[-1]
    told = judged([run])["Explosion of the defect"]
    assert told.reading.startswith("**undecided**: no records behind the stop") and "nan" not in told.here + told.null


def test_the_share_across_a_subspace_is_a_ratio_of_lengths(tmp_path: Path) -> None:
    kind = commutator(constant(8.0), constant(1.0), on_path=constant(0.6), on_path_isotropic=constant(0.28))
    told = judged([write(tmp_path / "a", grokking(1200), kind)])["Where the commutator points"]
    assert "80.000 % of its length across" in told.here and "96.000 % across" in told.null


def test_an_onset_in_every_run_is_no_warning_and_one_in_the_right_runs_is(tmp_path: Path) -> None:
    early, never = commutator(rises(600, 1.0, 100.0), constant(1.0)), commutator(constant(1.0), constant(1.0))
    everywhere = family(tmp_path / "everywhere", {True: early, False: early})
    right = family(tmp_path / "right", {True: early, False: never})
    told = judged(everywhere)["Early warning"]
    assert told.reading.startswith("**no warning**") and "in 6 of 6" in told.here
    assert "also comes in 6 of 6 runs that do not" in told.null
    split = separation(residue_runs(right), ONSET)
    assert split is not None and (split.auc, split.units) == (1.0, 4)
    # Four operations cannot have p < 0.05, however well they are told apart.
    assert split.p > 0.05 and judged(right)["Early warning"].reading.startswith("**undecided**: 4 operations")


def test_memory_that_comes_after_generalisation_leads_nowhere(tmp_path: Path) -> None:
    late = {"train": rises(600, 0.2), "test": rises(400)}
    early_onset = commutator(rises(300, 1.0, 100.0), constant(1.0))
    runs = [write(tmp_path / str(seed), late, early_onset, config(seed=seed)) for seed in (1, 2)]
    found = next(claim for claim in claims(runs) if claim.topic == "Early warning")
    assert "99 % of the training set leads in 0 of 2" in found.null
    assert found.null.startswith("all runs generalise")


def test_runs_without_decay_are_no_operations_that_do_not_generalise(tmp_path: Path) -> None:
    early, never = commutator(rises(600, 1.0, 100.0), constant(1.0)), commutator(constant(1.0), constant(1.0))
    runs = family(tmp_path / "runs", {True: early, False: early})
    free = [
        write(tmp_path / f"{name}{seed}", memorising(), never, config(name, seed=seed, decay=0.0))
        for name in ("add", "mul")
        for seed in (1, 2)
    ]
    tied = tie(write(tmp_path / "tied", memorising(), never, config(decay=0.0)))
    row = numbers(tables([*runs, *free, tied])["grokking_discrimination"], "clock").loc[ONSET]
    assert row["operations that do not"] == "600 to 600 (6 of 6)" and row["no decay"] == "never (4 runs)"
    assert row["AUC, operations that do not"] == 0.5 and row["AUC, no decay"] == 1.0
    told = judged([*runs, *free, tied])["Early warning"]
    assert "6 of 6 runs that do not generalise and 0 of 4 without decay" in told.null


@pytest.mark.parametrize(
    ("free", "groks", "verdict"),
    [
        (0.150, (-0.006, 0.129), "**does not reproduce**"),
        (-0.050, (-0.010, 0.090), "**reproduces**"),
        (0.060, (0.010, 0.090), "**undecided**"),
        (0.001, (-0.048, 0.009), "**a null**"),
    ],
)
def test_the_control_without_decay_is_read_beside_both_nulls(
    free: float, groks: tuple[float, float], verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat = commutator(constant(1.0), constant(1.0))
    runs = [
        write(tmp_path / "groks", grokking(), flat),
        write(tmp_path / "free", memorising(), flat, config(decay=0.0)),
    ]
    excess = {"walk": free, **dict(zip(grokking_claims.DECAYING, groks, strict=True))}
    monkeypatch.setattr(grokking_claims, "_excess", lambda cells, null: [100 * excess[null]])
    assert judged(runs)["Without weight decay"].reading.startswith(verdict)


def test_an_operation_of_which_some_seeds_generalise_has_an_area_and_no_p(tmp_path: Path) -> None:
    early, never = commutator(rises(600, 1.0, 100.0), constant(1.0)), commutator(constant(1.0), constant(1.0))
    runs = family(tmp_path / "runs", {True: early, False: never})
    runs.append(write(tmp_path / "late", memorising(), never, config("add", seed=9)))
    found = tables(runs)["grokking_discrimination"]
    assert written(found, "clock").loc[ONSET, "AUC, operations that do not"] == "1.00"
    assert not [column for column in found.frame if str(column).startswith(("p, ", "smallest p"))]
    assert any("of add, decay 1, lr 1e-3 some seeds" in note for note in found.notes)
    assert "operations have no p" in judged(runs)["Early warning"].reading


def test_clocks_are_compared_within_one_learning_rate(tmp_path: Path) -> None:
    late, early = (commutator(rises(at, 1.0, 100.0), constant(1.0)) for at in (1000, 500))
    runs = []
    for lr, kind in ((1e-3, late), (1e-2, early)):
        for operation, groks in (("add", True), ("x3_xy", False)):
            accuracies = grokking(1200) if groks else memorising()
            runs.append(write(tmp_path / f"{operation}{lr}", accuracies, kind, config(operation, lr=lr)))
    found = numbers(tables(runs)["grokking_discrimination"], "clock").loc[ONSET]
    # Pooled, the early onsets of one rate would precede those of the other.
    assert found["lr"].tolist() == ["1e-3", "1e-2"]
    assert found["AUC, operations that do not"].tolist() == [0.5, 0.5]
    assert found["runs that generalise"].tolist() == ["1,000 to 1,000 (1 of 1)", "500 to 500 (1 of 1)"]
    assert len({run.unit for run in residue_runs(runs)}) == 4


def test_every_rule_of_onset_stands_side_by_side(tmp_path: Path) -> None:
    # Above ten baselines and 20 from step 900 on; above ten baselines and 5 from 500 on.
    defect: Series = lambda step: 1.0 if step < 500 else 15.0 if step < 900 else 60.0  # noqa: E731
    run = write(tmp_path / "a", grokking(1200), commutator(defect, constant(1.0)))
    row = numbers(tables([run])["grokking_onset_rules"], "operation").loc["add"]
    assert (row["10 × and 20"], row["10 × and 5"], row["3 × the first 30 %"]) == (900, 500, 500)
    assert row["lead / stop, 10 × and 20"] == pytest.approx(300 / 1400)


def test_initial_weights_have_the_direction_of_unit_rows_and_where_the_path_ends(tmp_path: Path) -> None:
    run = write(tmp_path / "a", grokking(1200), VANISHING)
    found = {table.name: table for table in run_tables(run)}
    row = numbers(found["grokking_theta0"], "window", "weights").loc[("to the stop, 0 to 1,400", "L0 K")]
    own = weights_of(42, 1.0).numpy()[:15, 20:40]
    drifts = own[1:] - own[0]
    unit = drifts / np.linalg.norm(drifts, axis=1, keepdims=True)
    for column, rows in (("cos(v_b, θ₀)", unit), ("cos(raw v_b, θ₀)", drifts)):
        first = np.linalg.svd(rows)[2][0]
        assert abs(row[column]) == pytest.approx(abs(first @ own[0]) / np.linalg.norm(own[0]), rel=1e-6), column
    assert row["‖θ‖"] == pytest.approx(np.linalg.norm(own[-1]))
    assert row["‖θ‖: decay alone"] == pytest.approx(KEPT**1400 * np.linalg.norm(own[0]))
    cosine = own[0] @ own[-1] / np.linalg.norm(own[0]) / np.linalg.norm(own[-1])
    assert row["cos(θ, θ₀)"] == pytest.approx(cosine)
    numbered = numbers(found["grokking_components"], "window", "weights", "number")
    assert {"walk", "decay, ‖d‖", "decay, ‖e‖", "AR(1)", "permuted"} <= set(numbered)
    assert set(numbered.index.get_level_values(2)) == {"raw PC1", "k90", "k95", "k99", "PC1 without θ₀"}


def test_correlations_are_given_memorisation_and_the_norm(tmp_path: Path) -> None:
    runs = []
    for seed in range(1, 9):
        memorised, halved, at = 100 * (1 + seed % 3), 600 + 100 * (seed * 5 % 7), 1000 + 100 * (seed * 3 % 8)
        accuracies = {"train": rises(memorised, 0.2), "test": rises(at)}
        kind = commutator(rises(100 * (seed * 7 % 5) + 300, 1.0, 100.0), constant(1.0))
        run = write(tmp_path / str(seed), accuracies, kind, config(seed=seed))
        frame = pd.read_csv(run.path / "metrics.csv")
        frame["eval/weight_norm"] = np.where(frame["step"] < halved, 100.0, 40.0)
        frame.to_csv(run.path / "metrics.csv", index=False)
        runs.append(Run(run.path))
    row = numbers(tables(runs)["grokking_discrimination"], "clock").loc[ONSET]
    known = [(clock_steps(run), run.steps["test_90"]) for run in residue_runs(runs)]
    columns = np.array([[c[ONSET], t90, c["train 99 %"], c["‖θ‖ halved"]] for c, t90 in known], dtype=float)
    design = np.column_stack([np.ones(8), columns[:, 2:]])
    left = columns[:, :2] - design @ np.linalg.lstsq(design, columns[:, :2], rcond=None)[0]
    assert row["r, train 99 % and ‖θ‖ halved given"] == pytest.approx(np.corrcoef(left.T)[0, 1], abs=1e-9)


def test_clocks_are_one_rule_on_every_series_and_placebos(tmp_path: Path) -> None:
    run = one(write(tmp_path / "a", grokking(1200), commutator(rises(500, 1.0, 15.0), rises(900, 1.0, 0.5))))
    found = clock_steps(run)
    assert found[ONSET] is None  # ten times, but below 20
    assert (found["D, 10 ×"], found["c, 10 ×"], found["‖g‖, 10 ×"]) == (500, 500, None)
    assert (found["train 99 %"], found["training loss, a tenth"]) == (300, 300)
    assert found["‖θ‖ halved"] == next(s for s in STEPS if 0.9995**s < 0.5)


def test_where_the_commutator_points_is_read_against_the_matched_null(tmp_path: Path) -> None:
    chance = commutator(constant(8.0), constant(1.0), on_path_below=constant(0.5))
    beyond = {**chance, "on_path_below": constant(0.999)}
    said = [
        judged(family(tmp_path / str(k), {True: kind, False: kind}))["Where the commutator points"].reading
        for k, kind in enumerate((chance, beyond))
    ]
    assert said[0].startswith("**a null**") and said[1].startswith("**more than chance**")


def test_alignment_is_read_by_how_often_it_is_above_its_null(tmp_path: Path) -> None:
    # Above its null in one of three records, or in all.
    for name, lowest, verdict in (("chance", 0.005, "**reproduces**"), ("aligned", 0.02, "**does not reproduce**")):
        rms = dict.fromkeys(STEPS, lowest) | dict.fromkeys(STEPS[::3], 0.02)
        kind = commutator(constant(8.0), constant(1.0), alignment_rms=rms.__getitem__)
        run = write(tmp_path / name, grokking(1200), kind)
        assert judged([run])["Alignment"].reading.startswith(verdict)


def test_claims_that_take_runs_that_are_not_there_are_left_out(tmp_path: Path) -> None:
    alone = write(tmp_path / "a", memorising(), {})
    assert claims([alone]) == []
    assert set(judged([write(tmp_path / "b", grokking(1200), {})])) == {"PC1", "Persistence"}


def test_fitting_zeros_of_float32_are_called_arithmetic(tmp_path: Path) -> None:
    lost = commutator(constant(9.0), constant(1e-6), float32_signal=constant(1e-9))
    seen = commutator(constant(9.0), constant(1.0))
    said = [
        judged([write(tmp_path / str(k), memorising(), kind, config(decay=0.0))])["Zeros and spikes without decay"]
        for k, kind in enumerate((lost, seen))
    ]
    assert said[0].reading.startswith("**arithmetic**") and "100%" in said[0].null
    assert said[1].reading.startswith("**undecided**")


# -------------------------------------------------------------------------------------------------- whole pages


def test_a_report_on_several_runs_has_its_claims_and_no_stories(tmp_path: Path) -> None:
    runs = family(tmp_path / "runs", {True: VANISHING, False: VANISHING}, seeds=1)
    page = write_report(runs, tmp_path / "report", None, Steps(Console(quiet=True))).read_text()
    anchors = re.findall(r'<section id="([\w-]+)">', page)
    assert [a for a in anchors if a in ("claims", "runs", "paths", "persistence", "onset", "commutators")] == [
        "claims",
        "runs",
        "paths",
        "persistence",
        "onset",
        "commutators",
    ]
    assert "p_ood" not in page and "More tables" not in page
    assert "Explosion of the defect" in page
    assert page.count("<strong>1/‖g‖</strong>") == 2 and "**1/" not in page  # a finding, and a cell of the table
    assert (tmp_path / "report/tables/grokking_claims.md").is_file()


def test_a_report_on_one_run_says_when_it_generalised(tmp_path: Path) -> None:
    run = write(tmp_path / "a", grokking(1200), VANISHING)
    page = write_report([run], tmp_path / "report", None, Steps(Console(quiet=True))).read_text()
    assert "add modulo 97" in page and "90 % of the test set were reached at step 1,200" in page
    assert 'id="figure-grokking_growing_pc1"' in page and 'id="table-grokking_quantiles"' in page
    assert "paper (51 M" not in page  # nothing of the other study beside it


def test_runs_of_other_tasks_and_moduli_are_reported_apart(tmp_path: Path) -> None:
    a = write(tmp_path / "a", grokking(1200), {})
    b = write(tmp_path / "b", grokking(1200), {}, config(modulus=59))
    c = write(tmp_path / "c", grokking(1200), {}, {**config(), "task": "markers"})
    with pytest.raises(UserError, match="modulus 97 and 59"):
        require_comparable([a, b])
    with pytest.raises(UserError, match="their tasks are operations and markers"):
        require_comparable([a, c])


def test_a_run_without_evaluations_has_no_table_of_these(tmp_path: Path) -> None:
    run = write(tmp_path / "a", grokking(1200), {})
    (run.path / "metrics.csv").write_text("step,train/loss\n1,4.0\n")
    assert {table.name for table in run_tables(Run(run.path))} == {"grokking_ranks", "grokking_turnover"}
    assert comparison_tables([Run(run.path)]) == []


def test_an_arm_of_an_intervention_is_no_seed_of_its_baseline(tmp_path: Path) -> None:
    baseline, arm, tied = (write(tmp_path / name, grokking(1200), {}) for name in ("baseline", "arm", "tied"))
    for run, name in (
        (arm, "mini_gpt_pl.callbacks.SubspaceIntervention"),
        (tied, "mini_gpt_pl.arithmetic.tied_norm.TiedNorm"),
    ):
        told = config()
        told["trainer"]["callbacks"].append({"class_path": name, "init_args": {"run": "other"}})
        (run.path / "config.yaml").write_text(yaml.safe_dump(told))
    known = residue_runs([Run(run.path) for run in (baseline, arm, tied)])
    assert [run.operation for run in known] == ["add", "add, tied norm"]
    assert len(residue_runs([Run(arm.path)])) == 1  # alone it has its own report


def test_a_table_of_all_runs_names_what_was_never_reached(tmp_path: Path) -> None:
    runs = [write(tmp_path / "a", grokking(1200), {}), write(tmp_path / "b", memorising(), {}, config("x3_xy"))]
    table = written(tables(runs)["grokking_runs"], "run")
    assert table.loc["a", "stop"] == "1,400" and table.loc["b", "t90"] == "never"


# ------------------------------------------------------------------------------------------------- pages, presets


def test_tables_are_put_into_their_places(tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/one.md").write_text("## Title\n\n| a |\n| --- |\n| 1 |\n\n* note\n")
    page = "# Page\n\n<!-- table tables/one -->\nold\n<!-- end -->\n\n<!-- table tables/none -->\n<!-- end -->\n"
    file = tmp_path / "page.md"
    file.write_text(page)
    with pytest.raises(SystemExit) as caught:
        place.main([str(file), "--check"])
    assert caught.value.code == 1
    place.main([str(file)])
    new = file.read_text()
    assert "| 1 |\n\n* note\n\n<!-- end -->" in new and "old" not in new and "Title" not in new
    assert "<!-- table tables/none -->\n<!-- end -->" in new
    assert place.filled(new, tmp_path) == new
    with pytest.raises(UserError, match="has no end"):
        place.filled("<!-- table a -->\n", tmp_path)


def test_a_composed_run_of_fixed_length_does_not_stop_when_it_groks(capsys: pytest.CaptureFixture[str]) -> None:
    configs = Path(cli.__file__).parents[1] / "configs" / "grokking"
    for first in ("paper", "smoke"):
        with pytest.raises(SystemExit):
            cli.run(
                f"fit -c {configs}/{first}.yaml -c {configs}/fixed.yaml -c {configs}/commutator.yaml --print_config"
            )
        told = yaml.safe_load(capsys.readouterr().out)
        callbacks = {c["class_path"].rpartition(".")[2]: c["init_args"] for c in told["trainer"]["callbacks"]}
        assert callbacks["Evaluation"]["stop_at"] is None and callbacks["Evaluation"]["continue_steps"] == 0
        assert "CommutatorProbe" in callbacks


# ----------------------------------------------------------------------------------------------- kept results

KEPT_RUNS = Path(cli.__file__).parents[1] / "docs" / "grokking"


def test_the_page_has_the_tables_that_the_kept_runs_give_again() -> None:
    page = (KEPT_RUNS / "README.md").read_text()
    assert place.filled(page, KEPT_RUNS) == page
    runs = [Run(path) for path in sorted((KEPT_RUNS / "runs/grokking").iterdir())]
    assert len(runs) == 7
    again = tables(runs)
    assert "grokking_claims" in page and "grokking_discrimination" in page
    for name in (
        "grokking_claims",
        "grokking_runs",
        "grokking_pc1_published",
        "grokking_onsets",
        "grokking_last_defect",
    ):
        assert (KEPT_RUNS / f"small/tables/{name}.md").read_text() == again[name].markdown(), name


def test_the_studys_configuration_is_repeated_and_its_tables_are_those_of_the_kept_runs() -> None:
    folders = [KEPT_RUNS / "runs/grokking_paper", KEPT_RUNS / "runs/grokking_nodecay"]
    runs = residue_runs([Run(path) for folder in folders for path in sorted(folder.iterdir())])
    assert len(runs) == 21 and not any(run.differs for run in runs)
    assert [run.groks for run in runs if run.is_free] == [False] * 3
    assert {run.operation for run in runs if run.groks} == {"add", "sub", "mul", "x2_y2"}
    assert [run.groks for run in runs if run.operation in ("x3_xy", "x2_xy_y2")] == [False] * 6
    for table in (overview(runs), onsets(runs), defect_at_grok(runs), last_defects(runs)):
        kept = (KEPT_RUNS / f"paper/tables/{table.name}.md").read_text()
        assert sorted(kept.splitlines()) == sorted(table.markdown().splitlines()), table.name


def test_kept_runs_hold_what_the_smallest_configuration_promises() -> None:
    runs = residue_runs([Run(path) for path in sorted((KEPT_RUNS / "runs/grokking").iterdir())])
    assert [run.groks for run in runs if run.operation == "add" and run.decay] == [True] * 3
    assert not any(run.groks for run in runs if run.operation == "x3_xy" or not run.decay)
    for run in runs:
        assert run.commutator("defect").iloc[0] < 1  # in float64; a difference of float32 weights has 2
        assert (run.commutator("resolved") == 1).all()
    free = next(run for run in runs if not run.decay)
    assert (free.commutator("float32_signal") < 1).mean() > 0.9


# -------------------------------------------------------------------------------------------------- run by run


def alternating(at: int) -> Series:
    """A c of 40, 60, 50 and so on before a step, from there on of 20 and 80 in turn, and of 10 at 200 steps behind."""
    return lambda step: (40, 60, 50)[step // 100 % 3] if step < at else 10 if step == at + 200 else 20 + 60 * (
        (step - at) // 100 % 2
    )  # fmt: skip


def test_c_falls_from_its_level_to_its_floor_though_single_records_rise(tmp_path: Path) -> None:
    fall = fall_of_c(one(write(tmp_path / "a", grokking(1200), {**VANISHING, "c": alternating(1200)})))
    assert fall is not None
    assert (fall.level, fall.floor, fall.single) == (50, 10, 20 / 80) and fall.factor == 5


def test_a_c_that_vanishes_has_fallen_without_a_limit(tmp_path: Path) -> None:
    gone = {**VANISHING, "c": rises(1200, 5.0, 0.0)}
    fall = fall_of_c(one(write(tmp_path / "a", grokking(1200), gone)))
    assert fall is not None and (fall.level, fall.floor) == (5, 0) and fall.factor == float("inf")
    assert np.isnan(fall.single)  # nothing at t90 already


def test_where_c_is_not_known_around_the_grok_step_nothing_is_said_of_it(tmp_path: Path) -> None:
    assert fall_of_c(one(write(tmp_path / "never", memorising(), VANISHING))) is None
    assert fall_of_c(one(write(tmp_path / "without", grokking(1200), {}))) is None
    assert fall_of_c(one(write(tmp_path / "early", grokking(200), VANISHING))) is None  # two records before
    late = fall_of_c(one(write(tmp_path / "late", grokking(1800), VANISHING)))
    assert late is not None and np.isnan(late.single) and late.factor == pytest.approx(1.0)


def test_pc1_over_its_null_is_of_the_path_to_the_stop(tmp_path: Path) -> None:
    run = one(write(tmp_path / "a", grokking(1200), {}))
    excess, path = excess_at_stop(run), run.numbers(Phase("to the stop", 0, 1400))
    assert excess is not None
    over = {label: of["pc1_centred"]["measured"] - of["pc1_centred"]["innovation_walk"] for label, of in path.items()}
    assert excess.whole == over.pop("attention")
    assert excess.group in GROUPS and excess.furthest == max(over.values(), key=abs) != min(over.values(), key=abs)
    assert excess_at_stop(one(write(tmp_path / "b", memorising(), {}))) is None


def test_the_table_run_by_run_counts_what_holds(tmp_path: Path) -> None:
    falling, level = {**VANISHING, "c": alternating(1200)}, {**VANISHING, "c": constant(5.0)}
    runs = [
        write(tmp_path / "1", grokking(1200), falling, config(seed=1)),
        write(tmp_path / "2", grokking(1200), level, config(seed=2)),
        write(tmp_path / "3", memorising(), level, config(seed=3)),
    ]
    table = seed_by_seed(residue_runs(runs))
    assert table.frame["seed"].tolist() == ["1", "2"]  # nothing to say of the third
    assert table.frame["falls by"].tolist() == ["5.0", "1.0"]
    assert (
        "of the 300 steps from there on in 1 of 2 runs" in table.notes[1] and "later in 0 of 2 runs" in table.notes[1]
    )
    near = int((table.numbers["all, over ‖e‖"].abs() < 0.06).sum()) if table.numbers is not None else -1
    each = int((table.numbers["furthest matrix, over ‖e‖"].abs() < 0.06).sum()) if table.numbers is not None else -1
    assert f"together in {near} of 2 runs, for each matrix by itself in {each} of 2 runs" in table.notes[0]
    assert seed_by_seed([]).frame.empty
