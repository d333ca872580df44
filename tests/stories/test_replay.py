"""Replays against brute force in float64: other code for directions, gradients, curvature and lens."""

from __future__ import annotations

import csv
import json
import shutil
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import SMALL, basis_of, bent_path, normal, one_line_error
from helpers import LABELS, Array, drifts, first_direction, flat, part_losses, read_path
from torch import Tensor

from mini_gpt_pl import main as cli
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.path.snapshots import combine
from mini_gpt_pl.geometry.path.switching import Event
from mini_gpt_pl.geometry.vectors.selection import Vector
from mini_gpt_pl.runs.checkpoints import read_checkpoint
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories import stored as fixed
from mini_gpt_pl.stories.data.datamodule import Batch
from mini_gpt_pl.stories.gpt import GPT, GPTSize
from mini_gpt_pl.stories.replay import main, records, steps
from mini_gpt_pl.stories.replay.lens import lens_accuracy
from mini_gpt_pl.stories.replay.measure import Replay, Settings
from mini_gpt_pl.training import cli as trainer_cli

TINY = str(Path(cli.__file__).resolve().parents[1] / "tests" / "tiny.yaml")
# Checkpoints, snapshots and evaluations at each even step; p_probe low enough that some batches hold no probe.
MORE = """
model: {schedule: {total: 10}, probe_weight: {switch_step: 5}}
data: {probe: {p_probe: 0.3, eval_examples: 40}}
trainer:
  max_steps: 10
  val_check_interval: 2
  callbacks:
    - class_path: mini_gpt_pl.callbacks.TrajectoryRecorder
      init_args:
        pattern: '(?P<group>blocks\\.\\d+)\\.(attn\\.(qkv|out_proj)|mlp\\.(w_up|w_down))\\.weight'
        schedule: {every: 2}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {every_n_train_steps: 2, save_top_k: -1, filename: '{step:06d}', auto_insert_metric_name: false}
"""
# A peak at 4 and its trough at 8: the series of the tiny run itself has neither.
SERIES = {2: 0.1, 4: 0.5, 6: 0.3, 8: 0.1, 10: 0.2}
SETTINGS = Settings(batches=5, fisher_batches=7)
FEW = ("--batches", "5", "--fisher_batches", "7", "--accelerator", "cpu")
CLOSE: dict[str, Any] = {"rel": 2e-4, "abs": 1e-7}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run as training left it."""
    folder = tmp_path_factory.mktemp("trained")
    args = ["fit", "-c", TINY, "-c", MORE, "--run_dir", str(folder / "run"), "--data.cache_dir", str(folder / "cache")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_cli, "draw_all", lambda run: [])
        patch.setattr(sys, "argv", ["mini_gpt_pl"])
        trainer_cli.run_cli(args)
    return Run(folder / "run")


@pytest.fixture(scope="module")
def switching(trained: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same weights with a p_ood that swings."""
    run = Run(shutil.copytree(trained.path, tmp_path_factory.mktemp("switching") / "run"))
    table = run.metrics.copy()
    for step, value in SERIES.items():
        table.loc[step, "probe/p_ood"] = value
    table.to_csv(run.path / "metrics.csv")
    return Run(run.path)


@pytest.fixture(scope="module")
def replay(switching: Run) -> Replay:
    return Replay(switching, SETTINGS)


@pytest.fixture
def copy(switching: Run, tmp_path: Path) -> Run:
    """One to write into."""
    return Run(shutil.copytree(switching.path, tmp_path / "run"))


# ------------------------------------------------------------------------------------------------ brute force


def model_at(run: Run, step: int) -> GPT:
    """The model of a checkpoint in float64, built without the configuration's parser."""
    state = {
        name.removeprefix("gpt."): value
        for name, value in read_checkpoint(run.checkpoints[step])["state_dict"].items()
        if name.startswith("gpt.")
    }
    sizes = dict(run.config["model"]["size"]) | {"context": run.config["data"]["context"]}
    gpt = GPT(GPTSize(**sizes), len(state["tok_emb.weight"])).double()
    gpt.load_state_dict(state)
    return gpt


