"""Training, validation and test: no entity of a held-out question is in a question of another split.

Entities that questions join are put into the same split as far as possible: the graph of links is cut into connected
patches, and whole patches are dealt out. A question whose entities lie in different splits is not used.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence

from lit_agentrl.envs.search.facts.entities import Entity
from lit_agentrl.envs.search.facts.questions import KINDS, Question

SPLITS = ("train", "val", "test")
PATCH = 12
"""Entities of a patch: large enough for chains of three, small enough for held-out patches from several regions."""
SHARES = {"single": 0.30, "two_hop": 0.35, "three_hop": 0.25, "comparison": 0.10}
"""How many questions of a split are of each kind."""
ENTITIES = {"val": 0.15, "test": 0.25}
"""The shares of the entities that are held out."""


def split_entities(entities: Sequence[Entity], rng: random.Random) -> dict[str, str]:
    """The split of every entity by its id. Countries and elements are dealt out apart: each split has both."""
    found: dict[str, str] = {}
    for kind in ("country", "element"):
        patches = _patches([entity for entity in entities if entity.kind == kind], rng)
        total = sum(map(len, patches))
        for split, share in ENTITIES.items():
            held = 0
            while patches and held + len(patches[-1]) / 2 < share * total:
                patch = patches.pop()
                held += len(patch)
                found |= dict.fromkeys(patch, split)
        found |= {entity: "train" for patch in patches for entity in patch}
    return found


def _patches(entities: Sequence[Entity], rng: random.Random) -> list[list[str]]:
    """Connected pieces of the graph of links, of at most PATCH entities, in an order that the generator chose."""
    neighbours: dict[str, list[str]] = {entity.id: [] for entity in entities}
    for entity in entities:
        for link in entity.links.values():
            if link.target in neighbours:  # an element's country is no neighbour of it: it would join all of them
                neighbours[entity.id].append(link.target)
                neighbours[link.target].append(entity.id)
    starts = sorted(neighbours)
    rng.shuffle(starts)
    seen: set[str] = set()
    patches = []
    for start in starts:
        patch: list[str] = []
        queue = deque([start])
        while queue and len(patch) < PATCH:
            here = queue.popleft()
            if here not in seen:
                seen.add(here)
                patch.append(here)
                queue.extend(neighbours[here])
        if patch:
            patches.append(patch)
    rng.shuffle(patches)
    return patches


def by_split(questions: Iterable[Question], places: Mapping[str, str]) -> tuple[dict[str, list[Question]], int]:
    """The questions whose entities all lie in one split, by split, and the number of the others."""
    found: dict[str, list[Question]] = {split: [] for split in SPLITS}
    crossing = 0
    for question in questions:
        splits = {places[entity] for entity in question.entities}
        if len(splits) == 1:
            found[splits.pop()].append(question)
        else:
            crossing += 1
    return found, crossing


def sample(questions: Iterable[Question], count: int, rng: random.Random) -> list[Question]:
    """So many questions in SHARES' proportion, shuffled; of a kind that has fewer, all.

    Templates take turns, so that no wording with many questions crowds out the others.
    """
    by_kind: dict[str, list[Question]] = {kind: [] for kind in KINDS}
    for question in questions:
        by_kind[question.kind].append(question)
    chosen = [question for kind in KINDS for question in _in_turns(by_kind[kind], round(SHARES[kind] * count), rng)]
    rng.shuffle(chosen)
    return chosen


def _in_turns(questions: Sequence[Question], count: int, rng: random.Random) -> list[Question]:
    """The first ones of all templates, then the second ones, and so on, until there are enough."""
    shuffled = rng.sample(questions, len(questions))
    turns: Counter[str] = Counter()
    ranked = []
    for place, question in enumerate(shuffled):
        turns[question.template] += 1
        ranked.append((turns[question.template], place, question))
    return [question for *_, question in sorted(ranked, key=lambda item: item[:2])[:count]]
