r"""What a second GPU gives: the same training on one rank and on two under DDP, and where the difference lies.

    NCCL_NVLS_ENABLE=0 python -m benchmarks.ranks -c configs/paper/base.yaml -c configs/paper/seed42.yaml ... \
        -c configs/probes/standard.yaml --out ranks.json
    python -m benchmarks.ranks -c tests/tiny.yaml --sequences 4 --steps 4 --start 2 --out ranks.json     # on a CPU

What is no option of this script goes to `fit`. Arms:

* `one`, `two`: one rank, and two with as many sequences each (weak scaling), without probes;
* `one_probes`, `two_probes`: the same with the configured probes;
* `strong`: two ranks that share the sequences of `one`;
* `sum`, `sum_probes`, `sum_strong`: two ranks under the strategy `one_sum` instead of DDP;
* `asking`: `two` as Lightning has it, which before each batch waits for rank 0 to say whether training goes on;
* `views`, `whole`, `static`, `bf16`, `large_buckets`: `two` with options of DDP. `views`: gradients are views into what
  is sent; `whole`: so they are, and the compiled graph is not split where a bucket of gradients ends.

Beside them the bare all-reduce of the gradient's bytes, in one piece, in DDP's buckets and in bfloat16, and how unequal
the ranks' work is: a step lasts as long as that of the rank with the longer stories. Every result is written to `--out`
as soon as it is known; an arm that fails or takes too long is reported and left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
import yaml
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from benchmarks.overhead import STOPWATCH_FILE, Stopwatch
from mini_gpt_pl.callbacks import AgreedTermination
from mini_gpt_pl.training.one_sum import NAME as ONE_SUM

DDP = "lightning.pytorch.strategies.DDPStrategy"
BF16_HOOK = "torch.distributed.algorithms.ddp_comm_hooks.default_hooks.bf16_compress_hook"
# Settings of DDP by arm.
OPTIONS: dict[str, dict[str, Any]] = {
    "views": {"dict_kwargs": {"gradient_as_bucket_view": True}},
    "bf16": {"init_args": {"ddp_comm_hook": BF16_HOOK}, "dict_kwargs": {"gradient_as_bucket_view": True}},
    "large_buckets": {"dict_kwargs": {"gradient_as_bucket_view": True, "bucket_cap_mb": 100}},
    "static": {"dict_kwargs": {"gradient_as_bucket_view": True, "static_graph": True}},
    "whole": {"dict_kwargs": {"gradient_as_bucket_view": True}},
}
# Settings of the watch by arm.
WATCHES: dict[str, dict[str, Any]] = {"asking": {"asks": True}, "whole": {"split": False}}
ONE_RANK = ("one", "one_probes")
UNDER_ONE_SUM = ("sum", "sum_probes", "sum_strong")
ARMS = (*ONE_RANK, "two", "two_probes", "strong", *UNDER_ONE_SUM, "asking", *OPTIONS)
BUCKET = 25 << 20  # DDP's default, in bytes


class RankWatch(Stopwatch):
    """The stopwatch, and what each rank had to compute.

    Args:
        start: The clock starts at the end of this step.
        asks: Leave it to Lightning to ask whether training goes on.
        split: Let the compiler split its graph where DDP's buckets end.
    """

    def __init__(self, start: int = 50, asks: bool = False, split: bool = True) -> None:
        super().__init__(start)
        self.asks = asks
        self.split = split
        self._rows: list[int] = []
        self._positions = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        torch._dynamo.config.optimize_ddp = self.split
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if self.asks and isinstance(callback, AgreedTermination):
                callback.teardown(trainer, pl_module, "fit")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._rows.append(len(batch.rows))
        self._positions = batch.tokens.numel() * trainer.accumulate_grad_batches

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        weights = sum(parameter.numel() for parameter in pl_module.parameters() if parameter.requires_grad)
        found = {"rows": self._rows, "positions": self._positions, "weights": weights}
        file = Path(trainer.default_root_dir) / f"rank_{trainer.global_rank}.json"
        file.write_text(json.dumps(found))
        trainer.strategy.barrier()  # so that rank 0 does not end before all have written


def command(arm: str, arguments: Sequence[str], folder: Path, options: argparse.Namespace) -> list[str]:
    """Build the `fit` command of an arm."""
    ranks = 1 if arm in ONE_RANK else 2
    sequences = options.sequences // 2 if arm.endswith("strong") else options.sequences
    strategy: Any = "auto" if ranks == 1 else {"class_path": DDP, **OPTIONS.get(arm, {})}
    if arm in UNDER_ONE_SUM:
        strategy = ONE_SUM
    settings = {"data": {"batch_size": sequences}, "trainer": {"devices": ranks, "strategy": strategy}}
    (folder / "arm.yaml").write_text(yaml.safe_dump(settings))
    off = [] if arm.endswith("probes") else ["-c", "configs/probes/off.yaml"]
    settings_of_watch = {"start": options.start, **WATCHES.get(arm, {})}
    watch = ["--trainer.callbacks+=benchmarks.ranks.RankWatch"]
    watch += [f"--trainer.callbacks.init_args.{name}={value}" for name, value in settings_of_watch.items()]
    run = ["--run_dir", str(folder / "run"), "--trainer.max_steps", str(options.start + options.steps)]
    quiet = ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    shape = ["-c", str(folder / "arm.yaml")]
    return [sys.executable, "cli.py", "fit", *arguments, *off, *shape, *watch, *run, *quiet]


def run_apart(command: Sequence[str], seconds: float) -> None:
    """Run a command, and end it with all its processes when the time is over.

    Raises:
        RuntimeError: It fails, or takes too long; with the end of what it said.
    """
    path = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        try:
            failed = process.wait(seconds) != 0
            reason = f"exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            failed, reason = True, f"not done after {seconds:.0f} s"
        finally:
            _end_group(process.pid)
            process.wait()
        if failed:
            said.seek(0)
            raise RuntimeError(f"{reason}: {said.read()[-1500:]}")


def _end_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # all of its processes have ended
        os.killpg(group, signal.SIGKILL)


def measure_arm(arm: str, arguments: Sequence[str], options: argparse.Namespace) -> dict[str, float]:
    """Train one arm in processes of its own: milliseconds and positions a step, weights, and the ranks' imbalance.

    Raises:
        RuntimeError: The training fails, or takes too long.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_apart(command(arm, arguments, folder, options), options.timeout)
        stopwatch = json.loads((folder / "run" / STOPWATCH_FILE).read_text())
        ranks = [json.loads(file.read_text()) for file in sorted((folder / "run").glob("rank_*.json"))]
    rows = torch.tensor([rank["rows"] for rank in ranks], dtype=torch.float64)
    return {
        "ranks": len(ranks),
        "ms_per_step": stopwatch["ms_per_step"],
        "positions": sum(rank["positions"] for rank in ranks),
        "weights": ranks[0]["weights"],
        "longest_over_mean": float(rows.amax(0).mean() / rows.mean()),
    }


