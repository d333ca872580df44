"""Seconds of a whole evaluation inside of training, beside the bare forward passes that it consists of, in one run.

    python -m benchmarks.evaluation -c configs/paper/base.yaml -c configs/paper/seed42.yaml ... --out evaluation.json

What is no option of this script goes to `fit`: model, precision, compilation and evaluation sets are as configured.
Training evaluates at every step; after each evaluation the other arms take the same batches, and the median counts:

* `evaluation`: everything that training waits for: Lightning's loop over the three sets (its parts are stated), the
  means, their report to the loggers.
* `steps`: the module's evaluation steps in one loop, batches fetched from the host, the means read; no Lightning.
* `floor`: bare forward passes of the same positions, scored, packed as they are, in one loop, batches on the device.

Lightning's share is what `evaluation` takes over `steps`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from benchmarks.clock import described, milliseconds, now
from mini_gpt_pl.stories.data.batch import Batch
from mini_gpt_pl.stories.data.datamodule import EVALUATION_SETS
from mini_gpt_pl.stories.module import ProbedGPT

WHOLE, STEPS, FLOOR = "evaluation", "steps", "floor"
# Evaluations before the clock: compilation, pinned memory, caches.
_WARMUP = 2


class EvaluationClock(Callback):
    """Times every evaluation of a training run, its parts, and the bare arms after it.

    Attributes:
        times: Milliseconds of each arm and of each set, a value an evaluation.
        sizes: Batches, examples, positions, and positions that are computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.times: dict[str, list[float]] = {name: [] for name in (WHOLE, *EVALUATION_SETS, STEPS, FLOOR)}
        self.sizes: dict[str, int] = {}
        self._begun = 0.0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, ProbedGPT)
        loop: Any = trainer.fit_loop.epoch_loop.val_loop
        loop.run = partial(self._evaluate, loop.run, trainer, pl_module)

    def _evaluate(self, run: Callable[[], Any], trainer: Trainer, module: ProbedGPT) -> Any:
        begun = now(module.device)
        result = run()
        self.times[WHOLE].append(1e3 * (now(module.device) - begun))
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        fetched: list[list[Batch]] = [list(loader) for loader in data.val_dataloader()]
        self._count([batch for batches in fetched for batch in batches])
        at_hand = move_data_to_device(fetched, module.device)
        module.eval()
        with torch.inference_mode():
            self.times[STEPS].append(milliseconds(partial(self._steps, trainer, module, fetched), module.device))
            self.times[FLOOR].append(milliseconds(partial(self._passes, trainer, module, at_hand), module.device))
        module.train()
        return result

    def _steps(self, trainer: Trainer, module: ProbedGPT, sets: Sequence[Sequence[Batch]]) -> None:
        module.on_validation_epoch_start()
        for index, batches in enumerate(sets):
            for number, batch in enumerate(batches):
                moved = move_data_to_device(batch, module.device)
                with trainer.precision_plugin.val_step_context():
                    module.validation_step(moved, number, index)
        module.evaluation.compute()

    def _passes(self, trainer: Trainer, module: ProbedGPT, sets: Sequence[Sequence[Batch]]) -> None:
        for batches in sets:
            for batch in batches:
                with trainer.precision_plugin.forward_context():
                    module.gpt(batch.tokens, batch.targets, batch.packing)

    def _count(self, batches: Sequence[Batch]) -> None:
        self.sizes = {
            "batches": len(batches),
            "examples": sum(len(batch.tokens) for batch in batches),
            "positions": sum(batch.tokens.numel() for batch in batches),
            "computed": sum(len(batch.rows) for batch in batches),
        }

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0:
            self._part(pl_module, dataloader_idx - 1)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._part(pl_module, len(EVALUATION_SETS) - 1)

    def _part(self, module: LightningModule, ended: int) -> None:
        """End a set, of the number given, and begin the next."""
        moment = now(module.device)
        if ended >= 0:
            self.times[EVALUATION_SETS[ended]].append(1e3 * (moment - self._begun))
        self._begun = moment


def measure(arguments: list[str], evaluations: int) -> EvaluationClock:
    """Train that many steps, with an evaluation after each."""
    from benchmarks.evaluation import EvaluationClock as Clock  # run as a script, this module is not the one it names
    from mini_gpt_pl.training.cli import run_cli

    with tempfile.TemporaryDirectory() as folder:
        every = ["--trainer.val_check_interval=1", "--trainer.accumulate_grad_batches=1"]
        every += ["--trainer.num_sanity_val_steps=0", "--trainer.limit_val_batches=1.0"]
        every += [f"--trainer.max_steps={evaluations}"]
        quiet = ["--trainer.enable_progress_bar=false", "-c", "configs/probes/off.yaml", "--trainer.logger=false"]
        watch = ["--trainer.callbacks+=benchmarks.evaluation.EvaluationClock"]
        cli = run_cli(["fit", *arguments, *quiet, *every, *watch, "--run_dir", f"{folder}/run"])
    return next(callback for callback in cli.trainer.callbacks if isinstance(callback, Clock))  # type: ignore[attr-defined]


def main() -> None:
    """Print milliseconds of every arm and of the parts, and Lightning's share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10, help="evaluations under the clock")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options, rest = parser.parse_known_args()
    clock = measure(rest, _WARMUP + options.repeats)
    result = report({name: values[_WARMUP:] for name, values in clock.times.items()}, clock.sizes)
    result |= described(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    result["first_evaluation_ms"] = clock.times[WHOLE][0]
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


def report(times: dict[str, list[float]], sizes: dict[str, int]) -> dict[str, Any]:
    """Print and collect the result.

    Args:
        times: Milliseconds of each arm and set, a value an evaluation.
        sizes: Of the sets together.
    """
    taken = {name: median(values) for name, values in times.items()}
    for name, value in taken.items():
        part = "  of it " if name in EVALUATION_SETS else ""
        print(f"{part + name:18s} {value:9.1f} ms {value / taken[FLOOR]:7.3f} of the floor")
    share = 1 - taken[STEPS] / taken[WHOLE]
    print(f"Lightning's share: {share:.1%}")
    print(f"{sizes['examples']:,} examples in {sizes['batches']} batches")
    print(f"positions that are computed: {sizes['computed']:,} of {sizes['positions']:,}")
    return {"ms": taken, "repeats_ms": times, "lightning_share": share, **sizes}


if __name__ == "__main__":
    main()
