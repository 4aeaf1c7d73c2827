"""Rollouts of a search task with trees and chains, with and without kept keys and values, for `tree_budget.py`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefix_tables import markdown
from transformers import PreTrainedModel

from lit_agentrl.envs.pool import EnvironmentPool
from lit_agentrl.envs.search import SearchSuite
from lit_agentrl.envs.search.environment import SearchEnvironment
from lit_agentrl.envs.search.facts.command import Options, make_facts
from lit_agentrl.retrieval import BM25Retriever
from lit_agentrl.rollouts import ChainRollout, TreeRollout
from lit_agentrl.rollouts.base import Prompt, RolloutContext, RolloutStrategy
from lit_agentrl.rollouts.chat import Chat
from lit_agentrl.rollouts.hf import HFEngine
from lit_agentrl.types import Ledger, Observation, SamplingParams, Step, TrajectoryGroup

TURNS = 3
"""Searches of an episode; its last turn answers."""
MANY = 1 << 20
"""Tokens that the engine may keep: more than any collection here has."""


class SearchesEveryTurn(SearchEnvironment):
    """Takes whatever the policy says for a search: for the question, then for the titles that it takes.

    An untrained policy calls no tool; with this, its episodes are as long as a trained one's, on real passages.
    """

    def step(self, action: str) -> tuple[Observation, float, bool]:
        """The answer to the next search; the turn that may only answer is left alone."""
        if not self.must_answer:
            queries = (self._question.text, *self._question.titles)
            action = f"<search> {queries[len(self.turns) % len(queries)]} </search>"
        return super().step(action)


class SearchingSuite(SearchSuite):
    """A search suite of such episodes."""

    environment = SearchesEveryTurn


@dataclass(frozen=True)
class Task:
    """What is played, and by whom."""

    suite: SearchingSuite
    chat: Chat
    lm: PreTrainedModel
    max_new_tokens: int
    max_length: int

    def collect(self, rollout: RolloutStrategy, group: int | None, prompts: Sequence[Prompt], cached: int) -> Collected:
        """Play `prompts`, with an engine that knows nothing yet and keeps up to `cached` tokens."""
        engine = HFEngine(max_cached_tokens=cached)
        engine.use_tokenizer(self.chat.tokenizer)
        engine.sync(self.lm)
        pool = EnvironmentPool(2)
        sampling = SamplingParams(1.0, self.max_new_tokens, stop=self.suite.stop_strings)
        context = RolloutContext(engine, self.chat, pool, self.suite.make, sampling, self.max_length)
        began, worked = time.perf_counter(), time.process_time()
        groups = rollout.collect(prompts, rollout.group_size(group), context)
        seconds, core = time.perf_counter() - began, time.process_time() - worked
        pool.close()
        return Collected(groups, seconds, core)


@dataclass(frozen=True)
class Collected:
    """One collection."""

    groups: list[TrajectoryGroup]
    seconds: float
    """On the clock."""
    core: float
    """Of this process's cores."""

    @property
    def cost(self) -> Ledger:
        """Of all groups."""
        return sum((group.cost for group in self.groups), Ledger())

    @property
    def steps(self) -> list[Step]:
        """Of all trajectories, one after another."""
        return [step for group in self.groups for t in group.trajectories for step in t.steps]

    @property
    def contexts(self) -> int:
        """Tokens of the contexts that were answered, each step of a tree once."""
        return sum(len(step.context_ids) for step in {id(step): step for step in self.steps}.values())


def data_folder(folder: Path | None, made: Path) -> tuple[Path, list[str]]:
    """A corpus and its question files: those of `folder`, or else ones of `make-facts-qa`, written to `made`."""
    if folder is not None:
        return folder / "corpus.jsonl", [str(folder / "questions.jsonl")]
    make_facts(made, Options())
    return made / "corpus.jsonl", [str(made / "train.jsonl")]


