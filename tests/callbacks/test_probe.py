from __future__ import annotations

import base64
import dataclasses
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from conftest import one_line_error
from hypothesis import given
from hypothesis import strategies as st

from mini_gpt_pl.stories.data.probe import (
    TEMPLATES,
    Example,
    Probe,
    ProbeConfig,
    Stream,
    choose_codewords,
    find_codewords,
)
from mini_gpt_pl.stories.data.probe import sample_rng as rng_of
from mini_gpt_pl.stories.data.tokenizer import eos_id, load_tokenizer
from mini_gpt_pl.stories.objective import IGNORE

CONTEXT = 128
CONFIG = ProbeConfig(n_codewords=40, ood_gap=(50, 70), eval_examples=10)


@cache
def builtin() -> tiktoken.Encoding:
    return load_tokenizer("builtin")


@cache
def words() -> tuple[str, ...]:
    return tuple(choose_codewords(builtin(), CONFIG.n_codewords, 42))


@cache
def probe_of(config: ProbeConfig = CONFIG, context: int = CONTEXT) -> Probe:
    return Probe(builtin(), list(words()), config, context)


def story_of(length: int, seed: int = 0) -> np.ndarray:
    """Tokens of which none is end of text or in any key, query or codeword: whatever is not of the story shows."""
    sentences = {id for half in (*probe_of().keys, *probe_of().queries) for part in half for id in part.tolist()}
    free = np.array([id for id in range(builtin().n_vocab - 1) if id not in sentences], dtype=np.uint16)
    return free[rng_of(seed, 99, 0, length).integers(len(free), size=length)]


def sequence_of(example: Example) -> np.ndarray:
    return np.append(example.tokens, example.targets[-1])


def find(sequence: np.ndarray, part: np.ndarray) -> list[int]:
    return np.flatnonzero((np.lib.stride_tricks.sliding_window_view(sequence, len(part)) == part).all(1)).tolist()


def locate(probe: Probe, example: Example) -> tuple[int, int, int, np.ndarray]:
    """Brute force: where the key begins, where it ends, where the query begins, and the query."""
    sequence = sequence_of(example)
    present = np.flatnonzero(np.isin(probe.answers, sequence))
    hits = [
        (k, k + len(key), q, query)
        for word in present
        for key, query in zip(probe.keys[word], probe.queries[word], strict=True)
        for k in find(sequence, key)
        for q in find(sequence, query)
    ]
    assert len(hits) == 1
    return hits[0]


def test_rng_is_a_pure_function_and_differs_in_every_argument() -> None:
    base = (42, Stream.TRAIN, 1, 2)
    draws = {rng_of(*base).integers(2**63)}
    assert draws == {rng_of(*base).integers(2**63)}
    for i in range(4):
        changed = list(base)
        changed[i] += 1
        draws.add(rng_of(*changed).integers(2**63))
    assert len(draws) == 5
    rng_of(-1, 0, 0, 0)


def test_neighbouring_samples_do_not_share_blocks() -> None:
    """A low counter word would make sample i + 1 a shifted copy of sample i."""
    first, second = (set(rng_of(0, 1, 0, i).integers(2**63, size=400).tolist()) for i in (0, 1))
    assert not first & second


def test_codewords_are_single_tokens_after_a_space_and_sorted() -> None:
    encoding = builtin()
    found = find_codewords(encoding)
    brute = set()
    for id in range(encoding.n_vocab - 1):
        token = encoding.decode_single_token_bytes(id)
        word = token[1:].decode("utf-8", "replace")
        if token[:1] == b" " and len(word) >= 3 and set(word) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZ"):
            brute.add(word)
    assert found == sorted(brute)
    assert len(found) >= ProbeConfig().n_codewords


def test_unreachable_tokens_are_no_codewords(tmp_path: Path) -> None:
    """Ranks may hold " CAT" without the merges that lead to it; a rank file written by hand does."""
    reachable = [b" D", b" DO", b" DOG"]
    tokens = [bytes([byte]) for byte in range(256)] + reachable + [b" C"]
    path = tmp_path / "small.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    encoding = load_tokenizer(str(path))
    assert find_codewords(encoding) == ["DOG"]
    with one_line_error("n_codewords=2: the tokenizer has only 1 "):
        choose_codewords(encoding, 2, 0)


def test_choice_is_seeded_unique_and_nested() -> None:
    encoding = builtin()
    chosen = choose_codewords(encoding, 50, 1)
    assert len(set(chosen)) == 50 and chosen != sorted(chosen)
    assert choose_codewords(encoding, 20, 1) == chosen[:20]
    assert choose_codewords(encoding, 50, 2) != chosen
    assert choose_codewords(encoding, len(find_codewords(encoding)), 1)


def test_sentences_are_the_encoded_templates() -> None:
    probe = probe_of()
    for w, word in enumerate(words()):
        for t, (key, query) in enumerate(TEMPLATES):
            assert builtin().decode(probe.keys[w][t].tolist()) == key.replace("X", word)
            assert builtin().decode(probe.queries[w][t].tolist()) == query.replace("X", word)


