"""The arms as configured, through the command line, and the table that their runs are read by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from conftest import one_line_error

from mini_gpt_pl import callbacks
from mini_gpt_pl import main as cli
from mini_gpt_pl.arithmetic.study import interventions
from mini_gpt_pl.arithmetic.study.interventions import Delays, Ended, arms_below, claims_table, survival, tables
from mini_gpt_pl.callbacks import BasisSource
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.runs.checkpoints import read_checkpoint
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.sweep.grid import read_sweep
from mini_gpt_pl.training import cli as trainer_cli

ROOT = Path(cli.__file__).resolve().parents[1]
FOLDER = ROOT / "configs" / "grokking" / "interventions"
ARMS = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "base")
# Each way through the code; the others differ in numbers.
RUN = (
    *("none", "pca_s075", "penalty_s050", "scale_s075", "blocks_s075", "rank_one_s075", "theta0_s075", "other_s075"),
    *(
        "past_s075",
        "isotropic_s100",
        "inside_s100",
        "decay_off",
        "decay_span_s100",
        "update_s075",
        "kick",
        "kick_random",
    ),
)
OPERATIONS = "runs/interventions/operations"
TINY = f"-c {ROOT}/configs/grokking/smoke.yaml -c {ROOT}/configs/grokking/tiny.yaml"


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_can_be_made_and_begins_at_one_step(arm: str) -> None:
    """A run of hours must not fail on its last arm; the baselines have memorised by then, see `test_grokking_run`."""
    given = yaml.safe_load((FOLDER / f"{arm}.yaml").read_text())["trainer"].get("callbacks+", [])
    assert len(given) == (arm != "none")
    for callback in given:
        settings = callback["init_args"]
        if "basis" in settings:
            assert "{seed}" in settings["basis"].get("run", "{seed}") or arm.startswith("other")
            settings["basis"] = BasisSource(**settings["basis"])
        made = getattr(callbacks, callback["class_path"].removeprefix("mini_gpt_pl.callbacks."))(**settings)
        assert made.start == 400


@pytest.mark.parametrize("arm", sorted(path.stem for path in (FOLDER / "operations").glob("*.yaml")))
def test_arms_over_operations_differ_in_the_run_of_their_basis_alone(arm: str) -> None:
    plain, own = (yaml.safe_load((folder / f"{arm}.yaml").read_text()) for folder in (FOLDER, FOLDER / "operations"))
    runs = [config["trainer"]["callbacks+"][0]["init_args"]["basis"].pop("run") for config in (plain, own)]
    assert plain == own and "{operation}" not in runs[0] and "{operation}" in runs[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Baselines of two seeds, and arms of every kind, changed from step 4 on."""
    lab = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_cli, "draw_all", lambda run: [])
        for seed in (1, 6):
            fit(lab / f"runs/interventions/baseline/seed_everything-{seed}", f"--seed_everything {seed}")
        patch.chdir(lab)
        for operation in ("mul", "x2_y2"):
            known = f"--data.operation {operation} --seed_everything 1"
            fit(lab / f"{OPERATIONS}/baseline/operation-{operation.replace('_', '-')}_seed_everything-1", known)
            for arm in ("operations/pca_s075", "none"):
                name = f"operation-{operation.replace('_', '-')}_{Path(arm).stem.replace('_', '-')}_seed_everything-1"
                fit(lab / f"{OPERATIONS}/arms/{name}", f"-c {changed(lab, arm)} {known}")
        for arm in RUN:
            fit(lab / f"arms/{arm}_seed_everything-1", f"-c {changed(lab, arm)} --seed_everything 1")
    return lab


def fit(folder: Path, options: str) -> None:
    # Progress is of the terminal, and a checkpoint at the end is enough.
    cli.run(f"fit {TINY} {options} --trainer.max_steps 20 --run_dir {folder}")


