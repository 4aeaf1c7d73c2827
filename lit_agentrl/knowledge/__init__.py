"""A knowledge graph of skin diseases: built from packages, notes and texts, searched, and used to judge answers."""

from lit_agentrl.knowledge.answers import Fact, FactReader
from lit_agentrl.knowledge.build import build_graph
from lit_agentrl.knowledge.corrupt import Corruption, corrupt_fact
from lit_agentrl.knowledge.extract import Extraction, extract_edges
from lit_agentrl.knowledge.extract_lm import extract_with_model
from lit_agentrl.knowledge.graph import KnowledgeGraph, UnknownDiseaseError
from lit_agentrl.knowledge.notes import facts, note_diseases, notes_part
from lit_agentrl.knowledge.rag import GroundedAnswer, GroundedPrompts, grounded_answers
from lit_agentrl.knowledge.retrieval import kg_context, kg_prompt, retrieve
from lit_agentrl.knowledge.schema import RELATIONS, Edge, Relation, state
from lit_agentrl.knowledge.scoring import AnswerScore, FactScore, FactScorer, ScoreWeights, answer_score
from lit_agentrl.knowledge.similarity import BM25Similarity, EmbeddingSimilarity, Similarity
from lit_agentrl.knowledge.sources import Part, join

__all__ = [
    "RELATIONS",
    "AnswerScore",
    "BM25Similarity",
    "Corruption",
    "Edge",
    "EmbeddingSimilarity",
    "Extraction",
    "Fact",
    "FactReader",
    "FactScore",
    "FactScorer",
    "GroundedAnswer",
    "GroundedPrompts",
    "KnowledgeGraph",
    "Part",
    "Relation",
    "ScoreWeights",
    "Similarity",
    "UnknownDiseaseError",
    "answer_score",
    "build_graph",
    "corrupt_fact",
    "extract_edges",
    "extract_with_model",
    "facts",
    "grounded_answers",
    "join",
    "kg_context",
    "kg_prompt",
    "note_diseases",
    "notes_part",
    "retrieve",
    "state",
]
