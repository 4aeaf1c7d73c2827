"""Small household worlds sampled from a seed: rooms, places to put things, things, and what to bring where.

Plain data, no engine: `textworld.py` gives a world to Microsoft TextWorld to play.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass

from lit_agentrl.types import Split

# Short, common, one token each for SmolLM2, and never ambiguous with one another. Split from text to stay readable.
ROOMS = "kitchen bedroom bathroom hall office garage attic library pantry study garden lobby".split()  # noqa: SIM905
SUPPORTERS = "table shelf desk chair bench counter bed stool rack couch tray stove".split()  # noqa: SIM905
CONTAINERS = "box basket drawer chest bag bin trunk case bucket cabinet closet fridge".split()  # noqa: SIM905
THINGS = (  # noqa: SIM905
    "cup fork key pen book lamp apple ball coin hat sock shoe spoon knife plate bowl soap towel candle clock "
    "phone letter map ring watch brush glove wallet hammer rope bottle jar egg lemon carrot onion camera pillow "
    "flute kite"
).split()
COLOURS = "red blue green white black".split()  # noqa: SIM905
DIRECTIONS = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}

Exits = dict[str, dict[str, str]]


@dataclass(frozen=True, slots=True)
class Difficulty:
    """How large a world is and how long its quest."""

    num_rooms: int
    num_places: int
    num_deliveries: int
    num_distractors: int
    closed: bool
    num_doors: int = 0
    """Passages that a closed door blocks."""
    num_locked: int = 0
    """Doors that need their key as well."""
    min_commands: int = 1
    """The fewest commands that the winning plan may have."""
    max_commands: int = 100
    """The most."""
    directions: bool = False
    """Whether the task says which rooms to go to."""


@dataclass(frozen=True, slots=True)
class Place:
    """Something that things lie on (a supporter) or in (a container)."""

    name: str
    room: str
    is_container: bool

    def __str__(self) -> str:
        return f"{'in' if self.is_container else 'on'} the {self.name}"


@dataclass(frozen=True, slots=True)
class Door:
    """A door between two rooms, closed at the start."""

    name: str
    rooms: tuple[str, str]
    key: str = ""
    """The thing that unlocks it; empty where it is not locked."""


@dataclass(frozen=True, slots=True)
class World:
    """A household and its quest. The player starts in the first room of `exits`."""

    exits: Exits
    """The neighbour of each room in each direction."""
    places: tuple[Place, ...]
    things: Mapping[str, str]
    """The name of the place that each thing starts at."""
    goals: Mapping[str, str]
    """The name of the place that each wanted thing must be brought to."""
    closed: bool
    """Whether the containers start closed."""
    doors: tuple[Door, ...] = ()

    @property
    def start(self) -> str:
        """The room that the player starts in."""
        return next(iter(self.exits))

    @property
    def task(self) -> str:
        """The quest in words."""
        place = {place.name: str(place) for place in self.places}
        return "put " + " and ".join(f"the {thing} {place[goal]}" for thing, goal in self.goals.items())

    @property
    def directions(self) -> str:
        """Which rooms the wanted things are in and go to, in words."""
        room = {place.name: place.room for place in self.places}
        return " ".join(
            f"The {thing} is in the {room[self.things[thing]]}, the {goal} in the {room[goal]}."
            for thing, goal in self.goals.items()
        )

    @property
    def digest(self) -> str:
        """A hash of all that tells games apart. The order in which places and things are listed does not."""
        places = sorted([place.name, place.room, place.is_container] for place in self.places)
        content = [self.start, self.exits, places, dict(self.things), dict(self.goals), self.closed]
        content += [sorted([door.name, sorted(door.rooms), door.key] for door in self.doors)] if self.doors else []
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def door(self, room: str, neighbour: str) -> Door | None:
        """The door between two rooms, if there is one."""
        return next((door for door in self.doors if set(door.rooms) == {room, neighbour}), None)


def goal_split(thing: str, place: str) -> Split:
    """The one split whose games may ask to bring `thing` to `place`: 3/5 of the pairs train, 1/5 val, 1/5 test.

    Every thing and every place has pairs in all splits, so held-out tasks are new combinations of known words.
    """
    share = (THINGS.index(thing) + 2 * (SUPPORTERS + CONTAINERS).index(place)) % 5
    return "val" if share == 3 else "test" if share == 4 else "train"


def sample_world(seed: int, split: Split, difficulty: Difficulty) -> World:
    """The world of `seed`, its goals drawn from those of `split`."""
    rng = random.Random(seed)
    exits = _sample_rooms(rng, difficulty.num_rooms)
    names = rng.sample(SUPPORTERS + CONTAINERS, difficulty.num_places)
    # The first places visit every room in turn, so that none is empty while there are enough places.
    places = tuple(Place(n, list(exits)[i % len(exits)], n in CONTAINERS) for i, n in enumerate(names))
    goals: dict[str, str] = {}
    for _ in range(difficulty.num_deliveries):
        goal = rng.choice(names)
        goals[rng.choice([t for t in THINGS if t not in goals and goal_split(t, goal) == split])] = goal
    others = rng.sample([t for t in THINGS if t not in goals], difficulty.num_distractors)
    everything = [*goals, *others]
    rng.shuffle(everything)  # a wanted thing is not told by where it is listed
    things = {t: rng.choice([n for n in names if n != goals.get(t)]) for t in everything}
    doors, keys = _sample_doors(rng, exits, places, difficulty)  # last: worlds without doors are what they were
    return World(exits, places, things | keys, goals, difficulty.closed, doors)


def _sample_doors(
    rng: random.Random, exits: Exits, places: tuple[Place, ...], difficulty: Difficulty
) -> tuple[tuple[Door, ...], dict[str, str]]:
    """Doors on some passages, and the place of each key: in a room that is older than the one it opens.

    A room was reached from an older one, so with the rooms taken in order every key is there before its door.
    """
    rooms = list(exits)
    behind = sorted(rng.sample(range(1, len(rooms)), difficulty.num_doors))  # each room but the first has one way in
    locked = set(rng.sample(behind, difficulty.num_locked))
    doors, keys = [], {}
    for number, colour in zip(behind, rng.sample(COLOURS, len(behind)), strict=True):
        room = rooms[number]
        entrance = next(neighbour for neighbour in exits[room].values() if rooms.index(neighbour) < number)
        key = f"{colour} key" if number in locked else ""
        doors.append(Door(f"{colour} door", (entrance, room), key))
        if key:
            reachable = [place for place in places if rooms.index(place.room) < number]
            keys[key] = rng.choice([place for place in reachable if not place.is_container] or reachable).name
    return tuple(doors), keys


def _sample_rooms(rng: random.Random, num_rooms: int) -> Exits:
    """A random tree of rooms on a grid."""
    names = rng.sample(ROOMS, num_rooms)
    cells = {(0, 0): names[0]}
    exits: Exits = {names[0]: {}}
    for name in names[1:]:
        free = [
            (room, direction, (x + dx, y + dy))
            for (x, y), room in cells.items()
            for direction, (dx, dy) in DIRECTIONS.items()
            if (x + dx, y + dy) not in cells
        ]
        room, direction, cell = rng.choice(free)
        cells[cell] = name
        exits[room][direction] = name
        exits[name] = {OPPOSITE[direction]: room}
    return exits
