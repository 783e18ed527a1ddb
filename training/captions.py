"""Captions as a user may type them, each with the object and the background that it asks for."""

from __future__ import annotations

import random

from data import BACKGROUND_NAMES, OBJECT_NAMES, VOCABULARY

from pack.models.demo import split_words

ANY = -1  # the caption leaves this open
BRIGHTNESS: dict[str, list[str]] = VOCABULARY["brightness"]
BRIGHTNESS_NAMES = list(BRIGHTNESS)  # classes after the backgrounds: "dark", "bright"
WORDS = ["<start>", "<end>", "<unknown>", *sorted({
    word
    for text in [
        *OBJECT_NAMES, *BACKGROUND_NAMES, *BRIGHTNESS, *VOCABULARY["filler"],
        *VOCABULARY["aliases"], *VOCABULARY["background_aliases"],
    ]
    for word in split_words(text)
})]  # fmt: skip


def _spellings(aliases: dict[str, str], names: list[str]) -> list[list[str]]:
    return [[name] + [alias for alias, target in aliases.items() if target == name] for name in names]


OBJECT_SPELLINGS = _spellings(VOCABULARY["aliases"], OBJECT_NAMES)
BACKGROUND_SPELLINGS = _spellings(VOCABULARY["background_aliases"], BACKGROUND_NAMES) + [[b] for b in BRIGHTNESS]


def sentence(name: str, background: str | None, form: int) -> str:
    """Five ways to say it; `background` None leaves it open."""
    article = "an" if name[0] in "aeiou" else "a"
    if background is None:
        return (f"{article} {name}", name, f"the {name}", f"{article} {name}", name)[form]
    return (
        f"{article} {name} on a {background} background",
        f"{name}, {background} background",
        f"{name} on {background}",
        f"{article} {name} on {background} background",
        f"the {name} with a {background} background",
    )[form]


def with_filler(text: str, rng: random.Random) -> str:
    """Insert words that mean nothing to the picture, known ("photo of") and unknown ("xyzzy")."""
    words = text.split(" ")
    for _ in range(rng.randint(1, 3)):
        extra = rng.choice(VOCABULARY["filler"]) if rng.random() < 0.5 else "xyzzy"
        at = rng.choice([0, 0, len(words)])
        words.insert(at, extra)
    return " ".join(words)


def draw(rng: random.Random, obj: int, background: int, *, filler: float = 0.25, alias: float = 0.15) -> str:
    """A random wording for an object class and a background class (ANY: not mentioned)."""
    name = rng.choice(OBJECT_SPELLINGS[obj]) if rng.random() < alias else OBJECT_NAMES[obj]
    if background == ANY:
        text = sentence(name, None, rng.randrange(5))
    else:
        spellings = BACKGROUND_SPELLINGS[background]
        text = sentence(name, rng.choice(spellings) if rng.random() < alias else spellings[0], rng.randrange(5))
    return with_filler(text, rng) if rng.random() < filler else text
