"""ICD-10-CM's skin: chapter L and the codes of skin neoplasms, from the file that simple-icd-10-cm ships."""

from __future__ import annotations

import re
from collections.abc import Iterator
from xml.etree.ElementTree import Element, ParseError, fromstring
from xml.parsers.expat import ExpatError

from lit_agentrl.errors import UserError
from lit_agentrl.knowledge.names import name_key
from lit_agentrl.knowledge.schema import Edge
from lit_agentrl.knowledge.sources import Part, data_file, read_data
from lit_agentrl.knowledge.storage import refuse_entities

SOURCE = "icd"
PACKAGE, TRIED = "simple_icd_10_cm", "1.5.0"
PREFIXES = ("L", "C43", "C44", "D03", "D18", "D22", "D23")
"""Chapter L, melanoma, other skin cancer, melanoma in situ, haemangioma, naevi, other benign skin neoplasms."""
_NOT_SKIN = re.compile(r"D18\.(02|03|1)")
"""Haemangioma inside the head and the abdomen, and lymphangioma."""
LICENCE = (
    "ICD-10-CM is made by the US National Center for Health Statistics and the Centers for Medicare & Medicaid "
    "Services, as authorised by the World Health Organization, who holds the copyright of ICD-10"
)


def read_icd() -> Part:
    """Every code as `title coded_as code`, `title is_a title of the code above`; inclusion terms alike.

    Raises:
        UserError: simple-icd-10-cm is missing, or its file is not as expected.
    """
    path, version = data_file(PACKAGE, "simple_icd_10_cm/data/icd10c-tabular*.xml", TRIED, "simple-icd-10-cm")
    text = read_data(path, "simple-icd-10-cm")
    edges = read_tabular(text.encode())
    counts = {
        "codes": len({edge.object for edge in edges if edge.relation == "coded_as"}),
        "is_a edges": sum(edge.relation == "is_a" for edge in edges),
    }
    licence = f"icd: {LICENCE}; from {PACKAGE} {version} (code MIT), file {path.name}."
    return Part(SOURCE, edges, {}, licence, counts, rank=1)


def read_tabular(content: bytes) -> list[Edge]:
    """The edges of a tabular list.

    Raises:
        UserError: It is no XML, declares entities, or has none of the codes.
    """
    try:
        refuse_entities(content)
        root = fromstring(content)
    except (ParseError, ExpatError, ValueError) as error:
        raise UserError(
            f"the ICD-10-CM file cannot be read ({error}). Install simple-icd-10-cm {TRIED} again."
        ) from error
    edges = [edge for item in root.iter("section") for code in item.findall("diag") for edge in _edges(code, None)]
    if not edges:
        raise UserError(f"the ICD-10-CM file has no codes of the skin: install simple-icd-10-cm {TRIED} again.")
    return edges


def _edges(item: Element, above: str | None) -> Iterator[Edge]:
    """What a code and the codes below it say."""
    code, title = item.findtext("name", ""), item.findtext("desc", "")
    if not code.startswith(PREFIXES) or _NOT_SKIN.match(code) or not title:
        return
    yield Edge(title, "coded_as", code, SOURCE, code)
    if above is not None and name_key(above) != name_key(title):
        yield Edge(title, "is_a", above, SOURCE, code)
    for note in (*item.findall("includes/note"), *item.findall("inclusionTerm/note")):
        term = re.sub(r"\s*\(.*?\)|\bNOS\b|\bNEC\b", "", note.text or "").strip(" ,")
        if name_key(term) and name_key(term) != name_key(title):
            yield Edge(term, "coded_as", code, SOURCE, code)
            if "NOS" not in (note.text or ""):  # else it is the title's own disease, not a kind of it
                yield Edge(term, "is_a", title, SOURCE, code)
    for inner in item.findall("diag"):
        yield from _edges(inner, title)
