"""Which Factbook entry and which countryinfo record are the same country, and what a country is called.

The two packages are matched by ISO code: the Factbook gives a country's internet domain, which is its ISO alpha-2 code
(but for the United Kingdom, whose domain countryinfo lists).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from lit_agentrl.envs.search.facts.sources import Entry, Sources
from lit_agentrl.envs.search.facts.texts import plain, words

SHORT, LONG = "Country name, conventional short form", "Country name, conventional long form"
OTHER_NAMES = {
    "Burma": "MMR",
    "US": "USA",
    "UK": "GBR",
    "UAE": "ARE",
    "Czech Republic": "CZE",
    "Macedonia": "MKD",
    "Holy See": "VAT",
    "Turkiye": "TUR",
}
"""How the Factbook's lists of neighbours name countries, where neither package has the name."""


def title(entry: Entry) -> str:
    """The name that an entry's passages carry: the short one, or the long one where that is a mere abbreviation."""
    short, long = entry.get("Government", SHORT), entry.get("Government", LONG)
    short = "" if short == "The Dominican" or re.search(r"\(Brazzaville\)|^DRC$", short) else short
    name = (short or long or {"xx": "World", "ee": "European Union"}.get(entry.code, entry.code)).split(";")[0]
    return re.sub(r"^The |\s*\(.*\)$", "", name) or name


def match_countries(sources: Sources, left_out: Counter[str]) -> dict[str, Entry]:
    """Entries by ISO alpha-3 code; one that no record has, or that several claim, is counted."""
    domains: dict[str, str] = {}
    for code, record in sources.countries.items():
        for domain in (f".{record['ISO'].get('alpha2', '').lower()}", *(record.get("tld") or [])):
            domains.setdefault(domain, code)
    found: dict[str, list[Entry]] = {}
    for entry in sources.factbook:
        domain = re.search(r"\.[a-z]{2}\b", entry.get("Communications", "Internet country code"))
        code = domains.get(domain[0], "") if domain else ""
        if not code:
            left_out["factbook entries without a countryinfo record"] += 1
        else:
            found.setdefault(code, []).append(entry)
    left_out["factbook entries that share an ISO code"] = sum(len(e) for e in found.values() if len(e) > 1)
    matched = {code: entries[0] for code, entries in sorted(found.items()) if len(entries) == 1}
    left_out["countryinfo records without a factbook entry"] = len(sources.countries) - len(matched)
    return matched


def codes_by_name(sources: Sources, matched: Mapping[str, Entry]) -> dict[str, str]:
    """ISO codes by every name that a country goes by; names of several countries are left out."""
    claims: dict[str, set[str]] = {}
    for code, record in sources.countries.items():
        entry = matched.get(code)
        names = [record["name"], *(name for name in record.get("altSpellings") or [] if len(name) > 3)]
        names += [title(entry), entry.get("Government", SHORT), entry.get("Government", LONG)] if entry else []
        for name in names:
            claims.setdefault(key(str(name)), set()).add(code)
    others = {key(name): code for name, code in OTHER_NAMES.items()}
    return {name: min(codes) for name, codes in claims.items() if len(codes) == 1} | others


def key(name: str) -> str:
    """What equal names have in common: words without case, accents, punctuation and a leading article."""
    return re.sub(r"^the ", "", plain(words(name)).strip())
