"""A library of five passages and questions about it, for the tests of search agents."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lit_agentrl.retrieval import PageSource, Passage, RetrievalError, Retriever
from lit_agentrl.types import Completion, Engine, SamplingParams

PASSAGES = (
    Passage("p0", "Ada Lovelace", "Ada Lovelace wrote notes on the Analytical Engine."),
    Passage("p1", "Analytical Engine", "The Analytical Engine was designed by Charles Babbage."),
    Passage("p2", "Charles Babbage", "Charles Babbage was born in London in 1791."),
    Passage("p3", "London", "London is the capital of England."),
    Passage("p4", "Nick Park", "Nick Park created Wallace and Gromit."),
)
RECORDS: list[dict[str, object]] = [
    {
        "id": "q0",
        "question": "Where was the designer of the Analytical Engine born?",
        "golden_answers": ["London", "London, England"],
        "type": "bridge",
        "data_source": "library",
        "supporting_titles": ["Analytical Engine", "Charles Babbage"],
    },
    {
        "id": "q1",
        "question": "Who created Wallace and Gromit?",
        "golden_answers": ["Nick Park"],
        "type": "single",
        "data_source": "library",
        "supporting_titles": ["Nick Park"],
    },
    {"id": "q2", "question": "Was Babbage born before 1800?", "golden_answers": ["yes"], "data_source": "library"},
]


class Library(Retriever, PageSource):
    """Passages by the number of words they share with the query, in order among equals; a query "fail" fails."""

    def __init__(self, passages: Sequence[Passage] | None = None) -> None:
        self.passages = PASSAGES if passages is None else tuple(passages)

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        return [self._find(query, top_k) for query in queries]

    def open(self, id: str) -> Passage:
        for passage in self.passages:
            if passage.id == id:
                return passage
        raise RetrievalError(f"there is no page {id!r}.")

    def _find(self, query: str, top_k: int) -> list[Passage]:
        if query == "fail":
            raise RetrievalError("http://localhost:8000/retrieve gave no answer to 1 query in 3 tries: timed out")
        words = set(query.lower().split())
        shared = {p: len(words & set(f"{p.title} {p.text}".lower().split())) for p in self.passages}
        return sorted((p for p in self.passages if shared[p]), key=lambda p: -shared[p])[:top_k]


class Closed(Retriever):
    """Finds nothing, and opens nothing."""

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        return [[] for _ in queries]


class Asking(Engine):
    """An engine that searches, for something else every time.

    Args:
        pid: A process to kill, or 0.
        kill_before: The call before which it is killed, counted from 0.
    """

    def __init__(self, pid: int = 0, kill_before: int = 0) -> None:
        self.pid, self.kill_before, self.num_calls = pid, kill_before, 0

    def use_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def generate(
        self, contexts: list[list[int]], params: SamplingParams, seeds: Sequence[int] | None = None
    ) -> list[Completion]:
        if self.pid and self.num_calls == self.kill_before:
            os.kill(self.pid, signal.SIGKILL)
        self.num_calls += 1
        texts = [f"<search>cup {seed}</search>" for seed in seeds or []]
        ids = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return [
            Completion(i, [-1.0] * len(i), "stop", num_prefilled=len(c)) for i, c in zip(ids, contexts, strict=True)
        ]

    def sync(self, policy: object) -> None: ...


def write_questions(folder: Path, records: Sequence[dict[str, object]] = RECORDS, name: str = "library.jsonl") -> str:
    """A file of the questions."""
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def think(tag: str, text: str) -> str:
    """A turn of the right form."""
    return f"<think> hm </think>\n<{tag}> {text} </{tag}>"
