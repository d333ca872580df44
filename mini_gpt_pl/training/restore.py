"""Module, data and recorded weights of a run again, from the configuration that it left behind."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.vectors.selection import FingerprintError, ParameterSelection
from mini_gpt_pl.runs.folder import CONFIG, TRAJECTORY, Run
from mini_gpt_pl.tasks import Task, tasks
from mini_gpt_pl.training.trust import trusted_config


def restore(run: Run, overrides: Sequence[str] = ()) -> tuple[LightningModule, LightningDataModule]:
    """Build the module and the data of a run of a listed task from its configuration.

    The module has the weights that its own seed gives it, or new ones; it is not compiled. The data is not set up.

    Args:
        run: The run.
        overrides: `data.<option>=<value>` that win over the configuration, for data that has moved.

    Raises:
        UserError: There is no configuration, it is of no listed task, it names a class that is not trusted, it does
            not fit this version, or an override is no option of the data.
    """
    for override in overrides:
        if not override.startswith("data.") or "=" not in override:
            raise UserError(f"--set {override}: give data.OPTION=VALUE, such as data.tokenizer=gpt2.tiktoken")
    if not run.exists:
        raise UserError(f"there is no run folder {run.path}: give one that holds a {CONFIG}")
    if missing := [part for part in ("model", "data") if part not in run.config]:
        raise UserError(
            f"{run.path / CONFIG} configures no {' and no '.join(missing)}: it is of no run of this project"
        )
    task = tasks().get(run.task)
    if task is None:
        raise UserError(f"{run.path} is a run of no task that is installed here: give one of {', '.join(tasks())}")
    parser = _parser(task)
    # Nothing is trained here, so that an optimizer which is not installed, or was only a default, does no harm.
    config = trusted_config(run, unused=[("trainer",), ("model", "optimizer")])
    base = yaml.safe_dump({"model": config["model"], "data": config["data"]})
    seeds = [f"--{option}={run.config['seed_everything']}" for option in task.from_seed]
    try:
        parsed = parser.parse_args(["--config", base, *seeds, *(f"--{override}" for override in overrides)])
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn
            parts = parser.instantiate_classes(parsed)
    except ArgumentError as error:
        reason = "; ".join(line.strip(" -:") for line in str(error).splitlines() if line.strip())
        source = f"{run.path / CONFIG}{' with --set ' if overrides else ''}{' '.join(overrides)}"
        raise UserError(f"{source} does not fit this version of the model and the data: {reason[:300]}") from None
    return parts.model, parts.data


def _parser(task: Task) -> ArgumentParser:
    """The part of the command line that `fit` has for model and data."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile)
    for part, kind in (("model", task.load("model")), ("data", task.load("data"))):
        parser.add_class_arguments(kind, part, fail_untyped=False, sub_configs=True)
    for option in task.from_data:
        parser.link_arguments(f"data.{option}", f"model.{option}", apply_on="instantiate")
    return parser


def selection_of(run: Run, module: LightningModule) -> ParameterSelection:
    """Return the weights that the run recorded, in the order of its snapshots.

    Raises:
        UserError: The run recorded none, or its trajectory is of other weights than its configuration names.
    """
    recorders = run.callback_settings("TrajectoryRecorder")
    if not recorders:
        raise UserError(f"the run {run.path} has no TrajectoryRecorder, so its path was not recorded")
    selection = ParameterSelection.of(module, str(recorders[0]["pattern"]))
    try:
        selection.require(run.trajectory.fingerprint)
    except FingerprintError:
        raise UserError(
            f"{run.path / TRAJECTORY} is of other weights than the pattern in {CONFIG} selects: restore the one that "
            "belongs to this run"
        ) from None
    return selection
