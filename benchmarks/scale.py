r"""Scale: what the trajectory of a 7B model with sharded weights takes, from costs measured here and checked here.

    python -m benchmarks.scale --folder /somewhere/with/20/GB --out scale.json
    python -m benchmarks.scale --sizes 64 96 --layers 2 --megabytes 64 --out scale.json       # seconds, on a CPU
    python -m benchmarks.scale --show scale.json [--into page.md]                             # its table again

Three parts:

* what this machine gives: bandwidth of its memory, of copies to the host and of its disk, and the latency of a small
  all-reduce between two processes;
* the real code (rows, sketches, directions, files) on synthetic paths of a few sizes. The smallest gives the cost per
  value of each operation; the others are predicted from it, and the ratios of prediction to measurement are printed.
  Two gloo ranks that share a model by FSDP2 check bytes and numbers of reductions;
* the layout of the target: a model of the target's shape on the meta device, shared by FSDP2 over as many ranks as are
  asked for, none of which exists. Its bytes are exact, its seconds are predicted: those of this machine's device.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mini_gpt_pl.geometry.path.rows import IncrementRows
from mini_gpt_pl.geometry.path.sketch import SketchedRows, cosine_error
from mini_gpt_pl.geometry.path.snapshots import SnapshotFolder
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector
from mini_gpt_pl.stories.gpt import GPT, TRUNK_PATTERN, GPTSize

VOCABULARY, CONTEXT = 50304, 2048
_BYTES = 4  # of a value in float32
_BEGIN, _END = "<!-- scale -->", "<!-- /scale -->"  # where a page has the table


# --------------------------------------------------------------------------------------------------- this machine


def seconds_of(action: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    """Median time of an action whose device work is waited for, after a first one that does not count."""
    times = []
    for _ in range(rounds + 1):
        _wait(device)
        begun = time.perf_counter()
        action()
        _wait(device)
        times.append(time.perf_counter() - begun)
    return median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_machine(device: torch.device, folder: Path, megabytes: int) -> dict[str, float]:
    """Bytes a second of memory (read and written), of copies to pinned host memory and of the disk."""
    values = torch.zeros(megabytes << 18, device=device)
    target = torch.empty_like(values)
    found = {"memory": 2 * values.nbytes / seconds_of(lambda: target.copy_(values), device)}
    host = torch.empty(len(values), pin_memory=device.type == "cuda")
    found["to_host"] = values.nbytes / seconds_of(lambda: host.copy_(values, non_blocking=True), device)
    found["disk"] = values.nbytes / seconds_of(lambda: _write(folder / "written", host), torch.device("cpu"), rounds=2)
    (folder / "written").unlink()
    return found


def _write(path: Path, values: torch.Tensor) -> None:
    """Write values and wait until they are on the disk."""
    with path.open("wb") as file:
        file.write(memoryview(values.numpy()))  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())


# -------------------------------------------------------------------------------------------------- the real code


@dataclass(frozen=True)
class Costs:
    """Seconds of the operations of a snapshot, per value of this rank's weights.

    Args:
        increment: Taking the increment and adding it to the weights rebuilt from the rows.
        product: One inner product of a row: a snapshot takes as many as there are snapshots so far, and one.
        sketch: Sketching the weights.
        directions: Taking the new drift into the kept directions.
        file: Handing a row to the host and writing its file (to the page cache).
    """

    increment: float
    product: float
    sketch: float
    directions: float
    file: float


def simulate(width: int, layers: int, rows: int, sketch: int, device: torch.device, folder: Path) -> dict[str, float]:
    """Run the real code on a path of random steps: seconds a snapshot.

    Args:
        width: Of the model; its trunk has 12 width^2 values a layer.
        layers: Groups.
        rows: Snapshots before those that are measured.
        sketch: Values of a sketch, for each group.
        device: Where the weights are.
        folder: For a snapshot file.

    Returns:
        values; seconds by the names of `Costs`; and `snapshot` and `sketched`, those of a whole snapshot of each kind.
    """
    selection = _trunk(width, layers)
    generator = torch.Generator(device).manual_seed(0)
    weights = Vector(torch.randn(selection.dim, generator=generator, device=device), selection)

    def stepped() -> Vector:
        weights.values.add_(torch.randn(selection.dim, generator=generator, device=device), alpha=1e-3)
        return weights

    exact, sketched = IncrementRows(selection), SketchedRows(selection, sketch)
    for _ in range(rows):
        exact.push(exact.increment(stepped()))
        sketched.push(sketched.increment(weights))
    new = exact.increment(stepped())
    found = {"values": float(selection.dim)}
    found["product"] = seconds_of(lambda: exact.dots(new), device) / (rows + 1)
    found["increment"] = seconds_of(lambda: _turn_over(exact, weights), device)
    found["sketch"] = seconds_of(lambda: sketched.sketch(weights), device)
    grams = sketched.grams
    found["directions"] = seconds_of(lambda: sketched.leading.grow(grams, weights), device)
    found["file"] = seconds_of(lambda: _write_row(SnapshotFolder(folder, selection), new), device, rounds=2)
    found["snapshot"] = seconds_of(lambda: _record(exact, weights), device, rounds=1)
    found["sketched"] = seconds_of(lambda: _record(sketched, weights), device, rounds=1)
    return found


def _trunk(width: int, layers: int) -> ParameterSelection:
    """The trunk of a GPT of some width, without the GPT."""
    with torch.device("meta"):
        gpt = GPT(GPTSize(layers, 1, width, 4 * width, 8), 8)
    return ParameterSelection.of(gpt, TRUNK_PATTERN)


def _turn_over(rows: IncrementRows, weights: Vector) -> None:
    """Add a row and take it out again."""
    kept = rows._rebuilt
    rows.push(rows.increment(weights))
    rows.rows.pop()
    rows._rebuilt = kept


def _record(rows: IncrementRows | SketchedRows, weights: Vector) -> None:
    new = rows.increment(weights)
    rows.dots(new).cpu()
    rows.push(new)


def _write_row(files: SnapshotFolder, row: Vector) -> None:
    files.write(0, row)
    files.close()


def calibrate(found: Mapping[str, float]) -> Costs:
    """Take the costs per value from one simulation."""
    return Costs(**{name: found[name] / found["values"] for name in Costs.__dataclass_fields__})


def predict(costs: Costs, values: float, rows: int) -> dict[str, float]:
    """Seconds of a snapshot, its parts, and the whole of each kind.

    Args:
        costs: Per value.
        values: Of this rank.
        rows: Snapshots before it.
    """
    parts = {name: cost * values for name, cost in asdict(costs).items()}
    whole = parts["increment"] + (rows + 1) * parts["product"]
    return parts | {"snapshot": whole, "sketched": parts["sketch"] + parts["directions"]}


def compare(simulations: Sequence[Mapping[str, float]], rows: Sequence[int]) -> list[dict[str, float]]:
    """Predict every simulation from the first: ratios of prediction to measurement, by name."""
    costs = calibrate(simulations[0])
    return [
        {name: seconds / found[name] for name, seconds in predict(costs, found["values"], count).items()}
        for found, count in zip(simulations, rows, strict=True)
    ]


# ----------------------------------------------------------------------------------------------- two real ranks


def _shared(rank: int, store: str, width: int, layers: int, sketch: int, file: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    found = _measure_shared(width, layers, sketch)
    if rank == 0:
        file.write_text(json.dumps(found))
    gc.collect()  # what was shared refers to the group, whose threads must have ended when the interpreter does
    dist.destroy_process_group()


def _measure_shared(width: int, layers: int, sketch: int) -> dict[str, float]:
    selection, weights = _shared_weights(2, width, layers, "cpu")
    assert weights is not None
    sent: list[int] = []
    reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, **settings: Any) -> Any:
        sent.append(tensor.numel())
        return reduce(tensor, **settings)

    dist.all_reduce = counted  # type: ignore[assignment]
    rows, sketched = IncrementRows(selection), SketchedRows(selection, sketch)
    for _ in range(3):
        _record(rows, weights)
        _record(sketched, weights)
    dist.all_reduce = reduce
    small = torch.zeros(layers * 52, dtype=torch.float64)
    latency = seconds_of(lambda: reduce(small), torch.device("cpu"), rounds=50)
    return {
        "row_bytes": rows.increment(weights).values.nbytes,
        "whole_bytes": _BYTES * selection.dim,
        "sketched_bytes": sketched.bytes(3) - sketched.sketch.table_bytes,
        "predicted_sketched_bytes": sketch_bytes(selection.local_dim, layers, sketch, 3)["memory"],
        "values_sent": sum(sent),
        "all_reduce": latency,
    }


def share_between_two(width: int, layers: int, sketch: int) -> dict[str, float]:
    """Record a model that two gloo ranks share by FSDP2: bytes, values sent, seconds of a small all-reduce."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        arguments = (f"file://{folder}/store", width, layers, sketch, file)
        torch.multiprocessing.spawn(_shared, arguments, nprocs=2)
        found: dict[str, float] = json.loads(file.read_text())
        return found


