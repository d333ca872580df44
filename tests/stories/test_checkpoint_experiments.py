"""Experiments that train again from checkpoints, and what the report says of switches and their errors."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import one_line_error
from torch import Tensor, nn

from mini_gpt_pl import main as cli
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.path import pca
from mini_gpt_pl.geometry.path.switching import Interval
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.runs.record import RECORD
from mini_gpt_pl.stories import pipeline
from mini_gpt_pl.stories.data.probe import Stream, sample_rng
from mini_gpt_pl.stories.evaluation import binomial_error, bootstrap_error
from mini_gpt_pl.stories.experiments import main
from mini_gpt_pl.stories.experiments.figures import EXPERIMENT_FIGURES
from mini_gpt_pl.stories.experiments.relaxation import Laboratory, Protocol
from mini_gpt_pl.stories.experiments.tables import EXPERIMENTS, Depth
from mini_gpt_pl.stories.experiments.trials import Checkpoints
from mini_gpt_pl.stories.module import ProbedGPT
from mini_gpt_pl.stories.objective import IGNORE
from mini_gpt_pl.stories.stored import StoredRun
from mini_gpt_pl.stories.study.contents import RUN_FIGURES, run_tables
from mini_gpt_pl.stories.study.switch_series import dimensions
from mini_gpt_pl.stories.study.theory_tables import correlation_times, restoring_force
from mini_gpt_pl.stories.switches import Judged, Rules, events_of, judged, switches_by_noise
from mini_gpt_pl.training import cli as trainer_cli

TINY = str(Path(cli.__file__).resolve().parents[1] / "tests" / "tiny.yaml")
MORE = """
model: {schedule: {total: 24}}
data: {probe: {p_probe: 0.3, eval_examples: 40}}
trainer:
  max_steps: 24
  val_check_interval: 2
  callbacks:
    - class_path: mini_gpt_pl.callbacks.TrajectoryRecorder
      init_args:
        pattern: '(?P<group>blocks\\.\\d+)\\.(attn\\.(qkv|out_proj)|mlp\\.(w_up|w_down))\\.weight'
        schedule: {every: 2}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {every_n_train_steps: 2, save_top_k: -1, filename: '{step:06d}', auto_insert_metric_name: false}
"""
# Peaks at 4, 12 and 20, troughs at 8, 16 and 22: nothing of the kind happens in a run of seconds.
SERIES = {2: 0.1, 4: 0.5, 6: 0.3, 8: 0.1, 10: 0.4, 12: 0.6, 14: 0.2, 16: 0.1, 18: 0.5, 20: 0.7, 22: 0.3, 24: 0.4}
FEW = ("--pairs", "2", "--steps", "3", "--batch_size", "4", "--accelerator", "cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with checkpoints and snapshots at every evaluation, and a p_ood that swings."""
    folder = tmp_path_factory.mktemp("swinging")
    args = ["fit", "-c", TINY, "-c", MORE, "--run_dir", str(folder / "run"), "--data.cache_dir", str(folder / "cache")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_cli, "draw_all", lambda run: [])
        patch.setattr(sys, "argv", ["mini_gpt_pl"])
        trainer_cli.run_cli(args)
    measured = Run(folder / "run")
    table = measured.metrics.copy()
    for step, value in SERIES.items():
        table.loc[step, "probe/p_ood"] = value
    table.to_csv(measured.path / "metrics.csv")
    return Run(measured.path)


@pytest.fixture(scope="module")
def done(run: Run) -> Run:
    """The same run with every experiment done on it."""
    for name in (
        ["recovery"],
        ["recovery", "--original"],
        ["depth", "--trials", "2"],
        ["blocks"],
        ["blocks", "--original"],
    ):
        main([str(run.path), *name, *FEW])
    return Run(run.path)


@pytest.fixture
def laboratory(run: Run) -> Laboratory:
    stored = StoredRun(run)
    return Laboratory(stored.load(4), stored.data, stored.device)


def test_every_experiment_leaves_its_table_and_its_figure(done: Run) -> None:
    names = {table.name for table in run_tables(done)}
    expected = {"recovery", "recovery_original", "depth", "depth_distances", "blocks", "blocks_original"}
    assert expected | {"switching_significance", "switching_dimension", "switching_series"} <= names
    for draw in (*EXPERIMENT_FIGURES.values(), RUN_FIGURES["significance"]):
        assert draw(done).axes


