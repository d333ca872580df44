"""The key-retrieval probe: a codeword is told in one sentence and asked for some tokens later.

Everything here is a pure function of arrays and of a generator that is handed in; see ``sample_rng``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from itertools import chain
from typing import Literal, NamedTuple

import numpy as np
import tiktoken
from jaxtyping import Bool, Int

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.stories.data.tokenizer import eos_id
from mini_gpt_pl.stories.objective import IGNORE

TEMPLATES: tuple[tuple[str, str], ...] = (
    ("The secret code is X.", "What is the secret code? X"),
    ("Remember the word X.", "What was the word? X"),
    ("The special word is X.", "What is the special word? X"),
    ("The password is X.", "What is the password? X"),
    ("The magic word is X.", "The magic word was X"),
)
"""Pairs of key and query; X stands for the codeword, which the query ends with."""

SLACK = 10
"""Tokens that key, gap and query leave for a prefix: the longest prefix of an evaluation example."""

_WORD = re.compile(rb" [A-Z]{3,}")


class Stream(IntEnum):
    """Independent families of random numbers under one seed."""

    ORDER = 0
    TRAIN = 1
    VAL_LM = 2
    PROBE_IN = 3
    PROBE_OOD = 4
    CODEWORDS = 5
    # Of a replay and of experiments, far from those that training and evaluation may still come to need.
    REPLAY_ORDER = 1 << 32
    REPLAY_SAMPLES = (1 << 32) + 1
    EXPERIMENTS = (1 << 32) + 2
    SUPPRESSION = (1 << 32) + 3


def sample_rng(seed: int, stream: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of one sample: a pure function of its arguments, so the order of access cannot matter.

    Philox is a keyed permutation of a counter (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
    Seed (modulo 2^64) and stream are the key; epoch and index, both from 0, are high words of the counter, so each
    sample has 2^64 blocks to itself.
    """
    philox = np.random.Philox(
        key=np.array([seed % 2**64, stream], dtype=np.uint64), counter=np.array([0, index, epoch, 0], dtype=np.uint64)
    )
    return np.random.Generator(philox)


@dataclass(frozen=True)
class ProbeConfig:
    """How often, how far apart and with which words the probe asks.

    Args:
        p_probe: Probability that a training example carries a probe.
        n_codewords: How many codewords there are, drawn from the words that are one token.
        codeword_seed: Seed of that draw; runs with different training seeds share their codewords.
        train_gap: Shortest and longest distance, in tokens, between the end of the key and the start of the
            query, in training and in the in-distribution evaluation set; both ends are included.
        ood_gap: The same for the out-of-distribution evaluation set.
        eval_examples: Examples in each evaluation set.
        filler: What surrounds the sentences in evaluation examples: "random" token ids or "story" text.
        filler_ids: Smallest and largest id of random filler, clipped to the vocabulary.
        original_mask: Reproduce a flaw of the published runs: mark as many tokens of the query as the codeword has
            when encoded without its leading space, which is not the answer's length and often marks a part
            of the question.

    Raises:
        UserError: A value is out of range.
    """

    p_probe: float = 0.10
    n_codewords: int = 512
    codeword_seed: int = 42
    train_gap: tuple[int, int] = (5, 30)
    ood_gap: tuple[int, int] = (80, 200)
    eval_examples: int = 2000
    filler: Literal["random", "story"] = "random"
    filler_ids: tuple[int, int] = (100, 5000)
    original_mask: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.p_probe <= 1:
            raise UserError(f"--data.probe.p_probe={self.p_probe}: give a probability from 0 to 1")
        for option in ("n_codewords", "eval_examples"):
            if getattr(self, option) < 1:
                raise UserError(f"--data.probe.{option}={getattr(self, option)}: give 1 or more")
        for option in ("train_gap", "ood_gap", "filler_ids"):
            low, high = getattr(self, option)
            if not 0 <= low <= high:
                raise UserError(f"--data.probe.{option}=[{low},{high}]: give two numbers, 0 or more, smaller one first")
        if self.filler not in ("random", "story"):
            raise UserError(f"--data.probe.filler={self.filler}: give random or story")


class Example(NamedTuple):
    """One row of a batch; target t is the token that follows input t, -100 where nothing is asked.

    The mask is true where the target is the probe's answer.
    """

    tokens: Int[np.ndarray, " T"]
    targets: Int[np.ndarray, " T"]
    probe_mask: Bool[np.ndarray, " T"]


