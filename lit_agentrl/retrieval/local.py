"""What retrievers over a corpus on this machine share: the corpus, the index built from it once, and lazy opening."""

from __future__ import annotations

import hashlib
import threading
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from lit_agentrl.cache import built_once, cache_dir, content_digest
from lit_agentrl.errors import UserError
from lit_agentrl.retrieval.base import PageSource, Passage, RetrievalError, Retriever
from lit_agentrl.retrieval.corpus import Corpus, check_corpus

IndexT = TypeVar("IndexT")


class LocalRetriever(Retriever, PageSource, Generic[IndexT]):
    """Searches a corpus by an index of its own kind, which is built once per machine and content and then only read.

    It holds paths until the first search, so pickling it into worker processes is cheap; they share what is mapped.

    Args:
        corpus: The file, in Search-R1's layout.
        index: The folder where indexes are kept; None for the project's cache.

    Raises:
        UserError: The corpus cannot be read.
    """

    def __init__(self, corpus: str, index: str | None = None) -> None:
        self._path = check_corpus(corpus)
        self._folder = Path(index).expanduser().absolute() if index else None
        self._opening = threading.Lock()
        self._opened: tuple[Corpus, IndexT] | None = None

    @property
    @abstractmethod
    def options(self) -> Mapping[str, object]:
        """All that the index depends on beside the corpus; part of its name."""

    @abstractmethod
    def build(self, path: Path, size: int, folder: Path) -> None:
        """Write the index of the corpus at `path`, of `size` passages, into `folder`."""

    @abstractmethod
    def load(self, folder: Path, size: int) -> IndexT:
        """The index of a corpus of `size` passages that `build` wrote into `folder`, opened."""

    @abstractmethod
    def rows(self, index: IndexT, queries: Sequence[str], count: int) -> list[Sequence[tuple[int, float]]]:
        """Rows and scores of at most `count` passages per query, best first."""

    def prepare(self) -> None:
        """Build the index if it is not there, and open it."""
        self._open()

    def __len__(self) -> int:
        """The number of passages."""
        return len(self._open()[0])

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        """At most `top_k` passages per query, best first."""
        check_top_k(top_k)
        corpus, index = self._open()
        found = self.rows(index, queries, min(top_k, len(corpus)))
        return [[corpus.passage(row, score) for row, score in rows] for rows in found]

    def open(self, id: str) -> Passage:
        """The passage of this id."""
        found = self._open()[0].find(id)
        if found is None:
            raise RetrievalError(f"there is no page {id!r}.")
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Paths and options: what is open stays in this process."""
        return {**self.__dict__, "_opening": None, "_opened": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._opening = threading.Lock()

    def _open(self) -> tuple[Corpus, IndexT]:
        if self._opened is None:
            with self._opening:  # or two threads would both open it
                if self._opened is None:
                    self._opened = self._open_files()
        return self._opened

    def _open_files(self) -> tuple[Corpus, IndexT]:
        digest, folder = content_digest(self._path), self._folder or cache_dir() / "retrieval"
        corpus = Corpus(self._path, digest, folder)
        named = "\n".join([digest, *(f"{name}={value!r}" for name, value in sorted(self.options.items()))])
        name = f"{type(self).__name__.lower()}-{hashlib.sha256(named.encode()).hexdigest()[:20]}"
        index = built_once(folder / name, lambda temporary: self.build(self._path, len(corpus), temporary))
        return corpus, self.load(index, len(corpus))


def check_top_k(top_k: int) -> None:
    """Refuse to search for no passage.

    Raises:
        UserError: `top_k` is under 1.
    """
    if top_k < 1:
        raise UserError(f"top_k={top_k}: a search gives at least 1 passage.")
