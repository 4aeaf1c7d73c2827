"""The projector's first step: patches are moved to where the language model keeps the words for what they show.

Without it an image would be noise to the language model, and a short training would be spent on finding this out. For
each heading (colour, border, ...) the words of all lessons compete: a word's score is the mean over patches of the
product of the projected patch and the word's embedding, both relative to the mean embedding. The language model itself
is not run, so thousands of images take seconds.

Legend: N images, P patches, D features, E the language model's width, W words of a heading.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lit_agentrl.vlm.lessons import Lesson

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

BATCH, LEARNING_RATE = 32, 1e-3
PATCHES = 16
"""Of an image's patches, drawn anew at every update."""
SHARPNESS = 20.0
"""Scores of directions are cosines; times this they are logits."""
LENGTH_WEIGHT = 0.3
AROUND = frozenset({"background", "skin"})
"""Headings that share their words with others and are about something else: moved there too, patches would mix both."""


class Vocabulary:
    """The words of lessons with their directions in the language model's embeddings.

    Args:
        lessons: say which words there are.
        embeddings: [V, E] of the language model.
        tokenizer: splits words into its tokens.
    """

    def __init__(self, lessons: Sequence[Lesson], embeddings: Tensor, tokenizer: PreTrainedTokenizerBase) -> None:
        self.mean = embeddings.mean(0)
        self.length = (embeddings - self.mean).norm(dim=1).mean()
        """Of a usual word's embedding, from the mean."""
        words: dict[str, set[str]] = {}
        for lesson in lessons:
            for heading, shown in lesson.aspects.items():
                if heading not in AROUND:
                    words.setdefault(heading, set()).update(shown)
        self.words = {heading: sorted(words[heading]) for heading in sorted(words)}
        self.directions = {
            heading: torch.stack([self._direction(word, embeddings, tokenizer) for word in shown])
            for heading, shown in self.words.items()
        }
        """[W, E] by heading, of length 1."""

    def _direction(self, word: str, embeddings: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        ids = cast("list[int]", tokenizer(" " + word, add_special_tokens=False)["input_ids"])
        return nn.functional.normalize(embeddings[ids].mean(0) - self.mean, dim=0)

    def targets(self, lessons: Sequence[Lesson], heading: str) -> Tensor:
        """[N, W], 1 for what is true; rows of -1 for lessons without the heading."""
        words = self.words[heading]
        return torch.tensor(
            [
                [float(word in lesson.aspects[heading]) if heading in lesson.aspects else -1.0 for word in words]
                for lesson in lessons
            ]
        )


def standardise(projector: nn.Module, features: Tensor) -> None:
    """Put the scale of each input feature into the projector's first layer: the encoder's layers differ 50-fold."""
    first = cast(nn.Linear, projector.linear_1)
    flat = features[:: max(1, len(features) // 256)].float().flatten(0, 1)
    mean, deviation = flat.mean(0), flat.std(0) + 1e-6
    with torch.no_grad():
        first.weight.div_(deviation)
        first.bias.sub_(first.weight @ mean)


def learn_words(
    vlm: LlavaForConditionalGeneration,
    features: Tensor,
    lessons: Sequence[Lesson],
    vocabulary: Vocabulary,
    epochs: int,
    generator: torch.Generator,
) -> float:
    """Train the projector on features [N, P, D] of the lessons' images; gives the loss of the last epoch."""
    projector = vlm.model.multi_modal_projector
    standardise(projector, features)
    targets = {heading: vocabulary.targets(lessons, heading) for heading in vocabulary.words}
    optimizer = torch.optim.AdamW(projector.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    steps = epochs * -(-len(lessons) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=max(steps, 2))
    total = 0.0
    for _ in range(epochs):
        total, order = 0.0, torch.randperm(len(lessons), generator=generator)
        for rows in order.split(BATCH):  # type: ignore[no-untyped-call]  # torch's
            patches = torch.rand(len(rows), features.shape[1], generator=generator).argsort(1)[:, :PATCHES]
            projected = projector(features[rows[:, None], patches].float()) - vocabulary.mean
            loss = _word_loss(projected, vocabulary, {name: value[rows] for name, value in targets.items()})
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch's
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(rows)
    return total / len(lessons)


def _word_loss(projected: Tensor, vocabulary: Vocabulary, targets: dict[str, Tensor]) -> Tensor:
    """Mean over headings of the cross entropy of their words, and what keeps patches as long as words are.

    Args:
        projected: [N, P, E] patches, relative to the mean embedding.
        vocabulary: the words.
        targets: [N, W] by heading.
    """
    lengths = projected.norm(dim=2) / vocabulary.length
    shown = projected.mean(1) * (SHARPNESS / vocabulary.length)
    losses = [LENGTH_WEIGHT * (lengths - 1).square().mean()]
    for heading, directions in vocabulary.directions.items():
        asked = targets[heading][:, 0] >= 0
        if not asked.any():
            continue
        truth = targets[heading][asked]
        losses.append(cross_entropy(shown[asked] @ directions.T, truth / truth.sum(1, keepdim=True)))
    return torch.stack(losses).sum()
