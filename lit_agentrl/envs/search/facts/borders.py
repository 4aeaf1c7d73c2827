"""Land borders: the one country that lies at the end of a country's longest border, or of its only one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from lit_agentrl.envs.search.facts.country_passages import place
from lit_agentrl.envs.search.facts.entities import Entity, Link
from lit_agentrl.envs.search.facts.matching import codes_by_name, key
from lit_agentrl.envs.search.facts.passages import Corpus
from lit_agentrl.envs.search.facts.sources import Entry, Sources

CLEAR = 1.05
"""The longest border and the larger area must win by 5 %: sources differ by less."""
_BORDERS = "Land boundaries, border countries"


def add_borders(
    entities: Sequence[Entity],
    matched: Mapping[str, Entry],
    sources: Sources,
    corpus: Corpus,
    left_out: Counter[str],
) -> None:
    """The neighbour with the longest border, and the only one; kept where the neighbour says the same."""
    codes = codes_by_name(sources, matched)
    lengths = {code: _lengths(entry.get("Geography", _BORDERS), codes) for code, entry in matched.items()}
    known = {entity.id for entity in entities}
    for entity in entities:
        gold = corpus.places.get(place(matched[entity.id], "Geography", _BORDERS))
        borders = lengths[entity.id]
        if gold is None or not borders:  # an island
            continue
        (longest, length), *rest = sorted(borders.items(), key=lambda item: -item[1])
        back = lengths.get(longest, {}).get(entity.id, 0.0)
        listed = set(sources.countries[entity.id].get("borders") or [])
        if longest not in known or not length / CLEAR < back < length * CLEAR or longest not in listed:
            left_out["longest borders that the neighbour or countryinfo does not confirm"] += 1
        elif not rest and listed == {longest}:
            entity.links["only_neighbour"] = Link(longest, (gold,))
        elif rest and length > CLEAR * rest[0][1]:
            entity.links["longest_border"] = Link(longest, (gold,))
        else:
            left_out["longest borders that are close, or whose number of neighbours differs"] += 1


def _lengths(text: str, codes: Mapping[str, str]) -> dict[str, float]:
    """Kilometres by neighbour: its ISO code, or its name where no ISO code is known. Two stretches are added up."""
    text = re.sub(r"\s*\([^)]*\)", "", text)
    found: dict[str, float] = {}
    for name, number in re.findall(r"([^;,\d][^;\d]*?)\s+([\d,.]+)\s*km", text):
        name = re.sub(r"^\W*(and )?", "", name)
        code = codes.get(key(name), name)
        found[code] = found.get(code, 0.0) + float(number.replace(",", ""))
    return found
