"""The list of tasks: for each, by dotted name, its module, its data, its commands and what its report is made of.

It is the only way in which the rest of the package reaches a study, so a study can be left out as a whole: its tasks
are then not in the list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mini_gpt_pl.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer

DEFAULT = "stories"
"""The task of a command line, or of a run's configuration, that names none."""


@dataclass(frozen=True)
class Branch:
    """A command that trains a new run from a checkpoint of another.

    Args:
        option: One that only configurations of its runs have, by which they are told from others.
        closing: Dotted path of a function that takes such a run's folder, a `Run`, and returns what is printed at its
            end, line by line.
    """

    option: str
    closing: str

    @property
    def closing_lines(self) -> Callable[[Any], list[str]]:
        """The function at `closing`."""
        return _at(self.closing)


@dataclass(frozen=True)
class Task:
    """What the command line and the report need to know of a task.

    Args:
        model: Dotted path of the LightningModule; its module has the settings of its optimizer, `ADAMW`.
        data: Dotted path of the LightningDataModule.
        contents: Dotted path of the `report.contents.Contents` that a report on its runs is made of.
        metrics: Path within the package of what its study says of the metrics that it logs; empty without any.
        from_data: Attributes of the data that the model takes over.
        from_seed: Options that are always `seed_everything`.
        known_by: An option of the model that only configurations of this task have, for those that name no task.
        trainer: Dotted path of the Trainer, whose methods are its further commands.
        trained: Further commands with a trainer, and what each does.
        branches: Those of them that train a new run from a checkpoint.
        commands: Further commands on run folders: the dotted module with `main(args)`, and what each does.
    """

    model: str
    data: str
    contents: str
    metrics: str
    from_data: tuple[str, ...]
    from_seed: tuple[str, ...] = ()
    known_by: str = ""
    trainer: str = "lightning.pytorch.Trainer"
    trained: Mapping[str, str] = field(default_factory=dict)
    branches: Mapping[str, Branch] = field(default_factory=dict)
    commands: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def model_class(self) -> type[LightningModule]:
        """The LightningModule."""
        return _at(self.model)

    @property
    def data_class(self) -> type[LightningDataModule]:
        """The LightningDataModule."""
        return _at(self.data)

    @property
    def trainer_class(self) -> type[Trainer]:
        """The Trainer."""
        return _at(self.trainer)

    @property
    def report_contents(self) -> Any:
        """The `report.contents.Contents` of its runs."""
        return _at(self.contents)

    @property
    def optimizer(self) -> dict[str, Any]:
        """The optimizer that the module has by default, which is a function there, as a configuration names it."""
        settings = import_module(self.model.rpartition(".")[0]).ADAMW
        return {"class_path": "torch.optim.AdamW", "init_args": dict(settings)}

    def branch_of(self, config: Mapping[str, Any]) -> str | None:
        """Name the command that began a run as a branch of another, by the run's configuration; None for `fit`."""
        return next((name for name, branch in self.branches.items() if branch.option in config), None)


def _at(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


_STORIES = Task(
    model="mini_gpt_pl.stories.module.ProbedGPT",
    data="mini_gpt_pl.stories.data.datamodule.ProbedStories",
    contents="mini_gpt_pl.stories.study.contents.CONTENTS",
    metrics="stories/metrics.yaml",
    from_data=("vocab_size", "context"),
    known_by="probe_weight",
    trainer="mini_gpt_pl.stories.trainer.StoryTrainer",
    trained={
        "predict": "Continue a prompt with a checkpoint.",
        "reheat": "Restart a late checkpoint, and follow it in its parent's basis.",
    },
    branches={"reheat": Branch("data_order", "mini_gpt_pl.stories.reheating.closing_lines")},
    commands={
        "replay": (
            "mini_gpt_pl.stories.replay",
            "Measure gradients at stored checkpoints against the whole run's backbone.",
        )
    },
)


def _residues(model: str, data: str, *more_from_data: str) -> Task:
    return Task(
        model=f"mini_gpt_pl.arithmetic.{model}",
        data=f"mini_gpt_pl.arithmetic.{data}",
        contents="mini_gpt_pl.arithmetic.study.contents.CONTENTS",
        metrics="arithmetic/metrics.yaml",
        from_data=("vocab_size", "classes", "length", "causal", *more_from_data),
        from_seed=("model.seed", "data.seed"),
        commands={
            "overlaps": (
                "mini_gpt_pl.arithmetic.study.overlaps",
                "Compare the subspaces of paths over layers and runs.",
            ),
            "routing": ("mini_gpt_pl.arithmetic.routing", "Ask whether a run's path steers its attention."),
            "reconstruction": (
                "mini_gpt_pl.arithmetic.reconstruction",
                "Rebuild a run's final weights from few directions.",
            ),
            "interventions": (
                "mini_gpt_pl.arithmetic.study.interventions",
                "Compare the arms of an intervention over seeds.",
            ),
        },
    )


_LISTED: Mapping[str, Task] = {
    "stories": _STORIES,
    "operations": _residues("module.ResidueClassifier", "data.ModularArithmetic"),
    "multitask": _residues("multitask.MultiTaskClassifier", "multitask.MultiTaskArithmetic", "tasks"),
    "markers": _residues("module.ResidueClassifier", "data.MarkerSums"),
}


UNLISTED = Task(model="", data="", contents="mini_gpt_pl.report.general.GENERAL", metrics="", from_data=())
"""What the report knows of a run of no listed task."""


@cache
def tasks() -> dict[str, Task]:
    """The tasks whose study is installed, by name."""
    return {name: task for name, task in _LISTED.items() if find_spec(_package(task))}


def task_of(config: Mapping[str, Any]) -> str:
    """Name the listed task of a run's configuration, whether its study is installed or not; empty if it is none.

    Configurations that name no task are of version 0.1.0, or of a trainer of somebody's own.
    """
    if "task" in config:
        return name if (name := str(config["task"])) in _LISTED else ""
    model = config.get("model")
    options = model if isinstance(model, Mapping) else {}
    return next((name for name, task in _LISTED.items() if task.known_by and task.known_by in options), "")


def training_commands() -> tuple[str, ...]:
    """The commands that train: `fit`, and the branches of all tasks."""
    return ("fit", *dict.fromkeys(name for task in tasks().values() for name in task.branches))


def task_named(args: Sequence[str]) -> str:
    """Find the task in a command line before it is parsed, since the options depend on it.

    The last one counts, in an option or in a configuration file, as for every option; without any it is `DEFAULT`.

    Args:
        args: The command line, without the program's name.

    Raises:
        UserError: There is no such task.
    """
    name = DEFAULT
    for option, value in _options(args):
        named = value if option == "--task" else _in_config(value)
        name = name if named is None else str(named)
    if name not in tasks():
        near = get_close_matches(name, tasks(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"give {', '.join(tasks())}"
        raise UserError(f"there is no task {name!r}: {hint}")
    return name


def _package(task: Task) -> str:
    return ".".join(task.model.split(".")[:2])


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
