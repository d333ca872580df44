"""Byte-pair encodings: the packaged one, a rank file, or one that tiktoken knows by name.

Text is always encoded with ``encode_ordinary``: a story that contains ``<|endoftext|>`` must not end there.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import resources
from itertools import chain
from pathlib import Path

import numpy as np
import tiktoken
from jaxtyping import Int

from mini_gpt_pl.errors import UserError

END_OF_TEXT = "<|endoftext|>"
"""The one special token of a rank file; it separates nothing in our batches and only pads them."""

GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
"""How GPT-2 cuts text before merging (Radford et al. 2019): contractions, words, numbers, signs, white space."""


# It must not begin with an end of itself: a text before it could then complete one too early.
_SEPARATOR = "<|end of one story of a batch|>"
StoryEncoder = Callable[[Sequence[str]], tuple[Int[np.ndarray, " n"], Int[np.ndarray, " k"]]]


def load_tokenizer(name: str) -> tiktoken.Encoding:
    """Load an encoding, which pickles, so that worker processes can have it.

    Args:
        name: ``"builtin"`` for the packaged ranks; a path (it exists, ends with ``.tiktoken`` or holds a path
            separator) for a file with lines ``base64 rank``, split by GPT-2's pattern and with ``<|endoftext|>``
            as the id after the last rank; anything else is a name for ``tiktoken.get_encoding``, e.g. ``"gpt2"``.

    Raises:
        UserError: The file is missing or damaged, the name is unknown, or its ranks cannot be downloaded.
    """
    if name == "builtin":
        with resources.as_file(resources.files(__package__) / "assets" / "builtin.tiktoken") as path:
            return _from_ranks(path)
    if name.endswith(".tiktoken") or os.sep in name or "/" in name or Path(name).is_file():
        return _from_ranks(Path(name).expanduser())
    try:
        return tiktoken.get_encoding(name)
    except (ValueError, OSError) as error:
        # An unknown name is a ValueError; all errors of the download are OSErrors.
        unreachable = isinstance(error, OSError)
        problem = "its ranks cannot be downloaded" if unreachable else "tiktoken knows no such encoding"
        raise UserError(
            f"tokenizer {name!r}: {problem}; give a rank file's path with --data.tokenizer=/path/to/gpt2.tiktoken, "
            "or use --data.tokenizer=builtin"
        ) from error


def eos_id(encoding: tiktoken.Encoding) -> int:
    """Give the id of ``<|endoftext|>``."""
    return encoding.eot_token


def fingerprint(encoding: tiktoken.Encoding) -> str:
    """Hash what decides the ids of a text, ranks and split pattern, but not the encoding's name: SHA-256 in hex."""
    digest = hashlib.sha256(encoding._pat_str.encode())
    for token, rank in sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1]):
        digest.update(b"%d %d " % (rank, len(token)) + token)
    return digest.hexdigest()


@lru_cache(maxsize=2)  # its tables take a while to build
def story_encoder(encoding: tiktoken.Encoding) -> StoryEncoder:
    """Make a function that encodes k texts in one call: all tokens end to end, and the number of each text's.

    A call holds no interpreter's lock, so that threads can encode side by side. The texts are joined by a special token
    of our own, at which tiktoken cuts before anything else, so that each is encoded as if it were alone. Special tokens
    are text like any other, and none is added.
    """
    separator = encoding.n_vocab
    separated = tiktoken.Encoding(
        name=f"{encoding.name}, separated",
        pat_str=encoding._pat_str,
        mergeable_ranks=encoding._mergeable_ranks,
        special_tokens={_SEPARATOR: separator},
    )

    def encode(texts: Sequence[str]) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " k"]]:
        joined = "".join(text + _SEPARATOR for text in texts)
        ids = separated.encode_to_numpy(joined, allowed_special={_SEPARATOR}, disallowed_special=())
        ends = np.flatnonzero(ids == separator)
        if len(ends) != len(texts):  # a text holds the separator
            alone = [encoding.encode_ordinary(text) for text in texts]
            return np.array([*chain(*alone)], dtype=ids.dtype), np.array([len(ids) for ids in alone])
        return np.delete(ids, ends), np.diff(ends, prepend=-1) - 1

    return encode


def _from_ranks(path: Path) -> tiktoken.Encoding:
    # A damaged table would make tiktoken panic, or silently encode to other ids: look at every line.
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(
            f"tokenizer: cannot read the rank file {path} ({error.strerror}); give another with --data.tokenizer"
        ) from error
    entries = [(number, *_read_line(path, number, line)) for number, line in enumerate(lines, 1) if line.strip()]
    ranks: dict[bytes, int] = {}
    seen: set[int] = set()
    for number, token, rank in entries:
        if token in ranks:
            raise _damaged(path, number, f"its bytes have the rank {ranks[token]} already")
        if rank in seen or not 0 <= rank < len(entries):
            problem = "appears twice" if rank in seen else f"is outside 0..{len(entries) - 1}"
            raise _damaged(path, number, f"rank {rank} {problem}")
        ranks[token] = rank
        seen.add(rank)
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise _damaged(path, len(lines), f"the file ends without the single byte 0x{missing[0]:02x}")
    return tiktoken.Encoding(
        name=path.stem, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)}
    )


def _read_line(path: Path, number: int, line: bytes) -> tuple[bytes, int]:
    try:
        token, rank = line.split()
        return base64.b64decode(token, validate=True), int(rank)
    except (ValueError, binascii.Error):
        # What stands there is not shown: a folder that was sent may name any file as its tokenizer.
        raise _damaged(path, number, f"expected 'base64 rank', found {len(line)} bytes of something else") from None


def _damaged(path: Path, number: int, problem: str) -> UserError:
    return UserError(f"tokenizer: {path}, line {number}: {problem}; give a whole rank file with --data.tokenizer")
