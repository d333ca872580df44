"""The command line. Only the command that is asked for is imported: Lightning alone takes seconds."""

from __future__ import annotations

import gc
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from mini_gpt_pl.command_line import expanded, one_line_errors, split_options
from mini_gpt_pl.errors import UserError, did_you_mean
from mini_gpt_pl.tasks import TRAINING, commands

# A class by its dotted path, `module.Class` or `package.module.Class`; the group is its top-level name.
_OWN_CLASS = re.compile(r"(?<![\w./])([A-Za-z_]\w*)(?:\.[a-z_]\w*)*\.[A-Z]\w*")


def run(line: str, *, verbose: bool = False) -> Any:
    """Run one command with a trainer in this process, such as in a notebook; relative paths start at its folder.

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
    return load(TRAINING).run_line(line, verbose=verbose)


def load(name: str) -> ModuleType:
    """Import a module while the garbage collector rests, which would walk through all of it again and again.

    What has been imported is frozen, so that the collector leaves it alone while training runs.
    """
    if name in sys.modules:
        return sys.modules[name]
    gc.disable()
    try:
        return import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def _names_a_module_here(args: Sequence[str]) -> bool:
    """Whether the user names a class of a module in the folder where he is, in a word or in a file behind `-c`.

    Only then is that folder importable: in a run folder that somebody sent, a planted module could else stand in for a
    package that is not installed.
    """
    texts = [*args, *(_text(Path(file)) for _, file in split_options(args, "-c", "--config")[1])]
    names = {name for text in texts for name in _OWN_CLASS.findall(text)}
    mine = [name for name in names if Path(f"{name}.py").is_file() or Path(name, "__init__.py").is_file()]
    return any(find_spec(name) is None for name in mine)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError):  # whatever is wrong with it, its reader says better
        return ""


def main() -> None:
    """Run the command line; an error that the user can put right is one line and exit status 2."""
    sys.argv[1:] = args = [expanded(word) for word in sys.argv[1:]]
    if _names_a_module_here(args):
        sys.path.append(os.getcwd())  # behind everything that is installed
    with one_line_errors():
        listed = commands()
        if not args:
            raise UserError(f"give a command: {', '.join(listed)}; see mini_gpt_pl --help")
        if args[0] in ("-h", "--help"):
            lines = "\n".join(f"  {name:<14} {command.does}" for name, command in listed.items())
            print(f"usage: mini_gpt_pl COMMAND [OPTIONS]\n\n{lines}\n\nmini_gpt_pl COMMAND --help lists its options.")
            return
        if not args[0].startswith("-") and args[0] not in listed:
            hint = did_you_mean(args[0], listed, f"there is {', '.join(listed)};")
            raise UserError(f"no command {args[0]!r}: {hint} see mini_gpt_pl --help")
        module = listed[args[0]].module if args[0] in listed else TRAINING
        load(module).main(args if module == TRAINING else args[1:])


if __name__ == "__main__":
    main()
