"""Snapshot files: one safetensors file per snapshot, holding theta_0 or an increment, tensor by tensor."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.selection import ParameterSelection, Vector
from mini_gpt_pl.geometry.trajectory import read_tensors, write_tensors

_FORMAT = "mini_gpt_pl snapshot 1"
_NAME = re.compile(r"step_(\d{9})\.safetensors")


class SnapshotFolder:
    """A folder of snapshot files, written on one side thread so that training does not wait for the disk.

    Args:
        path: The folder; made when the first snapshot is written.
        selection: Owner of the coordinates' order; a file of another selection is refused.
    """

    def __init__(self, path: Path, selection: ParameterSelection) -> None:
        self.path = path
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
            UserError: The file is missing, corrupt, or of another model or selection.
        """
        path = self.file(step)
        tensors, meta = read_tensors(path, f"snapshot of step {step}")
        if meta.get("fingerprint") != self.selection.fingerprint or set(tensors) != set(self.selection.names):
            raise UserError(
                f"the snapshot {path} belongs to another model or weight pattern: "
                "give the snapshot folder of the run that this model comes from"
            )
        dtypes = {tensor.dtype for tensor in tensors.values()}
        return self.selection.flatten([tensors[name] for name in self.selection.names], dtype=dtypes.pop())

    def discard_after(self, step: int) -> None:
        """Delete snapshots later than a step: what a resumed run is about to measure again."""
        for later in self.steps():
            if later > step:
                self.file(later).unlink()
