"""A grid file and its points: W&B's sweep format, method grid, read without W&B.

The points are the Cartesian product of the values, in the order of the file. A point's name is made from the
parameters that the file gives as `values`, so that a point keeps its name, and with it its run, when values are added.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import yaml

from mini_gpt_pl.errors import UserError, did_you_mean
from mini_gpt_pl.presets import preset
from mini_gpt_pl.tasks import training_commands

PROGRAM = ("-m", "mini_gpt_pl")
"""What `${program}`, which sweep files call cli.py, stands for: the command, wherever the package is installed."""

_ABOUT = ("metric", "description", "run_cap")  # for a W&B server
_KEYS = ("name", "program", "method", "command", "parameters", *_ABOUT, "project", "entity")
_NOT_GRID = ("distribution", "min", "max", "mu", "sigma", "q", "probabilities")
_MACROS = ("${env}", "${interpreter}", "${program}", "${args}")
_ANY_MACRO = re.compile(r"\$\{[^}]*\}")
_RESERVED = ("run_dir", "overwrite")  # each run has its own folder, and the sweep knows which to replace
_LONGEST_LABEL, _LONGEST_NAME = 40, 160  # file systems take 255 bytes


@dataclass(frozen=True)
class Point:
    """One run of a sweep: the unique name of its folder, and the value of every parameter of the file by dotted key."""

    name: str
    parameters: dict[str, Any]

    @property
    def options(self) -> list[str]:
        """The parameters as options: `--key=value`, everything but strings as JSON."""
        return [f"--{key}={_option(value)}" for key, value in self.parameters.items()]


@dataclass(frozen=True)
class Sweep:
    """A grid file.

    Args:
        path: The file.
        name: Of the sweep.
        command: Template of a run's command line, with W&B's macros.
        values: Values of each parameter, by dotted key.
        varying: The keys that name a point: those given as `values`, even a single one.
        run_cap: Most runs of the sweep, None for all.
        project: W&B project, where an agent runs the sweep.
        entity: W&B user or team.
        about: Keys that only W&B reads: metric, description, run_cap.
        program: The words that `${program}` stands for.
    """

    path: Path
    name: str
    command: tuple[str, ...]
    values: dict[str, tuple[Any, ...]]
    varying: tuple[str, ...]
    run_cap: int | None = None
    project: str | None = None
    entity: str | None = None
    about: dict[str, Any] = field(default_factory=dict)
    program: tuple[str, ...] = PROGRAM

    @property
    def points(self) -> list[Point]:
        """The first `run_cap` combinations of the values, the last parameter varying fastest."""
        parts = _key_names(self.varying)
        labels = {key: _labels(self.values[key], key in _FILES) for key in self.varying}
        points = []
        for chosen in product(*(range(len(values)) for values in self.values.values())):
            at = dict(zip(self.values, chosen, strict=True))
            pieces = (f"{parts[key]}{labels[key][at[key]]}" for key in self.varying)
            name = _cut("_".join(pieces) or folder_name(self.name), _LONGEST_NAME)
            points.append(Point(name, {key: self.values[key][i] for key, i in at.items()}))
        return points[: self.run_cap]

    def expand(self, options: Sequence[str]) -> list[str]:
        """The template with its macros replaced, `${args}` by these options."""
        env = [] if os.name == "nt" else ["/usr/bin/env"]
        macros = dict(zip(_MACROS, (env, [sys.executable], self.program, options), strict=True))
        return [word for piece in self.command for word in macros.get(piece, [piece])]


def read_sweep(path: Path) -> Sweep:
    """Read and check a sweep file of W&B, method grid, or a shipped one by its name, such as `beta2`.

    Raises:
        UserError: Something in it is not as it should be; the line names the file and the key.
    """
    path = preset(str(path), "sweeps") or path
    try:
        loaded = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"no sweep file {path} ({error.strerror}): give the path of one") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"the sweep file {path} is no valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"the sweep file {path} holds no keys: it needs {', '.join(_KEYS[:5])}")
    _check_keys(loaded, _KEYS, path, "")
    if loaded.get("method") != "grid":
        raise UserError(f"{path}: method is {loaded.get('method')!r}: only 'grid' can be run")
    if Path(str(loaded.get("program"))).name != "cli.py":
        raise UserError(f"{path}: program is {loaded.get('program')!r}: it must be cli.py")
    cap = loaded.get("run_cap")
    if cap is not None and (not isinstance(cap, int) or isinstance(cap, bool) or cap < 1):
        raise UserError(f"{path}: run_cap is {cap!r}: it must be an integer of 1 or more")
    parameters = loaded.get("parameters")
    if not isinstance(parameters, dict) or not parameters:
        raise UserError(f"{path}: parameters must list at least one: KEY: {{values: [A, B]}}")
    values: dict[str, tuple[Any, ...]] = {}
    varying: list[str] = []
    for key, several, named in _flatten(path, parameters, ""):
        if key in values:
            raise UserError(f"{path}: parameters.{key} is given twice")
        values[key] = several
        varying += [key] if named else []
    command = _command(path, loaded.get("command"))
    files = [word for flag, word in pairwise(command) if flag in ("-c", "--config")]
    for name in [*files, *(str(value) for key in _CONFIGS for value in values.get(key, ()))]:
        if name.endswith((".yaml", ".yml", ".json")) and preset(name) is None:
            raise UserError(f"{path}: no configuration {name}: paths are relative to the working directory")
    project, entity = (str(loaded[key]) if loaded.get(key) is not None else None for key in ("project", "entity"))
    about = {key: loaded[key] for key in _ABOUT if loaded.get(key) is not None}
    name = str(loaded.get("name") or path.stem)
    return Sweep(path, name, command, values, tuple(varying), cap, project, entity, about)


# ------------------------------------------------------------------------------------------------- parameters


def _flatten(path: Path, nested: Mapping[Any, Any], above: str) -> Iterable[tuple[str, tuple[Any, ...], bool]]:
    """Yield dotted key, values and whether they name the point, of W&B's nested parameters."""
    for part, spec in nested.items():
        key = f"{above}{part}"
        where = f"parameters.{key}"
        if key in _RESERVED:
            raise UserError(f"{path}: {where} cannot be swept: every point gets a folder of its own below --root")
        if not isinstance(spec, dict):
            raise UserError(f"{path}: {where} is {spec!r}: write {{value: {spec}}} or {{values: [...]}}")
        for other in _NOT_GRID:
            if other in spec:
                raise UserError(f"{path}: {where}.{other}: a grid takes value or values only")
        _check_keys(spec, ("value", "values", "parameters"), path, f"{where}.")
        if len(spec) != 1:
            raise UserError(f"{path}: {where} needs one of value, values or parameters")
        if "parameters" in spec:
            if not isinstance(spec["parameters"], dict) or not spec["parameters"]:
                raise UserError(f"{path}: {where}.parameters must list at least one")
            yield from _flatten(path, spec["parameters"], f"{key}.")
        elif "value" in spec:
            yield key, (spec["value"],), False
        else:
            yield key, _several(path, where, spec["values"]), True


