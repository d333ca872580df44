"""Measuring other people's modules on other people's batches: training does not notice, and no number is wrong."""

from __future__ import annotations

import dataclasses
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import one_line_error
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from scripts import run_in_full
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from mini_gpt_pl.callbacks import (
    CommutatorProbe,
    FisherProbe,
    GradientAlignment,
    Schedule,
    StreamingFisher,
    TrajectoryRecorder,
)
from mini_gpt_pl.callbacks.measuring import (
    ChangesItsAttention,
    DrawsBatches,
    KnowsItsLoss,
    ShowsItsAttention,
    gradient_of,
    measuring,
    seed_everything,
)
from mini_gpt_pl.callbacks.nests import digest_of, first_length, moved, packed, take_sample, unpacked
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection

PATTERN = r"(?P<group>net\.\d)\."


class Rows(DummyLogger):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.by_step: dict[int, dict[str, float]] = {}

    @override
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.by_step.setdefault(step or 0, {}).update(metrics)


def samples(count: int = 48) -> TensorDataset:
    inputs = torch.randn(count, 5, generator=torch.Generator().manual_seed(3))
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


class Small(LightningModule):
    """Two layers; what is peculiar comes in subclasses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(self.layer(5, 7), nn.Tanh(), self.layer(7, 3))

    def layer(self, inputs: int, outputs: int) -> nn.Module:
        return nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x)
        return found

    def batch_loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.batch_loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def train(
    folder: Path, module: LightningModule, probes: Sequence[Callback], loader: Any = None, **settings: Any
) -> tuple[dict[str, Tensor], dict[int, dict[str, float]]]:
    """Twelve steps; what the state dictionary is afterwards, and all that was logged."""
    rows, resume = Rows(), settings.pop("ckpt_path", None)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1, "accelerator": "cpu"}
    keeps = any(isinstance(probe, ModelCheckpoint) for probe in probes)
    trainer = Trainer(
        **{**quiet, "max_steps": 12, "max_epochs": -1, "enable_checkpointing": keeps, "logger": rows, **settings},
        callbacks=list(probes),
        default_root_dir=folder,
    )
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(11)
    trainer.fit(module, loader or DataLoader(samples(), 6, shuffle=True), ckpt_path=resume)
    return module.state_dict(), rows.by_step


def watch(pattern: str = PATTERN) -> list[Callback]:
    return [
        TrajectoryRecorder(pattern, Schedule(every=2)),
        GradientAlignment(Schedule(every=1), Schedule(every=3)),
        FisherProbe(Schedule(every=4), batches=2),
        CommutatorProbe(Schedule(every=5), samples=1),
    ]


# ------------------------------------------------------------------------------------------------------------- traces


class Folding(nn.Linear):
    """A low-rank layer that is folded into its weight while it is in evaluation mode; it writes as LoRA layers do."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.ones(outputs, 2) / 3)
        self.weight.requires_grad_(False)
        self.is_folded = False

    @override
    def train(self, mode: bool = True) -> Folding:
        super().train(mode)
        if mode == self.is_folded:
            self.weight.data += (self.up @ self.down).data * (-1 if mode else 1)
            self.is_folded = not mode
        return self

    @override
    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x)
        return found if self.is_folded else found + x @ self.down.T @ self.up.T


class LowRank(Small):
    def layer(self, inputs: int, outputs: int) -> nn.Module:
        return Folding(inputs, outputs)


class Drawing(Small):
    """Mixes its batch by numpy's random numbers, flips by Python's, and adds torch's."""

    def batch_loss(self, batch: Any) -> Tensor:
        x, y = batch
        share = np.random.beta(1.0, 1.0)
        x = share * x + (1.0 - share) * x.flip(0)
        if random.random() < 0.5:
            x = x.flip(1)
        return nn.functional.cross_entropy(self(x + 0.1 * torch.randn_like(x)), y)


class Writing(Small):
    """Every forward writes into a buffer, exchanges another, and makes a third, whatever the mode."""

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(3))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x + self.total.mean())
        self.total.data.mul_(0.9).add_(found.detach().mean(0))  # no version counts this
        self.count = self.count + 1
        if not hasattr(self, "first"):
            self.register_buffer("first", x.detach().mean(0))
        return found


class Normed(Small):
    def layer(self, inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.Dropout(0.3))


