"""Run the tests that train under every instruction set that the CPU at hand can emulate.

    python -m benchmarks.instruction_sets                      # the tests that train, one thread
    python -m benchmarks.instruction_sets --all --workers 2    # the whole suite
    python -m benchmarks.instruction_sets --settings avx2 --threads 1 2 -- -k grokking

Sums are taken in another order by each instruction set, so that a training, which is chaotic, takes another path. A
test must hold on all of them. PyTorch, oneDNN and MKL read the set from the environment, and each test run gets its
own; an AMD EPYC obeyed `MKL_CBWR=COMPATIBLE` (the setting `compatible`) and not `MKL_ENABLE_INSTRUCTIONS`. A table says
how many tests passed, failed and were skipped; the failed ones are named below it, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Poorest first. A CPU with one set has those before it too.
SETTINGS: dict[str, dict[str, str]] = {
    "default": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
}
# Whatever the CPU has, with the branch of MKL that all CPUs share.
COMPATIBLE = {"MKL_CBWR": "COMPATIBLE"}
_VARIABLES = {name for values in (*SETTINGS.values(), COMPATIBLE) for name in values}

# Statuses of pytest that leave results: all passed, some failed.
_WITH_RESULTS = (0, 1)


@dataclass(frozen=True)
class Result:
    """What one run of the tests gave.

    Attributes:
        setting: Its name, with the number of threads.
        passed: Number of tests.
        failed: Their names; errors in fixtures are among them.
        skipped: Number of tests.
        seconds: On the clock.
        status: Pytest's own exit status: with one above 1 it has come to no result.
    """

    setting: str
    passed: int
    failed: tuple[str, ...]
    skipped: int
    seconds: float
    status: int

    @property
    def sound(self) -> bool:
        """Whether tests ran and none failed."""
        return self.status == 0 and self.passed > 0 and not self.failed


def environment(setting: Mapping[str, str], threads: int = 1) -> dict[str, str]:
    """This process's environment with a setting's variables in place of those that it may have."""
    kept = {name: value for name, value in os.environ.items() if name not in _VARIABLES}
    return {**kept, **setting, "OMP_NUM_THREADS": str(threads), "WANDB_MODE": "offline"}


def capability(setting: Mapping[str, str]) -> str:
    """Ask PyTorch, in a process of its own, which instruction set it uses under a setting.

    Raises:
        subprocess.CalledProcessError: PyTorch cannot be imported.
    """
    question = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    done = subprocess.run(
        [sys.executable, "-c", question], env=environment(setting), check=True, capture_output=True, text=True
    )
    return done.stdout.strip().lower()


def emulable(own: str) -> dict[str, dict[str, str]]:
    """The settings of a CPU by its best capability: those up to it, and MKL's common branch.

    A capability that is not among `SETTINGS` (another architecture) is left as it is, under its own name.

    Examples:
        >>> list(emulable("avx2"))
        ['default', 'avx2', 'compatible']
        >>> list(emulable("sve256"))
        ['sve256']
    """
    if own not in SETTINGS:
        return {own: {}}
    names = list(SETTINGS)[: list(SETTINGS).index(own) + 1]
    return {**{name: SETTINGS[name] for name in names}, "compatible": COMPATIBLE}


def run_tests(name: str, setting: Mapping[str, str], threads: int, options: Sequence[str]) -> Result:
    """Run pytest in the repository under a setting.

    Args:
        name: Of the setting.
        setting: Environment variables.
        threads: Of each process.
        options: Of pytest.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.xml"
        begun = time.perf_counter()
        command = [sys.executable, "-m", "pytest", f"--junitxml={file}", *options]
        status = subprocess.run(command, cwd=ROOT, env=environment(setting, threads)).returncode
        seconds = time.perf_counter() - begun
        passed, failed, skipped = counts(file.read_text()) if file.is_file() else (0, (), 0)
    words = "1 thread" if threads == 1 else f"{threads} threads"
    return Result(f"{name}, {words}", passed, failed, skipped, seconds, status)


def counts(results: str) -> tuple[int, tuple[str, ...], int]:
    """Read pytest's JUnit file: the number of passed tests, the names of failed ones, the number of skipped ones.

    A test that passes and whose fixture fails behind it is listed twice there; it counts as failed.
    """
    outcomes: dict[str, str] = {}
    for case in ElementTree.fromstring(results).iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        if outcomes.get(name) != "failed":
            outcomes[name] = outcome
    found = list(outcomes.values())
    failed = tuple(name for name, outcome in outcomes.items() if outcome == "failed")
    return found.count("passed"), failed, found.count("skipped")


def table(results: Iterable[Result]) -> str:
    """A Markdown table, and below it the names of failed tests."""
    lines = ["| setting | passed | failed | skipped | seconds |", "|---|---|---|---|---|"]
    names = []
    for result in results:
        numbers = (result.passed, len(result.failed), result.skipped, round(result.seconds))
        lines.append(f"| {result.setting} | {' | '.join(map(str, numbers))} |")
        names += [f"failed under {result.setting}: {name}" for name in result.failed]
        if result.status not in _WITH_RESULTS:
            names.append(f"pytest ended with status {result.status} under {result.setting}")
    return "\n".join([*lines, "", *names]) if names else "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tests under each setting, print the table, and return the exit status: 0 if all passed, else 1.

    Args:
        arguments: Of the command line; this process's if None. What stands behind `--` goes to pytest.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    at = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="the whole suite instead of the tests that train")
    parser.add_argument("--settings", nargs="+", help="some of those that the CPU can emulate (default: all of them)")
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="numbers of threads, one run each")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the tests (pytest-xdist)")
    args = parser.parse_args(given[:at])

    own = capability({})
    known = emulable(own)
    chosen: list[str] = args.settings or list(known)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        parser.error(f"this CPU ({own}) cannot emulate {', '.join(unknown)}: choose from {', '.join(known)}")
    for name in chosen:
        expected, found = known[name].get("ATEN_CPU_CAPABILITY", own), capability(known[name])
        if found != expected:
            parser.error(f"PyTorch uses {found} where the setting {name} asks for {expected}")

    options = [] if args.all else ["-m", "trains"]
    if args.workers > 1:
        options += ["-n", str(args.workers), "--dist", "loadfile", "--no-loadscope-reorder"]
    results = []
    for name, threads in itertools.product(chosen, args.threads):
        print(f"{name}, threads: {threads}", flush=True)
        results.append(run_tests(name, known[name], threads, [*options, *given[at + 1 :]]))
    print(table(results))
    return 0 if all(result.sound for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
