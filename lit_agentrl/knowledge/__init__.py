"""A knowledge graph of skin diseases: built from packages, notes and texts, searched, and used to judge answers."""

from lit_agentrl.knowledge.extract import Extraction, extract_edges
from lit_agentrl.knowledge.graph import KnowledgeGraph, UnknownDiseaseError
from lit_agentrl.knowledge.notes import facts, note_diseases, notes_part
from lit_agentrl.knowledge.schema import RELATIONS, Edge, Relation, state
from lit_agentrl.knowledge.sources import Part, join

__all__ = [
    "RELATIONS",
    "Edge",
    "Extraction",
    "KnowledgeGraph",
    "Part",
    "Relation",
    "UnknownDiseaseError",
    "extract_edges",
    "facts",
    "join",
    "note_diseases",
    "notes_part",
    "state",
]
