"""What the probes cost: the same training with and without them, alternating, as a ratio within one run.

    python -m benchmarks.overhead --config configs/quickstart.yaml --steps 100
    python -m benchmarks.overhead -c configs/paper/base.yaml -c configs/paper/seed42.yaml ... --steps 1000

Everything that is no option of this script goes to `fit`. Validation, start-up and the first steps (compilation, first
snapshot) are left out of the clock; snapshots, live metrics and extra gradients are in it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

STOPWATCH_FILE = "stopwatch.json"


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
        found = {"steps": steps, "seconds": seconds, "ms_per_step": 1e3 * seconds / steps}
        if trainer.is_global_zero:
            (Path(trainer.default_root_dir) / STOPWATCH_FILE).write_text(json.dumps(found))


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(arguments: list[str], steps: int, *, probes: bool, start: int = 50) -> float:
    """Run one training in a process of its own and return its milliseconds per step."""
    with tempfile.TemporaryDirectory() as folder:
        watch = ["--trainer.callbacks+=benchmarks.overhead.Stopwatch", f"--trainer.callbacks.init_args.start={start}"]
        run = ["--run_dir", folder, "--overwrite", "true", "--trainer.max_steps", str(steps)]
        off = [] if probes else ["--config", "configs/probes/off.yaml"]
        command = [sys.executable, "cli.py", "fit", *arguments, *off, *watch, *run, "--trainer.logger", "false"]
        subprocess.run([*command, "--trainer.enable_progress_bar", "false"], check=True, stdout=subprocess.DEVNULL)
        found = json.loads((Path(folder) / STOPWATCH_FILE).read_text())
        return float(found["ms_per_step"])


def main() -> None:
    """Print milliseconds per step with and without probes, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--start", type=int, default=50, help="step at which the clock starts")
    options, rest = parser.parse_known_args()
    without, with_probes = [], []
    for _ in range(options.repeats):  # alternating, so that a slow spell of the machine hits both
        without.append(measure(rest, options.steps, probes=False, start=options.start))
        with_probes.append(measure(rest, options.steps, probes=True, start=options.start))
    print(f"without probes: {median(without):8.2f} ms/step  {[round(x, 2) for x in without]}")
    print(f"with probes:    {median(with_probes):8.2f} ms/step  {[round(x, 2) for x in with_probes]}")
    print(f"ratio:          {median(with_probes) / median(without):8.4f}")


if __name__ == "__main__":
    main()