def differences(folder: Path, kind: type[Small]) -> list[str]:
    """What training with every probe leaves otherwise than training alone."""
    pattern = r"(?P<group>net\.\d)\..*(up|bias|0\.weight)" if kind in (LowRank, Normed) else PATTERN
    probes = watch(pattern)
    if kind is LowRank:  # in evaluation mode no gradient reaches the factors
        probes[1:] = [FisherProbe(Schedule(every=4), batches=2, mode="train")]
    ends: list[dict[str, Any]] = []
    for callbacks in ([], probes):
        state, _ = train(folder / str(len(callbacks)), kind(), callbacks)
        states = {"python": random.getstate(), "numpy": str(np.random.get_state()), "torch": torch.get_rng_state()}
        ends.append({**state, **states})
    bare, watched = ends
    if list(bare) != list(watched):
        return [f"{list(bare)} are {list(watched)}"]
    same = {
        name: torch.equal(v, watched[name]) if isinstance(v, Tensor) else v == watched[name] for name, v in bare.items()
    }
    return [name for name, equal in same.items() if not equal]


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import mini_gpt_pl.callbacks  # before the tests' own type checks are set up
from test_traces import Drawing, LowRank, Normed, Writing, differences

for kind in (LowRank, Drawing, Writing, Normed):
    found = differences(Path(sys.argv[1]) / kind.__name__, kind)
    assert not found, (kind.__name__, found)
"""


def test_training_does_not_notice(tmp_path: Path) -> None:
    """Without the type checks of the tests, which draw from Python's random numbers themselves."""
    run_in_full(SCRIPT, tmp_path, str(Path(__file__).parent))


@pytest.mark.parametrize("fails", [False, True])
def test_weights_buffers_and_random_states_are_put_back(fails: bool) -> None:
    """Also where the measurement raises; parts that were folded before stay folded."""
    owner, folding = Writing(), LowRank()
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    whole = Small()
    whole.both = nn.ModuleList([owner, folding])
    kept, folded = (part for part in folding.net if isinstance(part, Folding))
    kept.eval()
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    modes = {name: part.training for name, part in whole.named_modules()}
    states = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    try:
        with measuring(trainer, whole):
            assert not any(part.training for part in whole.modules())
            assert folded.is_folded
            owner(torch.ones(2, 5))
            random.random(), np.random.random(), torch.randn(2)
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    after = whole.state_dict()
    assert list(after) == list(before) and all(torch.equal(value, after[name]) for name, value in before.items())
    assert modes == {name: part.training for name, part in whole.named_modules()}
    assert (random.getstate(), str(np.random.get_state())) == states[:2] and torch.equal(
        torch.get_rng_state(), states[2]
    )
    assert kept.is_folded and not folded.is_folded


class Dropping(Small):
    def layer(self, inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, outputs), nn.Dropout(0.4))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_fisher_of_either_mode_equals_brute_force(tmp_path: Path, mode: Any) -> None:
    """In the modes of training every gradient has a dropout mask of its own, the same whenever it is asked for."""
    module = Dropping()
    settings: dict[str, Any] = {"batches": 3, "block": 1, "mode": mode, "seed": 5}
    probes = [TrajectoryRecorder(PATTERN, Schedule(every=2)), FisherProbe(Schedule(steps=[12]), **settings)]
    state, rows = train(tmp_path, module, probes, DataLoader(samples(), 6))
    module.load_state_dict(state)
    module.train(mode == "train")
    squares = []
    for index in range(3):
        batch = [column[6 * index : 6 * index + 6] for column in samples().tensors]
        if mode == "train":
            seed_everything(module, 5, index)
        gradients = torch.autograd.grad(module.batch_loss(batch), list(module.net.parameters()))
        squares.append(sum(float(gradient.double().square().sum()) for gradient in gradients))
    assert rows[12]["fisher/trunk/batch_mean/trace"] == pytest.approx(sum(squares) / 3, rel=1e-6)


def test_an_iterator_that_ends_inside_of_a_hook_does_not_end_the_epoch(tmp_path: Path) -> None:
    class Ending(Small):
        def draw_batch(self, generator: np.random.Generator, size: int | None = None) -> Any:
            return next(iter(()))

    with one_line_error("an iterator ended while a probe measured Ending"):
        train(tmp_path, Ending(), [CommutatorProbe(Schedule(every=2), samples=1, directions=0)])


