"""Ranks that share the weights (FSDP2) measure what one rank with all of them does."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import normal, one_line_error
from safetensors.torch import load_file
from scripts import run_in_full
from tolerances import dims_of, tolerance
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from typing_extensions import override

from mini_gpt_pl.geometry.path.rows import IncrementRows
from mini_gpt_pl.geometry.path.snapshots import SnapshotFolder
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.geometry.vectors.alignment import cosines
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector, local_part

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")

RANKS = 4


# ------------------------------------------------------------------------------------------- hand-made shards

# On four ranks: uneven, with an empty last shard, with three empty ones, and a scalar.
SHAPES = {"a.uneven": (6, 3), "a.short": (3,), "b.single": (1, 5), "b.even": (8, 4), "b.scalar": ()}
PATTERN = r"parts\.(?P<group>[ab])\."
S0, S1, R = Shard(0), Shard(1), Replicate()
# Mesh shape, and how each weight lies on it; None is a plain tensor.
LAYOUTS: dict[str, tuple[tuple[int, ...], list[tuple[Placement, ...] | None]]] = {
    "fsdp": ((4,), [(S0,), (S0,), (S0,), (S0,), (R,)]),
    "columns": ((4,), [(S1,), (S0,), (S1,), (S1,), (R,)]),
    "some_copied": ((4,), [(S0,), (R,), None, (S0,), None]),
    "hsdp": ((2, 2), [(R, S0), (R, S0), (R, S0), (R, S0), (R, R)]),
    "two_axes": ((2, 2), [(S0, S1), (S0, R), (R, S1), (S1, S0), (R, R)]),
    "copies": ((2, 2), [(R, R)] * 5),
    "one_rank_axis": ((4, 1), [(S0, S0), (S0, R), (S0, S0), (S0, S1), (R, R)]),
}


class Weights(nn.Module):
    """Named weights of the shapes above."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({group: nn.Module() for group in "ab"})
        for k, (name, shape) in enumerate(SHAPES.items()):
            self._put(name, normal(*shape, seed=100 * seed + k).float())

    def _put(self, name: str, values: Tensor) -> None:
        group, leaf = name.split(".")
        setattr(self.parts[group], leaf, nn.Parameter(values))

    def spread(self, layout: str) -> Weights:
        """Lay the weights out over the ranks."""
        shape, placements = LAYOUTS[layout]
        mesh = init_device_mesh("cpu", shape)
        named = [(name.removeprefix("parts."), parameter.detach()) for name, parameter in self.named_parameters()]
        for (name, whole), placed in zip(named, placements, strict=True):
            self._put(name, whole if placed is None else distribute_tensor(whole, mesh, placed))
        return self


def measure(modules: list[Weights]) -> dict[str, Any]:
    """Everything that must not depend on how the weights lie."""
    selection = ParameterSelection.of(modules[0], PATTERN)
    vectors = [selection.weights(module) for module in modules]
    rows, trajectory = IncrementRows(selection), Trajectory.empty(selection)
    for step, vector in enumerate(vectors):
        new = rows.increment(vector)
        trajectory.append(step, rows.dots(new))
        rows.push(new)
    direction = rows.combine(normal(2, 3, seed=5))
    assert len(direction.values) == selection.local_dim
    return {
        "names": (selection.fingerprint, selection.names, selection.shapes, selection.groups),
        "dims": (*selection.dims, selection.dim),
        "dots": vectors[0].dots(vectors[1]),
        "norms": vectors[2].dots(vectors[2]),
        "differences": (vectors[0] - vectors[1]).dots(vectors[2]),
        "cosines": cosines(vectors[2], direction),
        "grams": trajectory.grams,
    }


