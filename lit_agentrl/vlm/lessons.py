"""What the model is taught with: pictures, what is asked about them, and answers that are true by construction.

Most lessons describe and name no disease. The labelled ones show the whole reply that recognition asks for.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lit_agentrl.envs.dermatology.lesion_attributes import Difficulty, Lesion, draw_lesion
from lit_agentrl.envs.dermatology.lesion_classes import LESION_LABELS
from lit_agentrl.envs.dermatology.lesion_render import render
from lit_agentrl.envs.dermatology.lesion_text import caption, reasoning, reasoning_trace, skin_words
from lit_agentrl.envs.dermatology.prompts import QUESTION, SHORT_PROMPT, system_prompt
from lit_agentrl.vlm.pictures import Picture, draw_picture, paint

FIRST_SEED = 2**31
"""Seeds of the lessons' lesions start here, so that none is among those of a recipe, whose seeds are small."""
DIFFICULTY: Difficulty = "medium"
LABELLED_SYSTEM = system_prompt(SHORT_PROMPT, LESION_LABELS, "think", "answer", ())

_LIST = "List the colour, border, symmetry and structure of the lesion."
_SENTENCE = "Describe the lesion."
_REST = "And its size, its surface, and the skin around it?"
_PLAIN = "List the colour, shape, number, place and background of what you see."


@dataclass(frozen=True)
class Lesson:
    """An image and a conversation about it."""

    pixels: np.ndarray[Any, np.dtype[np.uint8]]
    """[H, W, 3]"""
    turns: tuple[tuple[str, str], ...]
    """Questions and answers."""
    aspects: Mapping[str, tuple[str, ...]]
    """What can be seen: words by heading."""
    system: str | None = None
    """None for the model's own."""


def lesion_lesson(lesion: Lesion, size: int, is_labelled: bool, rng: random.Random) -> Lesson:
    """A lesion: the reply of recognition if it is labelled, else a list or a sentence, and a second question."""
    what = lesion.attributes
    aspects = {
        "colour": what.colours,
        "border": (what.border,),
        "symmetry": (what.symmetry,),
        "structure": what.structures,
        "size": (what.size,),
        "surface": (what.surface,),
        "skin": (skin_words(what.skin_tone),),
    }
    pixels = render(lesion, size)
    if is_labelled:
        return Lesson(pixels, ((QUESTION, reasoning_trace(what, lesion.label)),), aspects, LABELLED_SYSTEM)
    if rng.random() < 0.3:
        return Lesson(pixels, ((_SENTENCE, caption(what, rng.randrange(2**16))),), aspects)
    rest = f"size: {what.size}; surface: {what.surface}; skin: {skin_words(what.skin_tone)}"
    return Lesson(pixels, ((_LIST, reasoning(what)), (_REST, rest)), aspects)


def picture_lesson(picture: Picture, size: int, rng: np.random.Generator) -> Lesson:
    """A plain picture: its contents as a list."""
    seen = asdict(picture)
    answer = "; ".join(f"{heading}: {word}" for heading, word in seen.items())
    return Lesson(paint(picture, size, rng), ((_PLAIN, answer),), {key: (word,) for key, word in seen.items()})


def make_lessons(seed: int, size: int, num_lesions: int, num_pictures: int, num_labelled: int) -> list[Lesson]:
    """Lessons in random order; labelled ones come on top of the others, with lesions of their own."""
    rng, noise = random.Random(f"lessons {seed}"), np.random.default_rng([seed, 0])
    lessons = [picture_lesson(draw_picture(seed, index), size, noise) for index in range(num_pictures)]
    for index in range(num_lesions + num_labelled):
        lesion = draw_lesion(FIRST_SEED + seed, "train", index, DIFFICULTY)
        lessons.append(lesion_lesson(lesion, size, index >= num_lesions, rng))
    rng.shuffle(lessons)
    return lessons
