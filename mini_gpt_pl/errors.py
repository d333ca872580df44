"""The one error type that the command line shows as a single line."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from importlib.metadata import distributions


class UserError(Exception):
    """Something the user can put right: the message says what is wrong, where, and what to do.

    The command line prints the message alone and exits with status 2; a traceback would hide the remedy.
    """


def did_you_mean(word: str, choices: Iterable[str], otherwise: str = "") -> str:
    """Ask `did you mean CHOICE?` with the choice that is nearest to a word; without a near one say something else."""
    near = get_close_matches(word, list(choices), n=1)
    return f"did you mean {near[0]}?" if near else otherwise


# Distributions whose modules have another name.
_DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "wandb_workspaces": "wandb-workspaces"}
# Extras that belong to the project's own development, which nobody is sent to.
_OWN = ("all", "test", "notebooks", "docs", "lint", "dev")


def extra_of(module: str) -> str | None:
    """The extra of this project that installs a module, or None, by the installed package's own metadata.

    Example:
        >>> extra_of("matplotlib.axes")
        'report'
    """
    top = module.split(".")[0]
    # More than one where an earlier installation left its description in a checkout.
    installed = distributions(name="mini_gpt_pl")
    for line in (line for one in installed for line in one.requires or []):
        match = re.match(r"([\w.-]+).*extra == ['\"](\w+)['\"]", line)
        if match and match[2] not in _OWN and match[1] == _DISTRIBUTIONS.get(top, top):
            return match[2]
    return None


def missing_package(error: ModuleNotFoundError) -> UserError | None:
    """Name in one line the extra that has a missing package; None if there is none, which is a fault of the project."""
    extra = extra_of(error.name or "")
    if extra is None:
        return None
    return UserError(f"this needs the package {error.name}: pip install 'mini_gpt_pl[{extra}]'")
