"""A run folder as an object: what was configured, what was measured, where the weights went."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import yaml

from mini_gpt_pl.atomic import write_text
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.path import pca
from mini_gpt_pl.geometry.path.rebuild import rebuild
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.runs.record import RECORD, Record, read_record
from mini_gpt_pl.tasks import task_of

CONFIG = "config.yaml"
METRICS = "metrics.csv"
CHECKPOINTS = "checkpoints"
SNAPSHOTS = "snapshots"
TRAJECTORY = "trajectory.safetensors"
FIGURES = "figures"
OUTCOME = "outcome.json"
LINEAGE = "reheat.json"
"""The record of a run that continues another, by the name of the one command that writes it."""
REPLAY = "replay"
REPORT = "report"
WEIGHTS_ONLY = "weights-"
"""How the names of checkpoints begin that cannot be resumed, as they hold no optimizer."""
PRODUCTS: tuple[str, ...] = (CONFIG, METRICS, CHECKPOINTS, SNAPSHOTS, TRAJECTORY, FIGURES, OUTCOME, RECORD)
PRODUCTS += (LINEAGE, REPLAY, REPORT, "experiments", "suppression", "switching.json", "wandb")
PRODUCTS += ("sketches", "directions", "earlier")
"""Everything a run writes into its folder; overwriting a run removes these and nothing else."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended by itself; a run that broke off, or is still going, has none.

    Args:
        state: `finished`, or `diverged` when its loss was no longer finite.
        step: Optimizer steps taken.
        milestones: Step of each milestone that the run watched for, None for one that it did not reach.
    """

    state: Literal["finished", "diverged"]
    step: int
    milestones: dict[str, int | None] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Record it in a run folder."""
        values = {name: value for name, value in asdict(self).items() if value != {}}
        write_text(folder / OUTCOME, json.dumps(values) + "\n")


