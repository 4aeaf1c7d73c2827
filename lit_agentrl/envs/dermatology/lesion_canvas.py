"""The canvas of a synthetic lesion: coordinates, smooth random fields, outlines, spots and strokes, in plain numpy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

Field = np.ndarray[Any, np.dtype[np.float32]]
"""[H, W], or as said, float32."""
Colour = tuple[float, float, float]
NUM_ANGLES = 1440
"""Entries of an outline: a third of a pixel apart at the largest lesion of a 224-pixel picture."""
RADII = {"small": 0.2, "medium": 0.28, "large": 0.36}
"""Mean radius of a lesion, as a share of the picture's side."""


class Canvas:
    """A picture being drawn. Lengths are in units of the lesion's mean radius, from its centre.

    Args:
        size: Side of the picture in pixels.
        radius: Of the lesion, as a share of the side.
        centre: Of the lesion, right and down, as shares of the side.
        outline: [NUM_ANGLES] the lesion's radius in each direction, about 1.
        rng: Where all that is random comes from.
    """

    def __init__(
        self, size: int, radius: float, centre: tuple[float, float], outline: Field, rng: np.random.Generator
    ) -> None:
        self.size, self.scale, self.centre, self.outline, self.rng = size, radius * size, centre, outline, rng
        line = (np.arange(size, dtype=np.float32) + 0.5) / np.float32(size)
        self.x = np.broadcast_to((line - np.float32(centre[0]))[None, :] / np.float32(radius), (size, size))
        self.y = np.broadcast_to((line - np.float32(centre[1]))[:, None] / np.float32(radius), (size, size))
        self.r = np.sqrt(self.x * self.x + self.y * self.y)
        turn = np.arctan2(self.y, self.x) * np.float32(NUM_ANGLES / (2 * np.pi))
        self.angle = turn.astype(np.int32) % NUM_ANGLES
        self.inside: Field = outline[self.angle] - self.r
        """[H, W], the way to the outline along the radius: positive within."""
        self.pixels: Field = np.zeros((3, size, size), np.float32)
        """[3, H, W], 0 to 255; colours first, as whole planes are several times faster to work on."""
        self.body: Field = np.zeros((size, size), np.float32)
        """[H, W], 0 to 1: how much of the lesion is at each pixel."""
        self.shade = 1.0
        """What every colour that is laid on is multiplied by: less than 1 on dark skin."""

    def blend(self, colour: Colour, alpha: Field) -> None:
        """Lay a colour over the picture, [H, W] of it."""
        for plane, level in zip(self.pixels, colour, strict=True):
            plane += alpha * (np.float32(level * self.shade) - plane)

    def noise(self, cells: int) -> Field:
        """[H, W], a smooth random field of about unit deviation whose bumps are 1 / `cells` of the side wide."""
        weights = _interpolation(self.size, cells)
        grid = self.rng.standard_normal((cells + 3, cells + 3), np.float32)
        field: Field = np.matmul(np.matmul(weights, grid), weights.T)
        field *= np.float32(1.7)  # B-splines damp the deviation by about that
        return field

    def grain(self) -> Field:
        """[3, H, W], white noise of unit deviation, cheap: a byte each."""
        levels: Field = self.rng.integers(0, 256, self.pixels.shape, np.uint8).astype(np.float32)
        return (levels - np.float32(127.5)) / np.float32(73.9)

    def within(self, depth: float, soft: float) -> Field:
        """[H, W], 0 outside to 1 where the outline is farther than `depth`, over a rim `soft` wide."""
        return ramp(self.inside, depth - soft / 2, depth + soft / 2)

    def blob(self, x: float, y: float, radius: float, soft: float, wobble: float = 0.0) -> Field:
        """[H, W], a patch about a point; `wobble` makes its edge uneven."""
        distance = np.sqrt((self.x - np.float32(x)) ** 2 + (self.y - np.float32(y)) ** 2)
        if wobble:
            distance += np.float32(wobble) * self.noise(9)
        return ramp(-distance, -radius - soft / 2, -radius + soft / 2)

    def points(self, count: int, reach: float, even: bool) -> Field:
        """[count, 2], places within `reach` of the outline: spread evenly, or at random."""
        number = np.arange(count, dtype=np.float32)
        if even:
            share = np.sqrt((number + 0.5) / count)
            turn = number * np.float32(0.381966) + self.rng.random(dtype=np.float32)
            share += self.rng.uniform(-0.06, 0.06, count).astype(np.float32)
        else:
            share = np.sqrt(self.rng.random(count, np.float32))
            turn = self.rng.random(count, np.float32)
        radius = self.outline[(turn * NUM_ANGLES).astype(np.int32) % NUM_ANGLES] * share * np.float32(reach)
        turn = turn * np.float32(2 * np.pi)
        return np.stack([radius * np.cos(turn), radius * np.sin(turn)], axis=1)

    def spots(self, places: Field, radii: Sequence[float], soft: float = 0.5, stretch: float = 1.0) -> Field:
        """[H, W], discs (ellipses where stretched) at places [N, 2]; the outer `soft` share of each fades."""
        alpha = np.zeros((self.size, self.size), np.float32)
        for (x, y), radius in zip(places.tolist(), radii, strict=True):
            radius = max(radius, 0.9 / self.scale)
            reach = radius * stretch * self.scale + 1
            rows, columns = self._window(x, y, reach)
            dx, dy = self.x[rows, columns] - np.float32(x), self.y[rows, columns] - np.float32(y)
            if stretch != 1.0:
                turn = float(self.rng.uniform(0, np.pi))
                dx, dy = (
                    (dx * np.cos(turn) + dy * np.sin(turn)) / stretch,
                    (dy * np.cos(turn) - dx * np.sin(turn)) * stretch,
                )
            disc = ramp(-np.sqrt(dx * dx + dy * dy).astype(np.float32), -radius, -radius * (1 - soft))
            np.maximum(alpha[rows, columns], disc, out=alpha[rows, columns])
        return alpha

    def stroke(self, path: Field, width: float) -> Field:
        """[H, W], a line through the points [N, 2] of a path that is sampled densely; `width` in pixels."""
        alpha = np.zeros((self.size, self.size), np.float32)
        columns = path[:, 0] * self.scale + self.centre[0] * self.size - 0.5
        rows = path[:, 1] * self.scale + self.centre[1] * self.size - 0.5
        reach = int(width / 2 + 1)
        for down in range(-reach, reach + 1):
            for right in range(-reach, reach + 1):
                at_row, at_column = np.rint(rows).astype(np.int32) + down, np.rint(columns).astype(np.int32) + right
                seen = (at_row >= 0) & (at_row < self.size) & (at_column >= 0) & (at_column < self.size)
                at_row, at_column = at_row[seen], at_column[seen]
                distance = np.hypot(at_row - rows[seen], at_column - columns[seen])
                np.maximum.at(alpha, (at_row, at_column), np.clip(width / 2 + 0.5 - distance, 0, 1).astype(np.float32))
        return alpha

    def _window(self, x: float, y: float, reach: float) -> tuple[slice, slice]:
        row, column = y * self.scale + self.centre[1] * self.size, x * self.scale + self.centre[0] * self.size
        return (
            slice(max(int(row - reach), 0), max(int(row + reach) + 1, 0)),
            slice(max(int(column - reach), 0), max(int(column + reach) + 1, 0)),
        )


