"""What a synthetic lesion's attributes read like: captions, and reasoning that leads to the diagnosis."""

from __future__ import annotations

import random
from collections.abc import Sequence

from lit_agentrl.envs.dermatology.lesion_attributes import LesionAttributes

ASPECTS = ("colour", "border", "symmetry", "structure")
"""The headings of a reasoning trace, in order."""
_CAPTIONS = (
    "A {size}, {symmetry} skin lesion, {colours} in colour, with {a} {border} border and {a_surface} {surface} "
    "surface, showing {structures}.",
    "The lesion is {size} and {symmetry}. Its colour is {colours}. The border is {border}, the surface {surface}. "
    "Structures: {structures}.",
    "{Colours} lesion on {skin} skin; {border} border; {symmetry}; {size}; {surface} surface; {structures}.",
    "Dermoscopy on {skin} skin shows {structures} in {a_size} {size}, {colours} lesion with {a} {border} border. "
    "It is {symmetry} and {surface}.",
    "On {skin} skin there is {a_size} {size} {colours} lesion. It is {symmetry}, its border {border}, with "
    "{structures}.",
)
_SKIN = ("very light", "light", "light brown", "brown", "dark brown", "very dark")


def caption(attributes: LesionAttributes, seed: int = 0) -> str:
    """One or more sentences that say what is to be seen, without the diagnosis; the seed chooses the wording."""
    template = random.Random(f"caption {seed} {attributes}").choice(_CAPTIONS)
    colours = listed(attributes.colours)
    return template.format(
        colours=colours,
        Colours=colours[0].upper() + colours[1:],
        structures=listed(attributes.structures),
        border=attributes.border,
        symmetry=attributes.symmetry,
        size=attributes.size,
        surface=attributes.surface,
        skin=skin_words(attributes.skin_tone),
        a=article(attributes.border),
        a_size=article(attributes.size),
        a_surface=article(attributes.surface),
    )


def reasoning(attributes: LesionAttributes) -> str:
    """The attributes under the headings of `ASPECTS`: `colour: brown, black; border: irregular; ...`."""
    said = (
        ", ".join(attributes.colours),
        attributes.border,
        attributes.symmetry,
        ", ".join(attributes.structures),
    )
    return "; ".join(f"{aspect}: {words}" for aspect, words in zip(ASPECTS, said, strict=True))


def reasoning_trace(
    attributes: LesionAttributes, label: str, think_tag: str = "think", answer_tag: str = "answer"
) -> str:
    """A reply in the format that the environment rewards: the reasoning, then the diagnosis, each in its tags."""
    return f"<{think_tag}>{reasoning(attributes)}</{think_tag}><{answer_tag}>{label}</{answer_tag}>"


def skin_words(skin_tone: int) -> str:
    """Fitzpatrick's types 1 to 6 in words."""
    return _SKIN[skin_tone - 1]


def listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def article(word: str) -> str:
    """`a` or `an`."""
    return "an" if word[0] in "aeiou" else "a"
