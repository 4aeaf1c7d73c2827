"""How near a fact is to a question: by words (BM25, no model) or by sentence vectors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lit_agentrl.knowledge.schema import RELATIONS, Edge
from lit_agentrl.retrieval.bm25_index import K1, B
from lit_agentrl.retrieval.words import tokenize

if TYPE_CHECKING:
    from numpy.typing import NDArray

Encode = Callable[[Sequence[str]], "NDArray[np.float32]"]
"""Vectors of length 1 of some texts, [N, D]."""


class Similarity(Protocol):
    """Compares facts with a query."""

    threshold: float | None
    """The least that counts, unless the caller says otherwise; None where all do."""

    def __call__(self, query: str, edges: Sequence[Edge]) -> list[float]:
        """How near each fact is, higher is nearer."""
        ...


def fact_text(edge: Edge) -> str:
    """The fact in words: `melanoma is treated with wide local excision`."""
    return f"{edge.subject} {RELATIONS[edge.relation].phrase} {edge.object}"


class BM25Similarity:
    """BM25 over the facts themselves, the words of questions about a relation added to each.

    A word that is in all of them, such as the disease's name, says nothing and counts 0.
    """

    threshold: float | None = None

    def __call__(self, query: str, edges: Sequence[Edge]) -> list[float]:
        """The BM25 scores (Lucene's, k1 and b as in `retrieval`)."""
        documents = [_words(f"{fact_text(edge)} {RELATIONS[edge.relation].words}") for edge in edges]
        frequency = Counter(word for words in documents for word in set(words))
        count, mean = len(documents), sum(map(len, documents)) / max(1, len(documents))
        wanted = {
            word: math.log(1 + (count - frequency[word] + 0.5) / (frequency[word] + 0.5))
            for word in set(tokenize(query))
            if 0 < frequency[word] < count
        }
        return [self._score(words, wanted, mean) for words in documents]

    @staticmethod
    def _score(words: Sequence[str], wanted: dict[str, float], mean: float) -> float:
        length = K1 * (1 - B + B * len(words) / mean)
        counts = Counter(words)
        return sum(weight * counts[word] / (counts[word] + length) for word, weight in sorted(wanted.items()))


@lru_cache(maxsize=1 << 14)
def _words(text: str) -> tuple[str, ...]:
    return tuple(tokenize(text))


class EmbeddingSimilarity:
    """The cosine of sentence vectors, as in KG-RAG.

    Args:
        encode: Gives the vectors, such as `lit_agentrl.retrieval.dense.sentence_encoder(model)`.
        threshold: The least cosine that counts.
    """

    def __init__(self, encode: Encode, threshold: float | None = 0.35) -> None:
        self.threshold = threshold
        self._encode = encode
        self._known: dict[str, NDArray[np.float32]] = {}

    def __call__(self, query: str, edges: Sequence[Edge]) -> list[float]:
        """The cosines; facts are encoded once."""
        texts = [fact_text(edge) for edge in edges]
        if new := [text for text in dict.fromkeys(texts) if text not in self._known]:
            self._known |= dict(zip(new, self._encode(new), strict=True))
        (vector,) = self._encode([query])
        return [float(np.dot(vector, self._known[text])) for text in texts]
