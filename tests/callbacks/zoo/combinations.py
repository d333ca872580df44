"""Optimizers and modules that are tried together, what each combination should give, and how it is tried."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import zoo
from helpers import same
from lightning.pytorch.callbacks import EMAWeightAveraging, GradientAccumulationScheduler
from torch import nn, optim
from witness import Witness

from mini_gpt_pl.callbacks import GradientAlignment, OptimizerAnatomy, Schedule, TrajectoryRecorder
from mini_gpt_pl.training.optimizers import SGDW, MuonAdamW, decay_groups

LR, DECAY = 0.01, 0.5
DECOUPLED = (1 - LR * DECAY) ** zoo.STEPS
Make = Callable[[nn.Module], Any]


class Tried(NamedTuple):
    """An optimizer.

    Attributes:
        make: Makes it for a module.
        survival: What decay alone leaves after all steps, by formula; NaN where there is no common rate.
        why: In words, where there is none.
    """

    make: Make
    survival: float
    why: str = ""


class Way(NamedTuple):
    """A way to train, with AdamW.

    Attributes:
        module: What is trained.
        settings: Of the trainer.
        survival: What decay alone leaves of the last group.
        data: Makes the loaders.
        others: Makes other callbacks.
        behind: Whether those stand behind the probes.
    """

    module: type[zoo.Plain] = zoo.Plain
    settings: Mapping[str, Any] = {}
    survival: float = 0.999**zoo.STEPS
    data: Callable[[], Any] = zoo.batches
    others: Callable[[], list[Any]] = list
    behind: bool = False


class Combination(NamedTuple):
    """An optimizer on a module."""

    optimizer: str
    module: str


def momentum(beta: float, dampening: float = 0.0) -> float:
    """L2 through SGD's momentum, step by step."""
    theta, buffer = 1.0, 0.0
    for step in range(zoo.STEPS):
        buffer = DECAY * theta if step == 0 else beta * buffer + (1 - dampening) * DECAY * theta
        theta -= LR * buffer
    return theta


def averaged() -> float:
    """Schedule-free AdamW without gradients: theta between the weights that decay at theta and their mean."""
    theta = z = 1.0
    for step in range(1, zoo.STEPS + 1):
        average = (theta - 0.1 * z) / 0.9
        z -= LR * DECAY * theta
        average += (z - average) / step
        theta = 0.9 * average + 0.1 * z
    return theta


def own(make: Callable[..., Any], **settings: Any) -> Make:
    return lambda module: make(zoo.trained(module), **settings)


