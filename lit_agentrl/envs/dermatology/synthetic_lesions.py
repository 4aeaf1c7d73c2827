"""Synthetic lesions as a source of images: drawn when they are shown, with no file and no download.

They are synthetic: made to train and to test pipelines. What a model learns on them says nothing about patients.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from lit_agentrl.envs.dermatology.lesion_attributes import Difficulty, Lesion, check_draw, draw_lesion
from lit_agentrl.envs.dermatology.lesion_classes import LESION_LABELS
from lit_agentrl.envs.dermatology.lesion_render import check_size, render
from lit_agentrl.envs.dermatology.lesion_text import caption, reasoning
from lit_agentrl.envs.dermatology.samples import ImageSource, Sample
from lit_agentrl.envs.seeded import SeededTasks
from lit_agentrl.images import Image
from lit_agentrl.types import Split

PREFIX = "synthetic"


class SyntheticLesions(ImageSource):
    """Pictures of lesions with known attributes; those of a split depend on seed, number, difficulty and size alone.

    Every seven in a row are of all seven diseases.

    Args:
        num_train: Pictures to train on.
        num_val: Pictures to choose by.
        num_test: Pictures to report.
        difficulty: How far the diseases' attributes overlap, and how bad the pictures are.
        size: Their side in pixels.
        seed: Other seeds give other lesions.

    Raises:
        UserError: A number is out of range or the difficulty unknown.
    """

    def __init__(
        self,
        num_train: int = 700,
        num_val: int = 70,
        num_test: int = 210,
        difficulty: Difficulty = "medium",
        size: int = 112,
        seed: int = 0,
    ) -> None:
        check_draw(seed, difficulty)
        check_size(size)
        self.tasks = SeededTasks(num_train, num_val, num_test)
        self.difficulty, self.size, self.seed = difficulty, size, seed

    @property
    def labels(self) -> Sequence[str]:
        """The seven diseases."""
        return LESION_LABELS

    def samples(self, split: Split) -> Sequence[Sample]:
        """The split's lesions, in order; `findings` are the attributes that each picture shows."""
        return [self._sample(split, number) for number in range(len(self.tasks.ids(split)))]

    def lesion(self, split: Split, number: int) -> Lesion:
        """The lesion of this number in its split.

        Raises:
            UserError: The split has no such number.
        """
        self.tasks.seed(f"{split}-{number}")
        return draw_lesion(self.seed, split, number, self.difficulty)

    def lesions(self, split: Split) -> list[Lesion]:
        """The split's lesions, in the order of its samples."""
        return [self.lesion(split, number) for number in range(len(self.tasks.ids(split)))]

    def draw(self, lesion: Lesion) -> Image:
        """The lesion's picture, [size, size, 3]."""
        return render(lesion, self.size)

    def captioned(self, split: Split) -> list[tuple[Sample, str]]:
        """The split's samples, each with a sentence that says what is to be seen, and not the disease."""
        return [
            (sample, caption(lesion.attributes, self.seed))
            for sample, lesion in zip(self.samples(split), self.lesions(split), strict=True)
        ]

    def _sample(self, split: Split, number: int) -> Sample:
        lesion = self.lesion(split, number)
        return Sample(
            id=f"{PREFIX}-{split}-{number}",
            image=partial(render, lesion, self.size),
            label=lesion.label,
            split=split,
            findings=reasoning(lesion.attributes),
        )