def changed(lab: Path, arm: str) -> Path:
    """An arm's own file, beginning at step 4."""
    config = yaml.safe_load((FOLDER / f"{arm}.yaml").read_text())
    for callback in config["trainer"].get("callbacks+", []):
        assert callback["init_args"].pop("start") == 400
        callback["init_args"]["start"] = 4
        basis = callback["init_args"].get("basis") or {}
        if "until" in basis:
            assert basis.pop("until") == 400
            basis["until"] = 10
    file = lab / f"{Path(arm).name}.yaml" if "/" not in arm else lab / f"of_operations_{Path(arm).name}.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def weights(lab: Path, arm: str, step: int = 20) -> dict[str, torch.Tensor]:
    run = Run(lab / f"arms/{arm}_seed_everything-1")
    found: dict[str, torch.Tensor] = read_checkpoint(run.checkpoints[step])["state_dict"]
    return found


def test_arms_train_and_say_what_they_changed(lab: Path) -> None:
    bare = weights(lab, "none")
    for arm in RUN[1:]:
        assert not all(torch.equal(bare[name], value) for name, value in weights(lab, arm).items()), arm
        logged = Run(lab / f"arms/{arm}_seed_everything-1").metrics.filter(regex="^intervention/").dropna(how="all")
        assert len(logged) > 0 or arm == "decay_off", arm
        assert logged.index.min() >= 4 or arm == "decay_off"


def test_the_control_is_the_baseline_bit_for_bit(lab: Path) -> None:
    base = read_checkpoint(Run(lab / "runs/interventions/baseline/seed_everything-1").checkpoints[20])["state_dict"]
    assert all(torch.equal(base[name], value) for name, value in weights(lab, "none").items())


def test_matched_arms_kick_equally_far(lab: Path) -> None:
    runs = (Run(lab / f"arms/{arm}_seed_everything-1") for arm in ("kick", "kick_random"))
    first, second = (float(run.series("intervention/kick/length").iloc[0]) for run in runs)
    assert first == second > 0


def test_decay_is_what_was_asked_for_and_the_recorder_knows(lab: Path) -> None:
    survival = {arm: Run(lab / f"arms/{arm}_seed_everything-1").trajectory.survival for arm in ("none", "decay_off")}
    assert survival["none"][-1] == pytest.approx((1 - 3e-3) ** 20, rel=1e-9)
    assert survival["decay_off"][-1] == pytest.approx((1 - 3e-3) ** 4, rel=1e-9)


def test_each_operation_has_the_path_of_its_own_baseline(lab: Path) -> None:
    for operation in ("mul", "x2_y2"):
        runs = arms_below(lab / OPERATIONS / "arms", operation)
        assert set(runs) == {"none", "pca_s075"}
        assert runs["pca_s075"][0].series("intervention/subspace/parallel").iloc[0] > 0
        assert runs["pca_s075"][0].config["data"]["operation"] == operation
    with one_line_error("no run of the operation 'sub'"):
        arms_below(lab / OPERATIONS / "arms", "sub")


def test_a_basis_of_what_the_data_do_not_say(lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lab)
    file = tmp_path / "arm.yaml"
    file.write_text(changed(lab, "pca_s075").read_text().replace("{seed}", "{sede}"))
    with one_line_error("asks for a sede"):
        fit(tmp_path / "run", f"-c {file}")


def test_a_resumed_arm_is_the_whole_one(lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_cli, "draw_all", lambda run: [])
    monkeypatch.chdir(lab)
    for arm in ("decay_span_s100", "update_s075"):
        cli.run(f"fit {TINY} -c {arm}.yaml --seed_everything 1 --trainer.max_steps 20 --run_dir {tmp_path}/{arm}")
        cli.run(f"fit --ckpt_path {tmp_path}/{arm}/checkpoints/000020.ckpt --trainer.max_steps 40")
        cli.run(f"fit {TINY} -c {arm}.yaml --seed_everything 1 --run_dir {tmp_path}/{arm}_whole --trainer.max_steps 40")
        cut, whole = (read_checkpoint(tmp_path / name / "checkpoints/000040.ckpt") for name in (arm, f"{arm}_whole"))
        assert all(torch.equal(cut["state_dict"][name], value) for name, value in whole["state_dict"].items()), arm


