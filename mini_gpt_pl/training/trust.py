"""What a run folder's configuration may ask for, since somebody may have sent the folder.

A configuration names classes, and making one runs its code. So a folder may name only classes of torch, of Lightning or
of this package, of the kinds that a training is made of; a reader who knows where it comes from allows further packages
with `--trust PACKAGE`. What is refused has not been imported. Folders that the configuration would write to must lie in
the run's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import Precision
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from mini_gpt_pl.command_line import split_options
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.runs.folder import CONFIG, PRODUCTS, Run
from mini_gpt_pl.training import former_names

OURS = "mini_gpt_pl"
_OTHERS = ("torch", "lightning", "pytorch_lightning")
_KINDS: tuple[type, ...] = (
    Accelerator,
    Callback,
    CheckpointIO,
    ClusterEnvironment,
    LightningDataModule,
    LightningModule,
)
_KINDS += (Logger, LRScheduler, Optimizer, Precision, Profiler, Strategy)
# A name with dots, which the parser would import where a class or a function is asked for.
_DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")
# Options that name a folder, or a file, which something is written to.
_WRITTEN = ("dir", "dirpath", "log_dir", "root_dir", "save_dir", "tracking_uri")
_OPTION = "--trust"


def split_trust(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take every `--trust PACKAGE` out of a command line; the other words, and the packages.

    Raises:
        UserError: An option has no package behind it.
    """
    words, options = split_options(args, _OPTION)
    packages = [package for _, package in options]
    for package in packages:
        if not re.fullmatch(r"[A-Za-z_][\w.]*", package):
            raise UserError(f"{_OPTION} {package}: name a package whose classes the folder may ask for")
    return words, packages


def trusted_config(run: Run, trusted: Sequence[str] = (), *, unused: Sequence[tuple[str, ...]] = ()) -> dict[str, Any]:
    """A run's configuration, once nothing in it asks for more than a training is made of.

    Args:
        run: The run.
        trusted: Further packages whose classes may be made.
        unused: Options that the command makes nothing of, each by the keys that lead to it; they are left out.

    Raises:
        UserError: It names something else, or a folder to write to that is not in the run's own.
    """
    config = deepcopy(run.config)
    for *path, last in unused:
        part: dict[str, Any] = config
        for key in path:
            inner = part.get(key)
            part = inner if isinstance(inner, dict) else {}
        part.pop(last, None)
    texts = dict(_leaves(config))
    for where, value in texts.items():
        if where[0] == "data" and where[-1] != "class_path":
            continue  # texts and tokenizers are files, whose names have dots
        if where[-1] == "class_path" or _DOTTED.fullmatch(value):
            _require_trusted(run, ".".join(where), value, trusted)
    for where, value in texts.items():
        redirected = str(texts.get((*where[:-2], "class_path"), "")).endswith("WandbLogger")  # to the run's folder
        if where[-1] in _WRITTEN and not (redirected or _inside(run, value) or _inside_as_recorded(run, value)):
            raise UserError(
                f"{run.path / CONFIG}: {'.'.join(where)} is {value}, outside of the run's folder, and a folder that "
                "was sent writes nothing elsewhere: give the option on the command line, or take it out of the file"
            )
    if isinstance(data := config.get("data"), dict) and not _inside(run, str(data.get("cache_dir") or run.path)):
        config["data"] = {**data, "cache_dir": None}  # texts are tokenized into the reader's own cache
    return config


class OwnCheckpoints(Callback):
    """Keep what a checkpoint remembers of other checkpoints to those of its own run.

    Lightning's `ModelCheckpoint` takes up the paths of the files that it wrote, and deletes those that are no longer
    among the best: whoever wrote the checkpoint says which. Paths that lie elsewhere are forgotten.

    Args:
        folder: The run's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for state in checkpoint.get("callbacks", {}).values():
            if not isinstance(state, dict):
                continue
            for name in ("best_model_path", "last_model_path", "kth_best_model_path"):
                if isinstance(path := state.get(name), str) and path and not self._is_own(path):
                    state[name] = ""
            if isinstance(best := state.get("best_k_models"), dict):
                state["best_k_models"] = {path: score for path, score in best.items() if self._is_own(path)}

    def _is_own(self, path: str) -> bool:
        return Path(path).resolve().is_relative_to(self.folder)


def require_no_way_out(run: Run) -> None:
    """Check that what a command writes into a run folder stays there.

    Raises:
        UserError: One of the folder's products is a link that leads elsewhere.
    """
    for name in PRODUCTS:
        path = run.path / name
        if path.is_symlink() and not path.resolve().is_relative_to(run.path.resolve()):
            raise UserError(
                f"{path} is a link to {path.resolve()}, outside of the run's folder: put the folder itself there"
            )


def _leaves(value: Any, where: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """All texts in a configuration, and the options that they stand under."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, (*where, str(key)))
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from _leaves(item, (*where, str(place)))
    elif isinstance(value, str) and where:
        yield where, value


def _require_trusted(run: Run, option: str, name: str, trusted: Sequence[str]) -> None:
    package = name.partition(".")[0]
    if "." not in name or any(f"{name}.".startswith(f"{prefix}.") for prefix in trusted):
        return  # a name without dots is one of the parser's own choices, among classes that are loaded already
    name_now = former_names.name_now(name)
    ours = name_now.startswith(f"{OURS}.")
    if not ours and package not in _OTHERS:
        raise UserError(
            f"{run.path / CONFIG}: {option} names {name}, and a folder may only ask for classes of torch, lightning "
            f"and {OURS}: if you know where it comes from, repeat the command with {_OPTION} {package}"
        )
    module, _, attribute = name_now.rpartition(".")
    try:
        named = getattr(import_module(module), attribute)
    except (ImportError, AttributeError):
        raise UserError(f"{run.path / CONFIG}: {option} names {name}, which is not installed here") from None
    if not isinstance(named, type) or not (named.__module__.startswith(OURS) if ours else issubclass(named, _KINDS)):
        raise UserError(f"{run.path / CONFIG}: {option} names {name}, which is no class that a training is made of")


def _inside(run: Run, path: str) -> bool:
    return (Path.cwd() / path).resolve().is_relative_to(run.path.resolve())


def _inside_as_recorded(run: Run, path: str) -> bool:
    """Whether a path lay in the run's folder where it was recorded: the folder may have been moved since."""
    recorded = run.config.get("run_dir")
    return isinstance(recorded, str) and Path(path).is_relative_to(recorded) and ".." not in Path(path).parts