# ---------------------------------------------------------------------------------------------------------- gradients


class Checkpointed(Small):
    reentrant = True

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().clone().requires_grad_()
        first = checkpoint(self.net[0], x, use_reentrant=self.reentrant)
        found: Tensor = self.net[2](self.net[1](first))
        return found

    def named_losses(self, batch: Any) -> dict[str, Tensor]:
        return {"all": self.batch_loss(batch), "last": self.net[2](torch.ones(2, 7)).square().mean()}


class Unbroken(Checkpointed):
    reentrant = False


def test_gradients_behind_a_reentrant_checkpoint_are_those_of_training(tmp_path: Path) -> None:
    probes = [watch()[:3] for _ in range(2)]
    here, there = (
        train(tmp_path / kind.__name__, kind(), some)[1]
        for kind, some in zip((Checkpointed, Unbroken), probes, strict=True)
    )
    names = [f"alignment/{group}/all" for group in ("net.0", "net.2", "trunk")] + ["fisher/net.0/batch_mean/trace"]
    for name in names:
        steps = [step for step, row in there.items() if name in row]
        assert steps and [here[step][name] for step in steps] == pytest.approx([there[step][name] for step in steps])
    assert "alignment/net.0/last" not in {name for row in here.values() for name in row}  # no such dependence


def test_a_hidden_weight_is_an_error_where_training_would_hear_of_the_backward_pass() -> None:
    module = Checkpointed()
    batch = [column[:6] for column in samples().tensors]
    selection = ParameterSelection.of(module, PATTERN)
    heard: list[int] = []
    bias = dict(module.named_parameters())["net.2.bias"]
    bias.register_post_accumulate_grad_hook(lambda parameter: heard.append(1))
    with one_line_error(r"depends on 'net.0.weight'.*use_reentrant=False"):
        gradient_of(lambda: module.batch_loss(batch), selection, module)
    assert not heard and all(parameter.grad is None for parameter in module.parameters())


def test_a_hidden_weight_is_an_error_of_a_commutator(tmp_path: Path) -> None:
    with one_line_error(r"depends on 'net.0.weight'.*use_reentrant=False"):
        train(tmp_path, Checkpointed(), [CommutatorProbe(Schedule(every=2), samples=1, directions=0)])


def test_a_layer_that_folds_in_evaluation_mode_is_measured_in_that_of_training(tmp_path: Path) -> None:
    """Folded, no gradient reaches its factors, though the loss depends on them."""
    pattern = r"net\.\d\.(up|down)"
    with one_line_error(r"depends on 'net.0.down'.*mode: train"):
        train(tmp_path / "eval", LowRank(), [TrajectoryRecorder(pattern), FisherProbe(Schedule(every=4), batches=2)])
    probes = [TrajectoryRecorder(pattern), FisherProbe(Schedule(every=4), batches=2, mode="train")]
    assert train(tmp_path / "train", LowRank(), probes)[1][12]["fisher/trunk/batch_mean/trace"] > 0


def test_a_weight_that_the_loss_does_not_use_has_a_gradient_of_zero() -> None:
    module = Small()
    module.unused = nn.Linear(2, 2)
    selection = ParameterSelection.of(module, "")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    batch = [column[:6] for column in samples().tensors]
    found = selection.unflatten(gradient_of(lambda: module.batch_loss(batch), selection, module))
    assert not found["unused.weight"].any() and found["net.0.weight"].any()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


# ------------------------------------------------------------------------------------------------------------ batches


class Graph:
    """A batch object as graph libraries have: no container, but Lightning can move it."""

    def __init__(self, x: Tensor, y: Tensor, name: str = "g") -> None:
        self.x, self.y, self.name = x, y, name

    def to(self, device: Any, *args: Any, **kwargs: Any) -> Graph:
        return Graph(self.x.to(device), self.y.to(device), self.name)


class Slotted(Graph):
    __slots__ = ("extra",)


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Tensor
    y: Tensor

    def to(self, device: Any, *args: Any, **kwargs: Any) -> Frozen:
        return Frozen(self.x.to(device), self.y.to(device))


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


Collate = Callable[[list[tuple[Tensor, Tensor]]], Any]


