"""Plays episodes side by side, from the first prompt or from where another one stood: the part all rollouts share."""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lit_agentrl.envs.pool import EnvironmentFailure
from lit_agentrl.errors import ImageError
from lit_agentrl.images import Image
from lit_agentrl.rollouts.base import Prompt, RolloutContext
from lit_agentrl.rollouts.budget import Accounts
from lit_agentrl.rollouts.engine import rollout_seed
from lit_agentrl.rollouts.memory import next_prompt, shown_images
from lit_agentrl.rollouts.tokens import TokenView
from lit_agentrl.types import (
    Completion,
    Environment,
    Observation,
    RestorableEnvironment,
    Step,
    StopReason,
    Trajectory,
)

CutActions = Literal["stop", "continue"]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class EnvironmentState:
    """What one call of an environment gave, read in the same call so that no second thread touches it."""

    observation: Observation
    reward: float
    done: bool
    anchor: Hashable
    success: bool | None
    metrics: dict[str, float]
    seconds: float
    snapshot: object = None
    """What takes an environment back here; None where it cannot be, or nobody will ask."""

    @property
    def tool_calls(self) -> int:
        """Tools called in the episode so far."""
        return int(self.metrics.get("tool_calls", 0))


@dataclass(slots=True, frozen=True)
class Fork:
    """A place in an episode that another one starts from."""

    steps: list[Step]
    """The steps that lead there, at least one, shared with the other episode."""
    state: EnvironmentState
    """Where the environment stood after them."""


@dataclass(slots=True, eq=False)
class Episode:
    """A trajectory in the making."""

    prompt: Prompt
    member: int
    """Keys its randomness, with the prompt's number: no two episodes of a prompt have the same."""
    fork: Fork | None = None
    environment: Environment | None = None
    state: EnvironmentState | None = None
    states: list[EnvironmentState] = field(default_factory=list)
    """What the environment gave: first for `reset` (or the fork's), then one for every step that it answered."""
    system: str = ""
    trajectory: Trajectory = field(default_factory=lambda: Trajectory(steps=[]))
    active: bool = True
    context_ids: list[int] = field(default_factory=list)
    is_shortened: bool = False
    """Whether history was left out of `context_ids`."""
    turn: str = ""
    """The last user turn of `context_ids`."""
    images: tuple[Image, ...] = ()
    """What `context_ids` has placeholders for."""
    tokens: list[int] = field(default_factory=list)
    """What the contexts of the episode's own steps are views of."""

    @property
    def own_steps(self) -> list[Step]:
        """The steps after the fork."""
        return self.trajectory.steps[len(self.fork.steps) if self.fork else 0 :]

    @property
    def tool_calls(self) -> int:
        """Calls so far, those included that a snapshot remembers and nobody has to make again."""
        if self.state is not None:
            return self.state.tool_calls
        is_restored = self.fork is not None and self.fork.state.snapshot is not None
        return self.fork.state.tool_calls if self.fork and is_restored else 0

    @property
    def is_begun(self) -> bool:
        """Whether the budget let it act at all; if not, it says nothing about the policy."""
        return self.trajectory.stop_reason is not StopReason.BUDGET or bool(self.own_steps)

    def end(self, reason: StopReason, error: str = "") -> None:
        """Close the episode."""
        self.trajectory.stop_reason, self.trajectory.error, self.active = reason, error, False


