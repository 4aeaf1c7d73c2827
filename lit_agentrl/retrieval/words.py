"""The words that a text is found by: what Lucene's English analyser gives, with plurals cut instead of Porter's stems.

Porter's stemming would need one more package.
"""

from __future__ import annotations

import re

_STOP_WORDS = (
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
    "to was will with"
)
STOP_WORDS = frozenset(_STOP_WORDS.split())
"""Those of Lucene's English analyser."""

_WORD = re.compile(r"[^\W_]+")


def tokenize(text: str) -> list[str]:
    """The words that a text is found by: lower case, without stop words, plurals cut."""
    return [stem(word) for word in _WORD.findall(text.lower()) if word not in STOP_WORDS]


def stem(word: str) -> str:
    """The word without an English plural ending (Harman's S stemmer, 1991)."""
    if len(word) > 3 and word.endswith("ies") and not word.endswith(("eies", "aies")):
        return word[:-3] + "y"
    if len(word) > 3 and word.endswith("es") and not word.endswith(("aes", "ees", "oes")):
        return word[:-1]
    if len(word) > 2 and word.endswith("s") and not word.endswith(("us", "ss")):
        return word[:-1]
    return word
