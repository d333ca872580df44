"""The clock of the benchmarks: what a device was given to do is done before the time is read."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def now(device: torch.device) -> float:
    """Seconds, once the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def milliseconds(arm: Callable[[], Any], device: torch.device) -> float:
    """Time that an arm takes once."""
    begun = now(device)
    arm()
    return 1e3 * (now(device) - begun)


def here() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def described(device: torch.device) -> dict[str, str]:
    """What a result was measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "torch": torch.__version__}
