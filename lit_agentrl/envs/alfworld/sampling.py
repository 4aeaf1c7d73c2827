"""Sampled games: which things lie where in a room, and what is asked for."""

from __future__ import annotations

import random
from dataclasses import dataclass

from lit_agentrl.envs.alfworld.floor_plans import FloorPlan, Receptacle, Tables

_APPLIANCES = {
    "pick_clean_then_place_in_recep": ("cleanable", "SinkBasin"),
    "pick_heat_then_place_in_recep": ("heatable", "Microwave"),
    "pick_cool_then_place_in_recep": ("coolable", "Fridge"),
}
_PRESENT = 0.7
"""Probability that a kind of thing which the room knows is in it: about 20 to 30 things then lie about."""


@dataclass(frozen=True, slots=True)
class Thing:
    """Something that lies somewhere."""

    id: str
    kind: str
    place: Receptacle


@dataclass(frozen=True, slots=True)
class Sample:
    """A room with things in it, and a task."""

    task: str
    """The type of the task, as folders are called."""
    plan: FloorPlan
    things: tuple[Thing, ...]
    target: str
    """The kind of thing that is asked for."""
    goal: str
    """The kind of receptacle that it belongs in, or the lamp to look at it by."""
    start: str
    """Where the agent stands: in front of nothing."""


def sample_game(task: str, plan: FloorPlan, tables: Tables, rng: random.Random) -> Sample | None:
    """A game of the type `task` in this room; None where the room does not allow it."""
    kinds = [kind for kind in plan.things if any(kind in tables.holds[r.kind] for r in plan.receptacles)]
    goals = _goals(task, plan, tables, kinds)
    if not goals:
        return None
    target, goal = rng.choice(goals)
    counts = {kind: rng.choice((1, 1, 2, 3)) for kind in kinds if rng.random() < _PRESENT}
    counts[target] = max(2 if task == "pick_two_obj_and_place" else 1, counts.get(target, 1))
    if plan.has_lamp:
        counts["DeskLamp"] = 1
    things = []
    for kind, count in sorted(counts.items()):
        # None of the wanted things starts where it belongs.
        places = [r for r in plan.receptacles if kind in tables.holds[r.kind] and (kind, r.kind) != (target, goal)]
        if not places:
            return None
        numbers = rng.sample(range(600), count)  # apart from one another, so that ids differ
        things += [Thing(_id(kind, number, rng), kind, rng.choice(places)) for number in numbers]
    return Sample(task, plan, tuple(things), target, goal, f"loc|{rng.randint(60, 70)}|{rng.randint(60, 70)}|0|30")


def _goals(task: str, plan: FloorPlan, tables: Tables, kinds: list[str]) -> list[tuple[str, str]]:
    """Pairs of a thing and where it belongs (or a lamp) that the type of task allows in this room, sorted."""
    if task == "look_at_obj_in_light":
        return [(kind, "DeskLamp") for kind in kinds] if plan.has_lamp else []
    prop, appliance = _APPLIANCES.get(task, ("", ""))
    if appliance and appliance not in plan.kinds:
        return []
    wanted = [kind for kind in kinds if not prop or kind in tables.properties[prop]]
    pairs = [(kind, place) for kind in wanted for place in sorted(plan.kinds) if kind in tables.holds[place]]
    return [(kind, place) for kind, place in pairs if place != appliance]


def _id(kind: str, number: int, rng: random.Random) -> str:
    """An id as AI2-THOR's: the kind and a position in metres. Games number their things by the order of ids."""
    x, z = number / 100 - 3, rng.randrange(-300, 300) / 100
    return f"{kind}|{x:+06.2f}|+00.90|{z:+06.2f}"
