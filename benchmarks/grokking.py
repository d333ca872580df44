"""What a step of the second task costs: in a plain loop, under Lightning, and with what its presets watch.

    python -m benchmarks.grokking --out x.json

The arms alternate within one process and train the same thing. `watched` evaluates the whole sets and takes snapshots
every 100 steps, so --steps and --start are best multiples of 100. `stacked` is a plain loop of some seeds at once, the
weights of all in one tensor each and the model mapped over them; its milliseconds are those of a step of one seed.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.func import functional_call, stack_module_state
from torch.optim import AdamW

from benchmarks.clock import described, here, now
from benchmarks.overhead import STOPWATCH_FILE, Stopwatch
from mini_gpt_pl.arithmetic.data import Examples, ModularArithmetic
from mini_gpt_pl.arithmetic.encoder import ATTENTION_PATTERN, EncoderSize
from mini_gpt_pl.arithmetic.milestones import Evaluation
from mini_gpt_pl.arithmetic.module import ADAMW, ResidueClassifier
from mini_gpt_pl.callbacks import CostControl, Schedule, StopOnDivergence, TrajectoryRecorder
from mini_gpt_pl.runs.logs import MetricsCSV

SEEDS = 3  # of a sweep
# Shape and modulus of the presets in configs/grokking.
MODELS = {"smoke": (EncoderSize(1, 4, 64, 128), 59), "paper": (EncoderSize(), 97)}


def build(name: str) -> tuple[ResidueClassifier, ModularArithmetic]:
    """Model and data of a preset, on the CPU."""
    size, modulus = MODELS[name]
    module = ResidueClassifier(size, modulus, modulus, optimizer=lambda p: AdamW(p, **ADAMW, fused=True))
    return module, ModularArithmetic(modulus=modulus)


def plain(name: str, steps: int, start: int) -> float:
    """Milliseconds per step of a loop with nothing in it but training."""
    device = here()
    module, data = build(name)
    module.to(device)
    data.device = device
    data.setup()
    optimizer, stream = module.configure_optimizers(), iter(data.batches())
    parameters = list(module.parameters())
    begun = 0.0
    for step in range(steps):
        if step == start:
            begun = now(device)
        optimizer.zero_grad()
        module.batch_loss(next(stream)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return 1e3 * (now(device) - begun) / (steps - start)


def stacked(name: str, steps: int, start: int, seeds: int = SEEDS) -> float:
    """Milliseconds per step and seed of a loop that trains some seeds at once."""
    device, built = here(), [build(name) for _ in range(seeds)]
    for module, data in built:
        module.to(device)
        data.device = device
        data.setup()
    base = built[0][0]
    weights, buffers = stack_module_state([module for module, _ in built])
    losses = torch.vmap(lambda own, kept, batch: _loss(base, own, kept, batch))
    optimizer = AdamW(weights.values(), **ADAMW, fused=True)
    streams = [iter(data.batches()) for _, data in built]
    begun = 0.0
    for step in range(steps):
        if step == start:
            begun = now(device)
        optimizer.zero_grad()
        batch = Examples(*map(torch.stack, zip(*map(next, streams), strict=True)))
        losses(weights, buffers, batch).sum().backward()
        _clip_each(list(weights.values()))
        optimizer.step()
    return 1e3 * (now(device) - begun) / (steps - start) / seeds


def _loss(module: ResidueClassifier, weights: Any, buffers: Any, batch: Examples) -> Tensor:
    logits: Tensor = functional_call(module, (weights, buffers), (batch.tokens,))
    return F.cross_entropy(logits, batch.labels)


def _clip_each(weights: list[Tensor], limit: float = 1.0) -> None:
    """Clip the gradients of every seed by their own norm, as `clip_grad_norm_` does for one."""
    gradients = [weight.grad.flatten(1) for weight in weights if weight.grad is not None]
    norms = torch.stack([gradient.norm(dim=1) for gradient in gradients]).norm(dim=0)
    for gradient in gradients:
        gradient.mul_((limit / (norms + 1e-6)).clamp(max=1.0)[:, None])


def lightning(name: str, steps: int, start: int, *, watched: bool) -> float:
    """Milliseconds per step under the Trainer."""
    module, data = build(name)
    watching: list[Callback] = [
        StopOnDivergence(),
        Evaluation(),
        TrajectoryRecorder(ATTENTION_PATTERN, Schedule(every=100), name="attention"),
        CostControl(),
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator=here().type,
            devices=1,
            max_steps=steps,
            max_epochs=-1,
            gradient_clip_val=1.0,
            log_every_n_steps=100,
            callbacks=[*(watching if watched else []), Stopwatch(start)],
            logger=MetricsCSV(Path(folder) / "metrics.csv"),
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=data)
        return float(json.loads((Path(folder) / STOPWATCH_FILE).read_text())["ms_per_step"])


ARMS: dict[str, Callable[[str, int, int], float]] = {
    "plain": plain,
    "stacked": stacked,
    "lightning": lambda *given: lightning(*given, watched=False),
    "watched": lambda *given: lightning(*given, watched=True),
}


def main() -> None:
    """Print milliseconds per step of every arm, medians over the repeats, for every model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--start", type=int, default=100, help="step at which the clock starts")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    result: dict[str, Any] = described(here()) | {"steps": options.steps - options.start}
    for model in options.models:
        times: dict[str, list[float]] = {name: [] for name in ARMS}
        for _ in range(options.repeats):  # alternating, so that a slow spell of the machine hits all
            for name, arm in ARMS.items():
                times[name].append(arm(model, options.steps, options.start))
        taken = {name: median(values) for name, values in times.items()}
        over = {name: value / taken["plain"] for name, value in taken.items()}
        result[model] = {"ms_per_step": taken, "over_plain": over, "repeats_ms": times}
        for name, value in taken.items():
            print(f"{model:6s} {name:10s} {value:8.3f} ms/step  {over[name]:5.2f} x plain")
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
