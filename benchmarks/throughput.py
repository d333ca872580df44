"""Tokens per second of training: this project with its probes live, beside peers, all in one run on one device.

    python -m benchmarks.throughput -c configs/paper/base.yaml -c configs/paper/seed42.yaml ... --out throughput.json

What is no option of this script goes to `fit`. Every arm trains a model of the configured shape in the configured
precision, compiled where the configuration says so, with its optimizer settings and clipping, on batches of the same
stories:

* `transformers`: Hugging Face's GPT-2 of the same shape, vocabulary padded to 64, in a plain loop.
* `plain`: this project's model as plain operations on every position, in a plain loop; nanoGPT's tricks give this.
* `packed`: this project's model as it trains, without the positions that no target needs and with the fused head, in a
  plain loop.
* `none`: `packed` under the Trainer, with data loading and logging, without a probe.
* `standard`, `every_step`: the same with the probes of a preset (`--presets`), as `benchmarks.overhead` has them.

A token is a position of the (sequences x context) batch in every arm, padding included: the arms are given the same
stories, and what they make of them differs. Plain loops have their batches on the device before the clock starts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from benchmarks import overhead
from benchmarks.clock import described, here, now
from mini_gpt_pl.stories.data.datamodule import Batch, ProbedStories
from mini_gpt_pl.stories.gpt import GPT
from mini_gpt_pl.stories.module import ProbedGPT
from mini_gpt_pl.stories.objective import IGNORE
from mini_gpt_pl.training.optimizers import decay_groups

Loss = Callable[[Batch], Tensor]
# Batches that a plain loop goes round, steps before the clock (compilation), and the gradient norm's limit.
_BATCHES, _WARMUP, _LIMIT = 16, 20, 1.0
PLAIN_ARMS = ("transformers", "plain", "packed")


def configured(arguments: list[str]) -> tuple[ProbedGPT, ProbedStories, dict[str, Any]]:
    """Build the model and the data of a `fit` command line by a run of one step."""
    from mini_gpt_pl.training.cli import run_cli

    with tempfile.TemporaryDirectory() as folder:
        short = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--trainer.logger=false"]
        quiet = ["--trainer.enable_progress_bar=false", "-c", "configs/probes/off.yaml", "--model.compile=false"]
        cli = run_cli(["fit", *arguments, *quiet, *short, "--run_dir", f"{folder}/run"])
    assert isinstance(cli.model, ProbedGPT) and isinstance(cli.datamodule, ProbedStories)
    return cli.model, cli.datamodule, dict(cli.config["fit"].trainer)


def arm(name: str, model: ProbedGPT) -> tuple[nn.Module, Loss]:
    """Build a model of the configured shape and what gives its loss on a batch.

    Raises:
        ImportError: The peer's library is not installed.
    """
    size, vocab = model.gpt.size, model.gpt.vocab_size
    if name == "transformers":
        from transformers import GPT2Config, GPT2LMHeadModel

        shape = {"n_positions": size.context, "n_embd": size.d_model, "n_layer": size.n_layer, "n_head": size.n_head}
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        peer = GPT2LMHeadModel(GPT2Config(vocab_size=-(-vocab // 64) * 64, n_inner=size.d_ff, **shape, **off))
        return peer, lambda batch: _cross_entropy(peer(batch.tokens, use_cache=False).logits, batch.targets)
    gpt = GPT(size, vocab, 64)
    if name == "plain":
        # The padded rows of the table count as tokens, as nanoGPT has it: to cut them off would cost a copy.
        return gpt, lambda batch: _cross_entropy(
            F.linear(gpt.features(batch.tokens), gpt.tok_emb.weight), batch.targets
        )

    def packed(batch: Batch) -> Tensor:
        torch._dynamo.maybe_mark_dynamic(batch.rows, 0)
        nll: Tensor = gpt(batch.tokens, batch.targets, batch.packing).nll
        return nll.sum() / batch.lm_count

    return gpt, packed


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


def plain_loop(name: str, model: ProbedGPT, batches: list[Batch], steps: int) -> float:
    """Train an arm without Lightning, compiled on a GPU, and return its milliseconds per batch.

    Raises:
        ImportError: The peer's library is not installed.
    """
    device = batches[0].tokens.device
    compiled = device.type == "cuda"
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    network, loss = arm(name, model)
    network.to(device).train()
    if compiled and name == "packed":
        network.compile()  # as the module does
    elif compiled:
        loss = torch.compile(loss)  # the loss with the network, so that the softmax can be fused
    optimizer: Any = torch.optim.AdamW(decay_groups(network), lr=1e-4, fused=device.type == "cuda")
    parameters = list(network.parameters())
    half = torch.autocast(device.type, torch.bfloat16) if device.type == "cuda" else nullcontext()
    begun = 0.0
    for step, batch in enumerate(islice(cycle(batches), _WARMUP + steps)):
        if step == _WARMUP:
            begun = now(device)
        with half:
            found = loss(batch)
        found.backward()
        torch.nn.utils.clip_grad_norm_(parameters, _LIMIT)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return 1e3 * (now(device) - begun) / steps


def main() -> None:
    """Print milliseconds per step and tokens per second of every arm, and their ratios to ours with probes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="steps under the clock, in every plain loop")
    parser.add_argument("--start", type=int, default=450, help="step at which the clock of a training starts")
    parser.add_argument("--until", type=int, default=1950, help="last step of a training, best before its checkpoint")
    parser.add_argument("--repeats", type=int, default=2, help="times that each arm is measured, alternating")
    parser.add_argument("--presets", nargs="+", default=overhead.PRESETS, help="NAME=FILE; the first one is compared")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options, rest = parser.parse_known_args()
    model, data, trainer = configured(rest)
    device = here()
    batches = [move_data_to_device(batch, device) for batch in islice(data.train_dataloader(), _BATCHES)]
    data.teardown()
    accumulated = int(trainer.get("accumulate_grad_batches") or 1)
    loops: dict[str, list[float]] = {}
    trainings: dict[str, list[overhead.Timing]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = overhead.arms(options.presets, options.start, Path(folder))
        for _ in range(options.repeats):
            for name in PLAIN_ARMS:
                try:
                    taken = accumulated * plain_loop(name, model, batches, options.steps)
                    loops.setdefault(name, []).append(taken)
                    print(f"{name}: {taken:.2f} ms/step", flush=True)
                except ImportError as error:
                    print(f"{name} is left out: {error}")
            for name, file in files.items():
                timing = overhead.timed_run([*rest, "-c", file], options.until, options.start)
                trainings.setdefault(name, []).append(timing)
                print(f"{name}: {timing.ms_per_step:.2f} ms/step", flush=True)
    positions = batches[0].tokens.numel() * accumulated
    kept = sum(len(batch.rows) for batch in batches) / sum(batch.tokens.numel() for batch in batches)
    result = report(loops, trainings, positions, kept) | described(here())
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


def report(
    loops: dict[str, list[float]], trainings: dict[str, list[overhead.Timing]], positions: int, kept: float
) -> dict[str, Any]:
    """Print and collect the result.

    Args:
        loops: Milliseconds per optimizer step of each plain loop, a value a repeat.
        trainings: Of each training under Lightning: `none`, then the presets, the first of which is compared.
        positions: Sequences times context of an optimizer step.
        kept: Share of the positions that a packed batch computes.
    """
    repeats = loops | {name: [run.ms_per_step for run in runs] for name, runs in trainings.items()}
    taken = {name: median(values) for name, values in repeats.items()}
    speeds = {name: 1e3 * positions / milliseconds for name, milliseconds in taken.items()}
    compared = next(name for name in trainings if name != "none")
    for name, milliseconds in taken.items():
        print(f"{name:14s} {milliseconds:8.2f} ms/step {speeds[name]:12,.0f} tokens/s")
    ratios = {name: speeds[compared] / speed for name, speed in speeds.items() if name != compared}
    for name, ratio in ratios.items():
        print(f"{compared} over {name:14s} {ratio:6.3f}")
    print(f"positions that are computed: {kept:.1%} of {positions:,}")
    return {
        "ms_per_step": taken,
        "repeats_ms": repeats,
        "tokens_per_second": speeds,
        "compared": compared,
        "over": ratios,
        "positions_per_step": positions,
        "share_computed": kept,
        "overhead": overhead.report(trainings),
    }


if __name__ == "__main__":
    main()
