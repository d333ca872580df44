"""The tasks that the command line trains: for each a LightningModule, its data, and what one tells the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.pytorch import LightningDataModule, LightningModule

from mini_gpt_pl.errors import UserError

TaskName = Literal["stories", "operations", "multitask", "markers"]


@dataclass(frozen=True)
class Task:
    """What `fit` builds for a task.

    Args:
        model: Dotted path of the LightningModule; its module has the settings of its optimizer, `ADAMW`.
        data: Dotted path of the LightningDataModule.
        from_data: Attributes of the data that the model takes over.
        from_seed: Options that are always `seed_everything`.
        without: Commands with a trainer that the task does not have.
    """

    model: str
    data: str
    from_data: tuple[str, ...]
    from_seed: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    @property
    def model_class(self) -> type[LightningModule]:
        """The LightningModule."""
        found: type[LightningModule] = _at(self.model)
        return found

    @property
    def data_class(self) -> type[LightningDataModule]:
        """The LightningDataModule."""
        found: type[LightningDataModule] = _at(self.data)
        return found

    @property
    def optimizer(self) -> dict[str, Any]:
        """The optimizer that the module has by default, which is a function there, as a configuration names it."""
        settings = import_module(self.model.rpartition(".")[0]).ADAMW
        return {"class_path": "torch.optim.AdamW", "init_args": dict(settings)}


def _at(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


_FROM_DATA = ("vocab_size", "classes", "length", "causal")
_ENCODER = {
    "model": "mini_gpt_pl.grokking.module.ResidueClassifier",
    "from_data": _FROM_DATA,
    "from_seed": ("model.seed", "data.seed"),
    "without": ("predict", "reheat"),
}
TASKS: Mapping[TaskName, Task] = {
    "stories": Task(
        "mini_gpt_pl.module.ProbedGPT", "mini_gpt_pl.data.datamodule.ProbedStories", ("vocab_size", "context")
    ),
    "operations": Task(data="mini_gpt_pl.grokking.data.ModularArithmetic", **_ENCODER),  # type: ignore[arg-type]
    "multitask": Task(
        **{
            **_ENCODER,
            "model": "mini_gpt_pl.grokking.multitask.MultiTaskClassifier",
            "from_data": (*_FROM_DATA, "tasks"),
        },  # type: ignore[arg-type]
        data="mini_gpt_pl.grokking.multitask.MultiTaskArithmetic",
    ),
    "markers": Task(data="mini_gpt_pl.grokking.data.MarkerSums", **_ENCODER),  # type: ignore[arg-type]
}


def task_named(args: Sequence[str]) -> TaskName:
    """Find the task in a command line before it is parsed, since the options depend on it.

    The last one counts, in an option or in a configuration file, as for every option; without any it is `stories`.

    Args:
        args: The command line, without the program's name.

    Raises:
        UserError: There is no such task.
    """
    name = "stories"
    for option, value in _options(args):
        found = value if option == "--task" else _in_config(value)
        name = name if found is None else str(found)
    if name not in TASKS:
        near = get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"give {', '.join(TASKS)}"
        raise UserError(f"there is no task {name!r}: {hint}")
    return name  # type: ignore[return-value]


def _options(args: Sequence[str]) -> list[tuple[str, str]]:
    pairs = [arg.split("=", 1) if "=" in arg else [arg, *args[i + 1 : i + 2]] for i, arg in enumerate(args)]
    return [(pair[0], pair[1]) for pair in pairs if pair[0] in ("--task", "-c", "--config") and len(pair) == 2]


def _in_config(value: str) -> Any:
    """Read the task of a configuration, a file or its text; whatever is wrong with it, the parser says better."""
    try:
        text = value if "\n" in value or not Path(value).is_file() else Path(value).read_text()
        loaded = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return loaded.get("task") if isinstance(loaded, dict) else None
