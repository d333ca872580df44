from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import one_line_error

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.stories.data import corpus, stories
from mini_gpt_pl.stories.data.corpus import CorpusConfig, load_texts, require_rows, tokenize
from mini_gpt_pl.stories.data.tokenizer import load_tokenizer

STORIES = [f"Once upon a time there was number {i}, and number {i} was happy all day long." for i in range(40)]


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.disable_progress_bars()
    corpus._hub_answers.cache_clear()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "default-cache")


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


def as_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(texts)))


def as_jsonl_gz(path: Path, texts: list[str]) -> None:
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def as_txt(path: Path, texts: list[str]) -> None:
    path.write_text("\n<|endoftext|>\n\n".join(texts) + "\n<|endoftext|>\n")


def as_txt_gz(path: Path, texts: list[str]) -> None:
    with gzip.open(path, "wt") as file:
        file.write("\n<|endoftext|>\n".join(texts))


def as_parquet(path: Path, texts: list[str]) -> None:
    pq.write_table(pa.table({"text": texts, "n": range(len(texts))}), path)


def as_json(path: Path, texts: list[str]) -> None:
    path.write_text(json.dumps([{"text": text} for text in texts]))


WRITERS: dict[str, Callable[[Path, list[str]], None]] = {
    "a.jsonl": as_jsonl,
    "a.jsonl.gz": as_jsonl_gz,
    "a.json": as_json,
    "a.txt": as_txt,
    "a.txt.gz": as_txt_gz,
    "a.parquet": as_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_each_format_gives_the_same_texts(tmp_path: Path, cache: str, name: str) -> None:
    WRITERS[name](tmp_path / name, STORIES)
    config = CorpusConfig("files", train_files=[str(tmp_path / name)], val_files=[str(tmp_path / name)])
    texts = load_texts(config, "train", cache)
    assert texts.column_names == ["text"]
    assert texts["text"][:] == STORIES


def test_short_and_blank_rows_are_dropped_and_others_left_as_they_are(tmp_path: Path, cache: str) -> None:
    kept = ["x" * 40, "  " + "y" * 38, "<|endoftext|>" * 4]
    rows = [*kept, "z" * 39, "", " " * 60]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows) + '{"text": null}\n')
    config = CorpusConfig("files", train_files=[str(path)], val_files=[str(path)])
    assert load_texts(config, "train", cache)["text"][:] == kept


def test_rows_are_counted_before_short_ones_are_dropped(tmp_path: Path, cache: str) -> None:
    path = tmp_path / "a.jsonl"
    as_jsonl(path, [STORIES[0], "short", *STORIES[1:]])
    config = CorpusConfig("files", train_files=[str(path)], val_files=[str(path)], train_rows=3, val_rows=1)
    assert load_texts(config, "train", cache)["text"][:] == STORIES[:2]
    assert load_texts(config, "val", cache)["text"][:] == STORIES[:1]


def test_held_out_rows_are_the_last_and_never_train(tmp_path: Path, cache: str) -> None:
    path = tmp_path / "a.jsonl"
    as_jsonl(path, STORIES)
    for rows in (None, 39, 5):
        config = CorpusConfig("files", train_files=[str(path)], train_rows=rows)
        assert load_texts(config, "val", cache)["text"][:] == STORIES[38:]
        assert load_texts(config, "train", cache)["text"][:] == STORIES[:38][:rows]


def test_several_files_follow_each_other(tmp_path: Path, cache: str) -> None:
    as_jsonl(tmp_path / "a.jsonl", STORIES[:20])
    as_jsonl_gz(tmp_path / "b.jsonl.gz", STORIES[20:])
    paths = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl.gz")]
    config = CorpusConfig("files", train_files=paths, val_files=paths)
    assert load_texts(config, "train", cache)["text"][:] == STORIES


def test_edited_file_is_read_again(tmp_path: Path, cache: str) -> None:
    path = tmp_path / "a.jsonl"
    config = CorpusConfig("files", train_files=[str(path)], val_files=[str(path)])
    as_jsonl(path, STORIES[:10])
    assert len(load_texts(config, "train", cache)) == 10
    as_jsonl(path, STORIES)
    assert len(load_texts(config, "train", cache)) == 40


