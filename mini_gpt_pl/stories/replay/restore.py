"""Model and data of a run again, from the configuration that it left behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.runs.checkpoints import read_checkpoint
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.data.datamodule import ProbedStories
from mini_gpt_pl.stories.module import ProbedGPT, check_identity
from mini_gpt_pl.stories.objective import ProbeWeight
from mini_gpt_pl.stories.reheating import Reheating
from mini_gpt_pl.training.restore import restore as restore_run


def restore(run: Run, overrides: Sequence[str] = ()) -> tuple[ProbedGPT, ProbedStories]:
    """Build the module and the data of a run from its configuration; see `training.restore.restore`.

    The module's weights are new ones: `load_weights` puts a checkpoint's in their place.

    Args:
        run: The run.
        overrides: `data.<option>=<value>` that win over the configuration, for data that has moved.

    Raises:
        UserError: There is no configuration, it is of something else, or an override is no option of the data.
    """
    if run.task not in ("stories", ""):
        raise UserError(f"{run.path} is a run of the task {run.task}: replay reads runs of stories")
    module, data = restore_run(run, overrides)
    assert isinstance(module, ProbedGPT) and isinstance(data, ProbedStories)
    return module, data


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


def probe_weight(run: Run, module: ProbedGPT) -> ProbeWeight:
    """Return lambda(t) of a run; its configuration has the parent's where it is a reheated one, as steps begin anew."""
    reheated = run.lineage
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
