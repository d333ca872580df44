"""Pictures of the trajectory in W&B, on a slow schedule."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image  # what matplotlib writes its files with
from typing_extensions import override

from mini_gpt_pl.callbacks.recorded import RecordedProbe
from mini_gpt_pl.callbacks.schedule import Schedule
from mini_gpt_pl.figures.trajectory_figures import draw_files
from mini_gpt_pl.geometry.path import nulls, pca
from mini_gpt_pl.geometry.path.trajectory import Trajectory

COMPONENTS = 20
"""Rows of the spectrum's table."""


class GeometryPictures(RecordedProbe):
    r"""Draw the trajectory so far beside its nulls, and log it to W&B as images.

    Logged as `pictures/spectrum`, `pictures/path` and `pictures/blocks`, the figures of `figures.trajectory_figures`
    from the snapshots so far, and the spectrum as the table `pictures/spectrum_table`. The whole run is drawn once more
    at its end.

    Training does not wait for them: a process of low priority draws from a copy of the trajectory, and the pictures are
    logged, with the step that they show, once it is done. If it is still drawing at the next due step, that one is
    left out. Without a WandbLogger nothing is drawn: `cli.py report` draws a finished run from its files.

    Args:
        schedule: When to draw.
        background: False draws in the training process, which waits a few seconds each time.

    Raises:
        UserError: The trainer has no TrajectoryRecorder.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.loggers import WandbLogger
        >>> recorder = TrajectoryRecorder(r"(?P<group>layer\d)\..*weight", Schedule(every=100))
        >>> logger = WandbLogger(offline=True)  # doctest: +SKIP
        >>> trainer = Trainer(callbacks=[recorder, GeometryPictures()], logger=logger)  # doctest: +SKIP
    """

    stretchable = False  # it costs the training process next to nothing

    def __init__(self, schedule: Schedule = Schedule(every=2000), background: bool = True) -> None:  # noqa: B008 (frozen)
        super().__init__(schedule)
        self.background = background
        self._artist: Artist | None = None
        self._drawn = 0

    @override
    def _reset(self) -> None:
        self._drawn = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stepped(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.stepped(trainer) or not _wandb_loggers(trainer):
            return
        due = self.due(trainer.global_step)
        with self.watch.running():
            if due and not self.background:
                self._show(trainer)
            elif self.background:
                self._collect(trainer)
                if due and self._artist is None and (trajectory := self._new()) is not None:
                    self._artist = Artist(trajectory, self.recorder.name, trainer.global_step)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not on_train_end: the recorder takes its last snapshot there, and may come after this callback.
        if self._artist is not None:
            self._artist.process.wait()
            self._collect(trainer)
        if _wandb_loggers(trainer):
            self._show(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._artist is not None:
            self._artist.close()
            self._artist = None

    def _new(self) -> Trajectory | None:
        """Return the trajectory if it has a snapshot that no picture shows yet."""
        trajectory = self.recorder.trajectory
        if trajectory is None or len(trajectory) in (1, self._drawn):
            return None
        self._drawn = len(trajectory)
        return trajectory

    def _show(self, trainer: Trainer) -> None:
        """Draw and log what is new, here and now."""
        if (trajectory := self._new()) is not None:
            _log(trainer, draw_files(trajectory, self.recorder.name), trajectory, trainer.global_step)

    def _collect(self, trainer: Trainer) -> None:
        """Log what the other process has finished."""
        if self._artist is not None and self._artist.process.poll() is not None:
            artist, self._artist = self._artist, None
            _log(trainer, artist.pictures(), artist.trajectory, artist.step)
            artist.close()


def _log(trainer: Trainer, pictures: dict[str, bytes], trajectory: Trajectory, step: int) -> None:
    """Log PNG files as images, and the spectrum as a table; nothing where there are none."""
    import wandb  # there is a WandbLogger, and so there is wandb

    if not pictures:
        return
    media: dict[str, Any] = {}
    caption = f"snapshots up to step {trajectory.steps[-1]:,}"
    for name, data in pictures.items():
        with Image.open(io.BytesIO(data)) as image:
            media[f"pictures/{name}"] = wandb.Image(image.convert("RGB"), caption=caption)
    columns = ["component", "measured", "walk", "decaying walk"]
    rows = [list(row) for row in spectrum_rows(trajectory)]
    media["pictures/spectrum_table"] = wandb.Table(columns=columns, data=rows)
    for logger in _wandb_loggers(trainer):
        logger.log_metrics(media, step)


class Artist:
    """A process that draws a copy of a trajectory, which may grow meanwhile.

    A command of its own rather than a fork (which would copy a process that holds a GPU) or a spawned worker (which
    would run the reader's script once more).

    Args:
        trajectory: What is drawn.
        whole: Name of the whole selection.
        step: Optimizer step that the pictures belong to.
    """

    def __init__(self, trajectory: Trajectory, whole: str, step: int) -> None:
        self.trajectory = trajectory.until(trajectory.steps[-1])
        self.step = step
        self.folder = Path(tempfile.mkdtemp(prefix="pictures-"))
        file = self.folder / "trajectory.safetensors"
        self.trajectory.save(file)
        command = [sys.executable, "-m", "mini_gpt_pl.figures.trajectory_figures", str(file)]
        options = ["--whole", whole, "--out", str(self.folder), "--nice", "10"]
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*command, *options], env={**os.environ, **paths}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    def pictures(self) -> dict[str, bytes]:
        """Read the PNG files by name once the process has ended; none, and one line that says so, where it failed."""
        assert self.process.stderr is not None
        if self.process.returncode != 0:
            lines = self.process.stderr.read().decode(errors="replace").strip().splitlines()
            rank_zero_info(f"step {self.step}: no pictures: {lines[-1] if lines else 'the process was ended'}")
        return {file.stem: file.read_bytes() for file in sorted(self.folder.glob("*.png"))}

    def close(self) -> None:
        """End the process and remove its files."""
        self.process.kill()
        self.process.communicate()
        shutil.rmtree(self.folder, ignore_errors=True)


def spectrum_rows(trajectory: Trajectory) -> list[tuple[int, float, float, float]]:
    """Shares of the leading components of the whole selection's drift, beside both walks.

    Args:
        trajectory: At least two snapshots, of weights that have moved.

    Returns:
        Per component: its number from 1, and the shares of squared drift, measured, walk and decaying walk.
    """
    gram = trajectory.gram()
    paths = (gram, nulls.walk(gram), nulls.decaying_walk(gram, trajectory.survival))
    shares = [pca.pca(path, pca.drifts(len(path))[1:]).ratios[:COMPONENTS].tolist() for path in paths]
    return [(k, *values) for k, values in enumerate(zip(*shares, strict=False), 1)]


def _wandb_loggers(trainer: Trainer) -> list[WandbLogger]:
    """The W&B loggers; none on ranks other than zero."""
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger) and trainer.is_global_zero]
