"""Search by words: BM25 over a corpus, in milliseconds and without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from lit_agentrl.errors import UserError, missing_extra
from lit_agentrl.retrieval.bm25_index import K1, B, BM25Index, build_index
from lit_agentrl.retrieval.corpus import read_corpus
from lit_agentrl.retrieval.local import LocalRetriever

FORMAT = 1
"""Part of the index's name: raise it when what is written, or how texts become words, changes."""


class BM25Retriever(LocalRetriever[BM25Index]):
    """BM25 as Lucene computes it, over title and text.

    Args:
        corpus: The file, in Search-R1's layout: one `{"id", "contents"}` object a line.
        index: The folder where indexes are kept; None for the project's cache.
        k1: How much a word counts that is repeated; 0 counts it once.
        b: How much long passages are marked down, 0 to 1.

    Raises:
        UserError: An argument is out of range, the corpus cannot be read, or a package is not installed.
    """

    def __init__(self, corpus: str, index: str | None = None, k1: float = K1, b: float = B) -> None:
        if k1 < 0 or not 0 <= b <= 1:
            raise UserError(f"k1={k1}, b={b} is out of range: k1 is 0 or more, b is between 0 and 1.")
        if find_spec("bm25s") is None:
            raise missing_extra("bm25s", "search", "BM25Retriever")
        super().__init__(corpus, index)
        self._k1, self._b = float(k1), float(b)

    @property
    def options(self) -> Mapping[str, object]:
        """The two numbers of the formula, and the format."""
        return {"format": FORMAT, "k1": self._k1, "b": self._b}

    def build(self, path: Path, size: int, folder: Path) -> None:
        """Write the index, reading the corpus as a stream."""
        build_index((record.contents for record in read_corpus(path)), folder, self._k1, self._b)

    def load(self, folder: Path, size: int) -> BM25Index:
        """The index, mapped."""
        return BM25Index(folder)

    def rows(self, index: BM25Index, queries: Sequence[str], count: int) -> list[Sequence[tuple[int, float]]]:
        """The passages that share a word with the query."""
        return [index.search(query, count) for query in queries]