def reduce_alone(weights: int, file: Path, timeout: float) -> dict[str, float]:
    """Time the bare all-reduce of a gradient on two ranks, in processes of their own.

    Raises:
        RuntimeError: It fails, or takes too long.
    """
    run_apart([sys.executable, "-m", "benchmarks.ranks", "--reduce", str(weights), "--out", str(file)], timeout)
    found: dict[str, float] = json.loads(file.read_text())
    return found


def _reduce_ranks(weights: int, file: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_reduce, (weights, f"file://{folder}/store", file), nprocs=2)


def _reduce(rank: int, weights: int, store: str, file: Path) -> None:
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo", init_method=store, rank=rank, world_size=2)
    whole = torch.zeros(weights, device=device)
    pieces = {
        "whole": [whole],
        "buckets": list(whole.split(BUCKET // 4)),
        "bf16": [whole.bfloat16()],
        "two_counts": [torch.zeros(2, dtype=torch.int64, device=device)],
    }
    found = {f"{name}_ms": _time_reduction(parts, device) for name, parts in pieces.items()}
    if rank == 0:
        file.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _time_reduction(parts: Sequence[torch.Tensor], device: torch.device, rounds: int = 10) -> float:
    """Milliseconds of one round of all-reduces that are queued one behind the other."""
    times = []
    for _ in range(rounds + 3):
        dist.barrier()
        _wait(device)
        begun = time.perf_counter()
        for work in [dist.all_reduce(part, async_op=True) for part in parts]:
            work.wait()
        _wait(device)
        times.append(1e3 * (time.perf_counter() - begun))
    return median(times[3:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def report(arms: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Reduce what was measured to the numbers that matter.

    Args:
        arms: What each arm found, a mapping a repeat.

    Returns:
        Per arm milliseconds a step and tokens a second, and against the arm with one rank `times` (2 is perfect).
    """
    ms = {arm: median(found["ms_per_step"] for found in repeats) for arm, repeats in arms.items() if repeats}
    speeds = {arm: 1e3 * arms[arm][0]["positions"] / ms[arm] for arm in ms}
    base = {arm: "one_probes" if arm.endswith("probes") else "one" for arm in ms if arm not in ONE_RANK}
    times = {arm: speeds[arm] / speeds[one] for arm, one in base.items() if one in speeds}
    # What a step of two ranks takes longer, and the part of it that is waiting for longer stories: all of a step but
    # the optimizer's is proportional to the rows, so this is an upper bound.
    longer = {arm: ms[arm] - ms[one] for arm, one in base.items() if one in ms and not arm.endswith("strong")}
    unequal = {arm: ms[base[arm]] * (arms[arm][0]["longest_over_mean"] - 1) for arm in longer}
    return {
        "ms_per_step": ms,
        "repeats_ms": {arm: [found["ms_per_step"] for found in repeats] for arm, repeats in arms.items()},
        "tokens_per_second": speeds,
        "times": times,
        "longer_ms": longer,
        "of_it_unequal_stories_ms": unequal,
        "gradient_bytes": 4 * next((repeats[0]["weights"] for repeats in arms.values() if repeats), 0),
    }


def main() -> None:
    """Measure the arms in turn, print and write what is known after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="steps under the clock, in every arm")
    parser.add_argument("--start", type=int, default=100, help="step at which the clock starts")
    parser.add_argument("--sequences", type=int, default=128, help="sequences of a rank in a step")
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS, help="arms to measure, in order")
    parser.add_argument("--timeout", type=float, default=150.0, help="most seconds of an arm")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds after which no further arm is begun")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--reduce", type=int, help=argparse.SUPPRESS)  # one of our own processes
    options, rest = parser.parse_known_args()
    if options.reduce:
        _reduce_ranks(options.reduce, options.out)
        return
    measure_all(rest, options)


def measure_all(arguments: Sequence[str], options: argparse.Namespace) -> None:
    """Measure every arm that fits in the budget."""
    begun, longest = time.perf_counter(), 0.0
    arms: dict[str, list[dict[str, float]]] = {arm: [] for arm in options.arms}
    result: dict[str, Any] = {"left_out": {}, "device": _device(), "torch": torch.__version__}
    for arm in options.arms:
        arm_begun = time.perf_counter()
        if arm_begun - begun + longest > options.budget:
            result["left_out"][arm] = "the time was over"
        else:
            try:
                arms[arm].append(measure_arm(arm, arguments, options))
            except (RuntimeError, OSError) as error:
                result["left_out"][arm] = str(error)
            longest = max(longest, time.perf_counter() - arm_begun)
        if arms[arm] and "reduce_alone" not in result:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    weights = int(arms[arm][0]["weights"])
                    result["reduce_alone"] = reduce_alone(weights, Path(folder) / "reduce.json", options.timeout)
                except (RuntimeError, OSError) as error:
                    result["reduce_alone"] = str(error)
        result |= report(arms)
        if options.out:
            options.out.write_text(json.dumps(result, indent=2) + "\n")
        _say(arm, result)
    _close(result)


def _device() -> str:
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "cpu"


def _say(arm: str, result: Mapping[str, Any]) -> None:
    if arm in result["left_out"]:
        print(f"{arm:14s} left out: {result['left_out'][arm]}", flush=True)
        return
    speed, times = result["tokens_per_second"][arm], result["times"].get(arm)
    against = "" if times is None else f"{times:6.3f} times one rank"
    print(f"{arm:14s} {result['ms_per_step'][arm]:8.2f} ms/step {speed:12,.0f} tokens/s {against}", flush=True)


def _close(result: Mapping[str, Any]) -> None:
    print(f"gradient: {result['gradient_bytes'] / 1e6:.1f} MB; all-reduced alone: {result.get('reduce_alone')}")
    for arm, milliseconds in result["longer_ms"].items():
        unequal = result["of_it_unequal_stories_ms"][arm]
        print(f"{arm:14s} {milliseconds:6.2f} ms longer than one rank, at most {unequal:.2f} by unequal stories")


if __name__ == "__main__":
    main()
