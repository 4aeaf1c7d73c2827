"""What is in a photograph of a lesion beside the lesion: hair, a ruler, light, colour cast, blur and noise."""

from __future__ import annotations

import numpy as np

from lit_agentrl.envs.dermatology.lesion_attributes import View
from lit_agentrl.envs.dermatology.lesion_canvas import Canvas

MILLIMETRES = 14
"""The side of a picture: a ruler's marks are one apart."""


def photograph(canvas: Canvas, view: View) -> None:
    """Turn the drawn lesion into a photograph, in place."""
    if view.num_hairs:
        _hair(canvas, view.num_hairs)
    if view.has_ruler:
        _ruler(canvas)
    if view.is_blurred:
        _blur(canvas)
    _light(canvas, view)
    canvas.pixels += np.float32(view.noise) * canvas.grain()


def _hair(canvas: Canvas, count: int) -> None:
    """Dark bent hairs across the picture, mostly in one direction."""
    t = np.linspace(0, 1, 2 * canvas.size, dtype=np.float32)[:, None]
    main, alpha = canvas.rng.uniform(0, np.pi), np.zeros_like(canvas.r)
    for _ in range(count):
        turn = main + canvas.rng.normal(0, 0.5)
        along, across = np.array([np.cos(turn), np.sin(turn)]), np.array([-np.sin(turn), np.cos(turn)])
        middle = canvas.rng.uniform(-2.2, 2.2) * across
        length, bend = canvas.rng.uniform(1.2, 3.0), canvas.rng.uniform(-1.2, 1.2)
        start, end, pull = middle - length * along, middle + length * along, middle + bend * across
        path = ((1 - t) ** 2 * start + 2 * t * (1 - t) * pull + t * t * end).astype(np.float32)
        hair = canvas.stroke(path, canvas.size / 112 * canvas.rng.uniform(0.5, 1.2))
        np.maximum(alpha, hair, out=alpha)
    canvas.blend((38, 28, 24), alpha * np.float32(0.85))


def _ruler(canvas: Canvas) -> None:
    """Black marks along the lower edge, one a millimetre, each fifth longer."""
    step, thick = canvas.size / MILLIMETRES, max(canvas.size // 112, 1)
    for number in range(1, MILLIMETRES):
        column, height = int(number * step), int(canvas.size * (0.07 if number % 5 == 0 else 0.045))
        canvas.pixels[:, -height:, column : column + thick] *= np.float32(0.2)


def _blur(canvas: Canvas) -> None:
    """A blur of three pixels of 112, by two passes along each axis."""
    for axis in (1, 2):
        for _ in range(max(canvas.size // 112, 1)):
            before, after = np.roll(canvas.pixels, 1, axis), np.roll(canvas.pixels, -1, axis)
            canvas.pixels = (before + 2 * canvas.pixels + after) * np.float32(0.25)


def _light(canvas: Canvas, view: View) -> None:
    """Light from one side, dark corners, a colour cast."""
    turn = canvas.rng.uniform(0, 2 * np.pi)
    line = np.linspace(-1, 1, canvas.size, dtype=np.float32)
    x, y = line[None, :], line[:, None]
    light = 1 + np.float32(view.shading) * (x * np.float32(np.cos(turn)) + y * np.float32(np.sin(turn)))
    light = light * (1 - np.float32(view.vignette) * ((x * x + y * y) * np.float32(0.5)) ** 2)
    for plane, gain in zip(canvas.pixels, view.white_balance, strict=True):
        plane *= light * np.float32(gain)