def gradient(gpt: GPT, loss: Tensor) -> dict[str, Array]:
    """One flat gradient per label."""
    names, weights = zip(*gpt.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    named = {
        f"gpt.{name}": torch.zeros_like(weight) if grad is None else grad
        for name, weight, grad in zip(names, weights, grads, strict=True)
    }
    return {label: flat(named, label) for label in LABELS}


def directions(run: Run) -> dict[str, dict[str, Array]]:
    """Every direction from the snapshot files, by SVD of the drifts: name -> label -> unit vector."""
    found: dict[str, dict[str, Array]] = {"backbone": {}, "pc2": {}, "switch": {}, "theta0": {}}
    for label in LABELS:
        at, basis = read_path(run.path, label)
        rows = drifts(basis)
        found["backbone"][label] = first_direction(rows)
        found["pc2"][label] = np.linalg.svd(rows, full_matrices=False)[2][1]
        found["switch"][label] = rows[at.index(4) - 1] - rows[at.index(8) - 1]
        found["theta0"][label] = basis[0]
    return {name: {k: v / np.linalg.norm(v) for k, v in by.items()} for name, by in found.items()}


def gradients_at(run: Run, step: int, batches: list[Batch], weight: float) -> dict[str, dict[str, Array]]:
    """Loss -> label -> (B, D)."""
    gpt = model_at(run, step)
    rows: dict[str, list[dict[str, Array]]] = {"combined": [], "lm": [], "probe": []}
    for batch in batches:
        lm, probe = part_losses(gpt, [batch])
        empty = {label: np.zeros_like(value) for label, value in gradient(gpt, lm).items()}
        rows["lm"].append(gradient(gpt, lm))
        rows["probe"].append(gradient(gpt, probe) if probe.requires_grad else empty)
        rows["combined"].append(gradient(gpt, lm + weight * probe))
    return {loss: {label: np.stack([row[label] for row in found]) for label in LABELS} for loss, found in rows.items()}


def mean_std(values: Array) -> list[float]:
    return [float(values.mean()), float(values.std(ddof=1))]


def jackknife(values: Callable[[Array], float], rows: Array) -> float:
    without = np.array([values(np.delete(rows, i, axis=0)) for i in range(len(rows))])
    return float(np.sqrt((len(rows) - 1) / len(rows) * ((without - without.mean()) ** 2).sum()))


@pytest.mark.parametrize(("step", "weight"), [(4, 2.0), (6, 4.0), (10, 4.0)])
def test_every_gradient_number_is_that_of_brute_force(replay: Replay, step: int, weight: float) -> None:
    record = replay.measure(step)
    assert record["probe_weight"] == weight
    found, v = gradients_at(replay.run, step, replay.batches[:5], weight), directions(replay.run)["backbone"]
    probed = np.array([bool(batch.probe_mask.any()) for batch in replay.batches[:5]])
    assert 1 < probed.sum() < 5  # both kinds are there
    for label in LABELS:
        dim = len(v[label])
        assert record["noise_floor"][label] == pytest.approx(np.sqrt(2 / (np.pi * dim)))
        for loss in found:
            rows = found[loss][label][probed if loss == "probe" else slice(None)]
            cos = rows @ v[label] / np.linalg.norm(rows, axis=1)
            shown = record["gradient"][loss][label]
            assert shown["cos"] == pytest.approx(mean_std(cos), **CLOSE)
            assert shown["abs_cos"] == pytest.approx(mean_std(np.abs(cos)), **CLOSE)
            assert shown["norm"] == pytest.approx(mean_std(np.linalg.norm(rows, axis=1)), **CLOSE)
        assert record["bias"][label] == pytest.approx(mean_std(found["combined"][label] @ v[label]), **CLOSE)
        lm, probe = found["lm"][label][probed], found["probe"][label][probed]
        crossed = (lm * probe).sum(1) / np.linalg.norm(lm, axis=1) / np.linalg.norm(probe, axis=1)
        assert record["interference"][label] == pytest.approx(mean_std(crossed), **CLOSE)


@pytest.mark.parametrize("step", [4, 10])
def test_every_fisher_number_is_that_of_brute_force(replay: Replay, step: int) -> None:
    record = replay.measure(step)
    found = gradients_at(replay.run, step, replay.batches, record["probe_weight"])["combined"]
    axes = directions(replay.run)
    for label in LABELS:
        rows, shown = found[label], record["fisher"][label]
        count, dim = rows.shape
        for name in ("backbone", "pc2", "switch", "theta0"):
            squares = (rows @ axes[name][label]) ** 2
            error = squares.std(ddof=1) / np.sqrt(count)
            assert shown["q"][name] == pytest.approx([squares.mean(), error], **CLOSE), name
        v = axes["backbone"][label]
        lengths = (rows**2).sum(1)
        assert shown["trace"] == pytest.approx([lengths.mean(), lengths.std(ddof=1) / np.sqrt(count)], **CLOSE)

        def random(part: Array, v: Array = v, dim: int = dim) -> float:
            return float(((part**2).sum(1).mean() - ((part @ v) ** 2).mean()) / (dim - 1))

        def anisotropy(part: Array, v: Array = v) -> float:
            return float(((part @ v) ** 2).mean()) / random(part)

        assert shown["random"] == pytest.approx(random(rows), **CLOSE)
        assert shown["anisotropy"] == pytest.approx([anisotropy(rows), jackknife(anisotropy, rows)], **CLOSE)
        _, singular, modes = np.linalg.svd(rows, full_matrices=False)
        assert shown["eigenvalues"] == pytest.approx(list(singular**2 / count), **CLOSE)
        assert shown["lambda_1"] == shown["eigenvalues"][0]
        assert shown["overlap"] == pytest.approx(abs(modes[0] @ v), **CLOSE)


def test_the_switch_is_from_the_first_peak_to_its_trough(replay: Replay) -> None:
    assert replay.described["switch"] == [4, 8]
    assert [replay.events.get(step) for step in replay.files] == [None, "peak", None, "trough", None]


def test_without_a_switch_there_is_no_direction_of_it(trained: Run) -> None:
    table = trained.metrics["probe/p_ood"].dropna()
    record = Replay(trained, Settings(2, 2)).measure(10)
    if len(set(table)) == 1:  # flat: no peak, no trough
        assert record["settings"]["switch"] is None
    assert ("switch" in record["fisher"]["trunk"]["q"]) == (record["settings"]["switch"] is not None)


def test_holding_fewer_gradients_changes_no_number(replay: Replay) -> None:
    """Beyond the rounding of float32 sums, whose order it changes."""
    whole = replay.measure(6)
    fewer = Replay(replay.run, Settings(5, 7, block=3)).measure(6)
    curvature, other = (_numbers(record.pop("fisher")) for record in (whole, fewer))
    assert json.dumps(fewer) == json.dumps(whole)
    assert other == pytest.approx(curvature, rel=1e-5, abs=1e-9)


def _numbers(record: Any) -> list[float]:
    """All numbers of a nested record, in order."""
    if isinstance(record, dict):
        record = list(record.values())
    return [x for item in record for x in _numbers(item)] if isinstance(record, list) else [record]


def test_more_batches_for_alignment_than_for_the_fisher(replay: Replay) -> None:
    record = Replay(replay.run, Settings(batches=5, fisher_batches=3)).measure(6)
    assert record["gradient"] == replay.measure(6)["gradient"]
    rows = gradients_at(replay.run, 6, replay.batches[:3], 4.0)["combined"]["trunk"]
    assert record["fisher"]["trunk"]["trace"][0] == pytest.approx(float((rows**2).sum(1).mean()), **CLOSE)


def test_bf16_is_near_and_not_the_same(replay: Replay) -> None:
    exact = replay.measure(10)["fisher"]["trunk"]["trace"][0]
    rounded = Replay(replay.run, Settings(5, 7, precision="bf16")).measure(10)["fisher"]["trunk"]["trace"][0]
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.05)


