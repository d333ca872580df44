"""The directions of a whole run as vectors, in one pass over its snapshot files."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.directions.axes import Axis, path_coefficients
from mini_gpt_pl.geometry.path.snapshots import SnapshotFolder, combine
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.switches import switches_of

SWITCH = "switch"


class Segment(NamedTuple):
    """A switch, by the steps of the snapshots at its ends: v_sw ~ theta(peak) - theta(trough)."""

    peak: int
    trough: int


def whole_run_axes(run: Run, selection: ParameterSelection, device: torch.device) -> dict[str, Axis]:
    """Build the axes of a finished run, each group's own and the whole selection's.

    Args:
        run: The run.
        selection: Of its recorded weights.
        device: Where they are to lie.

    Returns:
        `backbone` (uncentred PC1 of all drifts; the last one's coordinate is positive), `pc2` where the path has a
        second component, `theta0`, and `switch` where p_ood has a switch: theta(peak) - theta(trough) of the first.

    Raises:
        UserError: The snapshots are missing or of another model, or nothing has moved.
    """
    folder = SnapshotFolder(run.snapshot_folder, selection)
    trajectory = run.trajectory
    if missing := sorted(set(trajectory.steps) - set(folder.steps())):
        raise UserError(
            f"{run.snapshot_folder} lacks {len(missing)} of {len(trajectory)} snapshots (step {missing[0]} first): "
            "replay needs the recorded weights; restore the folder, or train with write_snapshots true"
        )
    found = switch_of(run)
    # path_coefficients subtracts the first step's weights from the second's.
    segments = {} if found is None else {SWITCH: (found.trough, found.peak)}
    coefficients = path_coefficients(trajectory, segments)
    if not coefficients:
        raise UserError(
            f"some weights of {run.path} have not moved between snapshots: there is no path to compare with"
        )
    own = {name: rows[:-1] for name, rows in coefficients.items()}
    # Where all groups and the whole have the same coefficients, they are parts of one vector.
    apart = {
        f"{name}/whole": rows[-1:].expand(len(rows) - 1, -1)
        for name, rows in coefficients.items()
        if not bool((rows == rows[-1]).all())
    }
    vectors = combine(trajectory.steps, folder.read, own | apart, selection, device)
    return {name: Axis.of(vectors[name], vectors.get(f"{name}/whole", vectors[name])) for name in own}


def switch_of(run: Run) -> Segment | None:
    """Return the first switch of p_ood, or None where it has none between two different snapshots."""
    steps = run.trajectory.steps
    return next((Segment(steps[place.first], steps[place.last]) for _, place in switches_of(run)), None)
