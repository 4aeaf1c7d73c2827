"""How names of entities are written and compared: plurals, British spelling, accents and punctuation do not matter."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

Key = tuple[str, ...]
"""A name as it is compared: its words, each in American spelling and the singular."""

_WORD = re.compile(r"[^\W_]+(?:\.\d\w*)?")
_CODE = re.compile(r"[A-Z]\d[\dA-Z](\.\w{1,4})?$|[A-Z]+:\d+$")
_BRITISH = (
    ("naev", "nev"),
    ("haem", "hem"),
    ("tumour", "tumor"),
    ("colour", "color"),
    ("oedema", "edema"),
    ("rrhoe", "rrhe"),
    ("grey", "gray"),
    ("centre", "center"),
    ("fibre", "fiber"),
)
_IRREGULAR = {"nevi": "nevus", "noses": "nose", "doses": "dose", "feet": "foot", "foci": "focus", "teeth": "tooth"}


def words_of(text: str) -> list[str]:
    """The words of a text in order, as written; a code such as C43.9 is one word."""
    return _WORD.findall(text)


@lru_cache(maxsize=1 << 16)
def word_key(word: str) -> str:
    """A word as it is compared: lower case, no accents, American spelling, singular."""
    plain = unicodedata.normalize("NFKD", word.lower())
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    for british, american in _BRITISH:
        plain = plain.replace(british, american)
    return _singular(plain)


def _singular(word: str) -> str:
    """The singular of an English or medical plural; other words ending alike change too, but always the same way."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) < 4:
        return word
    if word.endswith("omata"):
        return word[:-2]
    if word.endswith("oses"):
        return word[:-2] + "is"
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("xes", "ches", "shes", "sses")):
        return word[:-2]
    if word.endswith("ae") and len(word) > 4:
        return word[:-1]
    return word if word.endswith(("ss", "us", "is")) or not word.endswith("s") else word[:-1]


def key_of(words: Sequence[str]) -> Key:
    """The words as they are compared; the `s` that an apostrophe leaves behind is dropped."""
    return tuple(word_key(word) for word in words if word != "s")


@lru_cache(maxsize=1 << 16)
def name_key(name: str) -> Key:
    """A name as it is compared; empty for a text without letters and digits."""
    return key_of(words_of(name))


@lru_cache(maxsize=1 << 16)
def tidy(name: str) -> str:
    """A name as it is stored: one line, lower case; codes such as C43.9 or OMIM:155600 keep theirs."""
    plain = one_line(name).strip(" .,;:")
    return plain if _CODE.match(plain) else plain.lower()


def one_line(text: str) -> str:
    """The text with single spaces, without what XML cannot hold: control characters and halves of characters."""
    if not text.isprintable():
        text = "".join(letter if _is_text(letter) else " " for letter in text)
    return " ".join(text.split())


def _is_text(letter: str) -> bool:
    return unicodedata.category(letter) not in ("Cc", "Cs", "Cn")
