"""One visit to the shop: search, click, buy."""

from __future__ import annotations

import re
import threading
from collections.abc import Hashable
from typing import Literal

from lit_agentrl.envs.actions import ActionFormat, format_hint, parse_action
from lit_agentrl.envs.webshop.goals import Goal
from lit_agentrl.envs.webshop.pages import SEPARATOR, Page, Site
from lit_agentrl.envs.webshop.reward import Score, score
from lit_agentrl.types import Observation

RewardKind = Literal["success", "score"]

SUCCESS_REWARD = 10.0
"""What a perfect purchase pays (GiGPO, arXiv 2505.10978, appendix E.1)."""
SYSTEM = (
    "You are shopping in a web store. Find the product that the instruction asks for, choose its options and buy it. "
    "Actions are search[keywords] where there is a search bar, and click[something on the page]."
)
SEARCH_OFFER = "search[<your query>]"

_ACTION = re.compile(r"(search|click)\s*\[(.*)\]", re.DOTALL | re.IGNORECASE)
_COUNTING = threading.Lock()


class PageLimit:
    """Cuts long pages, and counts them.

    Args:
        max_chars: Characters that a page may have below the instruction, the marker not counted.
    """

    def __init__(self, max_chars: int) -> None:
        self.max_chars = max_chars
        self.num_cut = 0
        """Pages that were cut so far."""

    def cut(self, text: str) -> str:
        """The text with its middle replaced by a marker where it is too long: top and buttons at the end stay."""
        surplus = len(text) - self.max_chars
        if surplus <= 0:
            return text
        with _COUNTING:
            self.num_cut += 1
        head = (self.max_chars + 1) // 2
        return f"{text[:head]} [{surplus} characters cut] {text[head + surplus :]}"


class WebShopEnvironment:
    """One episode of a goal.

    Args:
        site: The shop, which episodes share.
        task: The goal's id.
        goal: What is asked for.
        limit: Cuts long pages.
        action_format: How replies name their action.
        reward: What buying pays: "success" is 10 for a score of 1 and 0 for less, "score" is the score.
    """

    def __init__(
        self,
        site: Site,
        task: str,
        goal: Goal,
        limit: PageLimit,
        action_format: ActionFormat = "plain",
        reward: RewardKind = "success",
    ) -> None:
        self._site, self._task, self._goal, self._limit = site, task, goal, limit
        self._format: ActionFormat = action_format
        self._reward: RewardKind = reward
        self._page = Page()
        self._result: Score | None = None

    def reset(self) -> Observation:
        """The search page."""
        observation = self._observe(None)
        observation.system = f"{SYSTEM} {format_hint(self._format)}"
        return observation

    def step(self, action: str) -> tuple[Observation, float, bool]:
        """The page that the action leads to, the reward, and whether something was bought.

        An action that cannot be parsed, or is not possible on this page, changes nothing: the page is shown again.
        """
        following = self._follow(parse_action(action, self._format))
        if following is None:
            return self._observe(False), 0.0, self._page.kind == "done"
        self._page = following
        if following.kind != "done":
            return self._observe(True), 0.0, False
        product = self._site.catalogue.find(following.asin)
        self._result = score(product, [value for _, value in following.options], self._goal)
        paid = self._result.total if self._reward == "score" else SUCCESS_REWARD * self.success
        return self._observe(True), paid, True

    @property
    def page(self) -> Page:
        """Where the visit is."""
        return self._page

    @property
    def score(self) -> float | None:
        """The score of the purchase, in [0, 1]; None before it."""
        return self._result.total if self._result else None

    @property
    def metrics(self) -> dict[str, float]:
        """The paper's task score: 0 where nothing was bought."""
        return {"score": self.score or 0.0}

    @property
    def result(self) -> Score | None:
        """The score in its parts; None before the purchase."""
        return self._result

    @property
    def anchor(self) -> Hashable:
        """The goal and the page, chosen options included, which its text does not show."""
        page = self._page
        return self._task, page.kind, page.query, page.number, page.asin, page.options

    @property
    def success(self) -> bool:
        """Whether the purchase scored 1."""
        return self._result is not None and self._result.total == 1.0

    def snapshot(self) -> object:
        """The page, and the score if something was bought."""
        return self._page, self._result

    def restore(self, snapshot: object) -> None:
        """Go back to a snapshot of this goal, of this episode or another."""
        assert isinstance(snapshot, tuple)
        self._page, self._result = snapshot

    def close(self) -> None:
        """Nothing is held."""

    def _follow(self, action: str | None) -> Page | None:
        """The page that an action leads to; None where it leads nowhere."""
        match = _ACTION.fullmatch((action or "").strip(" \t>.\"'`"))
        if match is None:
            return None
        verb, target = match[1].lower(), " ".join(match[2].split())
        if verb == "search":
            return self._site.search(target) if self._page.kind == "search" and target else None
        links = {label.lower(): page for label, page in self._site.links(self._page).items()}
        return links.get(target.lower())

    def _observe(self, valid: bool | None) -> Observation:
        parts = SEPARATOR.join(self._site.parts(self._page))
        state = self._limit.cut(parts)
        title = ["WebShop"] if self._page.kind == "search" else []
        text = SEPARATOR.join([*title, "Instruction:", self._goal.instruction, state])
        offers = [SEARCH_OFFER] if self._page.kind == "search" else []
        offers += [f"click[{label}]" for label in self._site.links(self._page)]
        if offers:
            text = "\n".join([text, "Actions:", *offers])
        return Observation(text, state=state, task=self._goal.instruction, actions=tuple(offers), valid=valid)