@dataclass(frozen=True)
class Run:
    """The folder of one training run.

    Example:
        >>> run = Run(Path("runs/quickstart"))  # doctest: +SKIP
        >>> run.metrics["probe/p_ood"].dropna()  # doctest: +SKIP
    """

    path: Path

    @classmethod
    def of_checkpoint(cls, checkpoint: str | Path) -> Run | None:
        """Return the run that a checkpoint lies in, or None if it lies in no run folder."""
        folder = Path(checkpoint).resolve().parent
        for candidate in (folder, folder.parent):
            if (candidate / CONFIG).is_file():
                return cls(candidate)
        return None

    @property
    def exists(self) -> bool:
        """Whether a run has begun here."""
        return any((self.path / product).exists() for product in (CONFIG, METRICS, TRAJECTORY))

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved configuration.

        Raises:
            UserError: There is none, or it is no YAML mapping.
        """
        file = self.path / CONFIG
        if not file.is_file():
            raise UserError(f"{self.path} is no run folder: it has no {CONFIG}")
        try:
            loaded = yaml.safe_load(file.read_text())
        except yaml.YAMLError as error:
            raise UserError(f"the configuration {file} is no valid YAML: {str(error).splitlines()[0]}") from None
        if not isinstance(loaded, dict):
            raise UserError(f"the configuration {file} holds no options: restore it, or give another with --config")
        return loaded

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration, or an empty one where a Trainer of the reader's own left none."""
        return self.config if (self.path / CONFIG).is_file() else {}

    @property
    def outcome(self) -> Outcome | None:
        """How the run ended, or None if it broke off or is still going.

        Raises:
            UserError: The record of it is damaged.
        """
        if (outcome := read_record(Outcome, self.path / OUTCOME)) is not None:
            return outcome
        record = self.record
        return None if record is None or record.ended is None else Outcome("finished", record.ended)

    @property
    def record(self) -> Record | None:
        """The settings that the trainer recorded beside the path; None if no path was recorded."""
        return read_record(Record, self.path / RECORD)

    @property
    def lineage(self) -> dict[str, Any] | None:
        """What a run that continues another recorded: its `parent`, as a path from here, `parent_step`, and more."""
        record = read_record(dict, self.path / LINEAGE)
        if record is not None and "parent" in record:
            record["parent"] = str((self.path / record["parent"]).resolve())
        return record

    @property
    def task(self) -> str:
        """What was trained, by its configuration; empty for a run of no listed task."""
        return task_of(self.settings)

    @property
    def replayed(self) -> dict[int, dict[str, Any]]:
        """What a replay found at each stored checkpoint, by step; empty before one."""
        files = sorted((self.path / REPLAY).glob("[0-9]*.json"))
        return {int(file.stem): read_record(dict, file) or {} for file in files}

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """All logged numbers, one row per step; a number that was not logged at a step is NaN.

        Raises:
            UserError: There are none, or the file is damaged.
        """
        file = self.path / METRICS
        if not file.is_file():
            raise UserError(f"the run {self.path} has no {METRICS}: it ended before it logged anything")
        try:
            return pd.read_csv(file, index_col="step")
        except ValueError as error:  # pandas' own errors are ValueErrors too
            raise UserError(f"{file} cannot be read ({str(error).splitlines()[0]}): restore or delete it") from None

    def series(self, name: str) -> pd.Series[float]:
        """Return one metric at the steps where it was logged; empty if it never was."""
        return self.metrics[name].dropna() if name in self.metrics else pd.Series(dtype=float)

    def last(self, name: str) -> float:
        """Return the last value of a metric, NaN if it was never logged."""
        values = self.series(name)
        return float(values.iloc[-1]) if len(values) else float("nan")

    @cached_property
    def trajectory(self) -> Trajectory:
        """The Gram matrices of the recorded weights.

        Raises:
            UserError: The file is missing or corrupt.
        """
        return Trajectory.load(self.path / TRAJECTORY)

    def rebuild_trajectory(self, pattern: str | None = None) -> Trajectory:
        r"""Compute the Gram matrices again from the snapshots, for a lost file or for other groups of weights.

        One pass over the snapshots; `.save(run.path / TRAJECTORY)` puts the result where the run's own belongs.

        Args:
            pattern: Which of the recorded weights, and their groups, as the recorder has it; as recorded for None.

        Raises:
            UserError: A snapshot is missing or corrupt, or the snapshots are too old to say what is not asked for.

        Example:
            >>> run = Run(Path("runs/mine"))
            >>> halves = run.rebuild_trajectory(r"(?P<group>attn|mlp)\.")  # doctest: +SKIP
        """
        if not (self.path / TRAJECTORY).is_file():
            return rebuild(self.snapshot_folder, pattern)
        recorded = self.trajectory
        # Which weights of another pattern have which of several rates is not recorded.
        survival = recorded.survival if recorded.rates is None else [math.nan] * len(recorded)
        return rebuild(self.snapshot_folder, pattern, survival, recorded.steps)

    @property
    def drift_rows(self) -> pca.Rows:
        """Coefficients of the drift of every snapshot but the first, whose drift is zero.

        Raises:
            UserError: Nothing has moved, so that there is no direction to speak of.
        """
        if not bool((self.trajectory.gram().diagonal()[1:] > 0).any()):
            raise UserError(f"the weights of {self.path} have not moved between snapshots: there is no path to show")
        return pca.drifts(len(self.trajectory))[1:]

    @property
    def checkpoints(self) -> dict[int, Path]:
        """Full checkpoints by optimizer step; the last version (`-v1`, `-v2`) where a resumed run came by again."""
        return self._by_step(weights_only=False)

    @property
    def stored_weights(self) -> dict[int, Path]:
        """Checkpoints by step that hold the model's weights: the full ones, and those named `weights-<step>.ckpt`."""
        return dict(sorted({**self._by_step(weights_only=True), **self.checkpoints}.items()))

    def _by_step(self, *, weights_only: bool) -> dict[int, Path]:
        files = []
        for file in (self.path / CHECKPOINTS).glob("*.ckpt"):
            match = re.search(r"(\d+)(?:-v(\d+))?\.ckpt$", file.name)
            if match and file.name.startswith(WEIGHTS_ONLY) == weights_only:
                files.append((int(match[1]), int(match[2] or 0), file))
        return {step: file for step, _, file in sorted(files)}

    @property
    def snapshot_folder(self) -> Path:
        """Where the recorded weights lie."""
        return self.path / SNAPSHOTS

    @property
    def trunk(self) -> str:
        """What the recorder calls the whole of its weights."""
        recorders = self.callback_settings("TrajectoryRecorder") or [{}]
        return str(recorders[0].get("name", "trunk"))

    def callback_settings(self, name: str) -> list[dict[str, Any]]:
        """Return the configured arguments of each of the run's callbacks of a class; most have one, or none.

        Args:
            name: Of the class, without its module.
        """
        callbacks = (self.settings.get("trainer") or {}).get("callbacks") or []
        return [
            dict(callback.get("init_args") or {})
            for callback in (callbacks if isinstance(callbacks, list) else [callbacks])
            if str(callback.get("class_path", "")).endswith(name)
        ]


def require_reportable(run: Run) -> None:
    """Check that a run recorded a path to report on.

    Raises:
        UserError: It is no run folder, or has no trajectory file.
    """
    if not run.exists:
        raise UserError(f"{run.path} is no run folder: it has no {CONFIG}")
    if not (run.path / TRAJECTORY).is_file():
        raise UserError(
            f"the run {run.path} has no {TRAJECTORY}: train it with the TrajectoryRecorder callback, "
            "or put the file back"
        )


def runs_below(folder: Path) -> list[Path]:
    """Return the folder if it is a run's, else the run folders in it at any depth, without those inside of a run.

    Raises:
        UserError: The folder does not exist, or holds no run.
    """
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}: give folders that hold a {CONFIG}")
    runs = []
    for path, folders, files in os.walk(folder, followlinks=True):
        if CONFIG in files or TRAJECTORY in files:  # a Trainer of the reader's own writes no configuration
            runs.append(Path(path))
            folders.clear()
        else:  # W&B's folder holds copies of configurations
            folders[:] = sorted(name for name in folders if name != "wandb" and not name.startswith("."))
    if not runs:
        raise UserError(f"{folder} is no run folder and holds none: nothing in it has a {CONFIG}")
    return runs
