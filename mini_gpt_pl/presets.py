"""The configurations that the package ships, found by name from any folder.

`-c quickstart` is `configs/quickstart.yaml` and `sweep beta2` is `configs/sweeps/beta2.yaml`, wherever the package is
installed. A file of the reader's own wins over a name, and paths of shipped configurations hold from any folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

import yaml

from mini_gpt_pl.errors import UserError, did_you_mean

_OPTIONS = ("-c", "--config")
_SUFFIX = ".yaml"


@cache
def presets() -> dict[str, Path]:
    """The shipped configurations: their path below `configs` without its suffix, and the file."""
    folder = Path(str(files("mini_gpt_pl.configs")))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in sorted(folder.rglob(f"*{_SUFFIX}"))}


def preset(name: str, folder: str = "") -> Path | None:
    """Find a configuration file by its path or, with or without `configs/` and `.yaml`, by its name.

    Args:
        name: The path or the name.
        folder: A folder of the shipped ones to look in as well: `sweeps` for the name `beta2`.

    Returns:
        The file of that path if there is one, else the shipped one of that name, else None.
    """
    if Path(name).is_file():
        return Path(name)
    plain = name.removeprefix("configs/").removesuffix(_SUFFIX)
    return presets().get(plain) or presets().get(f"{folder}/{plain}")


def with_presets(args: Sequence[str]) -> list[str]:
    """Replace the names of shipped configurations in a command line by their files.

    Raises:
        UserError: No configuration has that name.

    Example:
        >>> with_presets(["fit", "-c", "quickstart"])[2].endswith("configs/quickstart.yaml")
        True
    """
    words = list(args)
    for i, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option in _OPTIONS and equals:
            words[i] = f"{option}={_file(value)}"
        elif i and words[i - 1] in _OPTIONS:
            words[i] = _file(word)
    return words


def _require_options(file: Path) -> None:
    """Refuse a configuration that is no text, or that holds nothing: a parser would not name the file."""
    try:
        loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"the configuration {file} is no UTF-8 text ({error.reason} at byte {error.start})") from None
    except yaml.YAMLError:
        return  # the parser says where
    if not isinstance(loaded, dict):
        raise UserError(f"the configuration {file} holds no options: fill it, or leave it out")


def _file(value: str) -> str:
    """The file that the value of `-c` names; what is a path or a configuration's text stays as it is."""
    if len(value.split()) != 1 or set(value) & set(":{}\\"):
        return value
    if (file := preset(value)) is not None:
        _require_options(file)
        return str(file)
    if value.endswith((".yaml", ".yml", ".json")):
        return value
    hint = did_you_mean(value, presets(), f"give a file, or one of: {', '.join(presets())}")
    raise UserError(f"-c {value}: there is no such file, and no configuration of that name is shipped; {hint}")
