"""The picture of a synthetic lesion: skin, body, structures, and what a camera adds. numpy only."""

from __future__ import annotations

from typing import Any

import numpy as np

from lit_agentrl.envs.dermatology.lesion_attributes import Lesion, LesionAttributes, View
from lit_agentrl.envs.dermatology.lesion_camera import photograph
from lit_agentrl.envs.dermatology.lesion_canvas import RADII, Canvas, Colour, Field, make_outline, ramp
from lit_agentrl.envs.dermatology.lesion_classes import IMPLIED_COLOURS
from lit_agentrl.envs.dermatology.lesion_structures import draw_structures
from lit_agentrl.errors import UserError

SIZES_OF_PICTURES = (32, 1024)
"""The smallest and the largest side, in pixels; structures need about 100 to be seen."""
SKIN: tuple[Colour, ...] = (
    (243, 217, 200), (232, 198, 174), (216, 176, 146), (186, 142, 110), (142, 102, 76), (100, 70, 54),
)  # fmt: skip
"""Of Fitzpatrick's types 1 to 6."""
PIGMENT: dict[str, Colour] = {
    "tan": (196, 150, 104), "brown": (140, 90, 56), "dark brown": (86, 52, 34), "black": (36, 26, 26),
    "pink": (226, 148, 142), "red": (196, 62, 62), "purple": (124, 44, 84), "blue-grey": (104, 114, 138),
    "white": (236, 226, 218), "yellow": (232, 212, 150),
}  # fmt: skip
"""On light skin; darker skin darkens them."""
EDGE = {"regular": 0.09, "irregular": 0.07, "sharp": 0.03, "rolled": 0.06, "fading": 0.3, "ill-defined": 0.42}
"""Width of the rim over which the lesion fades into the skin, in radii."""


def render(lesion: Lesion, size: int = 112) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The picture, [size, size, 3] uint8: a pure function of the lesion and the size.

    Raises:
        UserError: The size is out of range.
    """
    check_size(size)
    what, view = lesion.attributes, lesion.view
    rng = np.random.default_rng(lesion.key)
    centre = (0.5 + view.offset[0], 0.5 + view.offset[1])
    outline = make_outline(rng, what.symmetry, what.border)
    canvas = Canvas(size, RADII[what.size] * rng.uniform(0.92, 1.08), centre, outline, rng)
    _skin(canvas, what)
    _body(canvas, what, view)
    draw_structures(canvas, what.structures, view.visibility)
    _surface(canvas, what)
    canvas.rng = np.random.default_rng([*lesion.key, 1])  # its own: what the lesion looks like moves no hair
    photograph(canvas, view)
    levels = (np.clip(canvas.pixels, 0, 255) + np.float32(0.5)).astype(np.uint8)
    return np.ascontiguousarray(levels.transpose(1, 2, 0))


def check_size(size: int) -> None:
    """Refuse sides that no picture has.

    Raises:
        UserError: The size is out of range.
    """
    low, high = SIZES_OF_PICTURES
    if not low <= size <= high:
        raise UserError(f"size={size} is out of range: allowed are {low} to {high} pixels.")


def _skin(canvas: Canvas, what: LesionAttributes) -> None:
    """Skin of the type, blotchy and finely lined."""
    tone = np.asarray(SKIN[what.skin_tone - 1], np.float32) * canvas.rng.uniform(0.96, 1.04, 3).astype(np.float32)
    mottle = 1 + 0.02 * canvas.noise(4) + 0.014 * canvas.noise(50)
    canvas.pixels[:] = tone[:, None, None] * mottle
    canvas.shade = float(SKIN[what.skin_tone - 1][0] / SKIN[0][0]) ** 0.35


def _body(canvas: Canvas, what: LesionAttributes, view: View) -> None:
    """The lesion in its colours: rings where it is symmetric, patches to the sides where it is not."""
    canvas.body = canvas.within(0.0, EDGE[what.border])
    base = [name for name in what.colours if name not in _implied(what)]
    colours = [_on_skin(name, what.skin_tone, view.contrast) for name in base]
    shares = [_share(canvas, what.symmetry, number) for number in range(1, len(colours))]
    light = 1 + 0.06 * canvas.noise(9)
    if what.symmetry == "asymmetric":  # of colour too: one half is darker
        turn = canvas.rng.uniform(0, 2 * np.pi)
        light = light + 0.14 * (canvas.x * np.float32(np.cos(turn)) + canvas.y * np.float32(np.sin(turn)))
    for channel, plane in enumerate(canvas.pixels):
        surface = np.full_like(plane, colours[0][channel])
        for share, colour in zip(shares, colours[1:], strict=True):
            surface += share * (colour[channel] - surface)
        plane += canvas.body * (surface * light - plane)


def _share(canvas: Canvas, symmetry: str, number: int) -> Field:
    """[H, W], where the next colour lies."""
    if symmetry == "symmetric":
        middle = ramp(canvas.inside + 0.06 * canvas.noise(9), 0.3, 0.55)
        return middle if number % 2 else ramp(-canvas.inside, -0.3, -0.1)
    x, y = canvas.points(1, 0.8, False)[0].tolist()
    return canvas.blob(x, y, canvas.rng.uniform(0.45, 0.65), 0.2, 0.12)


def _on_skin(name: str, skin_tone: int, contrast: float) -> Field:
    """[3], the colour as it shows through skin of this type; pigment darkens with the skin, blood less so."""
    skin, light_skin = np.asarray(SKIN[skin_tone - 1]), np.asarray(SKIN[0])
    depth = 0.85 if name in ("tan", "brown", "dark brown", "black") else 0.5
    colour = np.asarray(PIGMENT[name]) * np.power(skin / light_skin, depth)
    shown: Field = (skin + contrast * (colour - skin)).astype(np.float32)
    return shown


def _implied(what: LesionAttributes) -> set[str]:
    """Colours that structures bring along, drawn with them."""
    return {IMPLIED_COLOURS[name] for name in what.structures if name in IMPLIED_COLOURS}


def _surface(canvas: Canvas, what: LesionAttributes) -> None:
    """How light falls on the lesion: bumps of a rough one, the dull relief of a waxy one, a shining one's glints."""
    if what.surface == "rough":
        canvas.pixels *= 1 + 0.07 * canvas.noise(60) * canvas.body
    elif what.surface == "waxy":
        relief = canvas.noise(20)
        slope = np.clip(relief - np.roll(relief, 2, axis=(0, 1)), -1.5, 1.5) * np.float32(canvas.size / 112)
        canvas.pixels *= 1 + 0.16 * slope * canvas.body
    elif what.surface == "shiny":
        places = canvas.points(4, 0.6, False)
        canvas.blend((255, 250, 246), canvas.spots(places, canvas.rng.uniform(0.06, 0.13, 4).tolist(), 0.9) * 0.55)
    if what.border == "rolled":
        ring = ramp(canvas.inside, -0.02, 0.06) * ramp(-canvas.inside, -0.2, -0.08)
        canvas.blend((250, 224, 216), ring * np.float32(0.6))
