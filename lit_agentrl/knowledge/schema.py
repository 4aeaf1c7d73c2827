"""What a fact of the graph is: one of ten relations between two names, with where it is from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lit_agentrl.errors import UserError
from lit_agentrl.knowledge.names import name_key, one_line, tidy

MOST_WORDS = 24
"""Of one name: the longest of HPO and ICD-10-CM has 21."""


@dataclass(frozen=True, slots=True)
class Relation:
    """One relation of the fixed schema."""

    name: str
    """How it is stored."""
    phrase: str
    """How it is said between subject and object."""
    range: str
    """What its objects are. Subjects are diseases; of is_a, also other terms."""
    cues: tuple[str, ...]
    """What an answer says beside an object that stands in this relation."""
    words: str = ""
    """What questions about it say beside the words of the phrase."""
    needs_cue: bool = False
    """Whether the object's name alone does not say that this relation is meant: `face`, or another disease."""
    varies: bool = False
    """Whether a case need not have it: an answer may deny it without contradicting the graph."""


_ALL = (
    Relation(
        "has_feature",
        "shows",
        "a sign, shape, surface, structure or symptom",
        ("show", "has", "have", "feature", "present with", "characterized by", "characterised by", "exhibit", "sign"),
        "feature features signs symptoms look appearance appear describe characteristics visible structures",
        varies=True,
    ),
    Relation(
        "has_colour",
        "has the colours",
        "a colour",
        ("color", "colored", "pigmented"),
        "colour color pigmentation",
        varies=True,
    ),
    Relation(
        "has_border",
        "has a border that is",
        "a word for the border",
        ("border", "edge", "margin", "outline"),
        "border edge margin outline shape",
        needs_cue=True,
        varies=True,
    ),
    Relation(
        "occurs_on",
        "occurs on",
        "a body site",
        ("on", "site", "located", "occur in", "found in", "affect", "over"),
        "where location site body occur found place",
        needs_cue=True,
        varies=True,
    ),
    Relation(
        "has_risk_factor",
        "has the risk factors",
        "a cause or a risk factor",
        (
            "risk factor",
            "risk",
            "caused by",
            "cause",
            "due to",
            "result from",
            "linked to",
            "driven by",
            "triggered by",
        ),
        "risk factor cause causes why reason prevent avoid",
    ),
    Relation(
        "treated_with",
        "is treated with",
        "a treatment, or watching without one",
        (
            "treated with",
            "treated by",
            "treatment",
            "managed with",
            "managed by",
            "removed by",
            "removed with",
            "therapy",
        ),
        "treatment treat therapy manage management removed cure option options",
    ),
    Relation(
        "may_become",
        "may become",
        "a disease",
        (
            "become",
            "turn into",
            "progress to",
            "develop into",
            "transform into",
            "evolve into",
            "precursor of",
            "lead to",
        ),
        "become turn progress develop outcome prognosis dangerous risk transform future",
        needs_cue=True,
    ),
    Relation(
        "is_a",
        "is a",
        "a category",
        ("is", "are", "type of", "kind of", "form of", "considered", "represent", "was"),
        "kind type malignant benign category cancer dangerous",
        needs_cue=True,
    ),
    Relation(
        "coded_as",
        "is coded as",
        "a code of ICD-10-CM",
        ("coded as", "code", "icd"),
        "code icd classification",
    ),
    Relation(
        "differs_from",
        "may be confused with",
        "a disease that it is confused with",
        (
            "confused with",
            "mistaken for",
            "differ from",
            "different from",
            "distinguished from",
            "told apart from",
            "resemble",
            "mimic",
            "look like",
            "unlike",
            "differential diagnosis",
            "differential diagnoses",
            "similar to",
        ),
        "differ differential distinguish confused similar versus resemble mimic",
        needs_cue=True,
    ),
)
RELATIONS = {relation.name: relation for relation in _ALL}
"""The schema: no other relation is let in."""


@dataclass(frozen=True, slots=True, order=True)
class Edge:
    """One fact and where it is from. Names are stored tidied: one line, lower case but for codes.

    Raises:
        UserError: The relation is not one of RELATIONS, or a name is empty or longer than MOST_WORDS words.
    """

    subject: str
    relation: str
    object: str
    source: str
    """Which collection says it: hpo, icd, notes, or a file's name."""
    reference: str = ""
    """Where in it: a database's id and a publication, a code, or file and line."""
    frequency: str | None = None
    """In how many patients, as the source says: 12/40, 25%, very frequent."""
    sentence: str | None = None
    """The sentence that it was read from."""

    def __post_init__(self) -> None:
        check_relation(self.relation)
        for name in ("subject", "object"):
            value = tidy(getattr(self, name))
            if not 1 <= len(name_key(value)) <= MOST_WORDS:
                raise UserError(
                    f"the {name} of a fact is {getattr(self, name)!r}: a name has 1 to {MOST_WORDS} words, each with "
                    "a letter or digit."
                )
            object.__setattr__(self, name, value)
        for name in ("source", "reference"):
            object.__setattr__(self, name, one_line(getattr(self, name)))
        for name in ("frequency", "sentence"):
            object.__setattr__(self, name, one_line(getattr(self, name) or "") or None)

    @property
    def triple(self) -> tuple[str, str, str]:
        """What it says, without where it is from."""
        return self.subject, self.relation, self.object

    def at(self, reference: str) -> Edge:
        """The same fact with another reference."""
        return replace(self, reference=reference)


def check_relation(name: str) -> Relation:
    """The relation of this name.

    Raises:
        UserError: There is none.
    """
    if name not in RELATIONS:
        raise UserError(f"the relation {name!r} is not in the schema. Relations: {', '.join(RELATIONS)}.")
    return RELATIONS[name]


def state(subject: str, relation: str, objects: Sequence[str]) -> str:
    """A sentence that says so, such as `Melanoma may become X.`; `extract_edges` reads it back."""
    phrase = check_relation(relation).phrase
    if relation == "is_a":
        objects = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in objects]
        phrase = "is"
    sentence = f"{subject} {phrase} {join_names(objects)}."
    return sentence[0].upper() + sentence[1:]


def join_names(names: Iterable[str]) -> str:
    """The names as a list of a sentence: `a`, `a and b`, `a, b and c`."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
