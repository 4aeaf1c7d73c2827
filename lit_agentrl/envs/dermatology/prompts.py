"""What the policy is told about recognising a disease: short for small models, or after the authors' published code."""

from __future__ import annotations

from collections.abc import Sequence

from lit_agentrl.errors import UserError

HEADINGS = ("Colour and pigmentation", "Texture and surface", "Shape and border")
"""What the long prompt asks the thoughts to go through."""
QUESTION = "Which disease is it?"
"""Asked where a sample brings no question of its own."""
SHORT_PROMPT = (
    "Name the skin disease in the image: {labels}. Reply as <{think}>what you see</{think}><{answer}>name</{answer}>."
)
LONG_PROMPT = (
    "You are a dermatology assistant. Look at the image of the skin and find out which disease it shows.\n"
    "First reason inside <{think}> </{think}>, under these numbered headings:\n{headings}\n"
    "Then give the name of the disease, and nothing else, inside <{answer}> </{answer}>. It must be one of: {labels}.\n"
    "Write nothing before, between or after the two blocks."
)
"""Our wording of what the authors' code asks for: tags, allowed names, three headings, nothing outside the tags."""


def system_prompt(template: str, labels: Sequence[str], think: str, answer: str, headings: Sequence[str]) -> str:
    """The template with everything in its place.

    Raises:
        UserError: The template has no `{labels}` or no `{answer}`, or names a place that there is none of.
    """
    listed = "\n".join(f"{number}. {heading}" for number, heading in enumerate(headings, start=1))
    try:
        text = template.format(labels=", ".join(labels), think=think, answer=answer, headings=listed)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"prompt={template[:80]!r} cannot be filled ({error!r}). Its places are {{labels}}, {{think}}, {{answer}} "
            "and {headings}; write other braces twice."
        ) from None
    for place in ("{labels}", "{answer}"):
        if place not in template:
            raise UserError(f"prompt={template[:80]!r} has no {place}: the policy could not know what to answer.")
    return text
