"""Pictures of small games, drawn with numpy: letters of 5 x 7 pixels, tiles of 8 x 8, playing cards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from lit_agentrl.errors import UserError

ObservationKind = Literal["text", "image"]
Image = np.ndarray[Any, np.dtype[np.uint8]]
"""[H, W, 3] uint8."""
Colour = tuple[int, int, int]

WHITE, BLACK, RED, GREEN, BLUE = (255, 255, 255), (0, 0, 0), (200, 30, 30), (53, 101, 77), (40, 70, 200)

# Five columns a letter, from the left; a column is a number whose lowest bit is its top pixel.
_FONT = {
    "0": "3e5149453e", "1": "00427f4000", "2": "4261514946", "3": "2141454b31", "4": "1814127f10", "5": "2745454539",
    "6": "3c4a494930", "7": "0171090503", "8": "3649494936", "9": "064949291e", "A": "7e1111117e", "J": "2040413f01",
    "Q": "3e4151215e", "K": "7f08142241", "+": "08083e0808", "-": "0808080808", "*": "14083e0814", "/": "2010080402",
    "(": "001c224100", ")": "0041221c00", "=": "1414141414", "?": "0201510906", " ": "0000000000",
}  # fmt: skip
# One character a pixel: `.` is the ground, the others are named in `_COLOURS`.
_TILES = {
    "#": "BBBmBBBB BBBmBBBB BBBmBBBB mmmmmmmm BBBBBBmB BBBBBBmB BBBBBBmB mmmmmmmm",
    "_": "........ ........ ........ ........ ........ ........ ........ ........",
    "O": "........ ...rr... ..r..r.. .r.rr.r. .r.rr.r. ..r..r.. ...rr... ........",
    "X": "oooooooo oyyyyyyo oyoyyoyo oyyooyyo oyyooyyo oyoyyoyo oyyyyyyo oooooooo",
    "√": "rrrrrrrr ryyyyyyr ryryyryr ryyrryyr ryyrryyr ryryyryr ryyyyyyr rrrrrrrr",
    "P": "...gg... ..gggg.. ...gg... .gggggg. g.gggg.g ..gggg.. ..g..g.. .gg..gg.",
    "S": "r..gg..r ..gggg.. ...gg... .gggggg. g.gggg.g ..gggg.. ..g..g.. rgg..ggr",
}
_COLOURS: dict[str, Colour] = {
    ".": (40, 36, 34), "B": (150, 75, 50), "m": (90, 60, 50), "r": (230, 40, 40), "o": (120, 80, 20),
    "y": (215, 165, 60), "g": (90, 220, 90),
}  # fmt: skip


def check_observation(observation: str) -> None:
    """Refuse an unknown kind of observation.

    Raises:
        UserError: It is neither `text` nor `image`.
    """
    if observation not in ("text", "image"):
        raise UserError(f"observation={observation!r} is unknown; allowed are 'text' and 'image'.")


def draw_tiles(rows: Sequence[str], scale: int) -> Image:
    """A board, [rows * 8 * scale, columns * 8 * scale, 3]: each symbol a tile."""
    pixels = np.concatenate([np.concatenate([_tile(symbol) for symbol in row], axis=1) for row in rows])
    return _enlarge(pixels, scale)


def draw_text(text: str, ink: Colour, ground: Colour, scale: int) -> Image:
    """One line, [9 * scale, (6 * letters + 1) * scale, 3]."""
    pixels = np.empty((9, 6 * len(text) + 1, 3), dtype=np.uint8)
    pixels[:] = ground
    for number, letter in enumerate(text):
        for x, column in enumerate(bytes.fromhex(_FONT[letter])):
            for y in range(7):
                if column >> y & 1:
                    pixels[1 + y, 1 + 6 * number + x] = ink
    return _enlarge(pixels, scale)


def draw_cards(ranks: Sequence[str], scale: int, columns: int) -> Image:
    """Cards on green, [17 * scale * rows, 17 * scale * columns, 3]; each with its rank, "?" face down."""
    rows = -(-len(ranks) // columns)
    table = np.empty((17 * scale * rows, 17 * scale * columns, 3), dtype=np.uint8)
    table[:] = GREEN
    for number, rank in enumerate(ranks):
        top, left = (17 * scale * line for line in divmod(number, columns))
        table[top : top + 17 * scale, left : left + 17 * scale] = _card(rank, scale)
    return table


def stack(parts: Sequence[Image], ground: Colour, margin: int) -> Image:
    """The parts below one another, left-aligned, with a margin of pixels around each."""
    width = max(part.shape[1] for part in parts) + 2 * margin
    height = sum(part.shape[0] for part in parts) + margin * (len(parts) + 1)
    canvas = np.empty((height, width, 3), dtype=np.uint8)
    canvas[:] = ground
    top = margin
    for part in parts:
        canvas[top : top + part.shape[0], margin : margin + part.shape[1]] = part
        top += part.shape[0] + margin
    return canvas


def _tile(symbol: str) -> Image:
    return np.array([[_COLOURS[pixel] for pixel in row] for row in _TILES[symbol].split()], dtype=np.uint8)


def _card(rank: str, scale: int) -> Image:
    ink, ground = (WHITE, BLUE) if rank == "?" else (BLACK, WHITE)
    face = draw_text(rank, ink, ground, scale)
    card = np.empty((17 * scale, 17 * scale, 3), dtype=np.uint8)
    card[:] = GREEN
    card[scale:-scale, scale:-scale] = ground
    top, left = (card.shape[0] - face.shape[0]) // 2, (card.shape[1] - face.shape[1]) // 2
    card[top : top + face.shape[0], left : left + face.shape[1]] = face
    return card


def _enlarge(pixels: Image, scale: int) -> Image:
    return pixels.repeat(scale, axis=0).repeat(scale, axis=1)
