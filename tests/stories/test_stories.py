"""The built-in stories and the built-in tokenizer ranks."""

from __future__ import annotations

import base64
import re
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from docs.tools import train_ranks
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.stories.data.stories import BOYS, GIRLS, PETS, PLOTS, Story, story, tell

ASSET = files("mini_gpt_pl.stories.data") / "assets" / "builtin.tiktoken"
KEYS = st.integers(0, 2**64 - 1)


def read_ranks(text: str) -> dict[bytes, int]:
    return {base64.b64decode(token): int(rank) for token, rank in map(str.split, text.splitlines())}


RANKS = read_ranks(ASSET.read_text(encoding="ascii"))
ENCODING = tiktoken.Encoding("builtin", pat_str=train_ranks.PATTERN, mergeable_ranks=RANKS, special_tokens={})


@pytest.fixture(scope="module")
def stories() -> list[Story]:
    return [tell(0, index) for index in range(5000)]


def test_a_story_depends_on_its_keys_alone(stories: list[Story]) -> None:
    for index in (4999, 3, 1700, 0):
        assert story(0, index) == stories[index].text
    assert all(story(1, index) != stories[index].text for index in range(100))


def test_keys_keep_all_their_bits() -> None:
    """A key above 2**53 must not pass through a float on its way to the generator."""
    assert len({story(seed, 2**63 + index) for seed in (0, 2**64 - 1, 2**64 - 2) for index in (0, 1, 2)}) == 9


@given(seed=KEYS, index=KEYS)
@settings(max_examples=300, deadline=None)
def test_every_key_tells_a_clean_story(seed: int, index: int) -> None:
    text = story(seed, index)
    assert text == story(seed, index)
    assert text.isascii()
    assert not re.search(r"[\[\]{}|*\n]|  | [.,!?]|[.,!?]{2}|^ | $", text), text
    assert text[0].isupper()
    assert text[-1] in '.!?"'
    assert text.count('"') % 2 == 0


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (0, -1), (2**64, 0), (0, 2**64)])
def test_keys_out_of_range_are_refused(seed: int, index: int) -> None:
    with pytest.raises(UserError, match="seed"):
        story(seed, index)


def test_stories_and_their_beginnings_differ(stories: list[Story]) -> None:
    assert len({one.text for one in stories}) == len(stories)
    assert len({one.text.split(". ")[0] for one in stories}) > 0.9 * len(stories)
    words = [one.text.split() for one in stories]
    grams = [tuple(w[i : i + 8]) for w in words for i in range(len(w) - 7)]
    assert len(set(grams)) > 0.5 * len(grams)


def test_every_plot_is_told(stories: list[Story]) -> None:
    assert {one.plot for one in stories} == {plot.name for plot in PLOTS}
    assert len(PLOTS) >= 12


def test_lengths_suit_a_context_of_256(stories: list[Story]) -> None:
    lengths = np.array([len(ENCODING.encode(one.text)) for one in stories])
    assert 170 < lengths.mean() < 215
    assert np.mean((lengths >= 100) & (lengths <= 300)) > 0.99
    assert np.mean(lengths > 257) < 0.1


def test_no_word_in_capitals(stories: list[Story]) -> None:
    found = {word for one in stories for word in re.findall(r"\b[A-Z]+\b", one.text)}
    assert found <= {"I", "A"}


def test_articles_fit(stories: list[Story]) -> None:
    for one in stories:
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", one.text), one.text


def test_a_story_stays_on_its_characters(stories: list[Story]) -> None:
    everybody = {*GIRLS, *BOYS, *PETS}
    for one in stories:
        words = re.findall(r"[A-Za-z]+", one.text)
        assert set(words) & everybody <= one.names, one.text
        assert words.count(one.hero) >= 2


def test_a_story_with_one_gender_has_no_pronoun_of_the_other(stories: list[Story]) -> None:
    """Hero, friend, grown-up and neighbor: where all who appear are "she", nobody is "he"."""
    women = {*GIRLS, "Mom", "Grandma", "Mrs"}
    men = {*BOYS, "Dad", "Grandpa", "Mr"}
    checked = 0
    for one in stories:
        words = set(re.findall(r"[A-Za-z]+", one.text))
        lower = {word.lower() for word in words}
        for own, other in ((women, {"he", "him", "his", "himself"}), (men, {"she", "her", "herself"})):
            if words & (women | men) <= own:
                checked += 1
                assert not lower & other, one.text
    assert checked > 100


def test_ranks_are_valid_for_tiktoken() -> None:
    assert sorted(RANKS.values()) == list(range(len(RANKS)))
    assert all(RANKS[bytes([byte])] == byte for byte in range(256))
    assert len(RANKS) <= 2600


def test_every_token_is_reached_by_its_own_bytes() -> None:
    def merge(token: bytes) -> list[bytes]:
        parts = [bytes([byte]) for byte in token]
        while True:
            pairs = [(RANKS.get(parts[i] + parts[i + 1], len(RANKS)), i) for i in range(len(parts) - 1)]
            rank, i = min(pairs, default=(len(RANKS), 0))
            if rank == len(RANKS):
                return parts
            parts[i : i + 2] = [parts[i] + parts[i + 1]]

    assert [token for token in RANKS if merge(token) != [token]] == []


@given(st.text())
@settings(deadline=None)
def test_any_text_survives_the_round_trip(text: str) -> None:
    assert ENCODING.decode(ENCODING.encode(text)) == text


def test_codewords_are_single_tokens() -> None:
    words = train_ranks.codewords()
    assert words == sorted(set(words))
    assert len(words) >= 256
    assert all(re.fullmatch("[A-Z]{3,8}", word) for word in words)
    assert [word for word in words if len(ENCODING.encode(" " + word)) != 1] == []


def test_words_of_the_probe_are_single_tokens() -> None:
    for sentence in train_ranks.PROBE_SENTENCES:
        text = sentence.replace("X", "APPLE")
        for piece in (text, " " + text):
            assert len(ENCODING.encode(piece)) == len(re.findall(r"\w+|[.?]", piece)), piece


def test_the_asset_is_what_the_script_makes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tokenizers")
    train_ranks.main(["--out", str(tmp_path / "ranks")])
    assert "2559 tokens" in capsys.readouterr().out
    assert (tmp_path / "ranks").read_text(encoding="ascii") == ASSET.read_text(encoding="ascii")
