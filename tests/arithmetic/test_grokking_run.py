"""Three seeds of `configs/grokking/smoke.yaml`, trained to the end, once for all that is asked of such runs."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from mini_gpt_pl import main as cli
from mini_gpt_pl.arithmetic.study.paths import excess_at_stop, fall_of_c
from mini_gpt_pl.arithmetic.study.runs import ResidueRun, residue_runs
from mini_gpt_pl.geometry.path import centred, innovations, nulls, windows
from mini_gpt_pl.runs.folder import Outcome, Run
from mini_gpt_pl.training import cli as trainer_cli

CONFIGS = Path(cli.__file__).resolve().parents[1] / "configs" / "grokking"
SEEDS = (1, 2, 3)
pytestmark = pytest.mark.timeout(900)  # the three runs take minutes where the cores are shared


@pytest.fixture(scope="module")
def grokked(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Run]:
    """A run folder for each seed: evaluations, attention snapshots and commutators every 100 steps."""
    root = tmp_path_factory.mktemp("grokked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_cli, "draw_all", lambda run: [])
        for seed in SEEDS:
            files = f"-c {CONFIGS}/smoke.yaml -c {CONFIGS}/commutator.yaml --trainer.callbacks.directions 0"
            cli.run(f"fit {files} --seed_everything {seed} --run_dir {root}/{seed} --trainer.accelerator cpu")
    return {seed: Run(root / str(seed)) for seed in SEEDS}


def outcome(run: Run) -> Outcome:
    found = run.outcome
    assert found is not None
    return found


def milestone(run: Run, name: str) -> int:
    step = outcome(run).milestones[name]
    assert step is not None, name
    return step


@pytest.mark.parametrize("seed", SEEDS)
def test_it_memorises_first_and_generalises_late(grokked: dict[int, Run], seed: int) -> None:
    run = grokked[seed]
    assert milestone(run, "train_99") <= 600
    assert 1000 <= milestone(run, "test_90") <= 2500
    accuracy = run.series("eval/test_accuracy")
    assert accuracy[milestone(run, "train_99")] < 0.05  # a plateau lies between
    assert milestone(run, "test_50") - milestone(run, "train_99") >= 500


@pytest.mark.parametrize("seed", SEEDS)
def test_it_ends_a_while_behind_its_grok_step(grokked: dict[int, Run], seed: int) -> None:
    run = grokked[seed]
    assert outcome(run).step == milestone(run, "test_98_thrice") + 200
    order = [milestone(run, name) for name in ("test_50", "test_90", "test_95", "test_98", "test_98_thrice")]
    assert order == sorted(order) and order[-1] >= order[-2] + 200


@pytest.mark.parametrize("seed", SEEDS)
def test_its_path_is_recorded_matrix_by_matrix(grokked: dict[int, Run], seed: int) -> None:
    run = grokked[seed]
    assert run.trajectory.groups == tuple(f"blocks.0.attn.w_{m}" for m in "qkvo")
    assert run.trajectory.steps == list(range(0, outcome(run).step + 1, 100))
    assert run.trajectory.survival[-1] == pytest.approx((1 - 3e-3) ** outcome(run).step, rel=1e-9)


def test_seeds_share_neither_weights_nor_split(grokked: dict[int, Run]) -> None:
    grams = [run.trajectory.grams[:, 0, 0] for run in grokked.values()]
    assert not torch.equal(grams[0], grams[1]) and not torch.equal(grams[1], grams[2])


def found_of(run: Run) -> ResidueRun:
    (found,) = residue_runs([run])
    return found


def excess(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """Centred PC1 of each matrix and of all attention, cut at the stop, and what it has over the decay null."""
    path = windows.window(run.trajectory, 0, milestone(run, "test_98_thrice"))
    grams = torch.stack([*path.grams, path.gram()])
    walks = (nulls.decaying_walk(grams, path.survival), innovations.innovation_walk(grams, path.survival))
    measured, by_increments, by_innovations = (
        centred.centred_statistics(of, path.survival)["pc1_centred"] for of in (grams, *walks)
    )
    assert bool((measured < by_increments).all())
    return measured, measured - by_innovations


def test_cut_at_the_stop_pc1_is_what_decay_gives(grokked: dict[int, Run]) -> None:
    measured, over = (torch.stack(found) for found in zip(*map(excess, grokked.values()), strict=True))
    assert float(over[:, -1].abs().max()) < 0.06  # all attention, in every seed: -4, -1 and 4 points on every CPU
    assert float(over[:, 2:4].abs().max()) < 0.06  # W_V and W_O too
    # W_Q and W_K lie up to 7 points away in single seeds, to either side; without decay the excess is 15.
    assert float(over.mean(0).abs().max()) < 0.06 and float(over.abs().max()) < 0.10
    # And that depends on the cut: no bound holds for the windows inside.
    assert float(measured.max()) < 0.75


def test_the_report_finds_the_same_excess(grokked: dict[int, Run]) -> None:
    for run in grokked.values():
        found, (_, over) = excess_at_stop(found_of(run)), excess(run)
        assert found is not None and found.whole == pytest.approx(float(over[-1]))
        furthest = int(over[:-1].abs().argmax())
        assert found.group == run.trajectory.groups[furthest]
        assert found.furthest == pytest.approx(float(over[furthest]))


def at_the_largest_defect(run: Run, name: str) -> float:
    """A commutator's number where D is the largest behind t90, over its median of the three records before t90."""
    values, t90 = run.series(f"commutator/all/{name}"), milestone(run, "test_90")
    defect = run.series("commutator/all/defect").loc[t90:]
    largest = int(defect.index[int(defect.argmax())])
    return float(values[largest] / values.loc[t90 - 300 : t90 - 100].median())


