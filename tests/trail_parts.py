"""A little search game, an engine and an expansion that follow a script: trees whose every number is known by hand."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from lit_agentrl.envs.pool import EnvironmentPool
from lit_agentrl.rollouts.base import Prompt, RolloutContext, RolloutStrategy
from lit_agentrl.rollouts.chat import Chat
from lit_agentrl.rollouts.expansion import Expansion
from lit_agentrl.rollouts.forest import Node
from lit_agentrl.types import Completion, Engine, Observation, SamplingParams, TrajectoryGroup
from tiny import byte_tokenizer

CHAT = Chat(byte_tokenizer())


class Trail:
    """`search` calls the tool, `right` and `wrong` end the episode, anything else is not an action."""

    def __init__(self, task: str) -> None:
        self.task, self.said, self.calls = task, [], 0

    def reset(self) -> Observation:
        if self.task.startswith("broken"):
            raise RuntimeError("no such place")
        return Observation(f"Find {self.task}.", "Search, then answer.")

    def step(self, action: str) -> tuple[Observation, float, bool]:
        self.said.append(action)
        if action in ("right", "wrong"):
            return Observation("", valid=True), float(action == "right"), True
        if action == "search":
            self.calls += 1
            return Observation(f"clue {self.calls}", valid=True), 0.0, False
        return Observation("no action", valid=False), 0.0, False

    @property
    def anchor(self) -> Hashable:
        return tuple(self.said)

    @property
    def success(self) -> bool:
        return self.said[-1:] == ["right"]

    @property
    def metrics(self) -> dict[str, float]:
        return {"tool_calls": float(self.calls)}

    def close(self) -> None:
        pass


class SavedTrail(Trail):
    """The same with snapshots."""

    def snapshot(self) -> object:
        return tuple(self.said), self.calls

    def restore(self, snapshot: object) -> None:
        self.said, self.calls = list(snapshot[0]), snapshot[1]


class Forgetful(SavedTrail):
    """Goes back to somewhere else."""

    def restore(self, snapshot: object) -> None:
        self.said = ["elsewhere"]


class Fickle(Trail):
    """Says something else the second time it is played."""

    plays = 0

    def __init__(self, task: str) -> None:
        super().__init__(task)
        Fickle.plays += 1
        self.play = Fickle.plays

    def step(self, action: str) -> tuple[Observation, float, bool]:
        observation, reward, done = super().step(action)
        observation.text += f" of play {self.play}"
        self.said[-1] += str(self.play)
        return observation, reward, done


class Script(Engine):
    """Says the words of the script: one list a call, one word a context. Every word costs its letters and one more."""

    def __init__(self, calls: Sequence[str]) -> None:
        self.calls = [call.split() for call in calls]
        self.contexts: list[list[list[int]]] = []
        self.seeds: list[int] = []

    def generate(
        self, contexts: list[list[int]], params: SamplingParams, seeds: Sequence[int] | None = None
    ) -> list[Completion]:
        words = self.calls[len(self.contexts)]
        assert len(words) == len(contexts), f"call {len(self.contexts)}: {words} for {len(contexts)} contexts"
        self.contexts.append(contexts)
        self.seeds += seeds or []
        ids = [CHAT.action_ids(word) for word in words]
        return [
            Completion(i, [-0.5] * len(i), "stop", num_cached=0, num_prefilled=len(c))
            for i, c in zip(ids, contexts, strict=True)
        ]

    def sync(self, policy: object) -> None: ...


class Picks(Expansion):
    """The candidates with these numbers, one list for each tree and round; remembers what there was to choose from."""

    def __init__(self, *picks: Sequence[int]) -> None:
        self.picks = list(picks)
        self.offered: list[list[Node]] = []

    def pick(self, candidates, num, generator):
        self.offered.append(list(candidates))
        chosen = self.picks[len(self.offered) - 1]
        assert len(chosen) == num
        return [candidates[i] for i in chosen]


def context(engine: Engine, kind: type[Trail] = SavedTrail, **more: object) -> RolloutContext:
    """The parts of a rollout of `kind`."""
    options = {"sampling": SamplingParams(max_new_tokens=8), "max_length": 400} | more
    return RolloutContext(engine, options.pop("chat", CHAT), EnvironmentPool(4, 5.0), kind, **options)


def roll(
    strategy: RolloutStrategy, engine: Engine, tasks: Sequence[str] = ("it",), kind: type[Trail] = SavedTrail, **more
) -> list[TrajectoryGroup]:
    """A group for every task."""
    prompts = [Prompt(task, number) for number, task in enumerate(tasks)]
    asked = strategy.group_size(more.pop("group_size", None))
    return strategy.collect(prompts, asked, context(engine, kind, **more))


def said(group: TrajectoryGroup) -> list[str]:
    """What was said in every trajectory."""
    return [" ".join(step.action for step in trajectory.steps) for trajectory in group.trajectories]
