"""The commands, and the list of tasks: for each, by dotted name, its module, data, commands and report.

A study lists its tasks in its folder's `tasks.yaml`. That is the only way in which the rest of the package reaches a
study, so that one can be left out as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import yaml

from mini_gpt_pl.command_line import split_options
from mini_gpt_pl.errors import UserError, did_you_mean

TRAINING = "mini_gpt_pl.training.cli"


@dataclass(frozen=True)
class Command:
    """A command of the command line.

    Args:
        does: One line for the overview.
        module: Dotted path of the module with `main(args)`. Commands with a trainer share one, which is given the
            command's name as the first word.
        option: Set for a command that trains a new run from a checkpoint of another, a branch: an option that only
            configurations of such runs have.
        closing: Of a branch: dotted path of a function from a `Run` to the lines that are printed at its end.
    """

    does: str
    module: str = TRAINING
    option: str = ""
    closing: str = ""

    def closing_lines(self, run: Any) -> list[str]:
        """The lines that are printed at the end of a branch; none after another command."""
        lines: list[str] = _at(self.closing)(run) if self.closing else []
        return lines


@dataclass(frozen=True)
class Task:
    """The parts of a task, as an entry of a `tasks.yaml` gives them.

    Args:
        model: Dotted path of the LightningModule; its module has the settings of its optimizer, `ADAMW`.
        data: Dotted path of the LightningDataModule.
        contents: Dotted path of the `report.contents.Contents` that a report on its runs is made of.
        metrics: Path within the package of what its study says of the metrics that it logs; empty without any.
        from_data: Attributes of the data that the model takes over.
        from_seed: Options that are always `seed_everything`.
        known_by: An option of the model that only configurations of this task have, for those that name no task.
        trainer: Dotted path of the Trainer, whose methods are its further commands.
        commands: Its further commands, by name.
        default: Whether a command line that names no task means this one.
    """

    model: str
    data: str
    contents: str
    metrics: str
    from_data: Sequence[str]
    from_seed: Sequence[str] = ()
    known_by: str = ""
    trainer: str = "lightning.pytorch.Trainer"
    commands: Mapping[str, Command] = field(default_factory=dict)
    default: bool = False

    def load(self, part: Literal["model", "data", "contents", "trainer"]) -> Any:
        """Import what one of the dotted paths names."""
        return _at(getattr(self, part))

    @property
    def optimizer(self) -> dict[str, Any]:
        """The optimizer that the module has by default, which is a function there, as a configuration names it."""
        settings = import_module(self.model.rpartition(".")[0]).ADAMW
        return {"class_path": "torch.optim.AdamW", "init_args": dict(settings)}

    def branch_of(self, config: Mapping[str, Any]) -> str | None:
        """Name the command that began a run as a branch of another, by the run's configuration; None for `fit`."""
        return next((name for name, one in self.commands.items() if one.option and one.option in config), None)


def _at(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


_GENERAL = {
    "fit": Command("Train a model, or go on with a checkpoint."),
    "validate": Command("Evaluate a checkpoint on the fixed validation sets."),
    "test": Command("The same on the test sets, which are these too."),
    "sweep": Command("Run every point of a grid file, here, with W&B agents or on a cluster.", "mini_gpt_pl.sweep"),
    "report": Command("Write tables, figures and one HTML page about one run or several.", "mini_gpt_pl.report.page"),
    "explain": Command("Say what a logged number means, and what its null is.", "mini_gpt_pl.metrics.glossary"),
    "dashboard": Command("Build a W&B workspace, and a report for a sweep.", "mini_gpt_pl.dashboard"),
}

UNLISTED = Task(model="", data="", contents="mini_gpt_pl.report.general.GENERAL", metrics="", from_data=())
"""What the report knows of a run of no listed task."""


@cache
def tasks() -> dict[str, Task]:
    """The tasks of the installed studies, by name; the default one comes first."""
    listed: dict[str, Task] = {}
    for file in sorted(Path(__file__).parent.glob("*/tasks.yaml")):
        for name, parts in yaml.safe_load(file.read_text()).items():
            own = {command: Command(**settings) for command, settings in parts.pop("commands", {}).items()}
            listed[name] = Task(**parts, commands=own)
    return dict(sorted(listed.items(), key=lambda item: not item[1].default))


def commands(*, trainer: bool | None = None) -> dict[str, Command]:
    """The general commands and those of the installed tasks, by name; those with a trainer come first.

    Args:
        trainer: Only those with a trainer, or only those without.
    """
    listed = {**_GENERAL, **{name: one for task in tasks().values() for name, one in task.commands.items()}}
    ordered = sorted(listed.items(), key=lambda item: item[1].module != TRAINING)
    return {name: one for name, one in ordered if trainer in (None, one.module == TRAINING)}


def training_commands() -> tuple[str, ...]:
    """The commands that train: `fit`, and the branches of all tasks."""
    return ("fit", *(name for name, one in commands().items() if one.option))


def task_of(config: Mapping[str, Any]) -> str:
    """Name the task of a run's configuration; empty if it is of no installed study.

    Configurations that name no task are of version 0.1.0, or of a trainer of somebody's own.
    """
    if "task" in config:
        return name if (name := str(config["task"])) in tasks() else ""
    model = config.get("model")
    options = model if isinstance(model, Mapping) else {}
    return next((name for name, task in tasks().items() if task.known_by and task.known_by in options), "")


def task_named(args: Sequence[str]) -> str:
    """The task of a command line before it is parsed, since the options depend on it.

    The last one counts, in an option or in a configuration file, as for every option; without any it is the default.

    Raises:
        UserError: There is no such task.
    """
    name = next((name for name, task in tasks().items() if task.default), "")
    for option, value in split_options(args, "--task", "-c", "--config")[1]:
        named = value if option == "--task" else _in_config(value)
        name = name if named is None else str(named)
    if name not in tasks():
        hint = did_you_mean(name, tasks(), f"give {', '.join(tasks())}")
        raise UserError(f"there is no task {name!r}: {hint}")
    return name


def _in_config(value: str) -> Any:
    """Read the task of a configuration, a file or its text; whatever is wrong with it, the parser says better."""
    try:
        text = value if "\n" in value or not Path(value).is_file() else Path(value).read_text()
        loaded = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return loaded.get("task") if isinstance(loaded, dict) else None
