"""Tensor files: written whole or not at all, and a flat vector's file, of which parts can be read.

A flat vector is one safetensors file with a tensor per parameter, in the vector's order: behind the header the file is
the vector itself, so that writing makes no copy, and a part of the vector is one read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mini_gpt_pl.atomic import replacing
from mini_gpt_pl.errors import UserError

# The format's names of what rows are stored as.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
Piece: TypeAlias = tuple[int, int]
"""Where neighbouring values lie in a file: how many, and the first one's byte."""
# The header's length stands before it, in eight bytes; the values behind it begin at a multiple of as many.
_ALIGN = 8


def write_tensors(path: Path, tensors: dict[str, Tensor], meta: dict[str, str]) -> None:
    """Write a safetensors file so that a reader sees the old file or the whole new one, never a part."""
    with replacing(path) as partial:
        save_file(tensors, partial, metadata=meta)


def read_tensors(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file; `what` it is, for the error line.

    Raises:
        UserError: The file is missing or corrupt.
    """
    with _opened(path, what) as handle:
        names = list(handle.keys())
        return {name: handle.get_tensor(name) for name in names}, handle.metadata() or {}


@contextmanager
def _opened(path: Path, what: str) -> Iterator[Any]:
    if not path.is_file():
        raise UserError(f"there is no {what} at {path}")
    try:
        with safe_open(path, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise UserError(f"the {what} {path} cannot be read ({error}): delete it or restore it") from None


def write_flat(
    path: Path, shapes: Mapping[str, Sequence[int]], values: Float[Tensor, " D"], meta: Mapping[str, str]
) -> None:
    """Write a contiguous flat vector on the host as one named tensor after another; a reader sees the old file or it.

    `shapes` are in the order in which the tensors lie in the vector; `meta` is what else the header says.
    """
    width = values.dtype.itemsize
    header: dict[str, Any] = {"__metadata__": dict(meta)}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + width * math.prod(shape)
        header[name] = {"dtype": _NAMES[values.dtype], "shape": list(shape), "data_offsets": [begin, end]}
    assert end == width * values.numel(), "the shapes are not those of the vector"
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGN)
    # Not the library's writer: it would want a copy of every tensor, as parts of one vector share their memory. A plain
    # write of the vector's bytes makes none, and lets other threads run.
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(_ALIGN, "little") + text)
        file.write(_bytes_of(values))


def _bytes_of(values: Tensor) -> memoryview:
    return values.detach().view(torch.uint8).numpy().data


@dataclass(frozen=True)
class FlatFile:
    """A file of named tensors, seen as a flat vector.

    Args:
        path: The file.
        what: What it is, for error lines.
        shapes: Of its tensors by name, in the order of its header.
        dtype: Of all of them.
        begins: Where the values of each tensor begin, in bytes from the start of the file.
        meta: What else the header says.
    """

    path: Path
    what: str
    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    begins: dict[str, int]
    meta: dict[str, str]

    @classmethod
    def open(cls, path: Path, what: str) -> FlatFile:
        """Read the header of a file and check it against the file's length.

        Raises:
            UserError: The file is missing, corrupt, or its tensors are not of one floating dtype.
        """
        with _opened(path, what), path.open("rb") as file:  # the library checks the header and the length
            start = _ALIGN + int.from_bytes(file.read(_ALIGN), "little")
            header = json.loads(file.read(start - _ALIGN))
        meta = header.pop("__metadata__", {})
        kinds = {entry["dtype"] for entry in header.values()}
        if len(kinds) != 1 or not kinds <= _DTYPES.keys():
            raise UserError(f"the {what} {path} holds no vector of one dtype: give a file that a run has written")
        return cls(
            path,
            what,
            {name: tuple(entry["shape"]) for name, entry in header.items()},
            _DTYPES[kinds.pop()],
            {name: start + entry["data_offsets"][0] for name, entry in header.items()},
            meta,
        )

    def pieces(self, names: Sequence[str]) -> list[Piece]:
        """Return where a vector of these tensors lies, in its order: one piece if they are neighbours."""
        pieces: list[Piece] = []
        for name in names:
            count, begin = math.prod(self.shapes[name]), self.begins[name]
            if pieces and pieces[-1][1] + self.dtype.itemsize * pieces[-1][0] == begin:
                pieces[-1] = (pieces[-1][0] + count, pieces[-1][1])
            else:
                pieces.append((count, begin))
        return pieces

    def read(self, pieces: Sequence[Piece], first: int, out: Float[Tensor, " n"]) -> None:
        """Fill `out`, on the host and of the file's dtype, from the vector of some tensors, from position `first` on.

        Raises:
            UserError: The file is gone, or shorter than it was.
        """
        target, width, at = _bytes_of(out), self.dtype.itemsize, 0
        try:
            with self.path.open("rb", buffering=0) as file:
                for count, begin in pieces:
                    if first < count and at < len(target):
                        part = target[at : at + width * (count - first)]
                        _fill(file, part, begin + width * first)
                        at += len(part)
                    first = max(first - count, 0)
        except OSError as error:
            raise UserError(f"the {self.what} {self.path} cannot be read ({error}): delete it or restore it") from None
        assert at == len(target), "the part reaches beyond the vector"


def _fill(file: FileIO, target: memoryview, offset: int) -> None:
    file.seek(offset)
    while target:
        count = file.readinto(target)  # lets other threads run
        if not count:
            raise OSError("it ends too early")
        target = target[count:]
