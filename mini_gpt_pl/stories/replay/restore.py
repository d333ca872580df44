"""Model and data of a run again, from the configuration that it left behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.vectors.selection import FingerprintError, ParameterSelection
from mini_gpt_pl.runs.checkpoints import read_checkpoint
from mini_gpt_pl.runs.folder import CONFIG, TRAJECTORY, Run
from mini_gpt_pl.stories.data.datamodule import ProbedStories
from mini_gpt_pl.stories.module import ProbedGPT, check_identity
from mini_gpt_pl.stories.objective import ProbeWeight
from mini_gpt_pl.stories.reheating import Reheating
from mini_gpt_pl.training.trust import trusted_config


def restore(run: Run, overrides: Sequence[str] = ()) -> tuple[ProbedGPT, ProbedStories]:
    """Build the module and the data of a run from its configuration.

    The module's weights are new ones: `load_weights` puts a checkpoint's in their place. It is not compiled.

    Args:
        run: The run.
        overrides: `data.<option>=<value>` that win over the configuration, for data that has moved.

    Raises:
        UserError: There is no configuration, it is of something else, or an override is no option of the data.
    """
    for override in overrides:
        if not override.startswith("data.") or "=" not in override:
            raise UserError(f"--set {override}: give data.OPTION=VALUE, such as data.tokenizer=gpt2.tiktoken")
    if missing := [part for part in ("model", "data") if part not in run.config]:
        raise UserError(
            f"{run.path / CONFIG} configures no {' and no '.join(missing)}: it is of no run of this project"
        )
    if run.task != "stories":
        raise UserError(f"{run.path} is a run of the task {run.task}: replay reads runs of stories")
    parser = _parser()
    # Nothing is trained here, so that an optimizer which is not installed, or was only a default, does no harm.
    kept = trusted_config(run)
    model = {option: value for option, value in kept["model"].items() if option != "optimizer"}
    base = yaml.safe_dump({"model": model, "data": kept["data"]})
    try:
        config = parser.parse_args(["--config", base, *(f"--{override}" for override in overrides)])
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn, though none is kept
            made = parser.instantiate_classes(config)
    except ArgumentError as error:
        told = "; ".join(line.strip(" -:") for line in str(error).splitlines() if line.strip())
        source = f"{run.path / CONFIG}{' with --set ' if overrides else ''}{' '.join(overrides)}"
        raise UserError(f"{source} does not fit this version of the model and the data: {told[:300]}") from None
    module: ProbedGPT = made.model
    data: ProbedStories = made.data
    return module, data


def _parser() -> ArgumentParser:
    """The part of the command line that `fit` has for model and data."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile)
    for part, kind in (("model", ProbedGPT), ("data", ProbedStories)):
        parser.add_class_arguments(kind, part, fail_untyped=False, sub_configs=True)
    for option in ("vocab_size", "context"):
        parser.link_arguments(f"data.{option}", f"model.{option}", apply_on="instantiate")
    return parser


def load_weights(module: ProbedGPT, checkpoint: Path) -> None:
    """Put the weights of a checkpoint, a full one or one of weights only, into the module.

    Raises:
        UserError: It cannot be read, or is of another model.
    """
    found = read_checkpoint(checkpoint)
    check_identity(found, module)
    try:
        module.load_state_dict(found["state_dict"])
    except RuntimeError as error:
        raise UserError(f"{checkpoint} is of another model: {' '.join(str(error).split())[:200]}") from None


def selection_of(run: Run, module: ProbedGPT) -> ParameterSelection:
    """Return the weights that the run recorded, in the order of its snapshots.

    Raises:
        UserError: The run recorded none, or its trajectory is of other weights than its configuration names.
    """
    recorders = run.callback_settings("TrajectoryRecorder")
    if not recorders:
        raise UserError(
            f"the run {run.path} has no TrajectoryRecorder, so it left no path to measure gradients against"
        )
    selection = ParameterSelection.of(module, str(recorders[0]["pattern"]))
    try:
        selection.require(run.trajectory.fingerprint)
    except FingerprintError:
        raise UserError(
            f"{run.path / TRAJECTORY} is of other weights than the pattern in {CONFIG} selects: restore the one that "
            "belongs to this run"
        ) from None
    return selection


def probe_weight(run: Run, module: ProbedGPT) -> ProbeWeight:
    """Return lambda(t) of a run; its configuration has the parent's where it is a reheated one, as steps begin anew."""
    reheated = run.reheated
    if reheated is None:
        return module.probe_weight
    constant = run.config.get("probe_weight")
    settings = Reheating(probe_weight=None if constant is None else float(constant))
    return settings.weight(module.probe_weight, int(reheated.get("parent_step", 0)))


def device_of(accelerator: str) -> torch.device:
    """Return the device: `cpu`, `cuda`, or for `auto` the better one that there is.

    Raises:
        UserError: There is no GPU.
    """
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise UserError("--accelerator cuda: torch sees no GPU here; use --accelerator cpu")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")
