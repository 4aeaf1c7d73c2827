"""BM25 over the catalogue: one read-only index on disk, memory-mapped by every process that searches.

The official site searches with Lucene (k1 = 0.9, b = 0.4, English stop words, Porter stems). Here bm25s computes the
same scores; plural endings are cut instead of Porter's stemming, which would need one more package.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

K1, B = 0.9, 0.4
"""Pyserini's defaults, which the official site searches with."""
MAX_RESULTS = 50
RESULTS_PER_PAGE = 10
_STOP_WORDS = (
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
    "to was will with"
)
STOP_WORDS = frozenset(_STOP_WORDS.split())
"""Those of Lucene's English analyser."""

_WORD = re.compile(r"[^\W_]+")


def tokenize(text: str) -> list[str]:
    """The words that a text is found by: lower case, without stop words, plurals cut."""
    return [stem(word) for word in _WORD.findall(text.lower()) if word not in STOP_WORDS]


def stem(word: str) -> str:
    """The word without an English plural ending (Harman's S stemmer, 1991)."""
    if len(word) > 3 and word.endswith("ies") and not word.endswith(("eies", "aies")):
        return word[:-3] + "y"
    if len(word) > 3 and word.endswith("es") and not word.endswith(("aes", "ees", "oes")):
        return word[:-1]
    if len(word) > 2 and word.endswith("s") and not word.endswith(("us", "ss")):
        return word[:-1]
    return word


def build_index(texts: Iterable[str], folder: Path) -> None:
    """Write the index of the texts into `folder`: arrays and a vocabulary in JSON, nothing pickled."""
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
    index = bm25s.BM25(k1=K1, b=B, method="lucene", backend="numpy")
    index.index((ids, vocabulary), show_progress=False, create_empty_token=False)
    index.save(folder, show_progress=False)


class SearchIndex:
    """The saved index. Searching reads shared memory only, so any number of threads may.

    Args:
        folder: Where `build_index` wrote it.
    """

    def __init__(self, folder: Path) -> None:
        import bm25s

        self._index: Any = bm25s.BM25.load(folder, mmap=True, allow_pickle=False)
        self._vocabulary: dict[str, int] = json.loads((folder / "vocab.index.json").read_text(encoding="utf-8"))

    def search(self, query: str) -> tuple[int, ...]:
        """The rows of the best texts, at most 50, best first; equal scores in the order of the catalogue."""
        ids = [self._vocabulary[word] for word in tokenize(query) if word in self._vocabulary]
        if not ids:
            return ()
        return best(self._index.get_scores_from_ids(ids), MAX_RESULTS)


def best(scores: NDArray[np.float32], count: int) -> tuple[int, ...]:
    """The indices of the `count` highest scores above 0, highest first, ties by index."""
    threshold = np.partition(scores, -count)[-count] if len(scores) > count else scores.min()
    rows = np.flatnonzero((scores >= threshold) & (scores > 0))
    order = np.argsort(-scores[rows], kind="stable")[:count]
    return tuple(int(row) for row in rows[order])
