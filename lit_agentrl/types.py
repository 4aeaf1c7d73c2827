"""The types that every part meets in: trajectories, training batches, and what an environment and an engine are.

Legend for shapes: P prompts, G trajectories of a prompt, K steps of a trajectory, B rows, L row length.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from lit_agentrl.images import Image, ImageReader, RowImages

Split = Literal["train", "val", "test"]
Advantages = list[list[float]]
"""One advantage per step of every trajectory of a group, [G][K]."""
Credit = Literal["sum", "mean", "sqrt"]
"""What a token of a step that n trajectories share counts in each of their rows: 1, 1 / n or 1 / sqrt(n)."""


class StopReason(StrEnum):
    """Why a trajectory ended."""

    DONE = "done"  # the environment ended the episode
    MAX_STEPS = "max_steps"  # the rollout's step limit
    LENGTH = "length"  # an action was cut at `max_new_tokens`
    CONTEXT = "context"  # the next prompt and action would not fit the context
    BUDGET = "budget"  # a token, tool-call or time budget ran out
    ENV_ERROR = "env_error"  # the environment raised: the trajectory failed and is never trained
    ENV_TIMEOUT = "env_timeout"  # the environment missed its deadline: failed, never trained

    @property
    def is_failure(self) -> bool:
        """Whether the environment, not the policy, broke the episode."""
        return self in (StopReason.ENV_ERROR, StopReason.ENV_TIMEOUT)

    @property
    def is_token_limit(self) -> bool:
        """Whether a limit on tokens cut the episode."""
        return self in (StopReason.LENGTH, StopReason.CONTEXT, StopReason.BUDGET)

    @property
    def is_truncation(self) -> bool:
        """Whether the episode was cut before the environment ended it."""
        return self.is_token_limit or self is StopReason.MAX_STEPS


@dataclass(slots=True)
class Step:
    """One decision of the policy: everything it saw, and the tokens it answered with."""

    context_ids: Sequence[int]
    """Every token the policy saw, chat template included. Steps of a branch may be views of one list."""
    action_ids: list[int]
    """The sampled tokens, exactly as sampled (the end-of-turn token included when it was sampled)."""
    logprobs: list[float]
    """Log-probability of each action token when it was sampled, at the sampling temperature."""
    reward: float = 0.0
    """What the environment paid for the action."""
    anchor: Hashable = None
    """The environment's state before the action (GiGPO groups steps by it)."""
    observation: str = ""
    """The text the environment showed before the action, for transcripts."""
    state: str = ""
    """The observation without task, history and offered actions: what GiGPO's paper compares states by."""
    valid: bool | None = None
    """Whether the environment could use the action; None where it does not say."""
    action: str = ""
    """The action as text, special tokens removed, for transcripts and rewards."""
    finish: Literal["stop", "length"] = "stop"
    """Whether the action ended by itself or was cut at `max_new_tokens`."""
    is_shortened: bool = False
    """Whether history was left out of the prompt to fit the context."""
    images: tuple[Image, ...] = ()
    """The images that `context_ids` has placeholders for, in order."""
    system: str = ""
    """The system prompt that holds at the step."""
    prompt: str = ""
    """The user turn that the action answers: the observation's text, or what a memory made of it."""


