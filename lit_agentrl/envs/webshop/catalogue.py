"""The catalogue: written once from the published files, then read by every environment of every process.

The store is a folder of the project's cache named by the content of the files: an SQLite file with one row a product,
and the search index. Building it streams the files; reading it keeps no product in memory.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import lru_cache, partial
from pathlib import Path

from lit_agentrl.cache import built_once, cache_dir
from lit_agentrl.envs.webshop.goals import num_goals
from lit_agentrl.envs.webshop.json_stream import array_items, corrupt, lines, object_items
from lit_agentrl.envs.webshop.products import Product, parse_product, with_attributes, with_human, with_reviews
from lit_agentrl.envs.webshop.search import MAX_RESULTS
from lit_agentrl.envs.webshop.sources import GoalKind, Sources
from lit_agentrl.errors import UserError
from lit_agentrl.retrieval.bm25_index import BM25Index, build_index

log = logging.getLogger(__name__)

FORMAT = 2
"""Part of the store's name: raise it when what is written changes."""
DATABASE, INDEX = "catalogue.sqlite", "bm25"

_OPENING = threading.Lock()


def open_catalogue(sources: Sources) -> Catalogue:
    """The catalogue of these files, the same object for the whole process; the first call ever builds the store.

    Raises:
        UserError: A file is broken, or holds no product.
    """
    with _OPENING:  # or two threads would both read the files
        return _open(sources)


@lru_cache
def _open(sources: Sources) -> Catalogue:
    folder = cache_dir() / "webshop" / f"v{FORMAT}-{sources.digest[:20]}"
    return Catalogue(built_once(folder, partial(_build, sources)))


class Catalogue:
    """The products by row and by ASIN, and the search over them. Threads share it; nothing in it changes.

    Args:
        folder: The store.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / DATABASE
        self._local = threading.local()
        # A visit asks for the same results again and again: to show a page, to offer its links, to follow one.
        self._best = lru_cache(maxsize=1024)(self._search)
        self.index = BM25Index(folder / INDEX)
        self.facts: dict[str, int] = json.loads(self._one("SELECT value FROM facts"))
        """How many records there were, and what became of them."""

    def __len__(self) -> int:
        """The number of products."""
        return self.facts["products"]

    def product(self, row: int) -> Product:
        """The product of a row."""
        return Product.loads(self._one("SELECT record FROM products WHERE row = ?", row))

    def find(self, asin: str) -> Product:
        """The product of an ASIN that the site has shown."""
        return Product.loads(self._one("SELECT record FROM products WHERE asin = ?", asin))

    def search(self, query: str) -> tuple[str, ...]:
        """The ASINs of the best products for a query, at most 50, best first."""
        return self._best(query)

    def goal_counts(self, kind: GoalKind) -> list[int]:
        """The number of goals of every product, by row."""
        return [count for (count,) in self._connection().execute(f"SELECT {kind} FROM products ORDER BY row")]

    def _search(self, query: str) -> tuple[str, ...]:
        return tuple(
            self._one("SELECT asin FROM products WHERE row = ?", row)
            for row, _ in self.index.search(query, MAX_RESULTS)
        )

    def _one(self, query: str, *values: int | str) -> str:
        found: tuple[str] = self._connection().execute(query, values).fetchone()
        return found[0]

    def _connection(self) -> sqlite3.Connection:
        """This thread's own connection; a forked process does not go on with its parent's."""
        pid, connection = getattr(self._local, "opened", (0, None))
        if connection is None or pid != os.getpid():
            connection = sqlite3.connect(f"{self._path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
            self._local.opened = os.getpid(), connection
        assert isinstance(connection, sqlite3.Connection)
        return connection


def _build(sources: Sources, folder: Path) -> None:
    with closing(sqlite3.connect(folder / DATABASE)) as connection:
        connection.execute("PRAGMA journal_mode = OFF")  # a store that was not finished is thrown away
        facts = _fill(connection, sources)
        connection.execute("CREATE TABLE facts (value TEXT)")
        connection.execute("INSERT INTO facts VALUES (?)", (json.dumps(facts),))
        connection.commit()
        texts = connection.execute("SELECT record FROM products ORDER BY row")
        build_index((Product.loads(record).search_text for (record,) in texts), folder / INDEX)
    log.info("webshop: %s read, %s", sources.products, ", ".join(f"{count} {what}" for what, count in facts.items()))


def _fill(connection: sqlite3.Connection, sources: Sources) -> dict[str, int]:
    """Write all products, each joined with what the other files say of it; gives what was found."""
    attributes = _staged(connection, "attributes", object_items(sources.attributes))
    human = _staged(connection, "human", object_items(sources.human) if sources.human else ())
    reviews = _staged(connection, "reviews", _reviews(sources.reviews) if sources.reviews else ())
    connection.execute(
        "CREATE TABLE products "
        "(row INTEGER PRIMARY KEY, asin TEXT UNIQUE, record TEXT, synthetic INTEGER, human INTEGER)"
    )
    facts: Counter[str] = Counter({"products": 0, "without an ASIN (left out)": 0, "repeated (left out)": 0})
    for number, record in enumerate(_records(sources.products)):
        if number == sources.num_products:
            break
        if not isinstance(record, dict):
            raise corrupt(sources.products, number + 1, f"record {number + 1} is no object")
        product = parse_product(record)
        if product is None:
            facts["without an ASIN (left out)"] += 1
            continue
        product = with_human(with_attributes(product, attributes(product.asin)), human(product.asin))
        if isinstance(found := reviews(product.asin), dict):
            product = with_reviews(product, found.get("reviews"), found.get("average_rating"))
        row = facts["products"]
        counts = num_goals(product, "synthetic"), num_goals(product, "human")
        written = connection.execute(
            "INSERT OR IGNORE INTO products VALUES (?, ?, ?, ?, ?)", (row, product.asin, product.dumps(), *counts)
        )
        facts["products" if written.rowcount else "repeated (left out)"] += 1
    if not facts["products"]:
        raise UserError(f"{sources.products} holds no product with an ASIN, so there is nothing to sell.")
    for name in ("attributes", "human", "reviews"):
        connection.execute(f"DROP TABLE {name}")
    return dict(facts)


def _staged(
    connection: sqlite3.Connection, name: str, items: Iterable[tuple[str, object]]
) -> Callable[[str], object | None]:
    """Put the items into a table of the store while it is built; gives the look-up by ASIN."""
    connection.execute(f"CREATE TABLE {name} (asin TEXT PRIMARY KEY, entry TEXT)")
    rows = ((asin.upper(), json.dumps(entry)) for asin, entry in items)
    connection.executemany(f"INSERT OR REPLACE INTO {name} VALUES (?, ?)", rows)

    def look_up(asin: str) -> object | None:
        found = connection.execute(f"SELECT entry FROM {name} WHERE asin = ?", (asin,)).fetchone()
        return None if found is None else json.loads(found[0])

    return look_up


def _records(path: Path) -> Iterator[object]:
    """The products' records: those of an array, or the `product` of every line."""
    if path.suffix != ".jsonl":
        yield from array_items(path)
        return
    for item in lines(path):
        yield item["product"] if isinstance(item, dict) and "product" in item else item


def _reviews(path: Path) -> Iterator[tuple[str, object]]:
    for item in array_items(path):
        if isinstance(item, dict) and isinstance(asin := item.get("asin"), str):
            yield asin, item
