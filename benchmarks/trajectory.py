"""What recording and reading a trajectory costs: principal components from snapshots on disk, and a snapshot's price.

    python -m benchmarks.trajectory --folder /scratch --out trajectory.json
    python -m benchmarks.trajectory --folder /scratch --svd --threads 2 --out trajectory.json

Snapshots of a random path are made in a new folder inside `--folder` and deleted afterwards; with the default sizes
they take 5.1 GB of disk, of host memory, and of the device's. Then, beside one another:

* reading every byte of them once, and the principal components of every block and of the whole from them, in a process
  of its own each, from the disk (the files' pages are dropped first, as `posix_fadvise` does) and from the page cache;
* the same components from the trajectory's own file; with `--svd`, NumPy's singular value decomposition of one block;
* the Gram row of the last snapshot on the device, beside the time in which the device copies as many bytes as it reads;
* what the last snapshot makes the training thread wait for, by part, for each place where rows may be kept, and what a
  write on that thread would take; and the longest time for which a busy thread stood still while the side thread wrote.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, get_args

import numpy as np
import torch

from mini_gpt_pl.geometry.path import pca, rows
from mini_gpt_pl.geometry.path.rebuild import rebuild
from mini_gpt_pl.geometry.path.snapshots import SnapshotFolder
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector

_READ = 1 << 22


def selection_of(blocks: int, width: int) -> ParameterSelection:
    """Name the matrices of a transformer's blocks: attention's and a feed-forward part four times as wide."""
    shapes = {"attn.qkv": (3 * width, width), "attn.out": (width, width), "up": (4 * width, width)}
    shapes["down"] = (width, 4 * width)
    named = [(f"blocks.{k}.{name}", shape, f"blocks.{k}") for k in range(blocks) for name, shape in shapes.items()]
    names, sizes, owners = zip(*named, strict=True)
    return ParameterSelection(names, sizes, owners)


def row_of(selection: ParameterSelection, k: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Vector:
    """theta_0, or an increment of a path with a drift: a common direction and chance."""
    values = torch.randn(selection.dim, generator=torch.Generator(device).manual_seed(k), device=device)
    if k:
        drift = torch.randn(selection.dim, generator=torch.Generator(device).manual_seed(10**6), device=device)
        values = 1e-2 * (values + 0.3 * drift)
    return Vector(values.to(dtype if k else torch.float32), selection)


def make(folder: SnapshotFolder, snapshots: int, dtype: torch.dtype) -> None:
    """Write the snapshots and let the disk have them."""
    for k in range(snapshots):
        folder.write(k, row_of(folder.selection, k, torch.device("cpu"), dtype), survival=0.999**k)
        folder.flush()
        with folder.file(k).open("rb") as file:
            os.fsync(file.fileno())


def drop_pages(folder: Path) -> None:
    """Take the files out of the page cache, where the system can."""
    if not hasattr(os, "posix_fadvise"):
        print("this system cannot drop a file's pages: read from the cache")
        return
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ------------------------------------------------------------------------------------------------ whole files


def read_all(folder: Path) -> None:
    """Read every byte once, in order, on one thread."""
    target = bytearray(_READ)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(target):
                pass


def components(trajectory: Trajectory) -> list[float]:
    """PC1 of every block and of the whole."""
    path = pca.drifts(len(trajectory))[1:]
    return [pca.pca(trajectory.gram(group), path).pc1 for group in (*trajectory.groups, None)]


def alone(job: str, folder: Path, threads: int, *, cold: bool) -> dict[str, float]:
    """Do a job in a process of its own: its seconds, its peak of resident memory, and that before it began."""
    command = [sys.executable, "-m", "benchmarks.trajectory", "--job", job, "--folder", str(folder)]
    told = subprocess.run([*command, "--threads", str(threads), *(["--cold"] if cold else [])], check=True, stdout=-1)
    found: dict[str, float] = json.loads(told.stdout.splitlines()[-1])
    return found


def child(job: str, folder: Path, *, cold: bool) -> None:
    """Do one job and print what it took."""
    if cold:
        drop_pages(folder)
    before, begun, spent = _peak(), time.perf_counter(), time.process_time()
    if job == "read":
        read_all(folder)
    else:
        components(rebuild(folder))
    found = {"seconds": time.perf_counter() - begun, "core_seconds": time.process_time() - spent}
    print(json.dumps(found | {"peak_gb": _peak(), "before_gb": before}))


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def from_disk(folder: Path, threads: int, repeats: int) -> dict[str, Any]:
    """Reading once beside the components from the same files, alternating."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    found: dict[str, Any] = {"bytes": size, "threads": threads}
    for cold in (True, False):
        taken = {job: [alone(job, folder, threads, cold=cold) for _ in range(repeats)] for job in ("read", "pca")}
        seconds = {job: median(one["seconds"] for one in of_job) for job, of_job in taken.items()}
        found["from the disk" if cold else "from the page cache"] = {
            "read_s": seconds["read"],
            "pca_s": seconds["pca"],
            "ratio": seconds["pca"] / seconds["read"],
            "pca_core_s": min(one["core_seconds"] for one in taken["pca"]),
            "pca_peak_gb": max(one["peak_gb"] for one in taken["pca"]),
            "before_gb": max(one["before_gb"] for one in taken["pca"]),
        }
    return found


