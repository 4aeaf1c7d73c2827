"""WebShop: find a product in a catalogue of real ones and buy it (Yao et al. 2022, arXiv 2207.01206)."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec

from lit_agentrl.envs.actions import ActionFormat, check_action_format
from lit_agentrl.envs.seeded import SPLITS, refuse_held_out, replay
from lit_agentrl.envs.webshop.catalogue import open_catalogue
from lit_agentrl.envs.webshop.environment import PageLimit, RewardKind, WebShopEnvironment
from lit_agentrl.envs.webshop.goals import Goal, GoalTable, make_goal
from lit_agentrl.envs.webshop.oracle import plan
from lit_agentrl.envs.webshop.pages import Site
from lit_agentrl.envs.webshop.sources import CatalogueSize, GoalKind, Sources, find_sources
from lit_agentrl.errors import UserError, missing_extra
from lit_agentrl.types import Conversation, Split, WalkthroughSuite

log = logging.getLogger(__name__)

SHORTEST_PAGE = 200
"""Characters that the smallest useful page takes."""

_COUNTING = threading.Lock()


class WebShopSuite(WalkthroughSuite):
    """Shopping goals over a catalogue in WebShop's published layout, in splits that share no goal.

    The catalogue and its search index are built once into the project's cache, named by the files' content, and read
    by all environments of all processes. Everything that the official site draws at random is fixed by the goal.

    Args:
        folder: Where the published files lie.
        goals: Made-up instructions, one per combination of a product's options ("synthetic"), or those that people
            wrote ("human"). The two sets differ in size and difficulty, so there is no default.
        size: The 1,000-product set ("small": items_shuffle_1000.json, or products.jsonl, with items_ins_v2_1000.json)
            or the whole catalogue ("full": items_shuffle.json with items_ins_v2.json).
        num_products: Sell only the first so many records.
        num_test: Goals of the test split; None is the official 500, or a fifth where there are under 3,000 goals.
        num_val: Goals of the val split; None is the official 1,000, or a tenth where there are under 3,000 goals.
        reward: What buying pays: 10 for a score of exactly 1 and nothing for less ("success"), or the score itself, in
            [0, 1] ("score").
        action_format: How replies name their action, "plain" or "tagged".
        max_page_chars: Longer pages are cut in the middle, with a marker that says by how much.
        show_attributes: Offer the page with a product's hidden attributes, as the official site can.
        winnable_only: Leave out goals that not even the right product fulfils, or that no search finds.

    Raises:
        UserError: An argument is out of range, a file is missing, or a package is not installed.
    """

    def __init__(
        self,
        folder: str,
        goals: GoalKind,
        size: CatalogueSize = "small",
        num_products: int | None = None,
        num_test: int | None = None,
        num_val: int | None = None,
        reward: RewardKind = "success",
        action_format: ActionFormat = "plain",
        max_page_chars: int = 6000,
        show_attributes: bool = False,
        winnable_only: bool = False,
    ) -> None:
        check_action_format(action_format)
        if reward not in ("success", "score"):
            raise UserError(f"reward={reward!r} is unknown; allowed are success and score.")
        if max_page_chars < SHORTEST_PAGE:
            raise UserError(f"max_page_chars={max_page_chars}: a page needs at least {SHORTEST_PAGE} characters.")
        for name, count in (("num_test", num_test), ("num_val", num_val)):
            if count is not None and count < 0:
                raise UserError(f"{name}={count} must be 0 or more, or left out.")
        for package in ("bm25s", "rapidfuzz"):
            if find_spec(package) is None:
                raise missing_extra(package, "webshop", "WebShopSuite")
        self._sources = find_sources(folder, size, goals, num_products)
        self._kind: GoalKind = goals
        self._sizes = num_test, num_val
        self._reward: RewardKind = reward
        self._format: ActionFormat = action_format
        self._limit = PageLimit(max_page_chars)
        self._show_attributes = show_attributes
        self._winnable_only = winnable_only
        self._tasks: dict[Split, list[str]] = {}

    def tasks(self, split: Split) -> Sequence[str]:
        """The ids of the split's goals, such as "test-0"; the number counts through all splits, as the site's does."""
        if split not in self._tasks:
            if split not in SPLITS:
                raise UserError(f"split={split!r} is unknown; allowed are train, val and test.")
            self._tasks[split] = self._list(split)
        return self._tasks[split]

    def make(self, task: str) -> WebShopEnvironment:
        """A fresh visit to the shop with the goal of `task`."""
        return WebShopEnvironment(self._site, task, self.goal(task), self._limit, self._format, self._reward)

    def kind(self, task: str) -> str:
        """The department of the goal's product, such as "beauty"."""
        return self.goal(task).product.category

    def goal(self, task: str) -> Goal:
        """What `task` asks for."""
        table = _goal_table(self._sources, self._kind, *self._sizes)
        for split in SPLITS:
            number = task.removeprefix(f"{split}-")
            if number.isdecimal() and task == f"{split}-{int(number)}" and int(number) in table.numbers(split):
                row, member = table.locate(int(number))
                return make_goal(open_catalogue(self._sources).product(row), self._kind, member)
        held = {split: table.numbers(split) for split in SPLITS}
        ranges = ", ".join(f"{split}-{r.start} to {split}-{r.stop - 1}" for split, r in held.items() if r)
        raise UserError(f"task={task!r} is no goal of this suite; there are {ranges}.")

    def walkthrough(self, task: str, held_out: bool = False) -> Conversation:
        """A play that buys the right product for a score of 1.

        It searches with words of the instruction where they find the product, else with the product's title.

        Args:
            task: The goal.
            held_out: Allow a goal that is not of the train split.

        Raises:
            UserError: The goal cannot be won, or it is held out and `held_out` is False, so that no demonstration
                leaks by accident.
        """
        refuse_held_out(task, held_out)
        actions = plan(self._site, self.goal(task))
        if actions is None:
            raise UserError(
                f"task={task!r} cannot be won: its own product scores less than 1, or no search finds it. "
                "`winnable_only: true` leaves such goals out."
            )
        return replay(self.make(task), actions, self._format)

    @property
    def num_cut_pages(self) -> int:
        """Pages that this suite's environments have cut so far."""
        return self._limit.num_cut

    @property
    def _site(self) -> Site:
        return Site(open_catalogue(self._sources), self._show_attributes)

    def _list(self, split: Split) -> list[str]:
        table = _goal_table(self._sources, self._kind, *self._sizes)
        tasks = [f"{split}-{number}" for number in table.numbers(split)]
        if not self._winnable_only:
            return tasks
        site = self._site
        winnable = [task for task in tasks if plan(site, self.goal(task)) is not None]
        log.info("webshop: %d of %d %s goals can be won; the others are left out", len(winnable), len(tasks), split)
        return winnable