def count_reductions(action: Callable[[], object]) -> list[int]:
    """Number of values in each sum over ranks that something asks for."""
    sent: list[int] = []
    original = dist.all_reduce

    def spy(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = spy
    try:
        action()
    finally:
        dist.all_reduce = original
    return sent


def on_layout(layout: str, folder: Path) -> dict[str, Any]:
    """What a rank finds where the weights lie in a given way."""
    modules = [Weights(seed).spread(layout) for seed in range(3)]
    selection = ParameterSelection.of(modules[0], PATTERN)
    shards = selection.shards
    vector = selection.weights(modules[0])
    files = SnapshotFolder(folder / layout, selection)
    if shards is not None and shards.first_replica:
        files.write(0, vector)
        files.close()
    dist.barrier()
    found = measure(modules) | {
        "reductions": count_reductions(lambda: vector.dots(vector)),
        "values": vector.values,
        "local": (selection.local_dim, selection.slices),
        "place": None if shards is None else (shards.index, shards.count, shards.first_replica),
        "local_shapes": {name: tuple(part.shape) for name, part in selection.unflatten(vector).items()},
    }
    if shards is not None:
        assert torch.equal(files.read(0).values, vector.values)
        whole = ParameterSelection.of(Weights(0), PATTERN)
        with pytest.raises(ValueError, match="one vector is whole and the other a shard"):
            vector.dots(Vector(vector.values, whole))
        with pytest.raises(ValueError, match="shapes are not those"):  # chosen before the weights were shared
            whole.weights(modules[0])
        with one_line_error("come from weights shared by . rank.s., here 1 share"):
            SnapshotFolder(folder / layout, whole).read(0)
    return found


def sums_to_come(mesh_shape: tuple[int, ...]) -> Tensor:
    """A gradient whose sum over the ranks has not been taken yet."""
    mesh = init_device_mesh("cpu", mesh_shape)
    return local_part(DTensor.from_local(torch.full((3,), 1.0 + dist.get_rank()), mesh, [Partial()]))


def refusals(folder: Path) -> None:
    """What cannot be measured is said so."""
    module = Weights(0)
    for k, name in enumerate(("a.uneven", "b.even")):
        mesh = init_device_mesh("cpu", ((4,), (2, 2))[k])
        module._put(name, distribute_tensor(normal(8, 4).float(), mesh, [S0] * (k + 1)))
    with one_line_error("different device meshes"):
        ParameterSelection.of(module, PATTERN)
    selection = ParameterSelection.of(Weights(0).spread("fsdp"), PATTERN)
    vector = selection.weights(Weights(0).spread("fsdp"))
    (folder / "of_two" / "shard_1_of_2").mkdir(parents=True, exist_ok=True)
    for name, ranks in (("of_two", 2), ("of_one", 1)):
        if ranks == 1 and dist.get_rank() == 0:
            SnapshotFolder(folder / name, selection)._write(0, vector)
            (folder / name / "shard_1_of_4" / "step_000000000.safetensors").rename(folder / name / "step_000000000.st")
            (folder / name / "step_000000000.st").rename(folder / name / "step_000000000.safetensors")
            (folder / name / "shard_1_of_4").rmdir()
        dist.barrier()
        with one_line_error(f"come from weights shared by {ranks} rank.s., here 4 share"):
            SnapshotFolder(folder / name, selection).read(0)
    columns = ParameterSelection.of(Weights(0).spread("columns"), PATTERN)
    files = SnapshotFolder(folder / "columns_as_rows", columns)
    files._write(0, columns.weights(Weights(0).spread("columns")))
    with one_line_error("cut otherwise over the ranks"):
        SnapshotFolder(folder / "columns_as_rows", selection).read(0)


class Net(nn.Module):
    """Uneven layers; `one_unit` decides whether FSDP2 gathers all of it at once."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (3, 6, 5, 1)
        self.layers = nn.ModuleList(nn.Linear(m, n, dtype=torch.float64) for m, n in itertools.pairwise(sizes))
        with torch.no_grad():
            for k, parameter in enumerate(self.parameters()):
                parameter.copy_(normal(*parameter.shape, seed=k))

    @override
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


INPUTS = normal(8, 3, seed=99)


def differentiated(one_unit: bool) -> dict[str, Any]:
    """Gradients of a mean loss through FSDP2, and that nothing is left behind."""
    net = Net()
    for layer in net.layers if not one_unit else ():
        fully_shard(layer)
    fully_shard(net)
    selection = ParameterSelection.of(net, r"layers\.(?P<group>\d)")
    batch = INPUTS.view(RANKS, -1, 3)[dist.get_rank()]
    with torch.no_grad():
        net(batch)  # an evaluation leaves the root's weights gathered
    assert all(isinstance(p, DTensor) for p in selection.parameters(net))
    assert ParameterSelection.of(net, r"layers\.(?P<group>\d)") == selection
    net(batch).square().mean().backward()
    trained = selection.gradients(net)
    grads = [p.grad for p in selection.parameters(net)]
    copies = [local_part(g).clone() for g in grads if g is not None]
    measured = selection.gradient_of(net(batch).sin().mean(), net)
    after = [p.grad for p in selection.parameters(net)]
    assert all(a is b for a, b in zip(after, grads, strict=True))
    assert all(torch.equal(local_part(g), c) for g, c in zip(grads, copies, strict=True) if g is not None)
    other = selection.gradient_of(net(batch).square().mean(), net)
    assert torch.equal(other.values, trained.values)  # the way of training, again
    return {
        "trained": trained.dots(trained),
        "measured": measured.dots(measured),
        "both": trained.dots(measured),
        "along": cosines(measured, selection.weights(net)),
    }


def work(rank: int, folder: str) -> None:
    """One of the ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    try:
        found: dict[str, Any] = {layout: on_layout(layout, Path(folder)) for layout in LAYOUTS}
        found |= {f"net_{one_unit}": differentiated(one_unit) for one_unit in (False, True)}
        found["sums"] = sums_to_come((RANKS,))
        refusals(Path(folder))
        torch.save(found, Path(folder) / f"rank_{rank}.pt")
    finally:
        dist.destroy_process_group()


# Forked from a process that has used nothing yet: four imports would take longer than everything else.
FORK = """
import sys
from torch.multiprocessing import start_processes
from test_sharded import RANKS, work

start_processes(work, (sys.argv[1],), nprocs=RANKS, start_method="fork")
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of four ranks has found."""
    folder = tmp_path_factory.mktemp("ranks")
    run_in_full(FORK, folder)
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_do_not_depend_on_who_has_which_weights(layout: str, ranks: list[dict[str, Any]]) -> None:
    expected = measure([Weights(seed) for seed in range(3)])
    assert (expected["grams"].diagonal(dim1=1, dim2=2) > 1).all()
    for found in ranks:
        for name, value in expected.items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(found[layout][name], value, rtol=1e-12, atol=1e-12, msg=name)
            else:
                assert found[layout][name] == value, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_coordinate_has_one_owner(layout: str, ranks: list[dict[str, Any]]) -> None:
    whole = ParameterSelection.of(Weights(0), PATTERN).weights(Weights(0)).values
    places = [found[layout]["place"] for found in ranks]
    if layout == "copies":
        assert places == [None] * RANKS and all(torch.equal(found[layout]["values"], whole) for found in ranks)
        return
    for replica in (True, False):
        members = [r for r, place in enumerate(places) if place[2] == replica]
        if members:
            assert [places[r][:2] for r in members] == [(k, len(members)) for k in range(len(members))]
            parts = torch.cat([ranks[r][layout]["values"] for r in members])
            assert torch.equal(parts.sort().values, whole.sort().values)
    assert places[0][2] and sum(place[2] for place in places) == (2 if layout == "hsdp" else 4)
    for found in ranks:
        assert len(found[layout]["values"]) == found[layout]["local"][0] == found[layout]["local"][1][-1].stop


def test_shards_are_uneven_and_some_are_empty(ranks: list[dict[str, Any]]) -> None:
    """Else the tests above would not see them."""
    shapes = [found["fsdp"]["local_shapes"] for found in ranks]
    assert [s["parts.a.uneven"] for s in shapes] == [(2, 3), (2, 3), (2, 3), (0, 3)]
    assert [s["parts.b.single"] for s in shapes] == [(1, 5), (0, 5), (0, 5), (0, 5)]
    assert [s["parts.b.scalar"] for s in shapes] == [(), (0,), (0,), (0,)]


def test_one_small_reduction(ranks: list[dict[str, Any]]) -> None:
    sent = {"copies": [], "two_axes": [2, 2]}
    for layout in LAYOUTS:
        assert [found[layout]["reductions"] for found in ranks] == [sent.get(layout, [2])] * RANKS, layout


@pytest.mark.parametrize("one_unit", [False, True])
def test_gradients_through_fsdp2(one_unit: bool, ranks: list[dict[str, Any]]) -> None:
    net = Net()
    selection = ParameterSelection.of(net, r"layers\.(?P<group>\d)")
    trained = selection.gradient_of(net(INPUTS).square().mean(), net)
    measured = selection.gradient_of(net(INPUTS).sin().mean(), net)
    assert all(p.grad is None for p in net.parameters())
    expected = {
        "trained": trained.dots(trained),
        "measured": measured.dots(measured),
        "both": trained.dots(measured),
        "along": cosines(measured, selection.weights(net)),
    }
    assert (expected["measured"] > 1e-4).all()
    for found in ranks:
        for name, value in expected.items():
            torch.testing.assert_close(found[f"net_{one_unit}"][name], value, rtol=1e-6, atol=1e-9, msg=name)


# A mesh of one rank cuts nothing, so that the selection has no shards, and FSDP2 is there all the same.
ONE = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from test_sharded import INPUTS, Net
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection

net = Net()
selection = ParameterSelection.of(net, "layers")
expected = selection.gradient_of(net(INPUTS).square().mean(), net)  # the weights' places are known from here on
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
fully_shard(net)
assert ParameterSelection.of(net, "layers").shards is None
for _ in range(2):
    found = selection.gradient_of(net(INPUTS).square().mean(), net)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-6, atol=1e-9)
    assert all(parameter.grad is None for parameter in net.parameters())
