"""One training at a time writes into a run folder."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from mini_gpt_pl.errors import UserError

LOCK = ".training.lock"
_HELD: list[tuple[FileLock, Path]] = []


def hold(folder: Path) -> None:
    """Take a run folder for this process until `release`; the folder is made if it is missing.

    The lock is the operating system's, so that it ends with the process, however that ends: a file that a killed run
    has left behind locks nothing.

    Raises:
        UserError: Another process trains there.
    """
    lock = FileLock(folder / LOCK, thread_local=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{folder} is being trained by another process: wait for its end, stop it, or give another --run_dir"
        ) from None
    except OSError as error:
        raise UserError(f"{folder} cannot be a run folder ({error.strerror}): choose another --run_dir") from None
    _HELD.append((lock, folder / LOCK))


def release() -> None:
    """Give back every folder that this process holds."""
    while _HELD:
        lock, file = _HELD.pop()
        file.unlink(missing_ok=True)  # before it is given back: another process may take it at once
        lock.release()
