"""Module and data of a finished run of residues, and its weights at any snapshot, from what lies in its folder."""

from __future__ import annotations

import torch
import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser
from torch import Tensor

from mini_gpt_pl.arithmetic.data import ResidueData
from mini_gpt_pl.arithmetic.module import ResidueClassifier
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.path.snapshots import SnapshotFolder, combine
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.tasks import tasks
from mini_gpt_pl.training.trust import trusted_config


def restore(run: Run) -> tuple[ResidueClassifier, ResidueData]:
    """Build the module, with its initial weights, and the data, with its sets, of a run from its configuration.

    Raises:
        UserError: There is no configuration, it is of another task, or it does not fit this version.
    """
    if not run.exists:
        raise UserError(f"there is no run folder {run.path}: give one that holds a config.yaml")
    task = tasks().get(run.task)
    if task is None or not issubclass(task.model_class, ResidueClassifier):
        raise UserError(f"{run.path} is a run of the task {run.task}: give one of residues")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_class_arguments(task.model_class, "model", fail_untyped=False, sub_configs=True)
    parser.add_class_arguments(task.data_class, "data", fail_untyped=False, sub_configs=True)
    for option in task.from_data:
        parser.link_arguments(f"data.{option}", f"model.{option}", apply_on="instantiate")
    # Nothing is trained here, so that an optimizer which is not installed does no harm.
    kept = trusted_config(run)
    model = {option: value for option, value in kept["model"].items() if option != "optimizer"}
    base = yaml.safe_dump({"model": model, "data": kept["data"]})
    seeds = [f"--{option}={run.config['seed_everything']}" for option in task.from_seed]
    try:
        config = parser.parse_args(["--config", base, *seeds])
        made = parser.instantiate_classes(config)
    except ArgumentError as error:
        told = " ".join(str(error).split())
        raise UserError(f"{run.path / 'config.yaml'} does not fit this version: {told[:300]}") from None
    made.data.setup()
    return made.model, made.data


def recorded(run: Run, module: ResidueClassifier) -> tuple[ParameterSelection, SnapshotFolder]:
    """The weights that a run's recorder kept, and the folder of their snapshots.

    Raises:
        UserError: The run had no recorder, or the folder is of other weights.
    """
    settings = run.callback_settings("TrajectoryRecorder")
    if not settings:
        raise UserError(f"{run.path} has no TrajectoryRecorder in its configuration: its path was not recorded")
    selection = ParameterSelection.of(module, settings[0]["pattern"])
    selection.require(run.trajectory.fingerprint)
    return selection, SnapshotFolder(run.snapshot_folder, selection)


def vectors(run: Run, module: ResidueClassifier, coefficients: Tensor) -> Tensor:
    """Vectors from coefficients over (theta_0, d_1, ...), the same in every group, by one pass over the snapshots.

    Args:
        run: Whose snapshots.
        module: As `restore` gave it; says which weights they are.
        coefficients: (K, n), one row a vector.

    Returns:
        (K, D), float32.

    Raises:
        UserError: A snapshot is missing, or of another model.
    """
    selection, folder = recorded(run, module)
    steps = run.trajectory.steps[: coefficients.shape[1]]
    groups = len(selection.groups)
    named = {str(k): row.expand(groups, -1) for k, row in enumerate(coefficients)}
    found = combine(steps, folder.read, named, selection, torch.device("cpu"))
    return torch.stack([found[str(k)].values for k in range(len(coefficients))])
