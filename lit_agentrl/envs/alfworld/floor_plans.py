"""Rooms to make games in: the floor plans and tables that the `alfworld` package brings (MIT).

Of each AI2-THOR room it lists the kinds of things and, for most receptacles, where they are. What it does not bring is
where the things lie in ALFRED's recordings, which the benchmark's games are made from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from lit_agentrl.errors import missing_extra

UNSEEN_PLANS = (10, 219, 308, 424)
"""The rooms of ALFWorld's own valid_unseen: a kitchen, a living room, a bedroom and a bathroom."""
_WITHOUT_POSE = {"StoveBurner": 4}
"""Instances of receptacles that are listed, but not where they are: one, but for these."""
_LAMP_STANDS = ("Desk", "SideTable", "Shelf", "Dresser")


@dataclass(frozen=True, slots=True)
class Receptacle:
    """A piece of furniture, in ALFRED's terms."""

    id: str
    kind: str
    location: str
    """Where an agent stands to reach it: `loc|x|z|rotation|horizon`, in quarter metres and quarter turns."""


@dataclass(frozen=True, slots=True)
class FloorPlan:
    """A room."""

    number: int
    receptacles: tuple[Receptacle, ...]
    things: tuple[str, ...]
    """The kinds of things that can be in it, lamps left out."""
    has_lamp: bool

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of its receptacles."""
        return frozenset(receptacle.kind for receptacle in self.receptacles)


@dataclass(frozen=True, slots=True)
class Tables:
    """What ALFRED says of kinds of things, and the texts that its games share."""

    holds: Mapping[str, frozenset[str]]
    """The kinds of things that a kind of receptacle can hold."""
    properties: Mapping[str, frozenset[str]]
    """The kinds that are cleanable, heatable, coolable, sliceable, openable, or hold things themselves."""
    goals: Mapping[str, Mapping[str, Any]]
    """A goal in PDDL and sentences for it, by type of task."""
    domain: str
    grammar: str
    version: str


@cache
def read_tables() -> Tables:
    """The tables of the installed `alfworld`.

    Raises:
        UserError: It is not installed.
    """
    try:
        import_module("alfworld")
    except ModuleNotFoundError as error:
        if error.name != "alfworld":  # installed, but broken: its own message tells more
            raise
        raise missing_extra("alfworld", "alfworld", "make-alfworld-games") from None
    constants, goals = import_module("alfworld.gen.constants"), import_module("alfworld.gen.goal_library")
    can = constants.VAL_ACTION_OBJECTS
    holds = {kind: frozenset(things) for kind, things in constants.VAL_RECEPTACLE_OBJECTS.items()}
    lamps = frozenset(["DeskLamp"])
    return Tables(
        {kind: things | lamps if kind in _LAMP_STANDS else things for kind, things in holds.items()},
        {
            "cleanable": frozenset(can["Cleanable"]),
            "heatable": frozenset(can["Heatable"]),
            "coolable": frozenset(can["Coolable"]),
            "sliceable": frozenset(can["Sliceable"]),
            "toggleable": lamps,
            "openable": frozenset(constants.OPENABLE_CLASS_SET),
            "isReceptacleObject": frozenset(constants.MOVABLE_RECEPTACLES_SET),
        },
        goals.gdict,
        _text("data/alfred.pddl"),
        _text("data/alfred.twl2"),
        version("alfworld"),
    )


@cache
def floor_plans() -> dict[int, FloorPlan]:
    """The rooms, by number.

    Raises:
        UserError: `alfworld` is not installed.
    """
    tables = read_tables()
    static = frozenset(import_module("alfworld.gen.constants").STATIC_RECEPTACLES)
    folder = files("alfworld") / "gen" / "layouts"
    names = (path.name for path in folder.iterdir() if path.name.endswith("-objects.json"))
    numbers = sorted(int(name.removeprefix("FloorPlan").removesuffix("-objects.json")) for name in names)
    return {number: _floor_plan(number, tables, static) for number in numbers}


def _floor_plan(number: int, tables: Tables, static: frozenset[str]) -> FloorPlan:
    listed = frozenset(json.loads(_text(f"gen/layouts/FloorPlan{number}-objects.json")))
    poses: dict[str, list[float]] = json.loads(_text(f"gen/layouts/FloorPlan{number}-openable.json"))
    receptacles = []
    for name, (x, z, rotation, horizon) in sorted(poses.items()):
        location = f"loc|{round(4 * x)}|{round(4 * z)}|{round(rotation / 90)}|{round(horizon)}"
        parts = name.split("|")  # Sink|x|y|z|SinkBasin is a basin
        receptacles.append(Receptacle(name, parts[4] if len(parts) > 4 else parts[0], location))
    missing = (listed & static & tables.holds.keys()) - {receptacle.kind for receptacle in receptacles}
    for row, kind in enumerate(sorted(missing)):
        for column in range(_WITHOUT_POSE.get(kind, 1)):
            # Made-up coordinates, out of the room: nothing but names depends on them.
            name = f"{kind}|+{20 + row:02d}.00|+00.90|+{column:02d}.00"
            name = name.replace(kind, "Sink", 1) + f"|{kind}" if kind == "SinkBasin" else name
            name = name.replace(kind, "Bathtub", 1) + f"|{kind}" if kind == "BathtubBasin" else name
            receptacles.append(Receptacle(name, kind, f"loc|{80 + 4 * row}|{4 * column}|0|30"))
    receptacles = [receptacle for receptacle in receptacles if receptacle.kind in tables.holds]
    holdable = frozenset().union(*(tables.holds[receptacle.kind] for receptacle in receptacles))
    things = tuple(sorted((listed & holdable) - static - {"DeskLamp"}))
    return FloorPlan(number, tuple(receptacles), things, "DeskLamp" in listed)


def _text(path: str) -> str:
    return (files("alfworld") / path).read_text(encoding="utf-8")