def test_a_replay_neither_moves_weights_nor_draws_from_torch(switching: Run) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    again = Replay(switching, SETTINGS)
    again.measure(4)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(p.grad is None for p in again.module.parameters())
    assert not any(part.training for part in again.module.modules())
    state = read_checkpoint(switching.checkpoints[4])["state_dict"]
    assert all(torch.equal(value, state[name]) for name, value in again.module.state_dict().items())


# ----------------------------------------------------------------------------------------------- logit lens


@torch.no_grad()
def layer_logits(gpt: GPT, tokens: Tensor) -> list[Tensor]:
    """Head on the embedding and on each block's output, from the model's own parts."""
    states = [gpt.tok_emb(tokens) + gpt.pos_emb.weight[: tokens.shape[1]]]
    for block in gpt.blocks:
        states.append(block(states[-1]))
    return [F.linear(gpt.ln_f(state), gpt.tok_emb.weight) for state in states]


def lens(gpt: GPT, batch: Batch) -> list[float]:
    """Share of examples with every masked position right, layer by layer."""
    shares = []
    for logits in layer_logits(gpt, batch.tokens):
        hit = logits.argmax(-1) == batch.targets
        right = [bool(hit[i][batch.probe_mask[i]].all()) for i in range(len(hit)) if batch.probe_mask[i].any()]
        shares.append(sum(right) / len(right))
    return shares