def test_an_experiment_goes_on_where_it_was_broken_off(done: Run, capsys: pytest.CaptureFixture[str]) -> None:
    file = done.path / "experiments" / "recovery.json"
    whole = json.loads(file.read_text())
    broken = {**whole, "trials": dict(list(whole["trials"].items())[:3])}
    file.write_text(json.dumps(broken))
    capsys.readouterr()
    main([str(done.path), "recovery", *FEW])
    assert "3 of 7 trials are recorded already" in capsys.readouterr().out
    assert json.loads(file.read_text()) == whole  # the rest came out the same


def test_records_of_other_settings_are_not_mixed(done: Run) -> None:
    with pytest.raises(UserError, match=r"recovery\.json was made with other settings \(protocol\)"):
        main([str(done.path), "recovery", *FEW, "--batch_size", "5"])


def test_the_start_is_the_checkpoint_and_the_initial_weights_are_none(done: Run) -> None:
    trials = json.loads((done.path / "experiments" / "recovery.json").read_text())["trials"]
    stored = StoredRun(done)
    stored.data.setup("validate")
    for kind, step in (("peak", 4), ("trough", 8)):
        by_hand = _by_hand(stored.load(step), stored.data)
        assert trials[f"{kind}-4-8"]["answers"][0][1:] == pytest.approx(by_hand, rel=1e-5)
    assert trials["initial"]["answers"][0][2] == pytest.approx(math.log(stored.data.vocab_size), rel=0.1)


def _by_hand(module: ProbedGPT, data: Any) -> list[float]:
    """p_ood, nll_ood and lm_ood question by question, from the logits."""
    right, answers, ordinary = [], [], []
    module.eval()
    for batch in data.val_dataloader()[2]:
        logits = module.gpt(batch.tokens).double()
        for row, targets, mask in zip(logits, batch.targets, batch.probe_mask, strict=True):
            valid = targets != IGNORE
            nll = -row.log_softmax(-1).gather(-1, targets.clamp_min(0)[:, None])[:, 0]
            right.append(bool((row.argmax(-1) == targets)[mask].all()))
            answers += nll[mask & valid].tolist()
            ordinary += nll[~mask & valid].tolist()
    return [float(np.mean(right)), float(np.mean(answers)), float(np.mean(ordinary))]


@pytest.mark.parametrize("decay_vectors", [False, True])
def test_relaxation_is_adamw_on_the_composite_loss(laboratory: Laboratory, run: Run, decay_vectors: bool) -> None:
    """Three steps against a loop of our own in float64: other code for the loss, the clipping and the step."""
    protocol = Protocol(lr=1e-2, probe_weight=3.0, steps=3, eval_every=3, batch_size=4, decay_vectors=decay_vectors)
    stored = StoredRun(run)
    module, data = stored.module, stored.data
    module.load_state_dict(laboratory.module.state_dict())
    laboratory.relax(protocol, trial=5)
    data.setup("fit")
    module.double()
    memory: dict[str, tuple[Tensor, Tensor]] = {}
    for step in range(3):
        batch = data.draw_batch(sample_rng(data.seed, Stream.EXPERIMENTS, 5, step), 4)
        nll = nn.functional.cross_entropy(
            module.gpt(batch.tokens).flatten(0, 1), batch.targets.flatten(), reduction="none", ignore_index=IGNORE
        )
        valid, asked = batch.targets.flatten() != IGNORE, batch.probe_mask.flatten()
        probe = nll[valid & asked].sum() / max(1, int((valid & asked).sum()))
        module.zero_grad()
        (nll[valid & ~asked].mean() + 3.0 * probe).backward()
        named = dict(module.named_parameters())
        length = torch.stack([p.grad.square().sum() for p in named.values() if p.grad is not None]).sum().sqrt()
        for name, weight in named.items():
            assert weight.grad is not None
            gradient = weight.grad * min(1.0, 1.0 / float(length))
            m, v = memory.get(name, (torch.zeros_like(gradient), torch.zeros_like(gradient)))
            m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
            memory[name] = m, v
            decay = 0.5 if weight.ndim > 1 or decay_vectors else 0.0
            update = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
            weight.data = weight.data * (1 - 1e-2 * decay) - 1e-2 * update
    for name, weight in module.named_parameters():
        got = dict(laboratory.module.named_parameters())[name].double()
        # A gradient near zero decides its update by its sign alone.
        assert float((got - weight).norm() / weight.norm()) < 2e-3, name


