"""Which subspace a callback works in, as a configuration says it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from mini_gpt_pl.callbacks.trajectory import SNAPSHOT_FOLDER, TRAJECTORY_FILE
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.directions import subspace
from mini_gpt_pl.geometry.directions.subspace import Basis
from mini_gpt_pl.geometry.path.rebuild import recorded_selection
from mini_gpt_pl.geometry.path.snapshots import SnapshotFolder
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection

_NAMED = re.compile(r"\{(\w+)\}")
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9.+=-]+")
# Lightning's seed_everything leaves the seed there, for workers.
_GLOBAL_SEED = "PL_GLOBAL_SEED"
_OF_A_RUN = ("path", "theta0", "blocks")


@dataclass(frozen=True)
class BasisSource:
    """A subspace of a module's weights.

    Random directions are a function of `seed` and of the run's `seed_everything`, the same on every device.

    Args:
        kind: `path`, leading principal directions of each group of a recorded run; `theta0`, each group's initial
            weights there; `blocks`, random directions inside the groups of `path`, as many in each; `rank_one`, random
            u v' of each matrix; `isotropic`, random directions of all weights together.
        run: Folder of the recorded run, with its snapshots; `{seed}` in it stands for this run's `seed_everything`,
            any other name, as `{operation}`, for that attribute of its data module, written as a sweep writes it in
            the name of a folder: with hyphens. Its recorded weights and groups are those of the basis. Where another
            seed is meant, name its folder.
        k: Directions of each group or matrix; of all weights together for `isotropic`.
        pattern: The weights and groups where no run says them, as a recorder has it; all of them by default.
        until: Last step of the recorded path that counts; null for all of it, the future of this run included.
        centred: Whether `path` is of the weights themselves, or of the drift from theta_0.
        seed: Of random directions.

    Raises:
        UserError: A number is out of range, or a run is needed and not given, or given and not needed.

    Example:
        >>> BasisSource("path", run="runs/baselines/seed_everything-{seed}", k=2).kind
        'path'
    """

    kind: Literal["path", "theta0", "blocks", "rank_one", "isotropic"] = "path"
    run: str | None = None
    k: int = 2
    pattern: str | None = None
    until: int | None = None
    centred: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError(f"a basis of {self.k} directions: give k 1 or more")
        if self.run is None and self.kind in _OF_A_RUN:
            raise UserError(f"a basis of kind {self.kind} comes from a recorded run: give the folder, run")
        if self.run is not None and (self.kind == "isotropic" or self.pattern is not None):
            raise UserError("a basis takes its weights from run or from pattern; isotropic ones are of all weights")

    def build(self, module: nn.Module) -> Basis:
        """Make the directions, in float32, on the device of the module's weights.

        Raises:
            UserError: The run has no snapshots, or they are of another model, or the path names a `{seed}` or
                something of the data that is not known.
        """
        device = next(module.parameters()).device
        folder = None if self.run is None else _folder(self.run, module)
        selection = (
            ParameterSelection.of(module, self.pattern or "")
            if folder is None
            else recorded_selection(folder / SNAPSHOT_FOLDER)
        )
        selection.parameters(module)  # raises where the module does not have them
        # On the host, so that a GPU has the same directions.
        generator = torch.Generator().manual_seed(draw_seed(self.seed))
        if folder is None or self.kind not in _OF_A_RUN:
            make = subspace.rank_one if self.kind == "rank_one" else subspace.isotropic
            return make(selection, self.k, generator).to(device, torch.float32)
        files = SnapshotFolder(folder / SNAPSHOT_FOLDER, selection)
        if self.kind == "theta0":
            return subspace.own_directions(files.read(0)).to(device, torch.float32)
        path = Trajectory.load(folder / TRAJECTORY_FILE)
        path = path if self.until is None else path.until(self.until)
        basis = subspace.of_run(files, path, self.k, device, centred=self.centred)
        basis = basis if self.kind == "path" else subspace.random_like(basis, generator)
        return basis.to(device, torch.float32)


def _folder(run: str, module: nn.Module) -> Path:
    """Put this run's seed, and what its data module says of itself, into the name of another run's folder."""
    data = getattr(getattr(module, "_trainer", None), "datamodule", None)

    def value(name: re.Match[str]) -> str:
        attribute = os.environ.get(_GLOBAL_SEED) if name[1] == "seed" else getattr(data, name[1], None)
        if attribute is None:
            remedy = "call seed_everything" if name[1] == "seed" else "its data have none of that name"
            raise UserError(f"the basis of {run} asks for a {name[1]}: {remedy}, or name the folder itself")
        return _NOT_IN_NAMES.sub("-", str(attribute))

    return Path(_NAMED.sub(value, run))


def draw_seed(*numbers: int) -> int:
    """Seed for a generator of random directions, from some numbers and the run's `seed_everything`."""
    entropy = [number % 2**64 for number in (*numbers, int(os.environ.get(_GLOBAL_SEED, 0)))]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
