"""The names that classes had in configurations of earlier versions, which open as the same classes.

A kept `config.yaml` may say `class_path: callbacks.TrajectoryRecorder` or `mini_gpt_pl.optim.SGDW`. While the command
line runs, each such module is a stand-in that hands on what the class's own module has, so that no file is loaded a
second time under its old name.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

_ROOMS = {
    "curvature": ("commutator", "fisher", "two_steps"),
    "directions": ("axes", "steering", "subspace", "subspace_nulls"),
    "optimizer": ("counterfactual", "displacement", "moments", "predictions"),
    "path": (
        *("centred", "growth", "innovations", "leading", "nulls", "pca", "phases", "rebuild", "resampled", "rows"),
        *("sketch", "snapshots", "surrogates", "switching", "trajectory", "windows"),
    ),
    "vectors": ("alignment", "files", "free_weights", "products", "selection", "staging"),
}
MODULES = {
    **{
        f"mini_gpt_pl.geometry.{name}": f"mini_gpt_pl.geometry.{room}.{name}"
        for room in _ROOMS
        for name in _ROOMS[room]
    },
    "callbacks": "mini_gpt_pl.callbacks",
    "mini_gpt_pl.logs": "mini_gpt_pl.runs.logs",
    "mini_gpt_pl.one_sum": "mini_gpt_pl.training.one_sum",
    "mini_gpt_pl.optim": "mini_gpt_pl.training.optimizers",
    "mini_gpt_pl.gpt": "mini_gpt_pl.stories.gpt",
    "mini_gpt_pl.module": "mini_gpt_pl.stories.module",
    "mini_gpt_pl.objective": "mini_gpt_pl.stories.objective",
    "mini_gpt_pl.reheating": "mini_gpt_pl.stories.reheating",
    "mini_gpt_pl.data": "mini_gpt_pl.stories.data",
    "mini_gpt_pl.data.corpus": "mini_gpt_pl.stories.data.corpus",
    "mini_gpt_pl.data.datamodule": "mini_gpt_pl.stories.data.datamodule",
    "mini_gpt_pl.data.probe": "mini_gpt_pl.stories.data.probe",
    "mini_gpt_pl.grokking": "mini_gpt_pl.arithmetic",
    **{
        f"mini_gpt_pl.grokking.{name}": f"mini_gpt_pl.arithmetic.{name}"
        for name in ("data", "encoder", "fourier_probe", "markers", "milestones", "module", "multitask", "tied_norm")
    },
}
"""Former module names, and where their classes are now."""

CLASSES = {"callbacks.RoutingProbe": "mini_gpt_pl.arithmetic.routing_probe.RoutingProbe"}
"""Classes that moved out of a module which is still there under another name."""


class _FormerModule(ModuleType):
    """Hands on the attributes of a module under a former name of it; it is no package, so nothing loads from it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        module, _, attribute = name_now(f"{self.__name__}.{name}").rpartition(".")
        return getattr(import_module(module), attribute)


def name_now(name: str) -> str:
    """The dotted name that a class has now; as it is where it never had another, or a reader's module has that name."""
    module, _, attribute = name.rpartition(".")
    if module not in MODULES or _is_a_readers_own(module):
        return name
    return CLASSES.get(name, f"{MODULES[module]}.{attribute}")


def install() -> None:
    """Let former names be imported in this process; a module of the reader's own that has such a name wins."""
    for name in MODULES:
        if name not in sys.modules and not _is_a_readers_own(name):
            sys.modules[name] = _FormerModule(name)


def _is_a_readers_own(name: str) -> bool:
    """Whether another package is installed under a former name; this project's own folder of callbacks is none."""
    if name.startswith("mini_gpt_pl.") or isinstance(sys.modules.get(name), _FormerModule):
        return False
    spec = find_spec(name)
    if spec is None:
        return False
    ours = Path(import_module(MODULES[name]).__file__ or "").resolve()
    return spec.origin is None or Path(spec.origin).resolve() != ours