L2 = "L2 is divided by the root of a second moment that it is part of"
OPTIMIZERS = {
    "Adadelta": Tried(own(optim.Adadelta, lr=1.0, weight_decay=DECAY), math.nan, L2),
    "Adafactor": Tried(own(optim.Adafactor, lr=LR, weight_decay=DECAY), DECOUPLED),
    "Adagrad": Tried(own(optim.Adagrad, lr=LR), 1.0),
    "Adagrad, L2": Tried(own(optim.Adagrad, lr=LR, weight_decay=DECAY), math.nan, L2),
    "Adam": Tried(own(optim.Adam, lr=LR), 1.0),
    "Adam, L2": Tried(own(optim.Adam, lr=LR, weight_decay=DECAY), math.nan, L2),
    "AdamW": Tried(own(optim.AdamW, lr=LR, weight_decay=DECAY), DECOUPLED),
    "AdamW, amsgrad": Tried(own(optim.AdamW, lr=LR, weight_decay=DECAY, amsgrad=True), DECOUPLED),
    "AdamW, foreach": Tried(own(optim.AdamW, lr=LR, weight_decay=DECAY, foreach=True), DECOUPLED),
    "AdamW, fused": Tried(own(optim.AdamW, lr=LR, weight_decay=DECAY, fused=True), DECOUPLED),
    "Adamax, L2": Tried(own(optim.Adamax, lr=LR, weight_decay=DECAY), math.nan, L2),
    "ASGD": Tried(own(optim.ASGD, lr=LR, weight_decay=0.0, lambd=0.0), 1.0),
    "LBFGS": Tried(own(optim.LBFGS, lr=0.3, max_iter=3), 1.0),
    "Muon": Tried(
        lambda module: optim.Muon([p for p in zoo.trained(module) if p.ndim == 2], lr=LR, weight_decay=DECAY), DECOUPLED
    ),
    "NAdam, decoupled": Tried(own(optim.NAdam, lr=LR, weight_decay=DECAY, decoupled_weight_decay=True), DECOUPLED),
    "NAdam, L2": Tried(own(optim.NAdam, lr=LR, weight_decay=DECAY), math.nan, L2),
    "RAdam, decoupled": Tried(own(optim.RAdam, lr=LR, weight_decay=DECAY, decoupled_weight_decay=True), DECOUPLED),
    "RAdam, L2": Tried(own(optim.RAdam, lr=LR, weight_decay=DECAY), math.nan, L2),
    "RMSprop": Tried(own(optim.RMSprop, lr=LR), 1.0),
    "RMSprop, L2": Tried(own(optim.RMSprop, lr=LR, weight_decay=DECAY), math.nan, L2),
    "Rprop": Tried(own(optim.Rprop, lr=LR), 1.0),
    "SGD": Tried(own(optim.SGD, lr=LR, weight_decay=DECAY), DECOUPLED),
    "SGD, momentum": Tried(own(optim.SGD, lr=LR, momentum=0.9, weight_decay=DECAY), momentum(0.9)),
    "SGD, dampening": Tried(own(optim.SGD, lr=LR, momentum=0.9, dampening=0.9, weight_decay=DECAY), momentum(0.9, 0.9)),
    "SparseAdam": Tried(own(optim.SparseAdam, lr=LR), 1.0),
    "SGDW": Tried(own(SGDW, lr=LR, momentum=0.9, weight_decay=DECAY), DECOUPLED),
    "MuonAdamW": Tried(lambda module: MuonAdamW(decay_groups(module), lr=LR, weight_decay=DECAY), DECOUPLED),
    "Lion (own)": Tried(own(zoo.Lion, lr=LR, weight_decay=DECAY), DECOUPLED),
    "schedule-free AdamW (own)": Tried(own(zoo.ScheduleFree, lr=LR, weight_decay=DECAY), averaged()),
    "SAM on AdamW (own)": Tried(own(zoo.Sharp, lr=LR, weight_decay=DECAY), DECOUPLED),
    "Lookahead on SGD (own)": Tried(
        lambda module: zoo.Lookahead(optim.SGD(zoo.trained(module), lr=0.1)), math.nan, "it holds weights of its own"
    ),
    "trust ratio (own)": Tried(own(zoo.Trusted, lr=LR), math.nan, "what decay takes depends on the gradient"),
    "derived from AdamW (own)": Tried(own(zoo.Derived, lr=LR, weight_decay=DECAY / 2), DECOUPLED),
    "descent without lr (own)": Tried(own(zoo.Silent), 1.0),
}
MODULES: dict[str, type[zoo.Plain]] = {
    "two layers": zoo.Plain,
    "tied": zoo.Tied,
    "frozen": zoo.Frozen,
    "low-rank": zoo.LowRank,
    "batch norm": zoo.BatchNorm,
    "recurrent": zoo.Recurrent,
    "checkpointed": zoo.Checkpointed,
    "parametrized": zoo.Parametrized,
    "pruned": zoo.Pruned,
    "random in the loss": zoo.Drawing,
    "complex": zoo.Complex,
    "empty and zero-dimensional": zoo.Pieces,
    "sparse gradients": zoo.Sparse,
    "manual": zoo.Manual,
    "GAN": zoo.Gan,
}
# The optimizers that each kind of module is trained with.
THREE = ("AdamW", "SGD, momentum", "Lion (own)")
# Optimizers that the plain module cannot be trained with: one takes sparse gradients only, one calls no closure.
OWN_MODULE = {"SparseAdam": "sparse gradients", "descent without lr (own)": "manual"}
COMBINATIONS = [
    *(Combination(name, OWN_MODULE.get(name, "two layers")) for name in OPTIMIZERS),
    *(
        Combination(name, module)
        for module in MODULES
        if module != "two layers"
        for name in (("AdamW",) if module == "GAN" else ("SGD",) if module == "sparse gradients" else THREE)
    ),
]