def svd_of_one_block(folder: SnapshotFolder, steps: Sequence[int]) -> dict[str, float]:
    """NumPy's decomposition of the first block's drifts, as (snapshots x values) in float32."""
    block = folder.selection.slices[0]
    drifts = np.cumsum([folder.stored(step)[block].float().numpy() for step in steps[1:]], axis=0)
    begun = time.perf_counter()
    np.linalg.svd(drifts, full_matrices=False)
    return {"seconds": time.perf_counter() - begun, "values": drifts.size}


# ---------------------------------------------------------------------------------------------- one snapshot


def clock(job: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median of seconds until the device has done a job, the first time left out."""
    job()
    taken = []
    for _ in range(repeats):
        begun = _now(device)
        job()
        taken.append(_now(device) - begun)
    return median(taken)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def gram_row(selection: ParameterSelection, snapshots: int, device: torch.device, repeats: int) -> dict[str, Any]:
    """The Gram row of one more snapshot, and both directions out of the rows, beside the device's own copying."""
    basis = rows.IncrementRows(selection)
    for k in range(snapshots):
        basis.push(row_of(selection, k, device))
    new = row_of(selection, snapshots, device)
    size = 4 * selection.dim * (snapshots + 1)
    block = torch.empty(min(size, 1 << 30) // 8, device=device)  # two of them are as large as what is copied
    other = torch.empty_like(block)
    bandwidth = 2 * block.nbytes / clock(lambda: other.copy_(block), device, repeats)
    one = torch.ones(len(selection.groups), snapshots, dtype=torch.float64)
    spans = [(span.start, span.stop) for span in selection.slices]
    tensors = [*(row[:] for row in basis.rows), new.values]
    found = {
        "snapshots": snapshots,
        "dim": selection.dim,
        "bytes": size,
        "copy_gb_per_s": bandwidth / 1e9,
        "floor_ms": 1e3 * size / bandwidth,
        "row_ms": 1e3 * clock(lambda: basis.dots(new), device, repeats),
        "plain_row_ms": 1e3 * clock(lambda: rows.inner_products(tensors, new.values, spans), device, repeats),
        "two_directions_ms": 1e3 * clock(lambda: basis.combine_all([one, one]), device, repeats),
        "kernel": rows.kernels is not None and device.type == "cuda",
    }
    exact = torch.stack([(row.double() * new.values.double()).sum() for row in tensors])
    lengths = torch.stack([row.double().norm() for row in tensors])
    error = (basis.dots(new).sum(0) - exact).abs() / (lengths * lengths[-1])
    return found | {"error": float(error.max())}


def waiting(
    place: rows.Place, selection: ParameterSelection, files: SnapshotFolder, snapshots: int, device: torch.device
) -> dict[str, float]:
    """Seconds of the training thread at the last of some snapshots, by part."""
    host = torch.device("cpu") if place == "cpu" else None
    basis, trajectory = rows.IncrementRows(selection, torch.float32, host), Trajectory.empty(selection)
    for k in range(snapshots):
        row = files.read(k)
        if place != "cpu":
            row = row.to(device)
        basis.push(row, files.stored(k) if place == "disk" else None)
        trajectory.append(k, torch.ones(len(selection.groups), k + 1))
    assert basis._rebuilt is not None
    weights = Vector(basis._rebuilt.to(device) + row_of(selection, snapshots, device).values, selection)
    times = [_now(device)]

    def lap() -> None:
        times.append(_now(device))

    new = basis.increment(weights)
    lap()
    products = basis.dots(new).cpu()
    lap()
    trajectory.append(snapshots, products)
    files.write(snapshots, new)
    files.write_trajectory(files.root / "trajectory.safetensors", trajectory)
    times.append(time.perf_counter())  # what is still going on is no wait
    stood = longest_stop(files.flush)
    basis.push(new, files.stored(snapshots) if place == "disk" else None)
    begun = _now(device)
    files._write(snapshots, new)
    direct = _now(device) - begun
    begun = _now(device)
    basis.combine_all([torch.ones(len(selection.groups), snapshots + 1)] * 2)
    directions = _now(device) - begun
    files.file(snapshots).unlink()
    spent = dict(zip(("increment_ms", "row_ms", "handing_over_ms"), np.diff(times) * 1e3, strict=True))
    return {name: float(value) for name, value in spent.items()} | {
        "directions_ms": 1e3 * directions,
        "direct_write_ms": 1e3 * direct,
        "longest_stop_ms": 1e3 * stood,
    }


def longest_stop(job: Callable[[], object]) -> float:
    """Longest time for which a busy Python thread did not get on while a job ran in another."""
    thread, longest = threading.Thread(target=job), 0.0
    thread.start()
    last = time.perf_counter()
    while thread.is_alive():
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest


# ------------------------------------------------------------------------------------------------------ main


def main() -> None:
    """Make snapshots, measure, print, and delete them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the snapshots are made for the time being")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--width", type=int, default=512, help="12 width^2 weights a block")
    parser.add_argument("--snapshots", type=int, default=51)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the files' increments")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="processor cores to use")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only_training", action="store_true", help="leave out what reads a finished run's files")
    parser.add_argument("--svd", action="store_true", help="NumPy's decomposition of one block too")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--job", choices=("read", "pca"), help=argparse.SUPPRESS)
    parser.add_argument("--cold", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.job:
        child(options.job, options.folder, cold=options.cold)
        return
    selection = selection_of(options.blocks, options.width)
    needed, free = 4 * selection.dim * (options.snapshots + 1), shutil.disk_usage(options.folder).free
    if needed > 0.9 * free:
        parser.error(f"{needed / 1e9:.1f} GB of snapshots do not fit on {options.folder}: choose another --folder")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(options, selection, SnapshotFolder(Path(folder), selection))


def measure(options: argparse.Namespace, selection: ParameterSelection, files: SnapshotFolder) -> dict[str, Any]:
    """Collect, print and write every part's result as soon as it is known."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "snapshots": options.snapshots,
        "dim": selection.dim,
        "dtype": options.dtype,
    }

    def tell(name: str, found: Any) -> None:
        result[name] = found
        print(f"{name}: {json.dumps(found, default=float)}", flush=True)
        if options.out:
            options.out.write_text(json.dumps(result, indent=2) + "\n")

    make(files, options.snapshots, getattr(torch, options.dtype))
    if not options.only_training:
        tell("from_files", from_disk(files.path, options.threads, options.repeats))
        rebuild(files.path).save(files.root / "trajectory.safetensors")
        load = lambda: components(Trajectory.load(files.root / "trajectory.safetensors"))  # noqa: E731
        tell("from_gram_file_ms", 1e3 * clock(load, torch.device("cpu"), options.repeats))
        if options.svd:
            tell("svd_of_one_block", svd_of_one_block(files, range(options.snapshots)))
    tell("gram_row", gram_row(selection, options.snapshots - 1, device, options.repeats))
    for place in get_args(rows.Place):
        takes = rows.memory_of(place, options.snapshots, selection.dim)._asdict()
        tell(place, waiting(place, selection, files, options.snapshots - 1, device) | {"bytes": takes})
    return result


if __name__ == "__main__":
    main()
