"""A tiny model, tiny stories and a quiet trainer, and brute-force twins of what the probes report."""

from __future__ import annotations

import atexit
import copy
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import AdamW, Optimizer

from mini_gpt_pl.callbacks import GradientAlignment, Schedule, StopOnDivergence, TrajectoryRecorder
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.runs.logs import MetricsCSV
from mini_gpt_pl.stories.data.corpus import CorpusConfig
from mini_gpt_pl.stories.data.datamodule import Batch, ProbedStories
from mini_gpt_pl.stories.data.probe import ProbeConfig
from mini_gpt_pl.stories.data.tokenizer import load_tokenizer
from mini_gpt_pl.stories.gpt import GPT, TRUNK_PATTERN, GPTSize
from mini_gpt_pl.stories.module import ProbedGPT
from mini_gpt_pl.stories.objective import ProbeWeight
from mini_gpt_pl.stories.trainer import StoryTrainer
from mini_gpt_pl.training import one_sum  # noqa: F401 (registers the strategy)
from mini_gpt_pl.training.optimizers import ClippedCosine

CONTEXT = 64
SIZE = GPTSize(n_layer=2, n_head=2, d_model=32, d_ff=64, context=CONTEXT)
GROUPS = ("blocks.0", "blocks.1")
LABELS = (*GROUPS, "trunk")
PEAK, DECAY = 1e-2, 0.1
SCHEDULE = ClippedCosine(warmup=3, total=12, floor=0.2)
WEIGHT = ProbeWeight(2.0, 4.0, switch_step=3)

Array = np.ndarray[Any, np.dtype[np.float64]]
Params = Iterable[Any]


# --------------------------------------------------------------------------------------------------- builders