def files_error(paths: list[Path], cache: str, column: str = "text") -> str:
    config = CorpusConfig("files", train_files=[str(path) for path in paths], text_column=column)
    with pytest.raises(UserError) as caught:
        load_texts(config, "train", cache)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_errors_of_files_name_file_and_remedy(tmp_path: Path, cache: str) -> None:
    good, table, broken = tmp_path / "a.jsonl", tmp_path / "a.parquet", tmp_path / "broken.jsonl"
    as_jsonl(good, STORIES)
    as_parquet(table, STORIES)
    broken.write_text('{"text": \n oh')
    assert str(tmp_path / "none.jsonl") in files_error([tmp_path / "none.jsonl"], cache)
    assert "mix json and parquet" in files_error([good, table], cache)
    assert "there are n, text" in files_error([good], cache, column="story")
    assert "holds int64, not text" in files_error([good], cache, column="n")
    assert str(broken) in files_error([broken], cache)
    (tmp_path / "empty.txt").touch()
    assert "empty.txt is empty" in files_error([tmp_path / "empty.txt"], cache)
    as_txt_gz(tmp_path / "empty.jsonl.gz", [])
    assert "cannot read" in files_error([tmp_path / "empty.jsonl.gz"], cache)
    (tmp_path / "a.parquet.gz").write_text("x")
    (tmp_path / "a.csv").write_text("x")
    for name in ("a.parquet.gz", "a.csv"):
        assert "cannot tell what" in files_error([tmp_path / name], cache)


def test_config_is_checked() -> None:
    with pytest.raises(UserError, match="train_files"):
        CorpusConfig("files")
    with pytest.raises(UserError, match="val_rows=0"):
        CorpusConfig(val_rows=0)
    with pytest.raises(UserError, match="train_rows=2000000"):
        CorpusConfig(train_rows=2_000_000)


