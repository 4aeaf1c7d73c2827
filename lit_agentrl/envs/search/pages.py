"""Pages without a network: the passages of a corpus, opened by their ids."""

from __future__ import annotations

import threading
from typing import Any

from lit_agentrl.cache import cache_dir, content_digest
from lit_agentrl.retrieval import PageSource, Passage, RetrievalError
from lit_agentrl.retrieval.corpus import Corpus, check_corpus


class CorpusPages(PageSource):
    """Opens the passages of a corpus, where another machine searches it: `BM25Retriever` and the like open their own.

    The table of ids is built once into the project's cache, the one that retrievers over the same file use. Until a
    page is opened it holds a path alone, so pickling it into worker processes is cheap.

    Args:
        corpus: The file, in Search-R1's layout: one `{"id", "contents"}` object a line.

    Raises:
        UserError: The corpus cannot be read.
    """

    def __init__(self, corpus: str) -> None:
        self._path = check_corpus(corpus)
        self._opening = threading.Lock()
        self._corpus: Corpus | None = None

    def open(self, id: str) -> Passage:
        """The passage of this id."""
        with self._opening:
            if self._corpus is None:
                self._corpus = Corpus(self._path, content_digest(self._path), cache_dir() / "retrieval")
        found = self._corpus.find(id)
        if found is None:
            raise RetrievalError(f"there is no page {id!r}.")
        return found

    def __getstate__(self) -> dict[str, Any]:
        """The path: what is open stays in this process."""
        return {"_path": self._path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _opening=threading.Lock(), _corpus=None)