EPOCHS: dict[str, Any] = {"max_steps": -1, "max_epochs": 3}
WAYS = {
    "accumulation, an epoch's last step of fewer batches": Way(settings={"accumulate_grad_batches": 5}),
    "accumulation that changes by epoch": Way(
        settings={**EPOCHS, "limit_train_batches": 6},
        survival=0.999 ** (6 + 3 + 3),
        others=lambda: [GradientAccumulationScheduler({0: 1, 1: 2})],
    ),
    "clipping by value": Way(settings={"gradient_clip_val": 1e3, "gradient_clip_algorithm": "value"}),
    "`overfit_batches`": Way(settings={"overfit_batches": 2}),
    "`limit_train_batches` as a share": Way(settings={**EPOCHS, "limit_train_batches": 1 / 3}),
    "`detect_anomaly`": Way(settings={"detect_anomaly": True}),
    "an iterable dataset of unknown length": Way(data=zoo.stream),
    "several loaders": Way(zoo.Several, data=lambda: {"a": zoo.batches(), "b": zoo.stream()}),
    "two backward passes a step": Way(zoo.TwoPasses),
    "a compiled `optimizer.step`": Way(zoo.CompiledStep),
    "a parameter group added while training": Way(
        zoo.Grows, {**EPOCHS, "limit_train_batches": 6}, 0.999**18, others=list
    ),
    "one weight in two groups": Way(zoo.TiedAcross),
    "an integer parameter": Way(zoo.Quantised),
    "weights on the meta device until `configure_model`": Way(zoo.OnMeta),
    "spectral norm": Way(zoo.Spectral),
    "bf16-mixed": Way(settings={"precision": "bf16-mixed"}),
    "`EMAWeightAveraging` before the probes": Way(others=lambda: [EMAWeightAveraging(decay=0.9)]),
    "`EMAWeightAveraging` behind the probes": Way(others=lambda: [EMAWeightAveraging(decay=0.9)], behind=True),
}


def module_of(combination: Combination) -> Callable[[], zoo.Plain]:
    """Make the module, with the optimizer."""
    tried, kind = OPTIMIZERS[combination.optimizer], MODULES[combination.module]
    if combination == Combination("SGD", "sparse gradients"):
        return lambda: kind(own(optim.SGD, lr=LR))
    return lambda: kind(tried.make)