@cache
def cache_dir() -> str:
    """A Hugging Face cache that lives as long as the test process."""
    folder = tempfile.mkdtemp(prefix="stories-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def adamw(params: Params) -> AdamW:
    return AdamW(params, lr=PEAK, betas=(0.9, 0.95), weight_decay=DECAY)


def tiny_stories(rows: int = 40, batch_size: int = 4, val_rows: int = 8, **probe: Any) -> ProbedStories:
    """Forty stories are ten micro-batches of four."""
    settings: dict[str, Any] = {
        "p_probe": 0.5,
        "n_codewords": 16,
        "train_gap": (2, 6),
        "ood_gap": (8, 16),
        "eval_examples": 8,
    }
    return ProbedStories(
        CorpusConfig(train_rows=rows, val_rows=val_rows),
        probe=ProbeConfig(**{**settings, **probe}),
        context=CONTEXT,
        batch_size=batch_size,
        val_batches=val_rows,  # all of them, whatever the batch size
        eval_batch_size=6,  # the last batch of eight examples is a short one
        seed=7,
        cache_dir=cache_dir(),
    )


def tiny_gpt(seed: int = 1, **settings: Any) -> ProbedGPT:
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {"size": SIZE, "vocab_size": load_tokenizer("builtin").n_vocab, "context": CONTEXT}
    training = {"optimizer": adamw, "schedule": SCHEDULE, "probe_weight": WEIGHT}
    return ProbedGPT(**{**defaults, **training, **settings})


def quiet_trainer(folder: Path, callbacks: Sequence[Callback] = (), **settings: Any) -> StoryTrainer:
    """A trainer on one CPU with a CSV that logs every step; `steps` optimizer steps are its only end."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": str(folder),
        "logger": MetricsCSV(folder / "metrics.csv"),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "max_epochs": -1,
        "log_every_n_steps": 1,
        "gradient_clip_val": 1.0,
        "callbacks": list(callbacks),
    }
    return StoryTrainer(**{**defaults, **settings})


def recorder(every: int = 2, **settings: Any) -> TrajectoryRecorder:
    return TrajectoryRecorder(TRUNK_PATTERN, **{"schedule": Schedule(every=every), **settings})


def probes(every: int = 2, split: int = 1) -> list[Callback]:
    """Everything that measures."""
    return [
        StopOnDivergence(),
        recorder(every),
        GradientAlignment(Schedule(every=1), Schedule(every=split)),
    ]


def checkpoints(folder: Path, every: int = 1) -> ModelCheckpoint:
    return ModelCheckpoint(
        dirpath=folder / "checkpoints",
        every_n_train_steps=every,
        save_top_k=-1,
        filename="{step:06d}",
        auto_insert_metric_name=False,
    )


def metrics(folder: Path) -> dict[int, dict[str, float]]:
    """What a run logged: step -> name -> value."""
    table = Run(folder).metrics
    rows: list[dict[str, float]] = table.to_dict("records")  # type: ignore[assignment]
    kept = [{name: value for name, value in row.items() if value == value} for row in rows]
    return dict(zip(map(int, table.index), kept, strict=True))


def same(a: Any, b: Any) -> bool:
    """Whether nested states are equal, tensors bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


# ----------------------------------------------------------------------------------------------------- spies


class Clock:
    """A clock that only the test's own model, data and probes move, whatever this machine is busy with."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Spy(Callback):
    """Copies what training had in its hands: batches, models, raw gradients and weights, by optimizer step.

    Attributes:
        batches: Micro-batches of the step.
        before: The model before the step.
        gradients: `.grad` by name, as the optimizer hooks see it.
        weights: The state after the step; that of step 0 is the initial one.
        optimizer: State of the optimizer when training starts.
    """

    def __init__(self) -> None:
        self.batches: dict[int, list[Batch]] = {}
        self.before: dict[int, GPT] = {}
        self.gradients: dict[int, dict[str, Tensor]] = {}
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.optimizer: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights[trainer.global_step] = copy.deepcopy(pl_module.state_dict())
        self.optimizer = copy.deepcopy(trainer.optimizers[0].state_dict())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step + 1
        assert isinstance(pl_module, ProbedGPT)
        if step not in self.batches:
            self.before[step] = copy.deepcopy(pl_module.gpt)
        self.batches.setdefault(step, []).append(batch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        named = pl_module.named_parameters()
        self.gradients[trainer.global_step + 1] = {name: p.grad.clone() for name, p in named if p.grad is not None}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.weights[trainer.global_step] = copy.deepcopy(pl_module.state_dict())


class At(Callback):
    """Does something once, when the micro-batch behind optimizer step `step` starts."""

    def __init__(self, step: int, action: Callable[[LightningModule], None]) -> None:
        self.step = step
        self.action = action
        self.done = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step and not self.done:
            self.done = True
            self.action(pl_module)


# ------------------------------------------------------------------------------------------------ brute force


def flat(tensors: dict[str, Tensor], group: str) -> Array:
    """The selected weights of one group (or of the trunk) in float64, by name in module order."""
    matrices = ("attn.qkv", "attn.out_proj", "mlp.w_up", "mlp.w_down")
    blocks = GROUPS if group == "trunk" else (group,)
    names = [f"gpt.{block}.{matrix}.weight" for block in blocks for matrix in matrices]
    return np.concatenate([tensors[name].double().numpy().ravel() for name in names])


def read_path(folder: Path, group: str, until: int = 10**9) -> tuple[list[int], Array]:
    """Steps, and theta_0 above the increments (n, D), of the snapshot files up to a step."""
    files = sorted((folder / "snapshots").glob("*.safetensors"))
    steps = [int(file.stem.removeprefix("step_")) for file in files]
    kept = [(step, file) for step, file in zip(steps, files, strict=True) if step <= until]
    return [step for step, _ in kept], np.stack([flat(load_file(file), group) for _, file in kept])


def drifts(basis: Array) -> Array:
    """Rows x_1 .. x_T from theta_0 above the increments."""
    summed: Array = np.cumsum(basis[1:], axis=0)
    return summed


def first_direction(rows: Array) -> Array:
    """v_b by SVD, its sign such that the last row's coordinate is positive."""
    v: Array = np.linalg.svd(rows, full_matrices=False)[2][0]
    return v if rows[-1] @ v >= 0 else -v


def past_backbone(folder: Path, group: str, step: int) -> Array | None:
    """The backbone that is known when optimizer step `step` is prepared; None before a second snapshot."""
    _, basis = read_path(folder, group, until=step - 1)
    return first_direction(drifts(basis)) if len(basis) > 1 else None


def cosine(a: Array, b: Array) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def part_losses(gpt: GPT, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """L_LM and L_probe of whole micro-batches together, from the logits, by their definition."""
    tokens, targets, mask = (torch.cat([getattr(b, k) for b in batches]) for k in ("tokens", "targets", "probe_mask"))
    nll = F.cross_entropy(gpt(tokens).flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    asked = mask & (targets != -100)
    plain = ~mask & (targets != -100)
    return nll[plain].mean(), nll[asked].mean() if asked.any() else torch.zeros(())
