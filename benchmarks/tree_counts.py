"""What trees of scripted episodes cost in turns and tool calls, and what formulas say they cost.

Legend: M trees, N expansions, L rounds, T turns of an episode (T - 1 searches, then the answer), d depth of a node.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import product
from math import sqrt

from prefix_tables import markdown
from transformers import PreTrainedTokenizerBase

from lit_agentrl.envs.pool import EnvironmentPool
from lit_agentrl.rollouts import TreeRollout
from lit_agentrl.rollouts.base import Prompt, RolloutContext
from lit_agentrl.rollouts.chat import Chat
from lit_agentrl.rollouts.expansion import Expansion, PerDepth, Uniform, WithoutReplacement
from lit_agentrl.types import Completion, Engine, Observation, SamplingParams

Shape = tuple[int, int, int]
SHAPES: tuple[Shape, ...] = ((1, 2, 1), (2, 2, 1), (4, 2, 1), (2, 6, 1), (2, 1, 2))
POLICIES: dict[str, type[Expansion]] = {
    "uniform": Uniform,
    "per depth": PerDepth,
    "without replacement": WithoutReplacement,
}
SEARCH, ANSWER = "7", "9"  # one token each, so that sampled tokens count turns


class Lookup:
    """An episode that a `SEARCH` continues and anything else ends."""

    def __init__(self, task: str) -> None:
        self.task, self.calls = task, 0

    def reset(self) -> Observation:
        """The prompt."""
        return Observation("Find it.", "Search, then answer.")

    def step(self, action: str) -> tuple[Observation, float, bool]:
        """Nothing new, after a search."""
        self.calls += action == SEARCH
        return Observation("."), 0.0, action != SEARCH

    @property
    def anchor(self) -> Hashable:
        """How far it is."""
        return self.calls

    @property
    def success(self) -> bool | None:
        """Nobody asks."""
        return None

    @property
    def metrics(self) -> dict[str, float]:
        """What budgets count."""
        return {"tool_calls": float(self.calls)}

    def snapshot(self) -> object:
        """How far it is."""
        return self.calls

    def restore(self, snapshot: object) -> None:
        """Go back."""
        assert isinstance(snapshot, int)
        self.calls = snapshot

    def close(self) -> None:
        """Nothing is held."""


class Scripted(Engine):
    """Searches T - 1 times, then answers: which turn it is, it reads off the context."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, turns: int) -> None:
        self.turns = turns
        self.search, self.answer = ((tokenizer.convert_tokens_to_ids(word)) for word in (SEARCH, ANSWER))

    def generate(
        self, contexts: list[list[int]], params: SamplingParams, seeds: Sequence[int] | None = None
    ) -> list[Completion]:
        """One token for each context."""
        done = [context.count(self.search) + 1 == self.turns for context in contexts]
        return [Completion([self.answer if last else self.search], [0.0], "stop") for last in done]

    def sync(self, policy: object) -> None:
        """It has no weights."""


@dataclass(frozen=True)
class Spread:
    """A mean over prompts, and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value a prompt."""
        return cls(statistics.fmean(values), statistics.stdev(values) / sqrt(len(values)))

    def agrees(self, exact: float) -> bool:
        """Whether `exact` is within three standard errors."""
        return abs(self.mean - exact) <= 3 * self.error + 1e-9

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.error:.3f}"


@dataclass(frozen=True)
class Counted:
    """What the trees of many prompts cost."""

    chains: Spread
    """Generated turns of a prompt, in episodes of T turns."""
    calls: Spread
    """Tool calls of a prompt, in episodes of T - 1 calls; all 0 where T is 1."""
    trajectories: int
    """Of each prompt."""


def count(shape: Shape, turns: int, policy: str, tokenizer: PreTrainedTokenizerBase, prompts: int) -> Counted:
    """Collect the trees of `prompts` prompts."""
    rollout = TreeRollout(turns, *shape, expansion=POLICIES[policy]())
    pool = EnvironmentPool(1)
    context = RolloutContext(
        Scripted(tokenizer, turns), Chat(tokenizer), pool, Lookup, SamplingParams(max_new_tokens=1), 400
    )
    groups = rollout.collect([Prompt("it", number) for number in range(prompts)], rollout.group_size(None), context)
    pool.close()
    (trajectories,) = {len(group.trajectories) for group in groups}
    assert {len(t.steps) for group in groups for t in group.trajectories} == {turns}
    return Counted(
        Spread.of([group.cost.generated_tokens / turns for group in groups]),
        Spread.of([group.cost.tool_calls / max(1, turns - 1) for group in groups]),
        trajectories,
    )