@given(st.integers(0, 400), st.integers(0, 10_000))
def test_injection(length: int, index: int) -> None:
    probe, story = probe_of(), story_of(length)
    example = probe.inject(story, rng_of(0, 0, 0, index))
    assert [column.shape for column in example] == [(CONTEXT,)] * 3
    assert [column.dtype for column in example] == [np.int64, np.int64, np.bool_]
    start, key_end, query_start, query = locate(probe, example)
    sequence, gap = sequence_of(example), query_start - key_end
    low, high = CONFIG.train_gap
    assert low <= gap <= high
    # the mask: exactly the answer, which is the query's last token and stands in the key
    (position,) = np.flatnonzero(example.probe_mask)
    assert position + 1 == query_start + len(query) - 1
    answer = example.targets[position]
    assert answer == query[-1] and answer in probe.answers
    assert answer in sequence[start:key_end]
    # prefix, middle and suffix are the story without a hole; what it cannot fill is end of text
    budget = CONTEXT + 1 - (key_end - start) - gap - len(query)
    assert min(2, length) <= start <= max(3, budget // 3)
    outside = np.concatenate([sequence[:start], sequence[key_end:query_start], sequence[query_start + len(query) :]])
    real = outside[~np.isin(outside, (probe.eos, IGNORE))]
    np.testing.assert_array_equal(real, story[: len(real)])
    assert len(real) == min(length, len(outside))
    # padding and filler are no targets; everything else is
    following = sequence[1:]
    np.testing.assert_array_equal(example.targets == IGNORE, np.isin(following, (probe.eos, IGNORE)))
    kept = example.targets != IGNORE
    np.testing.assert_array_equal(example.targets[:-1][kept[:-1]], example.tokens[1:][kept[:-1]])


def test_filler_of_a_short_story_stays_inside_the_gap() -> None:
    probe = probe_of()
    example = probe.inject(story_of(3), rng_of(0, 0, 0, 5))
    _, key_end, query_start, query = locate(probe, example)
    filler = example.tokens[key_end:query_start] == probe.eos
    assert filler.sum() >= query_start - key_end - 1
    # the token after the filler is real and stays a target
    assert example.targets[query_start - 1] == query[0]


def test_every_gap_and_prefix_end_occurs() -> None:
    config = dataclasses.replace(CONFIG, train_gap=(5, 8))
    probe, story = probe_of(config), story_of(300)
    hits = [locate(probe, probe.inject(story, rng_of(0, 0, 0, i))) for i in range(150)]
    assert {query - key_end for _, key_end, query, _ in hits} == {5, 6, 7, 8}
    assert min(start for start, *_ in hits) == 2


@given(st.integers(1, 400), st.integers(0, 10_000))
def test_lm_example(length: int, index: int) -> None:
    probe, story = probe_of(), story_of(length)
    example = probe.lm_example(story, rng_of(0, 0, 0, index))
    assert not example.probe_mask.any()
    real = min(length, CONTEXT + 1)
    assert (example.targets == IGNORE).sum() == CONTEXT - (real - 1)
    assert (example.targets[real - 1 :] == IGNORE).all() and (example.tokens[real:] == probe.eos).all()
    crop = np.append(example.tokens[:1], example.targets[: real - 1])
    np.testing.assert_array_equal(example.tokens[1:real], example.targets[: real - 1][: CONTEXT - 1])
    assert any(np.array_equal(crop, story[i : i + real]) for i in range(length - real + 1))


def test_crops_start_anywhere() -> None:
    probe, story = probe_of(), np.arange(CONTEXT + 4, dtype=np.uint16)
    starts = {int(probe.lm_example(story, rng_of(0, 0, 0, i)).tokens[0]) for i in range(100)}
    assert starts == {0, 1, 2, 3}


def test_frequency_of_the_probe() -> None:
    """Of 4,000 examples 10 % carry one, within four standard deviations (0.019)."""
    probe, story = probe_of(), story_of(60)
    hits = [probe.training_example(story, rng_of(0, 0, 0, i)).probe_mask.any() for i in range(4_000)]
    assert abs(np.mean(hits) - 0.10) < 0.019
    for p, expected in ((0.0, False), (1.0, True)):
        extreme = probe_of(dataclasses.replace(CONFIG, p_probe=p))
        assert all(extreme.training_example(story, rng_of(0, 0, 0, i)).probe_mask.any() == expected for i in range(20))


def test_original_mask_marks_the_length_without_space() -> None:
    flawed, clean = probe_of(dataclasses.replace(CONFIG, original_mask=True)), probe_of()
    story, differing = story_of(200), 0
    for i in range(60):
        example, right = (p.inject(story, rng_of(0, 0, 0, i)) for p in (flawed, clean))
        np.testing.assert_array_equal(example.tokens, right.tokens)
        answer = right.targets[right.probe_mask].item()
        word = builtin().decode([answer]).strip()
        last = np.flatnonzero(right.probe_mask).item()
        *_, query = locate(clean, right)
        marks = min(len(builtin().encode_ordinary(word)), len(query))
        assert np.flatnonzero(example.probe_mask).tolist() == list(range(last - marks + 1, last + 1))
        differing += marks != 1
    assert differing


@pytest.mark.parametrize("out_of_distribution", [False, True])
def test_evaluation_example(out_of_distribution: bool) -> None:
    probe = probe_of()
    gaps = probe.ood_gap if out_of_distribution else probe.train_gap
    for i in range(60):
        example = probe.evaluation_example(rng_of(7, 0, 0, i), gaps)
        start, key_end, query_start, query = locate(probe, example)
        assert 2 <= start <= 10 and gaps[0] <= query_start - key_end <= gaps[1]
        end = query_start + len(query)
        assert np.flatnonzero(example.probe_mask).tolist() == [end - 2]
        assert (example.targets[end - 1 :] == IGNORE).all() and (example.tokens[end:] == probe.eos).all()
        assert (example.targets[: end - 1] == example.tokens[1:end]).all()
        filler = np.concatenate([example.tokens[:start], example.tokens[key_end:query_start]])
        assert np.isin(filler, probe.filler_ids).all()


def test_random_filler_holds_no_codeword_and_stays_in_range() -> None:
    probe = probe_of(dataclasses.replace(CONFIG, filler_ids=(200, 10**6)))
    expected = set(range(200, builtin().n_vocab)) - set(probe.answers.tolist()) - {eos_id(builtin())}
    assert set(probe.filler_ids.tolist()) == expected
    one = int(probe.answers[0])
    with one_line_error("filler_ids"):
        probe_of(dataclasses.replace(CONFIG, filler_ids=(one, one)))


def test_story_filler_repeats_and_leaves_codewords_out() -> None:
    probe = probe_of()
    story = np.array([300, 301, int(probe.answers[3]), 302, probe.eos], dtype=np.uint16)
    example = probe.evaluation_example(rng_of(0, 0, 0, 1), probe.ood_gap, filler=story)
    sequence = sequence_of(example)
    # Find the sentences by their length from the mask, as 300 to 302 may be part of them.
    end = int(np.flatnonzero(example.probe_mask).item()) + 2
    word = probe.answers.tolist().index(sequence[end - 1])
    (template,) = [t for t, q in enumerate(probe.queries[word]) if np.array_equal(sequence[end - len(q) : end], q)]
    key, query = probe.keys[word][template], probe.queries[word][template]
    (start,) = [k for k in find(sequence, key) if k <= 10]
    filler = np.concatenate([sequence[:start], sequence[start + len(key) : end - len(query)]])
    np.testing.assert_array_equal(filler, np.resize([300, 301, 302], len(filler)))


def test_gaps_are_clamped_to_what_fits_and_every_example_fits() -> None:
    config = dataclasses.replace(CONFIG, ood_gap=(50, 10_000))
    probe = probe_of(config)
    longest_key = max(len(part) for half in probe.keys for part in half)
    longest_query = max(len(part) for half in probe.queries for part in half)
    assert probe.ood_gap == (50, CONTEXT + 1 - longest_key - longest_query - 10) == (50, probe.longest_gap)
    for i in range(200):
        example = probe.evaluation_example(rng_of(0, 0, 0, i), (probe.longest_gap, probe.longest_gap))
        _, key_end, query_start, _ = locate(probe, example)
        assert query_start - key_end == probe.longest_gap


def test_too_short_a_context_names_the_longest_gap() -> None:
    longest = probe_of().longest_gap
    exact = dataclasses.replace(CONFIG, ood_gap=(longest, longest))
    assert Probe(builtin(), list(words()), exact, CONTEXT).ood_gap == (longest, longest)
    message = (
        f"context of {CONTEXT - 1} tokens .* at least {longest} tokens: the longest gap that fits is {longest - 1};"
    )
    with one_line_error(message):
        Probe(builtin(), list(words()), exact, CONTEXT - 1)
    with one_line_error("the longest gap that fits is 0"):
        Probe(builtin(), list(words()), exact, 4)


def test_word_that_is_not_one_token_is_refused() -> None:
    with one_line_error("'QZXQZX' is not one token"):
        Probe(builtin(), ["QZXQZX"], CONFIG, CONTEXT)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("p_probe", 1.5),
        ("p_probe", -0.1),
        ("n_codewords", 0),
        ("eval_examples", 0),
        ("train_gap", (9, 3)),
        ("ood_gap", (-1, 3)),
        ("filler_ids", (7, 6)),
        ("filler", "noise"),
    ],
)
def test_config_is_checked(option: str, value: object) -> None:
    with one_line_error(f"--data.probe.{option}="):
        ProbeConfig(**{option: value})  # type: ignore[arg-type]
