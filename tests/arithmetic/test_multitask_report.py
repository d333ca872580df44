"""The report on several tasks on one trunk: steps, orders, commutators and fits against numbers of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from conftest import bent_path, one_line_error, record

from mini_gpt_pl import main as cli
from mini_gpt_pl.arithmetic.study.contents import CONTENTS, comparison_tables, run_tables
from mini_gpt_pl.arithmetic.study.multitask import (
    commutators_of,
    decay_families,
    decay_table,
    fits,
    multitask_claims,
    multitask_tables,
    order_of,
    tasks_of,
    tasks_table,
)
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection
from mini_gpt_pl.report.contents import MORE, claimed
from mini_gpt_pl.report.probe_tables import interference
from mini_gpt_pl.report.published import NOTHING
from mini_gpt_pl.report.sheet import Table
from mini_gpt_pl.report.subject import Subject
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.training import cli as trainer_cli

CONFIGS = Path(cli.__file__).resolve().parents[1] / "configs" / "grokking"
WEIGHTS = ParameterSelection(("head.weight",), ((6, 5),), ("head",))
STEPS = range(0, 3001, 100)
Series = Callable[[int], float]


def rises(at: int | None, low: float = 0.0, high: float = 1.0) -> Series:
    return lambda step: high if at is not None and step >= at else low


def run_of(
    folder: Path,
    t90: Mapping[str, int | None],
    *,
    decay: float = 1.0,
    seed: int = 1,
    more: Mapping[str, Series] | None = None,
    losses: tuple[tuple[str, str], ...] = (),
) -> Run:
    """A run whose tasks generalise at given steps, with what its probes logged."""
    folder.mkdir(parents=True)
    recorder = {"class_path": "mini_gpt_pl.callbacks.TrajectoryRecorder", "init_args": {"name": "all"}}
    probes: list[dict[str, Any]] = [
        {"class_path": "mini_gpt_pl.callbacks.CommutatorProbe", "init_args": {"name": f"{a}_{b}", "losses": [a, b]}}
        for a, b in losses
    ]
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3, "weight_decay": decay}}
    told = {
        "task": "multitask",
        "seed_everything": seed,
        "trainer": {"callbacks": [recorder, *probes]},
        "model": {"optimizer": optimizer},
        "data": {"operations": list(t90), "modulus": 11, "seed": seed},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(told))
    worst = None if None in t90.values() else max(step or 0 for step in t90.values())
    series: dict[str, Series] = {"eval/train_accuracy": rises(300), "eval/test_accuracy": rises(worst)}
    for task, step in t90.items():
        series |= {f"eval/train_{task}_accuracy": rises(300), f"eval/test_{task}_accuracy": rises(step)}
    series |= more or {}
    frame = pd.DataFrame({name: [one(step) for step in STEPS] for name, one in series.items()}, index=list(STEPS))
    frame.rename_axis("step").to_csv(folder / "metrics.csv")
    _, trajectory = record(WEIGHTS, bent_path(31, WEIGHTS.dim))
    trajectory.save(folder / "trajectory.safetensors")
    return Run(folder)


def commutator(name: str, c: float, defect: Series = lambda s: 1.0) -> dict[str, Series]:
    plain = {"c": c, "norm_a": 2.0, "norm_b": 3.0, "gradient_cosine": 0.25, "relative": 0.5}
    found = {f"commutator/{name}/{key}": rises(0, high=value) for key, value in plain.items()}
    return found | {f"commutator/{name}/defect": defect}


def by_name(tables: list[Table]) -> dict[str, Table]:
    return {table.name: table for table in tables}


def numbers(table: Table) -> Any:
    return table.numbers


# ------------------------------------------------------------------------------------------------------ one run


def test_each_task_has_its_milestones(tmp_path: Path) -> None:
    run = run_of(tmp_path / "a", {"add": 2000, "mul": 900, "x2_y2": None})
    assert tasks_of(run) == ("add", "mul", "x2_y2")
    rows = {row["task"]: row for row in by_name(multitask_tables(run))["grokking_tasks"].frame.to_dict("records")}
    assert [rows["mul"][name] for name in ("train 99 %", "t50", "t90", "stop")] == ["300", "900", "900", "1,100"]
    assert rows["x2_y2"]["t90"] == "never" and rows["add"]["test accuracy at the end"] == "100.0%"


def test_commutators_across_tasks_stand_beside_those_within(tmp_path: Path) -> None:
    pairs = (("add", "mul"), ("add", "add"), ("mul", "mul"), ("mul", "x2_y2"))
    values = {"add_mul": 6.0, "add_add": 4.0, "mul_mul": 9.0, "mul_x2_y2": 5.0}
    more = {key: one for name, c in values.items() for key, one in commutator(name, c).items()}
    run = run_of(tmp_path / "a", {"add": 2000, "mul": 900, "x2_y2": 1000}, more=more, losses=pairs)
    assert list(commutators_of(run)) == list(pairs)
    frame = numbers(by_name(multitask_tables(run))["grokking_cross_task"])
    first = frame[frame["window"] == frame["window"].iloc[0]].set_index(["batch A", "batch B"])
    assert first.loc[("add", "mul"), "c over that within tasks"] == pytest.approx(6 / (4 * 9) ** 0.5)
    assert first["c over that within tasks"].notna().sum() == 1  # x2_y2 has no commutator of its own
    assert first.loc[("mul", "x2_y2"), ["c", "‖g_A‖", "‖g_B‖", "cos(g_A, g_B)"]].tolist() == [5.0, 2.0, 3.0, 0.25]


def test_interference_of_every_two_losses_is_shown(tmp_path: Path) -> None:
    more = {"alignment/all/add_vs_mul": rises(1000, 0.5, -0.25), "alignment/all/a_b_vs_c": rises(0)}
    run = run_of(tmp_path / "a", {"add": None, "mul": None}, more=more)
    (table,) = interference(Subject.of(run, bootstrap=0), NOTHING)
    assert {"cos(g_add, g_mul)", "cos(g_a_b, g_c)", "/ floor, add and mul", "/ floor, a_b and c"} < set(table.frame)
    late = numbers(table).set_index("steps").loc["late"]
    assert late["cos(g_add, g_mul)"] == pytest.approx(-0.25)
    assert late["/ floor, add and mul"] == pytest.approx(0.25 / (2 / (3.141592653589793 * 30)) ** 0.5)


# -------------------------------------------------------------------------------------------------- several runs


def test_orders_of_tasks_are_told_apart_or_not(tmp_path: Path) -> None:
    kinds: dict[str, dict[str, int | None]] = {
        "published": {"add": 2000, "mul": 900, "x2_y2": 1000},
        "other": {"add": 500, "mul": 900, "x2_y2": 1000},
        "tied": {"add": 900, "mul": 900, "x2_y2": 1000},
        "never": {"add": None, "mul": 900, "x2_y2": 1000},
    }
    runs = [run_of(tmp_path / name, steps) for name, steps in kinds.items()]
    assert [order_of(run) for run in runs] == [["mul", "x2_y2", "add"], ["add", "mul", "x2_y2"], None, None]
    (table,) = tasks_table(runs)
    assert table.frame["order"].tolist()[2:] == ["not told apart"] * 2
    claim = multitask_claims(runs)[0].frame.iloc[0]
    assert "in 1 of 2 runs" in claim["here"] and "17%" in claim["null"] and claim["reading"].startswith("**mixed**")
    assert multitask_claims(runs[:1])[0].frame.iloc[0]["reading"].startswith("**reproduces**")
    assert multitask_claims(runs[1:2])[0].frame.iloc[0]["reading"].startswith("**does not reproduce**")


def swept(folder: Path, law: Callable[[float], float], decays: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)) -> list[Run]:
    return [
        run_of(folder / f"{decay}-{seed}", {"add": round(law(decay)), "mul": 100}, decay=decay, seed=seed)
        for decay in decays
        for seed in (1, 2)
    ]


def test_generalisation_against_decay_is_fitted_over_four_decays(tmp_path: Path) -> None:
    runs = swept(tmp_path, lambda w: 600 / w)
    runs.append(run_of(tmp_path / "never", {"add": None, "mul": None}, decay=2.0, seed=3))
    runs.append(run_of(tmp_path / "free", {"add": None, "mul": 100}, decay=0.0))
    (family,) = decay_families(runs)
    found = fits(family)
    assert found.exponent == pytest.approx(1.0, abs=0.05) and found.censored == 1
    assert found.errors["a w^-b"] < 0.1 < found.errors["a exp(-b w)"]
    frame = by_name(decay_table(runs))["grokking_decay"].frame
    assert frame["decay"].tolist() == ["2", "1", "0.5", "0.25", "0"]
    assert frame["generalise"].tolist() == ["2 of 3", "2 of 2", "2 of 2", "2 of 2", "0 of 1"]
    assert frame["in decay times"].tolist()[1:4] == ["0.60"] * 3 and frame["t90"].tolist()[-1] == "never"
    claims = multitask_claims(runs)[0].frame.set_index("the study says")
    law = next(row for said, row in claims.iterrows() if "as a power of it" in str(said))
    assert law["reading"] == "**the null**."
    free = claims.loc["Without weight decay no run generalises"]
    assert free["here"].startswith("0 of 1") and free["null"].startswith("8 of 9")


def test_a_flat_law_is_not_the_null_and_three_decays_have_no_fit(tmp_path: Path) -> None:
    flat = multitask_claims(swept(tmp_path / "flat", lambda w: 1000))[0].frame
    assert "**not the null**." in flat["reading"].tolist()
    few = swept(tmp_path / "few", lambda w: 600 / w, (0.5, 1.0, 2.0))
    assert "a power law takes at least 4" in " ".join(decay_table(few)[0].notes)
    assert decay_table(few[:2]) == []
    with one_line_error("at least 4"):
        fits(decay_families(few)[0])


@pytest.mark.parametrize(("onset", "reading"), [(600, "**no warning**"), (None, "**does not reproduce**")])
def test_an_onset_that_leads_stands_beside_memorisation(tmp_path: Path, onset: int | None, reading: str) -> None:
    more = commutator("add_mul", 1.0, rises(onset, 1.0, 50.0))
    run = run_of(tmp_path / "a", {"add": 2000, "mul": 900}, more=more, losses=(("add", "mul"),))
    frame = multitask_claims([run])[0].frame.set_index("the study says")
    row = frame.loc["The onset of the defect comes before generalisation in 42 of 42 conditions"]
    assert row["reading"].startswith(reading) and row["null"].endswith("1 of 1")


def test_every_table_has_a_section(tmp_path: Path) -> None:
    runs = swept(tmp_path, lambda w: 600 / w)
    of_run, over = [t.name for t in run_tables(runs[0])], [t.name for t in comparison_tables(runs)]
    assert "grokking_tasks" in of_run and {"grokking_multitask_claims", "grokking_tasks_runs", "grokking_decay"} <= set(
        over
    )
    assert not claimed(CONTENTS.of_run, of_run).get(MORE.anchor)
    assert not claimed(CONTENTS.of_runs, over).get(MORE.anchor)


# ------------------------------------------------------------------------------------------------------- preset


def test_three_tasks_have_all_their_commutators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_cli, "draw_all", lambda run: [])
    files = " ".join(f"-c {CONFIGS}/{name}.yaml" for name in ("multitask", "multitask_small", "multitask_three"))
    tiny = "--model.size.d_model 16 --model.size.d_ff 32 --data.modulus 11 --data.batch_size 16"
    cli.run(f"fit {files} {tiny} --trainer.max_steps 1 --trainer.log_every_n_steps 1 --run_dir {tmp_path}/three")
    found = commutators_of(Run(tmp_path / "three"))
    tasks = ("add", "mul", "x2_y2")
    assert set(found) == {(a, b) for k, a in enumerate(tasks) for b in tasks[k:]}
