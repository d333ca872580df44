"""The name under which a callback's state lies in a checkpoint, where a trainer may have several of its class."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback


def state_key(callback: Callback, **settings: Any) -> str:
    """Name a callback's state by its class and the settings that tell it from others of the class, as Lightning does.

    Args:
        callback: Whose state.
        settings: By name; their `repr` becomes part of the key.

    Example:
        >>> state_key(Callback(), name="trunk")
        "Callback{'name': 'trunk'}"
    """
    return f"{type(callback).__qualname__}{settings!r}"
