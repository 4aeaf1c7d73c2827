"""The patterns of the text extractor: which words between a subject and a list of names say which relation.

A sentence is read if it is `SUBJECT VERB LIST`, `SUBJECT has a LIST border`, `Its ASPECT is LIST`, `The ASPECT of
SUBJECT is LIST` or `LIST raise the risk of SUBJECT`; what follows `that`, `because`, `but` and the like is cut off.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

SYNONYM = "synonym"
"""Not a relation of the graph: the sentence gives other names."""
MOST_OBJECT_WORDS = 7
MOST_SUBJECT_WORDS = 8

_ADVERBS = "often|usually|typically|commonly|sometimes|frequently|mostly|mainly|rarely|occasionally"
_OFTEN = f"(?:also )?(?:{_ADVERBS})?"
_MODAL = "(?:is|are|can be|may be|must be|has to be)"
_VERBS = (
    (SYNONYM, f"{_MODAL} {_OFTEN} ?(?:called|known as|named)"),
    ("coded_as", "(?:is|are) coded as|has the ICD-10(?:-CM)? codes?"),
    ("treated_with", f"{_MODAL} {_OFTEN} ?(?:treated|managed|removed) (?:with|by)"),
    ("differs_from", f"{_MODAL} {_OFTEN} ?(?:confused with|mistaken for|told apart from|distinguished from)"),
    (
        "differs_from",
        f"(?:(?:can|may) {_OFTEN} ?(?:resemble|mimic|look like)|resembles?|mimics?|looks? like|differs? from)",
    ),
    (
        "may_become",
        f"(?:can|may|might) {_OFTEN} ?(?:become|turn into|progress to|develop into|transform into|evolve into)",
    ),
    (
        "may_become",
        f"{_OFTEN} ?(?:becomes?|turns? into|progress(?:es)? to|develops? into|transforms? into|evolves? into)",
    ),
    ("has_risk_factor", f"(?:is|are) {_OFTEN} ?(?:caused by|linked to|triggered by|due to|driven by)"),
    ("has_risk_factor", "has the risk factors?|results? from"),
    ("occurs_on", f"(?:can|may)? ?{_OFTEN} ?(?:occurs?|appears?|arises?|grows?|sits?|lies?) {_OFTEN} ?(?:on|in)"),
    ("occurs_on", f"(?:is|are) {_OFTEN} ?found (?:on|in)|affects?"),
    ("has_colour", f"has the colou?rs?|(?:is|are) {_OFTEN} ?colou?red"),
    ("has_border", "has a border that is"),
    ("has_feature", f"(?:can|may) {_OFTEN} ?(?:show|have|present with|feature)"),
    ("has_feature", f"{_OFTEN} ?(?:shows?|has|have|presents? with|features?)|(?:is|are) {_OFTEN} ?characteri[sz]ed by"),
    ("is_a", f"(?:is|are) {_OFTEN} ?(?:an?|the) (?:(?:type|kind|form|sort) of )?"),
)
_ASPECTS = (
    ("has_colour", "colou?rs?"),
    ("has_border", "borders?|edges?|margins?"),
    ("has_risk_factor", "(?:main )?(?:risk factors?|causes?)"),
    ("treated_with", "(?:usual )?treatments?"),
    ("occurs_on", "(?:usual )?sites?"),
    ("has_feature", "features?|signs?|symptoms?"),
    ("coded_as", "(?:ICD-10(?:-CM)? )?codes?"),
    (SYNONYM, "synonyms?|other names?"),
)
_BE = "(?:is|are|includes?|may be|can be)"
_SUBJECT = rf"(?P<subject>\S+(?: \S+){{0,{MOST_SUBJECT_WORDS - 1}}}?)"
_FRAMES = (
    *((relation, rf"(?P<subject>its|their) (?:{aspect}) {_BE} (?P<objects>.+)") for relation, aspect in _ASPECTS),
    *((relation, rf"the (?:{aspect}) (?:of|for) {_SUBJECT} {_BE} (?P<objects>.+)") for relation, aspect in _ASPECTS),
    ("has_risk_factor", rf"(?P<objects>.+?) (?:raises?|increases?) the risk of {_SUBJECT}"),
    ("has_border", rf"{_SUBJECT} has an? (?P<objects>.+?) (?:border|edge|margin|outline)"),
    *((relation, rf"{_SUBJECT} (?:{verb}) ?(?P<objects>.+)") for relation, verb in _VERBS),
)
FRAMES = tuple((relation, re.compile(pattern, re.IGNORECASE)) for relation, pattern in _FRAMES)
"""Tried in this order; a frame counts only if its subject is known."""

_NEGATION = re.compile(r"\b(?:no|not|never|cannot|neither|nor|without|hardly|n't)\b|n't\b", re.IGNORECASE)
_OPENING = re.compile(r"^(?:under|on|in|at|with|after|once|where|when|if|as)\b[^,]*, ", re.IGNORECASE)
_CUT = re.compile(
    r"\s*(?:[;:(]|,? ?\b(?:that|which|because|when|where|who|whose|if|while|whereas|although|but|so|unless|until|"
    r"without|except|rather than|instead of|after|before|under dermoscopy|over time|with time|with age|"
    r"in (?:adults|children|(?:some|most|many|rare) cases))\b).*$",
    re.IGNORECASE,
)
_LIST = re.compile(r"\s*,\s*(?:(?:and|or)\s+)?(?:also\s+)?|\s+(?:and|or|as well as)\s+", re.IGNORECASE)
_ARTICLE = re.compile(r"^(?:(?:an?|the|its|their|such as|mainly|usually|often|sometimes|also|either|both) )+", re.I)
_PRONOUN = re.compile(
    r"^(?:it|they|its|their|(?:the|this|these) (?:lesions?|tumou?rs?|growths?|spots?|disease))$", re.I
)
_FREQUENCY = re.compile(rf"\b(?:{_ADVERBS})\b", re.IGNORECASE)
_DETERMINER = re.compile(r"^(?:an?|the|some|most|many|every|each) ", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Reading:
    """One way to read a sentence."""

    relation: str
    subject: str | None
    """The name that stands there; None for a pronoun."""
    objects: tuple[str, ...]
    too_long: tuple[str, ...]
    """Objects that have too many words for a name."""
    frequency: str | None
    is_negated: bool


def denies(sentence: str) -> bool:
    """Whether the sentence has a word that denies."""
    return _NEGATION.search(sentence) is not None


def readings(sentence: str) -> Iterator[Reading]:
    """All ways in which a frame fits, most specific first; whether the subject is known is not looked at."""
    text = _OPENING.sub("", sentence.strip().rstrip(".!"))
    for relation, frame in FRAMES:
        if (match := frame.fullmatch(text)) is None:
            continue
        groups = match.groupdict()
        objects = _CUT.sub("", groups["objects"])
        names = tuple(name for part in _LIST.split(objects) if (name := _ARTICLE.sub("", part.strip())))
        denied = tuple(name for name in names if denies(name))
        kept = tuple(name for name in names if name not in denied)
        before = text[: match.start("objects")] if match.start("objects") else text[match.end("objects") :]
        yield Reading(
            relation,
            None if _PRONOUN.match(groups["subject"]) else _DETERMINER.sub("", groups["subject"]),
            tuple(name for name in kept if len(name.split()) <= MOST_OBJECT_WORDS),
            tuple(name for name in kept if len(name.split()) > MOST_OBJECT_WORDS),
            often[0].lower() if (often := _FREQUENCY.search(before)) else None,
            bool(denied),
        )
