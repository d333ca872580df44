"""The command line. Only the command that is asked for is imported: Lightning alone takes seconds."""

from __future__ import annotations

import gc
import sys
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType
from typing import Any

from mini_gpt_pl.command_line import one_line_errors
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.tasks import tasks

_TRAINING = "mini_gpt_pl.training.cli"
_WITH_TRAINER = {
    "fit": "Train a model, or go on with a checkpoint.",
    "validate": "Evaluate a checkpoint on the fixed validation sets.",
    "test": "The same on the test sets, which are these too.",
}
# Commands that work on run folders: module with `main(args)`, and what it does.
_WITHOUT_TRAINER = {
    "sweep": ("mini_gpt_pl.sweep", "Run every point of a grid file, here, with W&B agents or on a cluster."),
    "report": ("mini_gpt_pl.report.page", "Write tables, figures and one HTML page about one run or several."),
    "explain": ("mini_gpt_pl.metrics.glossary", "Say what a logged number means, and what its null is."),
    "dashboard": ("mini_gpt_pl.dashboard", "Build a W&B workspace, and a report for a sweep."),
}


def commands() -> dict[str, tuple[str, str]]:
    """All commands, those of the tasks among them: the module with `main`, and what each does.

    A command with a trainer is one of the module `mini_gpt_pl.training.cli`, which takes its name as the first word.
    """
    trained = {**_WITH_TRAINER, **{name: words for task in tasks().values() for name, words in task.trained.items()}}
    others = {name: found for task in tasks().values() for name, found in task.commands.items()}
    return {**{name: (_TRAINING, words) for name, words in trained.items()}, **_WITHOUT_TRAINER, **others}


def run(line: str, *, verbose: bool = False) -> Any:
    """Run one command with a trainer in this process, such as in a notebook, relative paths from where it stands.

    Args:
        line: As in a shell, without the program's name.
        verbose: Show what Lightning says of devices, seeds and data loaders.

    Returns:
        The `ProbedCLI`, with its `trainer`, `model` and `datamodule`.

    Raises:
        UserError: Something in it, or in a file that it names, is not as it should be.

    Example:
        >>> run("fit -c configs/quickstart.yaml --trainer.max_steps 100")  # doctest: +SKIP
    """
    return load(_TRAINING).run_line(line, verbose=verbose)


def overview() -> str:
    """List the commands."""
    lines = "\n".join(f"  {name:<14} {words}" for name, (_, words) in commands().items())
    return f"usage: mini_gpt_pl COMMAND [OPTIONS]\n\n{lines}\n\nmini_gpt_pl COMMAND --help lists its options."


def load(name: str) -> ModuleType:
    """Import a module without the garbage collector, which would go through all that stays, again and again.

    Nor does it have to look through what has been imported while training runs.
    """
    if name in sys.modules:
        return sys.modules[name]
    gc.disable()
    try:
        return import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def main() -> None:
    """Run the command line; an error that the user can put right is one line and exit status 2."""
    args = sys.argv[1:]
    with one_line_errors():
        listed = commands()
        if not args:
            raise UserError(f"give a command: {', '.join(listed)}; see mini_gpt_pl --help")
        if not args[0].startswith("-") and args[0] not in listed:
            near = get_close_matches(args[0], listed, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(listed)};"
            raise UserError(f"no command {args[0]!r}: {hint} see mini_gpt_pl --help")
        if args[0] in ("-h", "--help"):
            print(overview())
            return
        module = listed[args[0]][0] if args[0] in listed else _TRAINING
        load(module).main(args if module == _TRAINING else args[1:])


if __name__ == "__main__":
    main()
