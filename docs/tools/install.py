"""Make the environment that a make target needs, and say in one line which torch it has and how large that is.

    python docs/tools/install.py .venv cli,data,wandb [-c constraints.txt] [-r tests/oracles.txt]

With uv where there is one, else with pip. On a machine without a GPU torch comes from its own index of builds for CPUs,
where that answers within seconds, else it is whatever the package index has: on Linux that may be gigabytes of CUDA.
Nothing but Python is needed to run this.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path

CPU_BUILDS = "https://download.pytorch.org/whl/cpu"
SECONDS = 5.0
# What comes with torch and has no other use.
_OF_TORCH = ("torch", "torchgen", "functorch", "nvidia", "triton", "cuda")


def has_gpu() -> bool:
    """Whether a driver of NVIDIA or AMD answers."""
    return Path("/dev/kfd").exists() or _runs("nvidia-smi", "-L")


def answers(url: str) -> bool:
    """Whether an address can be read within `SECONDS`."""
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as reply:
            return 200 <= reply.status < 300
    except (OSError, ValueError):
        return False


def gigabytes(folders: Sequence[Path]) -> float:
    """Size of the files below folders."""
    files = (file for folder in folders for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    return sum(file.stat().st_size for file in files) / 1e9


def pinned(constraints: Path | None) -> str:
    """What to ask the CPU builds for: torch, in the version that the constraints name."""
    found = re.search(r"^torch==\S+", constraints.read_text(), re.MULTILINE) if constraints else None
    return found[0] if found else "torch"


def main(args: Sequence[str] | None = None) -> None:
    """Install, and print the line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the environment, made if need be")
    parser.add_argument("extras", help="of this package, comma-separated")
    parser.add_argument("-c", "--constraints", type=Path, help="versions")
    parser.add_argument("-r", "--requirements", type=Path, help="a file of packages to install without their needs")
    given = parser.parse_args(args)
    python = given.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    uv = shutil.which("uv")
    if not _works(python):
        make = [uv, "venv", "--quiet", "--seed", "--clear", "--python", sys.executable] if uv else None
        _run(*(make or [sys.executable, "-m", "venv", "--clear"]), str(given.folder))
    install = [uv, "pip", "install", "--quiet", "--python", str(python)] if uv else None
    install = install or [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]

    source = "the package index"
    print(f"installing mini_gpt_pl[{given.extras}] into {given.folder} with {'uv' if uv else 'pip'} ...", flush=True)
    if _has_torch(python):
        source = "before"
    elif sys.platform != "darwin" and not has_gpu():
        if not answers(f"{CPU_BUILDS}/torch/"):
            source = "the package index, as torch's own index of CPU builds did not answer"
        # Alone, since the other index has few of the packages that torch needs, and those in versions of its own.
        elif _runs(*install, "--no-deps", "--index-url", CPU_BUILDS, pinned(given.constraints)):
            source = "torch's own index of CPU builds"
        else:
            source = "the package index, as torch's own index of CPU builds has none for this Python"
    limits = ["-c", str(given.constraints)] if given.constraints else []
    _run(*install, *limits, "-e", f".[{given.extras}]")
    if given.requirements:
        _run(*install, "--no-deps", "-r", str(given.requirements))

    ask = "import sysconfig, torch; print(torch.__version__, sysconfig.get_path('purelib'))"
    version, packages = _output(python, ask).split(maxsplit=1)
    inside = [path for path in Path(packages).iterdir() if path.name.split("-")[0].split("_")[0] in _OF_TORCH]
    print(f"torch {version} ({gigabytes(inside):.1f} GB) from {source}; {gigabytes([given.folder]):.1f} GB in all")


def _works(python: Path) -> bool:
    return python.exists() and _runs(str(python), "-c", "pass")


def _has_torch(python: Path) -> bool:
    return _output(python, "from importlib.util import find_spec; print(find_spec('torch') is not None)") == "True"


def _output(python: Path, script: str) -> str:
    return subprocess.run([str(python), "-c", script], capture_output=True, text=True, check=True).stdout.strip()


def _runs(*words: str) -> bool:
    try:
        return subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def _run(*words: str) -> None:
    if (status := subprocess.run(words).returncode) != 0:
        raise SystemExit(status)


if __name__ == "__main__":
    main()
