"""A trajectory out of snapshot files alone: where its own file is lost, or other groups of weights are asked for.

The files are read once, all of them together from their first value to their last. The rows' values in a range of
columns are a matrix X of one row a snapshot, and the Gram matrix is the sum of X X^T over the ranges.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.path.snapshots import file_of, steps_in
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.geometry.vectors.files import FlatFile, Piece
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, assign_groups

# Columns read at a time by a thread, 1 MiB a row, and multiplied at a time, 1.7 MB of float64 for 51 rows: the cache's.
_PART, _TILE = 1 << 18, 1 << 12
# Threads beyond the processor's, which read while the others multiply.
_READERS = 2


def rebuild(
    folder: Path,
    pattern: str | None = None,
    survival: Sequence[float] | None = None,
    steps: Sequence[int] | None = None,
) -> Trajectory:
    r"""Compute the Gram matrices of a folder of snapshots, in float64.

    Takes one pass over the files, as many float64 operations as D times the square of the snapshots, and 1 MiB of
    memory for each snapshot and thread. The trajectory is the recorder's where nothing else is asked for.

    Args:
        folder: What the recorder calls `snapshots`; of a run whose ranks shared the weights it has a folder for each.
        pattern: Cuts the weights into groups, or leaves some out, as `ParameterSelection.of` has it; as they were
            recorded for None.
        survival: Share of theta_0 that weight decay alone would have left at each snapshot; from the files for None.
        steps: Of the snapshots to take; all for None.

    Raises:
        UserError: There are no snapshots, one is missing, corrupt or of another model, or they do not say what is asked
            of them: those of older versions know neither groups nor decay.

    Example:
        >>> rebuild(Path("runs/mine/snapshots"), r"(?P<group>attn|mlp)")  # doctest: +SKIP
    """
    parts = _parts(folder)
    steps = sorted(set(steps)) if steps is not None else steps_in(parts[0])
    if not steps:
        raise UserError(f"there are no snapshots in {folder}: give the snapshots folder of a run")
    files = [[FlatFile.open(file_of(part, step), f"snapshot of step {step}") for step in steps] for part in parts]
    first = files[0][0]
    for file in (file for of_part in files for file in of_part):
        if file.meta.get("fingerprint") != first.meta.get("fingerprint") or file.shapes.keys() != first.shapes.keys():
            raise UserError(f"{file.path} and {first.path} are snapshots of different models: keep those of one run")
    selection = _selection(first, pattern)
    for file in files[0]:
        if survival is None and "survival" not in file.meta:
            raise UserError(f"{file.path} does not say what weight decay left of the initial weights: give survival")
    left = [float(file.meta["survival"]) for file in files[0]] if survival is None else list(survival)
    grams = torch.stack([gram_of_files(of_part, selection) for of_part in files]).sum(0)
    return Trajectory(selection.fingerprint, selection.groups, selection.dims, list(steps), grams, left)


def recorded_selection(folder: Path) -> ParameterSelection:
    """Read off a folder of snapshots which weights were recorded, in which groups.

    Raises:
        UserError: There are no snapshots, or they are too old to know the groups.
    """
    part = _parts(folder)[0]
    steps = steps_in(part)
    if not steps:
        raise UserError(f"there are no snapshots in {folder}: give the folder of a run that has kept them")
    return _selection(FlatFile.open(file_of(part, steps[0]), f"snapshot of step {steps[0]}"), None)


def gram_of_files(files: Sequence[FlatFile], selection: ParameterSelection) -> Float[Tensor, "G n n"]:
    """Inner products of the selected tensors in files of one rank, group by group, each value being read once.

    Raises:
        UserError: A file is gone or cut short, or its tensors have another shape than the first one's.
    """
    for file in files:
        if file.shapes != files[0].shapes:
            raise UserError(f"{file.path} and {files[0].path} are snapshots of different models: keep those of one run")
    jobs = []
    for number, group in enumerate(selection.groups):
        names = [name for name, owner in zip(selection.names, selection.owners, strict=True) if owner == group]
        columns = sum(math.prod(files[0].shapes[name]) for name in names)
        places = [file.pieces(names) for file in files]
        jobs += [(number, places, lo, min(lo + _PART, columns)) for lo in range(0, columns, _PART)]
    grams = torch.zeros(len(selection.groups), len(files), len(files), dtype=torch.float64)
    threads, local = torch.get_num_threads(), threading.local()

    def begin() -> None:
        torch.set_num_threads(1)  # two or more that shared each product would wait for one another
        local.desk = _Desk(files)

    with ThreadPoolExecutor(threads + _READERS, initializer=begin) as pool:
        try:
            # In the order of the jobs, so that the sum does not depend on which thread is faster.
            for (number, *_), part in zip(jobs, pool.map(lambda job: local.desk.gram(*job[1:]), jobs), strict=True):
                grams[number] += part
        finally:
            torch.set_num_threads(threads)
    return grams.tril() + grams.tril(-1).mT  # a product's two halves may differ by rounding


class _Desk:
    """Room for one thread's work: fresh memory for every part would cost as much time as reading it."""

    def __init__(self, files: Sequence[FlatFile]) -> None:
        self.files = files
        # theta_0 is float32 where the increments are bfloat16.
        self.runs = [(dtype, len(list(members))) for dtype, members in groupby(file.dtype for file in files)]
        self.blocks = [torch.empty(count, _PART, dtype=dtype) for dtype, count in self.runs]
        self.tile = torch.empty(len(files), _TILE, dtype=torch.float64)

    def gram(self, places: list[list[Piece]], lo: int, hi: int) -> Float[Tensor, "n n"]:
        """X X^T of columns [lo, hi)."""
        rows = [row[: hi - lo] for block in self.blocks for row in block]
        for row, file, pieces in zip(rows, self.files, places, strict=True):
            file.read(pieces, lo, row)
        total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        for at in range(0, hi - lo, _TILE):
            last = min(at + _TILE, hi - lo)
            tile = self.tile[:, : last - at]
            for part, block in zip(tile.split([count for _, count in self.runs]), self.blocks, strict=True):
                part.copy_(block[:, at:last])
            total.addmm_(tile, tile.T)
        return total


def _parts(folder: Path) -> list[Path]:
    """Folders of the ranks that shared the weights; the folder itself where none did."""
    folders = sorted(folder.glob("shard_*_of_*"))
    if not folders:
        return [folder]
    counts = {int(match[1]) for path in folders if (match := re.fullmatch(r"shard_\d+_of_(\d+)", path.name))}
    expected = [folder / f"shard_{rank + 1}_of_{max(counts)}" for rank in range(max(counts))]
    if missing := [path for path in expected if not path.is_dir()]:
        raise UserError(f"there is no {missing[0]}: the snapshots of all ranks that shared the weights are needed")
    return expected


def _selection(file: FlatFile, pattern: str | None) -> ParameterSelection:
    """The recorded selection as a file knows it, or its weights in other groups."""
    names = list(file.shapes)
    recorded = json.loads(file.meta.get("shapes", "null"))
    shapes = dict(zip(names, map(tuple, recorded), strict=True)) if recorded else file.shapes
    if pattern is not None:
        owners = assign_groups(names, pattern)
    elif "owners" in file.meta:
        owners = dict(zip(names, json.loads(file.meta["owners"]), strict=True))
    else:
        raise UserError(f"{file.path} does not say in which groups its weights were: give the recorder's pattern")
    if not owners:
        raise UserError(f"the weight pattern {pattern!r} selects none of the recorded weights, such as {names[0]}")
    return ParameterSelection(tuple(owners), tuple(shapes[name] for name in owners), tuple(owners.values()))
