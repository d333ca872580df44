"""What a recorded path shows while it grows: its numbers beside their nulls, and its directions."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mini_gpt_pl.geometry.path import nulls, pca
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.metrics.registry import quantities


def live_metrics(trajectory: Trajectory, name: str) -> dict[str, float]:
    """Describe the trajectory so far, per group and as a whole, beside what decay and chance would have given.

    Args:
        trajectory: At least two snapshots.
        name: What the whole selection is called.
    """
    grams = torch.stack([trajectory.gram(), *trajectory.grams])
    moved = pca.norms(grams, pca.drifts(len(trajectory))).amax(-1) > 0  # frozen so far: nothing has a direction yet
    if not moved.any():
        return {}
    grams = grams[moved]
    groups = [group for group, has in zip((None, *trajectory.groups), moved.tolist(), strict=True) if has]
    if trajectory.rates is None:
        walks = nulls.decaying_walk(grams, trajectory.survival)
    else:
        walks = torch.stack([trajectory.decaying_walk(group) for group in groups])
    both = torch.cat([grams, walks])  # one batch of eigenvalue problems
    columns = {key: values.tolist() for key, values in nulls.statistics_of(both, trajectory.survival).items()}
    finite = torch.isfinite(both).all(-1).all(-1)
    updates = torch.where(finite, pca.latest_update_alignment(both), torch.nan).tolist()
    calibrated = quantities("backbone/{group}/{quantity}_null")
    metrics: dict[str, float] = {}
    for own, group in enumerate(groups):
        label, null = name if group is None else group, own + len(groups)
        pairs = {key: (values[own], values[null]) for key, values in columns.items()}
        if trajectory.rates is not None:  # what is corrected for decay needs the one rate of its weights
            corrected = nulls.corrected(torch.stack([grams[own], walks[own]]), trajectory.survival_of(group))
            pairs |= {key: (float(values[0]), float(values[1])) for key, values in corrected.items()}
        for key, (value, chance) in pairs.items():
            metrics[f"backbone/{label}/{key}"] = value
            if key in calibrated:
                metrics |= _beside_null(f"backbone/{label}/{key}", value, chance)
        if updates[own] == updates[own]:  # the first increment has no past to be aligned with
            metrics[f"alignment/{label}/update"] = updates[own]
            metrics |= _beside_null(f"alignment/{label}/update", updates[own], updates[null])
    return {key: value for key, value in metrics.items() if value == value}


def _beside_null(name: str, value: float, null: float) -> dict[str, float]:
    return {f"{name}_null": null, f"{name}_excess": value - null}


def backbone_coefficients(trajectory: Trajectory) -> tuple[Float[Tensor, "G n"], Float[Tensor, "G n"]]:
    """Directions of the path so far as coefficients: each group's own v_b, and that of the whole for every group.

    Zero for weights that have not moved (frozen, or before the first step).
    """
    spectra = pca.spectra(torch.stack([*trajectory.grams, trajectory.gram()]), pca.drifts(len(trajectory))[1:])
    backbones = torch.where((spectra.moved > 0)[:, None], spectra.directions[:, 0], 0.0)
    return backbones[:-1], backbones[-1:].expand(len(trajectory.groups), -1)
