"""The directions of a whole run as vectors, in one pass over its snapshot files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry import fisher, switching
from mini_gpt_pl.geometry.selection import ParameterSelection, Vector
from mini_gpt_pl.geometry.snapshots import SnapshotFolder
from mini_gpt_pl.runs import Run

SWITCH = "switch"


class Snapshots(Protocol):
    """Where the rows (theta_0, d_1, ..., d_T) come from, one at a time."""

    def read(self, step: int) -> Vector:
        """Return the row of one snapshot."""
        ...


class Segment(NamedTuple):
    """A switch, by the steps of the snapshots at its ends: v_sw ~ theta(peak) - theta(trough)."""

    peak: int
    trough: int


def combine(
    steps: Sequence[int],
    rows: Snapshots,
    coefficients: Mapping[str, Float[Tensor, "G n"]],
    selection: ParameterSelection,
    device: torch.device,
) -> dict[str, Vector]:
    """Turn directions given by coefficients, one set per group, into flat float32 vectors, all in one pass.

    A row is read, added to every direction that holds it, and dropped: as many vectors of D values are held as there
    are directions, and one row.

    Args:
        steps: Of the snapshots, in the order of the coefficients.
        rows: Gives each snapshot's row.
        coefficients: Over (theta_0, d_1, ..., d_T), by name.
        selection: Owner of the coordinates' order.
        device: Where the directions are kept.

    Raises:
        UserError: A snapshot is missing, corrupt or of another model.
    """
    vectors = {
        name: Vector(torch.zeros(selection.dim, dtype=torch.float32, device=device), selection) for name in coefficients
    }
    for position, step in enumerate(steps):
        row = rows.read(step)
        selection.accept(row.selection)
        values = row.values.to(device).float()
        del row
        for name, vector in vectors.items():
            for span, weight in zip(selection.slices, coefficients[name][:, position].tolist(), strict=True):
                if weight:
                    vector.values[span].add_(values[span], alpha=weight)
    return vectors


def whole_run_axes(run: Run, selection: ParameterSelection, device: torch.device) -> dict[str, fisher.Axis]:
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
    coefficients = fisher.path_coefficients(trajectory, segments)
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
    vectors = combine(trajectory.steps, folder, own | apart, selection, device)
    return {name: fisher.Axis.of(vectors[name], vectors.get(f"{name}/whole", vectors[name])) for name in own}


def switch_of(run: Run) -> Segment | None:
    """Return the first switch of p_ood, peak and trough each at the snapshot there or last before.

    None where p_ood has no switch, or none between two different snapshots.
    """
    steps = run.trajectory.steps
    for switch in switching.switches(events_of(run)):
        if (stretch := switching.interval_of(switch, steps)) is not None:
            return Segment(steps[stretch.first], steps[stretch.last])
    return None


def events_of(run: Run) -> list[switching.Event]:
    """Peaks and troughs of p_ood, of a prominence of 0.03 (protocol of the paper); none if it was not measured."""
    series = run.series("probe/p_ood")
    return switching.events([int(step) for step in series.index], [float(value) for value in series])
