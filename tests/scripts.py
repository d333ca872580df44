"""Scripts in processes of their own, for tests of several ranks; imports nothing that takes long."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Where scripts, and tests of one room that use another's, find test files by name.
ROOMS = [str(ROOT / "tests"), *sorted(str(room) for room in (ROOT / "tests").iterdir() if room.is_dir())]


def run_script(script: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a folder, on as many threads as the tests; Lightning starts it again for each further rank.

    Args:
        script: Its text.
        folder: Where it is written to; its first argument.
        words: Its other arguments.
    """
    file = folder / "script.py"
    file.write_text(script)
    path = os.pathsep.join([str(ROOT), *ROOMS, os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    command = [sys.executable, str(file), str(folder), *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)


def run_in_full(script: str, folder: Path, *words: str) -> None:
    """Run a script, and see that it comes to its end."""
    done = run_script(script, folder, *words)
    assert done.returncode == 0, done.stderr[-5000:]