def test_the_sweep_holds_every_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sweep = read_sweep(ROOT / "configs/sweeps/grokking_interventions.yaml")
    assert sorted(Path(value).stem for value in sweep.values["config"]) == ARMS
    assert len(sweep.points) == 5 * len(ARMS)
    assert sweep.points[0].name == "none_seed_everything-1"
    seeds = read_sweep(ROOT / "configs/sweeps/grokking_baselines.yaml").values["seed_everything"]
    assert set(sweep.values["seed_everything"]) < set(seeds) and 6 in seeds


def test_arms_over_operations_find_the_baselines_of_their_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sweeps = ROOT / "configs/sweeps"
    baselines = {point.name for point in read_sweep(sweeps / "grokking_baselines_operations.yaml").points}
    sweep = read_sweep(sweeps / "grokking_interventions_operations.yaml")
    for point in sweep.points:
        operation, seed = point.parameters["data.operation"], point.parameters["seed_everything"]
        assert f"operation-{operation.replace('_', '-')}_seed_everything-{seed}" in baselines
    assert len(sweep.points) == 4 * 8 * 3 == len({point.name for point in sweep.points})


@pytest.mark.parametrize(
    ("name", "added", "arms"),
    [
        ("kick", {1.0, 5.0, 20.0}, {"kick_multiple_1.0", "kick_multiple_5.0", "kick_multiple_20.0"}),
        ("noise", {0.01, 0.05, 0.5}, {"noise_length_0.01", "noise_length_0.05", "noise_length_0.5"}),
        ("penalty", {0.9, 0.7, 0.1}, {f"penalty_s050_orthogonal_{b}" for b in (0.9, 0.7, 0.1)}),
        ("isotropic", {0.75, 0.5}, {"isotropic_s075_orthogonal_0.75", "isotropic_s075_orthogonal_0.5"}),
    ],
)
def test_the_study_s_other_doses_are_arms_beside_the_others(
    name: str, added: set[float], arms: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    sweep = read_sweep(ROOT / f"configs/sweeps/grokking_doses_{name}.yaml")
    (key,) = (key for key in sweep.values if key.startswith("trainer.callbacks."))
    assert set(sweep.values[key]) == added
    file = ROOT / str(sweep.values["config"][0])
    given = yaml.safe_load(file.read_text())["trainer"]["callbacks+"][-1]["init_args"]
    assert given[key.removeprefix("trainer.callbacks.")] not in added  # it is there already
    for point in sweep.points:
        write_run(tmp_path / point.name, point.parameters["seed_everything"], 1000, 1100)
    assert set(arms_below(tmp_path)) == arms


# ---------------------------------------------------------------------------------------------------- the table


def write_run(folder: Path, seed: int, at: int | None, stopped: int, train: Sequence[float] = (0.2, 1.0, 0.9)) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"seed_everything: {seed}\n")
    outcome = {"state": "finished", "step": stopped, "milestones": {"train_99": 300, "test_90": at}}
    (folder / "outcome.json").write_text(json.dumps(outcome))
    rows = {"step": [100, 300, stopped], "eval/train_accuracy": train, "eval/weight_norm": [30.0, 25.0, 20.0]}
    pd.DataFrame(rows).to_csv(folder / "metrics.csv", index=False)


@pytest.fixture
def ended(tmp_path: Path) -> Path:
    for seed, at in ((1, 1000), (2, 1100), (3, 1200)):
        write_run(tmp_path / f"none_seed_everything-{seed}", seed, at, at + 100)
    for seed, late in ((1, 1500), (2, 1200), (3, None)):
        write_run(tmp_path / f"late_seed_everything-{seed}", seed, late, 3000 if late is None else late + 100)
    for seed in (1, 2):
        write_run(tmp_path / f"never_seed_everything-{seed}", seed, None, 3000, train=(0.1, 1.0, 0.02))
    (tmp_path / "going_seed_everything-1").mkdir()
    (tmp_path / "going_seed_everything-1/config.yaml").write_text("seed_everything: 1\n")
    return tmp_path


