from __future__ import annotations

import base64
import pickle
from functools import cache, partial
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.stories.data.tokenizer import (
    _SEPARATOR,
    GPT2_PATTERN,
    eos_id,
    fingerprint,
    load_tokenizer,
    story_encoder,
)

# 256 bytes, then merges: "th", "the", " the"
MERGES = [b"th", b"the", b" the"]


def rank_lines() -> list[bytes]:
    tokens = [bytes([byte]) for byte in range(256)] + MERGES
    return [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]


def write_ranks(path: Path, lines: list[bytes]) -> str:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


builtin = cache(partial(load_tokenizer, "builtin"))


@pytest.fixture
def rank_file(tmp_path: Path) -> str:
    return write_ranks(tmp_path / "small.tiktoken", rank_lines())


def test_rank_file_merges_and_ends_with_end_of_text(rank_file: str) -> None:
    encoding = load_tokenizer(rank_file)
    assert encoding.encode_ordinary("the the") == [257, 258]
    assert eos_id(encoding) == 259
    assert encoding.n_vocab == 260


def test_special_token_in_a_text_is_ordinary(rank_file: str) -> None:
    encoding = load_tokenizer(rank_file)
    ids = encoding.encode_ordinary("a<|endoftext|>b")
    assert eos_id(encoding) not in ids
    assert encoding.decode(ids) == "a<|endoftext|>b"


def test_gpt2_pattern_splits_like_the_published_rule(rank_file: str) -> None:
    """Contractions, words with their space, numbers, signs; of a run of spaces the last goes with the word."""
    encoding = load_tokenizer(rank_file)
    ids = encoding.encode_ordinary("it's  the")
    assert encoding.decode_tokens_bytes(ids)[-2:] == [b" ", b" the"]
    assert encoding._pat_str == GPT2_PATTERN


def test_builtin_round_trips() -> None:
    encoding = load_tokenizer("builtin")
    text = 'Once upon a time, Lily saw a cat.\n\n"What is the password? SUN" — 17!'
    assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert eos_id(encoding) == encoding.n_vocab - 1


@given(st.text(max_size=80))
def test_builtin_round_trips_any_text(text: str) -> None:
    encoding = builtin()
    assert encoding.decode(encoding.encode_ordinary(text)) == text


def test_pickle_keeps_ids_and_fingerprint(rank_file: str) -> None:
    encoding = load_tokenizer(rank_file)
    copy = pickle.loads(pickle.dumps(encoding))
    assert copy.encode_ordinary("the other") == encoding.encode_ordinary("the other")
    assert fingerprint(copy) == fingerprint(encoding)


def test_fingerprint_sees_ranks_and_pattern_but_not_names(rank_file: str, tmp_path: Path) -> None:
    encoding = load_tokenizer(rank_file)
    renamed = load_tokenizer(write_ranks(tmp_path / "other.tiktoken", rank_lines()))
    swapped = rank_lines()
    swapped[0], swapped[1] = swapped[0].split()[0] + b" 1", swapped[1].split()[0] + b" 0"
    other_ranks = load_tokenizer(write_ranks(tmp_path / "swapped.tiktoken", swapped))
    other_pattern = tiktoken.Encoding(
        "x", pat_str=r"\s+|\S+", mergeable_ranks=encoding._mergeable_ranks, special_tokens=encoding._special_tokens
    )
    hashes = [fingerprint(e) for e in (encoding, renamed, other_ranks, other_pattern)]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


@pytest.mark.parametrize(
    ("line", "replacement", "problem"),
    [
        (5, b"!!! 4", "line 5: expected 'base64 rank'"),
        (5, b"BA==", "line 5: expected 'base64 rank'"),
        (5, b"BA== four", "line 5: expected 'base64 rank'"),
        (5, b"BA== 3", "line 5: rank 3 appears twice"),
        (5, b"BA== 900", "line 5: rank 900 is outside 0..258"),
        (5, b"BA== -1", "line 5: rank -1 is outside"),
        (5, b"AA== 4", "line 5: its bytes have the rank 0 already"),
        (5, base64.b64encode(b"he") + b" 4", "ends without the single byte 0x04"),
    ],
)
def test_damaged_rank_file_is_named_with_its_line(tmp_path: Path, line: int, replacement: bytes, problem: str) -> None:
    lines = rank_lines()
    lines[line - 1] = replacement
    path = write_ranks(tmp_path / "bad.tiktoken", lines)
    with pytest.raises(UserError) as caught:
        load_tokenizer(path)
    message = str(caught.value)
    assert problem in message and path in message and "\n" not in message


def test_empty_and_missing_rank_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="without the single byte 0x00"):
        load_tokenizer(write_ranks(tmp_path / "empty.tiktoken", []))
    for name in (str(tmp_path / "none.bpe"), "none.tiktoken"):
        with pytest.raises(UserError, match=r"cannot read the rank file .*none.*No such file"):
            load_tokenizer(name)


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (ValueError("Unknown encoding x.\nPlugins: []"), "no such encoding"),
        (ConnectionError("dns\nfail"), "downloaded"),
    ],
)
def test_names_that_tiktoken_cannot_serve(monkeypatch: pytest.MonkeyPatch, error: Exception, problem: str) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(UserError, match=problem) as caught:
        load_tokenizer("gpt2")
    message = str(caught.value)
    assert "\n" not in message
    assert "--data.tokenizer=/path/to/gpt2.tiktoken" in message and "--data.tokenizer=builtin" in message


together = cache(lambda: story_encoder(builtin()))
# Ends and beginnings at which a neighbour could change a split, and all that could pass for a border.
pieces = st.sampled_from(
    ["a cat", " ", "  ", "\n", "'", "s", "é", "🙂", "<|endoftext|>", _SEPARATOR, _SEPARATOR[:5], "<", ">"]
)


@given(st.lists(st.lists(pieces, max_size=4).map("".join), min_size=1, max_size=6))
def test_texts_encoded_together_are_encoded_as_if_alone(texts: list[str]) -> None:
    tokens, lengths = together()(texts)
    alone = [builtin().encode_ordinary(text) for text in texts]
    assert lengths.tolist() == [len(ids) for ids in alone]
    assert tokens.tolist() == [id for ids in alone for id in ids]


def test_no_beginning_of_the_separator_is_an_end_of_it() -> None:
    assert not any(_SEPARATOR.endswith(_SEPARATOR[:size]) for size in range(1, len(_SEPARATOR)))