@dataclass(slots=True)
class Ledger:
    """What rollouts cost. Ledgers add up: what trajectories share is in the ledger of the one that paid for it."""

    generated_tokens: int = 0
    """Sampled tokens."""
    prefilled_tokens: int = 0
    """Context tokens whose keys and values were computed."""
    cached_tokens: int = 0
    """Context tokens whose keys and values were there already."""
    tool_calls: int = 0
    """What the environment counts as such (`metrics["tool_calls"]`), replayed ones included."""
    env_steps: int = 0
    """Actions that environments carried out, replayed ones included."""
    replayed_steps: int = 0
    """Actions carried out again to reach a state that could not be restored."""
    env_seconds: float = 0.0
    """Seconds inside environments, added up over those that ran side by side."""
    generation_seconds: float = 0.0
    """Share of the engine's wall clock: that of a call is split by the tokens generated in it."""

    def __add__(self, other: Ledger) -> Ledger:
        """The cost of both."""
        return Ledger(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(slots=True)
class Trajectory:
    """One episode: K steps, why it ended and what it earned. Trajectories of a tree share `Step` objects."""

    steps: list[Step]
    stop_reason: StopReason = StopReason.DONE
    tree_id: int = 0
    total_reward: float = 0.0
    """The weighted sum of `rewards`; what advantages are computed from."""
    rewards: dict[str, float] = field(default_factory=dict)
    """Each reward component before weighting."""
    success: bool | None = None
    """Whether the task was solved; None where the environment does not say."""
    error: str = ""
    """The environment's error text when `stop_reason.is_failure`."""
    cost: Ledger = field(default_factory=Ledger)
    """What this trajectory alone cost: a branch of a tree pays from where it left the others."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The environment's own numbers at the end of the episode, where it has such (`Environment.metrics`)."""

    @property
    def num_shortened(self) -> int:
        """Rebuilt prompts that history was left out of to fit the context."""
        return sum(step.is_shortened for step in self.steps)


@dataclass(slots=True)
class TrajectoryGroup:
    """The G trajectories that one prompt (task) was answered with."""

    prompt_id: str
    trajectories: list[Trajectory]
    kind: str = ""
    """The type of the task, as the suite names it."""
    dropped_cost: Ledger = field(default_factory=Ledger)
    """What trajectories cost that were played and not kept."""
    num_not_begun: int = 0
    """Trajectories that the budget left no room for."""

    @property
    def cost(self) -> Ledger:
        """What all of the group cost."""
        return sum((trajectory.cost for trajectory in self.trajectories), self.dropped_cost)


@dataclass
class TrainBatch:
    """One micro-batch of rows. A row is a maximal run of steps whose contexts extend one another.

    A plain (not frozen) dataclass: Lightning moves and casts its tensors in place.
    """

    token_ids: Tensor
    """[B, L] int64, right-padded."""
    lengths: Tensor
    """[B] int64, real tokens of each row."""
    action_mask: Tensor
    """[B, L] bool, True on the tokens that the policy sampled: the only ones with a loss."""
    old_logprobs: Tensor
    """[B, L] float32, log-probabilities under the policy that the ratio compares with; 0 off `action_mask`."""
    advantages: Tensor
    """[B, L] float32; 0 off `action_mask`."""
    num_action_tokens: int
    """Action tokens of the whole optimiser step: all micro-batches, all ranks."""
    num_rows: int = 1
    """Rows with at least one action token in the whole optimiser step: all micro-batches, all ranks."""
    num_updates: int = 1
    """Optimiser steps of the iteration this batch belongs to; weighs its metrics."""
    sampler_logprobs: Tensor | None = None
    """[B, L] float32, what the engine reported; None where `old_logprobs` already are the engine's."""
    reference_logprobs: Tensor | None = None
    """[B, L] float32 under the reference policy; None without a KL term."""
    temperature: float = 1.0
    """The sampling temperature, which every log-probability of these rows is taken at."""
    weights: Tensor | None = None
    """[B, L] float32, what each token counts in the loss and in all that the loss is divided by; None: all count 1."""
    total_weight: float | None = None
    """Weight of all action tokens of the whole optimiser step: all micro-batches, all ranks; None: all count 1."""
    total_row_weight: float | None = None
    """The same of rows; a row counts what its action tokens count on average."""
    vision: RowImages | None = None
    """The images that the rows show; None for rows of text."""
    sampler_differs: bool = False
    """Whether other weights sampled the tokens than the trainer holds when the iteration starts, or an engine with a
    copy of them; the same on every rank, always."""

    @property
    def token_denominator(self) -> float:
        """What the action tokens of the whole optimiser step count together."""
        return self.num_action_tokens if self.total_weight is None else self.total_weight

    @property
    def row_denominator(self) -> float:
        """What the rows of the whole optimiser step count together."""
        return self.num_rows if self.total_row_weight is None else self.total_row_weight


@dataclass
class PreferenceBatch(TrainBatch):
    """A micro-batch of whole pairs, whose rows follow one another: chosen, rejected, and, where asked for, a third.

    The third is the chosen answer under a corrupted image (mDPO); a pair without images has an empty row there. An
    empty row has no action token.
    """

    rows_per_pair: int = 2
    num_pairs: int = 1
    """Pairs of the whole optimiser step: all micro-batches, all ranks."""
    reference_sums: list[float] | None = None
    """[B], each row's log-probability under the reference policy, where it was computed before training. No tensor:
    half precision would round it."""


@dataclass(slots=True)
class Observation:
    """What the environment shows the policy.

    `text` alone is enough. The other fields say the same in parts: a memory that rebuilds the prompt at every step
    needs to know what of it is task, state and offer, and step-level methods compare states without the rest.
    """

    text: str
    """The whole text of the turn, offered commands included."""
    system: str = ""
    """A system prompt; what the first observation says holds for the episode."""
    state: str = ""
    """The observation alone, without task, history and offered actions; empty where that is `text`."""
    task: str = ""
    """The goal of the episode, the same at every step."""
    actions: tuple[str, ...] = ()
    """The actions on offer."""
    valid: bool | None = None
    """Whether the action that led here could be used; None for the first observation, or where it is not known."""
    images: tuple[Image, ...] = ()
    """What the policy sees before the text: files by reference, or arrays [H, W, 3]."""


@runtime_checkable
class Environment(Protocol):
    """One episode of one task. Used by one thread at a time; single-use: `reset` is called once, first.

    An environment may also have a property `metrics`, a mapping of names to numbers that evaluation logs the means of.
    Its `tool_calls`, the calls of the episode so far, are what budgets count.
    """

    def reset(self) -> Observation:
        """The first observation."""
        ...

    def step(self, action: str) -> tuple[Observation, float, bool]:
        """The next observation, the reward of the action, and whether the episode is over."""
        ...

    @property
    def anchor(self) -> Hashable:
        """The state before the next action; equal states are equal keys (GiGPO)."""
        ...

    @property
    def success(self) -> bool | None:
        """Whether the task is solved so far; None where the environment cannot say."""
        ...

    def close(self) -> None:
        """Free what the episode holds."""
        ...


@runtime_checkable
class RestorableEnvironment(Environment, Protocol):
    """An environment whose state can be saved and taken back to (tree search)."""

    def snapshot(self) -> object:
        """A value that `restore` accepts, unaffected by later steps."""
        ...

    def restore(self, snapshot: object) -> None:
        """Go back to the state of `snapshot`."""
        ...


class EnvironmentSuite(ABC):
    """The tasks of an environment, in splits that never overlap, and how to start one."""

    needs_process: ClassVar[bool] = False
    """Whether episodes should run in worker processes: their code holds the interpreter lock, leaks, or can crash."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end an action as soon as the policy has written one: whatever comes after would be thrown away."""

    @abstractmethod
    def tasks(self, split: Split) -> Sequence[str]:
        """The ids of the split's tasks, always in the same order."""

    @abstractmethod
    def make(self, task: str) -> Environment:
        """A fresh environment for one episode of `task`."""

    def kind(self, task: str) -> str:
        """The type of a task, by which success is reported apart; empty where all tasks are of one."""
        return ""

    def summary(self, groups: Sequence[TrajectoryGroup]) -> Mapping[str, float]:
        """What only all episodes of an evaluation together show (F1 over classes, a vote of a group), by name.

        Failed episodes are in `groups`. The same names whatever the episodes were; NaN where nothing supports one.
        """
        return {}


@runtime_checkable
class StatefulSuite(Protocol):
    """What a suite has besides that changes while it is played, such as a curriculum: its state is in checkpoints.

    Every rank has a suite of its own, which sees the episodes of that rank alone. Each gets its own state back; on
    another number of ranks, rank r gets that of rank r modulo the number saved.
    """

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings, None, tensors, and containers of them: checkpoints are loaded as data only."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`; called before the first episode."""
        ...


Conversation = list[tuple[Observation, str]]
"""Turns: what the policy is shown, and the answer it gives."""


class WalkthroughSuite(EnvironmentSuite):
    """An environment whose tasks come with a solution."""

    @abstractmethod
    def walkthrough(self, task: str) -> Conversation:
        """The observations along a winning play, and its actions."""


@dataclass(frozen=True)  # no slots: the command line reads defaults from `vars`
class SamplingParams:
    """How to sample an action."""

    temperature: float = 1.0
    """0 means greedy."""
    max_new_tokens: int = 64
    top_p: float = 1.0
    top_k: int = 0
    """0 means no limit."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end an action beside the model's own end-of-sequence tokens."""
    stop: tuple[str, ...] = ()
    """Texts that end an action; the token that completes one is the action's last, and is trained like the others."""


@dataclass(slots=True)
class Completion:
    """What an engine generated for one context."""

    token_ids: list[int]
    """The sampled tokens; when `finish` is "stop", the last one is the token that ended the action: an end-of-turn
    token, or the one that completed a stop string."""
    logprobs: list[float]
    """Log-probability of each token at the sampling temperature (at temperature 1 for greedy)."""
    finish: Literal["stop", "length"]
    num_cached: int = 0
    """Context tokens whose keys and values were already there."""
    num_prefilled: int = 0
    """Context tokens that were computed for this completion alone; a shared prompt counts for its first member."""


@dataclass(frozen=True)
class Fingerprint:
    """Moments of all weights of a model, whatever they are called, split into or joined to: one value of each once."""

    count: int
    """How many numbers."""
    total: float
    """Their sum, in float64."""
    squares: float
    """The sum of their squares, in float64."""
    of: object = field(default=None, repr=False, compare=False)
    """The very module that it was computed from, its weights as they are; None where that is not in this process."""


class Engine(ABC):
    """Generates tokens with the weights that the policy had when it was last synced."""

    version: int = 0
    """Of the weights that it samples from: how many syncs there were."""

    @property
    def shares_weights(self) -> bool:
        """Whether it samples from the very tensors that are trained: nothing is copied, they move while they train."""
        return False

    @property
    def weights_dtype(self) -> torch.dtype | None:
        """What merged weights are cast to before it samples from them; None: they are held as the policy holds them."""
        return None

    @abstractmethod
    def generate(
        self,
        contexts: list[list[int]],
        params: SamplingParams,
        seeds: Sequence[int] | None = None,
        images: Sequence[Sequence[Image]] | None = None,
    ) -> list[Completion]:
        """One completion per context; `seeds` [B] fix each one's randomness, whatever it is batched with.

        `images` [B] are what each context has placeholders for, in order; None where no context shows one.
        """

    @abstractmethod
    def sync(self, policy: nn.Module) -> None:
        """Take over the policy's weights; forget cached keys and values."""

    def use_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:  # noqa: B027  # nothing to do for most
        """Learn what tokens read as, once, before the first call: an engine that sees stop strings by it keeps it."""

    def use_image_reader(self, reader: ImageReader) -> None:  # noqa: B027  # nothing to do for most
        """Learn how images become the model's inputs, once, before the first call that shows one."""

    def fingerprint(self) -> Fingerprint | None:
        """Of the weights it samples from, as they are where they are used; None where it cannot tell."""
        return None

    def close(self) -> None:  # noqa: B027  # nothing to do for most
        """Give back what it holds: memory, processes, files. It is not used any more."""


Metrics = Mapping[str, float]
