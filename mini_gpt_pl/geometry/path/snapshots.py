"""Snapshot files: one safetensors file per snapshot, holding theta_0 or an increment, tensor by tensor.

Where several ranks share the weights, each has a folder of its own beside those of the others.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.geometry.vectors.files import FlatFile, Piece, write_flat
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector
from mini_gpt_pl.geometry.vectors.staging import Staging, moment

_FORMAT = "mini_gpt_pl snapshot 1"
_NAME = re.compile(r"step_(\d{9})\.safetensors")
_SHARD = re.compile(r"shard_(\d+)_of_(\d+)")


class SnapshotFolder:
    """A folder of snapshot files, written on one side thread so that training does not wait for the disk.

    The thread copies a row from the device on a stream of its own, and the trajectory's file is written behind the
    snapshots that it names. Host memory: one row where they come from a device, nothing where they are on the host. The
    folder is made when the first snapshot is written; a rank that has a share of the weights only uses
    `shard_<i>_of_<n>` in it. A file of another selection is refused. Where `limit` rows wait for the disk, `write`
    waits for the first; None for any number, for callers that keep the rows in memory anyway.
    """

    def __init__(self, path: Path, selection: ParameterSelection, limit: int | None = None) -> None:
        self.root = path
        shards = selection.shards
        self.path = path if shards is None else path / f"shard_{shards.index + 1}_of_{shards.count}"
        self.selection = selection
        self.limit = limit
        self.waited = 0.0
        """Seconds that callers of `write` have waited for the disk."""
        self._writer: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []
        self._queued: dict[int, Float[Tensor, " D"]] = {}
        self._staging = Staging()

    def file(self, step: int) -> Path:
        """Return where the snapshot of a step lies."""
        return file_of(self.path, step)

    def steps(self) -> list[int]:
        """Return the steps of all snapshot files, in order."""
        return steps_in(self.path)

    # ---------------------------------------------------------------------------------------------- writing

    @property
    def backlog(self) -> int:
        """Number of rows that are not on disk yet."""
        return len(self._queued)

    def write(self, step: int, row: Vector, survival: float = 1.0) -> None:
        """Queue a row, theta_0 or an increment on any device, for writing; it must not be changed any more.

        `survival` is the share of theta_0 that weight decay alone would have left, for `rebuild`.

        Raises:
            UserError: An earlier file could not be written.
        """
        self._raise_failures(Future.done)
        self._await_room()
        self._queued[step] = row.values
        self._submit(self._write, step, row, survival, moment(row.values))

    def write_trajectory(self, path: Path, trajectory: Trajectory) -> None:
        """Queue the trajectory's file, behind the snapshots that it names; the trajectory may grow meanwhile.

        Raises:
            UserError: An earlier file could not be written.
        """
        self._raise_failures(Future.done)
        self._submit(trajectory.until(trajectory.steps[-1]).save, path)

    def _submit(self, job: Callable[..., None], *arguments: Any) -> None:
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, thread_name_prefix="snapshots")
        self._pending.append(self._writer.submit(job, *arguments))

    def _await_room(self) -> None:
        if self.limit is None or len(self._queued) < self.limit:
            return
        begun = time.perf_counter()
        for pending in self._pending:  # in the order in which they are written
            pending.exception()
            if len(self._queued) < self.limit:
                break
        self.waited += time.perf_counter() - begun
        self._raise_failures(Future.done)

    def _write(self, step: int, row: Vector, survival: float = 1.0, ready: torch.cuda.Event | None = None) -> None:
        selection = self.selection
        meta = {
            "format": _FORMAT,
            "fingerprint": selection.fingerprint,
            "step": str(step),
            "survival": repr(survival),
            # The selection itself: with it, the files alone give the trajectory.
            "owners": json.dumps(selection.owners),
            "shapes": json.dumps(selection.shapes),
        }
        shapes = dict(zip(selection.names, selection.local_shapes, strict=True))
        write_flat(self.file(step), shapes, self._staging.fetch(row.values, ready), meta)
        self._queued.pop(step, None)

    def flush(self) -> None:
        """Wait until everything queued is on disk.

        Raises:
            UserError: A file could not be written (a full disk, a folder that may not be written).
        """
        self._raise_failures(lambda pending: True)

    def _raise_failures(self, settles: Callable[[Future[None]], bool]) -> None:
        settled = [pending for pending in self._pending if settles(pending)]
        self._pending = [pending for pending in self._pending if pending not in settled]
        for pending in settled:
            try:
                pending.result()
            except (OSError, SafetensorError) as error:
                raise UserError(f"a snapshot could not be written to {self.path}: {error}") from None

    def close(self) -> None:
        """Write what is queued and end the side thread; raises as `flush` does."""
        try:
            self.flush()
        finally:
            if self._writer is not None:
                self._writer.shutdown()
                self._writer = None

    # ---------------------------------------------------------------------------------------------- reading

    def read(self, step: int) -> Vector:
        """Read the row of one snapshot from its file.

        Raises:
            UserError: The file is missing, corrupt, or of another model, selection or number of ranks.
        """
        return Vector(StoredRow(self, step).from_file(slice(None)), self.selection)

    def stored(self, step: int) -> StoredRow:
        """Return the row of one snapshot as what is read when it is asked for, queued rows included."""
        return StoredRow(self, step)

    def _open(self, step: int) -> FlatFile:
        path, selection = self.file(step), self.selection
        if not path.is_file():
            self._require_ranks()
        file = FlatFile.open(path, f"snapshot of step {step}")
        if file.meta.get("fingerprint") != selection.fingerprint or set(file.shapes) != set(selection.names):
            raise UserError(
                f"the snapshot {path} belongs to another model or weight pattern: "
                "give the snapshot folder of the run that this model comes from"
            )
        if [file.shapes[name] for name in selection.names] != list(selection.local_shapes):
            raise UserError(f"the snapshot {path} was cut otherwise over the ranks: resume with the run's own sharding")
        return file

    def _require_ranks(self) -> None:
        """Refuse a folder that another number of ranks has written."""
        shards = [_SHARD.fullmatch(entry.name) for entry in self.root.glob("shard_1_of_*")]
        written = {int(match[2]) for match in shards if match} | ({1} if any(self.root.glob("step_*")) else set())
        ranks = 1 if self.selection.shards is None else self.selection.shards.count
        if written and ranks not in written:
            raise UserError(
                f"the snapshots in {self.root} come from weights shared by {min(written)} rank(s), "
                f"here {ranks} share(s) them: use as many ranks as the run did"
            )

    def discard_after(self, step: int) -> None:
        """Delete snapshots later than a step: what a resumed run is about to measure again."""
        for later in self.steps():
            if later > step:
                self.file(later).unlink()


class StoredRow:
    """A row of a snapshot folder that takes no memory: `row[lo:hi]` reads that part, onto the host.

    Until its file is written, parts come from the queue, wherever the row lies.
    """

    def __init__(self, folder: SnapshotFolder, step: int) -> None:
        self._folder = folder
        self._step = step
        self._file: tuple[FlatFile, list[Piece]] | None = None

    def __getitem__(self, part: slice) -> Float[Tensor, " n"]:
        """Read a part of the row.

        Raises:
            UserError: The file is missing, corrupt or of another model.
        """
        queued = self._folder._queued.get(self._step)
        return self.from_file(part) if queued is None else queued[part]

    def from_file(self, part: slice) -> Float[Tensor, " n"]:
        """Read a part of the row from its file; raises as `row[lo:hi]` does."""
        if self._file is None:
            file = self._folder._open(self._step)
            self._file = file, file.pieces(self._folder.selection.names)
        file, pieces = self._file
        first, last, _ = part.indices(self._folder.selection.local_dim)
        values = torch.empty(last - first, dtype=file.dtype)
        file.read(pieces, first, values)
        return values


def file_of(folder: Path, step: int) -> Path:
    """Return where the snapshot of a step lies in a folder."""
    return folder / f"step_{step:09d}.safetensors"


def steps_in(folder: Path) -> list[int]:
    """Return the steps of the snapshot files in a folder, in order."""
    names = (_NAME.fullmatch(file.name) for file in folder.glob("step_*.safetensors"))
    return sorted(int(match[1]) for match in names if match)


def combine(
    steps: Sequence[int],
    read: Callable[[int], Vector],
    coefficients: Mapping[str, Float[Tensor, "G n"]],
    selection: ParameterSelection,
    device: torch.device,
) -> dict[str, Vector]:
    """Turn named directions given by coefficients, one set per group, into flat float32 vectors, all in one pass.

    The row of each snapshot, in the order of the coefficients, is read as `SnapshotFolder.read` does, added to every
    direction that holds it, and dropped: as many vectors of D values are held as there are directions, and one row.
    """
    size = selection.local_dim
    vectors = {name: Vector(torch.zeros(size, dtype=torch.float32, device=device), selection) for name in coefficients}
    for position, step in enumerate(steps):
        row = read(step)
        selection.accept(row.selection)
        values = row.values.to(device).float()
        del row
        for name, vector in vectors.items():
            for span, weight in zip(selection.slices, coefficients[name][:, position].tolist(), strict=True):
                if weight:
                    vector.values[span].add_(values[span], alpha=weight)
    return vectors