def test_the_lens_is_that_of_brute_force_and_its_end_is_the_recorded_accuracy(trained: Run) -> None:
    found = Replay(trained, Settings(2, 2, lens="all"))
    for step in trained.checkpoints:
        shown = found.measure(step)["logit_lens"]
        for k, name in ((1, "in"), (2, "ood")):
            (batch,) = found.data.val_dataloader()[k]
            assert len(batch.tokens) > 32  # more than one slice of the set
            assert shown[name] == pytest.approx(lens(model_at(trained, step), batch))
            assert shown[name][-1] == pytest.approx(trained.metrics.loc[step, f"probe/p_{name}"])


def test_the_lens_tells_layers_apart_and_wants_every_masked_position_right() -> None:
    torch.manual_seed(0)
    gpt = GPT(GPTSize(n_layer=3, n_head=2, d_model=16, d_ff=32, context=12), vocab_size=50).eval()
    for weight in gpt.parameters():
        torch.nn.init.normal_(weight)
    tokens = torch.randint(50, (70, 12))
    targets = torch.randint(50, (70, 12))
    answers = [state.argmax(-1) for state in layer_logits(gpt, tokens)]
    mask = torch.zeros(70, 12, dtype=torch.bool)
    for layer, rows in enumerate((range(0, 10), range(10, 17), range(17, 40), range(40, 60))):  # ten ask nothing
        for row in rows:
            mask[row, [2, 7]] = True
            targets[row, [2, 7] if row % 3 else [2]] = answers[layer][row, [2, 7] if row % 3 else [2]]
    batch = Batch.of(tokens, targets, mask)
    found = lens_accuracy(gpt, [batch], nullcontext)
    assert found == pytest.approx(lens(gpt, batch))
    assert len(set(found)) == 4
    assert min(found) > 0


@pytest.mark.parametrize(("choice", "seen"), [("events", [4, 8, 10]), ("all", [2, 4, 6, 8, 10]), ("none", [])])
def test_where_the_lens_looks(switching: Run, choice: Any, seen: list[int]) -> None:
    found = Replay(switching, Settings(2, 2, lens=choice))
    assert [step for step in found.files if "logit_lens" in found.measure(step)] == seen


# -------------------------------------------------------------------------------------------- fixed batches


def test_fixed_batches_are_a_function_of_the_data_alone(replay: Replay) -> None:
    data = replay.data
    again, fewer = fixed.fixed_batches(data, 7), fixed.fixed_batches(data, 3)
    assert fixed.sha256(again) == replay.sha256 == fixed.sha256(replay.batches)
    assert fixed.sha256(fewer) == fixed.sha256(replay.batches[:3]) != replay.sha256
    assert all(batch.tokens.shape == (4, 64) for batch in again)
    torch.rand(3)
    assert {replay.measure(step)["sha256"] for step in (2, 8)} == {replay.sha256}


def test_the_hash_sees_each_column(replay: Replay) -> None:
    first = replay.batches[0]
    changed = [
        first._replace(tokens=first.tokens + 1),
        first._replace(targets=first.targets + 1),
        first._replace(probe_mask=~first.probe_mask),
    ]
    assert len({fixed.sha256([batch]) for batch in (first, *changed)}) == 4


def test_fixed_batches_are_none_of_those_trained_on(replay: Replay) -> None:
    replay.data.setup("fit")
    stream = replay.data.train_dataloader()
    trained = probed([batch for _ in range(3) for batch in stream])
    measured = probed(fixed.fixed_batches(replay.data, 16))
    assert len(measured) > 5
    assert not trained & measured


def probed(batches: list[Batch]) -> set[tuple[int, ...]]:
    """The sequences that hold a probe; others of short stories have nothing random in them."""
    rows = [row for batch in batches for row in zip(batch.tokens, batch.probe_mask, strict=True)]
    return {tuple(tokens.tolist()) for tokens, mask in rows if mask.any()}


