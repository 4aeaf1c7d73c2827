"""How to win a household world: fetch each wanted thing and bring it, opening and unlocking what is in the way."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from lit_agentrl.envs.household import Door, Exits, Place, World

HELD = "I"  # TextWorld's name of the inventory


def winning_plan(world: World) -> list[str]:
    """Commands that win from the start. Not always the fewest: things are brought one after the other."""
    planner = Planner(world, world.start, world.things, blocked_at_start(world))
    return planner.plan()


def blocked_at_start(world: World) -> dict[str, str]:
    """What is `closed` or `locked` before the first command, by name."""
    containers = {place.name: "closed" for place in world.places if place.is_container and world.closed}
    return containers | {door.name: "locked" if door.key else "closed" for door in world.doors}


class Planner:
    """Plans from any state of a world.

    Args:
        world: The world and its quest.
        room: Where the player is.
        where: The place, the room (on its floor) or the inventory that each thing is in.
        blocked: What is `closed` or `locked`, by name.
    """

    def __init__(self, world: World, room: str, where: Mapping[str, str], blocked: Mapping[str, str]) -> None:
        self._world = world
        self._places = {place.name: place for place in world.places}
        self._room = room
        self._where = dict(where)
        self._blocked = dict(blocked)
        self._commands: list[str] = []

    def plan(self) -> list[str]:
        """Commands that win from here."""
        for thing, goal in self._world.goals.items():
            if self._where[thing] != goal:
                self._fetch(thing)
                self._bring(thing, self._places[goal])
        return self._commands

    def _fetch(self, thing: str) -> None:
        where = self._where[thing]
        if where == HELD:
            return
        place = self._places.get(where)
        self._go(place.room if place else where)
        if place:
            self._open(place.name)
        self._commands.append(f"take {thing} from {where}" if place else f"take {thing}")
        self._where[thing] = HELD

    def _bring(self, thing: str, place: Place) -> None:
        self._go(place.room)
        self._open(place.name)
        verb, preposition = ("insert", "into") if place.is_container else ("put", "on")
        self._commands.append(f"{verb} {thing} {preposition} {place.name}")
        self._where[thing] = place.name

    def _open(self, name: str) -> None:
        if self._blocked.pop(name, ""):
            self._commands.append(f"open {name}")

    def _go(self, room: str) -> None:
        """Walk to a room, with the keys of all that is locked on the way: they are fetched first."""
        while missing := [key for key in self._keys(room) if self._where[key] != HELD]:
            self._fetch(missing[0])
        for direction in route(self._world.exits, self._room, room):
            neighbour = self._world.exits[self._room][direction]
            door = self._world.door(self._room, neighbour)
            if door is not None:
                self._pass(door)
            self._commands.append(f"go {direction}")
            self._room = neighbour

    def _pass(self, door: Door) -> None:
        if self._blocked.get(door.name) == "locked":
            self._commands.append(f"unlock {door.name} with {door.key}")
        self._open(door.name)

    def _keys(self, end: str) -> list[str]:
        """The keys that the way to a room needs, the nearest lock first."""
        keys, room = [], self._room
        for direction in route(self._world.exits, room, end):
            neighbour = self._world.exits[room][direction]
            door = self._world.door(room, neighbour)
            if door is not None and self._blocked.get(door.name) == "locked":
                keys.append(door.key)
            room = neighbour
        return keys


def route(exits: Exits, start: str, end: str) -> list[str]:
    """The directions of a shortest way between two rooms."""
    ways: dict[str, list[str]] = {start: []}
    queue = deque([start])
    while end not in ways:
        room = queue.popleft()
        for direction, neighbour in exits[room].items():
            if neighbour not in ways:
                ways[neighbour] = [*ways[room], direction]
                queue.append(neighbour)
    return ways[end]
