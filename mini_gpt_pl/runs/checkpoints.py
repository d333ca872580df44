"""Checkpoint files, read without trusting them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mini_gpt_pl.errors import UserError


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint's tensors and primitives on the CPU.

    Raises:
        UserError: It is missing, cut short, or no Lightning checkpoint.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no checkpoint at {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types for broken archives, with pages of advice
        raise UserError(
            f"the checkpoint {path} cannot be read ({type(error).__name__}): "
            "it is cut short or corrupt, or no checkpoint"
        ) from None
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"{path} is no Lightning checkpoint: it holds no state_dict")
    return checkpoint
