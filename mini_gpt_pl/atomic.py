"""Files written whole or not at all: a reader sees the old file or the new one, never a part."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """Give a path to write to, which takes the place of another once it is complete.

    The partial file lies beside the final one, so that the last step stays inside one file system. Its name is drawn
    at random and it is created anew: a file or a link that somebody put there is never followed.

    Args:
        path: The final file; its folder is made if it is missing.
        sync: Wait until the disk has the data before the name changes. A file that is written anew every few seconds
            can do without: a process that is killed cannot harm it, only a machine that loses its power.

    Raises:
        OSError: The folder or the file cannot be written. The old file is then as it was.

    Example:
        >>> with replacing(Path("result.json")) as partial:  # doctest: +SKIP
        ...     partial.write_text("{}")
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    # Not by `tempfile`, whose files are their owner's alone.
    os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield partial
        if sync:
            with partial.open("rb") as handle:
                os.fsync(handle.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)  # still there only if writing failed


def write_text(path: Path, text: str, *, sync: bool = True) -> None:
    """Write a text file in UTF-8 as `replacing` does; line ends are written as they are."""
    write_bytes(path, text.encode("utf-8"), sync=sync)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all; NaN and infinities as null."""
    write_text(path, json.dumps(finite(content), indent=2, allow_nan=False) + "\n")


def finite(content: Any) -> Any:
    """Copy nested lists and dictionaries with None in place of every number that is not finite."""
    if isinstance(content, dict):
        return {key: finite(item) for key, item in content.items()}
    if isinstance(content, list | tuple):
        return [finite(item) for item in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_bytes(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Write a file as `replacing` does."""
    with replacing(path, sync=sync) as partial:
        partial.write_bytes(data)
