"""Memories: what a prompt that is rebuilt at every step retells of the steps before."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lit_agentrl.errors import UserError
from lit_agentrl.images import Image
from lit_agentrl.rollouts.chat import Chat
from lit_agentrl.rollouts.replies import decision
from lit_agentrl.types import Observation, Step


class Memory(ABC):
    """Writes the user turn of every step anew, from the steps before it and the present observation."""

    @abstractmethod
    def window(self, num_steps: int) -> int:
        """How many of the `num_steps` steps so far the prompt should show."""

    @abstractmethod
    def text(self, steps: Sequence[Step], observation: Observation, shown: int) -> str:
        """The user turn after `steps` that shows the last `shown` of them; showing fewer is never longer."""


class HistoryWindow(Memory):
    """Task, the last steps as `[Observation n: '...', Action n: '...']`, the observation, the offered actions.

    The prompt of GiGPO's experiments (arXiv 2505.10978, App. E): thoughts are dropped, an action is what
    `rollouts.replies.decision` reads from the reply. An observation that is not given in parts (`Observation.state`
    is empty) is shown whole, and task and actions are not repeated beside it.

    Args:
        length: Steps to show; `all` shows every one.
        actions: List the actions on offer.
        closing: The prompt's last paragraph; the system prompt already says how to answer.
    """

    def __init__(self, length: int | Literal["all"] = 2, actions: bool = True, closing: str = "") -> None:
        if isinstance(length, int) and length < 0:
            raise UserError(f"length={length}: a history has 0 steps or more, or `all`.")
        self.length, self.actions, self.closing = length, actions, closing

    def window(self, num_steps: int) -> int:
        """All steps, or at most `length`."""
        return num_steps if self.length == "all" else min(self.length, num_steps)

    def text(self, steps: Sequence[Step], observation: Observation, shown: int) -> str:
        """The parts that are there, a blank line between them."""
        is_split = bool(observation.state)
        parts = [
            f"Task: {observation.task}" if is_split and observation.task else "",
            _history(steps, shown),
            f"Observation: {observation.state}" if is_split else observation.text,
            "\n".join(["Actions:", *observation.actions]) if self.actions and is_split and observation.actions else "",
            self.closing,
        ]
        return "\n\n".join(part for part in parts if part)


def _history(steps: Sequence[Step], shown: int) -> str:
    """How many steps were taken, and the last `shown` of them, numbered from 1."""
    if not steps:
        return ""
    first = len(steps) - shown
    lines = [
        f"[Observation {number}: '{step.state or step.observation}', Action {number}: '{decision(step.action)}']"
        for number, step in enumerate(steps[first:], first + 1)
    ]
    return "\n".join([f"Steps taken: {len(steps)}." + (f" The last {shown}:" if shown else ""), *lines])


def shown_images(chat: Chat, steps: Sequence[Step], observation: Observation) -> tuple[Image, ...]:
    """The images that the prompt after `steps` has placeholders for: a rebuilt one shows the present ones alone."""
    before = steps[-1].images if steps and chat.mode != "rebuild" else ()
    return (*before, *observation.images)


@dataclass(slots=True, frozen=True)
class NextPrompt:
    """A prompt as the policy sees it."""

    token_ids: list[int]
    is_shortened: bool
    """Whether history was left out of it."""
    text: str
    """Its last user turn."""


def next_prompt(
    chat: Chat, memory: Memory | None, steps: Sequence[Step], observation: Observation, room: int
) -> NextPrompt:
    """The prompt after `steps`.

    With a memory, the oldest history goes first until the prompt has at most `room` tokens. A prompt that is longer
    even without history is given back as it is: the rollout ends such an episode. Without a memory the chat makes
    the prompt, by its mode.
    """
    if memory is None:
        last = steps[-1] if steps else None
        ids = chat.next_context(last.context_ids, last.action_ids, observation) if last else chat.opening(observation)
        return NextPrompt(ids, False, observation.text)

    def render(shown: int) -> NextPrompt:
        text = memory.text(steps, observation, shown)
        return NextPrompt(chat.opening(replace(observation, text=text)), shown < wanted, text)

    wanted = memory.window(len(steps))
    prompt = render(wanted)
    if len(prompt.token_ids) <= room or wanted == 0:
        return prompt
    prompt, fits, too_long = render(0), 0, wanted
    # Halving: a long history is tokenised a few times, not once for each of its steps.
    while too_long - fits > 1 and len(prompt.token_ids) <= room:
        middle = (fits + too_long) // 2
        longer = render(middle)
        if len(longer.token_ids) <= room:
            prompt, fits = longer, middle
        else:
            too_long = middle
    return prompt