def test_fixed_batches_have_the_distribution_of_training(replay: Replay) -> None:
    rows = [mask for batch in fixed.fixed_batches(replay.data, 200) for mask in batch.probe_mask]
    assert np.mean([bool(mask.any()) for mask in rows]) == pytest.approx(0.3, abs=4 * np.sqrt(0.3 * 0.7 / 800))


def test_each_story_comes_once_before_one_comes_again() -> None:
    order = fixed._order(7, 12)
    first, second = ([next(order) for _ in range(12)] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second


# ----------------------------------------------------------------------------------------------- directions


class Rows:
    """A snapshot folder that knows how many of the rows it gave are still held."""

    def __init__(self, basis: Tensor) -> None:
        self.basis = basis
        self.given: list[weakref.ref[Tensor]] = []
        self.most = 0

    def read(self, step: int) -> Vector:
        self.most = max(self.most, sum(row() is not None for row in self.given))
        values = self.basis[step].clone()
        self.given.append(weakref.ref(values))
        return Vector(values, SMALL)


def test_directions_are_built_in_one_pass_that_holds_one_row() -> None:
    rows = Rows(basis_of(bent_path(9, SMALL.dim)).float())
    coefficients = {"a": normal(2, 9, seed=4), "b": normal(2, 9, seed=5)}
    found = combine(range(9), rows.read, coefficients, SMALL, torch.device("cpu"))
    assert len(rows.given) == 9  # each read once
    assert rows.most <= 1
    for name, weights in coefficients.items():
        for span, own in zip(SMALL.slices, weights, strict=True):
            expected = own @ rows.basis[:, span].double()
            assert torch.allclose(found[name].values[span].double(), expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------- which checkpoints

# Peaks and troughs of the published run with seed 42, by the rules that choose its checkpoints.
PEAKS = (1800, 2400, 2800, 3800, 4200, 4600, 5000, 5600, 6000, 6400, 7000, 7800, 9200, 9600)
TROUGHS = (2000, 2600, 3200, 4000, 4400, 4800, 5400, 5800, 6200, 6800, 7600, 8600, 9400, 9800)


def published(highest: int) -> list[Event]:
    """Its events, with one peak above the others."""
    kinds = {**dict.fromkeys(PEAKS, "peak"), **dict.fromkeys(TROUGHS, "trough")}
    height = {"peak": 0.5, "trough": 0.3}
    return [
        Event(kinds[step], k, step, 0.7 if step == highest else height[kinds[step]], k + 1)  # type: ignore[arg-type]
        for k, step in enumerate(sorted(kinds))
    ]


def test_the_papers_checkpoints() -> None:
    stored = range(200, 10001, 200)
    assert steps.paper(stored, published(5000), 10000) == {
        "init": 200,
        "early_peak": 1800,
        "early_trough": 2000,
        "transition_trough": 4800,
        "mid_peak": 5000,
        "mid_trough": 5400,
        "late_peak": 9600,
        "final": 10000,
    }
    assert steps.paper(stored, published(9200), 10000)["mid_peak"] == 2800  # the highest of the middle half alone
    coarse = steps.paper(range(2000, 10001, 2000), published(5000), 10000)
    assert list(coarse.values()) == [2000, 2000, 2000, 4000, 4000, 6000, 10000, 10000]


def test_multiples_and_the_last() -> None:
    assert steps.every([2, 4, 6, 8, 9], 4) == [4, 8, 9]


# --------------------------------------------------------------------------------------------- command line


def replay_in(run: Run, *args: str) -> None:
    main([str(run.path), *FEW, *args])


def contents(run: Run) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((run.path / "replay").iterdir())}


def test_the_command_writes_records_and_a_table(
    copy: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, replay: Replay
) -> None:
    monkeypatch.setattr(sys, "argv", ["mini_gpt_pl", "replay", str(copy.path), *FEW])
    cli.main()
    out = capsys.readouterr().out
    assert list(copy.replayed) == [2, 4, 6, 8, 10]
    assert sorted(contents(copy)) == [f"{step:06d}.json" for step in (2, 4, 6, 8, 10)] + ["replay.csv"]
    assert copy.replayed[4]["event"] == "peak"
    assert copy.replayed[10]["gradient"] == json.loads(json.dumps(replay.measure(10)["gradient"]))
    for told in ("step 10:", "anisotropy", "peak", str(copy.path / "replay" / "replay.csv")):
        assert told in out


def test_the_table_holds_every_number_once_beside_chance(copy: Run) -> None:
    replay_in(copy)
    table = pd.read_csv(copy.path / "replay" / "replay.csv")
    assert list(table) == ["step", "quantity", "label", "value", "spread", "null"]
    rows = {(line[1], line[2], line[0]): list(line[3:]) for line in table.itertuples(index=False)}
    assert len(rows) == len(table)  # no number twice
    found = copy.replayed
    for label in LABELS:
        biases = np.cumsum([found[step]["bias"][label][0] for step in found])
        assert [rows["bias_sum_of_replayed", label, step][0] for step in found] == pytest.approx(list(biases))
        shown, floor = found[6]["fisher"][label], found[6]["noise_floor"][label]
        assert rows["fisher/q_switch", label, 6] == pytest.approx([*shown["q"]["switch"], shown["random"]])
        assert rows["fisher/anisotropy", label, 6] == pytest.approx([*shown["anisotropy"], 1.0])
        assert rows["fisher/overlap", label, 6] == pytest.approx([shown["overlap"], shown["overlap_se"], floor])
        assert rows["fisher/lambda_3", label, 6][0] == shown["eigenvalues"][2]
        aligned = found[6]["gradient"]["lm"][label]["abs_cos"]
        assert rows["lm/abs_cos", label, 6] == pytest.approx([*aligned, floor])
    assert rows["logit_lens/ood", "layer 2", 10][0] == found[10]["logit_lens"]["ood"][2]


def test_only_what_is_missing_is_measured_again(copy: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    replay_in(copy)
    before, measured = contents(copy), list[int]()
    (copy.path / "replay" / "000006.json").unlink()
    (copy.path / "replay" / "replay.csv").unlink()
    measure = Replay.measure

    def watched(self: Replay, step: int) -> records.Record:
        measured.append(step)
        return measure(self, step)

    monkeypatch.setattr(Replay, "measure", watched)
    replay_in(copy)
    assert measured == [6]
    assert contents(copy) == before
    replay_in(copy)
    assert measured == [6]


def test_a_break_leaves_whole_records_only(copy: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = Replay.measure

    def break_off(self: Replay, step: int) -> records.Record:
        if step == 6:
            raise KeyboardInterrupt
        return measure(self, step)

    monkeypatch.setattr(Replay, "measure", break_off)
    with pytest.raises(KeyboardInterrupt):
        replay_in(copy)
    assert list(contents(copy)) == ["000002.json", "000004.json"]


def test_choices_of_checkpoints_share_one_table(copy: Run) -> None:
    replay_in(copy, "--steps", "4", "2")
    replay_in(copy, "--every", "8")
    assert list(copy.replayed) == [2, 4, 8, 10]
    with (copy.path / "replay" / "replay.csv").open() as handle:
        assert {row["step"] for row in csv.DictReader(handle)} == {"2", "4", "8", "10"}


def test_the_papers_choice_says_what_it_took(copy: Run, capsys: pytest.CaptureFixture[str]) -> None:
    replay_in(copy, "--paper")
    assert list(copy.replayed) == [4, 8, 10]
    assert "early peak 4; early trough 8" in capsys.readouterr().out


def test_other_settings_are_refused_and_overwritten_on_request(copy: Run) -> None:
    replay_in(copy)
    before = contents(copy)
    with one_line_error(r"000002.json was replayed with fisher_batches 7, not 8.*--overwrite.*--out"):
        replay_in(copy, "--fisher_batches", "8", "--steps", "10")
    assert contents(copy) == before
    replay_in(copy, "--fisher_batches", "8", "--steps", "10", "--out", str(copy.path / "other"))
    assert contents(copy) == before
    replay_in(copy, "--fisher_batches", "8", "--steps", "10", "--overwrite")
    assert list(copy.replayed) == [10]


def test_other_batches_are_refused(copy: Run) -> None:
    replay_in(copy, "--steps", "2")
    with one_line_error("sha256"):
        replay_in(copy, "--set", "data.seed=8")


def test_batches_without_a_probe_have_no_probe_numbers(copy: Run, capsys: pytest.CaptureFixture[str]) -> None:
    replay_in(copy, "--steps", "4", "--set", "data.probe.p_probe=0")
    record = copy.replayed[4]
    assert record["gradient"]["probe"]["trunk"] == {name: [None, None] for name in ("abs_cos", "cos", "norm")}
    assert record["interference"]["trunk"] == [None, None]
    combined, lm = (record["gradient"][loss]["trunk"]["cos"] for loss in ("combined", "lm"))
    assert combined == pytest.approx(lm)
    assert " - " in capsys.readouterr().out


def test_checkpoints_of_weights_only_serve_as_well(copy: Run, replay: Replay) -> None:
    path = copy.checkpoints[4]
    whole = read_checkpoint(path)
    torch.save({key: whole[key] for key in ("state_dict", "gpt")}, path)
    assert json.dumps(Replay(copy, SETTINGS).measure(4)) == json.dumps(replay.measure(4))


@pytest.mark.parametrize("optimizer", ["Unable to serialize", {"class_path": "nowhere.Optimizer"}])
def test_the_optimizer_is_not_needed(copy: Run, optimizer: Any) -> None:
    reconfigured(model__optimizer=optimizer)(copy)
    assert Replay(Run(copy.path), Settings(2, 2)).measure(2)["step"] == 2


def test_a_reheated_run_keeps_its_own_weight(copy: Run) -> None:
    config = dict(copy.config) | {"probe_weight": 7.0}
    (copy.path / "config.yaml").write_text(yaml.safe_dump(config))
    (copy.path / "reheat.json").write_text("{}")
    assert Replay(Run(copy.path), Settings(2, 2)).measure(2)["probe_weight"] == 7.0


@pytest.mark.parametrize(("parent_step", "weights"), [(1, [2.0, 4.0, 4.0]), (3, [4.0, 4.0, 4.0]), (0, [2.0, 2.0, 4.0])])
def test_a_reheated_run_without_a_weight_goes_on_with_its_parents(
    copy: Run, parent_step: int, weights: list[float]
) -> None:
    """Its steps count from the checkpoint, while the configured switch (here at step 5) counts the parent's."""
    (copy.path / "config.yaml").write_text(yaml.safe_dump(dict(copy.config) | {"probe_weight": None}))
    (copy.path / "reheat.json").write_text(json.dumps({"parent_step": parent_step}))
    found = Replay(Run(copy.path), Settings(2, 2))
    assert [found.measure(step)["probe_weight"] for step in (2, 4, 6)] == weights


@pytest.mark.parametrize(
    ("rules", "events"),
    [
        ({}, {4: "peak", 8: "trough"}),
        ({"prominence": 0.2}, {4: "peak"}),  # the trough is 0.1 below what follows it
        ({"prominence": 0.5}, {}),
        ({"metric": "val/loss", "prominence": 0.5}, {4: "peak", 8: "trough"}),  # not about p_ood
    ],
)
def test_peaks_and_troughs_are_those_of_the_runs_own_rules(
    copy: Run, rules: dict[str, Any], events: dict[int, str]
) -> None:
    config = copy.config
    config["trainer"]["callbacks"].append({"class_path": "mini_gpt_pl.callbacks.SwitchingProbe", "init_args": rules})
    (copy.path / "config.yaml").write_text(yaml.safe_dump(config))
    found = Replay(Run(copy.path), SETTINGS)
    assert found.events == events
    assert found.described["switch"] == ([4, 8] if "trough" in events.values() else None)


def test_a_diverged_checkpoint_has_no_fisher(copy: Run, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy.checkpoints[10]
    broken = read_checkpoint(path)
    broken["state_dict"]["gpt.blocks.0.mlp.w_up.weight"].fill_(float("nan"))
    torch.save(broken, path)
    replay_in(copy, "--steps", "10")
    assert copy.replayed[10]["fisher"] == {}
    assert copy.replayed[10]["bias"]["trunk"] == [None, None]


# ------------------------------------------------------------------------------------------------- mistakes


def no_checkpoints(run: Run) -> None:
    shutil.rmtree(run.path / "checkpoints")


def no_snapshots(run: Run) -> None:
    shutil.rmtree(run.path / "snapshots")


def one_snapshot_gone(run: Run) -> None:
    (run.snapshot_folder / "step_000000004.safetensors").unlink()


def no_trajectory(run: Run) -> None:
    (run.path / "trajectory.safetensors").unlink()


def broken_checkpoint(run: Run) -> None:
    run.checkpoints[2].write_bytes(b"no archive")


def checkpoint_of_another_model(run: Run) -> None:
    path = run.checkpoints[2]
    other = read_checkpoint(path)
    other["gpt"]["d_model"] = 48
    torch.save(other, path)


def reconfigured(**changes: Any) -> Callable[[Run], None]:
    """Change the configuration: dotted option -> value."""

    def change(run: Run) -> None:
        config = yaml.safe_load((run.path / "config.yaml").read_text())
        for option, value in changes.items():
            *parents, last = option.split("__")
            part = config
            for parent in parents:
                part = part[int(parent)] if isinstance(part, list) else part[parent]
            part[last] = value
        (run.path / "config.yaml").write_text(yaml.safe_dump(config))

    return change


def no_config(run: Run) -> None:
    (run.path / "config.yaml").unlink()


def no_model(run: Run) -> None:
    (run.path / "config.yaml").write_text("trainer: {}\n")


def damaged_record(run: Run) -> None:
    (run.path / "replay").mkdir()
    (run.path / "replay" / "000004.json").write_text("{")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (no_config, "is no run folder"),
        (no_model, "configures no model and no data"),
        (no_checkpoints, "holds no checkpoint to replay"),
        (no_snapshots, r"lacks 6 of 6 snapshots \(step 0 first\)"),
        (one_snapshot_gone, r"lacks 1 of 6 snapshots \(step 4 first\)"),
        (no_trajectory, "there is no trajectory"),
        (broken_checkpoint, "cannot be read"),
        (checkpoint_of_another_model, "d_model 48, the configured one 32"),
        (reconfigured(trainer__callbacks__0__init_args__pattern="mlp"), "is of other weights than the pattern"),
        (reconfigured(trainer__callbacks=None), "has no TrajectoryRecorder"),
        (reconfigured(data__corpus__name="files", data__corpus__train_files=["gone.txt"]), "there is no file gone.txt"),
        (reconfigured(data__tokenizer="gone.tiktoken"), "gone.tiktoken"),
        (reconfigured(data__colour="red"), "colour"),
        (damaged_record, "000004.json cannot be read"),
    ],
)
def test_a_spoilt_run_is_one_line(copy: Run, spoil: Callable[[Run], None], told: str) -> None:
    spoil(copy)
    with one_line_error(told):
        replay_in(Run(copy.path), "--steps", "2")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--steps", "5"], r"no checkpoint is stored at step 5 \(nearest is 4\)"),
        (["--steps", "4", "99"], r"step 99 \(nearest is 10\)"),
        (["--steps", "x"], "invalid int value.*--help"),
        (["--steps", "4", "--every", "2"], "not allowed with.*--help"),
        (["--every", "0"], "give a number of steps"),
        (["--batches", "1"], "--batches 1.*2 or more"),
        (["--fisher_batches", "0"], "--fisher_batches 0"),
        (["--block", "-1"], "--block -1"),
        (["--colour"], "unrecognized arguments: --colour"),
        (["--precision", "16"], "invalid choice"),
        (["--set", "data.colour=red"], "colour"),
        (["--set", "model.size=51m"], "give data.OPTION=VALUE"),
        (["--set", "data.context=big"], "context"),
        (["--out", "/proc/nowhere"], "cannot be made"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(copy: Run, args: list[str], told: str) -> None:
    with one_line_error(told):
        replay_in(copy, *args)
    assert not (copy.path / "replay").exists()


def test_without_a_gpu_cuda_is_refused(copy: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with one_line_error("--accelerator cuda: torch sees no GPU"):
        replay_in(copy, "--accelerator", "cuda")


def test_without_swings_the_paper_has_no_checkpoints(copy: Run) -> None:
    table = copy.metrics.copy()
    table["probe/p_ood"] = np.where(table["probe/p_ood"].isna(), np.nan, 0.25)
    table.to_csv(copy.path / "metrics.csv")
    with one_line_error("--paper: p_ood has no peak"):
        replay_in(Run(copy.path), "--paper")


def test_settings_are_checked_without_the_command_line() -> None:
    with pytest.raises(UserError, match="2 or more"):
        Settings(batches=1)
