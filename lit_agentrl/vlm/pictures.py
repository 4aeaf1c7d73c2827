"""Plain pictures with known contents to learn words by: coloured shapes, how many and where. numpy only."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (205, 45, 45), "pink": (232, 150, 160), "orange": (235, 140, 40), "yellow": (235, 215, 70),
    "green": (60, 150, 70), "blue": (50, 90, 200), "purple": (125, 55, 145), "brown": (125, 80, 50),
    "black": (25, 25, 28), "grey": (128, 128, 132), "white": (245, 245, 242),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "ring", "cross")
NUMBERS = ("one", "two", "three", "four")
PLACES: Mapping[str, tuple[float, float]] = {
    "left": (0.27, 0.5), "right": (0.73, 0.5), "top": (0.5, 0.27), "bottom": (0.5, 0.73), "middle": (0.5, 0.5)
}  # fmt: skip
"""Middle of the group, right and down, as shares of the side."""

_OFFSETS = {
    "one": ((0.0, 0.0),),
    "two": ((-0.13, 0.0), (0.13, 0.0)),
    "three": ((0.0, -0.12), (-0.13, 0.1), (0.13, 0.1)),
    "four": ((-0.12, -0.12), (0.12, -0.12), (-0.12, 0.12), (0.12, 0.12)),
}


@dataclass(frozen=True)
class Picture:
    """What a picture shows; its own fields are its headings."""

    colour: str
    shape: str
    number: str
    place: str
    background: str


def draw_picture(seed: int, index: int) -> Picture:
    """The picture of this number: a pure function."""
    rng = random.Random(f"plain picture {seed} {index}")
    colour, background = rng.sample(sorted(COLOURS), 2)
    return Picture(colour, rng.choice(SHAPES), rng.choice(NUMBERS), rng.choice(sorted(PLACES)), background)


def paint(picture: Picture, size: int, rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The pixels, [size, size, 3]; `rng` moves and turns the shapes a little and adds noise."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    y, x = np.meshgrid(axis, axis, indexing="ij")
    cover = np.zeros((size, size), np.float32)
    middle = np.asarray(PLACES[picture.place]) + rng.uniform(-0.04, 0.04, 2)
    radius = rng.uniform(0.085, 0.11) if picture.number != "one" else rng.uniform(0.12, 0.19)
    for offset in _OFFSETS[picture.number]:
        centre = middle + np.asarray(offset) + rng.uniform(-0.01, 0.01, 2)
        turn = rng.uniform(-0.25, 0.25)
        u = ((x - centre[0]) * np.cos(turn) + (y - centre[1]) * np.sin(turn)) / radius
        v = ((y - centre[1]) * np.cos(turn) - (x - centre[0]) * np.sin(turn)) / radius
        cover = np.maximum(cover, np.clip(_inside(picture.shape, u, v) * radius * size + 0.5, 0, 1))
    ground, colour = (np.asarray(COLOURS[name], np.float32) for name in (picture.background, picture.colour))
    pixels = ground + cover[..., None] * (colour - ground)
    pixels = pixels * rng.uniform(0.9, 1.05) + rng.normal(0, 4, (size, size, 3)).astype(np.float32)
    return np.asarray(np.clip(pixels, 0, 255) + 0.5, dtype=np.uint8)


def _inside(shape: str, u: np.ndarray[Any, Any], v: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """How far points lie inside the shape's outline, in radii; negative outside."""
    distance = np.hypot(u, v)
    if shape == "circle":
        return np.asarray(1 - distance)
    if shape == "square":
        return np.asarray(0.9 - np.maximum(np.abs(u), np.abs(v)))
    if shape == "ring":
        return np.asarray(0.28 - np.abs(distance - 0.75))
    if shape == "cross":
        across, along = np.minimum(np.abs(u), np.abs(v)), np.maximum(np.abs(u), np.abs(v))
        return np.asarray(np.minimum(0.3 - across, 1 - along))
    sides = (v, 0.866 * u - 0.5 * v, -0.866 * u - 0.5 * v)  # a triangle that points up
    return np.asarray(0.55 - np.maximum(np.maximum(*sides[:2]), sides[2]))
