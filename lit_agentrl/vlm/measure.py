"""How much the model sees: its replies about pictures that it was not taught with.

Beside it stands what the same replies are worth for other pictures: a model that does not look would get as much.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from lit_agentrl.envs.dermatology.form import Form
from lit_agentrl.envs.dermatology.lesion_attributes import draw_lesion
from lit_agentrl.envs.dermatology.lesion_classes import LESION_LABELS
from lit_agentrl.envs.dermatology.parser import AnswerParser
from lit_agentrl.vlm.lessons import DIFFICULTY, FIRST_SEED, Lesson, lesion_lesson, picture_lesson
from lit_agentrl.vlm.pictures import draw_picture
from lit_agentrl.vlm.sequences import prompt_ids

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerBase

LONGEST = 64
"""Tokens of a reply."""
CHUNK = 35
LESION_HEADINGS = ("colour", "border", "symmetry", "structure")


@dataclass(frozen=True)
class Seen:
    """A heading's words in replies: the share that is right, for the picture shown and for all others."""

    shown: float
    others: float


@dataclass(frozen=True)
class Measured:
    """What the card of a build states."""

    num_lesions: int
    num_pictures: int
    form: float
    """Share of sampled replies (temperature 1) that have the form `<think>...</think><answer>...</answer>`."""
    sampled_accuracy: float
    """Share of sampled replies that name the disease."""
    greedy_accuracy: float
    lesions: Mapping[str, Seen]
    pictures: Mapping[str, Seen]


def measure(
    vlm: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    size: int,
    number: int,
) -> Measured:
    """The abilities on `number` lesions (a multiple of seven has all diseases alike) and as many plain pictures."""
    rng, noise = random.Random(f"measure {seed}"), np.random.default_rng([seed, 1])
    drawn = [draw_lesion(FIRST_SEED + seed, "test", index, DIFFICULTY) for index in range(number)]
    lesions = [lesion_lesson(lesion, size, True, rng) for lesion in drawn]
    pictures = [picture_lesson(draw_picture(FIRST_SEED + seed, index), size, noise) for index in range(number)]
    greedy = replies(vlm, processor, tokenizer, lesions)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sampled = replies(vlm, processor, tokenizer, lesions, temperature=1.0)
    described = replies(vlm, processor, tokenizer, pictures)
    parser, form = AnswerParser(LESION_LABELS), Form()
    labels = [lesion.label for lesion in drawn]
    return Measured(
        number,
        number,
        _share([form.is_exact(reply) for reply in sampled]),
        _share([parser(reply) == label for reply, label in zip(sampled, labels, strict=True)]),
        _share([parser(reply) == label for reply, label in zip(greedy, labels, strict=True)]),
        {heading: seen(heading, greedy, lesions) for heading in LESION_HEADINGS},
        {heading: seen(heading, described, pictures) for heading in pictures[0].aspects},
    )


@torch.no_grad()
def replies(
    vlm: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    tokenizer: PreTrainedTokenizerBase,
    lessons: Sequence[Lesson],
    temperature: float = 0.0,
) -> list[str]:
    """What the model says to the first question of each lesson; the question is the same for all."""
    ((question, system),) = {(lesson.turns[0][0], lesson.system) for lesson in lessons}
    texts: list[str] = []
    prompt = torch.tensor([prompt_ids(tokenizer, question, system, vlm.config.image_seq_length)])
    for start in range(0, len(lessons), CHUNK):
        images = [lesson.pixels for lesson in lessons[start : start + CHUNK]]
        pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
        ids = prompt.expand(len(images), -1)
        sampling: dict[str, Any] = (
            {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        )
        output = cast(Any, vlm).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            max_new_tokens=LONGEST,
            pad_token_id=tokenizer.pad_token_id,
            **sampling,
        )
        texts += tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return texts


def seen(heading: str, texts: Sequence[str], lessons: Sequence[Lesson]) -> Seen:
    """How much of what the replies say under a heading is right."""
    said = [words_under(heading, text) for text in texts]
    truth = [frozenset(lesson.aspects[heading]) for lesson in lessons]
    table = np.array([[_overlap(words, true) for true in truth] for words in said])
    own = np.diagonal(table)
    return Seen(float(own.mean()), float((table.sum() - own.sum()) / max(1, table.size - len(own))))


def words_under(heading: str, text: str) -> frozenset[str]:
    """The words of `heading: word, word; ...` in a reply."""
    for part in text.replace("<", ";").replace(">", ";").split(";"):
        name, _, words = part.partition(":")
        if name.strip() == heading:
            return frozenset(word.strip() for word in words.split(",")) - {""}
    return frozenset()


def _overlap(said: frozenset[str], true: frozenset[str]) -> float:
    """Words in common over words in all (Jaccard)."""
    return len(said & true) / len(said | true) if said | true else 0.0


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits) if hits else 0.0