def test_texts_that_cannot_be_read_are_named_in_one_line(tmp_path: Path, cache: str) -> None:
    """Whatever the libraries raise for it: decoding, damaged archives, columns that hold no text."""
    long = "a text of more than forty characters, to be kept"
    rows = "\n".join(json.dumps({"text": long}) for _ in range(40))
    packed = gzip.compress(rows.encode())
    for name, content, words in (
        ("latin.jsonl", rows.replace("a text", "\u00e9t\u00e9").encode("latin-1"), "cannot read"),
        ("latin.txt", f"\u00e9{long}\n{long}\n".encode("latin-1"), "cannot read"),
        ("cut.jsonl.gz", packed[: len(packed) // 2], "ended before"),
        ("list.jsonl", b'{"text": ["a", "b"]}\n{"text": ["c"]}\n', "not text"),
        ("mixed.jsonl", f'{{"text": "{long}"}}\n{{"text": 3}}\n'.encode(), "not text"),
        ("one.txt", long.encode(), "holds one text"),
    ):
        (tmp_path / name).write_bytes(content)
        with one_line_error(words):
            load_texts(CorpusConfig(name="files", train_files=[str(tmp_path / name)]), "train", cache)


@pytest.mark.parametrize("place", ["file", "/proc/cache"])
def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, place: str) -> None:
    folder = tmp_path / place  # an absolute path stays as it is
    if place == "file":
        folder.write_text("")
    with one_line_error(r"--data\.cache_dir"):
        load_texts(CorpusConfig(train_rows=4), "train", str(folder))


@pytest.mark.parametrize("option", [{"train_files": ["a.txt"]}, {"val_files": ["a.txt"]}, {"text_column": "story"}])
def test_options_of_files_are_refused_for_other_texts(option: dict[str, Any]) -> None:
    with one_line_error(f"{next(iter(option))} is read only with --data.corpus.name=files"):
        CorpusConfig(name="builtin", **option)


def test_corpus_without_stories_is_empty_and_refused(tmp_path: Path, cache: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text("short\nlines\n")
    config = CorpusConfig("files", train_files=[str(path)], val_files=[str(path)])
    tokenized = tokenize(load_texts(config, "train", cache), load_tokenizer("builtin"))
    assert len(tokenized) == 0 and tokenized.offsets.tolist() == [0]
    with one_line_error(r"0 training stories .* 64 are needed"):
        require_rows(tokenized, 64, "training stories")
    require_rows(tokenized, 0, "training stories")


def test_builtin_splits_are_disjoint_and_cached(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CorpusConfig(train_rows=30, val_rows=20, seed=3)
    train, val = (load_texts(config, split, cache)["text"][:] for split in ("train", "val"))
    assert train == [stories.story(3, index) for index in range(30)]
    assert val == [stories.story(3, corpus.VAL_OFFSET + index) for index in range(20)]

    def forbidden(seed: int, index: int) -> str:
        raise AssertionError("written again")

    monkeypatch.setattr(stories, "story", forbidden)
    assert load_texts(config, "train", cache)["text"][:] == train
    with pytest.raises(Exception, match="generating"):
        load_texts(CorpusConfig(train_rows=30, seed=4), "train", cache)


def test_default_rows() -> None:
    assert CorpusConfig("tinystories").rows("train") == 200_000
    assert CorpusConfig("tinystories").rows("val") == 5_000
    assert (CorpusConfig().rows("train"), CorpusConfig().rows("val")) == (6_000, 400)
    assert CorpusConfig("files", train_files=["x"]).rows("val") is None


def test_tinystories_asks_for_its_rows_and_falls_back_on_the_cache(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, tried = [], []

    def unreachable(self: object, *args: object, **kwargs: object) -> None:
        tried.append(args)
        raise ConnectionError

    def load(name: str, split: str, cache_dir: str) -> datasets.Dataset:
        asked.append((name, split, cache_dir, datasets.config.HF_HUB_OFFLINE))
        return datasets.Dataset.from_dict({"text": STORIES})

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", load)
    before = datasets.config.HF_HUB_OFFLINE
    config = CorpusConfig("tinystories", val_rows=7)
    load_texts(config, "train", cache)
    load_texts(config, "val", cache)
    assert asked == [
        ("roneneldan/TinyStories", "train[:200000]", cache, True),
        ("roneneldan/TinyStories", "validation[:7]", cache, True),
    ]
    assert before == datasets.config.HF_HUB_OFFLINE
    assert len(tried) == 1  # a hub that does not answer takes seconds, and is asked once


def test_tinystories_without_network_fails_fast_and_says_the_way_round(
    cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(self: object, *args: object, **kwargs: object) -> None:
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    start = time.monotonic()
    with one_line_error(r"--data\.corpus\.train_files=.*--data\.corpus\.name=builtin"):
        load_texts(CorpusConfig("tinystories"), "train", cache)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("num_proc", [None, 2])
def test_tokens_are_those_of_each_text(tmp_path: Path, cache: str, num_proc: int | None) -> None:
    path = tmp_path / "a.jsonl"
    texts = [*STORIES, "end<|endoftext|>middle " * 3]
    as_jsonl(path, texts)
    config = CorpusConfig("files", train_files=[str(path)], val_files=[str(path)], num_proc=num_proc)
    encoding = load_tokenizer("builtin")
    tokenized = tokenize(load_texts(config, "train", cache), encoding, num_proc)
    assert tokenized.tokens.dtype == np.uint16 and tokenized.offsets.dtype == np.int64
    assert [tokenized[i].tolist() for i in range(len(tokenized))] == [encoding.encode_ordinary(text) for text in texts]
    assert np.shares_memory(tokenized[3], tokenized.tokens)
    with pytest.raises(IndexError):
        tokenized[len(texts)]


def test_many_arrow_chunks_join_in_order(tmp_path: Path, cache: str) -> None:
    texts = [f"{i} " * 25 for i in range(2_500)]
    as_jsonl(tmp_path / "a.jsonl", texts)
    config = CorpusConfig("files", train_files=[str(tmp_path / "a.jsonl")], val_files=[str(tmp_path / "a.jsonl")])
    encoding = load_tokenizer("builtin")
    tokenized = tokenize(load_texts(config, "train", cache), encoding)
    assert len(tokenized) == 2_500 and tokenized.offsets[-1] == len(tokenized.tokens)
    for i in (0, 999, 1_000, 2_499):
        assert encoding.decode(tokenized[i].tolist()) == texts[i]


def test_second_tokenizing_reads_the_cache_and_another_encoding_does_not(
    tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_jsonl(tmp_path / "a.jsonl", STORIES)
    config = CorpusConfig("files", train_files=[str(tmp_path / "a.jsonl")], val_files=[str(tmp_path / "a.jsonl")])
    encoding = load_tokenizer("builtin")
    calls = []
    encode = corpus._encode

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(time.monotonic())
        return encode(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(corpus, "_encode", counted)
    first = tokenize(load_texts(config, "train", cache), encoding)
    again = tokenize(load_texts(config, "train", cache), load_tokenizer("builtin"))
    assert len(calls) == 1
    np.testing.assert_array_equal(first.tokens, again.tokens)
    monkeypatch.setattr(corpus, "fingerprint", lambda encoding: "another")
    tokenize(load_texts(config, "train", cache), encoding)
    assert len(calls) == 2


def test_large_vocabulary_takes_int32(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoding = load_tokenizer("builtin")
    texts = load_texts(CorpusConfig(train_rows=3), "train", cache)
    small = tokenize(texts, encoding)
    monkeypatch.setattr(type(encoding), "n_vocab", property(lambda self: 65_536))
    monkeypatch.setattr(corpus, "fingerprint", lambda encoding: "large")
    large = tokenize(texts, encoding)
    assert large.tokens.dtype == np.int32
    np.testing.assert_array_equal(small.tokens, large.tokens)
