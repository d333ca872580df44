"""Hand points to other machines: W&B agents, or the jobs of a cluster.

Both run `mini_gpt_pl sweep FILE --point POINT` for one point at a time. That command skips and resumes like a local
sweep and takes a lock, so a point that is handed out twice is still run once.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.sweep.grid import PROGRAM
from mini_gpt_pl.sweep.points import Call, PointRun

_OFFLINE = ("offline", "dryrun", "disabled")
# Submitit's names of these settings; any other key goes to Slurm as it is.
_SUBMITIT = {"gpus": "gpus_per_node", "cpus": "cpus_per_task", "time": "slurm_time", "minutes": "timeout_min"}
_GENERIC = ("name", "timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node")


# -------------------------------------------------------------------------------------------------------- W&B


def wandb_config(call: Call) -> dict[str, Any]:
    """The sweep in W&B's format, its command replaced by one that skips and resumes.

    An agent hands out the parameters as JSON; `/usr/bin/env` puts the run's own logger online, since there is a server.
    """
    sweep = call.sweep
    parameters = {k: {"values": list(v)} if k in sweep.varying else {"value": v[0]} for k, v in sweep.values.items()}
    return {
        "name": sweep.name,
        "method": "grid",
        "program": "cli.py",
        "command": ["${env}", "WANDB_MODE=online", "${interpreter}", *PROGRAM, *call.arguments("${args_json}")],
        "parameters": parameters,
        **sweep.about,
    }


def create_wandb(call: Call) -> tuple[str, str]:
    """Create the sweep on the W&B server.

    Returns:
        Its identifier, and the command that starts an agent.

    Raises:
        UserError: There is no server to talk to, no login, or it refuses.
    """
    mode = os.environ.get("WANDB_MODE", "").lower()
    if mode in _OFFLINE:
        raise UserError(f"--launcher wandb needs a server, but WANDB_MODE is {mode}: unset it, or use --launcher local")
    wandb, (project, entity) = importlib.import_module("wandb"), _place(call)
    try:
        identifier = str(wandb.sweep(wandb_config(call), project=project, entity=entity))
    except (wandb.errors.Error, ValueError) as error:
        hint = "log in with `wandb login`, or use --launcher local"
        raise UserError(f"W&B did not take the sweep ({error}): {hint}") from None
    path = "/".join(part for part in (entity, project, identifier) if part)
    return identifier, f"wandb agent {path}"


def run_agent(call: Call, identifier: str) -> None:
    """Work on a W&B sweep in this process until it has no more points."""
    project, entity = _place(call)
    importlib.import_module("wandb").agent(identifier, project=project, entity=entity)


def _place(call: Call) -> tuple[str, str | None]:
    project = call.sweep.project or os.environ.get("WANDB_PROJECT") or "mini_gpt_pl"
    return project, call.sweep.entity or os.environ.get("WANDB_ENTITY")


# ------------------------------------------------------------------------------------------------------ Slurm


def cluster_settings(pairs: Sequence[str]) -> tuple[str | None, dict[str, Any]]:
    """Read `key=value` settings of a cluster.

    Args:
        pairs: `gpus`, `cpus`, `time` (Slurm's notation), `minutes`, a parameter of submitit's, or one of Slurm's
            (`partition`, `account`, `mem`, `qos`); `cluster` is `slurm` unless it says `local` or `debug`.

    Returns:
        The cluster, None for the one that submitit detects, and submitit's parameters.

    Raises:
        UserError: One is no `key=value`.
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key or not value:
            raise UserError(f"--slurm {pair}: write key=value, as in --slurm partition=gpu gpus=1 time=8:00:00")
        key = _SUBMITIT.get(key, key)
        prefixed = key if key in _GENERIC or key == "cluster" or key.startswith("slurm_") else f"slurm_{key}"
        settings[prefixed] = int(value) if value.isdigit() else value
    return settings.pop("cluster", None), settings


def submit(call: Call, runs: Sequence[PointRun], pairs: Sequence[str]) -> list[str]:
    """Submit one job for each point.

    A job whose time is up is queued again by submitit, and resumes. On the cluster `debug` the points run here, now.

    Returns:
        The identifier of each job.

    Raises:
        UserError: submitit is missing, a setting is wrong, or the cluster refuses.
    """
    try:
        submitit = importlib.import_module("submitit")
    except ImportError:
        raise UserError("--launcher slurm needs submitit: pip install submitit") from None
    cluster, settings = cluster_settings(pairs)
    if cluster in (None, "slurm") and shutil.which("sbatch") is None:
        # submitit would start every point on this machine at once
        raise UserError("--launcher slurm: there is no Slurm here (no sbatch); use --launcher local")
    commands = [[sys.executable, *PROGRAM, *call.arguments(run.name)] for run in runs]
    try:
        executor = submitit.AutoExecutor(folder=call.root / ".jobs", cluster=cluster)
        executor.update_parameters(**{"name": "sweep", **settings})
        with executor.batch():  # one array
            jobs = [executor.submit(_job(submitit), command) for command in commands]
        if cluster == "debug":
            for job in jobs:
                job.exception()  # waits; the failure of a point is in its folder
    except (RuntimeError, ValueError, NameError, AssertionError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the cluster did not take the jobs ({reason}): see --slurm") from None
    return [str(job.job_id) for job in jobs]


def _job(submitit: Any) -> Any:
    """Return what a job does, so made that it is stored by value: a job need not find this package."""

    class RunCommand(submitit.helpers.Checkpointable):
        def __call__(self, command: list[str]) -> None:
            import subprocess

            subprocess.run(command, check=True)

    return RunCommand()
