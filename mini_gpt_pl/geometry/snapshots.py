"""Snapshot files: one safetensors file per snapshot, holding theta_0 or an increment, tensor by tensor.

Where several ranks share the weights, each has a folder of its own beside those of the others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.selection import ParameterSelection, Vector
from mini_gpt_pl.geometry.trajectory import read_tensors, write_tensors

_FORMAT = "mini_gpt_pl snapshot 1"
_NAME = re.compile(r"step_(\d{9})\.safetensors")
_SHARD = re.compile(r"shard_1_of_(\d+)")


class SnapshotFolder:
    """A folder of snapshot files, written on one side thread so that training does not wait for the disk.

    Args:
        path: The folder; made when the first snapshot is written. A rank that has a share of the weights only uses
            `shard_<i>_of_<n>` in it.
        selection: Owner of the coordinates' order; a file of another selection is refused.
    """

    def __init__(self, path: Path, selection: ParameterSelection) -> None:
        self.root = path
        shards = selection.shards
        self.path = path if shards is None else path / f"shard_{shards.index + 1}_of_{shards.count}"
        self.selection = selection
        self._writer: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []

    def file(self, step: int) -> Path:
        """Return where the snapshot of a step lies."""
        return self.path / f"step_{step:09d}.safetensors"

    def steps(self) -> list[int]:
        """Return the steps of all snapshot files, in order."""
        found = (_NAME.fullmatch(file.name) for file in self.path.glob("step_*.safetensors"))
        return sorted(int(match.group(1)) for match in found if match)

    def write(self, step: int, row: Vector) -> None:
        """Queue a row for writing; the copy from the device happens on the side thread too."""
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, thread_name_prefix="snapshots")
        self._raise_failures(lambda pending: pending.done())
        self._pending.append(self._writer.submit(self._write, step, row))

    def _write(self, step: int, row: Vector) -> None:
        tensors = {name: part.cpu() for name, part in self.selection.unflatten(row).items()}
        meta = {"format": _FORMAT, "fingerprint": self.selection.fingerprint, "step": str(step)}
        # Clones: safetensors refuses tensors that share one storage, as the views of a flat vector do.
        write_tensors(self.file(step), {name: part.clone() for name, part in tensors.items()}, meta)

    def flush(self) -> None:
        """Wait until everything queued is on disk.

        Raises:
            UserError: A snapshot could not be written (a full disk, a folder that may not be written).
        """
        self._raise_failures(lambda pending: True)

    def _raise_failures(self, wanted: Callable[[Future[None]], bool]) -> None:
        settled = [pending for pending in self._pending if wanted(pending)]
        self._pending = [pending for pending in self._pending if pending not in settled]
        for pending in settled:
            try:
                pending.result()
            except (OSError, SafetensorError) as error:
                raise UserError(f"a snapshot could not be written to {self.path}: {error}") from None

    def close(self) -> None:
        """Write what is queued and end the side thread."""
        try:
            self.flush()
        finally:
            if self._writer is not None:
                self._writer.shutdown()
                self._writer = None

    def read(self, step: int) -> Vector:
        """Read the row of one snapshot.

        Raises:
            UserError: The file is missing, corrupt, or of another model, selection or number of ranks.
        """
        path = self.file(step)
        if not path.is_file():
            self._require_ranks()
        tensors, meta = read_tensors(path, f"snapshot of step {step}")
        if meta.get("fingerprint") != self.selection.fingerprint or set(tensors) != set(self.selection.names):
            raise UserError(
                f"the snapshot {path} belongs to another model or weight pattern: "
                "give the snapshot folder of the run that this model comes from"
            )
        shapes = [tuple(tensors[name].shape) for name in self.selection.names]
        if shapes != list(self.selection.local_shapes):
            raise UserError(f"the snapshot {path} was cut otherwise over the ranks: resume with the run's own sharding")
        dtypes = {tensor.dtype for tensor in tensors.values()}
        return self.selection.flatten([tensors[name] for name in self.selection.names], dtype=dtypes.pop())

    def _require_ranks(self) -> None:
        """Refuse a folder that another number of ranks has written."""
        found = [_SHARD.fullmatch(entry.name) for entry in self.root.glob("shard_1_of_*")]
        written = {int(match[1]) for match in found if match} | ({1} if any(self.root.glob("step_*")) else set())
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


def combine(
    steps: Sequence[int],
    read: Callable[[int], Vector],
    coefficients: Mapping[str, Float[Tensor, "G n"]],
    selection: ParameterSelection,
    device: torch.device,
) -> dict[str, Vector]:
    """Turn directions given by coefficients, one set per group, into flat float32 vectors, all in one pass.

    A row is read, added to every direction that holds it, and dropped: as many vectors of D values are held as there
    are directions, and one row.

    Args:
        steps: Of the snapshots, in the order of the coefficients.
        read: Gives the row of the snapshot of a step, as `SnapshotFolder.read` does.
        coefficients: Over (theta_0, d_1, ..., d_T), by name.
        selection: Owner of the coordinates' order.
        device: Where the directions are kept.

    Raises:
        UserError: A snapshot is missing, corrupt or of another model.
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
