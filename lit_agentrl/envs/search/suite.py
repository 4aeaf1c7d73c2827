"""Questions that take a search: a ReAct agent thinks, searches a corpus, and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from lit_agentrl.envs.search.environment import Rules, SearchEnvironment
from lit_agentrl.envs.search.information import Limit
from lit_agentrl.envs.search.parse import ANSWER, SEARCH
from lit_agentrl.envs.search.payment import PAPER_PENALTY, Payment, RewardKind, ScoreKind
from lit_agentrl.envs.search.prompts import SEARCH_PROMPT, check_prompt
from lit_agentrl.envs.search.questions import Question
from lit_agentrl.envs.search.splits import Paths, QuestionFiles, Table, as_paths, question_table
from lit_agentrl.envs.search.tools import SearchTool, Tool
from lit_agentrl.envs.search.walkthrough import play
from lit_agentrl.envs.seeded import SPLITS, refuse_held_out
from lit_agentrl.errors import UserError
from lit_agentrl.retrieval import Retriever
from lit_agentrl.retrieval.local import check_top_k
from lit_agentrl.types import Conversation, Split, WalkthroughSuite


class QuestionSuite(WalkthroughSuite):
    """Questions in splits, and the tools to find their answers with. What search and web suites share.

    Args:
        files: Where the questions are.
        tools: What a turn can call, by tag.
        rules: What holds for all episodes.

    Raises:
        UserError: A rule is out of range, or a question file is not as it should be.
    """

    environment: ClassVar[type[SearchEnvironment]] = SearchEnvironment
    """What an episode is."""

    def __init__(self, files: QuestionFiles, tools: Mapping[str, Tool], rules: Rules) -> None:
        for name, count in (("max_turns", rules.max_turns), ("max_query_chars", rules.max_argument_chars)):
            if count < 1:
                raise UserError(f"{name}={count} must be 1 or more.")
        check_prompt(rules.prompt)
        self._files, self._stamp = files, files.stamp
        if not self._table["train"]:
            raise UserError("No question is left for the train split: lower val_share and test_share.")
        self._tools, self._rules = dict(tools), rules
        self.stop_strings = tuple(f"</{tag}>" for tag in (*tools, ANSWER))

    def tasks(self, split: Split) -> Sequence[str]:
        """The ids of the split's questions, such as "test-hotpotqa/5a7613c1", in the order of their files.

        It also has the tools prepared: this is asked before any episode, and a broken index should end the run here
        rather than fail every episode.
        """
        if split not in SPLITS:
            raise UserError(f"split={split!r} is unknown; allowed are train, val and test.")
        for tool in self._tools.values():
            tool.prepare()
        return list(self._table[split])

    def make(self, task: str) -> SearchEnvironment:
        """A fresh episode of the question."""
        return self.environment(task, self.question(task), self._tools, self._rules)

    def kind(self, task: str) -> str:
        """Source and type of the question, such as "hotpotqa/bridge"."""
        return self.question(task).kind

    def question(self, task: str) -> Question:
        """What `task` asks."""
        for questions in self._table.values():
            if task in questions:
                return questions[task]
        example = next(iter(self._table["train"]))
        raise UserError(f"task={task!r} is no question of this suite; a task looks like {example!r}.")

    def walkthrough(self, task: str, held_out: bool = False) -> Conversation:
        """A play that earns the full reward: search for the question, then for each supporting title, then answer.

        Where pages can be opened, it opens those titles. It shows the form, not how a good query is found: it knows
        titles and answer beforehand. What does not fit into `max_turns` is left out.

        Args:
            task: The question.
            held_out: Allow a question that is not of the train split.

        Raises:
            UserError: The question is held out and `held_out` is False, no spelling of its answer can be given, or a
                search failed.
        """
        refuse_held_out(task, held_out)
        return play(self.make(task), self.question(task), tuple(self._tools))

    @property
    def _table(self) -> Table:
        """Not held: a suite is pickled into worker processes, which read the files for themselves."""
        return question_table(self._files, self._stamp)


class SearchSuite(QuestionSuite):
    """Questions over a corpus: the QA setting of Tree-GRPO (arXiv 2509.21240, Section 4) and Search-R1.

    An episode has at most `max_turns` turns that may search and one that may only answer, so give the rollout
    `max_steps: max_turns + 1`.

    Args:
        questions: A question file or several: Parquet, JSON lines, or a JSON array (see docs/search.md).
        retriever: Who searches.
        val_questions: Files of the val split; None takes `val_share` of `questions`.
        test_questions: Files of the test split; None takes `test_share` of `questions`.
        val_share: Share of `questions` for val, where it has no files.
        test_share: Share of `questions` for test, where it has no files.
        max_turns: Turns that may search.
        top_k: Passages a search shows.
        score: What is paid, exact match ("em") or the F1 of words ("f1").
        reward: Eq. 13 of the paper ("paper"), or the table of its code ("reference"); see `Payment`.
        format_penalty: What a response of invalid form costs ("paper").
        max_observation_chars: Characters shown of what a search found; None for any number.
        max_observation_tokens: Tokens shown of it; None for any number.
        tokenizer: The model whose tokenizer counts them.
        max_query_chars: Characters of a query that are searched for.
        prompt: The user message; `{question}` stands for the question.

    Raises:
        UserError: An argument is out of range, or a file is missing or not as it should be.
    """

    def __init__(
        self,
        questions: Paths,
        retriever: Retriever,
        val_questions: Paths | None = None,
        test_questions: Paths | None = None,
        val_share: float = 0.1,
        test_share: float = 0.1,
        max_turns: int = 3,
        top_k: int = 3,
        score: ScoreKind = "em",
        reward: RewardKind = "paper",
        format_penalty: float = PAPER_PENALTY,
        max_observation_chars: int | None = 2000,
        max_observation_tokens: int | None = None,
        tokenizer: str | None = None,
        max_query_chars: int = 1000,
        prompt: str = SEARCH_PROMPT,
    ) -> None:
        check_top_k(top_k)
        rules = Rules(max_turns, max_query_chars, prompt, Payment(score, reward, format_penalty))
        limit = Limit(max_observation_chars, max_observation_tokens, tokenizer)
        files = QuestionFiles(
            as_paths(questions), as_paths(val_questions), as_paths(test_questions), val_share, test_share
        )
        super().__init__(files, {SEARCH: SearchTool(retriever, top_k, limit)}, rules)
