"""Where text comes from, through Hugging Face ``datasets``, and its tokens as one flat array."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Literal

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import tiktoken

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.stories.data import stories
from mini_gpt_pl.stories.data.tokenizer import fingerprint, story_encoder

Split = Literal["train", "val"]

MIN_CHARACTERS = 40
"""Shorter texts are dropped: they are headings and debris, and leave a probe no story to hide in."""

HELD_OUT = 0.05
"""The share of the training rows that validates when no validation files are given."""

VAL_OFFSET = 1_000_000
"""Where the indices of builtin validation stories begin; training ones begin at 0."""

HUB_NAME = "roneneldan/TinyStories"
HUB_SECONDS = 5.0

# A call long enough that threads do not meet at the interpreter's lock; enough calls that they end together.
_STORIES_A_CALL = 128
_CALLS_A_THREAD = 8

_BUILDERS = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet"}
_DEFAULT_ROWS: dict[str, dict[str, int | None]] = {
    "tinystories": {"train": 200_000, "val": 5_000},
    "builtin": {"train": 6_000, "val": 400},
    "files": {"train": None, "val": None},
}


@dataclass(frozen=True)
class CorpusConfig:
    """Which stories to train and validate on.

    Args:
        name: "builtin" writes simple stories itself and needs no network; "tinystories" is roneneldan/TinyStories
            from the Hugging Face hub; "files" reads your own JSONL, text or Parquet files.
        train_rows: Rows of the training split to read, from its start; by default 200,000 of tinystories,
            6,000 of builtin, all of files.
        val_rows: Rows of the validation split to read; by default 5,000 of tinystories, 400 of builtin,
            all of files.
        train_files: For "files": paths that end with .jsonl, .json, .txt (each also with .gz) or .parquet,
            one kind in a list. In a text file each line is one story.
        val_files: For "files": the same for validation. Where it is empty, the last 5 % of the rows of
            train_files are held out of training and validate instead; train_rows does not move that border.
        text_column: The column of JSONL and Parquet files that holds the story.
        seed: Seed of the builtin stories.
        num_proc: Processes that read and tokenize; null for this one alone, which tokenizes on all of its cores.

    Raises:
        UserError: A number of rows or processes is not positive or too large, or "files" comes without train_files.
    """

    name: Literal["tinystories", "files", "builtin"] = "builtin"
    train_rows: int | None = None
    val_rows: int | None = None
    train_files: list[str] = field(default_factory=list)
    val_files: list[str] = field(default_factory=list)
    text_column: str = "text"
    seed: int = 0
    num_proc: int | None = None

    def __post_init__(self) -> None:
        for option in ("train_rows", "val_rows", "num_proc"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise UserError(f"--data.corpus.{option}={value}: give 1 or more, or null for the default")
        if self.name == "builtin" and (self.train_rows or 0) > VAL_OFFSET:
            raise UserError(f"--data.corpus.train_rows={self.train_rows}: builtin has {VAL_OFFSET:,} training stories")
        if self.name == "files" and not self.train_files:
            raise UserError("--data.corpus.name=files needs --data.corpus.train_files=[PATH,...]")
        if self.name != "files":
            unread = [name for name in ("train_files", "val_files") if getattr(self, name)]
            unread += ["text_column"] * (self.text_column != "text")
            if unread:
                raise UserError(
                    f"--data.corpus.{unread[0]} is read only with --data.corpus.name=files, and this one is {self.name}"
                )

    def rows(self, split: Split) -> int | None:
        """Give the number of rows to read of a split; None means all."""
        chosen = self.train_rows if split == "train" else self.val_rows
        return _DEFAULT_ROWS[self.name][split] if chosen is None else chosen


def load_texts(config: CorpusConfig, split: Split, cache_dir: str | None = None) -> datasets.Dataset:
    """Read one split of the corpus; everything is cached as Arrow files by ``datasets``.

    Blank rows and texts shorter than 40 characters are dropped after the rows have been counted off.

    Args:
        config: Which corpus.
        split: Which part of it.
        cache_dir: Where ``datasets`` keeps its files; None for its own default.

    Returns:
        A dataset with the one column "text"; it may be empty (see ``require_rows``).

    Raises:
        UserError: The hub is out of reach, a file is missing, damaged or without the column, or the cache cannot be
            written.
    """
    try:
        return _clean_texts(config, split, cache_dir)
    except UserError:
        raise
    except OSError as error:
        place = "its default folder" if cache_dir is None else cache_dir
        raise UserError(
            f"corpus {config.name}: the cache in {place} cannot be used ({_first_line(error)}); give another folder "
            "with --data.cache_dir"
        ) from error
    except Exception as error:  # of datasets, pyarrow and the decoders, which raise a dozen types for damaged rows
        if config.name != "files":
            raise
        files = config.val_files if split == "val" and config.val_files else config.train_files
        reason = _first_line(error.__cause__ or error)
        raise UserError(f"corpus files: cannot read the texts of {', '.join(files)} ({reason}); check them") from error


def _clean_texts(config: CorpusConfig, split: Split, cache_dir: str | None) -> datasets.Dataset:
    column = "text"
    if config.name == "tinystories":
        texts = _tinystories(config, split, cache_dir)
    elif config.name == "builtin":
        texts = _builtin(config, split, cache_dir)
    else:
        texts, column = _own_files(config, split, cache_dir)
    if len(texts) == 0:
        return datasets.Dataset.from_dict({"text": []})
    return texts.map(
        partial(_long_enough, column=column),
        batched=True,
        num_proc=_processes(config.num_proc, texts),
        remove_columns=texts.column_names,
        features=datasets.Features({"text": datasets.Value("string")}),
        new_fingerprint=_derived(texts, "clean", column, str(MIN_CHARACTERS)),
        desc="Dropping short rows",
    )


def require_rows(rows: Sized, minimum: int, what: str) -> None:
    """Refuse a corpus that cannot fill one batch.

    Raises:
        UserError: There are fewer rows than ``minimum``; it names them as ``what`` does.
    """
    if len(rows) < minimum:
        raise UserError(
            f"corpus: {len(rows):,} {what} of at least {MIN_CHARACTERS} characters, but {minimum:,} are needed; "
            "give more text (--data.corpus) or a smaller --data.batch_size"
        )


@dataclass(frozen=True)
class TokenizedStories:
    """All stories of a split as one flat array: story i is ``tokens[offsets[i]:offsets[i + 1]]``.

    Args:
        tokens: (N,) token ids, uint16 if the vocabulary fits and int32 otherwise.
        offsets: (stories + 1,) int64, the first is 0 and the last N.
    """

    tokens: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        # An explicit bound, or offsets[-1] would turn story -1 and iteration past the end into nonsense.
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def tokenize(texts: datasets.Dataset, encoding: tiktoken.Encoding, num_proc: int | None = None) -> TokenizedStories:
    """Encode every text of the column "text", in order, without special tokens.

    The result is cached beside the texts under their and the encoding's fingerprints. Without ``num_proc`` this process
    encodes alone, on all of its cores.
    """
    dtype = np.dtype(np.uint16 if encoding.n_vocab < 65_536 else np.int32)
    if len(texts) == 0:
        return TokenizedStories(np.zeros(0, dtype), np.zeros(1, np.int64))
    threads = available_cores() if num_proc is None else 1
    encoded = texts.with_format("arrow").map(
        partial(_encode, encoding=encoding, dtype=dtype, threads=threads),
        batched=True,
        batch_size=_STORIES_A_CALL * _CALLS_A_THREAD * threads,
        num_proc=_processes(num_proc, texts),
        remove_columns=["text"],
        new_fingerprint=_derived(texts, "tokens", fingerprint(encoding)),
        desc="Tokenizing",
    )
    # Arrow holds a list column as its values end to end, just what is wanted; nothing is looped over but chunks.
    chunks = encoded.data.column("tokens").chunks
    lengths = [np.asarray(chunk.value_lengths(), dtype=np.int64) for chunk in chunks]
    offsets = np.concatenate([np.zeros(1, np.int64), *lengths]).cumsum()
    return TokenizedStories(np.concatenate([chunk.flatten().to_numpy() for chunk in chunks]), offsets)


def _encode(table: pa.Table, encoding: tiktoken.Encoding, dtype: np.dtype, threads: int) -> pa.Table:
    texts = table["text"].to_pylist()
    calls = [texts[first : first + _STORIES_A_CALL] for first in range(0, len(texts), _STORIES_A_CALL)]
    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(story_encoder(encoding), calls))
    offsets = np.concatenate([[0], *(lengths for _, lengths in parts)]).cumsum()
    tokens = np.concatenate([tokens for tokens, _ in parts]).astype(dtype)
    column = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(tokens))
    return pa.table({"tokens": column})


def _long_enough(batch: dict[str, list[str | None]], column: str) -> dict[str, list[str]]:
    # A text file's line that holds only <|endoftext|> is shorter than the limit too.
    return {"text": [text for text in batch[column] if text and text.strip() and len(text) >= MIN_CHARACTERS]}


def available_cores() -> int:
    """Give the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processes(num_proc: int | None, rows: Sized) -> int | None:
    return None if num_proc is None else min(num_proc, len(rows))


