"""Dermoscopic structures, each a function that draws itself on the lesion of a canvas."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from lit_agentrl.envs.dermatology.lesion_canvas import Canvas, Field, ramp

DARK_BROWN, BLACK, WHITE = (62.0, 34.0, 22.0), (24.0, 17.0, 18.0), (240.0, 232.0, 226.0)
BLUE_GREY, VEIL, VESSEL = (88.0, 100.0, 128.0), (138.0, 150.0, 176.0), (176.0, 26.0, 38.0)


def _honeycomb(canvas: Canvas, spacing: float, warp: float, thickness: float) -> Field:
    """[H, W], the lines of a net with round holes `spacing` apart."""
    x, y = canvas.x, canvas.y
    if warp:
        x, y = x + np.float32(warp) * canvas.noise(7), y + np.float32(warp) * canvas.noise(7)
    turn, wave = canvas.rng.uniform(0, np.pi), 2 * np.pi / spacing / np.cos(np.pi / 6)
    total = np.zeros_like(canvas.r)
    for third in range(3):
        angle = turn + third * np.pi / 3 * 2
        total += np.cos(x * np.float32(np.cos(angle) * wave) + y * np.float32(np.sin(angle) * wave))
    return ramp(-total, 0.75 - thickness, 1.35 - thickness)


def regular_pigment_network(canvas: Canvas, strength: float) -> None:
    """An even brown net that thins out towards the border."""
    lines = _honeycomb(canvas, canvas.rng.uniform(0.2, 0.26), 0.03, 0.45)
    canvas.blend(DARK_BROWN, lines * canvas.within(0.12, 0.3) * np.float32(0.6 * strength))


def peripheral_pigment_network(canvas: Canvas, strength: float) -> None:
    """A delicate brown net about a middle that has none."""
    lines = _honeycomb(canvas, canvas.rng.uniform(0.18, 0.22), 0.03, 0.35) * ramp(canvas.r, 0.35, 0.6)
    canvas.blend(DARK_BROWN, lines * canvas.within(0.02, 0.3) * np.float32(0.65 * strength))


def atypical_pigment_network(canvas: Canvas, strength: float) -> None:
    """A net of uneven holes and thick, broken lines that ends abruptly."""
    lines = _honeycomb(canvas, canvas.rng.uniform(0.26, 0.36), 0.11, 0.7)
    lines *= ramp(canvas.noise(5), -0.9, 0.3)
    canvas.blend(BLACK, lines * canvas.within(0.02, 0.06) * np.float32(0.85 * strength))


def regular_globules(canvas: Canvas, strength: float) -> None:
    """Brown balls of one size, evenly spread."""
    count = int(canvas.rng.integers(26, 38))
    radii = canvas.rng.uniform(0.06, 0.085, count).tolist()
    canvas.blend(DARK_BROWN, canvas.spots(canvas.points(count, 0.9, True), radii) * np.float32(0.9 * strength))


def irregular_dots(canvas: Canvas, strength: float) -> None:
    """Black dots of many sizes, crowded on one side."""
    count, side = int(canvas.rng.integers(22, 34)), canvas.rng.uniform(0, 2 * np.pi)
    places = canvas.points(count, 0.75, False) * np.float32(0.75)
    places += np.array([np.cos(side), np.sin(side)], np.float32) * np.float32(0.3)
    radii = canvas.rng.uniform(0.02, 0.085, count).tolist()
    canvas.blend(BLACK, canvas.spots(places, radii) * canvas.body * np.float32(0.95 * strength))


def irregular_streaks(canvas: Canvas, strength: float) -> None:
    """Black rays across a part of the border."""
    count, start, arc = int(canvas.rng.integers(14, 22)), canvas.rng.uniform(0, 2 * np.pi), canvas.rng.uniform(2, 4)
    alpha = np.zeros_like(canvas.r)
    for number in range(count):
        angle = start + arc * (number + canvas.rng.uniform(-0.25, 0.25)) / count
        edge = float(canvas.outline[int(angle / (2 * np.pi) * len(canvas.outline)) % len(canvas.outline)])
        length = np.linspace(edge - 0.28, edge + canvas.rng.uniform(0.08, 0.22), int(canvas.scale))
        path = np.stack([length * np.cos(angle), length * np.sin(angle)], axis=1).astype(np.float32)
        np.maximum(alpha, canvas.stroke(path, 0.045 * canvas.scale), out=alpha)
    canvas.blend(BLACK, alpha * np.float32(0.9 * strength))


def blue_white_veil(canvas: Canvas, strength: float) -> None:
    """A hazy blue-white film over a part of the lesion."""
    x, y = (canvas.points(1, 0.4, False)[0]).tolist()
    haze = canvas.blob(x, y, canvas.rng.uniform(0.42, 0.58), 0.45, 0.16) * canvas.within(0.06, 0.2)
    canvas.blend(VEIL, haze * np.float32(0.82 * strength))


def milia_like_cysts(canvas: Canvas, strength: float) -> None:
    """Small shining white balls."""
    count = int(canvas.rng.integers(12, 22))
    radii = canvas.rng.uniform(0.035, 0.065, count).tolist()
    canvas.blend(
        (250.0, 244.0, 220.0), canvas.spots(canvas.points(count, 0.85, False), radii, 0.8) * np.float32(0.95 * strength)
    )


def comedo_like_openings(canvas: Canvas, strength: float) -> None:
    """Dark round plugs with a lighter rim."""
    count = int(canvas.rng.integers(9, 15))
    places, radii = canvas.points(count, 0.8, True), canvas.rng.uniform(0.055, 0.09, count)
    canvas.blend((196.0, 160.0, 118.0), canvas.spots(places, (radii * 1.5).tolist()) * np.float32(0.5 * strength))
    canvas.blend((40.0, 26.0, 16.0), canvas.spots(places, radii.tolist(), 0.35) * np.float32(0.95 * strength))


def arborizing_vessels(canvas: Canvas, strength: float) -> None:
    """Bright red trunks that grow in from the border and branch like trees."""
    thin, thick = np.zeros_like(canvas.r), np.zeros_like(canvas.r)
    first = canvas.rng.uniform(0, 2 * np.pi)
    for number in range(int(canvas.rng.integers(4, 6))):
        start = first + number * 1.4 + canvas.rng.uniform(-0.3, 0.3)
        edge = 0.95 * float(canvas.outline[int(start / (2 * np.pi) * len(canvas.outline)) % len(canvas.outline)])
        at = np.array([edge * np.cos(start), edge * np.sin(start)])
        trunk = _wander(canvas, at, start + np.pi + canvas.rng.uniform(-0.5, 0.5), 1.0)
        np.maximum(thick, canvas.stroke(trunk, 0.05 * canvas.scale), out=thick)
        for share in (0.25, 0.5, 0.75):
            place = trunk[int(share * len(trunk))]
            turn = start + np.pi + canvas.rng.choice([-1, 1]) * canvas.rng.uniform(0.6, 1.1)
            branch = _wander(canvas, place, turn, canvas.rng.uniform(0.35, 0.6))
            np.maximum(thin, canvas.stroke(branch, 0.028 * canvas.scale), out=thin)
    canvas.blend(VESSEL, np.maximum(thick, thin) * canvas.within(-0.03, 0.06) * np.float32(0.9 * strength))


def _wander(canvas: Canvas, start: Field, direction: float, length: float) -> Field:
    """[N, 2], a winding path."""
    steps = max(int(length * canvas.scale), 2)
    bend = np.cumsum(canvas.rng.standard_normal(steps)) * 0.9 / np.sqrt(steps)
    angle = direction + bend
    path = np.stack([np.cumsum(np.cos(angle)), np.cumsum(np.sin(angle))], axis=1) * (length / steps)
    return (start + path).astype(np.float32)


def blue_grey_ovoid_nests(canvas: Canvas, strength: float) -> None:
    """A few large blue-grey eggs."""
    count = int(canvas.rng.integers(5, 9))
    radii = canvas.rng.uniform(0.11, 0.19, count).tolist()
    eggs = canvas.spots(canvas.points(count, 0.75, True), radii, 0.35, 1.25)
    canvas.blend(BLUE_GREY, eggs * np.float32(0.85 * strength))


def central_white_patch(canvas: Canvas, strength: float) -> None:
    """A scar-like white middle."""
    x, y = canvas.rng.uniform(-0.06, 0.06, 2).tolist()
    patch = canvas.blob(x, y, canvas.rng.uniform(0.34, 0.46), 0.25, 0.05)
    canvas.blend(WHITE, patch * np.float32(0.88 * strength))


def red_lacunae(canvas: Canvas, strength: float) -> None:
    """Red and purple lagoons, close together, with paler walls between."""
    count = int(canvas.rng.integers(11, 18))
    places, radii = canvas.points(count, 0.86, True), canvas.rng.uniform(0.14, 0.21, count)
    canvas.blend((214.0, 150.0, 156.0), canvas.body * np.float32(0.35 * strength))
    for colour, chosen in (((164.0, 14.0, 34.0), slice(0, None, 2)), ((98.0, 16.0, 66.0), slice(1, None, 2))):
        canvas.blend(
            colour,
            canvas.spots(places[chosen], radii[chosen].tolist(), 0.25) * canvas.body * np.float32(0.9 * strength),
        )


def surface_scale(canvas: Canvas, strength: float) -> None:
    """Dry white-yellow flakes."""
    flakes = ramp(canvas.noise(34) + 0.7 * canvas.noise(8), 0.75, 1.15) * canvas.within(0.05, 0.3)
    canvas.blend((242.0, 226.0, 172.0), flakes * np.float32(0.9 * strength))


def strawberry_pattern(canvas: Canvas, strength: float) -> None:
    """A red net around pale hair follicles."""
    net = _honeycomb(canvas, 0.26, 0.03, 0.7) * canvas.within(0.0, 0.4)
    canvas.blend((186.0, 44.0, 46.0), net * np.float32(0.7 * strength))
    holes = _honeycomb(canvas, 0.26, 0.03, -0.9)
    canvas.blend((240.0, 214.0, 186.0), (1 - holes) * canvas.within(0.1, 0.4) * np.float32(0.25 * strength))


def ulceration(canvas: Canvas, strength: float) -> None:
    """A raw red crater with a dark crust."""
    x, y = canvas.points(1, 0.35, False)[0].tolist()
    radius = canvas.rng.uniform(0.24, 0.34)
    canvas.blend((150.0, 24.0, 20.0), canvas.blob(x, y, radius, 0.1, 0.05) * np.float32(0.92 * strength))
    crust = canvas.blob(x, y, radius * 0.75, 0.1, 0.06) * ramp(canvas.noise(22), -0.3, 0.5)
    canvas.blend((72.0, 26.0, 14.0), crust * np.float32(0.9 * strength))


DRAWN: Mapping[str, Callable[[Canvas, float], None]] = {
    "red lacunae": red_lacunae,
    "regular pigment network": regular_pigment_network,
    "delicate peripheral pigment network": peripheral_pigment_network,
    "atypical pigment network": atypical_pigment_network,
    "strawberry pattern": strawberry_pattern,
    "regular globules": regular_globules,
    "central white patch": central_white_patch,
    "blue-grey ovoid nests": blue_grey_ovoid_nests,
    "ulceration": ulceration,
    "irregular dots": irregular_dots,
    "comedo-like openings": comedo_like_openings,
    "milia-like cysts": milia_like_cysts,
    "arborizing vessels": arborizing_vessels,
    "surface scale": surface_scale,
    "irregular streaks": irregular_streaks,
    "blue-white veil": blue_white_veil,
}
"""How each of `STRUCTURES` is drawn, from the deepest up: a veil lies over a net."""


def draw_structures(canvas: Canvas, structures: tuple[str, ...], strength: float) -> None:
    """Draw them, the deepest first."""
    for name, draw in DRAWN.items():
        if name in structures:
            draw(canvas, strength)
