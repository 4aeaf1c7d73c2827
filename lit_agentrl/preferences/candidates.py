"""A pair before it is kept: two answers to one prompt, what each is worth, and where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_agentrl.errors import UserError
from lit_agentrl.images import Image
from lit_agentrl.rollouts.chat import ChatMode
from lit_agentrl.types import Step

Message = dict[str, str]
"""`role` and `content`."""


@dataclass(slots=True)
class Candidate:
    """A pair that filters judge."""

    prompt: list[Message]
    chosen: str
    rejected: str
    gap: float
    """How much more the chosen answer is worth."""
    is_correct: bool | None
    """Whether the chosen answer is right; None where nothing says so."""
    images: tuple[Image, ...] = ()
    """What the first user turn shows."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where it comes from, as JSON holds it."""


def prompt_messages(steps: Sequence[Step], index: int, mode: ChatMode) -> list[Message]:
    """What the policy was asked with at a step of an episode, as messages.

    Where prompts are rebuilt that is the step's own turn. Else all turns so far; what was observed in the midst of an
    answer (`inline`) is a user turn too, and a datamodule with that chat writes it back into the answer.

    Raises:
        UserError: The step does not know its prompt, as those that the library plays do.
    """
    last = steps[index]
    if not last.prompt:
        raise UserError("A step without `prompt` cannot be mined: pairs need the text that the policy was asked with.")
    system = [{"role": "system", "content": last.system}] if last.system else []
    if mode == "rebuild":
        return [*system, {"role": "user", "content": last.prompt}]
    turns = [
        {"role": role, "content": text}
        for step in steps[:index]
        for role, text in (("user", step.prompt), ("assistant", step.action))
    ]
    return [*system, *turns, {"role": "user", "content": last.prompt}]


def shows_images_late(steps: Sequence[Step], index: int, mode: ChatMode) -> bool:
    """Whether a later turn than the first shows an image, which preference files have no place for."""
    return mode != "rebuild" and len(steps[index].images) != len(steps[0].images)