def _several(path: Path, where: str, values: Any) -> tuple[Any, ...]:
    if not isinstance(values, list) or not values:
        raise UserError(f"{path}: {where}.values must be a list of at least one value")
    texts = [_option(value) for value in values]
    if len(set(texts)) < len(texts):
        twice = next(text for text in texts if texts.count(text) > 1)
        raise UserError(f"{path}: {where}.values holds {twice} twice")
    return tuple(values)


def _check_keys(mapping: Mapping[Any, Any], allowed: Sequence[str], path: Path, where: str) -> None:
    for key in mapping:
        if key not in allowed:
            hint = did_you_mean(str(key), allowed, f"the keys are {', '.join(allowed)}")
            raise UserError(f"{path}: unknown key {where}{key}: {hint}")


def _option(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


# ---------------------------------------------------------------------------------------------------- command

_CONFIGS = ("config", "c")
_FILES = (*_CONFIGS, "ckpt_path")  # their names speak for themselves


def _command(path: Path, template: Any) -> tuple[str, ...]:
    if not isinstance(template, list) or not template:
        raise UserError(f"{path}: command must be a list, as W&B takes it: {[*_MACROS[:3], 'fit', _MACROS[3]]}")
    command = tuple(str(piece) for piece in template)
    for piece in command:
        for macro in _ANY_MACRO.findall(piece):
            if macro not in _MACROS or piece != macro:
                word = "${args}" if macro.startswith("${args") else macro
                hint = did_you_mean(word, _MACROS, f"the macros are {', '.join(_MACROS)}")
                raise UserError(f"{path}: command: cannot use {piece!r}, as a macro stands by itself: {hint}")
    for macro in ("${program}", "${args}"):
        if command.count(macro) != 1:
            raise UserError(f"{path}: command must hold {macro} once: the parameters of a point cannot be passed on")
    verb = command[command.index("${program}") + 1 :][:1]
    if not verb or verb[0] not in training_commands():
        raise UserError(
            f"{path}: command: {' or '.join(training_commands())} must follow ${{program}}, not {' '.join(verb)!r}"
        )
    return command


# ------------------------------------------------------------------------------------------------------ names


def folder_name(text: str) -> str:
    """Make a file name of a text: letters, digits and `.+-=`, none of them hidden or empty."""
    return re.sub(r"[^A-Za-z0-9.+=-]+", "-", text).lstrip(".") or "empty"


def _key_names(keys: Sequence[str]) -> dict[str, str]:
    """Return the shortest ends of dotted keys that differ, with a hyphen; nothing for a file."""
    names = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-k:]) for k in range(1, len(parts) + 1)]
        rivals = [f".{other}" for other in keys if other != key]
        end = next((end for end in ends if not any(r.endswith(f".{end}") for r in rivals)), key)
        names[key] = "" if key in _FILES else re.sub(r"[^A-Za-z0-9._+=-]+", "-", end).lstrip(".") + "-"
    return names


def _labels(values: Sequence[Any], are_files: bool) -> list[str]:
    """Name the values of one parameter apart; the first of two alike keeps the plain name.

    No label has an underscore, which stands between the labels of a name: different labels make different names.
    """
    labels: dict[str, str] = {}  # some file systems fold upper and lower case
    for text in map(_option, values):
        label = folder_name(_file_label(text) if are_files else text.strip('[]{}"'))
        label = label.lstrip("-.") or "empty" if are_files else label
        label = _cut(f"{label}-{_digest(text)}" if label.casefold() in labels else label, _LONGEST_LABEL)
        labels[label.casefold()] = label
    return list(labels.values())


def _file_label(text: str) -> str:
    """Return the stem of a file, and of a checkpoint the run that it is of as well."""
    stem = re.sub(r"\.(ya?ml|json|ckpt)$", "", Path(text).name)
    return f"{Path(text).parents[1].name}-{stem}" if Path(text).parent.name == "checkpoints" else stem


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 9]}-{_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