class Player:
    """Plays episodes side by side, one step of each at a time.

    Only episodes that still run are generated for and stepped. An image that cannot be read fails the episodes that
    would show it, as an environment that raises does, and the log names it.

    Args:
        context: The parts to play with.
        max_steps: Actions an episode may take.
        cut_actions: A step whose action is cut at `max_new_tokens` ends the episode (`stop`), as its answer is
            incomplete, or the cut text is passed on (`continue`).
        branching: Whether places in an episode are kept for others to start from.
    """

    def __init__(
        self, context: RolloutContext, max_steps: int, cut_actions: CutActions, *, branching: bool = False
    ) -> None:
        self.context, self.max_steps, self.cut_actions, self.branching = context, max_steps, cut_actions, branching
        self.accounts = Accounts(context.budget, context.sampling.max_new_tokens)
        self._unreadable: set[str] = set()

    def play(self, episodes: Sequence[Episode]) -> None:
        """Play `episodes` to their ends, and close their environments whatever happens."""
        self.accounts.open(episodes)
        try:
            self._start(episodes)
            while running := [episode for episode in episodes if episode.active]:
                self._turn(running)
        finally:
            self._close(episodes)

    def _start(self, episodes: Sequence[Episode]) -> None:
        def start(episode: Episode) -> EnvironmentState:
            began = time.perf_counter()
            environment = episode.environment = self.context.make(episode.prompt.task)
            observation = environment.reset()
            if episode.fork and episode.fork.state.snapshot is not None:
                assert isinstance(environment, RestorableEnvironment)
                environment.restore(episode.fork.state.snapshot)
            return self._read(episode, observation, 0.0, False, began)

        results = self.context.pool.call([lambda e=episode: start(e) for episode in episodes])  # type: ignore[misc]
        for episode, result in zip(episodes, results, strict=True):
            if not _accept(episode, result):
                continue
            if episode.fork is None:
                self._arrive(episode)
            elif episode.fork.state.snapshot is not None:
                self._resume(episode)
        self._replay([e for e in episodes if e.active and e.fork and e.fork.state.snapshot is None])

    def _resume(self, episode: Episode) -> None:
        """Go on from the fork: the environment is where the other episode's was."""
        assert episode.fork is not None
        assert episode.state is not None
        reached, wanted = episode.state, episode.fork.state
        if reached.anchor != wanted.anchor:
            episode.end(
                StopReason.ENV_ERROR,
                f"going back to step {len(episode.fork.steps)} gave the state {reached.anchor!r} instead of "
                f"{wanted.anchor!r}: the environment's restore is at fault, or its episodes differ.",
            )
            return
        episode.state, episode.system = wanted, wanted.observation.system
        episode.trajectory.steps = list(episode.fork.steps)
        episode.trajectory.success, episode.trajectory.metrics = wanted.success, wanted.metrics
        self._arrive(episode)

    def _replay(self, episodes: list[Episode]) -> None:
        """Carry the actions before the fork out again, each a call of its own, under its own deadline."""
        turn = 0
        while episodes:
            self._act([(episode, episode.fork.steps[turn].action) for episode in episodes if episode.fork])
            turn += 1
            for episode in episodes:
                episode.trajectory.cost.replayed_steps += 1
                if episode.active and episode.fork and turn == len(episode.fork.steps):
                    self._resume(episode)
            episodes = [e for e in episodes if e.active and e.fork and turn < len(e.fork.steps)]

    def _turn(self, episodes: list[Episode]) -> None:
        for episode in episodes:
            if len(episode.trajectory.steps) >= self.max_steps:
                episode.end(StopReason.MAX_STEPS)
            elif len(episode.context_ids) > self.context.room:
                episode.end(StopReason.CONTEXT)
        able = [episode for episode in episodes if episode.active]
        acting = self.accounts.admit(able)
        for episode in able:
            if episode not in acting:
                episode.end(StopReason.BUDGET)
        self._generate(acting)
        for episode in acting:
            if self.cut_actions == "stop" and episode.trajectory.steps[-1].finish == "length":
                episode.end(StopReason.LENGTH)
        stepping = [episode for episode in acting if episode.active]
        self._act([(episode, episode.trajectory.steps[-1].action) for episode in stepping])
        for episode in stepping:
            self._reward(episode)

    def _generate(self, episodes: list[Episode]) -> None:
        if not episodes:
            return
        context = self.context
        seeds = [
            rollout_seed(context.seed, context.iteration, e.prompt.number, e.member, len(e.trajectory.steps))
            for e in episodes
        ]
        images = [episode.images for episode in episodes]
        shown = {"images": images} if any(images) else {}  # engines of text need not know of images
        began = time.perf_counter()
        completions = context.engine.generate([e.context_ids for e in episodes], context.sampling, seeds, **shown)
        seconds = time.perf_counter() - began
        num_generated = sum(len(completion.token_ids) for completion in completions)
        for episode, completion in zip(episodes, completions, strict=True):
            episode.trajectory.steps.append(self._step(episode, completion))
            cost = episode.trajectory.cost
            cost.generated_tokens += len(completion.token_ids)
            cost.prefilled_tokens += completion.num_prefilled
            cost.cached_tokens += completion.num_cached
            cost.generation_seconds += seconds * len(completion.token_ids) / max(1, num_generated)

    def _step(self, episode: Episode, completion: Completion) -> Step:
        """The step that the policy just took."""
        assert episode.state is not None
        observation = episode.state.observation
        return Step(
            context_ids=TokenView(episode.tokens, len(episode.context_ids)),
            action_ids=completion.token_ids,
            logprobs=completion.logprobs,
            anchor=episode.state.anchor,
            observation=observation.text,
            state=observation.state or observation.text,
            action=self.context.chat.decode(completion.token_ids),
            finish=completion.finish,
            is_shortened=episode.is_shortened,
            images=episode.images,
            system=episode.system,
            prompt=episode.turn,
        )

    def _act(self, actions: list[tuple[Episode, str]]) -> None:
        """Carry actions out and take over what the environments answer."""

        def act(episode: Episode, action: str) -> EnvironmentState:
            began = time.perf_counter()
            assert episode.environment is not None
            return self._read(episode, *episode.environment.step(action), began)

        calls = [lambda e=episode, a=action: act(e, a) for episode, action in actions]  # type: ignore[misc]
        for (episode, _), result in zip(actions, self.context.pool.call(calls), strict=True):
            episode.trajectory.cost.env_steps += 1
            _accept(episode, result)

    def _reward(self, episode: Episode) -> None:
        """Book what the last action earned, and end the episode or make the next prompt."""
        if not episode.active:
            return
        state, last = episode.state, episode.trajectory.steps[-1]
        assert state is not None
        last.reward, last.valid = state.reward, state.observation.valid
        if state.done:
            episode.end(StopReason.DONE)
        else:
            self._arrive(episode)

    def _arrive(self, episode: Episode) -> None:
        """Make the next prompt; history that does not fit is left out and counted."""
        state, context = episode.state, self.context
        assert state is not None
        if self.branching:
            episode.states.append(state)
        steps = episode.trajectory.steps
        try:
            prompt = next_prompt(context.chat, context.memory, steps, state.observation, context.room)
        except ImageError as error:
            self._fail(episode, str(error))
            return
        episode.context_ids, episode.is_shortened, episode.turn = prompt.token_ids, prompt.is_shortened, prompt.text
        episode.images = shown_images(context.chat, steps, state.observation)
        seen = len(episode.tokens)
        if seen and episode.context_ids[:seen] == episode.tokens:
            episode.tokens += episode.context_ids[seen:]
        else:  # the first prompt, or a rebuilt one
            episode.tokens = list(episode.context_ids)

    def _fail(self, episode: Episode, error: str) -> None:
        """End an episode whose image cannot be shown; the log has it once, not once for every episode of its prompt."""
        if error not in self._unreadable:
            log.warning("The episodes of %s fail, and are not trained on: %s", episode.prompt.task, error)
        self._unreadable.add(error)
        episode.end(StopReason.ENV_ERROR, error)

    def _read(
        self, episode: Episode, observation: Observation, reward: float, done: bool, began: float
    ) -> EnvironmentState:
        environment = episode.environment
        assert environment is not None
        is_kept = self.branching and not done and isinstance(environment, RestorableEnvironment)
        return EnvironmentState(
            observation,
            float(reward),
            bool(done),
            environment.anchor,
            environment.success,
            dict(getattr(environment, "metrics", {})),
            # what is read for others to start from costs time too
            snapshot=environment.snapshot() if is_kept else None,  # type: ignore[attr-defined]
            seconds=time.perf_counter() - began,
        )

    def _close(self, episodes: Sequence[Episode]) -> None:
        """Close environments on the pool's threads and under its deadline: closing may hang like anything else."""
        # Not those that hang: their abandoned threads may still be inside.
        timeout = StopReason.ENV_TIMEOUT
        environments = [e.environment for e in episodes if e.environment and e.trajectory.stop_reason is not timeout]
        self.context.pool.call([environment.close for environment in environments])


def _accept(episode: Episode, result: EnvironmentState | EnvironmentFailure) -> bool:
    """Take over an environment's answer; a failure ends the episode, which is never scored or trained."""
    cost = episode.trajectory.cost
    cost.env_seconds += result.seconds
    if isinstance(result, EnvironmentFailure):
        episode.end(result.reason, result.message)
        return False
    episode.system = result.observation.system or episode.system
    result.observation.system = episode.system  # stated once, it holds for the episode: a rebuilt prompt repeats it
    cost.tool_calls += result.tool_calls - episode.tool_calls
    episode.state = result
    episode.trajectory.success, episode.trajectory.metrics = result.success, result.metrics
    return True
