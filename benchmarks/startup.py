"""Seconds from the command to the end of the first optimizer step, by part, and those of the commands' help.

    python -m benchmarks.startup -c configs/paper/base.yaml -c configs/paper/seed42.yaml ... --out startup.json

What is no option of this script goes to `fit`, which runs in a process of its own with `--trainer.max_steps 1`. The
first run may have to read and tokenize the text; the later ones find it cached, and their median is what is reported.
Compilation is off; `--compile` measures it apart, as what the same run takes longer with it. Beside them what the
libraries take that are imported first, each in a process that does nothing else: the floor of the imports.

The parts, each up to an event in the process:

* `interpreter`: Python itself, up to this script's first line.
* `imports`: torch, Lightning and this project.
* `configuration`: the parser is built, the files and the command line are read.
* `objects`: tokenizer, data module, model, callbacks and trainer exist.
* `data`: the cache is looked up, or filled; the splits are loaded and the evaluation sets built.
* `training`: weights are on the device (on a GPU its context is made here), the optimizer and the loaggers exist.
* `first_batch`: the workers have started and the first batch is there.
* `first_step`: forward, backward, optimizer and the probes that speak at the first step.
"""

from __future__ import annotations

import time

_BEGUN = time.time()

import argparse  # noqa: E402
import json  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable  # noqa: E402
from itertools import pairwise  # noqa: E402
from pathlib import Path  # noqa: E402
from statistics import median  # noqa: E402
from typing import Any  # noqa: E402

from mini_gpt_pl.main import load  # noqa: E402

PARTS = (
    "interpreter",
    "imports",
    "configuration",
    "objects",
    "data",
    "loggers",
    "training",
    "first_batch",
    "first_step",
)
HELPS = ("--help", "fit --help", "report --help")
LIBRARIES = ("torch", "lightning.pytorch")


def watched_fit(arguments: list[str], out: Path, spawned: float) -> None:
    """Run `fit` in this process and write down when it came to the end of each part."""
    marks = [spawned, _BEGUN]
    spent: list[float] = []

    def mark() -> None:
        marks.append(time.time())

    def timed(method: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            begun = time.time()
            method(*args, **kwargs)
            spent.append(time.time() - begun)

        return run

    trainer_cli = load("mini_gpt_pl.training.cli")
    mark()
    import torch
    from lightning.pytorch import Callback, LightningModule, Trainer

    class Marks(Callback):
        def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            mark()

        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            mark()

        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            mark()

        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            mark()

    class WatchedCLI(trainer_cli.ProbedCLI):  # type: ignore[name-defined]
        def before_instantiate_classes(self) -> None:
            mark()
            super().before_instantiate_classes()

        def before_fit(self) -> None:
            self.trainer.callbacks.append(Marks())
            for name in ("prepare_data", "setup"):
                setattr(self.datamodule, name, timed(getattr(self.datamodule, name)))
            mark()

        def after_fit(self) -> None:
            """Draw nothing."""

    trainer_cli.ProbedCLI = WatchedCLI  # type: ignore[attr-defined]
    trainer_cli.main(["fit", *arguments])
    data = sum(spent)
    interpreter, imports, configuration, objects, prepared, *rest = (b - a for a, b in pairwise(marks))
    seconds = (interpreter, imports, configuration, objects, data, prepared - data, *rest)
    out.write_text(json.dumps(dict(zip(PARTS, seconds, strict=True))))


def measure(arguments: list[str], *, compiled: bool = False) -> dict[str, float]:
    """Run one `fit` of one step in a process of its own and return the seconds of its parts."""
    with tempfile.TemporaryDirectory() as folder:
        marks = Path(folder) / "marks.json"
        one = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false"]
        more = ["--model.compile", str(compiled).lower(), "--run_dir", f"{folder}/run"]
        command = [sys.executable, "-m", "benchmarks.startup", "--watched", str(marks), str(time.time())]
        subprocess.run([*command, *arguments, *one, *more], check=True, stdout=subprocess.DEVNULL)
        found: dict[str, float] = json.loads(marks.read_text())
        return found


def wall_seconds(*arguments: str) -> float:
    """Wall time of a Python process."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def main() -> None:
    """Print the seconds of each part."""
    if sys.argv[1:2] == ["--watched"]:
        watched_fit(sys.argv[4:], Path(sys.argv[2]), float(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="runs on cached data")
    parser.add_argument("--compile", action="store_true", help="also measure what compilation adds")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options, rest = parser.parse_known_args()
    result: dict[str, Any] = {"first_run": measure(rest)}
    runs = [measure(rest) for _ in range(options.repeats)]
    result["cached"] = {part: median(run[part] for run in runs) for part in PARTS}
    result["cached_total"] = median(sum(run.values()) for run in runs)
    if options.compile:
        result["with_compile"] = measure(rest, compiled=True)
    turns = range(options.repeats)
    result["help"] = {command: median(wall_seconds("cli.py", *command.split()) for _ in turns) for command in HELPS}
    result["libraries"] = {name: median(wall_seconds("-c", f"import {name}") for _ in turns) for name in LIBRARIES}
    import torch  # late: this process needs it for the device's name alone

    result["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    result["torch"] = torch.__version__
    report(result)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


def report(result: dict[str, Any]) -> None:
    """Print what was measured."""
    arms = [name for name in ("first_run", "cached", "with_compile") if name in result]
    print(f"{'seconds':14s}" + "".join(f"{name:>14s}" for name in arms))
    for part in PARTS:
        print(f"{part:14s}" + "".join(f"{result[name][part]:14.2f}" for name in arms))
    print(f"{'together':14s}" + "".join(f"{sum(result[name].values()):14.2f}" for name in arms))
    for command, seconds in result["help"].items():
        print(f"cli.py {command:14s} {seconds:6.2f}")
    for name, seconds in result["libraries"].items():
        print(f"import {name:18s} {seconds:6.2f}")


if __name__ == "__main__":
    main()