dist.destroy_process_group()
"""


def test_gradients_through_fsdp2_on_one_rank(tmp_path: Path) -> None:
    run_in_full(ONE, tmp_path)


def test_sums_to_come_are_taken(ranks: list[dict[str, Any]]) -> None:
    assert all(torch.equal(found["sums"], torch.full((3,), 10.0)) for found in ranks)


# ------------------------------------------------------------------------------------------ a run of Lightning

STEPS, RESUMED = 7, 4


class Sharded:  # a mixin, as the other ranks' imports must stay light
    """The usual way to share a model out: block by block, then the rest."""

    def configure_model(self: Any) -> None:
        if not hasattr(self.gpt, "reshard"):
            self.gpt.double()
            mesh = self.device_mesh["data_parallel"]
            for block in self.gpt.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.gpt, mesh=mesh)


def train(
    folder: Path, batch_size: int, share: bool, watched: bool = True, resume: bool = False, **settings: Any
) -> None:
    """Two micro-batches of `batch_size` stories a step on each rank, in float64."""
    from helpers import checkpoints, probes, quiet_trainer, tiny_gpt, tiny_stories

    callbacks = [*(probes(every=2) if watched else []), checkpoints(folder, every=RESUMED)]
    settings |= {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}
    settings |= {"num_sanity_val_steps": 1, "accumulate_grad_batches": 2}
    trainer = quiet_trainer(folder, callbacks, max_steps=STEPS, **settings)
    if resume:
        trainer.logger.resume(RESUMED)  # type: ignore[union-attr]
    module = tiny_gpt(seed=2 if resume else 1)
    if share:
        module.__class__ = type("SharedGPT", (Sharded, type(module)), {})
    checkpoint = folder / "checkpoints" / f"{RESUMED:06d}.ckpt" if resume else None
    trainer.fit(module, datamodule=tiny_stories(batch_size=batch_size, eval_examples=8), ckpt_path=checkpoint)
    last = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in module.named_parameters()}
    if trainer.is_global_zero:
        torch.save({name: p.detach() for name, p in last.items()}, folder / f"last_{resume}.pt")


# Lightning starts this file again for the second rank.
SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from lightning.pytorch.strategies import ModelParallelStrategy
from test_sharded import train

root = Path(sys.argv[1])

def two():
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    return {"batch_size": 2, "share": True, "strategy": strategy, "devices": 2}

train(root / "watched", **two())
train(root / "unwatched", watched=False, **two())
train(root / "watched", resume=True, **two())
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks that share the weights: watched and resumed, and unwatched."""
    folder = tmp_path_factory.mktemp("shared")
    run_in_full(SCRIPT, folder)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank with all of the weights, and twice the batch."""
    folder = tmp_path_factory.mktemp("alone")
    train(folder, 4, share=False, precision="64-true")
    return folder


def last(folder: Path, resumed: bool = False) -> dict[str, Tensor]:
    """Weights after the last step, whole."""
    found: dict[str, Tensor] = torch.load(folder / f"last_{resumed}.pt", weights_only=True)
    return found


def test_a_shared_run_is_one_with_the_double_batch(shared: Path, alone: Path) -> None:
    """After a resume, which has taken up its rows from the shards' own files."""
    for name, value in last(alone).items():
        torch.testing.assert_close(last(shared / "watched")[name], value, rtol=0, atol=1e-10)
    there, here = (Trajectory.load(f / "trajectory.safetensors") for f in (shared / "watched", alone))
    assert here.steps == there.steps == [0, 2, 4, 6, 7]
    assert (here.fingerprint, here.dims) == (there.fingerprint, there.dims)
    assert here.survival == pytest.approx(there.survival, rel=1e-12) and here.survival[-1] < 1
    torch.testing.assert_close(there.grams, here.grams, rtol=1e-6, atol=1e-9)


