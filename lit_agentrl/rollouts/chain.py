"""Chain rollouts: every trajectory is one agent in one environment, from the first prompt to the end."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from lit_agentrl.envs.pool import EnvironmentFailure
from lit_agentrl.errors import UserError
from lit_agentrl.rollouts.base import Prompt, RolloutContext, RolloutStrategy
from lit_agentrl.rollouts.engine import rollout_seed
from lit_agentrl.rollouts.memory import next_prompt
from lit_agentrl.types import Completion, Environment, Observation, Step, StopReason, Trajectory, TrajectoryGroup


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


@dataclass(slots=True, eq=False)
class Episode:
    """A trajectory in the making."""

    prompt: Prompt
    member: int
    environment: Environment | None = None
    context_ids: list[int] = field(default_factory=list)
    state: EnvironmentState | None = None
    system: str = ""
    trajectory: Trajectory = field(default_factory=lambda: Trajectory(steps=[]))
    active: bool = True

    def end(self, reason: StopReason, error: str = "") -> None:
        """Close the episode."""
        self.trajectory.stop_reason, self.trajectory.error, self.active = reason, error, False


class ChainRollout(RolloutStrategy):
    """Plays all episodes of an iteration side by side, one step of each at a time.

    Only episodes that still run are generated for and stepped. A step whose action is cut at `max_new_tokens` ends the
    episode (`StopReason.LENGTH`): its answer is incomplete. `cut_actions="continue"` passes the cut text on instead.

    Args:
        max_steps: Actions an episode may take.
        cut_actions: What becomes of an episode whose action was cut.

    Raises:
        UserError: An argument is out of range.
    """

    def __init__(self, max_steps: int = 1, cut_actions: str = "stop") -> None:
        if max_steps < 1:
            raise UserError(f"max_steps={max_steps}: an episode needs at least 1 step.")
        if cut_actions not in ("stop", "continue"):
            raise UserError(f"cut_actions={cut_actions!r} is unknown; allowed are 'stop' and 'continue'.")
        self.max_steps = max_steps
        self.cut_actions = cut_actions

    def collect(self, prompts: Sequence[Prompt], group_size: int, context: RolloutContext) -> list[TrajectoryGroup]:
        """`group_size` trajectories of every prompt, [P] groups in the order of `prompts`."""
        episodes = [Episode(prompt, member) for prompt in prompts for member in range(group_size)]
        try:
            self._start(episodes, context)
            for turn in range(self.max_steps):
                running = [episode for episode in episodes if episode.active]
                if not running:
                    break
                self._turn(running, turn, context)
        finally:
            _close(episodes, context)
        for episode in episodes:
            if episode.active:
                episode.end(StopReason.MAX_STEPS)
        return [
            TrajectoryGroup(prompt.task, [e.trajectory for e in episodes[i * group_size : (i + 1) * group_size]])
            for i, prompt in enumerate(prompts)
        ]

    def _start(self, episodes: list[Episode], context: RolloutContext) -> None:
        def start(episode: Episode) -> EnvironmentState:
            began = time.perf_counter()
            episode.environment = context.make(episode.prompt.task)
            observation = episode.environment.reset()
            return _read(episode.environment, observation, 0.0, False, began)

        results = context.pool.call([lambda e=episode: start(e) for episode in episodes])  # type: ignore[misc]
        for episode, result in zip(episodes, results, strict=True):
            if _accept(episode, result):
                _prompt(episode, context)

    def _turn(self, episodes: list[Episode], turn: int, context: RolloutContext) -> None:
        for episode in episodes:
            if len(episode.context_ids) > context.room:
                episode.end(StopReason.CONTEXT)
        acting = [episode for episode in episodes if episode.active]
        seeds = [rollout_seed(context.seed, context.iteration, e.prompt.number, e.member, turn) for e in acting]
        completions = (
            context.engine.generate([e.context_ids for e in acting], context.sampling, seeds) if acting else []
        )
        for episode, completion in zip(acting, completions, strict=True):
            _record(episode, completion, context)
        stepping = [e for e in acting if self.cut_actions == "continue" or e.trajectory.steps[-1].finish == "stop"]
        for episode in acting:
            if episode not in stepping:
                episode.end(StopReason.LENGTH)
        self._step(stepping, context)

    def _step(self, episodes: list[Episode], context: RolloutContext) -> None:
        def step(episode: Episode) -> EnvironmentState:
            began = time.perf_counter()
            assert episode.environment is not None
            observation, reward, done = episode.environment.step(episode.trajectory.steps[-1].action)
            return _read(episode.environment, observation, reward, done, began)

        results = context.pool.call([lambda e=episode: step(e) for episode in episodes])  # type: ignore[misc]
        for episode, result in zip(episodes, results, strict=True):
            if not _accept(episode, result):
                continue
            last, state = episode.trajectory.steps[-1], episode.state
            assert state is not None
            last.reward, last.valid = state.reward, state.observation.valid
            if state.done:
                episode.end(StopReason.DONE)
            else:
                _prompt(episode, context)


def _read(
    environment: Environment, observation: Observation, reward: float, done: bool, began: float
) -> EnvironmentState:
    return EnvironmentState(
        observation,
        float(reward),
        bool(done),
        environment.anchor,
        environment.success,
        dict(getattr(environment, "metrics", {})),
        time.perf_counter() - began,
    )


def _accept(episode: Episode, result: EnvironmentState | EnvironmentFailure) -> bool:
    """Take over an environment's answer; a failure ends the episode, which is never scored or trained."""
    if isinstance(result, EnvironmentFailure):
        episode.end(result.reason, result.message)
        return False
    episode.system = result.observation.system or episode.system
    if result.observation.images:
        raise UserError(
            "The environment shows images, which this rollout cannot give to the policy. Set the environment's "
            "observation to text."
        )
    result.observation.system = episode.system  # stated once, it holds for the episode: a rebuilt prompt repeats it
    episode.state = result
    episode.trajectory.success, episode.trajectory.metrics = result.success, result.metrics
    episode.trajectory.cost.env_seconds += result.seconds
    return True


def _prompt(episode: Episode, context: RolloutContext) -> None:
    """Make the next prompt; history that does not fit is left out and counted."""
    assert episode.state is not None
    episode.context_ids, is_shortened = next_prompt(
        context.chat, context.memory, episode.trajectory.steps, episode.state.observation, context.room
    )
    episode.trajectory.num_shortened += is_shortened


def _record(episode: Episode, completion: Completion, context: RolloutContext) -> None:
    """Append the step that the policy just took."""
    assert episode.state is not None
    episode.trajectory.steps.append(
        Step(
            context_ids=episode.context_ids,
            action_ids=completion.token_ids,
            logprobs=completion.logprobs,
            anchor=episode.state.anchor,
            observation=episode.state.observation.text,
            state=episode.state.observation.state or episode.state.observation.text,
            action=context.chat.decode(completion.token_ids),
            finish=completion.finish,
        )
    )


def _close(episodes: list[Episode], context: RolloutContext) -> None:
    """Close every environment, on the pool's threads and under its deadline: closing may hang like anything else."""
    # Not those that hang: their abandoned threads may still be inside.
    timeout = StopReason.ENV_TIMEOUT
    environments = [e.environment for e in episodes if e.environment and e.trajectory.stop_reason is not timeout]
    context.pool.call([environment.close for environment in environments])
