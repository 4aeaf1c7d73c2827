"""What a turn can call: a search, and opening what a search found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass

from lit_agentrl.envs.search.information import Limit, neutralise
from lit_agentrl.retrieval import PageSource, Passage, RetrievalError, Retriever

NO_RESULTS = "Nothing was found."


@dataclass(frozen=True, slots=True)
class Sight:
    """A passage as an observation shows it."""

    key: str
    """Its id; its contents where it has none."""
    title: str


@dataclass(frozen=True, slots=True)
class Result:
    """What a call gave, as far as the limit lets it be shown."""

    text: str
    """What stands in the information block, neutralised and cut."""
    sights: tuple[Sight, ...] = ()
    """The passages whose heading is shown to its end."""
    is_cut: bool = False
    failed: bool = False


class Tool(ABC):
    """Answers calls of one tag. It holds nothing of an episode, so that episodes share it.

    Args:
        limit: How much of an answer is shown.
    """

    def __init__(self, limit: Limit) -> None:
        self._limit = limit

    @abstractmethod
    def call(self, argument: str, seen: Collection[str]) -> Result:
        """The answer to `argument`, where an episode has been shown the passages of the ids `seen`."""

    def prepare(self) -> None:  # noqa: B027 -- most have nothing to do
        """Do now what the first call would have to do first.

        Raises:
            UserError: What it needs is broken or missing.
        """

    def show(self, parts: list[tuple[str, str, Passage]]) -> Result:
        """Heading and body of each passage, one after the other, as far as the limit goes."""
        text, ends = "", []
        for heading, body, passage in parts:
            text += heading
            ends.append((len(text), passage))
            text += body
        whole = neutralise(text.rstrip())  # as long as before, so the headings end where they did
        kept = self._limit.cut(whole)
        sights = tuple(_sight(passage) for end, passage in ends if end <= len(kept) or len(kept) == len(whole))
        return Result(kept, sights, is_cut=len(kept) < len(whole))

    def fail(self, error: RetrievalError) -> Result:
        """The error, shown in place of an answer."""
        whole = neutralise(str(error).strip())
        kept = self._limit.cut(whole)
        return Result(kept, is_cut=len(kept) < len(whole), failed=True)


def _sight(passage: Passage) -> Sight:
    return Sight(passage.id or passage.contents, passage.title)


Layout = Callable[[int, Passage], tuple[str, str]]
"""From the rank of a result, counted from 1, and its passage, to a heading and a body."""


def document_line(rank: int, passage: Passage) -> tuple[str, str]:
    """`Doc 1(Title: "Paris") Paris is ...`, as Search-R1 prints its corpora, where titles stand in quotes."""
    return f'Doc {rank}(Title: "{passage.title}") ', f"{passage.text}\n"


class SearchTool(Tool):
    """Searches with the whole argument as the query.

    Args:
        retriever: Who searches.
        top_k: Results to ask for.
        limit: How much of them is shown.
        layout: How a result is shown.
    """

    def __init__(self, retriever: Retriever, top_k: int, limit: Limit, layout: Layout = document_line) -> None:
        super().__init__(limit)
        self._retriever, self._top_k, self._layout = retriever, top_k, layout

    def prepare(self) -> None:
        """Let the retriever build its index."""
        self._retriever.prepare()

    def call(self, argument: str, seen: Collection[str]) -> Result:
        """The results; a search that failed says so in its place."""
        try:
            (passages,) = self._retriever.search([argument], self._top_k)
        except RetrievalError as error:
            return self.fail(error)
        if not passages:
            return Result(NO_RESULTS)
        return self.show([(*self._layout(rank, passage), passage) for rank, passage in enumerate(passages, start=1)])


class OpenTool(Tool):
    """Opens the page whose id is the argument.

    Args:
        pages: Who opens it.
        limit: How much of it is shown.
        only_results: Open only what the episode was shown as a result: an id is text that the policy makes up, and a
            source that reaches beyond a corpus would fetch whatever address it names.
    """

    def __init__(self, pages: PageSource, limit: Limit, only_results: bool = True) -> None:
        super().__init__(limit)
        self._pages, self._only_results = pages, only_results

    def call(self, argument: str, seen: Collection[str]) -> Result:
        """The page; one that cannot be opened says so in its place."""
        try:
            if self._only_results and argument not in seen:
                raise RetrievalError(f"No result so far has the id {argument!r}, so it was not opened.")
            page = self._pages.open(argument)
        except RetrievalError as error:
            return self.fail(error)
        return self.show([(f"Title: {page.title}\n", page.text, page)])