def nominal(shape: Shape) -> float:
    """The paper's cost in chains: M (1 + N L / 2), with expansions half a chain long whatever T is."""
    trees, expansions, rounds = shape
    return trees * (1 + expansions * rounds / 2)


def exact(shape: Shape, turns: int, per_depth: bool = False) -> float:
    """The mean cost in chains of T turns.

    A node at depth d is followed by T - d new turns. In the first round a tree has one candidate at each depth 0 to
    T - 1, so a branch is (T + 1) / 2 turns long: M + M N (T + 1) / (2 T). Every branch adds a candidate at each depth
    from d + 1 to T - 1, so later rounds draw deeper nodes, and their branches are shorter, unless the depth is drawn
    first.
    """
    trees, expansions, rounds = shape
    return trees * (1 + _branch_turns(Counter(range(turns)), expansions, rounds, turns, per_depth) / turns)


def _branch_turns(candidates: Counter[int], expansions: int, rounds: int, turns: int, per_depth: bool) -> float:
    """Mean new turns of all rounds to come, from how many candidates there are at each depth."""
    if rounds == 0:
        return 0.0
    weights = {depth: 1 if per_depth else number for depth, number in candidates.items()}
    chances = {depth: weight / sum(weights.values()) for depth, weight in weights.items()}
    mean = expansions * sum(chance * (turns - depth) for depth, chance in chances.items())
    if rounds == 1:
        return mean
    for picks in product(chances, repeat=expansions):
        chance = 1.0
        later = candidates.copy()
        for depth in picks:
            chance *= chances[depth]
            later.update(range(depth + 1, turns))
        mean += chance * _branch_turns(later, expansions, rounds - 1, turns, per_depth)
    return mean


def count_table(tokenizer: PreTrainedTokenizerBase, prompts: int, most_turns: int = 4) -> list[str]:
    """The table of every shape and T, and two sentences on how far the formulas hold."""
    rows, off, num_close, cases = [], [], 0, 0
    for shape, turns in product(SHAPES, range(1, most_turns + 1)):
        counted = {policy: count(shape, turns, policy, tokenizer, prompts) for policy in POLICIES}
        first = counted["uniform"]
        for policy, each in counted.items():
            cases += 1
            wanted = exact(shape, turns, policy == "per depth")
            halves = turns == 1 or shape[2] > 1 or each.calls.agrees(nominal(shape))
            if not each.chains.agrees(wanted) or not halves:
                off.append(f"{shape} T={turns} {policy}: {each.chains} against {wanted:.3f}")
            num_close += abs(each.chains.mean / nominal(shape) - 1) < 0.05
        rows.append(
            [
                f"({', '.join(map(str, shape))})",
                str(turns),
                f"{nominal(shape):.0f}",
                f"{exact(shape, turns):.3f}",
                *(str(each.chains) for each in counted.values()),
                "-" if turns == 1 else str(first.calls),
                str(first.trajectories),
                f"{first.trajectories / nominal(shape):.2f}",
                f"**{first.trajectories / first.chains.mean:.2f}**",
                "-" if turns == 1 else f"{first.trajectories / first.calls.mean:.2f}",
            ]
        )
    header = (
        "(M, N, L)", "T", "the paper's formula", "exact, uniform", *POLICIES, "tool calls, uniform", "trajectories",
        "per chain, formula", "per chain of turns", "per chain of tool calls",
    )  # fmt: skip
    said = "Turns within three standard errors of the exact mean, and (where L is 1 and T above 1) tool calls within "
    said += f"three of the paper's formula: {cases - len(off)} of {cases} cases."
    if off:
        said += f" Not: {'; '.join(off)}."
    said += f" Turns within 5 % of the paper's formula: {num_close} of {cases}."
    return [*markdown(header, rows), "", said]
