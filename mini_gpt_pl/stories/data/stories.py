"""Built-in stories: a seeded grammar of small plots, so that every run works without a download.

A story is one plot of `assets/plots.txt`, told by one cast. `== name` opens a plot there, `= slots: values` draws slots
of its own (values separated by commas; several slots together, as in `= load them: two bags/them`), a line that starts
with `*` opens a beat, `?` a beat that some stories leave out, and `|` one more paraphrase of the same beat. Inside a
sentence, `[a|b]` is a choice and `{slot}` is filled from the cast, which keeps a story on its characters and things:
`{H} {he} {him} {his} {himself} {He} {His}` are the hero's, `{P} {phe} {phim} {phis} {Phe}` the friend's with `{friend}`
for the first mention, `{G} {ghe}` a grown-up's of the family, `{E} {ehe}` a neighbor's.
No word of a story but "I" and "A" is in capitals: words in capitals are the codewords of the probe.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

import numpy as np
import yaml

from mini_gpt_pl.errors import UserError

T = TypeVar("T")
Paraphrase = tuple[tuple[str, ...], ...]  # a run of places, each with its alternatives
Beat = tuple[Paraphrase, ...]


def _listed(text: str, separator: str = " ") -> tuple[str, ...]:
    return tuple(text.split(separator))


_ASSETS = files("mini_gpt_pl.stories.data") / "assets"
SOURCES = (Path(__file__), _ASSETS / "plots.txt", _ASSETS / "words.yaml")
"""What the stories are written from."""
_WORDS = yaml.safe_load((_ASSETS / "words.yaml").read_text(encoding="ascii"))
GIRLS, BOYS, PETS, ANIMALS, TRAITS = (_WORDS[name] for name in ("girls", "boys", "pets", "animals", "traits"))
HOBBIES, QUALITIES, TOYS, PLACES = (_WORDS[name] for name in ("hobbies", "qualities", "toys", "places"))
FAMILY, PRONOUNS = tuple(_WORDS["family"].items()), _WORDS["pronouns"]
NEIGHBORS = tuple(
    (f"{title} {name}", he) for name in _WORDS["surnames"] for title, he in (("Mr.", "he"), ("Mrs.", "she"))
)


@dataclass(frozen=True)
class Plot:
    """A plot as it is told: opening, beats of its own, ending."""

    name: str
    beats: tuple[Beat, ...]
    slots: tuple[tuple[tuple[str, ...], tuple[tuple[str, ...], ...]], ...]  # (names, joint values)
    things: tuple[str, ...]
    children: bool  # whether the hero has to be a child


def _parse(sentence: str) -> Paraphrase:
    """Split a paraphrase into its fixed and chosen parts; `()` if there is nothing to say."""
    parts = re.split(r"[\[\]]", sentence)
    return tuple((part,) if i % 2 == 0 else tuple(part.split("|")) for i, part in enumerate(parts) if part)


def _beats(lines: Sequence[str]) -> tuple[Beat, ...]:
    """Group paraphrases into beats; as many empty paraphrases as written ones make half of the stories skip a `?`."""
    beats = []
    for mark, block in re.findall(r"^([*?]) (.*(?:\n\| .*)*)", "\n".join(lines), flags=re.MULTILINE):
        paraphrases = tuple(_parse(sentence) for sentence in block.split("\n| "))
        beats.append(paraphrases + ((),) * len(paraphrases) if mark == "?" else paraphrases)
    return tuple(beats)


def _read_plots(text: str) -> tuple[Plot, ...]:
    """Parse `plots.txt`; the opening and the ending frame every plot."""
    sections = {}
    for section in re.split(r"^== ", text, flags=re.MULTILINE)[1:]:
        name, *lines = section.strip().split("\n")
        slots = dict(line[2:].split(": ") for line in lines if line.startswith("= "))
        sections[name] = (slots, _beats(lines))
    (_, opening), (_, ending) = sections.pop("opening"), sections.pop("ending")
    return tuple(
        Plot(
            name=name,
            beats=opening + beats + ending,
            things=_listed(slots.pop("toy"), ", ") if "toy" in slots else TOYS,
            children=slots.pop("hero", "") == "child",
            slots=tuple(
                (_listed(names), tuple(_listed(joint, "/") for joint in _listed(joints, ", ")))
                for names, joints in slots.items()
            ),
        )
        for name, (slots, beats) in sections.items()
    )


PLOTS = _read_plots((_ASSETS / "plots.txt").read_text(encoding="ascii"))
_SKIES = tuple((weather, (_parse(line),)) for weather, line in _WORDS["weather"].items())


_STREAM = np.array([0, 0, 0, 0x5707], dtype=np.uint64)  # sets stories apart from others keyed by the same pair


def _draws(seed: int, index: int) -> Iterator[float]:
    """Yield uniform numbers in [0, 1) that depend on nothing but the two keys."""
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64), counter=_STREAM))
    while True:
        yield from generator.random(64).tolist()


def _pick(options: Sequence[T], draws: Iterator[float]) -> T:
    return options[int(next(draws) * len(options))]


def _article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _pronouns(prefix: str, he: str) -> dict[str, str]:
    """Give the pronoun slots of one character: `{he}` of the hero, `{phe}` of the friend, and so on."""
    forms = dict(zip(("he", "him", "his", "himself"), PRONOUNS[he], strict=True))
    slots = {prefix + slot: form for slot, form in forms.items()}
    return slots | {(prefix + slot).capitalize(): form.capitalize() for slot, form in forms.items()}


def _characters(children: bool, draws: Iterator[float]) -> dict[str, str]:
    """Draw the hero, the friend, a grown-up, a neighbor and a pet."""
    he, phe = _pick(("he", "she"), draws), _pick(("he", "she"), draws)
    hero = _pick(BOYS if he == "he" else GIRLS, draws)
    friend = hero
    while friend == hero:
        friend = _pick(BOYS if phe == "he" else GIRLS, draws)
    child = children or next(draws) < 0.5
    kind, pkind = ({"he": "boy", "she": "girl"}[p] if child else _pick(ANIMALS, draws) for p in (he, phe))
    (grown, ghe), (neighbor, ehe) = _pick(FAMILY, draws), _pick(NEIGHBORS, draws)
    mention = f"{PRONOUNS[he][2]} {_pick(('friend', 'good friend', 'best friend'), draws)} {friend}"
    mention += "" if child else f" the {pkind}"
    slots = {"H": hero, "P": friend, "G": grown, "E": neighbor, "pet": _pick(PETS, draws), "kind": kind}
    slots |= {"a_pkind": _article(pkind), "friend": mention, "Friend": mention[0].upper() + mention[1:]}
    for prefix, pronoun in (("", he), ("p", phe), ("g", ghe), ("e", ehe)):
        slots |= _pronouns(prefix, pronoun)
    return slots


def _scene(plot: Plot, draws: Iterator[float]) -> dict[str, str]:
    """Draw the thing, the place, the day and what the hero is like."""
    (weather, sky), place = _pick(_SKIES, draws), _pick(PLACES, draws)
    when = f"{_pick(('One', 'On a', 'Early one', 'Late one'), draws)} {weather}"
    when += " " + _pick(("morning", "afternoon") if " one" in when else ("morning", "afternoon", "day"), draws)
    toy, quality, quality2 = _pick(plot.things, draws), _pick(QUALITIES, draws), _pick(QUALITIES, draws)
    hobby = int(next(draws) * len(HOBBIES))
    other = (hobby + 1 + int(next(draws) * (len(HOBBIES) - 1))) % len(HOBBIES)
    trait, thing = _pick(TRAITS, draws), f"{quality} {toy}"
    return {
        "toy": toy, "obj": thing, "an_obj": _article(thing), "An_obj": _article(thing).capitalize(),
        "quality": quality, "quality2": quality2, "a_quality2": _article(quality2),
        "trait": trait, "a_trait": _article(trait), "hobby": HOBBIES[hobby], "hobby2": HOBBIES[other],
        "at": place, "at_cap": place[0].upper() + place[1:], "place": place[place.index(" ") + 1 :],
        "day": when, "sky": _tell((sky,), draws),
    }  # fmt: skip


def _tell(beats: Sequence[Beat], draws: Iterator[float]) -> str:
    """Choose one paraphrase a beat and one alternative a place; slots stay open."""
    sentences = []
    for beat in beats:
        parts = _pick(beat, draws)
        if parts:
            sentences.append("".join([p[0] if len(p) == 1 else _pick(p, draws) for p in parts]))
    return " ".join(sentences)


@dataclass(frozen=True)
class Story:
    """A story and what it is about: `names` are the characters that may appear in `text`."""

    text: str
    plot: str
    hero: str
    names: frozenset[str]


def tell(seed: int, index: int) -> Story:
    """Tell story `index` of the corpus `seed`, together with its plot and its cast.

    Args:
        seed: names the corpus, 0 <= seed < 2**64.
        index: which story of it, 0 <= index < 2**64; stories are independent of each other and of the order of calls.

    Raises:
        UserError: if the seed or the index lies outside that range.
    """
    if not (0 <= seed < 2**64 and 0 <= index < 2**64):
        raise UserError(f"built-in stories: seed {seed}, index {index}: both must lie in 0 .. 2**64 - 1")
    draws = _draws(seed, index)
    plot = _pick(PLOTS, draws)
    slots = _characters(plot.children, draws) | _scene(plot, draws)
    for names, joints in plot.slots:
        slots |= zip(names, _pick(joints, draws), strict=True)
    text = _tell(plot.beats, draws).format_map(slots)
    return Story(text, plot.name, slots["H"], frozenset((slots["H"], slots["P"], slots["pet"])))


def story(seed: int, index: int) -> str:
    """Return the text of story `index` of the corpus `seed` (see `tell`)."""
    return tell(seed, index).text
