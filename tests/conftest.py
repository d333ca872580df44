"""Shape checks at run time for the numerics, and the builders that several test files share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from scripts import ROOMS

sys.path.extend(room for room in ROOMS if room not in sys.path)
os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import config as jaxtyping_config
from jaxtyping import install_import_hook

# Before anything imports the package: jaxtyping rewrites modules as they load. The model is left out, as the checks
# break the graph that `torch.compile` makes of it, and so are Triton's kernels, whose compiler reads their source and
# the names of their module.
_PACKAGE = Path(__file__).parents[1] / "mini_gpt_pl"
_NUMERICS = [
    f"mini_gpt_pl.{room}.{file.stem}"
    for room in ("arithmetic", "geometry")
    for file in sorted((_PACKAGE / room).glob("[a-z]*"))
    if file.stem not in ("study", "kernels")
]
install_import_hook(["mini_gpt_pl.stories.objective", *_NUMERICS], "beartype.beartype")

from collections.abc import Callable, Iterator  # noqa: E402
from contextlib import contextmanager  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from torch import Tensor  # noqa: E402

from mini_gpt_pl import main as entry  # noqa: E402
from mini_gpt_pl.errors import UserError  # noqa: E402
from mini_gpt_pl.geometry.path.rows import IncrementRows  # noqa: E402
from mini_gpt_pl.geometry.path.trajectory import Trajectory  # noqa: E402
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# Examples are derived from the test, not from a clock: a red test stays red.
settings.register_profile("suite", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("suite")

# What trains or reports whole runs: there the checks of small functions, which their own tests have met, take up
# to half of the time.
_WHOLE_RUNS = (
    "test_dashboard",
    "test_experiments",
    "test_grokking_cli",
    "test_grokking_report",
    "test_grokking_run",
    "test_intervention_arms",
    "test_report_page",
    "test_zoo_cuda",  # where the compiler reads whatever a step runs through
    "test_zoo",  # and the checks draw from Python's random state, which this file compares
)


# A test file that trains has one of these in its own names: `-m trains` selects all tests of such files.
_TRAINERS = {"quiet_trainer", "Trainer", "GeometryTrainer", "run_in_full", "run_script", "cli", "execute"}


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of files that train, for `benchmarks.instruction_sets`."""
    for item in items:
        if isinstance(item, pytest.Function) and not _TRAINERS.isdisjoint(vars(item.module)):
            item.add_marker("trains")


@pytest.fixture(scope="module", autouse=True)
def _shape_checks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check shapes at run time, but not in what trains and reports whole runs."""
    jaxtyping_config.update("jaxtyping_disable", request.module.__name__.rpartition(".")[2] in _WHOLE_RUNS)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


# Two groups of unequal size, three weights: D = 6 + 9.
SMALL = ParameterSelection(("a.w", "b.w", "b.v"), ((2, 3), (5,), (2, 2)), ("a", "b", "b"))


def flat_selection(dim: int) -> ParameterSelection:
    """One weight, one group."""
    return ParameterSelection(("w",), ((dim,),), ("all",))


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal values in float64, a pure function of shape and seed."""
    return torch.from_numpy(np.random.Generator(np.random.Philox(key=seed)).standard_normal(shape))


def bent_path(snapshots: int, dim: int, seed: int = 0) -> Tensor:
    """Weights (snapshots, dim) of a walk with a drift, neither a line nor pure chance, in float64."""
    return normal(snapshots, dim, seed=seed).cumsum(0) + torch.arange(snapshots)[:, None] * normal(dim, seed=seed + 1)


def basis_of(weights: Tensor) -> Tensor:
    """theta_0 above the increments."""
    return torch.cat([weights[:1], weights.diff(dim=0)])


def gram_of(weights: Tensor) -> Tensor:
    """H by brute force."""
    basis = basis_of(weights)
    return basis @ basis.T


def walk_gram(increments: int) -> Tensor:
    """H of a random walk in the limit of many dimensions: orthogonal increments of one length."""
    return torch.eye(increments + 1, dtype=torch.float64)


def record(
    selection: ParameterSelection, weights: Tensor, dtype: torch.dtype | None = None
) -> tuple[IncrementRows, Trajectory]:
    """Follow weights (n, D) as a run would, a snapshot every hundred steps."""
    rows, trajectory = IncrementRows(selection, dtype or weights.dtype), Trajectory.empty(selection)
    for k, values in enumerate(weights):
        new = rows.increment(Vector(values, selection))
        trajectory.append(100 * k, rows.dots(new), survival=0.9**k)
        rows.push(new)
    return rows, trajectory


@contextmanager
def one_line_error(match: str, kind: type[UserError] = UserError) -> Iterator[None]:
    """Expect an error for the user, on one line."""
    with pytest.raises(kind, match=match) as caught:
        yield
    assert len(str(caught.value).splitlines()) == 1


Command = Callable[..., str]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `mini_gpt_pl ...` in this process and return what it printed."""

    def run(*args: str) -> str:
        monkeypatch.setattr(sys, "argv", ["mini_gpt_pl", *args])
        capsys.readouterr()
        entry.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def mistake(command: Command, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command that must end with status 2 and one line, and return the line."""

    def run(*args: str) -> str:
        with pytest.raises(SystemExit) as caught:
            command(*args)
        lines = capsys.readouterr().err.splitlines()
        assert caught.value.code == 2
        assert not any("Traceback" in line for line in lines)
        assert [line for line in lines if "error:" in line] == lines[-1:], lines
        assert lines[-1].startswith("mini_gpt_pl: error: ")
        return lines[-1]

    return run
