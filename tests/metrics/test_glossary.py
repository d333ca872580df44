"""The glossary beside what runs really log: nothing without an entry, no entry without a number, formulas that hold."""

from __future__ import annotations

import doctest
import importlib
import math
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import one_line_error
from helpers import (
    DECAY,
    adamw,
    checkpoints,
    drifts,
    first_direction,
    flat,
    metrics,
    quiet_trainer,
    read_path,
    recorder,
    tiny_gpt,
    tiny_stories,
)
from lightning.pytorch import Callback
from rich.console import Console
from torch import Tensor
from torch.optim import SGD, Adagrad, Optimizer

from mini_gpt_pl.arithmetic.data import ModularArithmetic
from mini_gpt_pl.arithmetic.encoder import ATTENTION_PATTERN, EncoderSize
from mini_gpt_pl.arithmetic.fourier_probe import FourierProbe
from mini_gpt_pl.arithmetic.milestones import Evaluation
from mini_gpt_pl.arithmetic.module import ResidueClassifier
from mini_gpt_pl.arithmetic.multitask import MultiTaskArithmetic, MultiTaskClassifier
from mini_gpt_pl.arithmetic.operations import Examples
from mini_gpt_pl.arithmetic.routing_probe import RoutingProbe
from mini_gpt_pl.callbacks import (
    AttentionProbe,
    BasisSource,
    CommutatorProbe,
    CostControl,
    DataWait,
    FisherProbe,
    GradientAlignment,
    Kick,
    OptimizerAnatomy,
    Schedule,
    StreamingFisher,
    SubspaceIntervention,
    SwitchingProbe,
    TrajectoryRecorder,
)
from mini_gpt_pl.callbacks.fixed_gradients import Kind
from mini_gpt_pl.metrics import glossary, registry
from mini_gpt_pl.metrics.registry import Metric
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.module import ProbedGPT

ROOT = Path(__file__).parents[2]
STEPS = 20
# A metric with two switches, at the evaluations after steps 4 and 14.
SCORES = dict(zip(range(2, STEPS + 1, 2), (0.0, 0.9, 0.1, 0.2, 0.3, 0.4, 0.9, 0.1, 0.2, 0.3), strict=True))
GEOMETRY = (
    "TrajectoryRecorder",
    "GradientAlignment",
    "FisherProbe",
    "StreamingFisher",
    "OptimizerAnatomy",
    "SwitchingProbe",
    "ReheatProbe",
    "CommutatorProbe",
    "SubspaceIntervention",
    "Kick",
    "AttentionProbe",
    "RoutingProbe",
    "FourierProbe",
)


class Swinging(ProbedGPT):
    """Validation logs a metric with peaks and troughs in places known beforehand."""

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.log("score", SCORES.get(self.trainer.global_step, 0.0), logger=False)


