"""Chemical elements: mendeleev's table, told in three passages an element."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from lit_agentrl.envs.search.facts.entities import Entity, Fact, Link
from lit_agentrl.envs.search.facts.passages import Corpus
from lit_agentrl.envs.search.facts.sources import clean
from lit_agentrl.envs.search.facts.texts import normalise, person

_KNOWN = "Known to the ancients"


def add_elements(corpus: Corpus, rows: Sequence[Mapping[str, Any]]) -> None:
    """Three records an element: what it is, how it was found, what it is good for. Prices and shares are left out."""
    for row in rows:
        name, number = str(row["name"]), row["atomic_number"]
        for part, fields in (("", _identity(row)), ("discovery", _discovery(row)), ("uses", _uses(row))):
            title = f"{name} (element)" if not part else f"{name}: {'sources and uses' if part == 'uses' else part}"
            corpus.add(f"mendeleev/{number}/{part or 'element'}", title, fields)


def element_entities(
    rows: Sequence[Mapping[str, Any]], countries: Sequence[Entity], corpus: Corpus, left_out: Counter[str]
) -> list[Entity]:
    """All elements, with what can be asked of them; what is left out is counted."""
    people = " | ".join(normalise(_spaced(str(row["discoverers"]))) for row in rows)
    places = {name: country.id for country in countries for name in country.names}
    entities = []
    for row in rows:
        name, record = str(row["name"]), f"mendeleev/{row['atomic_number']}"
        entity = Entity(_id(row), "element", name, (name,))
        element, found = corpus.places[f"{record}/element", ""], corpus.places.get((f"{record}/discovery", ""))
        entity.facts["number"] = Fact((str(row["atomic_number"]),), element, clue=True)
        entity.facts["symbol"] = Fact((str(row["symbol"]),), element)
        entity.facts["cas"] = Fact((str(row["cas"]),), element, clue=True)
        if found is not None:
            _add_discovery(entity, row, found, people, places, left_out)
        entities.append(entity)
    for entity, after in pairwise(entities):
        entity.links["next"] = Link(after.id, (entity.facts["number"].gold, after.facts["number"].gold))
        after.links["previous"] = Link(entity.id, (after.facts["number"].gold, entity.facts["number"].gold))
    return entities


def _id(row: Mapping[str, Any]) -> str:
    return f"element-{row['atomic_number']}"


def _add_discovery(
    entity: Entity,
    row: Mapping[str, Any],
    gold: str,
    people: str,
    places: Mapping[str, str],
    left_out: Counter[str],
) -> None:
    """Who, when and where, unless the source's own description gives another year."""
    years = set(re.findall(r"\b1[5-9]\d\d\b", str(row["description"])))
    if years and str(row["discovery_year"]) not in years:
        left_out["discoveries whose year the element's description does not confirm"] += 1
        return
    entity.facts["year"] = Fact((str(row["discovery_year"]),), gold)
    entity.sizes["year"] = (float(row["discovery_year"]), gold)
    who = person(_spaced(str(row["discoverers"])))
    if who and "Laborator" not in who[0] and "Institute" not in who[0] and "Centre" not in who[0]:
        entity.facts["discoverer"] = Fact(who, gold, clue=people.count(normalise(who[-1])) == 1)
    where = str(row["discovery_location"])
    if where in places:
        entity.links["found_in"] = Link(places[where], (gold,))
    else:
        left_out["places of discovery that are several or no independent country"] += 1


def _spaced(text: str) -> str:
    """Initials with a space behind their points: `C.F. Aver von Welsbach`."""
    return re.sub(r"\.(?=[A-Z][a-z])", ". ", text).strip()


def _identity(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    group = f"group {row['group_id']}, " if row["group_id"] else ""
    text = (
        f"{row['name']} is the chemical element with the symbol {row['symbol']} and atomic number "
        f"{row['atomic_number']}. It stands in {group}period {row['period']} and the {row['block']}-block of the "
        f"periodic table and is counted among the {str(row['series']).lower()}. Its CAS registry number is "
        f"{row['cas']}. Its electronic configuration is {row['electronic_configuration']}."
    )
    return [("", text), *([("description", clean(str(row["description"])))] if row["description"] else [])]


def _discovery(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    name, who = row["name"], str(row["discoverers"]).rstrip(". ")
    origin = [("name origin", clean(str(row["name_origin"])))] if row["name_origin"] else []
    if row["discovery_year"] is None:
        return [("known", f"{name} was {who[:1].lower()}{who[1:]}"), *origin]
    text = f"{name} was discovered in {row['discovery_year']} by {_spaced(who)}."
    return [("", f"{text} Place of discovery: {row['discovery_location']}."), *origin]


def _uses(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    fields = [(key, clean(str(row[key]))) for key in ("sources", "uses") if row[key]]
    return [("element", str(row["name"])), *fields]
