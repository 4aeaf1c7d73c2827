"""How answers are compared, and what is read out of the sources' wording."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

_MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
_DATE = re.compile(rf"(\d{{1,2}}) ({_MONTHS})(?: (\d{{4}}))?")
_WORD = re.compile(r"[^\W_]+")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


_NO_PERSON = re.compile(r"[,;/()\[\]&\d:]|\b(and|or|et al|unknown|collective|traditional|multiple|no|none)\b")
_GENERIC = frozenset({"national anthem", "anthem", "national hymn", "hymn", "national song"})
"""Translations of titles that would be right for any country."""


def normalise(text: str) -> str:
    """The text as exact match compares it (SQuAD, Search-R1): lower case, without punctuation and articles."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


@lru_cache(maxsize=32768)  # all passages of a corpus: thousands of questions look into each
def words(text: str) -> str:
    """The words of a text between single spaces, lower case, cut at punctuation: what is looked for inside passages."""
    return f" {' '.join(_WORD.findall(text.lower()))} "


def holds(text: str, answers: Iterable[str]) -> bool:
    """Whether one of the answers stands in the text, as whole words."""
    inside = words(text)
    return any(words(answer) in inside for answer in answers if words(answer).strip())


def shares_word(text: str, answers: Iterable[str]) -> bool:
    """Whether a word of four letters or more is in both: `Guatemala` gives `Guatemala City` away."""
    given = {word for word in plain(words(text)).split() if len(word) > 3 and word.isalpha()}
    return any(given & set(plain(words(answer)).split()) for answer in answers)


def plain(text: str) -> str:
    """The text without accents: what is typed where the keyboard has none."""
    return "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))


def spellings(names: Iterable[str]) -> tuple[str, ...]:
    """The names, then those of them that have accents without, each once."""
    names = [name.strip() for name in names]
    return tuple(dict.fromkeys(name for name in (*names, *map(plain, names)) if name and normalise(name)))


def named(text: str) -> tuple[str, ...]:
    """A name with what stands behind it in brackets as its alias: `Hanoi (Ha Noi)`; nothing where that is no name."""
    match = re.fullmatch(r"([^()\[\];:,/\d]+?)(?: ?\(([^()\[\];:,/\d]+)\))?", text.strip())
    if match is None or re.search(r"\b(or|and|unnamed|near|unknown|location|disputed|official)\b", match[1], re.I):
        return ()
    alias = match[2] or ""
    is_name = alias[:1].isupper() and not re.search(r"\b(is|in|on|from|point|largest|capital)\b", alias)
    return spellings([match[1], alias] if is_name else [match[1]])


def quoted(text: str) -> tuple[str, ...]:
    """The title of the one quoted work, with its translation in brackets: `"Kassaman" (We Pledge)`."""
    text = text.replace("\N{LEFT DOUBLE QUOTATION MARK}", '"').replace("\N{RIGHT DOUBLE QUOTATION MARK}", '"')
    match = re.fullmatch(r'"([^"]+)" ?(?:\(([^()"]+)\))?', text.strip())
    if match is None or normalise(match[1]) in _GENERIC:
        return ()
    return spellings([match[1], "" if normalise(match[2] or "") in _GENERIC else match[2] or ""])


def person(text: str) -> tuple[str, ...]:
    """The name of one person, with and without a title; nothing where several or none are named."""
    text = text.strip()
    words = text.split()
    if not 2 <= len(words) <= 6 or re.search(
        r"[,;/()\[\]&\d:]|\b(and|or|et al|unknown|collective|traditional|multiple|no|none)\b", text
    ):
        return ()
    bare = re.sub(r"^(Sir|Sheikh|King|Baron|Saint) ", "", text)
    return spellings([text, bare] if len(bare.split()) > 1 else [text])


def day(text: str, with_year: bool) -> tuple[str, ...]:
    """The one date that the text names, as `5 July 1962` and `July 5, 1962`; nothing where it names several."""
    dates = [match for match in _DATE.finditer(text) if match[3] or not with_year]
    if len(dates) != 1 or ";" in text or len(_DATE.findall(text)) != 1:
        return ()
    number, month, year = dates[0].groups()
    if with_year:
        return (f"{number} {month} {year}", f"{month} {number}, {year}")
    return (f"{number} {month}", f"{month} {number}")