def _derived(texts: datasets.Dataset, *parts: str) -> str:
    """Name a cache file by what it is made from: hashing the function instead misses edits in imported modules."""
    return hashlib.sha256("\n".join((texts._fingerprint, *parts)).encode()).hexdigest()[:32]


def _builtin(config: CorpusConfig, split: Split, cache_dir: str | None) -> datasets.Dataset:
    rows = config.rows(split)
    assert rows is not None
    # What they are written from is part of the cache key: a changed grammar must not find the old stories.
    version = hashlib.sha256(b"".join(source.read_bytes() for source in stories.SOURCES)).hexdigest()
    start = VAL_OFFSET if split == "val" else 0
    return datasets.Dataset.from_generator(
        _written,
        cache_dir=cache_dir,
        gen_kwargs={"seed": config.seed, "start": start, "rows": rows, "version": version},
    )


def _written(seed: int, start: int, rows: int, version: str) -> Iterator[dict[str, str]]:
    yield from ({"text": stories.story(seed, index)} for index in range(start, start + rows))


def _tinystories(config: CorpusConfig, split: Split, cache_dir: str | None) -> datasets.Dataset:
    part = f"{'train' if split == 'train' else 'validation'}[:{config.rows(split)}]"
    try:
        with _offline_if_unreachable():
            return datasets.load_dataset(HUB_NAME, split=part, cache_dir=cache_dir)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"corpus tinystories: {HUB_NAME} is neither cached nor to be had from the hub ({_first_line(error)}); "
            "use --data.corpus.name=files --data.corpus.train_files=[PATH] or --data.corpus.name=builtin"
        ) from error


