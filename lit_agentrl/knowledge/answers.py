"""The facts that an answer states: names of the graph in it, and the relation that the words around them mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lit_agentrl.knowledge.graph import KnowledgeGraph
from lit_agentrl.knowledge.linking import Linker, Mention, Word, sentences_with_places
from lit_agentrl.knowledge.names import name_key
from lit_agentrl.knowledge.schema import RELATIONS
from lit_agentrl.retrieval.words import STOP_WORDS

_NEGATIONS = frozenset(
    {"no", "not", "never", "without", "neither", "nor", "cannot", "lack", "absent", "absence", "free", "exclude", "t"}
)
"""After these a name is denied; `t` is what an apostrophe leaves of n't."""
_NEGATION_ENDS = frozenset(
    {"but", "however", "although", "though", "whereas", "while", "yet", "instead", "show", "with", "it", "has", "have"}
)
_ARTICLES = frozenset({"a", "an", "the"})
_BETWEEN_DISEASES = frozenset({"may_become", "differs_from"})
_NO_DESCRIPTION = frozenset({"is_a", "coded_as"})
TRAILING = 2
"""Words after a name in which its cue may stand: `brown in colour`."""


@dataclass(frozen=True, slots=True)
class Fact:
    """What an answer says about a disease."""

    subject: str
    relation: str
    object: str
    is_denied: bool = False
    """Whether it says that this is not so."""
    span: tuple[int, int] = field(default=(0, 0), compare=False)
    """Where the object's name stands in the answer, in characters."""

    @property
    def triple(self) -> tuple[str, str, str]:
        """What it says, or denies."""
        return self.subject, self.relation, self.object


class FactReader:
    """Reads answers with the names and relations of a graph.

    A name counts only in relations in which the graph has it as an object somewhere: `brown` is a colour. Where that
    leaves several, or the relation asks for one, a cue decides: the nearest before the name, else just behind it. What
    is said after another disease's name is about that disease; all else is about the one that the answer is about.

    Args:
        graph: Whose names are known.
    """

    def __init__(self, graph: KnowledgeGraph) -> None:
        roles: dict[str, set[str]] = {}
        for edge in graph.edges:
            roles.setdefault(edge.object, set()).add(edge.relation)
        # Not what has a code alone: ICD-10-CM has codes for signs such as itching.
        described = {edge.subject for edge in graph.edges if edge.relation not in _NO_DESCRIPTION}
        self._diseases = described | {name for name, found in roles.items() if found & _BETWEEN_DISEASES}
        self._roles = {name: frozenset(found) for name, found in roles.items()}
        names = {
            key: name
            for key, name in graph.names().items()
            if (name in self._roles or name in self._diseases) and not STOP_WORDS.issuperset(key)
        }
        self._names: Linker[str] = Linker(names)
        self._cues: Linker[str] = Linker({name_key(cue): item.name for item in RELATIONS.values() for cue in item.cues})

    def read(self, answer: str, disease: str) -> list[Fact]:
        """The facts of an answer, each once, in order; `disease` is the graph's name of what it is about."""
        found: dict[Fact, None] = {}
        for words in sentences_with_places(answer):
            found |= dict.fromkeys(self._sentence(words, disease))
        return list(found)

    def _sentence(self, words: Sequence[Word], disease: str) -> list[Fact]:
        names = self._names.mentions(words)
        if not names:
            return []
        cues = self._cues.mentions(words, [range(item.start, item.end) for item in names])
        denied = _denied(words, {place for cue in cues for place in range(cue.start + 1, cue.end)})
        about = self._subject(words, names, cues)
        subject = disease if about is None else about.value
        facts = []
        for name in names:
            if name is about or name.value == subject or words[name.end - 1].is_heading:
                continue
            relation = self._relation(name, cues)
            if relation is None or (denied[name.start] and RELATIONS[relation].varies):
                continue  # a case need not have every feature of its disease, and may say so
            span = words[name.start].start, words[name.end - 1].end
            facts.append(Fact(subject, relation, name.value, denied[name.start], span))
        return facts

    def _subject(
        self, words: Sequence[Word], names: Sequence[Mention[str]], cues: Sequence[Mention[str]]
    ) -> Mention[str] | None:
        """The disease that a sentence is about: one before every cue, or after `of` or `for` (the border of ...)."""
        first_cue = min((cue.start for cue in cues), default=len(words))
        ends = {cue.end for cue in cues}
        for name in names:
            if name.value not in self._diseases or name.start in ends:
                continue
            before = [word.key for word in words[: name.start] if word.key not in _ARTICLES][-1:]
            if name.end <= first_cue < len(words) or before in (["of"], ["for"]):
                return name
        return None

    def _relation(self, name: Mention[str], cues: Sequence[Mention[str]]) -> str | None:
        roles = self._roles.get(name.value, frozenset())
        if name.value in self._diseases:  # a disease is named for many reasons: only a cue makes it a fact
            roles &= _BETWEEN_DISEASES
        before = [cue.value for cue in cues if cue.end <= name.start and cue.value in roles]
        behind = [cue.value for cue in cues if 0 <= cue.start - name.end < TRAILING and cue.value in roles]
        # `is` stands in most sentences: it decides where nothing else does.
        if cue := [value for value in (*before[::-1], *behind) if value != "is_a"]:
            return cue[0]
        free = [role for role in sorted(roles) if not RELATIONS[role].needs_cue]
        if len(free) == 1 and name.value not in self._diseases:
            return free[0]
        return "is_a" if "is_a" in before and not free else None


def _denied(words: Sequence[Word], inside_cues: set[int]) -> list[bool]:
    """Of each word, whether a negation before it reaches it; `not only` is none.

    A negation ends where the sentence turns (but, yet, shows), save for its own verb (does not show, not treated with).
    """
    denied, is_open = [], False
    for place, word in enumerate(words):
        following = words[place + 1].key if place + 1 < len(words) else ""
        if word.key in _NEGATIONS and following != "only":
            is_open = True
        elif word.key in _NEGATION_ENDS and place not in inside_cues and words[place - 1].key not in _NEGATIONS:
            is_open = False
        denied.append(is_open)
    return denied
