"""Checkpoint files: written whole or not at all, compared with their checksums, and read without trusting them."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from typing_extensions import override

from mini_gpt_pl.atomic import replacing
from mini_gpt_pl.errors import UserError


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint's tensors and primitives on the CPU.

    Raises:
        UserError: It is missing, cut short, altered, or no Lightning checkpoint.
    """
    verify(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types for broken archives, with pages of advice
        raise UserError(
            f"the checkpoint {path} cannot be read ({type(error).__name__}): "
            f"it is cut short or corrupt, or no checkpoint{_instead(Path(path))}"
        ) from None
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"{path} is no Lightning checkpoint: it holds no state_dict")
    return checkpoint


def verify(path: str | Path) -> None:
    """Compare every part of a checkpoint with the checksum that torch's archive has of it.

    Raises:
        UserError: It is missing, cut short or altered; the latest earlier one that is whole is named.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no checkpoint at {path}")
    if (fault := _fault(Path(path))) is not None:
        raise UserError(f"the checkpoint {path} cannot be read: {fault}{_instead(Path(path))}")


def _fault(path: Path) -> str | None:
    """What is wrong with an archive; None if nothing is, or if it is of torch's old format, which has no checksums."""
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return None
    try:
        with zipfile.ZipFile(path) as archive:
            altered = archive.testzip()
    except Exception as error:  # whatever a damaged archive makes of the library
        return f"it is cut short or corrupt ({type(error).__name__})"
    return None if altered is None else f"it is damaged, {altered} in it is not what its checksum says"


def _instead(path: Path) -> str:
    """Name the latest earlier checkpoint beside a broken one that is whole."""

    def step(file: Path) -> int:
        match = re.search(r"(\d+)(?:-v\d+)?\.ckpt$", file.name)
        return int(match[1]) if match else -1

    earlier = sorted((file for file in path.parent.glob("*.ckpt") if -1 < step(file) < step(path)), key=step)
    whole = next((file for file in reversed(earlier) if _fault(file) is None and zipfile.is_zipfile(file)), None)
    return "" if whole is None else f"; the one before it is whole: {whole}"


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning's way to write and read checkpoints, but beside the final name, synced and renamed.

    Lightning writes to the temporary folder first and moves the file from there, which is no single step where the two
    are different file systems. What is read is compared with its checksums.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(plugins=[WholeCheckpoints()])  # doctest: +SKIP
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint so that a reader sees the old file or the whole new one; remote paths are Lightning's."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replacing(Path(path)) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)

    @override
    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint that is whole.

        Raises:
            UserError: It is missing or damaged.
        """
        if "://" not in str(path) and Path(path).is_file():
            verify(path)
        return super().load_checkpoint(path, *args, **kwargs)


def write_whole(trainer: Trainer) -> None:
    """Let a trainer write its checkpoints by `WholeCheckpoints`, unless it shards them or was given another plugin."""
    strategy = trainer.strategy
    sharded = isinstance(strategy, FSDPStrategy | ModelParallelStrategy)
    if not sharded and type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = WholeCheckpoints()
