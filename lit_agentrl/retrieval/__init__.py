"""Retrieval behind one protocol: local indexes, a client and a server of Search-R1's protocol."""

from lit_agentrl.retrieval.base import PageSource, Passage, RetrievalError, Retriever
from lit_agentrl.retrieval.bm25 import BM25Retriever
from lit_agentrl.retrieval.cached import CachedRetriever, SearchCounts
from lit_agentrl.retrieval.dense import DenseRetriever
from lit_agentrl.retrieval.http import HTTPRetriever

__all__ = [
    "BM25Retriever",
    "CachedRetriever",
    "DenseRetriever",
    "HTTPRetriever",
    "PageSource",
    "Passage",
    "RetrievalError",
    "Retriever",
    "SearchCounts",
]