def find_codewords(encoding: tiktoken.Encoding) -> list[str]:
    """Find all words of three or more capitals A-Z that are exactly one token after a space, sorted.

    Within a text a codeword always follows a space, so it is the form with the space that must be one token.
    GPT-2's ranks have 1,028 such words.
    """
    words = {token[1:].decode() for token in encoding.token_byte_values() if _WORD.fullmatch(token)}
    # A rank file may hold tokens that its own merges never reach.
    return sorted(word for word in words if len(encoding.encode_ordinary(f" {word}")) == 1)


def choose_codewords(encoding: tiktoken.Encoding, n: int, seed: int) -> list[str]:
    """Shuffle the codewords by a seed and take the first ``n``.

    Raises:
        UserError: The encoding has fewer than ``n``.
    """
    words = find_codewords(encoding)
    if len(words) < n:
        raise UserError(
            f"--data.probe.n_codewords={n}: the tokenizer has only {len(words)} words of capitals that are one token; "
            "ask for no more than that, or choose another --data.tokenizer"
        )
    order = sample_rng(seed, Stream.CODEWORDS, 0, 0).permutation(len(words))
    return [words[i] for i in order[:n]]


class Probe:
    """Builds examples of ``context`` inputs and targets from stories, with and without the probe.

    With key K, query Q (its last token is the answer), gap g and prefix p, a probed training example reads

        story[:p]  K  story[p : p + g]  Q  story[p + g :]        cut or padded to ``context + 1`` tokens.

    Args:
        encoding: The tokenizer.
        codewords: Words from ``find_codewords``.
        config: Gaps, probabilities and filler.
        context: Number T of inputs; of an example's T + 1 tokens the first T are inputs and the last T targets.

    Attributes:
        longest_gap: The largest gap for which every key and query and a prefix of ten tokens fit.

    Raises:
        UserError: The context is too short for the gaps, a codeword's query does not end with its one token, or
            random filler has no ids left.
    """

    def __init__(self, encoding: tiktoken.Encoding, codewords: list[str], config: ProbeConfig, context: int) -> None:
        self.config = config
        self.context = context
        self.length = context + 1
        self.eos = eos_id(encoding)
        self.keys, self.queries = _encode_sentences(encoding, codewords)
        # ids of " X", and how many tokens of the query the mask covers
        self.answers = np.array([encoding.encode_single_token(f" {word}") for word in codewords])
        self._marks = [len(encoding.encode_ordinary(word)) if config.original_mask else 1 for word in codewords]
        longest_pair = max(map(len, chain(*self.keys))) + max(map(len, chain(*self.queries)))
        self.longest_gap = self.length - longest_pair - SLACK
        self.train_gap = self._fit("train_gap")
        self.ood_gap = self._fit("ood_gap")
        self._not_filler = np.append(self.answers, self.eos)
        low, high = config.filler_ids
        candidates = np.arange(low, min(high, encoding.n_vocab - 1) + 1)
        self.filler_ids = candidates[~np.isin(candidates, self._not_filler)]
        if not len(self.filler_ids):
            raise UserError(
                f"--data.probe.filler_ids=[{low},{high}]: a vocabulary of {encoding.n_vocab} has no such ids "
                "besides codewords and end of text; give a lower range"
            )

    def training_example(self, story: Int[np.ndarray, " n"], rng: np.random.Generator) -> Example:
        """With probability ``p_probe`` inject a probe, otherwise make an LM example."""
        return self.inject(story, rng) if self.asks(rng) else self.lm_example(story, rng)

    def asks(self, rng: np.random.Generator) -> bool:
        """Draw whether a training example carries a probe; the first draw of each."""
        return bool(rng.random() < self.config.p_probe)

    def lm_example(self, story: Int[np.ndarray, " n"], rng: np.random.Generator) -> Example:
        """Take a uniformly random crop of T + 1 tokens; pad a shorter story with end of text.

        No padding is ever a target, so end of text is none.
        """
        start = self.crop(len(story), rng)
        return self._assemble([story[start : start + self.length]])

    def crop(self, tokens: int, rng: np.random.Generator) -> int:
        """Draw where the crop of a story of so many tokens starts; without a draw if there is but one place."""
        excess = tokens - self.length
        return int(rng.integers(0, excess, endpoint=True)) if excess > 0 else 0

    def inject(self, story: Int[np.ndarray, " n"], rng: np.random.Generator) -> Example:
        """Hide key and query in a story that starts at its first token.

        Draws codeword, template, gap and prefix, in this order. Where the story is too short to fill the gap, end
        of text does, and is no target there. The mask covers the answer's one token (``original_mask``: see
        ``ProbeConfig``). A prefix of 2 to max(3, budget / 3) tokens is drawn, budget being what key, gap and query
        leave; with less than ten left, for which gaps must exceed ``longest_gap``, the story becomes an LM example.
        """
        word, template, gap = self._draw(rng, self.train_gap)
        key, query = self.keys[word][template], self.queries[word][template]
        budget = self.length - len(key) - gap - len(query)
        if budget < SLACK:
            return self.lm_example(story, rng)
        prefix = min(int(rng.integers(2, max(3, budget // 3), endpoint=True)), len(story))
        middle = story[prefix : prefix + gap]
        fill = np.full(gap - len(middle), self.eos)
        parts = [story[:prefix], key, middle, fill, query, story[prefix + gap :]]
        query_end = prefix + len(key) + gap + len(query)
        filled = slice(prefix + len(key) + len(middle), prefix + len(key) + gap)
        return self._assemble(parts, query_end, min(self._marks[word], len(query)), filled)

    def evaluation_example(
        self, rng: np.random.Generator, gap_range: tuple[int, int], filler: Int[np.ndarray, " n"] | None = None
    ) -> Example:
        """Make an example that is nothing but filler, key, filler and query.

        Draws codeword, template, gap, prefix (2 to 10) and filler ids, in this order. Filler never holds a
        codeword: a second one between key and query would make the question ambiguous. Filler counts as
        ordinary targets. The padding after the query is ignored; in the published runs it was counted as text.

        Args:
            rng: The example's generator.
            gap_range: Shortest and longest gap, both included; ``train_gap`` or ``ood_gap`` of this object.
            filler: Story tokens to fill with, repeated where they are too few; None draws random ids.
        """
        word, template, gap = self._draw(rng, gap_range)
        key, query = self.keys[word][template], self.queries[word][template]
        prefix = int(rng.integers(2, SLACK, endpoint=True))
        if filler is not None:
            filler = filler[~np.isin(filler, self._not_filler)]
        if filler is None or not len(filler):
            filler = self.filler_ids[rng.integers(0, len(self.filler_ids), size=prefix + gap)]
        filler = np.resize(filler, prefix + gap)
        query_end = prefix + len(key) + gap + len(query)
        parts = [filler[:prefix], key, filler[prefix:], query]
        return self._assemble(parts, query_end, min(self._marks[word], len(query)))

    def _draw(self, rng: np.random.Generator, gap_range: tuple[int, int]) -> tuple[int, int, int]:
        low, high = gap_range
        word = int(rng.integers(len(self.keys)))
        template = int(rng.integers(len(TEMPLATES)))
        return word, template, int(rng.integers(low, high, endpoint=True))

    def _assemble(
        self, parts: list[np.ndarray], query_end: int = 0, marks: int = 0, filled: slice | None = None
    ) -> Example:
        """Join parts to T + 1 tokens, cut them into inputs and targets, and mark what is asked and what is ignored."""
        joined = np.concatenate(parts)[: self.length]
        sequence = np.full(self.length, self.eos, dtype=np.int64)
        sequence[: len(joined)] = joined
        targets = sequence.copy()
        targets[len(joined) :] = IGNORE
        if filled is not None:
            targets[filled] = IGNORE
        # The target at t is the token at t + 1, so a mask over tokens is shifted like the targets are.
        marked = np.zeros(self.length, dtype=bool)
        marked[query_end - marks : query_end] = True
        return Example(sequence[:-1], targets[1:], marked[1:])

    def _fit(self, option: str) -> tuple[int, int]:
        low, high = getattr(self.config, option)
        if low > self.longest_gap:
            raise UserError(
                f"context of {self.context} tokens is too short for gaps of at least {low} tokens: the longest gap "
                f"that fits is {max(self.longest_gap, 0)}; "
                f"give a larger --data.context or a smaller --data.probe.{option}"
            )
        return low, min(high, self.longest_gap)


def _encode_sentences(
    encoding: tiktoken.Encoding, codewords: list[str]
) -> tuple[list[list[np.ndarray]], list[list[np.ndarray]]]:
    """Encode each sentence as a whole, as it stands in a text, for every [codeword][template]."""
    keys, queries = [], []
    for word in codewords:
        answer = encoding.encode_ordinary(f" {word}")
        texts = [[half.replace("X", word) for half in pair] for pair in TEMPLATES]
        pairs = [[np.array(encoding.encode_ordinary(half), dtype=np.int64) for half in pair] for pair in texts]
        if len(answer) != 1 or any(query[-1] != answer[0] or answer[0] not in key for key, query in pairs):
            raise UserError(f"codeword {word!r} is not one token in key and query; choose another with this tokenizer")
        keys.append([key for key, _ in pairs])
        queries.append([query for _, query in pairs])
    return keys, queries