def test_what_jumps_at_grok_is_one_over_the_gradient(grokked: dict[int, Run]) -> None:
    """Where D is the largest, the gradients have vanished and the commutator without 1/||g|| has fallen, in each run.

    Behind t90 the gradient falls and comes back by turns, and with it c: 11, 87, 11. At which records it is low
    depends on the path, and so do medians of the few records behind the stop. That D is high where the gradient and c
    are low does not. In sixteen runs, eleven seeds and three instruction sets, D rose 5 to 17 times, the gradient fell
    to 0.7 to 4 per cent and c to 8 to 51.
    """
    for run in grokked.values():
        of = {name: at_the_largest_defect(run, name) for name in ("defect", "norm_a", "c")}
        assert of["defect"] > 3 and of["norm_a"] < 0.1 and of["c"] < 0.8
    assert statistics.median(at_the_largest_defect(run, "c") for run in grokked.values()) < 0.5


def test_behind_the_grok_step_the_defect_is_high_where_c_is_low(grokked: dict[int, Run]) -> None:
    """Over the records from 300 steps before t90 on: if the commutator itself exploded, both would rise together."""
    found = []
    for run in grokked.values():
        defect, c = (
            run.series(f"commutator/all/{name}").loc[milestone(run, "test_90") - 300 :] for name in ("defect", "c")
        )
        found.append(float(np.corrcoef(np.log(defect), np.log(c))[0, 1]))
    # -0.70 to -0.89 in eight runs of these seeds under three instruction sets, -0.52 at most in eleven seeds; a later
    # run without vector instructions has -0.25, -0.79 and -0.31: only the sign does not depend on the path.
    assert max(found) < -0.1


def test_c_falls_and_the_report_says_how_far(grokked: dict[int, Run]) -> None:
    """From the level of three records before t90 to the least of the 300 steps behind it.

    By more than three in two seeds of three; seed 1 falls by 3.4, 2.9, 2.7 or 2.1, as the CPU sums.
    """
    falls = []
    for run in grokked.values():
        c, t90 = run.series("commutator/all/c"), milestone(run, "test_90")
        level, floor = float(c.loc[t90 - 300 : t90 - 100].median()), float(c.loc[t90 : t90 + 300].min())
        assert float(c.loc[:t90].max()) > 2 * float(c.loc[t90:].min())
        fall = fall_of_c(found_of(run))
        assert fall is not None and (fall.level, fall.floor) == (level, floor)
        falls.append(level / floor)
    assert min(falls) > 1.5 and statistics.median(falls) > 3


@pytest.mark.parametrize("seed", SEEDS)
def test_the_first_defect_is_no_rounding(grokked: dict[int, Run], seed: int) -> None:
    first = grokked[seed].series("commutator/all/defect")
    assert first.index[0] == 0 and first.iloc[0] < 1  # in float32, 2 to 3


@pytest.mark.parametrize("seed", SEEDS)
def test_interventions_begin_once_it_has_memorised(grokked: dict[int, Run], seed: int) -> None:
    arms = (CONFIGS / "interventions").glob("*.yaml")
    starts = {
        callback["init_args"]["start"]
        for file in arms
        for callback in yaml.safe_load(file.read_text())["trainer"].get("callbacks+", [])
    }
    assert starts == {400} and milestone(grokked[seed], "train_99") <= 400
