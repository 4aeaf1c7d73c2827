"""Questions: a start, up to two links and a relation, kept where every step is needed and leads to one answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lit_agentrl.envs.search.facts.borders import CLEAR
from lit_agentrl.envs.search.facts.entities import Entity
from lit_agentrl.envs.search.facts.passages import Passage
from lit_agentrl.envs.search.facts.phrases import ASK, CLUE, LARGER, LINK, SMALLEST_WINS
from lit_agentrl.envs.search.facts.texts import holds, normalise, shares_word

KINDS = ("single", "two_hop", "three_hop", "comparison")
"""The first three by the number of passages that are needed, one after another; a comparison reads two side by side."""
_BY_PASSAGES = {1: "single", 2: "two_hop", 3: "three_hop"}


@dataclass(frozen=True, slots=True)
class Question:
    """A question with all that is known of it."""

    text: str
    answers: tuple[str, ...]
    """Each a right answer; one at least stands in the last gold passage."""
    kind: str
    template: str
    gold: tuple[str, ...]
    """The passages that answer it, in the order of reading."""
    entities: tuple[str, ...]
    """All it is about: those it names, those in between, and the one whose fact is the answer."""


@dataclass(frozen=True, slots=True)
class _Walk:
    """The way to an entity: how a question describes it, and what has to be read for it."""

    at: Entity
    phrase: str
    start: str
    """What the question gives, word by word."""
    template: str
    gold: tuple[str, ...] = ()
    entities: tuple[str, ...] = ()


def all_questions(
    entities: Sequence[Entity], passages: Mapping[str, Passage], left_out: Counter[str]
) -> list[Question]:
    """Every question that the rules let through, in the order of the entities; what they stop is counted by reason."""
    by_id = {entity.id: entity for entity in entities}
    found: dict[str, Question] = {}
    for question, start in _candidates(entities, by_id):
        reason = _fault(question, start, passages)
        if reason is None and question.text not in found:
            found[question.text] = question
        elif reason is not None:
            left_out[f"questions: {reason}"] += 1
    return list(found.values())


def _candidates(entities: Iterable[Entity], by_id: Mapping[str, Entity]) -> Iterator[tuple[Question, str]]:
    for entity in entities:
        for start in _starts(entity):
            for walk in _walks(start, by_id, links=2):
                yield from _endings(walk)
        for link in ("longest_border", "only_neighbour", "next"):
            if link in entity.links and entity.links[link].target in by_id:
                yield from _comparisons(entity, by_id[entity.links[link].target])


def _starts(entity: Entity) -> Iterator[_Walk]:
    """By name, and by every value that is the entity's alone."""
    yield _Walk(entity, entity.mention, entity.mention, "by name", entities=(entity.id,))
    for relation, fact in entity.facts.items():
        if fact.clue:
            value = fact.answers[0]
            yield _Walk(entity, CLUE[relation].format(value), value, f"by {relation}", (fact.gold,), (entity.id,))


def _walks(walk: _Walk, by_id: Mapping[str, Entity], links: int) -> Iterator[_Walk]:
    """The walk, and all that go on from it over so many links."""
    yield walk
    for name, link in walk.at.links.items() if links else ():
        if link.target in by_id and link.target not in walk.entities:
            there = _Walk(
                by_id[link.target],
                LINK[name].format(walk.phrase),
                walk.start,
                f"{walk.template} > {name}",
                _once((*walk.gold, *link.gold)),
                (*walk.entities, link.target),
            )
            yield from _walks(there, by_id, links - 1)


def _endings(walk: _Walk) -> Iterator[tuple[Question, str]]:
    """What can be asked of the entity that a walk has come to."""
    known = walk.template.removeprefix("by ")  # asking for what the question gives, where nothing lies in between
    asked = [(name, fact.answers, fact.gold) for name, fact in walk.at.facts.items() if name in ASK and name != known]
    if walk.gold:
        asked.append(("name", walk.at.names, walk.gold[-1]))
    for relation, answers, last in asked:
        gold = _once((*walk.gold, last))
        kind = _BY_PASSAGES.get(len(gold), "longer")
        yield _question(relation, walk.phrase, answers, kind, walk.template, gold, walk.entities), walk.start


def _comparisons(one: Entity, other: Entity) -> Iterator[tuple[Question, str]]:
    """The facts of the larger of two neighbours, or of the older of two elements."""
    for size in sorted(one.sizes.keys() & other.sizes.keys()):
        order = sorted((one, other), key=lambda entity: entity.sizes[size][0], reverse=size in SMALLEST_WINS)
        loser, winner = order
        low, high = sorted(entity.sizes[size][0] for entity in order)
        if low == high or (size not in SMALLEST_WINS and high < CLEAR * low):  # years are exact
            continue
        phrase = LARGER[size].format(one.mention, other.mention)
        read = _once((loser.sizes[size][1], winner.sizes[size][1]))
        for relation, fact in winner.facts.items():
            if relation in ASK and relation != size:
                gold = _once((*(passage for passage in read if passage != fact.gold), fact.gold))
                ids = (one.id, other.id)
                yield _question(relation, phrase, fact.answers, "comparison", f"by {size}", gold, ids), phrase


def _question(
    relation: str,
    phrase: str,
    answers: tuple[str, ...],
    kind: str,
    template: str,
    gold: tuple[str, ...],
    entities: tuple[str, ...],
) -> Question:
    """One of the two wordings, by the parity of the phrase's length: neither chance nor the order of making decides."""
    text = ASK[relation][len(phrase) % 2].format(phrase)
    return Question(text, answers, kind, f"{template} > {relation}", gold, entities)


def _fault(question: Question, start: str, passages: Mapping[str, Passage]) -> str | None:
    """Why a question is not asked."""
    last = passages[question.gold[-1]].contents
    earlier = [passages[gold].contents for gold in question.gold[:-1]]
    if question.kind == "longer":
        return "more than three passages are needed"
    if holds(question.text, question.answers) or any(normalise(a) == normalise(start) for a in question.answers):
        return "the answer stands in the question"
    if question.kind != "comparison" and shares_word(start, question.answers):
        return "the question and the answer share a word"
    if not holds(last, question.answers):
        return "the answer does not stand in the last passage as it is spelled"
    if any(holds(text, question.answers) for text in earlier):
        return "an earlier passage holds the answer"
    if earlier and question.kind != "comparison" and holds(last, [start]):
        return "the last passage alone would do"
    return None


def _once(items: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(items))