def ramp(values: Field, low: float, high: float) -> Field:
    """0 up to `low`, 1 from `high`, smooth between."""
    t = np.clip((values - np.float32(low)) * np.float32(1 / (high - low)), 0, 1)
    smooth: Field = t * t * (3 - 2 * t)
    return smooth


def make_outline(rng: np.random.Generator, symmetry: str, border: str) -> Field:
    """[NUM_ANGLES], the radius in each direction: low harmonics break the symmetry, high ones the border."""
    uneven = {"symmetric": 0.02, "slightly asymmetric": 0.075, "asymmetric": 0.15}[symmetry]
    jagged = {
        "regular": 0.004,
        "rolled": 0.01,
        "fading": 0.01,
        "ill-defined": 0.016,
        "sharp": 0.016,
        "irregular": 0.05,
    }[border]
    angle = np.arange(NUM_ANGLES) * (2 * np.pi / NUM_ANGLES)
    stretch = 1 + rng.uniform(0, 0.1) * np.cos(2 * (angle - rng.uniform(0, np.pi)))
    radius = np.ones(NUM_ANGLES)
    for harmonic in (1, 2, 3):
        radius += rng.uniform(0.6, 1.0) * uneven / harmonic**0.5 * np.cos(harmonic * angle + rng.uniform(0, 2 * np.pi))
    for harmonic in range(4, 36):
        swing = jagged * (5 / harmonic) ** 0.9 * rng.standard_normal()
        radius += swing * np.cos(harmonic * angle + rng.uniform(0, 2 * np.pi))
    outline: Field = np.clip(radius * stretch, 0.45, 1.45).astype(np.float32)
    return outline


@lru_cache(maxsize=64)
def _interpolation(size: int, cells: int) -> Field:
    """[size, cells + 3], weights of a uniform cubic B-spline: `weights @ grid` is as smooth as a curve."""
    at = (np.arange(size) + 0.5) / size * cells
    cell = np.minimum(at.astype(int), cells - 1)
    t = at - cell
    basis = [(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]
    weights = np.zeros((size, cells + 3), np.float32)
    for number, weight in enumerate(basis):
        weights[np.arange(size), cell + number] = weight / 6
    return weights
