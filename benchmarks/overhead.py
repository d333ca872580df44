"""What the probes cost: the same training without them and with each preset, alternating, as ratios within one run.

    python -m benchmarks.overhead -c configs/quickstart.yaml --steps 100
    python -m benchmarks.overhead -c configs/paper/base.yaml -c configs/paper/seed42.yaml ... --steps 1000 --out x.json

Everything that is no option of this script goes to `fit`. Presets are files of callbacks, by name; their budget is
lifted, so that nothing is thinned. With `--pairs` each run with probes has one without beside it, at the same time, for
machines whose speed changes from minute to minute: each has half of the cores to itself, and the other half in the next
repeat. Give them as many threads (`OMP_NUM_THREADS=1` for two cores), and an even number of repeats.

Validation, start-up and the first steps (compilation, first snapshot) are left out of the clock; snapshots, live
metrics and extra gradients are in it. Beside the ratios of whole runs stands each probe's share by its own clock,
`overhead/<probe>` of the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pandas as pd
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from benchmarks.clock import described, here

STOPWATCH_FILE = "stopwatch.json"
PRESETS = ("standard=configs/probes/standard.yaml", "every_step=configs/probes/every_step.yaml")
_OFF = "configs/probes/off.yaml"


class Stopwatch(Callback):
    """Time training between two optimizer steps, validation excluded.

    Args:
        start: The clock starts at the end of this step.
    """

    def __init__(self, start: int = 50) -> None:
        super().__init__()
        self.start = start
        self._begun: tuple[int, float] | None = None
        self._paused = 0.0
        self._pause = 0.0

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._begun is None and trainer.global_step >= self.start:
            self._begun = (trainer.global_step, _now())
            self._paused = 0.0

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause = _now()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused += _now() - self._pause

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._begun is not None, "the run ended before the clock started"
        steps, seconds = trainer.global_step - self._begun[0], _now() - self._begun[1] - self._paused
        file = Path(trainer.default_root_dir) / STOPWATCH_FILE
        if trainer.is_global_zero:
            file.write_text(json.dumps({"steps": steps, "seconds": seconds, "ms_per_step": 1e3 * seconds / steps}))


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Timing(NamedTuple):
    """What a run took.

    Attributes:
        ms_per_step: Milliseconds.
        shares: Of each probe by its own clock, over the time without probes.
    """

    ms_per_step: float
    shares: dict[str, float]


def timed_run(arguments: list[str], steps: int, start: int) -> Timing:
    """Run one training in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        watch = ["--trainer.callbacks+=benchmarks.overhead.Stopwatch", f"--trainer.callbacks.init_args.start={start}"]
        run = ["--run_dir", folder, "--overwrite", "true", "--trainer.max_steps", str(steps)]
        command = [sys.executable, "cli.py", "fit", *arguments, *watch, *run, "--trainer.logger", "false"]
        subprocess.run([*command, "--trainer.enable_progress_bar", "false"], check=True, stdout=subprocess.DEVNULL)
        found = json.loads((Path(folder) / STOPWATCH_FILE).read_text())
        return Timing(float(found["ms_per_step"]), _shares(Path(folder) / "metrics.csv"))


def _shares(metrics: Path) -> dict[str, float]:
    columns = pd.read_csv(metrics).filter(like="overhead/").dropna(how="all") if metrics.is_file() else pd.DataFrame()
    last = {str(name): float(columns[name].dropna().iloc[-1]) for name in columns}
    return {name.removeprefix("overhead/"): share for name, share in last.items()}


def without_budget(preset: Path, start: int, folder: Path) -> Path:
    """Copy a preset whose probes keep no budget, and count their time from a step on."""
    config = yaml.safe_load(preset.read_text())
    for callback in config["trainer"]["callbacks"]:
        if callback["class_path"] == "mini_gpt_pl.callbacks.CostControl":
            callback["init_args"] = {"max_overhead": None, "warmup": start}
    copy = folder / preset.name
    copy.write_text(yaml.safe_dump(config))
    return copy


def arms(presets: Sequence[str], start: int, folder: Path) -> dict[str, str]:
    """Give the configuration of each arm: `none`, and presets given as NAME=FILE, their budgets lifted."""
    named = dict(preset.split("=", 1) for preset in presets)
    return {"none": _OFF, **{name: str(without_budget(Path(file), start, folder)) for name, file in named.items()}}


def main() -> None:
    """Print milliseconds per step without probes and with each preset, the ratios, and each probe's share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--start", type=int, default=50, help="step at which the clock starts")
    parser.add_argument("--presets", nargs="+", default=PRESETS, help="NAME=FILE")
    parser.add_argument("--pairs", action="store_true", help="run each preset at the same time as a run without probes")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options, rest = parser.parse_known_args()
    timings: dict[str, list[Timing]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = arms(options.presets, options.start, Path(folder))
        for turn in range(options.repeats):  # alternating, so that a slow spell of the machine hits all
            groups = (
                [("none", name) for name in files if name != "none"] if options.pairs else [(name,) for name in files]
            )
            for names in groups:
                runs = [[*rest, "-c", files[name]] for name in names]
                found = _at_once(runs, options.steps, options.start, turn)
                for name, timing in zip(names, found, strict=True):
                    timings.setdefault(name, []).append(timing)
                    print(f"{name}: {timing.ms_per_step:.2f} ms/step", flush=True)
    result = report(timings, paired=options.pairs) | {"steps": options.steps - options.start} | described(here())
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


def _at_once(runs: Sequence[list[str]], steps: int, start: int, turn: int = 0) -> list[Timing]:
    """Time runs beside one another, each on cores of its own, which change from turn to turn: no two are as fast."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []

    def timed(k: int) -> Timing:
        if own := cores[(k + turn) % len(runs) :: len(runs)]:
            os.sched_setaffinity(0, own)  # of this thread, and so of the process that it starts
        return timed_run(runs[k], steps, start)

    with ThreadPoolExecutor(len(runs)) as pool:
        return list(pool.map(timed, range(len(runs))))


def report(timings: dict[str, list[Timing]], *, paired: bool = False) -> dict[str, Any]:
    """Print and collect the result: medians over the repeats.

    Args:
        timings: The runs of each arm, in their order.
        paired: Whether the runs without probes are those beside each preset's, in turn: ratios are then of pairs.
    """
    taken = {name: median(run.ms_per_step for run in runs) for name, runs in timings.items()}
    presets = [name for name in taken if name != "none"]
    over = {name: taken[name] / taken["none"] - 1 for name in presets}
    pairs: dict[str, list[float]] = {}
    if paired:
        for k, name in enumerate(presets):
            beside = timings["none"][k :: len(presets)]
            pairs[name] = [a.ms_per_step / b.ms_per_step - 1 for a, b in zip(timings[name], beside, strict=True)]
            over[name] = median(pairs[name])
    shares = {
        name: {probe: median(run.shares[probe] for run in timings[name]) for probe in timings[name][0].shares}
        for name in over
    }
    for name, milliseconds in taken.items():
        print(f"{name:12s} {milliseconds:8.2f} ms/step  {[round(run.ms_per_step, 2) for run in timings[name]]}")
    for name, share in over.items():
        print(f"{name} over none: {share:+.2%} {[f'{pair:+.1%}' for pair in pairs.get(name, ())]}")
        for probe, own in shares[name].items():
            print(f"    {probe:24s} {own:8.3%}")
    repeats = {name: [run.ms_per_step for run in runs] for name, runs in timings.items()}
    return {"ms_per_step": taken, "repeats_ms": repeats, "over_none": over, "pairs": pairs, "shares": shares}


if __name__ == "__main__":
    main()