# ------------------------------------------------------------------------------------------ disturbed weights


TRUNK = {"0": ["a", "b"], "1": ["c"]}


@pytest.fixture(scope="module")
def checkpoints(run: Run) -> Checkpoints:
    generator = torch.Generator().manual_seed(3)
    states = {step: {n: torch.randn(40, 50, generator=generator) for n in "abcd"} for step in range(2, 26, 2)}
    return Checkpoints(states.__getitem__, states[2], TRUNK, list(states), events_of(run), seed=1)


def test_noise_is_relative_to_each_matrix(checkpoints: Checkpoints) -> None:
    here, moved = checkpoints.read(4), checkpoints.noisy(4, 0.1, trial=2)
    for name in "abc":
        assert float((moved[name] - here[name]).norm() / here[name].norm()) == pytest.approx(0.1, rel=0.05)
    assert moved["d"] is here["d"]  # not of the trunk
    assert torch.equal(moved["a"], checkpoints.noisy(4, 0.1, trial=2)["a"])
    assert not torch.equal(moved["a"], checkpoints.noisy(4, 0.1, trial=3)["a"])


def test_a_displacement_is_as_long_as_the_trough_is_far(checkpoints: Checkpoints) -> None:
    peak, trough, moved = checkpoints.read(4), checkpoints.read(8), checkpoints.displaced(4, 8)
    for name in "abc":
        way = trough[name] - peak[name]
        assert float((moved[name] - peak[name]).norm()) == pytest.approx(float(way.norm()), rel=1e-5)
        cosine = torch.nn.functional.cosine_similarity((moved[name] - peak[name]).flatten(), way.flatten(), dim=0)
        assert abs(float(cosine)) < 5 / math.sqrt(2000)


def test_a_block_reaches_the_trough_at_share_1_and_others_stay(checkpoints: Checkpoints) -> None:
    moved = checkpoints.towards(4, 8, "0", 1.0, None, rms=False)
    assert all(torch.allclose(moved[name], checkpoints.read(8)[name], atol=1e-6) for name in "ab")
    assert all(moved[name] is checkpoints.read(4)[name] for name in "cd")
    random = checkpoints.towards(4, 8, "0", 0.5, 1, rms=False)
    for name in "ab":
        half = (checkpoints.read(8)[name] - checkpoints.read(4)[name]).norm() / 2
        assert float((random[name] - checkpoints.read(4)[name]).norm()) == pytest.approx(float(half), rel=1e-5)


def test_the_published_move_is_an_rms_long_and_leads_away(checkpoints: Checkpoints) -> None:
    here, there = checkpoints.read(4), checkpoints.read(8)
    moved = checkpoints.towards(4, 8, "0", 1.5, None, rms=True)
    shift = torch.cat([(moved[n] - here[n]).flatten() for n in "ab"])
    way = torch.cat([(here[n] - there[n]).flatten() for n in "ab"])
    rms = torch.cat([here[n].flatten() for n in "ab"]).square().mean().sqrt()
    assert float(shift.norm()) == pytest.approx(1.5 * float(rms), rel=1e-4)
    assert float(torch.nn.functional.cosine_similarity(shift, way, dim=0)) == pytest.approx(1.0, abs=1e-4)


# --------------------------------------------------------------------------------------------- closed forms


def test_the_half_depth_is_interpolated() -> None:
    depth = Depth("peak", 4, (0.0, 0.1, 0.2), np.array([[1.0, 0.7, 0.1], [1.0, 0.5, 0.3]]))
    assert depth.half() == pytest.approx(0.125)  # means 1, 0.6, 0.2: half lies a quarter of the way on
    low, high = depth.interval()
    assert low == pytest.approx(0.1 + 0.1 * 0.0 / 0.2) and high == pytest.approx(0.1 + 0.1 * 0.2 / 0.6)
    assert Depth("peak", 4, (0.0, 0.1), np.array([[1.0, 0.6]])).half() == math.inf
    assert depth.defined and not Depth("peak", 4, (0.0, 0.1), np.array([[0.1, 0.1]]), before=0.7).defined


