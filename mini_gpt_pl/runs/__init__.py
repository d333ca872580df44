"""Run folders: what a run writes, and how it is read again."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name == "Run":  # where 0.1.0 had it; tabulating takes pandas
        return import_module("mini_gpt_pl.runs.folder").Run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
