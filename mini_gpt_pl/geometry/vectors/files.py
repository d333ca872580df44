"""Tensor files: written whole or not at all, with a checksum, and a flat vector's file, of which parts can be read.

The header's `checksum` is the SHA-256 of everything else: the rest of the header's metadata, then name, dtype, shape
and bytes of each tensor. It is compared when a file is opened. Files of version 0.1.0 have none, and open with a
warning.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mini_gpt_pl.atomic import replacing
from mini_gpt_pl.errors import UserError

# The format's names of what rows are stored as, and of what else tensors hold.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_OTHERS = {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
_NAMES = {dtype: name for name, dtype in {**_DTYPES, **_OTHERS}.items()}
Piece: TypeAlias = tuple[int, int]
"""Where neighbouring values lie in a file: how many, and the first one's byte."""
# The header's length stands before it, in eight bytes; the values behind it begin at a multiple of as many.
_ALIGN = 8


_CHECKSUM = "checksum"
_CHUNK = 1 << 24  # bytes read at a time to compare a file with its checksum


def write_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, str]) -> None:
    """Write a safetensors file so that a reader sees the old file or the whole new one, never a part."""
    values = {name: tensor.detach().cpu().contiguous().reshape(-1) for name, tensor in tensors.items()}
    # As the library orders them: wide values first, so that each begins where its kind may.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries = [(name, tensors[name].dtype, tensors[name].shape) for name in order]
    _write(path, entries, [_bytes_of(values[name]) for name in order], meta)


def _write(
    path: Path,
    entries: Sequence[tuple[str, torch.dtype, Sequence[int]]],
    content: Sequence[memoryview],
    meta: Mapping[str, str],
) -> None:
    header: dict[str, Any] = {}
    end = 0
    for name, dtype, shape in entries:
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    assert end == sum(map(len, content)), "the shapes are not those of the values"
    digest = _digest(meta, header)
    for part in content:
        digest.update(part)
    text = json.dumps({"__metadata__": {**meta, _CHECKSUM: digest.hexdigest()}, **header}).encode()
    text += b" " * (-len(text) % _ALIGN)
    # Not the library's writer: it would want a copy of every tensor, as parts of one vector share their memory. A plain
    # write of the vector's bytes makes none, and lets other threads run.
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(_ALIGN, "little") + text)
        for part in content:
            file.write(part)


def _digest(meta: Mapping[str, str], header: Mapping[str, Any]) -> Any:
    """The digest of all but the values, which follow: the metadata, then what the header says of each tensor."""
    plain = {key: value for key, value in meta.items() if key != _CHECKSUM}
    return hashlib.sha256(json.dumps([plain, header], sort_keys=True).encode())


def read_tensors(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file; `what` it is, for the error line.

    Raises:
        UserError: The file is missing, corrupt or altered.
    """
    with _opened(path, what) as handle:
        _, _, meta = _checked_header(path, what)
        return {name: handle.get_tensor(name) for name in list(handle.keys())}, meta


def _checked_header(path: Path, what: str) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Where the values of a file begin, what it says of each tensor, and its metadata, once its checksum fits.

    Raises:
        UserError: It does not fit. A file that has none opens with a warning.
    """
    with path.open("rb") as file:
        start = _ALIGN + int.from_bytes(file.read(_ALIGN), "little")
        header = json.loads(file.read(start - _ALIGN))
        meta = header.pop("__metadata__", {})
        if _CHECKSUM not in meta:
            warnings.warn(
                f"files in {path.parent} carry no checksum, as version 0.1.0 wrote them: what may have been altered in "
                "them is not noticed",
                stacklevel=4,
            )
            return start, header, meta
        digest = _digest(meta, header)
        while part := file.read(_CHUNK):  # lets other threads run
            digest.update(part)
    if meta[_CHECKSUM] != digest.hexdigest():
        raise UserError(
            f"the {what} {path} is damaged: its content is not what its checksum says; restore it, or delete it"
        )
    return start, header, meta


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
    _write(path, [(name, values.dtype, shape) for name, shape in shapes.items()], [_bytes_of(values)], meta)


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
        """Read the header of a file, and compare the file with its checksum.

        Raises:
            UserError: The file is missing, corrupt or altered, or its tensors are not of one floating dtype.
        """
        with _opened(path, what):  # the library checks the header and the length
            start, header, meta = _checked_header(path, what)
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