def survival_of(combination: Combination) -> float:
    """What decay alone leaves of the trained weights, by formula."""
    if combination.module == "GAN":
        return 0.999 ** (zoo.STEPS // 2)
    if combination.module == "sparse gradients":
        return 1.0
    return OPTIMIZERS[combination.optimizer].survival


def verdict(combination: Combination) -> str:
    """What the page says of a combination."""
    left = survival_of(combination)
    known = "null known" if left == left else f"null unknown: {OPTIMIZERS[combination.optimizer].why}"
    return f"measured; {known}"


def compare(combination: Combination) -> None:
    """Train a combination bare, and with probes and a witness, and compare everything.

    Raises:
        AssertionError: Something differs.
    """
    compare_runs(module_of(combination), survival_of(combination))


def compare_way(name: str) -> None:
    """Do the same for a way to train.

    Raises:
        AssertionError: Something differs.
    """
    way = WAYS[name]
    settings = {"max_steps": zoo.STEPS, **way.settings}
    compare_runs(lambda: way.module(), way.survival, way.others, way.behind, data=way.data, **settings)


def compare_runs(
    module: Callable[[], zoo.Plain],
    survival: float,
    others: Callable[[], list[Any]] = list,
    behind: bool = False,
    **settings: Any,
) -> None:
    """Train bare, and with probes and a witness, and compare everything.

    Raises:
        AssertionError: Something differs.
    """
    pattern, every = module().pattern, 2
    recorder, witness = TrajectoryRecorder(pattern, Schedule(every=every)), Witness(pattern)
    probes = [GradientAlignment(Schedule(every=1), None), OptimizerAnatomy(Schedule(every=1))]
    with tempfile.TemporaryDirectory() as folder:
        bare, _, drawn = zoo.fit(module, others(), Path(folder, "bare"), **settings)
        mine = [*probes, witness, recorder]
        both = [*mine, *others()] if behind else [*others(), *mine]
        probed, rows, drawn_beside = zoo.fit(module, both, Path(folder, "probed"), **settings)
    assert same(bare.state_dict(), probed.state_dict()), "weights or buffers differ"
    assert torch.equal(drawn[0], drawn_beside[0]) and drawn[2] == drawn_beside[2], "random states differ"
    assert all(map(bool, [(drawn[1][1] == drawn_beside[1][1]).all(), drawn[1][2] == drawn_beside[1][2]]))
    last = max(step for step in rows if "backbone/trunk/pc1" in rows[step])
    taken = len(witness.steps) // every * every
    seen = witness.steps[taken - 1]
    past = taken - every
    expected = {
        "backbone/trunk/pc1": witness.pc1(every, taken),
        "alignment/trunk/update": witness.update_alignment(every, taken),
        "alignment/trunk/gradient": witness.cosine(seen.gradient, every, past),
        "anatomy/trunk/cos_gradient": -witness.cosine(seen.gradient, every, past),
        "anatomy/trunk/cos_update": witness.cosine(seen.after - seen.before, every, past),
    }
    for name, value in expected.items():
        assert rows[last][name] == pytest.approx(value, abs=2e-3), name
    trajectory = recorder.trajectory
    assert trajectory is not None
    left = trajectory.survival_of(trajectory.groups[-1])[-1]
    assert left == pytest.approx(survival, rel=1e-9, nan_ok=True)
    assert trajectory.decay_known(trajectory.groups[-1]) == (left == left)
    shown = [name for name in rows[last] if name.startswith(f"backbone/{trajectory.groups[-1]}/") and "_excess" in name]
    assert bool(shown) == (left == left), "an excess stands beside an unknown null, or is missing"


def page() -> str:
    """Write the page: every combination with its verdict."""
    lines = [HEAD]
    for combination in COMBINATIONS:
        lines.append(f"| {combination.module} | {combination.optimizer} | {verdict(combination)} |")
    lines += ["", "Ways of training, each with AdamW:", "", "| way | verdict |", "|---|---|"]
    lines += [f"| {name} | measured; null known |" for name in WAYS]
    lines += ["", "Measured, and one line says what is missing:", ""]
    lines += [f"* {text}" for text in SAID]
    lines += ["", "Refused, in one line at the start of the run:", ""]
    lines += [f"* {text}" for text in REFUSALS]
    return "\n".join(lines) + "\n"


HEAD = """# What works with what

Each row was trained twice from the same seeds, bare and with a recorder, gradient alignment and the optimizer's anatomy
at every step, beside a witness: an observer with code of its own that stands around `optimizer.step()`, copies the true
weights before and after it and the gradient where the step began, and computes everything in float64. *Measured*
says that weights, buffers and every random state (PyTorch, NumPy, Python) are those of the bare run bit for bit, and
that PC1, the alignment of updates, both ends of the ladder from the gradient to the update, and what decay leaves of
the weights agree with the witness or with a formula. *Null unknown* says that decay has no common rate there
([nulls](concepts/nulls.md#what-decay-takes-is-measured)): the numbers are measured, and no excess is shown.

This page is written by `python -m docs.tools.what_works`, from the combinations that `tests/callbacks/zoo` tries.

| module | optimizer | verdict |
|---|---|---|"""
SAID = (
    "weights that something else than an optimizer moves as well, as a decay or a clamp by hand: their null\n"
    "  knows nothing of it;",
    "weights in bfloat16 or float16 whose decay a step is below their rounding: they have no null;",
    "sketches of a group whose weights decay at several rates: it has no null;",
    "a step in two halves (SAM) whose backward passes are no `manual_backward`: its gradient is not measured\n"
    "  (where it writes through `.data` as well, nobody sees it, and the gradient is that of its second half).",
)
REFUSALS = (
    "FSDP1 and DeepSpeed, whose optimizers step flat copies of the weights: FSDP2 and DDP are measured;",
    "an optimizer that is no `torch.optim.Optimizer`: its steps cannot be observed;",
    "an optimizer that moves the weights before it asks for their gradient: none belongs to where its step begins;",
    "selected weights of a lazy module that have no shape yet: let it see a batch before, as in `configure_model`;",
    "a Fisher or commutators of a module whose forward writes into its weights, as it would into those of training\n"
    "  (the `max_norm` of an embedding is put back, but has no commutators);",
    "a kick or an intervention on complex weights; recorder, alignment and anatomy take them as pairs of reals.",
)