def test_the_bootstrap_of_answers_is_binomial() -> None:
    assert binomial_error(0.2, 2000) == pytest.approx(math.sqrt(0.16 / 2000))
    assert bootstrap_error(0.2, 2000) == pytest.approx(binomial_error(0.2, 2000), rel=0.08)
    answers = np.arange(50) < 10
    rng = np.random.default_rng(5)
    draws = [rng.choice(answers, 50).mean() for _ in range(4000)]
    assert bootstrap_error(0.2, 50) == pytest.approx(float(np.std(draws)), rel=0.08)
    assert math.isnan(binomial_error(0.2, 0)) and math.isnan(bootstrap_error(math.nan, 10))


def test_both_errors_are_logged_at_every_evaluation(run: Run) -> None:
    table = run.metrics[["probe/p_in", "probe/p_in_se"]].dropna()
    assert len(table) == 12
    expected = [math.sqrt(p * (1 - p) / 40) for p in table["probe/p_in"]]
    assert table["probe/p_in_se"].tolist() == pytest.approx(expected, abs=1e-6)
    assert len(run.series("probe/p_ood_se")) == len(run.series("probe/p_ood_bootstrap")) == 12


def test_switches_are_judged_by_the_error_at_both_ends(run: Run) -> None:
    found = judged(run)
    assert [(one.switch.peak.step, one.switch.trough.step) for one in found] == [(4, 8), (12, 16), (20, 22)]
    first = found[0]
    assert first.error == pytest.approx(math.hypot(math.sqrt(0.25 / 40), math.sqrt(0.09 / 40)))
    assert [one.tier for one in found] == ["A", "A", "A"]
    assert Judged(first.switch, 0.15, 0.0).tier == "B" and Judged(first.switch, 0.3, 0.0).tier == "C"


def test_noise_alone_makes_switches_where_few_questions_are_asked() -> None:
    flat = [0.3] * 40
    assert switches_by_noise(flat, 200_000, Rules()) == (0.0, 0.0)
    mean, spread = switches_by_noise(flat, 100, Rules())
    assert mean > 3 and 0 < spread < mean


def test_the_dimension_of_displacements_in_closed_form() -> None:
    stretches = [Interval(0, 1), Interval(1, 2), Interval(2, 3)]
    apart = torch.eye(4, dtype=torch.float64)
    assert dimensions(apart, stretches).tolist() == pytest.approx([3.0, 3.0, 3.0])
    along = torch.ones(4, 4, dtype=torch.float64)  # every increment the same
    assert dimensions(along, stretches).tolist()[:2] == pytest.approx([1.0, 1.0], abs=1e-6)
    halfway = torch.eye(4, dtype=torch.float64)
    halfway[1, 2] = halfway[2, 1] = 0.6
    shares = np.array([1.6, 1.0, 0.4]) / 3
    expected = [math.exp(-(shares * np.log(shares)).sum()), 9 / (1.6**2 + 1 + 0.4**2), 3.0]
    assert dimensions(halfway, stretches).tolist() == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------- theory


def _path(generator: torch.Generator, decay: float, pull: float, steps: int = 400, dim: int = 300) -> tuple[Any, Any]:
    """A path that decays towards zero and is pulled back to its start along one direction, with its survival."""
    start = torch.randn(dim, generator=generator, dtype=torch.float64)
    axis = nn.functional.normalize(torch.randn(dim, generator=generator, dtype=torch.float64), dim=0)
    weights, rows = start.clone(), [start]
    for _ in range(steps):
        noise = 0.05 * torch.randn(dim, generator=generator, dtype=torch.float64)
        back = pull * ((weights - start) @ axis) * axis
        moved = weights * (1 - decay) - back + noise
        rows.append(moved - weights)
        weights = moved
    return torch.stack(rows), axis


