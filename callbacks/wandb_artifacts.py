"""A run's geometry as W&B artifacts, and the link from a reheated run to its parent's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from safetensors.torch import save_file
from torch import Tensor

from mini_gpt_pl.callbacks.trajectory import TRAJECTORY_FILE, TrajectoryRecorder
from mini_gpt_pl.geometry.path import pca

TYPE = "geometry"
BASIS_FILE = "basis.safetensors"


def artifact_name(run_id: str) -> str:
    """Name the artifact of a W&B run."""
    return f"{TYPE}-{run_id}"


def log_geometry(run: Any, recorder: TrajectoryRecorder, root: Path, *, basis: bool = False) -> None:
    """Hand a run's Gram matrices to W&B as an artifact of type `geometry`; nothing before a second snapshot.

    The file is a few hundred kilobytes: theta_0 and the increments' inner products, (G, T+1, T+1) in float64.

    Args:
        run: The W&B run.
        recorder: Whose trajectory.
        root: The trainer's root folder.
        basis: Also the backbone v_b of the whole selection and theta_0, two times D values under the weights' names.
    """
    trajectory, file = recorder.trajectory, Path(recorder.dirpath or root) / TRAJECTORY_FILE
    if run.disabled or trajectory is None or len(trajectory) < 2 or not file.is_file():
        return
    import wandb

    last = trajectory.steps[-1]
    known = {
        "run": run.id,
        "snapshots": len(trajectory),
        "last_step": last,
        "whole": recorder.name,
        "groups": list(trajectory.groups),
        "dim": trajectory.dim,
        "fingerprint": trajectory.fingerprint,
    }
    artifact = wandb.Artifact(artifact_name(run.id), TYPE, "Gram matrices of the weight trajectory", metadata=known)
    # A copy, as a resumed run writes the file anew before this one is sent; beside W&B's own files, not in the home.
    folder = Path(run.dir).parent / TYPE / f"step-{last}"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, folder / TRAJECTORY_FILE)
    if basis:
        _write_basis(folder / BASIS_FILE, recorder)
    for part in sorted(folder.iterdir()):
        artifact.add_file(str(part.resolve()), part.name, policy="immutable", skip_cache=True)
    run.log_artifact(artifact, aliases=["latest", f"step-{last}"])


def _write_basis(file: Path, recorder: TrajectoryRecorder) -> None:
    tensors = basis_tensors(recorder)
    if tensors:
        save_file(tensors, file)
    else:
        rank_zero_info("no basis artifact: the ranks share the weights, and none holds a whole direction")


def basis_tensors(recorder: TrajectoryRecorder) -> dict[str, Tensor]:
    """Materialise the backbone of the snapshots so far and theta_0.

    Returns:
        `v_b/<weight>` and `theta_0/<weight>` on the host, each in the shape of the weight; v_b is a unit vector over
        all of them. Empty where the ranks share the weights, and before a second snapshot.
    """
    found, selection, trajectory = recorder.backbone(), recorder.selection, recorder.trajectory
    if found is None or trajectory is None or selection.shards is not None:
        return {}
    count = len(trajectory)
    theta0 = recorder.direction(pca.theta0(count).expand(len(trajectory.groups), count))
    named = {"v_b": found[1], "theta_0": theta0}
    return {
        f"{axis}/{name}": tensor.cpu().contiguous()
        for axis, vector in named.items()
        for name, tensor in selection.unflatten(vector).items()
    }


def use_parent(run: Any, name: str) -> None:
    """Declare that a run starts from another's geometry.

    Its name is in the configuration as `parent_artifact` in any case: offline, W&B cannot look an artifact up.

    Args:
        run: The W&B run.
        name: Of the parent's artifact, with its version.
    """
    run.config.update({"parent_artifact": name}, allow_val_change=True)
    if run.offline or run.disabled:
        return
    try:
        run.use_artifact(name, type=TYPE)
    except Exception as error:  # the client raises plain exceptions too; training must not end over a missing link
        told = next(iter(str(error).splitlines()), type(error).__name__)
        rank_zero_warn(f"W&B has no artifact {name} of the parent run ({told}): only the configuration names it")