def stacked(make: Callable[[Tensor, Tensor], Any]) -> Collate:
    return lambda rows: make(torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows]))


COLLATES: dict[str, Collate] = {
    "graph": stacked(Graph),
    "slotted": stacked(Slotted),
    "frozen": stacked(Frozen),
    "named": stacked(Pair),
    "numbers": lambda rows: {"x": torch.stack([x for x, _ in rows]), "y": [int(y) for _, y in rows]},
    "lists": lambda rows: {"x": [x for x, _ in rows], "y": [y for _, y in rows]},
    "ordered": lambda rows: OrderedDict(x=torch.stack([x for x, _ in rows]), y=np.array([int(y) for _, y in rows])),
    "texts": lambda rows: {"x": torch.stack([x for x, _ in rows]), "y": [f"{int(y)}" for _, y in rows]},
}


class Reading(Small):
    """Reads x and y out of whatever a batch is."""

    def batch_loss(self, batch: Any) -> Tensor:
        x, y = (batch[name] if isinstance(batch, dict) else getattr(batch, name) for name in ("x", "y"))
        if isinstance(x, list):
            x, y = torch.stack(x), torch.stack(y)
        if not isinstance(y, Tensor):
            y = torch.tensor([int(label) for label in y])
        return nn.functional.cross_entropy(self(x), y)


@pytest.mark.parametrize("kind", COLLATES)
def test_probes_measure_batches_of_any_kind(tmp_path: Path, kind: str) -> None:
    """As many numbers, and the same, as on plain tensors; ragged batches, resumed in the middle, included."""
    sizes = [6, 4, 7, 5, 8, 3]
    edges = np.cumsum([0, *sizes])
    batches = [list(range(lo, hi)) for lo, hi in pairwise(edges.tolist())]

    def go(name: str, collate: Collate, steps: int, resume: bool = False) -> tuple[Any, str]:
        fisher = FisherProbe(Schedule(every=4), ["batch_mean", "per_sample"], batches=3, samples_per_batch=2)
        keep = ModelCheckpoint(tmp_path / name, "{step}", every_n_train_steps=6, save_top_k=-1)
        probes = [TrajectoryRecorder(PATTERN, Schedule(every=2)), fisher, StreamingFisher(Schedule(every=1)), keep]
        loader = DataLoader(samples(), batch_sampler=batches, collate_fn=collate)
        path = tmp_path / name / "step=6.ckpt" if resume else None
        rows = train(tmp_path / name, Reading(), probes, loader, max_steps=steps, ckpt_path=path)[1]
        return {k: v for k, v in rows[steps].items() if k.startswith("fisher/")}, fisher.sha256

    plain, _ = go("plain", lambda rows: {"x": COLLATES["named"](rows).x, "y": COLLATES["named"](rows).y}, 12)
    whole, digest = go(kind, COLLATES[kind], 12)
    assert whole == pytest.approx(plain, rel=1e-5, abs=1e-9) and len(plain) > 20
    assert go(kind, COLLATES[kind], 12, resume=True) == (whole, digest)


def test_a_sample_is_one_entry_of_every_column() -> None:
    batch = {"x": torch.arange(6).view(3, 2), "y": [7, 8, 9], "text": ("a", "b", "c"), "lr": 0.5, "eye": torch.eye(2)}
    one = take_sample(batch, 1)
    assert one["x"].tolist() == [[2, 3]] and one["y"] == [8] and one["text"] == ("b",)
    assert one["lr"] == 0.5 and one["eye"].shape == (2, 2)
    lists = take_sample({"x": [torch.ones(6), torch.ones(4), torch.zeros(6)]}, 2)
    assert len(lists["x"]) == 1 and not lists["x"][0].any()
    sparse = take_sample({"x": torch.eye(3).to_sparse(), "y": torch.arange(3)}, 2)
    assert sparse["x"].to_dense().tolist() == [[0.0, 0.0, 1.0]] and sparse["y"].tolist() == [2]
    loaders = {"a": [torch.ones(8, 6), torch.arange(8)], "b": [torch.ones(2, 6), torch.arange(2)]}
    assert first_length(loaders) == 8 and take_sample(loaders, 3)["a"][1].tolist() == [3]
    assert first_length({"x": [torch.ones(6)] * 4}) == 4 and first_length([torch.ones(5, 2), torch.ones(5)]) == 5


