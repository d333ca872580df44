"""The runs of a sweep's points: where each lies, how far it is, and the command that begins it or takes it up again.

All state is in the run folders. A point that a process works on is locked for as long as that process lives, so that
two sweeps, agents or jobs never train one point at a time; a lock needs no cleaning up after a crash.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mini_gpt_pl.atomic import write_text
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.runs.folder import OUTCOME, Run
from mini_gpt_pl.runs.record import RECORD as RUN_RECORD
from mini_gpt_pl.runs.record import read_record
from mini_gpt_pl.sweep.grid import Point, Sweep

RECORD = "point.json"
_LOCK = ".lock"

State = Literal["new", "running", "broken off", "failed", "finished", "diverged"]


@dataclass(frozen=True)
class Record:
    """The record of its point in a run folder.

    Args:
        parameters: Of the point, by dotted key.
        command: The sweep's template and, behind it, what was given after `--`.
        seconds: Wall-clock time spent on it, over all of its starts.
        failure: Why the last start ended, if it failed.
    """

    parameters: dict[str, Any]
    command: list[str]
    seconds: float = 0.0
    failure: str | None = None

    def write(self, folder: Path) -> None:
        """Write the record into a folder, atomically."""
        write_text(folder / RECORD, json.dumps(asdict(self), indent=1) + "\n")


@dataclass(frozen=True)
class Call:
    """How a sweep was called.

    Args:
        sweep: The sweep.
        root: Folder of its runs.
        extras: Options behind `--`, for every run.
        options: Options of the sweep that hold for a point run elsewhere too.
    """

    sweep: Sweep
    root: Path
    extras: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    @property
    def runs(self) -> list[PointRun]:
        """The runs of all points."""
        return [PointRun(point, self) for point in self.sweep.points]

    def arguments(self, point: str) -> list[str]:
        """The arguments behind the program that run one point."""
        own = ["sweep", str(self.sweep.path), "--root", str(self.root), "--point", point, *self.options]
        return [*own, *(["--", *self.extras] if self.extras else [])]


@dataclass(frozen=True)
class PointRun:
    """A point and the folder that its run lies in."""

    point: Point
    call: Call

    @property
    def name(self) -> str:
        """Name of the point and of its folder."""
        return self.point.name

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.call.root / self.name

    @property
    def log(self) -> Path:
        """The output of the run, over all of its starts."""
        return self.call.root / f"{self.name}.log"

    @property
    def run(self) -> Run:
        """The run, read afresh."""
        return Run(self.folder)

    @property
    def wanted(self) -> Record:
        """The record of a run that is about to begin."""
        parameters = json.loads(json.dumps(self.point.parameters, default=str))
        return Record(parameters, [*self.call.sweep.command, *self.call.extras])

    @property
    def record(self) -> Record | None:
        """The record in the folder."""
        return read_record(Record, self.folder / RECORD)

    @property
    def state(self) -> State:
        """How far the run is, from its folder alone."""
        if self.locked():
            return "running"
        if outcome := self.run.outcome:
            return outcome.state
        record = self.record
        if record is not None and record.failure is not None:
            return "failed"
        return "broken off" if self.run.exists else "new"

    def conflict(self) -> str | None:
        """Say why the folder's run is not that of this point; None if it is, or if nothing would be lost."""
        run = self.run
        if run.outcome is None and not run.checkpoints:
            return None
        record, wanted = self.record, self.wanted
        if record is None:
            return f"{self.folder} holds a run that no sweep began: move it away, or give the sweep another --root"
        if (change := _difference(record, wanted)) is None:
            return None
        return f"{self.folder} was run with other options ({change}): move it away, or give the sweep another --root"

    @property
    def first_command(self) -> list[str]:
        """The command line that begins the run in an empty folder."""
        return [*self.call.sweep.expand(self.point.options), *self.call.extras, f"--run_dir={self.folder}"]

    def command(self, *, afresh: bool = False) -> list[str]:
        """The command line that begins the run, resumes it from its last checkpoint or, `afresh`, replaces it."""
        run = self.run
        last = next(reversed(run.checkpoints.values()), None)
        if last is not None and not afresh:
            return [sys.executable, *self.call.sweep.program, "fit", f"--ckpt_path={last}"]
        return [*self.first_command, *(["--overwrite=true"] if run.exists else [])]

    # --------------------------------------------------------------------------------------------- the record

    def begin(self, *, afresh: bool = False) -> None:
        """Record in the folder that a run begins or goes on."""
        before = self.record
        goes_on = before is not None and self.run.checkpoints and not afresh
        (replace(before, failure=None) if before is not None and goes_on else self.wanted).write(self.folder)
        if afresh:
            for name in (OUTCOME, RUN_RECORD):  # or a start that fails at once would look ended
                (self.folder / name).unlink(missing_ok=True)

    def end(self, seconds: float, failure: str | None) -> None:
        """Record the seconds that a start took and, if it failed, the reason."""
        record = self.record or self.wanted
        replace(record, seconds=round(record.seconds + seconds, 3), failure=failure).write(self.folder)

    # ----------------------------------------------------------------------------------------------- the lock

    def lock(self) -> int | None:
        """Make the folder and lock it.

        Returns:
            A file descriptor that holds the lock, also in a process that inherits it, until all copies are closed;
            None if another process has the lock.

        Raises:
            UserError: The folder cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            held = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be made ({error.strerror}): choose another --root") from None
        for _ in range(3):  # somebody may be looking whether it is locked
            if _flock(held):
                return held
            time.sleep(0.05)
        os.close(held)
        return None

    def locked(self) -> bool:
        """Whether a process is at work on the point."""
        try:
            probe = os.open(self.folder / _LOCK, os.O_RDONLY)
        except OSError:
            return False
        try:
            return not _flock(probe, fcntl.LOCK_SH)
        finally:
            os.close(probe)


def _flock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks: nobody can hold one
    return True


def _difference(was: Record, now: Record) -> str | None:
    """Return the first thing that changed, in short; None if both ask for one and the same run."""
    for key in {**was.parameters, **now.parameters}:
        old, new = was.parameters.get(key, "nothing"), now.parameters.get(key, "nothing")
        if old != new:
            return f"{key} was {_short(old)} and is now {_short(new)}"
    if was.command == now.command:
        return None
    both = ((was.command, now.command), (now.command, was.command))
    old, new = (" ".join(word for word in a if word not in b) or "nothing else" for a, b in both)
    return f"its command had {_short(old)} and now has {_short(new)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
