"""The alignment as a whole: lessons drawn, images encoded, words found, answers learnt."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from lit_agentrl.vlm.align import Material, align
from lit_agentrl.vlm.features import encode
from lit_agentrl.vlm.lessons import make_lessons
from lit_agentrl.vlm.sequences import lesson_sequence
from lit_agentrl.vlm.words import Vocabulary, learn_words

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerBase

    from lit_agentrl.vlm.recipe import Recipe

LABELLED_SHARE = 0.35
"""Of the images of an update, on average, where there are labelled lessons."""


@dataclass(frozen=True)
class Parts:
    """A joined model and what goes with it."""

    vlm: LlavaForConditionalGeneration
    processor: LlavaProcessor
    tokenizer: PreTrainedTokenizerBase


def teach(parts: Parts, recipe: Recipe, generator: torch.Generator, say: Callable[[str], None]) -> None:
    """Train the projector and the language model of `parts` in place; the encoder stays as it is."""
    vlm = parts.vlm
    start = time.process_time()
    lessons = make_lessons(recipe.seed, recipe.image_size, recipe.lesions, recipe.pictures, recipe.labelled)
    say(f"encoding {len(lessons)} images")
    features = encode(vlm, parts.processor, [lesson.pixels for lesson in lessons])
    say(f"moving patches to the words for what they show ({time.process_time() - start:.0f} CPU seconds so far)")
    embeddings = cast("Tensor", vlm.get_input_embeddings().weight).detach()  # type: ignore[no-untyped-call]
    vocabulary = Vocabulary(lessons, embeddings, parts.tokenizer)
    learn_words(vlm, features, lessons, vocabulary, recipe.word_epochs, generator)
    say(f"learning to answer ({time.process_time() - start:.0f} CPU seconds so far)")
    sequences = [lesson_sequence(parts.tokenizer, lesson, features.shape[1]) for lesson in lessons]
    is_labelled = [lesson.system is not None for lesson in lessons]
    align(vlm, Material(features, sequences, _weights(is_labelled)), recipe.steps, generator, say)
    say(f"taught in {time.process_time() - start:.0f} CPU seconds")


def _weights(is_labelled: list[bool]) -> list[float]:
    """How often each lesson comes: the labelled ones have their share, however few they are."""
    few = sum(is_labelled)
    if not 0 < few < len(is_labelled):
        return [1.0] * len(is_labelled)
    return [
        LABELLED_SHARE / few if labelled else (1 - LABELLED_SHARE) / (len(is_labelled) - few)
        for labelled in is_labelled
    ]
