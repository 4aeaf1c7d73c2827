"""Retrieval behind one protocol: local indexes, a client and a server of Search-R1's protocol."""

from lit_agentrl.retrieval.base import PageSource, Passage, RetrievalError, Retriever

__all__ = ["PageSource", "Passage", "RetrievalError", "Retriever"]
