"""Run points on this machine: as many at once as there are GPUs, or as asked for."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import NoReturn

from mini_gpt_pl.sweep.points import PointRun, State
from mini_gpt_pl.sweep.progress import Display

PATIENCE = 30.0
"""Seconds that a run gets to end in order when the sweep is interrupted."""

_POLL = 0.2
_DEVICE, _THREADS = "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"
# The line of a log that says what went wrong: an error of this package, or the end of a traceback.
_COMPLAINT = re.compile(r"^\S+: error: |^[\w.]*(Error|Exception|Interrupt|Killed)\b")


def visible_devices() -> list[str]:
    """Return the GPUs that a run may be given, without initialising CUDA in this process."""
    visible = os.environ.get(_DEVICE)
    if visible is not None and visible.strip() in ("", "-1"):
        return []
    count = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    done = subprocess.run(count, capture_output=True, text=True, check=False)
    n = int(done.stdout) if done.returncode == 0 else 0
    return visible.split(",")[:n] if visible is not None else [str(i) for i in range(n)]


def slots(jobs: int | None, devices: Sequence[str]) -> list[dict[str, str]]:
    """The places for runs on this machine, each as the environment variables of its runs.

    Args:
        jobs: Runs at a time; None for one a GPU, or one where there is none.
        devices: GPUs; with more runs than GPUs they are dealt out in turn. Without any the runs share the cores.
    """
    if devices:
        return [{_DEVICE: devices[i % len(devices)]} for i in range(jobs or len(devices))]
    jobs = jobs or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [{_THREADS: os.environ.get(_THREADS, str(max(1, cores // jobs)))} for _ in range(jobs)]


class Execution:
    """A run that this process has started, and that holds the lock of its folder (descriptor `held`) as well."""

    def __init__(self, run: PointRun, slot: Mapping[str, str], held: int, *, afresh: bool) -> None:
        self.run = run
        self.slot = slot
        self._held = held
        command = run.command(afresh=afresh)
        self.resumed = bool(run.run.checkpoints) and not afresh
        run.begin(afresh=afresh)
        self._started = time.monotonic()
        with run.log.open("ab") as log:
            log.write(f"=== {datetime.now():%Y-%m-%d %H:%M:%S} {shlex.join(command)}\n".encode())
            log.flush()
            self._log_from = log.tell()
            # A session of its own: what interrupts the sweep reaches it through the sweep only.
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **slot},
                pass_fds=(held,),
                start_new_session=True,
            )

    def close(self, *, interrupted: bool = False) -> State:
        """Record how the ended process left the run, and let go of the lock."""
        try:
            failure = None if interrupted else self._failure()
            self.run.end(time.monotonic() - self._started, failure)
            outcome = self.run.run.outcome
        finally:
            os.close(self._held)
        if failure is not None:
            return "failed"
        return outcome.state if outcome else "broken off"

    def _failure(self) -> str | None:
        status, outcome = self.process.returncode, self.run.run.outcome
        if outcome is not None and (status == 0 or (status == 2 and outcome.state == "diverged")):
            return None
        complaint = _last_complaint(self.run.log, self._log_from)
        if status < 0:
            return f"killed by {signal.Signals(-status).name}{f': {complaint}' if complaint else ''}"
        return complaint or ("it ended without an outcome" if status == 0 else f"exit status {status}")


def _last_complaint(log: Path, start: int) -> str:
    with log.open("rb") as handle:
        handle.seek(max(start, log.stat().st_size - 2**16))
        text = handle.read().decode(errors="replace")
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    # Standard output is written late, when a process ends: the last line need not be the complaint.
    return next((line for line in reversed(lines) if _COMPLAINT.match(line)), lines[-1] if lines else "")


def run_all(
    runs: Sequence[PointRun], places: Sequence[Mapping[str, str]], display: Display, *, retry_diverged: bool = False
) -> list[PointRun]:
    """Run points until none is left; how each ended is in its folder.

    A point that another process works on, or has ended meanwhile, is passed over.

    Returns:
        The points that failed.

    Raises:
        KeyboardInterrupt: The sweep was interrupted or asked to end; its runs have been stopped.
    """
    waiting, free, going, failed = deque(runs), deque(places), list[Execution](), list[PointRun]()
    with _end_is_interrupt():
        try:
            while waiting or going:
                while waiting and free:
                    run = waiting.popleft()
                    execution = _begin(run, free[0], retry_diverged)
                    if execution is None:
                        display.passed(run)
                        continue
                    free.popleft()
                    going.append(execution)
                    display.begun(run, execution.slot.get(_DEVICE), resumed=execution.resumed)
                for ended in [execution for execution in going if execution.process.poll() is not None]:
                    going.remove(ended)
                    free.append(ended.slot)
                    state = ended.close()
                    failed += [ended.run] if state == "failed" else []
                    display.ended(ended.run, state)
                display.update()
                if going:
                    time.sleep(_POLL)
        finally:
            _stop(going)
    return failed


def _begin(run: PointRun, slot: Mapping[str, str], retry_diverged: bool) -> Execution | None:
    held = run.lock()
    if held is None:
        return None
    try:
        outcome = run.run.outcome
        afresh = outcome is not None and outcome.state == "diverged" and retry_diverged
        if outcome is None or afresh:
            return Execution(run, slot, held, afresh=afresh)
    except BaseException:
        os.close(held)
        raise
    os.close(held)
    return None


def _stop(going: list[Execution]) -> None:
    """End what still runs: politely first, then with everything that it has started."""
    for execution in going:
        execution.process.terminate()
    deadline = time.monotonic() + PATIENCE
    for execution in going:
        with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            execution.process.wait(max(0.0, deadline - time.monotonic()))
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(execution.process.pid, signal.SIGKILL)
        execution.process.wait()
        execution.close(interrupted=True)


@contextmanager
def _end_is_interrupt() -> Iterator[None]:
    """Treat a request to end, from a scheduler or a closed terminal, like Ctrl-C."""

    def interrupt(signum: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    try:
        before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    except ValueError:  # not the main thread: nobody can be interrupted
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
