"""The web agent: a search shows titles, ids and snippets, and pages are opened by their ids."""

from __future__ import annotations

from collections import Counter

from lit_agentrl.envs.search.environment import Rules, SearchEnvironment
from lit_agentrl.envs.search.information import Limit
from lit_agentrl.envs.search.parse import OPEN, SEARCH
from lit_agentrl.envs.search.payment import PAPER_PENALTY, Payment, RewardKind, ScoreKind
from lit_agentrl.envs.search.prompts import WEB_PROMPT
from lit_agentrl.envs.search.splits import Paths, QuestionFiles, as_paths
from lit_agentrl.envs.search.suite import QuestionSuite
from lit_agentrl.envs.search.tools import OpenTool, SearchTool
from lit_agentrl.errors import UserError
from lit_agentrl.retrieval import PageSource, Passage, Retriever
from lit_agentrl.retrieval.local import check_top_k


class WebEnvironment(SearchEnvironment):
    """One episode of a question on a web of pages; `<search>` and `<open>` both are calls."""

    @property
    def metrics(self) -> dict[str, float]:
        """Those of a search, and how often each tool was called."""
        calls = Counter(self.calls)
        return super().metrics | {f"{tag}_calls": float(calls[tag]) for tag in self.tools}


class WebSuite(QuestionSuite):
    """Questions on a web of pages: the web setting of Tree-GRPO (arXiv 2509.21240, Section 4).

    `retriever` may be any search and `pages` any source of pages. What a corpus on disk gives is a closed web: its
    passages are the pages.

    Args:
        questions: A question file or several, as for `SearchSuite`.
        retriever: Who searches.
        pages: Who opens pages; None where the retriever does that too.
        val_questions: Files of the val split; None takes `val_share` of `questions`.
        test_questions: Files of the test split; None takes `test_share` of `questions`.
        val_share: Share of `questions` for val, where it has no files.
        test_share: Share of `questions` for test, where it has no files.
        max_turns: Turns that may search or open; give the rollout `max_steps: max_turns + 1`.
        top_k: Results a search shows.
        score: What is paid, the F1 of words ("f1") or exact match ("em"). `success` is the exact match for both.
        reward: Eq. 13 of the paper ("paper"), or the table of its code ("reference"); see `Payment`.
        format_penalty: What a response of invalid form costs ("paper").
        max_observation_chars: Characters shown of a list of results; None for any number.
        max_page_chars: Characters shown of a page; None for any number.
        max_snippet_chars: Characters shown of each result's text.
        max_observation_tokens: Tokens shown of a list of results, and of a page; None for any number.
        tokenizer: The model whose tokenizer counts them.
        max_query_chars: Characters of a query, or of an id, that are passed on.
        only_results: Open only pages that the episode was shown as results.
        prompt: The user message; `{question}` stands for the question.

    Raises:
        UserError: An argument is out of range, nothing opens pages, or a file is missing or not as it should be.
    """

    environment = WebEnvironment

    def __init__(
        self,
        questions: Paths,
        retriever: Retriever,
        pages: PageSource | None = None,
        val_questions: Paths | None = None,
        test_questions: Paths | None = None,
        val_share: float = 0.1,
        test_share: float = 0.1,
        max_turns: int = 5,
        top_k: int = 10,
        score: ScoreKind = "f1",
        reward: RewardKind = "paper",
        format_penalty: float = PAPER_PENALTY,
        max_observation_chars: int | None = 4000,
        max_page_chars: int | None = 4000,
        max_snippet_chars: int = 300,
        max_observation_tokens: int | None = None,
        tokenizer: str | None = None,
        max_query_chars: int = 1000,
        only_results: bool = True,
        prompt: str = WEB_PROMPT,
    ) -> None:
        check_top_k(top_k)
        if max_snippet_chars < 0:
            raise UserError(f"max_snippet_chars={max_snippet_chars} must be 0 or more; 0 shows titles and ids alone.")
        source = retriever if pages is None else pages
        if not isinstance(source, PageSource):
            raise UserError(
                f"{type(source).__name__} cannot open pages. Give `pages`, such as CorpusPages with the corpus that "
                "is searched."
            )
        rules = Rules(max_turns, max_query_chars, prompt, Payment(score, reward, format_penalty))
        found = Limit(max_observation_chars, max_observation_tokens, tokenizer)
        opened = Limit(max_page_chars, max_observation_tokens, tokenizer)
        tools = {
            SEARCH: SearchTool(retriever, top_k, found, ResultLayout(max_snippet_chars)),
            OPEN: OpenTool(source, opened, only_results),
        }
        files = QuestionFiles(
            as_paths(questions), as_paths(val_questions), as_paths(test_questions), val_share, test_share
        )
        super().__init__(files, tools, rules)


class ResultLayout:
    """A result as a list shows it: rank and title, id, and the beginning of the text.

    Args:
        max_snippet_chars: Characters of the text.
    """

    def __init__(self, max_snippet_chars: int) -> None:
        self._max_chars = max_snippet_chars

    def __call__(self, rank: int, passage: Passage) -> tuple[str, str]:
        """Heading and snippet."""
        text = " ".join(passage.text.split())
        snippet = text if len(text) <= self._max_chars else f"{text[: self._max_chars].rstrip()}..."
        return f"[{rank}] {passage.title}\nID: {passage.id}\n", f"{snippet}\n" if snippet else ""