def search_suite(folder: Path | None, made: Path, top_k: int) -> SearchingSuite:
    """The task."""
    corpus, questions = data_folder(folder, made)
    retriever = BM25Retriever(str(corpus), str(made / "index"))
    return SearchingSuite(questions, retriever, max_turns=TURNS, top_k=top_k)


def sides(shape: tuple[int, int, int]) -> dict[str, tuple[RolloutStrategy, int | None, int]]:
    """What is compared: a rollout, its group size, and the tokens that the engine may keep."""
    tree = TreeRollout(TURNS + 1, *shape)
    chains = ChainRollout(TURNS + 1)
    chains.cut_actions = tree.cut_actions = "continue"
    size = tree.group_size(None)
    return {
        "tree, prefixes kept": (tree, None, MANY),
        "tree, nothing kept": (tree, None, 0),
        "chains, prefixes kept": (chains, size, MANY),
    }


def measure(task: Task, shape: tuple[int, int, int], prompts: Sequence[Sequence[Prompt]]) -> dict[str, list[Collected]]:
    """Every side on the same prompts of each repeat, in turn."""
    found: dict[str, list[Collected]] = {name: [] for name in sides(shape)}
    for repeat, of_repeat in enumerate(prompts):
        for name in list(found)[:: 1 if repeat % 2 == 0 else -1]:
            rollout, group, cached = sides(shape)[name]
            found[name].append(task.collect(rollout, group, of_repeat, cached))
            print(f"{shape}, repeat {repeat}, {name}: {found[name][-1].seconds:.2f} s", flush=True)
    return found


def rollout_table(found: dict[str, list[Collected]]) -> list[str]:
    """Seconds and tokens of every side of a shape, how many times the first one's seconds, and whether tokens agree."""
    first = next(iter(found.values()))
    rows = []
    for name, repeats in found.items():
        ratios = [each.core / base.core for each, base in zip(repeats, first, strict=True)]
        cost = [each.cost for each in repeats]
        rows.append(
            [
                name,
                f"{_median(repeats, lambda c: c.core):.2f} ({_median(repeats, lambda c: c.seconds):.2f})",
                *(f"{_median(cost, of):,.0f}" for of in _COUNTS.values()),
                f"{_median(repeats, lambda c: c.cost.generation_seconds / c.seconds):.1%}",
                "-" if repeats is first else times(ratios),
            ]
        )
    header = ("side", "core s (clock)", *_COUNTS, "of the time generating", "over the first")
    return [*markdown(header, rows), "", agreement(*list(found.values())[:2])]


def agreement(kept: Sequence[Collected], unkept: Sequence[Collected]) -> str:
    """A sentence: whether both sides of a tree did the same."""
    pairs = [pair for a, b in zip(kept, unkept, strict=True) for pair in zip(a.steps, b.steps, strict=True)]
    same = [(a, b) for a, b in pairs if list(a.context_ids) == list(b.context_ids) and a.action_ids == b.action_ids]
    error = max(abs(x - y) for a, b in same for x, y in zip(a.logprobs, b.logprobs, strict=True))
    tokens = [sum(each.contexts for each in side) for side in (kept, unkept)]
    return (
        f"With and without kept prefixes, {len(same)} of {len(pairs)} steps of the tree have the same context and "
        f"tokens, with log-probabilities at most {error:.1e} nats apart; {tokens[0]:,} and {tokens[1]:,} context "
        "tokens were answered."
    )


def times(ratios: Sequence[float]) -> str:
    """The median, with the least and the most."""
    return f"**{statistics.median(ratios):.2f}x** ({min(ratios):.2f}-{max(ratios):.2f})"


def _median(values: Sequence[Any], of: Callable[[Any], float]) -> float:
    return statistics.median(of(value) for value in values)


_COUNTS: dict[str, Callable[[Ledger], float]] = {
    "prefilled tokens": lambda cost: cost.prefilled_tokens,
    "cached tokens": lambda cost: cost.cached_tokens,
    "generated tokens": lambda cost: cost.generated_tokens,
    "tool calls": lambda cost: cost.tool_calls,
}
