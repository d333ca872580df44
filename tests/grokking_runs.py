"""Run folders of the second task that nothing trained: a path, evaluations and commutators of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from conftest import normal

from mini_gpt_pl.geometry.path.rows import IncrementRows
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector
from mini_gpt_pl.runs.folder import Run

GROUPS = tuple(f"blocks.{layer}.attn.w_{matrix}" for layer in range(2) for matrix in "qkvo")
WEIGHTS = ParameterSelection(tuple(f"{group}.weight" for group in GROUPS), ((4, 5),) * 8, GROUPS)
STEPS = tuple(range(0, 2001, 100))
KEPT = 0.999
"""Share of the weights that decay leaves at each step."""

Series = Callable[[int], float]


def config(operation: str = "add", seed: int = 42, decay: float = 1.0, **changed: Any) -> dict[str, Any]:
    """A configuration as a run records it: the paper's, but for what is changed in its data."""
    settings = {"lr": changed.pop("lr", 1e-3), "betas": [0.9, 0.98], "weight_decay": decay}
    recorder = {"class_path": "mini_gpt_pl.callbacks.TrajectoryRecorder", "init_args": {"name": "attention"}}
    data = {"operation": operation, "modulus": 97, "train_fraction": 0.5, "batch_size": 512, "seed": seed}
    return {
        "task": "operations",
        "seed_everything": seed,
        "trainer": {"max_steps": STEPS[-1], "gradient_clip_val": 1.0, "callbacks": [recorder]},
        "model": {
            "size": {"n_layer": 2, "n_head": 4, "d_model": 128, "d_ff": 256},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": settings},
        },
        "data": {**data, **changed},
    }


def weights_of(seed: int, decay: float, *, kept: float = KEPT) -> torch.Tensor:
    """Weights (T, D) in float64: decayed, with innovations that push back against the decay and have a drift."""
    noise, drift = normal(len(STEPS), WEIGHTS.dim, seed=seed), normal(WEIGHTS.dim, seed=seed + 1)
    theta = [3.0 * normal(WEIGHTS.dim, seed=seed + 2)]
    share = kept ** (100 * decay)
    for row in noise[1:]:
        theta.append(share * theta[-1] + 0.3 * row + 0.1 * drift + 0.02 * theta[-1])
    return torch.stack(theta)


def write(
    folder: Path,
    accuracies: Mapping[str, Series],
    commutators: Mapping[str, Series],
    configuration: Mapping[str, Any] | None = None,
    every: int = 1,
) -> Run:
    """Write a run folder: its accuracies by set, and its commutator's numbers by name, as functions of the step.

    Of the snapshots only each `every`-th is recorded.
    """
    told = config() if configuration is None else dict(configuration)
    decay = told["model"]["optimizer"]["init_args"]["weight_decay"]
    folder.mkdir(parents=True)
    rows, trajectory = IncrementRows(WEIGHTS, torch.float64), Trajectory.empty(WEIGHTS)
    for step, values in list(zip(STEPS, weights_of(told["data"]["seed"], decay), strict=True))[::every]:
        new = rows.increment(Vector(values, WEIGHTS))
        trajectory.append(step, rows.dots(new), survival=KEPT ** (decay * step))
        rows.push(new)
    trajectory.save(folder / "trajectory.safetensors")
    (folder / "config.yaml").write_text(yaml.safe_dump(told))
    table = {f"eval/{name}_accuracy": series for name, series in accuracies.items()}
    table |= {"eval/train_loss": lambda s: 4.0 if s < 300 else 0.01, "eval/weight_norm": lambda s: 118 * 0.9995**s}
    table |= {f"commutator/{name if '/' in name else f'all/{name}'}": of for name, of in commutators.items()}
    frame = pd.DataFrame({name: [series(step) for step in STEPS] for name, series in table.items()}, index=STEPS)
    frame.loc[0, ["eval/train_accuracy", "eval/test_accuracy"]] = np.nan
    frame.rename_axis("step").to_csv(folder / "metrics.csv")
    return Run(folder)


def rises(at: int, before: float = 0.01, after: float = 1.0) -> Series:
    """A series that steps up (or down)."""
    return lambda step: after if step >= at else before


def constant(value: float) -> Series:
    """A series of one value."""
    return lambda step: value


def commutator(defect: Series, gradient: Series, **more: Series) -> dict[str, Series]:
    """What the probe logs, c following from the defect and the gradient."""
    plain: dict[str, Series] = {
        "defect": defect,
        "norm_a": gradient,
        "c": lambda step: defect(step) * gradient(step),
        "c_theta2": lambda step: defect(step) * gradient(step) * 1e3,
        "relative": constant(0.3),
        "weights": lambda step: 118 * 0.9995**step,
        "resolved": constant(1.0),
        "float32_signal": constant(10.0),
        "on_path": constant(0.0074),
        "on_path_isotropic": constant(0.0074),
        "on_path_null": constant(0.0111),
        "on_path_ratio": constant(0.667),
        "on_path_below": constant(0.5),
        "alignment_rms": constant(0.01),
        "alignment_flip": constant(0.01),
    }
    return {**plain, **more}


def grokking(at: int = 1200) -> dict[str, Series]:
    """Accuracies of a run that memorises at step 300 and generalises at another."""
    return {"train": rises(300, 0.2), "test": rises(at)}


def memorising() -> dict[str, Series]:
    """Accuracies of a run that memorises and goes no further."""
    return {"train": rises(300, 0.2), "test": constant(0.01)}