def every_probe() -> list[Callback]:
    """All of them, with every option that adds a name."""
    kinds: tuple[Kind, ...] = ("batch_mean", "per_sample", "monte_carlo")
    return [
        recorder(2),
        GradientAlignment(Schedule(every=1), Schedule(every=1)),
        FisherProbe(Schedule(every=4), kinds, batches=3, random_directions=2, segments={"start": (0, 2)}),
        SwitchingProbe("score", prominence=0.05, reach=1),
        StreamingFisher(Schedule(every=1)),
        OptimizerAnatomy(Schedule(every=1), counterfactual_beta2=[0.5], split=True),
        CommutatorProbe(Schedule(every=STEPS // 2), samples=1, size=2, optimizer_step=True),
        CostControl(max_overhead=1000.0, warmup=1),  # a budget that thins nothing, whatever the clock says
        DataWait(warmup=1),
    ]


def train(folder: Path, module: ProbedGPT, callbacks: list[Callback], steps: int, accumulate: int = 1) -> Path:
    trainer = quiet_trainer(
        folder,
        callbacks,
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        limit_val_batches=1.0,
        val_check_interval=2 * accumulate,
        check_val_every_n_epoch=None,
    )
    trainer.fit(module, datamodule=tiny_stories())
    return folder


def swinging(**settings: Any) -> ProbedGPT:
    module = tiny_gpt(**settings)
    module.__class__ = Swinging
    return module


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty steps of two micro-batches under AdamW, with everything measured."""
    folder = tmp_path_factory.mktemp("probed")
    train(folder, swinging(), [*every_probe(), checkpoints(folder, STEPS)], STEPS, accumulate=2)
    (folder / "config.yaml").write_text("run_dir: probed\n")
    return folder


@pytest.fixture(scope="module")
def reheated(probed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its last checkpoint, restarted, and as if its parent had once been perfect: else nothing is recovered."""
    parent = Run(probed).metrics
    parent.loc[2, "probe/p_ood"] = 1.0
    parent.to_csv(probed / "metrics.csv")
    folder = tmp_path_factory.mktemp("reheated")
    trainer = quiet_trainer(folder, [recorder(2, sketch=64)], limit_val_batches=1.0)
    checkpoint = str(probed / f"checkpoints/{STEPS:06d}.ckpt")
    trainer.reheat(tiny_gpt(), tiny_stories(), checkpoint, steps=2, lr=5e-3, warmup=1, eval_every=1, threshold=0.0)
    return folder


@pytest.fixture(scope="module")
def generalised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, and a module that knows all answers from its second evaluation on."""
    folder = tmp_path_factory.mktemp("generalised")
    some = BasisSource("rank_one", pattern=r"(?P<group>attn)\.w_q\.weight", k=1)
    changes: list[Callback] = [SubspaceIntervention(orthogonal=0.9, basis=some), Kick("gaussian", length=1e-3)]
    trainer = quiet_trainer(folder, [Evaluation(Schedule(every=1)), *changes], max_steps=4)
    trainer.fit(Knowing(EncoderSize(1, 2, 8, 16), 11, 11), datamodule=ModularArithmetic(modulus=11, batch_size=8))
    return folder


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks on one trunk, its attention and its frequencies watched."""
    folder = tmp_path_factory.mktemp("shared")
    callbacks = [
        Evaluation(Schedule(every=2)),
        TrajectoryRecorder(ATTENTION_PATTERN, Schedule(every=1)),
        AttentionProbe(Schedule(every=2), ks=[1], size=8),
        RoutingProbe(Schedule(every=2), draws=2, size=8),
        FourierProbe(Schedule(every=2)),
    ]
    module = MultiTaskClassifier(size=EncoderSize(1, 2, 8, 16), vocab_size=11, classes=11)
    quiet_trainer(folder, callbacks, max_steps=4).fit(module, datamodule=MultiTaskArithmetic(modulus=11, batch_size=8))
    return folder


class Knowing(ResidueClassifier):
    """It answers everything right from step 2 on."""

    def score(self, examples: Examples) -> tuple[Tensor, Tensor]:
        loss, accuracy = super().score(examples)
        return loss, accuracy if self.trainer.global_step < 2 else torch.ones(())


def names(folder: Path) -> set[str]:
    return {name for row in metrics(folder).values() for name in row}


# ------------------------------------------------------------------------------------------- names and entries


def test_every_logged_name_has_an_entry_and_every_entry_a_logged_name(
    probed: Path, reheated: Path, generalised: Path, shared: Path
) -> None:
    logged = names(probed) | names(reheated) | names(generalised) | names(shared)
    assert len(logged) > 300
    found = {name: registry.find(name) for name in logged}
    assert [name for name, metric in found.items() if metric is None] == []
    losses = {(metric.match(name) or {}).get("loss") for name, metric in found.items() if metric is not None}
    assert losses == {None, "lm", "probe"}  # nothing else hides behind the placeholder that fits any word
    used = {metric.name for metric in found.values() if metric is not None}
    assert [metric.name for metric in registry.metrics() if metric.name not in used] == []


def test_every_choice_of_a_placeholder_is_logged(probed: Path, reheated: Path, generalised: Path, shared: Path) -> None:
    """`quantity: pc1|k95` must not promise a null that nobody logs."""
    seen: dict[str, set[tuple[str, str]]] = {}
    for name in names(probed) | names(reheated) | names(generalised) | names(shared):
        metric = registry.find(name)
        assert metric is not None
        seen.setdefault(metric.name, set()).update((metric.match(name) or {}).items())
    for metric in registry.metrics():
        for hole, pattern in metric.patterns.items():
            plain = [choice for choice in pattern.split("|") if re.fullmatch(r"\w+", choice)]
            assert [choice for choice in plain if (hole, choice) not in seen[metric.name]] == [], metric.name


def test_groups_and_the_whole_are_told_apart(probed: Path, reheated: Path) -> None:
    """`{whole}` is logged for the trunk alone; `{group}` for the blocks as well."""
    labels: dict[str, set[str]] = {}
    for name in names(probed) | names(reheated):
        metric = registry.find(name)
        assert metric is not None
        holes = metric.match(name) or {}
        if label := holes.get("group") or holes.get("whole"):
            labels.setdefault(metric.name, set()).add(label)
    for template, found in labels.items():
        assert found == {"trunk"} if "{whole}" in template else found >= {"blocks.0", "blocks.1"}, template


def test_no_name_fits_two_entries_equally_well(probed: Path, reheated: Path, shared: Path) -> None:
    for name in names(probed) | names(reheated) | names(shared):
        fitting = sorted(len(re.sub(r"\{\w+\}", "", m.name)) for m in registry.metrics() if m.match(name) is not None)
        assert len(fitting) == 1 or fitting[-2] < fitting[-1], name


def _sgd(params: Any) -> Optimizer:
    return SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1)


@pytest.mark.parametrize("optimizer", [_sgd, Adagrad])
def test_other_optimizers_log_no_other_names(tmp_path: Path, optimizer: Any) -> None:
    train(tmp_path, swinging(optimizer=optimizer), every_probe(), 4)
    logged = names(tmp_path)
    assert "anatomy/trunk/cos_gradient" in logged
    assert [name for name in logged if registry.find(name) is None] == []


@pytest.mark.parametrize("run", sorted(path.parent for path in (ROOT / "docs").glob("**/metrics.csv")), ids=str)
def test_the_committed_runs_are_explained(run: Path) -> None:
    assert [name for name in Run(run).metrics.columns if registry.find(name) is None] == []


def test_a_name_that_nobody_logs_has_no_entry() -> None:
    for name in ("loss", "backbone/pc1", "backbone/trunk/pc3", "backbone/trunk/pc2_null", "reheat/loss", "a/trunk/b"):
        assert registry.find(name) is None, name


# --------------------------------------------------------------------------------------------------- the entries


def test_the_core_names_no_study() -> None:
    text = resources.files("mini_gpt_pl").joinpath(registry.CORE).read_text(encoding="utf-8")
    assert re.findall(r"(?i)\bpaper|\bstor(?:y|ies)\b|residue|arxiv|p_ood|codeword", text) == []


def test_without_a_study_its_metrics_are_gone_and_the_cores_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = {metric.name for metric in registry.metrics()}
    monkeypatch.setattr(registry, "tasks", dict)
    monkeypatch.setattr(registry, "data", registry.data.__wrapped__)
    core = registry.metrics.__wrapped__()
    left = {metric.name for metric in core}
    assert {"train/loss", "val/loss", "backbone/{group}/pc1", "overhead/fraction"} <= left < everything
    gone = everything - left
    assert {"probe/p_ood", "reheat/gain", "eval/{set}_accuracy", "fourier/{axis}/{table}/largest"} <= gone
    assert {metric.reference for metric in core if metric.name.startswith("backbone/")} == {"ours"}
    assert "reheats" not in {panel["section"] for metric in core for panel in metric.panels}


def test_a_name_has_words_and_a_way_to_be_written() -> None:
    named = {
        "backbone/trunk/pc1": "PC1 of the drift, raw",
        "backbone/blocks.0/k95_excess": "excess of k95, raw",
        "alignment/trunk/lm": "LM gradient and past v_b, |cos|",
        "commutator/all/on_singular": "commutator on leading singular directions",
        "mine/sharpness": "mine/sharpness",
    }
    assert {name: registry.title_of(name) for name in named} == named
    pc1, k95 = registry.statistics()["pc1"], registry.statistics()["k95"]
    assert (pc1.write(0.5), pc1.write_difference(0.0312), k95.write_difference(-2.0)) == ("50.0%", "+3.1 pt", "-2")
    assert pc1.write_difference(math.nan) == "-"


def test_what_a_walk_gives_beside_is_said_of_the_statistics_that_have_it(probed: Path) -> None:
    """The choices of `{quantity}_null` follow from which entries it stands beside."""
    logged = {name.split("/")[2] for name in names(probed) if re.fullmatch(r"backbone/trunk/\w+_null", name)}
    assert {f"{name}_null" for name in registry.quantities("backbone/{group}/{quantity}_null")} == logged


@pytest.mark.parametrize("metric", registry.metrics(), ids=lambda metric: metric.name)
def test_an_entry_is_whole(metric: Metric) -> None:
    texts = (metric.words, metric.formula, metric.unit, metric.null, metric.cost, metric.reference, metric.when)
    assert all(text.strip() for text in texts)
    assert metric.words[0].isupper() and metric.words.endswith((".", "`."))
    assert not metric.words.startswith(("The same", "It", "Its"))  # each is read alone
    assert "`" not in metric.formula  # it is printed as code
    module, _, name = metric.source.rpartition(".")
    assert not metric.source or hasattr(importlib.import_module(module), name)
    for hole in re.findall(r"\{(\w+)\}", metric.words):
        assert f"{{{hole}}}" in metric.name


@pytest.mark.parametrize("metric", registry.metrics(), ids=lambda metric: metric.name)
def test_geometry_has_a_null_or_says_why_not(metric: Metric) -> None:
    if metric.source.rpartition(".")[2] not in GEOMETRY:
        return
    assert "no geometry" not in metric.null
    if metric.null.startswith("none"):
        assert re.match(r"none, \w+ \w+", metric.null)
        assert not metric.beside


def test_what_stands_beside_a_metric_is_logged_with_it(probed: Path, reheated: Path, shared: Path) -> None:
    logged = names(probed) | names(reheated) | names(shared)
    asked = 0
    for name in logged:
        metric = registry.find(name)
        if metric is not None and metric.beside:
            # A label of the whole's alone stands beside every group's.
            whole = name if name.startswith("fourier/") else re.sub("/blocks[^/]*/", "/trunk/", name)
            other = registry.beside(whole, logged)
            assert other is not None and registry.find(other) is not None, name
            asked += 1
    assert asked > 100
    assert registry.beside("backbone/blocks.1/k95", logged) == "backbone/blocks.1/k95_null"
    assert registry.beside("alignment/trunk/lm", logged) == "alignment/trunk/lm_z"
    assert registry.beside("anatomy/blocks.0/cos_update", logged) == "anatomy/blocks.0/noise_floor"
    assert registry.beside("switching/trunk/energy_2_6", logged) == "switching/trunk/energy_2_6_percentile"
    assert registry.beside("backbone/trunk/drift", logged) is None


# -------------------------------------------------------------------------------------------------- the formulas


@cache
def _last(folder: Path) -> Mapping[str, float]:
    """The last value of everything."""
    values: dict[str, float] = {}
    for _, row in sorted(metrics(folder).items()):
        values |= row
    return values


@pytest.mark.parametrize("label", ["trunk", "blocks.0"])
def test_formulas_of_the_backbone(probed: Path, label: str) -> None:
    """From the snapshot files, by singular values of the drifts themselves."""
    _, basis = read_path(probed, label)
    x, d, theta0 = drifts(basis), basis[1:], basis[0]
    square = np.linalg.svd(x, compute_uv=False) ** 2
    unit = np.linalg.svd(x / np.linalg.norm(x, axis=1, keepdims=True), compute_uv=False) ** 2
    lengths, v = np.linalg.norm(d, axis=1), first_direction(x)
    walk = math.sqrt(float((lengths**2).sum()))
    a, drift = float(x[-1] @ v), float(np.linalg.norm(x[-1]))
    expected = {
        "pc1": square[0] / square.sum(),
        "pc2": square[1] / square.sum(),
        "k95": int((np.cumsum(square) < 0.95 * square.sum()).sum()) + 1,
        "k99": int((np.cumsum(square) < 0.99 * square.sum()).sum()) + 1,
        "pc1_unit": unit[0] / len(x),
        "pc2_unit": unit[1] / len(x),
        "cos_theta0": v @ theta0 / np.linalg.norm(theta0),
        "drift": drift,
        "persistence": drift / walk,
        "participation": square.sum() ** 2 / (square**2).sum(),
        "autocorrelation": (d[:-1] * d[1:]).sum() / (lengths[:-1] * lengths[1:]).sum(),
        "coordinate": a,
        "residual": np.linalg.norm(x[-1] - a * v),
        "fraction": a**2 / drift**2,
    }
    logged = _last(probed)
    for quantity, value in expected.items():
        assert logged[f"backbone/{label}/{quantity}"] == pytest.approx(value, rel=1e-4), quantity
    for quantity in ("pc1", "k95", "persistence"):
        own, null, excess = (logged[f"backbone/{label}/{quantity}{end}"] for end in ("", "_null", "_excess"))
        assert excess == pytest.approx(own - null)
    past = first_direction(x[:-1])
    assert logged[f"alignment/{label}/update"] == pytest.approx(d[-1] @ past / lengths[-1], rel=1e-3, abs=1e-6)


def test_formulas_of_decay(probed: Path) -> None:
    """S_T = prod(1 - lr wd) from the logged rates."""
    rows = metrics(probed)
    left = math.prod(1.0 - row["train/lr"] * DECAY for _, row in sorted(rows.items()) if "train/lr" in row)
    _, basis = read_path(probed, "trunk")
    corrected = np.linalg.norm(drifts(basis)[-1] + (1.0 - left) * basis[0])
    assert _last(probed)["backbone/trunk/drift_corrected"] == pytest.approx(corrected, rel=1e-4)


def test_formulas_that_join_logged_numbers(probed: Path) -> None:
    dim = flat(tiny_gpt().state_dict(), "trunk").size
    floor = math.sqrt(2.0 / (math.pi * dim))
    total = 0.0
    counted = dict.fromkeys(("bias", "lm_z", "overlap", "share", "val", "loss", "anisotropy", "transverse"), 0)
    for _, row in sorted(metrics(probed).items()):
        if "alignment/trunk/bias" in row:
            total += row["alignment/trunk/bias"]
            assert row["alignment/trunk/bias_sum"] == pytest.approx(total)
            counted["bias"] += 1
        if "alignment/trunk/lm_z" in row:
            assert row["alignment/trunk/lm_z"] == pytest.approx(abs(row["alignment/trunk/lm"]) / floor)
            counted["lm_z"] += 1
        if "fisher/trunk/batch_mean/overlap" in row:
            found = {key.rpartition("/")[2]: value for key, value in row.items() if "trunk/batch_mean/" in key}
            assert found["overlap_z"] == pytest.approx(found["overlap"] / floor)
            q, trace = found["q_backbone"], found["trace"]
            assert found["anisotropy"] == pytest.approx(q * (dim - 1) / (trace - q))
            counted["overlap"] += 1
            counted["anisotropy"] += 1
        if "anatomy/trunk/share_decay" in row:
            assert sum(row[f"anatomy/trunk/share_{p}"] for p in ("gradient", "decay", "clipping")) == pytest.approx(1.0)
            counted["share"] += 1
        if "val/loss" in row:
            assert row["val/perplexity"] == pytest.approx(math.exp(row["val/loss"]), rel=1e-4)
            assert row["probe/r_ood"] == pytest.approx(row["probe/nll_ood"] / row["probe/lm_ood"], rel=1e-4)
            counted["val"] += 1
        if "train/loss" in row:
            parts = row["train/lm_loss"] + row["train/probe_weight"] * row["train/probe_loss"]
            assert row["train/loss"] == pytest.approx(parts, rel=1e-4)
            counted["loss"] += 1
        if "switching/trunk/transverse" in row:
            assert row["switching/trunk/transverse"] == pytest.approx(1.0 - row["switching/trunk/cosine"] ** 2)
            counted["transverse"] += 1
    assert min(counted.values()) > 0, counted
    logged = _last(probed)
    assert logged["anatomy/trunk/noise_floor"] == pytest.approx(floor)
    beta2 = adamw([tiny_gpt().gpt.tok_emb.weight]).defaults["betas"][1]
    assert logged["anatomy/trunk/memory_beta2"] == pytest.approx(-1.0 / math.log(beta2))
    assert logged["switching/peaks"] == logged["switching/troughs"] == logged["switching/switches"] == 2


def test_formulas_of_a_reheat(reheated: Path) -> None:
    logged = _last(reheated)
    assert logged["reheat/gain"] == pytest.approx(logged["reheat/peak"] - logged["reheat/p0"])
    assert logged["reheat/recovery"] == pytest.approx(logged["reheat/gain"] / (1.0 - logged["reheat/p0"]))


def _unit_share(steps: int) -> float:
    """PC1 of a walk's drifts scaled to unit length: cosines of x_s and x_t are sqrt(min / max)."""
    order = np.arange(1, steps + 1)
    cosines = np.sqrt(np.minimum.outer(order, order) / np.maximum.outer(order, order))
    return float(np.linalg.eigvalsh(cosines)[-1]) / steps


def test_closed_forms_of_a_walk_of_many_equal_steps() -> None:
    """The numbers that the entries give: 8/pi^2 and what follows from it, for T = 1,500 orthogonal steps."""
    order = np.arange(1, 1501)
    energy, vectors = np.linalg.eigh(np.minimum.outer(order, order).astype(float))  # Gram of the rows x_t
    energy, first = energy[::-1], vectors[:, -1]
    shares = energy / energy.sum()
    coordinate = abs(first[-1]) * math.sqrt(energy[0]) / math.sqrt(len(order))  # a(T) over sqrt(sum ||d||^2)
    told = {
        "pc1": ("0.81", shares[0]),
        "pc2": ("0.09", shares[1]),
        "participation": ("3/2", 1.0 / (shares**2).sum()),
        "coordinate": ("0.90", coordinate),
        "residual": ("0.435", math.sqrt(1.0 - coordinate**2)),
        "fraction": ("0.81", coordinate**2),
        "k95": (" 5;", int((np.cumsum(shares) < 0.95).sum()) + 1),
        "k99": (" 21", int((np.cumsum(shares) < 0.99).sum()) + 1),
        "pc1_unit": ("0.70", _unit_share(50)),
    }
    for quantity, (text, value) in told.items():
        metric = registry.find(f"backbone/trunk/{quantity}")
        assert metric is not None and text in metric.null
        number = 1.5 if text == "3/2" else float(text.strip(" ;"))
        assert value == pytest.approx(number, abs=0.005), quantity


# ------------------------------------------------------------------------------------------------- the command


def test_the_page_is_what_the_data_say() -> None:
    committed = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    assert committed == glossary.markdown(), "run python -m mini_gpt_pl.metrics.glossary --markdown > docs/metrics.md"


def test_a_name_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    glossary.main(["backbone/blocks.3/pc1"])
    told = capsys.readouterr().out
    for piece in (
        "backbone/blocks.3/pc1",
        "σ₁² / Σ σ_k²",
        "8/π² = 0.81",
        "TrajectoryRecorder",
        "arXiv 2602.23696, eq. 4",
    ):
        assert piece in told


def test_a_derived_name_is_explained_with_what_it_derives_from(capsys: pytest.CaptureFixture[str]) -> None:
    glossary.main(["switching/trunk/run_cosine_percentile"])
    told = capsys.readouterr().out.split("\n\n")
    assert [part.split("\n")[0] for part in told] == [
        "switching/trunk/run_cosine_percentile",
        "switching/trunk/cosine_percentile",
        "switching/trunk/cosine",
    ]


def test_a_run_is_listed_with_its_last_values_and_nulls(probed: Path) -> None:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(glossary.run_table(Run(probed)))
    lines = {line.split()[1]: line for line in console.export_text().splitlines() if line.startswith("│ ")}
    logged = _last(probed)
    row = lines["backbone/trunk/pc1"]
    assert f"{logged['backbone/trunk/pc1']:.4g}" in row
    assert f"pc1_null {logged['backbone/trunk/pc1_null']:.4g}" in row
    assert "(+2)" in row  # the blocks
    assert "backbone/trunk/pc1_excess" not in lines and "backbone/blocks.0/pc1" not in lines
    assert {"overhead/FisherProbe", "overhead/OptimizerAnatomy", "alignment/trunk/lm", "alignment/trunk/probe"} <= set(
        lines
    )


def test_a_probe_of_the_readers_own_is_listed_too(tmp_path: Path) -> None:
    columns = "mine/trunk/sharpness,mine/trunk/sharpness_null,mine/trunk/sharpness_excess,mine/a/sharpness,val/loss"
    (tmp_path / "metrics.csv").write_text(f"step,{columns}\n1,2.5,2,0.5,7,3.5\n")
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(glossary.run_table(Run(tmp_path)))
    text = console.export_text()
    assert re.search(r"mine/trunk/sharpness \(\+1\) +│ +2\.5 │ sharpness_null 2 +│ not in the glossary", text)
    assert re.search(r"val/loss +│ +3\.5", text)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["pc1"], r"no command logs 'pc1'.*did you mean backbone/\{group\}/pc1\?"),
        (["no/such/run"], "no command logs 'no/such/run'"),
        ([], "give the name of a metric, or a run folder"),
        (["--wrong"], "unrecognized arguments: --wrong"),
        (["."], "has no metrics.csv"),
    ],
)
def test_mistakes_are_one_line(args: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with one_line_error(told):
        glossary.main(args)


def test_the_examples_in_the_docstrings_hold() -> None:
    tried = doctest.testmod(registry)
    assert tried.attempted > 3 and tried.failed == 0
