"""Train the built-in tokenizer: byte-level BPE on the built-in stories and the sentences of the probe.

The asset it writes is a rank file as `tiktoken` reads it, one `base64(token) rank` a line. Run

    python -m docs.tools.train_ranks

after a change of the stories, the codewords or the probe's sentences. The result depends on nothing but the arguments
(and on the version of `tokenizers`, should its trainer ever change).
"""

from __future__ import annotations

import argparse
import base64
import json
from collections.abc import Iterator
from importlib.resources import as_file, files
from pathlib import Path

from mini_gpt_pl.stories.data.stories import story

# GPT-2's split of a text into words; no token crosses a border that this pattern draws.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
PROBE_SENTENCES = (
    "The secret code is X.",
    "What is the secret code? X",
    "Remember the word X.",
    "What was the word? X",
    "The special word is X.",
    "What is the special word? X",
    "The password is X.",
    "What is the password? X",
    "The magic word is X.",
    "The magic word was X",
)
CODEWORD_REPEATS = 20
MERGES, STORIES = 2303, 4000  # 256 + 2303 tokens, with an end of text 2560, a multiple of 128


def codewords() -> list[str]:
    """Return the words of `assets/codewords.txt`, in upper case, sorted."""
    return (files("mini_gpt_pl.stories.data") / "assets" / "codewords.txt").read_text(encoding="ascii").split()


def corpus(stories: int) -> Iterator[str]:
    """Yield the training text: stories of seed 0, then every probe sentence with every codeword, many times.

    The repeats make each codeword outweigh the rarest words of the stories, so that its merges come before theirs.
    """
    yield from (story(0, index) for index in range(stories))
    for word in codewords():
        sentences = [template.replace("X", word) for template in PROBE_SENTENCES]
        for _ in range(CODEWORD_REPEATS):
            yield " ".join(sentences)
            yield from sentences


def _byte_of_char() -> dict[str, int]:
    """Invert GPT-2's map of bytes to printable characters, in which `tokenizers` writes its tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def train(merges: int = MERGES, stories: int = STORIES) -> list[bytes]:
    """Train the tokenizer and return its tokens in the order of their ranks.

    Args:
        merges: number of tokens beyond the 256 single bytes, which come first in byte order.
        stories: number of built-in stories to train on.

    Raises:
        ImportError: if `tokenizers` is not installed; training needs it, using the ranks does not.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256 + merges, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus(stories), trainer)
    to_byte = _byte_of_char()
    merged = [left + right for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = [bytes(to_byte[char] for char in token) for token in dict.fromkeys(merged)]
    return [bytes([byte]) for byte in range(256)] + tokens


def write_ranks(tokens: list[bytes], path: Path) -> None:
    """Write tokens to a `tiktoken` rank file; the rank of a token is its place in the list."""
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    path.write_text("".join(lines), encoding="ascii", newline="\n")


def main(argv: list[str] | None = None) -> None:
    """Run the command line; see the module's text."""
    parser = argparse.ArgumentParser(description="Train the built-in tokenizer and write its rank file.")
    parser.add_argument("--merges", type=int, default=MERGES, help="tokens beyond the 256 bytes (%(default)s)")
    parser.add_argument("--stories", type=int, default=STORIES, help="built-in stories to train on (%(default)s)")
    parser.add_argument("--out", type=Path, help="file to write (default: the asset of the package)")
    args = parser.parse_args(argv)
    tokens = train(args.merges, args.stories)
    with as_file(files("mini_gpt_pl.stories.data") / "assets" / "builtin.tiktoken") as asset:
        write_ranks(tokens, args.out or asset)
    print(f"{len(tokens)} tokens -> {args.out or 'assets/builtin.tiktoken'}")


if __name__ == "__main__":
    main()
