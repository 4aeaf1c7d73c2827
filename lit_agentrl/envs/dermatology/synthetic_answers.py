"""Answers about a synthetic lesion, from what its picture shows and what the knowledge graph says of its disease.

An answer is made of statements, each of one relation of the graph, so that a wrong fact can be put in one of them on
purpose and be found again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lit_agentrl.envs.dermatology.lesion_attributes import Lesion
from lit_agentrl.envs.dermatology.lesion_classes import LESION_LABELS, PROFILES, STRUCTURES
from lit_agentrl.envs.dermatology.lesion_text import article, listed

Facts = Callable[[str, str], Sequence[str]]
"""(disease, relation) -> objects: `knowledge.facts`, or `KnowledgeGraph.objects`."""
KINDS = ("name", "features", "treatment", "risk", "outlook", "confusion")
"""What is asked about: the first three open a conversation, the others follow up."""
OPENING = KINDS[:3]
QUESTIONS: dict[str, tuple[str, ...]] = {
    "name": ("What is the name of the disease?", "Which disease does the image show?", "What is this lesion?"),
    "features": (
        "What are the clinical features of this lesion?",
        "Describe the clinical features.",
        "Which clinical features can be seen?",
    ),
    "treatment": ("What is the treatment?", "How is this disease treated?", "How should this lesion be treated?"),
    "risk": ("What are the risk factors?", "Who is at risk of it?"),
    "outlook": ("Is it dangerous?", "What kind of disease is it, and what may it become?"),
    "confusion": ("What can it be confused with?", "Which diseases look similar?"),
}
SYMMETRY = {"symmetric": "symmetry", "slightly asymmetric": "slight asymmetry", "asymmetric": "asymmetry"}
"""What the graph calls it."""
MOST_OBJECTS = 3
"""Of a statement: with it the longest answer stays below 60 tokens of SmolLM2."""


@dataclass(frozen=True)
class Statement:
    """One sentence: its words, with {objects} in them, and what it says."""

    words: str
    relation: str = ""
    """Of the graph's schema; empty for a sentence that states no fact."""
    objects: tuple[str, ...] = ()

    def text(self) -> str:
        """The sentence."""
        objects = [f"{article(name)} {name}" if self.relation == "is_a" else name for name in self.objects]
        return self.words.format(objects=listed(objects)) if objects else self.words


@dataclass(frozen=True)
class Error:
    """A wrong fact that was put in on purpose."""

    relation: str
    right: str
    """What stood there."""
    wrong: str
    """What stands there now."""
    source: str
    """The disease of which it is true."""


@dataclass(frozen=True)
class Answer:
    """An answer, the facts that it states, and the wrong one among them, if any."""

    statements: tuple[Statement, ...]
    error: Error | None = None

    def text(self) -> str:
        """The answer as it is said."""
        return " ".join(statement.text() for statement in self.statements)


def compose(kind: str, lesion: Lesion, facts: Facts, rng: random.Random) -> Answer:
    """A true answer to a question of this kind."""
    disease, name = lesion.label, lesion.label[0].upper() + lesion.label[1:]

    def some(relation: str, most: int = MOST_OBJECTS) -> tuple[str, ...]:
        known = list(facts(disease, relation))
        return tuple(sorted(rng.sample(known, min(most, len(known))), key=known.index))

    kinds = Statement("It is {objects}.", "is_a", some("is_a", 1))
    match kind:
        case "name":
            look = rng.choice(("This looks like {}.", "This is most likely {}.", "The image shows {}."))
            parts = [Statement(look.format(disease)), *_seen(lesion, facts)[1:]]
        case "features":
            more = Statement(f"{name} may also show {{objects}}.", "has_feature", _unseen(lesion, facts, rng))
            parts = [*_seen(lesion, facts), more]
        case "treatment":
            parts = [Statement(f"{name} is treated with {{objects}}.", "treated_with", some("treated_with"))]
        case "risk":
            parts = [
                Statement(f"The risk factors of {disease} are {{objects}}.", "has_risk_factor", some("has_risk_factor"))
            ]
        case "outlook":
            parts = [
                replace(kinds, words=f"{name} is {{objects}}."),
                Statement("It may become {objects}.", "may_become", some("may_become", 1)),
            ]
        case _:
            parts = [Statement(f"{name} may be confused with {{objects}}.", "differs_from", some("differs_from"))]
    return Answer(tuple(part for part in parts if part.objects or not part.relation))


def corrupt(answer: Answer, lesion: Lesion, facts: Facts, rng: random.Random) -> Answer:
    """The answer with one fact replaced by one of the same relation that is true of another disease alone.

    What the picture shows is never put in, and a structure is replaced by another structure. An answer that states no
    fact that could be replaced stays as it is, without an `error`.
    """
    places = [(at, number) for at, part in enumerate(answer.statements) for number in range(len(part.objects))]
    for at, number in rng.sample(places, len(places)):
        part = answer.statements[at]
        if not (wrong := _wrong(part.relation, part.objects[number], lesion, facts)):
            continue
        source, name = rng.choice(wrong)
        objects = (*part.objects[:number], name, *part.objects[number + 1 :])
        statements = (*answer.statements[:at], replace(part, objects=objects), *answer.statements[at + 1 :])
        return Answer(statements, Error(part.relation, part.objects[number], name, source))
    return answer


def _seen(lesion: Lesion, facts: Facts) -> list[Statement]:
    """What the picture shows of the things that are typical of its disease."""
    what, profile = lesion.attributes, PROFILES[lesion.label]
    typical_structures = {name for names in profile.structures for name in names}
    features = [name for name in what.structures if name in typical_structures]
    if (symmetry := SYMMETRY[what.symmetry]) in facts(lesion.label, "has_feature"):
        features.append(symmetry)
    colours = [name for name in what.colours if any(name in names for names in profile.colours)]
    border = (what.border,) if what.border in profile.border else ()
    return [
        Statement("The lesion is {objects} in colour.", "has_colour", tuple(colours)),
        Statement("Its border is {objects}.", "has_border", border),
        Statement("It shows {objects}.", "has_feature", tuple(features)),
    ]


def _unseen(lesion: Lesion, facts: Facts, rng: random.Random) -> tuple[str, ...]:
    """A feature of the disease that the picture does not show."""
    drawn = {name for names in PROFILES[lesion.label].structures for name in names}.union(SYMMETRY.values())
    others = [name for name in facts(lesion.label, "has_feature") if name not in drawn]
    return (rng.choice(others),) if others else ()


def _wrong(relation: str, right: str, lesion: Lesion, facts: Facts) -> list[tuple[str, str]]:
    """(other disease, object) pairs that could stand in the place of `right`."""
    what = lesion.attributes
    taken = {
        lesion.label,
        *facts(lesion.label, relation),
        *what.colours,
        *what.structures,
        what.border,
        SYMMETRY[what.symmetry],
    }
    pairs = [
        (other, name)
        for other in LESION_LABELS
        if other != lesion.label
        for name in facts(other, relation)
        if name not in taken
    ]
    return [pair for pair in pairs if pair[1] in STRUCTURES] if right in STRUCTURES else pairs