def test_runs_are_censored_at_their_cap(ended: Path) -> None:
    _, shown, every, curves = tables(arms_below(ended))
    rows = {row["arm"]: row for row in shown.frame.to_dict("records")}
    assert list(rows) == ["late", "never", "none"]
    assert rows["none"]["median step"] == "1100" and rows["none"]["delay"] == "+0 (+0 to +0)"
    assert rows["late"]["generalised"] == "2" and rows["late"]["median step"] == "1500"
    assert rows["late"]["delay"] == "+500 (+100 to > +1800)"
    assert rows["late"]["not yet at 1200"] == "67%"
    assert rows["never"]["median step"] == "> 3000" and rows["never"]["delay"].startswith("> +2000 (> +1900")
    assert rows["never"]["train accuracy, lowest"] == "0.020"
    assert any("1 runs that have not ended" in note for note in shown.notes)
    runs = every.frame[every.frame["arm"] == "late"]
    assert runs["seed"].tolist() == ["1", "2", "3"] and runs["generalised"].tolist() == [
        "1500",
        "1200",
        "not by the end",
    ]
    late = curves.frame[curves.frame["arm"] == "late"]
    assert late["not yet"].tolist() == ["67%", "33%", "33%"] and late["at risk"].tolist() == ["3", "2", "1"]