def _goal_table(sources: Sources, kind: GoalKind, num_test: int | None, num_val: int | None) -> GoalTable:
    """The goals of a catalogue, the same table for the whole process; says what there is when it is made."""
    with _COUNTING:
        return _count_goals(sources, kind, num_test, num_val)


@lru_cache
def _count_goals(sources: Sources, kind: GoalKind, num_test: int | None, num_val: int | None) -> GoalTable:
    catalogue = open_catalogue(sources)
    counts = catalogue.goal_counts(kind)
    asked_for = sum(count > 0 for count in counts)
    if not asked_for:
        raise UserError(
            f"None of the {len(catalogue)} products of {sources.products} has a {kind} instruction, so there are no "
            "goals. "
            f"Do {sources.attributes.name} and {sources.products.name} belong together?"
        )
    table = GoalTable(counts, num_test, num_val)
    sizes = ", ".join(f"{len(table.numbers(split))} {split}" for split in SPLITS)
    bought = {split: {table.locate(n)[0] for n in table.numbers(split)} for split in ("train", "test")}
    log.info(
        "webshop: %d of %d products carry a %s instruction, %d goals (%s); %d of the %d products asked for in test are "
        "also asked for in train, with other options or words",
        asked_for, len(catalogue), kind, len(table), sizes, len(bought["test"] & bought["train"]), len(bought["test"]),
    )  # fmt: skip
    return table