@contextmanager
def _offline_if_unreachable() -> Iterator[None]:
    """Ask the hub briefly; without an answer let ``datasets`` look only into its cache: it would try half a minute."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or not _hub_answers()
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


@cache  # a process asks once: it reads several splits, and a hub out of reach takes seconds each time
def _hub_answers() -> bool:
    try:
        huggingface_hub.HfApi().dataset_info(HUB_NAME, timeout=HUB_SECONDS)
    except Exception:
        return False
    return True


def _own_files(config: CorpusConfig, split: Split, cache_dir: str | None) -> tuple[datasets.Dataset, str]:
    own = config.val_files if split == "val" else config.train_files
    texts, column = _read_files(own or config.train_files, config.text_column, cache_dir)
    if not config.val_files and len(texts) == 1:
        raise UserError(
            f"corpus files: {', '.join(config.train_files)} holds one text, of which none can be held out to validate: "
            "give --data.corpus.val_files, or more texts (each line of a .txt file is one)"
        )
    if not config.val_files:
        held_out = min(max(1, round(HELD_OUT * len(texts))), len(texts))
        border = len(texts) - held_out
        texts = texts.select(range(border) if split == "train" else range(border, len(texts)))
    rows = config.rows(split)
    return (texts if rows is None else texts.select(range(min(rows, len(texts))))), column


def _read_files(paths: list[str], column: str, cache_dir: str | None) -> tuple[datasets.Dataset, str]:
    builder = _builder(paths)
    named = ", ".join(paths)
    try:
        texts = datasets.load_dataset(builder, data_files=paths, split="train", cache_dir=cache_dir)
    except Exception as error:  # StopIteration, EOFError, UnicodeDecodeError, ...: a type for every kind of damage
        if isinstance(error, FileExistsError | FileNotFoundError | PermissionError):
            raise  # of the cache: the files are there
        reason = _first_line(error.__cause__ or error)
        raise UserError(f"corpus files: cannot read {named} as {builder} ({reason}); check the files") from error
    column = "text" if builder == "text" else column
    if column not in texts.column_names:
        raise UserError(
            f"corpus files: no column {column!r} in {named}; there are {', '.join(sorted(texts.column_names))}: "
            "name one with --data.corpus.text_column"
        )
    if texts.features[column] not in (datasets.Value("string"), datasets.Value("large_string")):
        kind = texts.features[column]
        raise UserError(
            f"corpus files: column {column!r} of {named} holds {getattr(kind, 'dtype', kind)}, not text; "
            "name another with --data.corpus.text_column"
        )
    return texts, column


def _builder(paths: list[str]) -> str:
    builders = set()
    for path in map(Path, paths):
        if not path.is_file():
            raise UserError(f"corpus files: there is no file {path}; correct --data.corpus.train_files or val_files")
        if path.stat().st_size == 0:
            raise UserError(f"corpus files: {path} is empty; take it out of --data.corpus.train_files or val_files")
        packed = path.suffix == ".gz"
        suffix = Path(path.stem).suffix if packed else path.suffix
        builder = _BUILDERS.get(suffix)
        if builder is None or (packed and builder == "parquet"):
            raise UserError(
                f"corpus files: cannot tell what {path} holds; give .jsonl, .json, .txt (each also .gz) or .parquet"
            )
        builders.add(builder)
    if len(builders) > 1:
        raise UserError(
            f"corpus files: {', '.join(paths)} mix {' and '.join(sorted(builders))}; give one kind in a list"
        )
    return builders.pop()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