def test_shared_and_whole_runs_log_the_same_numbers(shared: Path, alone: Path) -> None:
    from helpers import metrics

    ours, theirs = metrics(shared / "watched"), metrics(alone)
    assert {step: row.keys() for step, row in ours.items()} == {step: row.keys() for step, row in theirs.items()}
    wanted = {"update", "gradient", "gradient_z", "bias_sum", "lm", "probe", "lm_vs_probe"}
    assert {f"alignment/{group}/{name}" for group in ("trunk", "blocks.1") for name in wanted} <= ours[STEPS].keys()
    dims = dims_of(Trajectory.load(alone / "trajectory.safetensors"))
    for step, row in theirs.items():
        for name, value in row.items():
            of_cosine = name.startswith("alignment") and not name.endswith(("bias", "bias_sum"))
            error = tolerance(name, value, dims) if of_cosine else 1e-6
            assert ours[step][name] == pytest.approx(value, rel=0 if of_cosine else 1e-5, abs=error), (step, name)


def test_probes_leave_no_trace_in_a_shared_run(shared: Path) -> None:
    assert last(shared / "watched").keys() == last(shared / "unwatched").keys()
    for name, value in last(shared / "unwatched").items():
        assert torch.equal(last(shared / "watched")[name], value), name
        assert torch.equal(last(shared / "watched", resumed=True)[name], value), name


def test_every_rank_keeps_its_own_snapshots(shared: Path, alone: Path) -> None:
    folder = shared / "watched" / "snapshots"
    assert sorted(entry.name for entry in folder.iterdir()) == ["shard_1_of_2", "shard_2_of_2"]
    for step in (0, 7):
        name = f"step_{step:09d}.safetensors"
        parts = [load_file(folder / f"shard_{rank}_of_2" / name) for rank in (1, 2)]
        for weight, whole in load_file(alone / "snapshots" / name).items():
            torch.testing.assert_close(torch.cat([part[weight] for part in parts]), whole, rtol=1e-5, atol=1e-8)