def test_the_command_writes_tables_and_a_figure(
    ended: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path_factory.mktemp("tables")
    interventions.main([str(ended), "--out", str(out), "--draw", "none", "late"])
    assert {path.name for path in out.iterdir()} >= {"interventions.csv", "interventions.md", "interventions.png"}
    assert "late" in capsys.readouterr().out
    with pytest.raises(UserError, match="--control"):
        interventions.main([str(ended), "--out", str(out), "--control", "nobody"])


def test_a_run_that_never_memorised_is_told_by_its_last_accuracy(ended: Path) -> None:
    folder = ended / "none_seed_everything-1"
    outcome = {"state": "finished", "step": 1100, "milestones": {"train_99": None, "test_90": None}}
    (folder / "outcome.json").write_text(json.dumps(outcome))
    found = Ended.of(Run(folder), "test_90")
    assert found is not None and found.train == 0.9


def test_a_milestone_that_nobody_watched_for(ended: Path) -> None:
    with one_line_error("no milestone"):
        Ended.of(Run(ended / "none_seed_everything-1"), "test_91")


def test_survival_of_nobody_stopped(ended: Path) -> None:
    runs = [Ended.of(run, "test_90") for run in arms_below(ended)["none"]]
    lived = survival([run for run in runs if run is not None])
    assert lived.median == 1100 and float(lived.surviving[-1]) == 0.0


# --------------------------------------------------------------------------------------------------- the claims


def arm(*steps: int | None, train: float = 0.99) -> list[Ended]:
    """Runs of seeds 1, 2, ... that generalised at these steps; None: not by 5,000."""
    return [
        Ended(seed, at, 5000 if at is None else at + 100, train, 20.0, 0.01, 0.01)
        for seed, at in enumerate(steps, start=1)
    ]


BARE = (1000, 1100, 1200, 1300)
LATER = tuple(step + 300 for step in BARE)


def reading(begins: str, **arms: list[Ended]) -> str:
    """The reading of the one claim that begins so."""
    frame = claims_table({"none": arm(*BARE)} | arms).frame
    found = frame[frame["the study says"].str.startswith(begins)]["reading"]
    assert len(found) == 1
    return str(found.iloc[0])


def test_delays_are_between_runs_of_one_seed() -> None:
    found = Delays.between(arm(1500, None, 1150), arm(*BARE))
    assert found.steps == (-50, 500, 3900) and found.censored == (False, False, True)
    assert str(found) == "+500 (-50 to > +3900)"
    assert found.longer(50) == 2
    assert str(Delays.between(arm(1500), arm(None))) == "-"


@pytest.mark.parametrize(
    ("pca", "amplify", "expected"),
    [
        (LATER, BARE, "reproduces"),
        (LATER, LATER, "amplification"),
        (LATER, tuple(step + 150 for step in BARE), "partly amplification"),
        (BARE, LATER, "does not reproduce"),
        ((None, None, None, None), LATER, "partly amplification"),
    ],
)
def test_suppression_is_read_beside_amplification(
    pca: Sequence[int | None], amplify: Sequence[int], expected: str
) -> None:
    doses = {f"pca_s{n}": arm(*BARE) for n in ("025", "050")}
    arms = doses | {"pca_s075": arm(*pca), "amplify_s075": arm(*amplify), "scale_s075": arm(*BARE)}
    assert reading("Suppressing", **arms).startswith(f"**{expected}**")


def test_a_subspace_is_specific_only_beside_every_matched_one() -> None:
    names = ("blocks_s075", "rank_one_s075", "theta0_s075", "other_s075")
    matched = {name: arm(*BARE) for name in names} | {"isotropic_s075": arm(*BARE), "pca_s075": arm(*LATER)}
    assert reading("It is", **matched).startswith("**reproduces**")
    matched["other_s075"] = arm(*LATER)
    found = reading("It is", **matched)
    assert "not of this path" in found and found.endswith("no longer than with other_s075.")
    assert "nothing to explain" in reading("It is", **(matched | {"pca_s075": arm(*BARE)}))


@pytest.mark.parametrize(
    ("projected", "free", "expected"),
    [
        (arm(None, None, train=0.02), arm(None, None, train=1.0), "erased by decay"),
        (arm(None, None, train=0.02), arm(None, None, train=0.02), "erased**"),
        (arm(None, None, train=0.99), arm(None, None, train=1.0), "**reproduces**"),
        (arm(None, 2000), arm(None, None, train=1.0), "does not reproduce"),
    ],
)
def test_a_network_that_forgot_its_training_set_tests_nothing(
    projected: list[Ended], free: list[Ended], expected: str
) -> None:
    arms = {"pca_s100": projected, "decay_off_s100": free}
    assert expected in reading("Orthogonal flow", **arms)
    assert "every run generalises" in reading("Orthogonal flow", **arms, inside_s100=arm(*LATER))
    assert "alone" not in reading("Orthogonal flow", **arms, inside_s100=arm(2000, None))


def test_removal_kicks_and_updates_are_read_against_their_controls() -> None:
    both = {"remove": arm(*BARE), "update_remove": arm(*LATER), "blocks_remove": arm(*BARE)}
    assert "not necessary" in reading("Motion along", **both)
    assert "**stands**" in reading("Motion along", **(both | {"remove": arm(None, *BARE[1:])}))
    alike = both | {"remove": arm(None, *BARE[1:]), "blocks_remove": arm(None, *BARE[1:])}
    assert "not of this path" in reading("Motion along", **alike)
    assert "**erased**" in reading("Motion along", **(both | {"remove": arm(None, *BARE[1:], train=0.1)}))
    assert reading("Motion along", **(both | {"update_remove": arm(*BARE)})).endswith("and no later.")
    sooner = both | {"update_remove": arm(*BARE), "remove": arm(*(step - 300 for step in BARE))}
    assert reading("Motion along", **sooner).endswith("and earlier with remove.")
    kicks = {"kick": arm(*BARE), "kick_random": arm(*BARE)}
    assert reading("Kicks", **kicks).startswith("**stands**")
    assert "differ for kick" in reading("Kicks", **(kicks | {"kick_random": arm(*LATER)}))
    assert "lower rate**" in reading("(not tested)", update_s075=arm(*LATER), update_scale_s075=arm(*LATER))
    assert "more than" in reading("(not tested)", update_s075=arm(*LATER), update_scale_s075=arm(*BARE))
    confined = {"update_s075": arm(*LATER), "update_scale_s075": arm(*LATER), "update_s100_decay_span": arm(None, None)}
    assert "still known" in reading("(not tested)", **confined)
    confined["update_s100_decay_span"] = arm(None, None, train=0.1)
    assert "still known" not in reading("(not tested)", **confined)
    assert "no effect" in reading("(not tested)", update_s075=arm(*BARE), update_scale_s075=arm(*BARE))


def test_claims_without_their_arms_are_left_out() -> None:
    assert claims_table({"none": arm(*BARE)}).frame.empty
