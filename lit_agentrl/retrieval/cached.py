"""What searches were made, answered from memory, and failed."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lit_agentrl.errors import UserError
from lit_agentrl.retrieval.base import Passage, RetrievalError, Retriever


@dataclass(slots=True)
class SearchCounts:
    """What became of the searches of one process; `as_metrics` is what logs show."""

    queries: int = 0
    """Queries asked, however they were answered."""
    cache_hits: int = 0
    """Those of them that were answered from memory."""
    failures: int = 0
    """Those that got no answer."""
    requests: int = 0
    """Requests sent to a server, retries included."""
    retries: int = 0
    """Requests that repeat one which failed."""

    def as_metrics(self) -> dict[str, float]:
        """The counts by name."""
        return asdict(self)


class Accounts:
    """Counts that threads add to; in a pickled copy they start at 0, and one process never counts for another."""

    def __init__(self) -> None:
        self._counts = SearchCounts()
        self._lock = threading.Lock()

    def add(self, **more: int) -> None:
        """Count these."""
        with self._lock:
            for name, number in more.items():
                setattr(self._counts, name, getattr(self._counts, name) + number)

    def read(self) -> SearchCounts:
        """A copy of the counts so far."""
        with self._lock:
            return replace(self._counts)

    def __reduce__(self) -> tuple[Any, ...]:
        return Accounts, ()


class PassageCache:
    """The answers of the last queries, by query and number of passages. Threads may share it; a pickled copy is empty.

    Args:
        size: Answers that are kept, 0 for none.

    Raises:
        UserError: `size` is negative.
    """

    def __init__(self, size: int) -> None:
        if size < 0:
            raise UserError(f"cache_size={size}: give the number of answers to keep, 0 for none.")
        self._size = size
        self._answers: OrderedDict[tuple[str, int], list[Passage]] = OrderedDict()
        self._lock = threading.Lock()

    def search(
        self,
        queries: Sequence[str],
        top_k: int,
        find: Callable[[Sequence[str], int], list[list[Passage]]],
        accounts: Accounts,
    ) -> list[list[Passage]]:
        """The passages of each query; `find` is asked once for those that are not known, each of them once.

        What `find` raises is raised on, after the queries that waited for it were counted as failures.
        """
        with self._lock:
            known = {query: self._answers[query, top_k] for query in queries if (query, top_k) in self._answers}
            for query in known:
                self._answers.move_to_end((query, top_k))
        missing = [query for query in dict.fromkeys(queries) if query not in known]
        repeated = sum(query in known for query in queries)
        accounts.add(queries=len(queries), cache_hits=repeated)
        if missing:
            try:
                found = find(missing, top_k)
            except RetrievalError:
                accounts.add(failures=len(queries) - repeated)
                raise
            known |= dict(zip(missing, found, strict=True))
            self._keep(dict(zip(missing, found, strict=True)), top_k)
        return [list(known[query]) for query in queries]

    def _keep(self, found: dict[str, list[Passage]], top_k: int) -> None:
        with self._lock:
            self._answers |= {(query, top_k): passages for query, passages in found.items()}
            while len(self._answers) > self._size:
                self._answers.popitem(last=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return PassageCache, (self._size,)


class CachedRetriever(Retriever):
    """Remembers the answers of another retriever, and counts what becomes of its searches.

    Failures are not remembered: the next search asks again.

    Args:
        retriever: Who is asked what is not known.
        cache_size: Answers that are kept, the least recently used leave first; 0 only counts.

    Raises:
        UserError: `cache_size` is negative.
    """

    def __init__(self, retriever: Retriever, cache_size: int = 4096) -> None:
        self._retriever = retriever
        self._cache = PassageCache(cache_size)
        self._accounts = Accounts()

    def prepare(self) -> None:
        """As the retriever does."""
        self._retriever.prepare()

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        """The passages that the retriever finds, or found before."""
        return self._cache.search(queries, top_k, self._retriever.search, self._accounts)

    @property
    def counts(self) -> SearchCounts:
        """What became of the searches so far, in this process."""
        return self._accounts.read()
