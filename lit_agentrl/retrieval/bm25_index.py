"""BM25 over texts: one read-only index on disk, memory-mapped by every process that searches."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_agentrl.retrieval.keys import KeyTable, hash_all
from lit_agentrl.retrieval.words import tokenize

if TYPE_CHECKING:
    from numpy.typing import NDArray

K1, B = 0.9, 0.4
"""Pyserini's defaults, which Search-R1's server and WebShop's official site search with."""


def build_index(texts: Iterable[str], folder: Path, k1: float = K1, b: float = B) -> None:
    """Write the index of the texts into `folder`: arrays, nothing pickled."""
    import bm25s

    vocabulary: dict[str, int] = {}
    # One small array a text: a list of Python integers would take eight times the memory over a million texts.
    ids = [
        np.fromiter((vocabulary.setdefault(word, len(vocabulary)) for word in tokenize(text)), dtype=np.int32)
        for text in texts
    ]
    if not vocabulary:
        vocabulary[""] = 0  # nothing can be found, but searching is no error
        ids = [np.zeros(1, dtype=np.int32) for _ in ids]
    index = bm25s.BM25(k1=k1, b=b, method="lucene", backend="numpy")
    index.index((ids, vocabulary), show_progress=False, create_empty_token=False)
    index.vocab_dict = {}  # the words are kept as a table that can be mapped
    index.save(folder, show_progress=False)
    KeyTable.write(hash_all(vocabulary), folder, "words")


class BM25Index:
    """The saved index. Searching reads shared memory only, so any number of threads may.

    Args:
        folder: Where `build_index` wrote it.
    """

    def __init__(self, folder: Path) -> None:
        import bm25s

        self._index: Any = bm25s.BM25.load(folder, mmap=True, allow_pickle=False, load_vocab=False)
        self._words = KeyTable(folder, "words")

    def search(self, query: str, count: int) -> tuple[tuple[int, float], ...]:
        """Rows and scores of the best texts, at most `count`, best first; equal scores in the order of the texts."""
        ids = [id for word in tokenize(query) for id in self._words.rows(word)]
        if not ids:
            return ()
        scores = self._index.get_scores_from_ids(ids)
        return tuple((row, float(scores[row])) for row in best(scores, count))


def best(scores: NDArray[np.float32], count: int) -> tuple[int, ...]:
    """The indices of the `count` highest scores above 0, highest first, ties by index."""
    threshold = np.partition(scores, -count)[-count] if len(scores) > count else scores.min()
    rows = np.flatnonzero((scores >= threshold) & (scores > 0))
    order = np.argsort(-scores[rows], kind="stable")[:count]
    return tuple(int(row) for row in rows[order])
