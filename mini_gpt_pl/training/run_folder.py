"""What a training may do to a run folder, how its paths are read, and where its W&B runs lie."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from mini_gpt_pl.callbacks.wandb_run import WandbSegments
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.runs.folder import PRODUCTS, Run


def expand_home(config: Any) -> Any:
    """Put the home folder in place of `~` wherever an option's value begins with it, however deep."""
    return _with_texts(config, os.path.expanduser)


def whole_paths(config: Any) -> Any:
    """Write the files that options of the data name with their whole path: a resume may come from another folder."""

    def whole(text: str) -> str:
        names_a_file = ("/" in text or Path(text).suffix) and Path(text).is_file()
        return str(Path(text).resolve()) if names_a_file else text

    return _with_texts(config, whole)


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Change every text in nested options, which stay the same objects."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        value[:] = [_with_texts(item, change) for item in value]
    elif isinstance(value, dict | Namespace):
        for key, item in list(vars(value).items() if isinstance(value, Namespace) else value.items()):
            value[key] = _with_texts(item, change)
    return value


# Options of the trainer that say how long a run lasts.
_LENGTHS = ("max_steps", "max_epochs", "max_time")


def end_if_finished(run: Run, config: Any, checkpoint: dict[str, Any] | None) -> None:
    """Leave a run alone that has reached its end and is resumed there without being told to last longer.

    Raises:
        SystemExit: With status 0; nothing has been changed.
    """
    path = config.get("resume") or config.get("ckpt_path")
    origin = Run.of_checkpoint(path) if path else None
    if checkpoint is None or origin is None or origin.path.resolve() != run.path.resolve() or config.overwrite:
        return
    before, outcome = origin.settings.get("trainer") or {}, origin.outcome
    if outcome is None or outcome.state != "finished" or checkpoint["global_step"] < outcome.step:
        return
    if any(str(before.get(name)) != str(config.trainer.get(name)) for name in _LENGTHS):
        return
    print(
        f"{origin.path} is finished, at step {outcome.step}: nothing was changed. To train it longer, give "
        "--trainer.max_steps a higher number."
    )
    raise SystemExit(0)


def claim(run: Run, config: Any, branch: str | None) -> bool:
    """Refuse to lose by mistake what is recorded; whether the folder holds a run that the new one is to replace."""
    checkpoint = config.get("resume") or config.ckpt_path
    origin = Run.of_checkpoint(checkpoint) if checkpoint else None
    at_home = origin is not None and origin.path.resolve() == run.path.resolve()
    if branch and at_home and not config.resume:
        raise UserError(f"{run.path} is the run of the checkpoint itself: give the {branch} its own --run_dir")
    if not branch and origin is not None and not at_home and origin.snapshot_folder.is_dir():
        raise UserError(
            f"a run goes on in its own folder, {origin.path}, where its snapshots lie: leave out --run_dir, "
            "or copy that folder and resume the copy's checkpoint"
        )
    if at_home or not run.exists:
        return False
    # The other ranks may come when the first has begun.
    if not config.overwrite and getattr(rank_zero_only, "rank", 0) == 0:
        last = next(reversed(run.checkpoints.values()), None)
        resume = f"resume it with --ckpt_path {last}, " if last else ""
        raise UserError(
            f"{run.path} already holds a run: {resume}replace it with --overwrite true, "
            "or choose another folder with --run_dir"
        )
    return True


@rank_zero_only
def make_folder(run: Run, *, clear: bool) -> None:
    """Make a run folder on rank 0, and remove what another run has left in it if it is to be replaced.

    Raises:
        UserError: The folder cannot be made.
    """
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        for path in [run.path / product for product in PRODUCTS if clear]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{run.path} cannot be a run folder ({error.strerror}): choose another --run_dir") from None


_WANDB_MODES = ("online", "offline", "disabled", "dryrun", "shared")


def direct_wandb(config: Any, run: Run, branch: str | None, checkpoint: dict[str, Any] | None) -> None:
    """Point W&B loggers at the run folder, obey WANDB_MODE, and trace resumed and branched runs to their origin."""
    loggers = config.trainer.logger if isinstance(config.trainer.logger, list) else [config.trainer.logger]
    mode = os.environ.get("WANDB_MODE") or None
    if mode is not None and mode not in _WANDB_MODES:
        raise UserError(f"WANDB_MODE={mode}: give {', '.join(_WANDB_MODES)}, or unset it")
    origin = ((checkpoint or {}).get("callbacks") or {}).get(WandbSegments.__name__, {})
    for logger in loggers:
        if not str(getattr(logger, "class_path", "")).endswith("WandbLogger"):
            continue
        if find_spec("wandb") is None:
            raise UserError("a WandbLogger needs the package wandb: pip install 'mini_gpt_pl[wandb]', or leave it out")
        arguments = logger.init_args
        arguments.save_dir = str(run.path)
        arguments.name = arguments.get("name") or run.path.name
        if mode is not None:
            # The logger's flag would win over the variable. Lightning's own word for offline is the older one.
            arguments.offline = mode in ("offline", "dryrun")
        more = dict(logger.get("dict_kwargs") or {})
        if arguments.offline:
            os.environ.setdefault("WANDB_SILENT", "true")  # there is no address to show
            more["mode"] = "offline"  # the logger sets the variable, which wandb reads once a process
        elif mode is not None:
            more["mode"] = mode
        if origin.get("group"):
            more.setdefault("group", arguments.get("group") or origin["group"])
        if branch:
            more.setdefault("job_type", branch)
        if branch and not config.resume:
            lineage = {"parent_run": origin.get("run_id"), "parent_step": (checkpoint or {}).get("global_step")}
            recorded = {name: value for name, value in lineage.items() if value is not None}
            more["config"] = {**more.get("config", {}), **recorded}
        elif origin.get("run_id") and not arguments.offline:
            arguments.id = origin["run_id"]  # online the run goes on; offline it gets a new segment in its group
        if more:
            logger.dict_kwargs = more


def finish_wandb() -> None:
    """End the process's W&B run: a second run of this process would be logged into it."""
    wandb = sys.modules.get("wandb")  # imported by the logger if there is one
    if wandb is not None and wandb.run is not None:
        wandb.finish()


class WayOn(Callback):
    """Say where a training that is told to end has got to, and how to go on.

    Args:
        folder: The run's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.is_global_zero and isinstance(exception, KeyboardInterrupt | SIGTERMException):
            kept = Run(self.folder).checkpoints
            way = (
                f"go on from step {max(kept)} with: mini_gpt_pl fit --ckpt_path {kept[max(kept)]}"
                if kept
                else "no checkpoint was due yet, so that it begins anew"
            )
            print(f"stopped at step {trainer.global_step}; {way}", file=sys.stderr)
