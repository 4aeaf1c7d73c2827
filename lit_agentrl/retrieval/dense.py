"""Search by meaning: a sentence model's vectors of all passages, compared with that of the query.

The vectors lie in one array on disk, which processes share by mapping it; faiss compares with every one of them (a
"flat" search, exact). The model itself is loaded by every process that searches: with many workers, let one process
serve it (`lit-agentrl serve-retriever --kind dense`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_agentrl.cache import content_digest
from lit_agentrl.errors import UserError, missing_extra
from lit_agentrl.retrieval.corpus import read_corpus
from lit_agentrl.retrieval.local import LocalRetriever

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT = 1
"""Part of the index's name: raise it when what is written changes."""
MODEL_FILES = (".safetensors", ".bin", ".json", ".txt", ".model")
"""Endings of what a model consists of."""
VECTORS = "vectors.npy"
ROWS_AT_A_TIME = 1024

Search = Callable[["NDArray[np.float32]", int], tuple["NDArray[np.float32]", "NDArray[np.int64]"]]
"""Scores and rows of the best passages, [Q, k] each, for the vectors of queries, [Q, D]."""


class DenseRetriever(LocalRetriever[Search]):
    """Cosine similarity of sentence vectors.

    Args:
        corpus: The file, in Search-R1's layout: one `{"id", "contents"}` object a line.
        model: A sentence-transformers model, or one of transformers (its token vectors are averaged): a folder, or a
            name on the hub.
        index: The folder where indexes are kept; None for the project's cache.
        query_prefix: What the model wants in front of a query; "query: " for E5.
        passage_prefix: What it wants in front of a passage; "passage: " for E5.
        faiss_index: A finished faiss file of the corpus, in its order, such as Search-R1's published e5_Flat.index. It
            is read instead of building one.
        device: Where the model runs.
        batch_size: Passages that are encoded at a time.

    Raises:
        UserError: An argument is out of range, a file cannot be read, or a package is not installed.
    """

    def __init__(
        self,
        corpus: str,
        model: str,
        index: str | None = None,
        query_prefix: str = "",
        passage_prefix: str = "",
        faiss_index: str | None = None,
        device: str = "cpu",
        batch_size: int = 64,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: at least 1 passage is encoded at a time.")
        for package, module in (("sentence-transformers", "sentence_transformers"), ("faiss-cpu", "faiss")):
            if find_spec(module) is None:
                raise missing_extra(package, "dense", "DenseRetriever")
        if faiss_index is not None and not Path(faiss_index).expanduser().is_file():
            raise UserError(f"faiss_index={faiss_index!r} is not there. Leave it out to build an index.")
        super().__init__(corpus, index)
        self._model = str(Path(model).expanduser().absolute()) if Path(model).expanduser().is_dir() else model
        self._prefixes = query_prefix, passage_prefix
        self._faiss_index = faiss_index
        self._encoder = _Encoder(self._model, device, batch_size)

    @property
    def options(self) -> Mapping[str, object]:
        """The model, by its files where it is a folder, and what stands in front of passages."""
        files = sorted(path for path in Path(self._model).rglob("*") if path.suffix in MODEL_FILES)
        return {
            "format": FORMAT,
            "model": [(str(path.relative_to(self._model)), content_digest(path)) for path in files] or self._model,
            "passage_prefix": self._prefixes[1],
            "faiss_index": self._faiss_index,
        }

    def prepare(self) -> None:
        """Build the index if it is not there, open it, and load the model."""
        super().prepare()
        self._encoder([""])

    def build(self, path: Path, size: int, folder: Path) -> None:
        """Write the vectors, some passages in memory at a time."""
        if self._faiss_index is not None:
            return
        texts = (self._prefixes[1] + record.contents for record in read_corpus(path))
        vectors: NDArray[np.float32] | None = None
        row = 0
        while part := list(islice(texts, ROWS_AT_A_TIME)):
            found = self._encoder(part)
            if vectors is None:
                shape = size, found.shape[1]
                vectors = np.lib.format.open_memmap(folder / VECTORS, mode="w+", dtype=np.float32, shape=shape)
            vectors[row : row + len(part)] = found
            row += len(part)

    def load(self, folder: Path, size: int) -> Search:
        """The search over the vectors, mapped."""
        import faiss

        if self._faiss_index is None:
            return partial(_flat, np.load(folder / VECTORS, mmap_mode="r"))
        index = faiss.read_index(
            str(Path(self._faiss_index).expanduser()), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY
        )
        if index.ntotal != size or index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise UserError(
                f"faiss_index={self._faiss_index!r} holds {index.ntotal} vectors and the corpus {size} passages, or it "
                "does not compare by inner product: it is not the index of this corpus."
            )
        search: Search = index.search
        return search

    def rows(self, index: Search, queries: Sequence[str], count: int) -> list[Sequence[tuple[int, float]]]:
        """The passages whose vectors have the smallest angle to the query's."""
        if not queries:
            return []
        scores, rows = index(self._encoder([self._prefixes[0] + query for query in queries]), count)
        return [
            [(row, score) for row, score in zip(*pair, strict=True) if row >= 0]  # faiss fills up with -1
            for pair in zip(rows.tolist(), scores.tolist(), strict=True)
        ]


def sentence_encoder(
    model: str, device: str = "cpu", batch_size: int = 64
) -> Callable[[Sequence[str]], NDArray[np.float32]]:
    """Vectors of length 1 of texts, [N, D], by the model of a `DenseRetriever`; it is loaded at the first call.

    Raises:
        UserError: A package is not installed.
    """
    if find_spec("sentence_transformers") is None:
        raise missing_extra("sentence-transformers", "dense", "sentence_encoder")
    return _Encoder(model, device, batch_size)


class _Encoder:
    """The model, loaded when it is first needed; a pickled copy loads its own."""

    def __init__(self, model: str, device: str, batch_size: int) -> None:
        self._model, self._device, self._batch_size = model, device, batch_size
        self._loaded: Any = None
        self._lock = threading.Lock()

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The vectors of the texts, of length 1, [N, D]."""
        # What a policy writes may hold half of a character, which tokenizers refuse.
        texts = [text.encode("utf-8", "replace").decode() for text in texts]
        with self._lock:  # or two would load it; and a tokenizer's padding is a state that threads must not share
            if self._loaded is None:
                self._loaded = self._load()
            vectors: NDArray[np.float32] = self._loaded.encode(
                texts, batch_size=self._batch_size, normalize_embeddings=True, show_progress_bar=False
            )
        return np.ascontiguousarray(vectors, dtype=np.float32)

    def _load(self) -> Any:
        from sentence_transformers import SentenceTransformer

        try:
            return SentenceTransformer(self._model, device=self._device)
        except (OSError, ValueError) as error:
            raise UserError(
                f"model={self._model!r} cannot be loaded ({str(error).splitlines()[0]}). It should be a folder with a "
                "sentence-transformers model, or its name on the hub."
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        return _Encoder, (self._model, self._device, self._batch_size)


def _flat(
    vectors: NDArray[np.float32], queries: NDArray[np.float32], count: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The `count` rows with the highest inner product: scores and rows, [Q, count] each."""
    import faiss

    scores, rows = faiss.knn(queries, vectors, count, metric=faiss.METRIC_INNER_PRODUCT)
    return scores, rows
