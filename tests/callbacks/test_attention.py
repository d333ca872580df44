"""Concentration of attention, top-k answers, and directions that are said to steer it."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import one_line_error
from helpers import metrics, quiet_trainer, same
from lightning.pytorch import Callback, LightningModule
from safetensors.torch import load_file
from torch import Tensor

from mini_gpt_pl import main as cli
from mini_gpt_pl.arithmetic import routing
from mini_gpt_pl.arithmetic.data import MarkerSums, ModularArithmetic
from mini_gpt_pl.arithmetic.encoder import ATTENTION_PATTERN, Block, EncoderSize
from mini_gpt_pl.arithmetic.markers import MarkerTask
from mini_gpt_pl.arithmetic.module import ResidueClassifier
from mini_gpt_pl.arithmetic.routing_probe import RoutingProbe
from mini_gpt_pl.callbacks import AttentionProbe, Schedule, TrajectoryRecorder
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry import concentration
from mini_gpt_pl.geometry.path.snapshots import file_of
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.training import cli as trainer_cli

SMALL = EncoderSize(n_layer=2, n_head=2, d_model=16, d_ff=0)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(-1)


# ------------------------------------------------------------------------------------------------- concentration


def test_even_attention_has_the_largest_entropy_and_the_least_top_mass() -> None:
    even = torch.full((16,), 1 / 16, dtype=torch.float64)
    assert float(concentration.entropy(even)) == pytest.approx(math.log(16))
    torch.testing.assert_close(concentration.top_mass(even, [1, 4, 40]), torch.tensor([1 / 16, 0.25, 1.0]).double())
    found = rows(50, 16)
    assert bool((concentration.entropy(found) < math.log(16)).all())
    assert bool((concentration.top_mass(found, [4])[:, 0] > 0.25).all())
    single = torch.nn.functional.one_hot(torch.tensor(3), 16).double()
    assert float(concentration.entropy(single)) == 0 and float(concentration.top_mass(single, [1])[0]) == 1


def test_the_largest_are_kept_and_sum_to_one() -> None:
    kept = concentration.keep_top(2)(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    torch.testing.assert_close(kept, torch.tensor([0, 0, 3 / 7, 4 / 7]))
    same_row = rows(5)
    assert concentration.keep_top(5)(same_row) is same_row
    equal = concentration.keep_top(1)(torch.full((4,), 0.25))
    assert sorted(equal.tolist()) == [0, 0, 0, 1]


def test_chance_keeps_visible_positions_only_and_each_as_often() -> None:
    weights = torch.zeros(6000, 5, dtype=torch.float64)
    weights[:, :4] = rows(6000, 4)
    kept = concentration.keep_random(2, torch.Generator().manual_seed(0))(weights)
    chosen = kept > 0
    assert not chosen[:, 4].any() and bool((chosen.sum(1) == 2).all())
    torch.testing.assert_close(kept.sum(1), torch.ones(6000).double())
    assert chosen[:, :4].double().mean(0).tolist() == pytest.approx([0.5] * 4, abs=0.03)
    ratio = kept[0][chosen[0]] / weights[0][chosen[0]]
    assert float(ratio[0]) == pytest.approx(float(ratio[1]))


def test_rows_whose_kept_weights_underflow_are_even() -> None:
    hard = torch.tensor([[1.0, 1e-45, 1e-45, 0.0]])
    kept = concentration.keep_random(1, torch.Generator().manual_seed(1))(hard.expand(200, 4))
    assert bool((kept.sum(1) == 1).all()) and not kept[:, 3].any()


# ------------------------------------------------------------------------------------------------------- routing


def path(seed: int = 0, steps: int = 40, dim: int = 30) -> tuple[Trajectory, Tensor]:
    """Two groups; returns the weights as well."""
    draw = torch.Generator().manual_seed(seed)
    increments = torch.randn(steps, dim, generator=draw, dtype=torch.float64)
    basis = torch.cat([torch.randn(1, dim, generator=draw, dtype=torch.float64), increments])
    grams = torch.stack([part @ part.T for part in basis.split([20, 10], 1)])
    found = Trajectory(
        "x", ("a.w_q", "b.w_o"), (20, 10), list(range(0, 10 * steps + 1, 10)), grams, [1.0] * (steps + 1)
    )
    return found, basis.cumsum(0)


def test_scores_are_those_of_centred_pca() -> None:
    trajectory, weights = path()
    part = weights[:, :20]
    off = part - part.mean(0)
    directions = torch.linalg.svd(off, full_matrices=False)[2][:3]
    found = routing.score_changes(trajectory.gram("a.w_q"), 3)
    wanted = (part @ directions.T).T.diff(dim=1)
    torch.testing.assert_close(found.abs(), wanted.abs(), rtol=1e-8, atol=1e-9)


def test_a_quantity_that_a_score_drives_is_found_and_another_is_not() -> None:
    trajectory, _ = path()
    steps = trajectory.steps
    driven = routing.score_changes(trajectory.grams.sum(0), 2)[1].cumsum(0)
    noise = np.random.default_rng(3)
    series = {
        "driven": pd.Series((driven + 0.1 * torch.from_numpy(noise.standard_normal(len(driven)))).numpy(), steps[1:]),
        "other": pd.Series(noise.standard_normal(len(steps)).cumsum(), steps),
    }
    found = {(s.quantity, s.component): s for s in routing.steered(trajectory, "w_", series, k=2, draws=499)}
    hit = found["driven", 2]
    assert abs(hit.correlated.value) > 0.9 and hit.correlated.p <= 0.01 and hit.intervals == 39
    assert hit.adjusted == pytest.approx(4 * hit.correlated.p)
    assert all(s.adjusted > 0.05 for key, s in found.items() if key != ("driven", 2))


def test_what_cannot_be_compared_is_said_in_one_line() -> None:
    trajectory, _ = path()
    with pytest.raises(UserError, match="no recorded group matches 'w_k'"):
        routing.joint_directions(trajectory, "w_k", 1)
    with pytest.raises(UserError, match="9 are needed"):
        routing.steered(trajectory, "w_", {"h": pd.Series([0.0, 1.0, 2.0, 3.0], [0, 10, 20, 45])})
    with pytest.raises(UserError, match="9 are needed"):
        routing.steered(trajectory, "w_", {"h": pd.Series(0.0, trajectory.steps)}, start=390)


def test_holm_is_bonferroni_for_the_smallest() -> None:
    assert routing.holm([0.2, 0.001, 0.04]) == pytest.approx([0.2, 0.003, 0.08])


@pytest.mark.parametrize("place", [0, 1, 3])
def test_what_was_not_tried_adjusts_nothing(place: int) -> None:
    tried = [0.2, 0.001, 0.04]
    found = routing.holm([*tried[:place], math.nan, *tried[place:]])
    assert math.isnan(found.pop(place)) and found == routing.holm(tried)


# -------------------------------------------------------------------------------------------------------- probes


def markers() -> MarkerSums:
    return MarkerSums(MarkerTask(vocab_size=130, length=8, markers=(1, 2)), batch_size=8, eval_examples=32)


def net(data: MarkerSums) -> ResidueClassifier:
    return ResidueClassifier(SMALL, data.vocab_size, data.classes, data.length, data.causal)


def fit(folder: Path, *callbacks: Callback, steps: int = 6) -> ResidueClassifier:
    data = markers()
    module = net(data)
    quiet_trainer(folder, callbacks, max_steps=steps).fit(module, datamodule=data)
    return module


def recorder() -> TrajectoryRecorder:
    return TrajectoryRecorder(ATTENTION_PATTERN, Schedule(every=1), name="attention")


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ResidueClassifier]:
    folder = tmp_path_factory.mktemp("attention")
    probes = [
        AttentionProbe(Schedule(every=3), ks=(1, 3, 8), size=16),
        RoutingProbe(Schedule(every=3), draws=4, size=16, directions=2, norm=0.3),
    ]
    return folder, fit(folder, recorder(), *probes)


def test_attention_probes_change_nothing(probed: tuple[Path, ResidueClassifier], tmp_path: Path) -> None:
    assert same(fit(tmp_path).state_dict(), probed[1].state_dict())


def fixed(seed: int = 0, size: int = 16) -> Any:
    data = markers()
    data.setup()
    key = np.array([seed, 0xA77E], dtype=np.uint64)
    return data.draw_kinds(np.random.Generator(np.random.Philox(key=key)), size)


def test_logged_concentration_is_that_of_the_last_weights(probed: tuple[Path, ResidueClassifier]) -> None:
    folder, module = probed
    found = metrics(folder)
    assert [s for s, row in found.items() if "attention/m1/layer0/entropy" in row] == [0, 3, 6]
    batch = fixed()["m2"]
    weights = module.attention(batch)[1][:, :, -1].double()
    logged = {k.removeprefix("attention/m2/"): v for k, v in found[6].items() if k.startswith("attention/m2/")}
    assert logged["layer1/entropy"] == pytest.approx(float(-(weights * weights.log()).sum(-1).mean()), rel=1e-5)
    assert logged["layer1/top3"] == pytest.approx(float(weights.topk(3).values.sum(-1).mean()), rel=1e-5)
    assert logged["layer1/entropy_null"] == pytest.approx(math.log(8)) and logged["layer1/top3_null"] == 3 / 8
    assert "layer1/top8" not in logged
    assert logged["accuracy"] == pytest.approx(float(module.score(batch)[1]))


def test_answers_from_little_attention_are_those_of_every_layer_cut(probed: tuple[Path, ResidueClassifier]) -> None:
    folder, module = probed
    batch = fixed()["m1"]
    other = copy.deepcopy(module)
    for block in other.encoder.blocks:
        assert isinstance(block, Block)
        whole = block.attn.weights

        def cut(x: Tensor, queries: Tensor, whole: Any = whole) -> Tensor:
            weights = whole(x, queries)
            least = weights.topk(3).values[..., -1:]
            weights = torch.where(weights >= least, weights, 0.0)
            return weights / weights.sum(-1, keepdim=True)

        block.attn.weights = cut  # type: ignore[method-assign]
    logits = other(batch.tokens)
    through = module.encoder
    with torch.no_grad(), through.attending(concentration.keep_top(3)):
        torch.testing.assert_close(through(batch.tokens), logits.detach())
    assert all(block.attn.change is None for block in through.blocks)  # type: ignore[union-attr]
    wanted = float((logits.argmax(-1) == batch.labels).double().mean())
    assert metrics(folder)[6]["attention/m1/accuracy_top3"] == pytest.approx(wanted)
    assert "attention/m1/accuracy_top3_null" in metrics(folder)[6]


def test_moves_along_directions_are_those_of_moved_models(probed: tuple[Path, ResidueClassifier]) -> None:
    """At the last step: centred PCA of the snapshot files, weights moved by hand."""
    folder, module = probed
    logged = metrics(folder)[6]
    groups = [f"blocks.{b}.attn.w_{m}" for b in (0, 1) for m in "qk"]
    files = [load_file(file_of(folder / "snapshots", step)) for step in range(7)]
    rows = [torch.cat([file[f"encoder.{group}.weight"].double().flatten() for group in groups]) for file in files]
    weights = torch.stack(rows).cumsum(0)
    direction = torch.linalg.svd(weights - weights.mean(0), full_matrices=False)[2][0]
    direction = direction * torch.sign((weights[-1] - weights.mean(0)) @ direction)

    def entropies(move: Tensor) -> Tensor:
        other = copy.deepcopy(module).double()
        with torch.no_grad():
            for group, part in zip(groups, move.chunk(4), strict=True):
                target = other.encoder.get_parameter(f"{group}.weight")
                target.add_(part.view_as(target))
            found = [
                torch.stack([concentration.entropy(w[:, :, -1]).mean() for w in other.attention(batch)])
                for batch in fixed().values()
            ]
        return torch.stack(found).mean(0)

    ends, still = [entropies(sign * 0.3 * direction) for sign in (1, -1)], entropies(0 * direction)
    for layer in (0, 1):
        odd, even = (ends[0] - ends[1]) / 2, (ends[0] + ends[1]) / 2 - still
        assert logged[f"routing/pc1/layer{layer}/odd"] == pytest.approx(float(odd[layer]), rel=1e-2, abs=1e-6)
        assert logged[f"routing/pc1/layer{layer}/even"] == pytest.approx(float(even[layer]), rel=1e-2, abs=1e-6)
        assert logged[f"routing/pc1/layer{layer}/odd_null"] > 0
        assert 0 <= logged[f"routing/weights/layer{layer}/odd_below"] <= 1
    assert "routing/pc1/layer0/odd" not in metrics(folder)[0]  # no path yet
    assert "routing/weights/layer0/odd" in metrics(folder)[0]


def test_longer_weights_sharpen_attention(probed: tuple[Path, ResidueClassifier]) -> None:
    """The control: scaling W_Q and W_K up lowers the entropy."""
    assert metrics(probed[0])[0]["routing/weights/layer0/odd"] < 0


def test_batches_do_not_depend_on_the_step(tmp_path: Path) -> None:
    """A probe that begins later looks at the same examples: two runs, one resumed, agree."""
    first, again = fixed(), fixed()
    assert same(list(first["m1"]), list(again["m1"])) and len(first["m1"].labels) == 16
    assert not torch.equal(first["m1"].tokens, fixed(seed=1)["m1"].tokens)


class Dumb(LightningModule):
    """Shows nothing."""


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with one_line_error("ks"):
        AttentionProbe(ks=[])
    with one_line_error("draws 1"):
        RoutingProbe(draws=1)
    with one_line_error("query 8: the attention has 8 positions"):
        fit(tmp_path / "a", AttentionProbe(Schedule(every=1), query=8))
    with one_line_error("RoutingProbe needs a TrajectoryRecorder"):
        fit(tmp_path / "b", RoutingProbe())
    with one_line_error("no recorded group matches 'none'"):
        fit(tmp_path / "c", recorder(), RoutingProbe(groups="none"))
    with one_line_error(r"Dumb has no attention\(batch\)"):
        AttentionProbe().setup(quiet_trainer(tmp_path), Dumb(), "fit")


def test_pairs_have_training_and_test_kinds(tmp_path: Path) -> None:
    module = ResidueClassifier(SMALL, vocab_size=11, classes=11)
    probe = AttentionProbe(Schedule(every=2), ks=(1, 2), size=20)
    quiet_trainer(tmp_path, [probe], max_steps=2).fit(module, datamodule=ModularArithmetic(modulus=11, batch_size=16))
    logged = metrics(tmp_path)[2]
    assert {"attention/train/layer1/entropy", "attention/test/accuracy_top1"} <= set(logged)
    data = ModularArithmetic(modulus=11)
    data.setup()
    key = np.array([0, 0xA77E], dtype=np.uint64)
    batch = data.draw_kinds(np.random.Generator(np.random.Philox(key=key)), 20)["train"]
    read = module.attention(batch)[0][:, :, 0]  # the answer is read at the first position
    assert logged["attention/train/layer0/top1"] == pytest.approx(float(read.amax(-1).mean()), rel=1e-5)
    assert logged["attention/test/layer0/top1_null"] == 0.5 and "attention/test/accuracy_top2" not in logged


def test_a_run_from_the_command_line_says_whether_its_path_steers_its_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer_cli, "draw_all", lambda run: [])
    configs = Path(cli.__file__).resolve().parents[1] / "configs" / "grokking"
    often = tmp_path / "often.yaml"
    often.write_text(
        "trainer: {callbacks+: ["
        "{class_path: mini_gpt_pl.callbacks.AttentionProbe, init_args: {schedule: {every: 10}, size: 8}}, "
        "{class_path: callbacks.RoutingProbe, init_args: {schedule: {every: 60}, draws: 2, size: 8}}]}"
    )
    files = [configs / "smoke.yaml", configs / "tiny.yaml", configs / "fourier.yaml", often]
    cli.run(f"fit {' '.join(f'-c {file}' for file in files)} --trainer.max_steps 120 --run_dir {tmp_path}/run")
    capsys.readouterr()
    routing.main([str(tmp_path / "run"), "--k", "2", "--start", "10"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["component", "quantity", "intervals", "r", "level", "p", "adjusted"]
    assert len(lines) == 1 + 2 * 2 * 2  # scores, kinds of batches, layers
    with one_line_error("recorded no entropy"):
        (tmp_path / "run/metrics.csv").write_text("step,a\n1,2\n")
        routing.main([str(tmp_path / "run")])