def test_the_restoring_force_of_a_pull_is_found_beside_decay() -> None:
    decay = 0.005
    survival = [(1 - decay) ** t for t in range(401)]
    found = []
    for seed in range(8):
        rows, axis = _path(torch.Generator().manual_seed(seed), decay, pull=0.2)
        direction = torch.linalg.lstsq(rows.T, axis).solution  # the axis as a combination of the rows
        force = restoring_force(rows @ rows.T, survival, direction)
        assert force is not None and force.increments == 400
        found.append((force.kappa, force.error))
    kappa, error = np.array(found).mean(0)
    # 1 + pull / decay is 41. The slope of an autoregression with phi = 0.795 is off by (1 + 3 phi) / 400 in the mean,
    # 1.7 in units of decay, and has the standard deviation sqrt((1 - phi^2) / 400), 6.1 in them.
    assert kappa == pytest.approx(42.7, abs=3 * 6.1 / math.sqrt(8))
    assert error == pytest.approx(6.1, rel=0.4)


def test_no_decay_leaves_no_clock_for_the_force() -> None:
    gram = torch.eye(30, dtype=torch.float64)
    assert restoring_force(gram, [1.0] * 30, torch.eye(30, dtype=torch.float64)[3]) is None


def test_correlation_times_in_closed_form() -> None:
    """Along the first axis all increments agree, across it neighbours have the cosine 1/2 and no others any."""
    steps, dim = 60, 80
    increments = torch.zeros(steps, dim, dtype=torch.float64)
    increments[:, 0] = 1.0
    for t in range(steps):
        increments[t, 1 + t] = increments[t, 2 + t] = math.sqrt(0.5)
    rows = torch.cat([torch.zeros(1, dim, dtype=torch.float64), increments])
    gram = rows @ rows.T
    summed = torch.ones(steps + 1, dtype=torch.float64)  # all but along the first axis
    along, across = correlation_times(gram, summed / pca.norms(gram, summed[None]), lags=5)
    assert along == pytest.approx(1 + 2 * 5, rel=0.02) and across == pytest.approx(2.0, rel=0.05)


# --------------------------------------------------------------------------------------------- pipeline


def test_a_study_is_its_stages_and_leaves_out_what_has_ended(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    asked: list[list[str]] = []

    def execute(command: list[str]) -> subprocess.CompletedProcess[bytes]:
        asked.append(command[3:])
        return subprocess.CompletedProcess(command, 3 if command[3] == "reheat" else 0)

    monkeypatch.setattr(subprocess, "run", execute)
    with one_line_error("reheat, lr1e-3 ended with status 3"):
        pipeline.main([str(tmp_path), "--replay=--every 4", "--", "-c", TINY])
    at = str(tmp_path / "run")
    assert asked[:4] == [
        ["replay", at, "--every", "4"],
        *(["experiment", at, name] for name in ("recovery", "depth", "blocks")),
    ]
    assert asked[4][:4] == ["reheat", "-c", "paper/reheat/lr1e-3", "--ckpt_path"] and "000024.ckpt" in asked[4][4]
    assert "train: done already" in capsys.readouterr().out
    for ending in ("outcome.json", RECORD):
        (tmp_path / "run" / ending).unlink(missing_ok=True)
    assert pipeline.trained(tmp_path / "run", ["fit"]) == ["fit", "--ckpt_path", asked[4][4]]
    assert pipeline.trained(tmp_path / "new", ["fit"]) == ["fit", "--run_dir", str(tmp_path / "new")]


# ---------------------------------------------------------------------------------------------- errors


def test_what_makes_no_sense_is_refused_in_one_line(run: Run) -> None:
    for args, words in (
        (["depth", "--original"], "--original: the published depth is the one that"),
        (["depth", "--relax"], "--relax: depth trains in any case"),
        (["recovery", "--pairs", "0"], "--pairs 0: give 1 or more"),
    ):
        with one_line_error(words):
            main([str(run.path), *args])


def test_a_run_without_checkpoints_at_its_events_says_which(run: Run) -> None:
    with one_line_error(r"peak 4, trough 8.*replayable\.yaml"):
        Checkpoints(lambda step: {}, {}, TRUNK, [2, 24], events_of(run), seed=1)


def test_a_damaged_record_is_named(done: Run, tmp_path: Path) -> None:
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "depth.json").write_text('{"trials": 3}')
    with pytest.raises(UserError, match=r"depth\.json is damaged"):
        EXPERIMENTS["depth"](Run(tmp_path))


def test_a_folder_that_is_none_is_named() -> None:
    with one_line_error("nowhere"):
        main(["nowhere", "recovery"])
