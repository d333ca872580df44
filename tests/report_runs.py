"""Run folders with a path, a configuration and metrics of one's own, and numpy twins of what the tables show."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from conftest import bent_path

from mini_gpt_pl.geometry.path.rows import IncrementRows
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector
from mini_gpt_pl.report.sheet import Table
from mini_gpt_pl.runs.folder import Run

# Two blocks of unequal size: D = 6 + 9.
BLOCKS = ParameterSelection(("blocks.0.w", "blocks.1.w"), ((2, 3), (9,)), ("blocks.0", "blocks.1"))
DECAY = 0.9995
"""Share of the weights that decay leaves at each step."""

Array = np.ndarray[Any, np.dtype[np.float64]]

ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.5}
METRICS = "step,val/loss,train/lm_loss,probe/p_ood\n"


def config(
    optimizer: str = "torch.optim.AdamW",
    settings: Mapping[str, Any] = ADAMW,
    seed: int = 42,
    steps: int = 4000,
    **data: Any,
) -> dict[str, Any]:
    """A configuration as a run records it, of the paper's model on its data for 4,000 steps."""
    recorder = {"class_path": "mini_gpt_pl.callbacks.TrajectoryRecorder", "init_args": {"name": "trunk"}}
    return {
        "seed_everything": seed,
        "trainer": {
            "max_steps": steps,
            "accumulate_grad_batches": 2,
            "gradient_clip_val": 1.0,
            "callbacks": [recorder],
        },
        "model": {
            "size": "51m",
            "optimizer": {"class_path": optimizer, "init_args": dict(settings)},
            "schedule": {"warmup": 1500, "total": steps, "floor": 0.1},
            "probe_weight": {"first": 2.0, "second": 4.0, "switch_step": 4000},
        },
        "data": {
            "corpus": {"name": "tinystories"},
            "tokenizer": "gpt2",
            "context": 256,
            "batch_size": 64,
            "probe": {"p_probe": 0.1, "n_codewords": 512},
            "seed": seed,
            **data,
        },
    }


def path_of(steps: Sequence[int], seed: int = 0) -> torch.Tensor:
    """Weights (T, D) at given steps: a walk with a drift."""
    return bent_path(len(steps), BLOCKS.dim, seed=seed)


def write_run(
    folder: Path,
    steps: Sequence[int],
    weights: torch.Tensor | None = None,
    configuration: Mapping[str, Any] | None = None,
    metrics: str | None = METRICS,
) -> Run:
    """Write a run folder and return it; its decay leaves `DECAY` ** step of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = path_of(steps) if weights is None else weights
    rows, trajectory = IncrementRows(BLOCKS, weights.dtype), Trajectory.empty(BLOCKS)
    for step, values in zip(steps, weights, strict=True):
        new = rows.increment(Vector(values, BLOCKS))
        trajectory.append(step, rows.dots(new), survival=DECAY**step)
        rows.push(new)
    trajectory.save(folder / "trajectory.safetensors")
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(config() if configuration is None else configuration)))
    if metrics is not None:
        (folder / "metrics.csv").write_text(metrics)
    return Run(folder)


def learning_curve(values: Mapping[int, tuple[float, float]]) -> str:
    """Metrics with a validation loss and a p_ood by step."""
    return METRICS + "".join(f"{step},{loss},,{p_ood}\n" for step, (loss, p_ood) in values.items())


def write_replay(run: Run, step: int, record: Mapping[str, Any]) -> None:
    """Put what a replay found at a step into a run folder."""
    (run.path / "replay").mkdir(exist_ok=True)
    (run.path / "replay" / f"{step:06d}.json").write_text(json.dumps({"step": step, **record}))


# ------------------------------------------------------------------------------------------------------- tables


def written(table: Table, *keys: str) -> Any:
    """The cells as written."""
    return table.frame.set_index(list(keys))


def numbers(table: Table, *keys: str) -> Any:
    """The unformatted cells, a frame that mypy need not follow."""
    assert table.numbers is not None
    return table.numbers.set_index(list(keys))


# --------------------------------------------------------------------------------------------------- numpy twins


def walk_path(weights: Array) -> Array:
    """A walk with the same step lengths in orthogonal directions, in coordinates of its own; theta_0 is the first."""
    lengths = np.linalg.norm(np.diff(weights, axis=0), axis=1)
    path = np.zeros((len(weights), len(weights)))
    path[:, 0] = np.linalg.norm(weights[0])
    for k, length in enumerate(lengths, 1):
        path[k:, k] = length
    return path


def decaying_path(weights: Array, survival: Array) -> Array:
    """The same walk under decay: each innovation has a direction of its own."""
    lengths = np.linalg.norm(np.diff(weights, axis=0), axis=1)
    path: list[Array] = [np.r_[np.linalg.norm(weights[0]), np.zeros(len(lengths))]]
    for k, length in enumerate(lengths, 1):
        pull = (survival[k] / survival[k - 1] - 1) * path[-1]
        fresh = np.zeros(len(weights))
        fresh[k] = np.sqrt(max(0.0, length**2 - pull @ pull))
        path.append(path[-1] + pull + fresh)
    return np.stack(path)


def three_paths(weights: Array, survival: Array) -> tuple[Array, Array, Array]:
    """The measured path and both of its nulls."""
    return weights, walk_path(weights), decaying_path(weights, survival)


def ratios(rows: Array, *, unit: bool) -> Array:
    """Shares of the principal components."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True) if unit else 1.0
    energy: Array = np.linalg.svd(rows / lengths, compute_uv=False) ** 2
    return energy / energy.sum()


def components(rows: Array, share: float, *, unit: bool) -> int:
    """Fewest leading components that hold a share."""
    return int(np.argmax(np.cumsum(ratios(rows, unit=unit)) >= share - 1e-12)) + 1


def backbone(rows: Array) -> Array:
    """First right singular vector, with a positive last coordinate."""
    v: Array = np.linalg.svd(rows, full_matrices=False)[2][0]
    return v if rows[-1] @ v > 0 else -v


def cosine(a: Array, b: Array) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
