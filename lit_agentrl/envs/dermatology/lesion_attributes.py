"""Synthetic lesions as facts: which clinical attributes a picture is to show, drawn from its seed, split and number."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from lit_agentrl.envs.dermatology.lesion_classes import IMPLIED_COLOURS, LESION_LABELS, PROFILES, Profile
from lit_agentrl.envs.seeded import SPLITS
from lit_agentrl.errors import UserError
from lit_agentrl.types import Split

Difficulty = Literal["easy", "medium", "hard"]
MOST_SEEDS = 2**32
"""A seed is one 32-bit word of the pictures' key: larger ones could meet another picture's."""
T = TypeVar("T")


@dataclass(frozen=True)
class LesionAttributes:
    """What a dermatologist would say of the lesion. True of the picture by construction, whatever the label."""

    colours: tuple[str, ...]
    """Of `COLOURS`: the body's first, then what the structures bring."""
    structures: tuple[str, ...]
    """Of `STRUCTURES`, the most prominent first."""
    border: str
    symmetry: str
    size: str
    surface: str
    skin_tone: int
    """Fitzpatrick's type, 1 (light) to 6 (dark)."""


@dataclass(frozen=True)
class View:
    """How the picture was taken, which says nothing of the disease. Strengths are 0 (none) to about 1."""

    contrast: float
    """How much of the difference between lesion and skin is left, 0 to 1."""
    visibility: float
    """How clearly structures stand out, 0 to 1."""
    offset: tuple[float, float]
    """Of the lesion's centre from the picture's, right and down, as shares of its side."""
    shading: float
    """Of the light from one side."""
    white_balance: tuple[float, float, float]
    """Gain of red, green and blue."""
    vignette: float
    noise: float
    """Standard deviation, in grey levels of 255."""
    num_hairs: int
    has_ruler: bool
    is_blurred: bool


@dataclass(frozen=True)
class Lesion:
    """One synthetic lesion: everything that its picture is drawn from."""

    label: str
    attributes: LesionAttributes
    view: View
    key: tuple[int, int, int]
    """Seed, number of the split, number in the split: where the pixels' randomness comes from."""


@dataclass(frozen=True)
class Grade:
    """What makes a task hard: attributes borrowed from a disease that looks alike, and bad pictures."""

    borrowed: float
    """Probability that an attribute comes from a mimic of the disease."""
    contrast: tuple[float, float]
    visibility: tuple[float, float]
    nuisance: float
    """0 to 1: strength of light, colour cast, vignette, noise, hair."""


GRADES: Mapping[Difficulty, Grade] = {
    "easy": Grade(0.0, (0.9, 1.0), (0.85, 1.0), 0.15),
    "medium": Grade(0.25, (0.7, 1.0), (0.6, 1.0), 0.5),
    "hard": Grade(0.45, (0.5, 0.9), (0.4, 0.9), 1.0),
}


def draw_lesion(seed: int, split: Split, index: int, difficulty: Difficulty = "easy") -> Lesion:
    """The lesion of this number: a pure function, and every seven numbers in a row from 0 hold every disease once.

    Raises:
        UserError: The seed or the number is out of range, or the difficulty or split unknown.
    """
    check_draw(seed, difficulty)
    if split not in SPLITS or not 0 <= index < MOST_SEEDS:
        raise UserError(f"split={split!r}, index={index}: give one of {', '.join(SPLITS)} and a number from 0.")
    block = random.Random(f"synthetic lesions {seed} {split} {index // len(LESION_LABELS)}")
    label = block.sample(LESION_LABELS, len(LESION_LABELS))[index % len(LESION_LABELS)]
    rng = random.Random(f"synthetic lesion {seed} {split} {index} {difficulty}")
    grade = GRADES[difficulty]
    attributes = _attributes(rng, label, grade)
    return Lesion(label, attributes, _view(rng, grade), (seed, SPLITS.index(split), index))


def check_draw(seed: int, difficulty: str) -> None:
    """Refuse what no lesion can be drawn from.

    Raises:
        UserError: The seed is out of range or the difficulty unknown.
    """
    if not 0 <= seed < MOST_SEEDS:
        raise UserError(f"seed={seed} is out of range: allowed are 0 to {MOST_SEEDS - 1}.")
    if difficulty not in GRADES:
        raise UserError(f"difficulty={difficulty!r} is unknown; allowed are {', '.join(GRADES)}.")


def _attributes(rng: random.Random, label: str, grade: Grade) -> LesionAttributes:
    def look() -> Profile:
        """The disease whose habits the next attribute follows."""
        return PROFILES[rng.choice(PROFILES[label].mimics) if rng.random() < grade.borrowed else label]

    colours, structures = _weighted(rng, look().colours), _weighted(rng, look().structures)
    implied = [IMPLIED_COLOURS[name] for name in structures if name in IMPLIED_COLOURS]
    return LesionAttributes(
        colours=tuple(dict.fromkeys([*colours, *implied])),
        structures=structures,
        border=_weighted(rng, look().border),
        symmetry=_weighted(rng, look().symmetry),
        size=_weighted(rng, look().size),
        surface=_weighted(rng, look().surface),
        skin_tone=rng.randint(1, 6),
    )


def _weighted(rng: random.Random, weights: Mapping[T, float]) -> T:
    return rng.choices(list(weights), list(weights.values()))[0]


def _view(rng: random.Random, grade: Grade) -> View:
    bad = grade.nuisance
    cast = [1 + rng.uniform(-0.12, 0.12) * bad for _ in range(3)]
    return View(
        contrast=rng.uniform(*grade.contrast),
        visibility=rng.uniform(*grade.visibility),
        offset=(rng.uniform(-0.1, 0.1) * bad, rng.uniform(-0.1, 0.1) * bad),
        shading=rng.uniform(0, 0.3) * bad,
        white_balance=(cast[0], cast[1], cast[2]),
        vignette=rng.uniform(0, 0.5) * bad,
        noise=1.0 + rng.uniform(0, 7) * bad,
        num_hairs=rng.randint(3, 14) if rng.random() < 0.5 * bad else 0,
        has_ruler=rng.random() < 0.25 * bad,
        is_blurred=rng.random() < 0.4 * bad,
    )
