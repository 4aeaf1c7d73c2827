"""What a search agent searches: passages, who finds them, and the one error of a search that failed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass


class RetrievalError(RuntimeError):
    """A search that gave no answer. Its text is fit to be shown to the policy as an observation, and to the user.

    It says what was asked, where, how often and what came back, in one line without a traceback.
    """


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of text that was found."""

    id: str
    """Its name in the corpus; empty where a server does not tell."""
    title: str
    """The first line of its contents, without quotes."""
    text: str
    """The other lines."""
    score: float | None = None
    """How well it fits the query, higher is better; None where it was not searched for, or a server does not tell."""

    @property
    def contents(self) -> str:
        """Title and text as Search-R1's corpora hold them: the title in quotes on the first line."""
        return f'"{self.title}"\n{self.text}'


class Retriever(ABC):
    """Finds passages. Threads may share one, and it can be pickled into worker processes."""

    @abstractmethod
    def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        """At most `top_k` passages per query, best first; a query that matches nothing gives an empty list.

        Raises:
            RetrievalError: There is no answer; nothing is known of any of the queries.
        """

    def prepare(self) -> None:  # noqa: B027 -- most have nothing to do
        """Do now what the first search would have to do first, such as building an index.

        Raises:
            UserError: What it needs is broken or missing.
        """


class PageSource(ABC):
    """Opens a passage by its id, as a search agent follows a link."""

    @abstractmethod
    def open(self, id: str) -> Passage:
        """The passage of this id.

        Raises:
            RetrievalError: There is none, or it could not be read.
        """


def shortened(text: str, length: int = 80) -> str:
    """The text in quotes on one line, for the text of an error."""
    quoted = repr(text)
    return quoted if len(quoted) <= length else f"{quoted[: length - 4]}...{quoted[-1]}"