def _shared_weights(
    ranks: int, width: int, layers: int, device: str, vocabulary: int = 8, context: int = 8
) -> tuple[ParameterSelection, Vector | None]:
    """Share a model out, block by block; on the meta device nothing is held."""
    with torch.device(device):
        gpt = GPT(GPTSize(layers, max(1, width // 128), width, 4 * width, context), vocabulary)
    mesh = init_device_mesh("cpu", (ranks,))
    units: list[nn.Module] = [*gpt.blocks, gpt]
    for unit in units:
        fully_shard(unit, mesh=mesh)
    selection = ParameterSelection.of(gpt, TRUNK_PATTERN)
    return selection, None if device == "meta" else selection.weights(gpt)


# --------------------------------------------------------------------------------------------------- the target


def layout(ranks: int, width: int, layers: int) -> dict[str, int]:
    """Shares of a model of the target's shape on ranks that do not exist: values in all, of a rank, and groups."""
    # torch's own process group for such dry runs.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        selection, _ = _shared_weights(ranks, width, layers, "meta", VOCABULARY, CONTEXT)
        return {"values": selection.dim, "local": selection.local_dim, "groups": len(selection.groups)}
    finally:
        dist.destroy_process_group()


def exact_bytes(local: int, groups: int, snapshots: int) -> dict[str, float]:
    """Bytes of a rank that keeps every row: in memory (theta_0, increments, rebuilt weights), on disk, in the Gram."""
    return {
        "memory": _BYTES * local * (snapshots + 1),
        "memory_bf16": local * (2 * _BYTES + 2 * (snapshots - 1)),
        "disk": _BYTES * local * snapshots,
        "gram": 8 * groups * snapshots**2,
    }


def sketch_bytes(local: int, groups: int, sketch: int, snapshots: int, directions: int = 2) -> dict[str, float]:
    """Bytes of a rank that keeps sketches, theta_0 and a few directions; signs (a bit a value) and rotations apart."""
    sketches = 8 * groups * sketch * snapshots
    kept = _BYTES * (1 + directions) * local
    return {"memory": sketches + kept, "signs": local / 8, "disk": sketches + kept, "gram": 8 * groups * snapshots**2}


def target(
    costs: Costs, machine: Mapping[str, float], place: Mapping[str, int], ranks: int, snapshots: int, sketch: int
) -> dict[str, Any]:
    """Bytes of a rank at the end, and seconds of the last snapshot, of both kinds.

    A row on the device costs its inner products there. Rows that are kept on the host or on the disk have to be read
    again, at the rate of the copy or of the disk: the least it can take. Ranks of one host share its disk, and these
    seconds are those of a rank that has one for itself.
    """
    local, groups = place["local"], place["groups"]
    seconds = predict(costs, local, snapshots - 1)
    row = _BYTES * local
    return {
        "ranks": ranks,
        "snapshots": snapshots,
        **place,
        "exact_bytes": exact_bytes(local, groups, snapshots),
        "sketch_bytes": sketch_bytes(local, groups, sketch, snapshots),
        "exact_seconds": {
            "device": seconds["snapshot"] + machine["all_reduce"],
            "to_host": row / machine["to_host"],
            "host": snapshots * row / machine["to_host"],
            "disk": snapshots * row / machine["disk"],
            "file": row / machine["disk"],
        },
        "sketch_seconds": {
            "sketch": seconds["sketch"],
            "directions": seconds["directions"],
            "all_reduce": 2 * machine["all_reduce"],
            "file": 8 * groups * sketch / machine["disk"],
        },
        "reduced_bytes": 8 * groups * snapshots,
        "cosine_error": cosine_error(0.0, sketch * ranks * groups),
        "cosine_error_of_a_group": cosine_error(0.0, sketch * ranks),
    }


# ------------------------------------------------------------------------------------------------------ the report


def main() -> None:
    """Measure, check and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", help="widths of the simulated models, the smallest first")
    parser.add_argument("--layers", type=int, default=8, help="layers of the simulated models")
    parser.add_argument("--rows", type=int, nargs="+", default=(8, 8, 16), help="snapshots before the measured one")
    parser.add_argument("--sketch", type=int, default=4096, help="values of a sketch, for each group and rank")
    parser.add_argument("--target", type=int, nargs=2, default=(4096, 32), help="width and layers of the target")
    parser.add_argument("--ranks", type=int, nargs="+", default=(8, 64))
    parser.add_argument("--snapshots", type=int, nargs="+", default=(51, 500))
    parser.add_argument(
        "--megabytes", type=int, default=1024, help="size of the blocks that bandwidths are measured on"
    )
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--show", type=Path, help="print the table of an earlier result, and measure nothing")
    parser.add_argument("--into", type=Path, help="page to put that table into")
    options = parser.parse_args()
    if options.show:
        show(options.show, options.into)
        return
    gpu = torch.cuda.is_available()
    options.sizes = options.sizes or ([512, 1024, 1024] if gpu else [256, 512, 512])
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = run(options, torch.device("cuda" if gpu else "cpu"), Path(folder))
    result |= {"device": torch.cuda.get_device_name() if gpu else "cpu", "torch": torch.__version__}
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


def run(options: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    """Measure the machine, the code and the target in turn."""
    shared = share_between_two(64, 2, 64)
    machine = measure_machine(device, folder, options.megabytes) | {"all_reduce": shared["all_reduce"]}
    say_machine(machine, shared)
    rows = (list(options.rows) * len(options.sizes))[: len(options.sizes)]
    simulations = [
        simulate(width, options.layers, count, options.sketch, device, folder)
        for width, count in zip(options.sizes, rows, strict=True)
    ]
    ratios = compare(simulations, rows)
    say_simulations(simulations, ratios, rows, machine)
    costs, (width, layers) = calibrate(simulations[-1]), options.target  # the largest is nearest to the target
    places = {ranks: layout(ranks, width, layers) for ranks in options.ranks}
    targets = [
        target(costs, machine, places[ranks], ranks, snapshots, options.sketch)
        for ranks in options.ranks
        for snapshots in options.snapshots
    ]
    print(table(targets))
    return {
        "machine": machine,
        "two_ranks": shared,
        "simulations": [dict(found) | {"rows": count} for found, count in zip(simulations, rows, strict=True)],
        "predicted_over_measured": ratios,
        "seconds_per_value": asdict(costs),
        "sketch": options.sketch,
        "targets": targets,
    }


def say_machine(machine: Mapping[str, float], shared: Mapping[str, float]) -> None:
    """Print what the machine gives, and what two ranks did."""
    rates = ", ".join(f"{name} {machine[name] / 1e9:.2f} GB/s" for name in ("memory", "to_host", "disk"))
    print(f"{rates}; all-reduce of a Gram row between two gloo ranks {1e6 * machine['all_reduce']:.0f} us")
    share, kept = shared["row_bytes"] / shared["whole_bytes"], shared["sketched_bytes"]
    print(
        f"two ranks: {share:.3f} of a row each; sketches {kept / shared['predicted_sketched_bytes']:.3f} of the model"
    )


def say_simulations(
    simulations: Sequence[Mapping[str, float]],
    ratios: Sequence[Mapping[str, float]],
    rows: Sequence[int],
    machine: Mapping[str, float],
) -> None:
    """Print what was measured, and how far the prediction from the first is off."""
    for found, ratio, count in zip(simulations, ratios, rows, strict=True):
        size = found["values"]
        rate = _BYTES * size / found["sketch"] / machine["memory"]
        told = "  ".join(f"{name} {1e3 * found[name]:.2f} ms ({ratio[name]:.2f})" for name in ratio)
        print(f"{size / 1e6:.1f} M values, {count} rows: {told}; a sketch reads at {rate:.1%} of the memory's rate")


def table(targets: Sequence[Mapping[str, Any]]) -> str:
    """Lay the target out as a Markdown table: bytes of a rank and seconds of its last snapshot."""
    head = [
        "| ranks | snapshots | rows on the device | of a rank's disk | sketches and directions | of a rank's disk "
        "| row on the device | its file | sketch and directions | error of a cosine |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines = []
    for found in targets:
        exact, sketch = found["exact_bytes"], found["sketch_bytes"]
        row, sketched = found["exact_seconds"], found["sketch_seconds"]
        cells = [
            str(found["ranks"]),
            str(found["snapshots"]),
            _size(exact["memory"]),
            _size(exact["disk"]),
            _size(sketch["memory"] + sketch["signs"]),
            _size(sketch["disk"]),
            _time(row["device"]),
            _time(row["file"]),
            _time(sum(sketched.values())),
            f"{found['cosine_error_of_a_group']:.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*head, *lines])


def show(result: Path, page: Path | None) -> None:
    """Print the table of a result or put it into a page, between its two comments."""
    lines = table(json.loads(result.read_text())["targets"])
    if page is None:
        print(lines)
        return
    before, _, rest = page.read_text().partition(_BEGIN)
    _, _, after = rest.partition(_END)
    page.write_text(f"{before}{_BEGIN}\n{lines}\n{_END}{after}")


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1e3 * seconds:.1f} ms"


if __name__ == "__main__":
    main()
