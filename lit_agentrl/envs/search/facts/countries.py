"""Countries: the Factbook's facts that can be asked for, kept where countryinfo does not contradict them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lit_agentrl.envs.search.facts.borders import CLEAR, add_borders
from lit_agentrl.envs.search.facts.country_passages import place
from lit_agentrl.envs.search.facts.entities import Entity, Fact
from lit_agentrl.envs.search.facts.matching import OTHER_NAMES, SHORT, key, match_countries, title
from lit_agentrl.envs.search.facts.passages import Corpus
from lit_agentrl.envs.search.facts.sources import Entry, Sources
from lit_agentrl.envs.search.facts.texts import day, named, person, quoted, spellings

_CAPITAL, _AREA = "Capital, name", "Area, total"
_WITH_ARTICLE = re.compile(
    r"(United|Democratic|Republic|Central African|Dominican Republic|Federated|Marshall|Solomon|Holy See|Bahamas|Gambia"
    r"|Philippines|Netherlands|Maldives|Comoros|Seychelles)"
)


@dataclass(frozen=True, slots=True)
class _Field:
    """A field of the Factbook that is asked for as it stands."""

    section: str
    name: str
    read: str
    clue: bool = True


_ASKED = {
    "highest_point": _Field("Geography", "Elevation, highest point", "elevation"),
    "lowest_point": _Field("Geography", "Elevation, lowest point", "elevation"),
    "anthem": _Field("Government", "National anthem(s), title", "title"),
    "lyricist": _Field("Government", "National anthem(s), lyrics/music", "lyricist"),
    "composer": _Field("Government", "National anthem(s), lyrics/music", "composer"),
    "independence": _Field("Government", "Independence", "date"),
    "holiday": _Field("Government", "National holiday", "day", clue=False),
    "local_name": _Field("Government", "Country name, local short form", "name", clue=False),
}


def country_entities(sources: Sources, corpus: Corpus, left_out: Counter[str]) -> list[Entity]:
    """Independent countries that both packages have, with what can be asked of them; what is left out is counted."""
    matched = match_countries(sources, left_out)
    entities = []
    for code, entry in matched.items():
        record = sources.countries[code]
        if entry.get("Government", "Dependency status"):
            left_out["territories"] += 1
            continue
        name = title(entry)
        mention = f"the {name}" if _WITH_ARTICLE.match(name) else name
        others = [other for other, owner in OTHER_NAMES.items() if owner == code]
        names = spellings([name, entry.get("Government", SHORT).split(" (")[0], str(record["name"]), *others])
        entity = Entity(code, "country", mention, names)
        _add_capital(entity, entry, record, corpus, left_out)
        _add_fields(entity, entry, corpus)
        _add_calling_code(entity, record, sources.countries, corpus)
        _add_area(entity, entry, record, corpus, left_out)
        entities.append(entity)
    _mark_clues(entities, matched, sources.factbook)
    add_borders(entities, matched, sources, corpus, left_out)
    return entities


def _add_capital(
    entity: Entity, entry: Entry, record: Mapping[str, Any], corpus: Corpus, left_out: Counter[str]
) -> None:
    text, gold = entry.get("Government", _CAPITAL), corpus.places.get(place(entry, "Government", _CAPITAL))
    answers = ("Washington, D.C.", "Washington") if text == "Washington, D.C." else named(text)
    if not answers or gold is None:
        left_out["capitals: none, several, or with a note"] += 1
    elif key(str(record.get("capital"))) not in set(map(key, answers)):
        left_out["capitals on which the sources differ"] += 1
    else:
        entity.facts["capital"] = Fact(answers, gold, clue=True)


def _add_fields(entity: Entity, entry: Entry, corpus: Corpus) -> None:
    for relation, asked in _ASKED.items():
        gold = corpus.places.get(place(entry, asked.section, asked.name))
        answers = _read(asked.read, entry.get(asked.section, asked.name))
        if relation == "local_name" and set(map(key, answers)) & set(map(key, entity.names)):
            continue  # the English name is no news
        if answers and gold is not None:
            entity.facts[relation] = Fact(answers, gold, asked.clue)


def _read(how: str, text: str) -> tuple[str, ...]:
    """The value in a field's text; nothing where the text says more than one."""
    if how == "elevation":
        match = re.fullmatch(r"(.+?) -?[\d,.]+(?: m)?(?: \(highest [^()]*\))?", text)
        return () if match is None or re.search(r"Ocean|Seas?\b|Gulf|Channel", match[1]) else named(match[1])
    if how == "title":
        return quoted(text)
    if how in ("lyricist", "composer"):
        halves = text.split("/")
        return person(halves[how == "composer"]) if len(halves) == 2 else ()
    if how == "date":
        return day(text, with_year=True)
    if how == "day":
        return day(text, with_year=False)
    return named(text)


def _add_calling_code(
    entity: Entity, record: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]], corpus: Corpus
) -> None:
    """The one calling code, if no other country has it or begins with it (+1 is shared by many)."""
    numbers = record.get("callingCodes") or []
    gold = corpus.places.get((f"countryinfo/{entity.id}", "international calling code"))
    others = [str(n) for code, other in records.items() if code != entity.id for n in (other.get("callingCodes") or [])]
    if gold and len(numbers) == 1 and not any(n.startswith(str(numbers[0])) for n in others):
        entity.facts["calling_code"] = Fact((f"+{numbers[0]}",), gold, clue=True)


def _add_area(entity: Entity, entry: Entry, record: Mapping[str, Any], corpus: Corpus, left_out: Counter[str]) -> None:
    gold = corpus.places.get(place(entry, "Geography", _AREA))
    match = re.match(r"([\d,.]+)( million)? sq km", entry.get("Geography", _AREA))
    if match is None or gold is None:
        return
    area = float(match[1].replace(",", "")) * (1e6 if match[2] else 1)
    if area and 1 / CLEAR < float(record.get("area") or 0) / area < CLEAR:
        entity.sizes["area"] = (area, gold)
    else:
        left_out["areas on which the sources differ"] += 1


def _mark_clues(entities: list[Entity], matched: Mapping[str, Entry], entries: tuple[Entry, ...]) -> None:
    """Let a value stand for an entity only where nothing else in all of the Factbook has it."""
    heights = Counter(_height(entry) for entry in entries)
    for relation, asked in {"capital": _Field("Government", _CAPITAL, "name"), **_ASKED}.items():
        texts = [f" {key(entry.get(asked.section, asked.name))} " for entry in entries]
        for entity in entities:
            fact = entity.facts.get(relation)
            if fact is None or not fact.clue:
                continue
            shared = sum(f" {key(fact.answers[0])} " in text for text in texts) > 1
            if relation == "highest_point":  # one peak of two countries goes by two names, but has one height
                shared |= heights[_height(matched[entity.id])] > 1
            if shared:
                entity.facts[relation] = Fact(fact.answers, fact.gold)


def _height(entry: Entry) -> str:
    """The height of the highest point, in the Factbook's digits; the code of an entry that states none."""
    match = re.search(r"[\d,.]{3,}", entry.get("Geography", "Elevation, highest point"))
    return match[0] if match else entry.code
