"""The passages on countries: all of the Factbook, and countryinfo's codes and names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lit_agentrl.envs.search.facts.matching import title
from lit_agentrl.envs.search.facts.passages import Corpus
from lit_agentrl.envs.search.facts.sources import Entry


def add_factbook(corpus: Corpus, entries: Iterable[Entry]) -> None:
    """All sections of all entries, the shapes of their titles being `Austria: Geography`, `Austria: Geography (2)`."""
    for entry in entries:
        for section, fields in entry.sections.items():
            corpus.add(f"factbook/{entry.code}/{section}", f"{title(entry)}: {section}", fields.items())


def add_countryinfo(corpus: Corpus, countries: Mapping[str, Mapping[str, Any]]) -> None:
    """A record each, without the values that grow old, and without capital and borders, which the Factbook states."""
    for code, record in countries.items():
        facts = [
            ("country", str(record["name"])),
            ("ISO 3166 codes", ", ".join(record["ISO"].values())),
            ("international calling code", ", ".join(f"+{number}" for number in (record.get("callingCodes") or []))),
            ("also spelled", ", ".join(record.get("altSpellings") or [])),
            ("native name", str(record.get("nativeName") or "")),
            ("region", ", ".join(filter(None, (record.get("subregion"), record.get("region"))))),
            ("demonym", str(record.get("demonym") or "")),
            ("languages by code", ", ".join(record.get("languages") or [])),
            ("provinces", ", ".join(record.get("provinces") or [])),
            ("time zones", ", ".join(record.get("timezones") or [])),
        ]
        corpus.add(f"countryinfo/{code}", f"{record['name']}: codes and names", [fact for fact in facts if fact[1]])


def place(entry: Entry, section: str, field: str) -> tuple[str, str]:
    """What `Corpus.places` knows a field of the Factbook by."""
    return f"factbook/{entry.code}/{section}", field
