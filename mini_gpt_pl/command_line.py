"""What commands have in common: how they parse, and how they complain."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from mini_gpt_pl.errors import UserError, did_you_mean, missing_package

# Of a shell: 128 and the number of the signal.
INTERRUPTED, TERMINATED, BROKEN_PIPE = 130, 143, 141


def expanded(word: str) -> str:
    """Put the home folder in place of `~` in a word of a command line, also behind `--option=`."""
    option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    return option + equals + os.path.expanduser(value)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Show an error that the user can put right as one line, and exit with status 2.

    An interrupt ends with status 130, and so does a reader of the output that goes away with 141, without a traceback.
    """
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("mini_gpt_pl: interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is flushed at exit has nowhere to go
        raise SystemExit(BROKEN_PIPE) from None
    except (UserError, ModuleNotFoundError) as error:
        shown = missing_package(error) if isinstance(error, ModuleNotFoundError) else error
        if shown is None:
            raise
        message = re.sub(r"\s*\n\s*", " ", str(shown))
        print(f"mini_gpt_pl: error: {message}", file=sys.stderr)
        raise SystemExit(2) from None


def split_options(args: Sequence[str], *names: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Take options, `--name value` or `--name=value`, out of a command line that is not parsed yet.

    Returns:
        The other words, and name and value of each of the options in their order; the value is empty where the line
        ends behind a name.
    """
    words, options, rest = [], [], iter(args)
    for word in rest:
        name, equals, value = word.partition("=")
        if name in names:
            options.append((name, value if equals else next(rest, "")))
        else:
            words.append(word)
    return words, options


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one `UserError` that names the nearest option.

    Args:
        command: Name of the command.
        elsewhere: Where an option belongs that is none of the command's, and not near to one.
        settings: Of `ArgumentParser`.
    """

    def __init__(self, command: str, *, elsewhere: str = "", **settings: Any) -> None:
        if "epilog" in settings:
            settings["formatter_class"] = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=f"mini_gpt_pl {command}", allow_abbrev=False, **settings)
        self._elsewhere = elsewhere

    def error(self, message: str) -> NoReturn:
        """Raise the complaint as a UserError."""
        unknown = message.removeprefix("unrecognized arguments: ").split()[0]
        if unknown.startswith("-"):
            options = getattr(self, "_option_string_actions", ())
            hint = did_you_mean(unknown.split("=")[0], options, self._elsewhere)
            message += f"; {hint}" if hint else ""
        raise UserError(f"{message}; see {self.prog} --help")