def test_samples_that_cannot_be_told_are_not_cut() -> None:
    class Edges(Graph):
        pass

    batch = Edges(torch.ones(9, 2), torch.ones(3))  # nine nodes of three graphs
    assert first_length(batch) == 0
    assert first_length((pack_sequence([torch.ones(3, 2), torch.ones(1, 2)]), torch.ones(2))) == 0
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    for refused, words in ((packed, "no checkpoint can keep"), (lambda b: take_sample(b, 0), "cannot be cut")):
        with one_line_error(words):
            refused([nested, torch.ones(2)])
    with one_line_error(r"one sample of a Edges cannot be told.*take_samples"):
        take_sample(batch, 0)


def test_a_digest_covers_all_that_a_batch_holds() -> None:
    x = torch.arange(4.0)
    batches = [
        {"x": x, "y": [1, 2]},
        {"x": x, "y": [1, 3]},
        {"x": x, "z": [1, 2]},
        {"x": x, "y": (1, 2)},
        {"x": x.double(), "y": [1, 2]},
        {"x": x.view(2, 2), "y": [1, 2]},
        {"x": x.to_sparse(), "y": [1, "2"]},
        Graph(x, x, "one"),
        Graph(x, x, "two"),
    ]
    digests = [digest_of([batch]) for batch in batches]
    assert len(set(digests)) == len(batches) and digests[0] == digest_of([{"x": x.clone(), "y": [1, 2]}])


def test_a_packed_batch_is_read_back_without_trusting_anybody(tmp_path: Path) -> None:
    batch = {"g": Graph(torch.ones(2), torch.ones(2)), "n": np.float32(0.5), "t": Pair(torch.ones(1), torch.zeros(1))}
    torch.save(packed(batch), tmp_path / "batch.pt")
    read = torch.load(tmp_path / "batch.pt", weights_only=True)
    like: dict[str, Any] = {
        "g": Graph(torch.zeros(1), torch.zeros(1), "other"),
        "t": Pair(torch.zeros(3), torch.zeros(3)),
    }
    again = unpacked(read, like)
    assert digest_of([again]) == digest_of([batch]) and again["g"].name == "g" and isinstance(again["t"], Pair)
    assert like["g"].name == "other"
    with one_line_error("hold a Graph, those of this run do not"):
        unpacked(read, [])
    with one_line_error("a batch holds a function, which no checkpoint can keep"):
        packed({"x": digest_of})
    assert moved(batch, torch.device("cpu"))["g"].x.tolist() == [1.0, 1.0]


# ---------------------------------------------------------------------------------------------------------- protocols


class Other:
    """Has the names of what a module can be asked for, and means something else."""

    def batch_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).square().mean()

    @property
    def attention(self) -> Any:
        raise AssertionError("a property is not to be computed to see what it is")

    @cached_property
    def named_losses(self) -> Any:
        raise AssertionError("nor a cached one")

    def draw_batch(self, size: int, generator: Any = None) -> Iterator[int]:
        yield size


class Right(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.accuracy_through = nn.Linear(2, 2)

    def batch_loss(self, b: Any, *, scale: float = 1.0) -> Tensor:
        return b * scale

    def attention(self, *inputs: Any) -> list[Tensor]:
        return []

    @staticmethod
    def draw_batch(rng: np.random.Generator, size: int | None = None) -> int:
        return 0


def test_a_protocol_is_told_by_its_signature() -> None:
    for protocol in (KnowsItsLoss, ShowsItsAttention, DrawsBatches):
        assert isinstance(Right(), protocol) and not isinstance(Other(), protocol), protocol
    assert not isinstance(Right(), ChangesItsAttention)  # a layer of that name
    assert isinstance(Right(), KnowsItsLoss | ChangesItsAttention)


def test_a_loss_of_another_signature_is_refused_at_the_start(tmp_path: Path) -> None:
    class Apart(Small):
        def batch_loss(self, prediction: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
            return nn.functional.cross_entropy(prediction, target)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.batch_loss(self(batch[0]), batch[1])

    probes = [TrajectoryRecorder(PATTERN), FisherProbe(Schedule(every=4), batches=2)]
    with one_line_error(r"Apart has no batch_loss\(batch\)"):
        train(tmp_path, Apart(), probes)
