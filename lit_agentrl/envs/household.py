"""Small household worlds sampled from a seed: rooms, places to put things, things, and what to bring where.

Plain data, no engine: `textworld.py` gives a world to Microsoft TextWorld to play.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import deque
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


@dataclass(frozen=True, slots=True)
class Place:
    """Something that things lie on (a supporter) or in (a container)."""

    name: str
    room: str
    is_container: bool

    def __str__(self) -> str:
        return f"{'in' if self.is_container else 'on'} the {self.name}"


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
    def digest(self) -> str:
        """A hash of all that tells games apart. The order in which places and things are listed does not."""
        places = sorted([place.name, place.room, place.is_container] for place in self.places)
        content = [self.start, self.exits, places, dict(self.things), dict(self.goals), self.closed]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def walkthrough(self) -> list[str]:
        """Commands that win: fetch each wanted thing, bring it, opening what is closed on the way."""
        places = {place.name: place for place in self.places}
        commands: list[str] = []
        room, opened = self.start, set[str]()
        for thing, goal in self.goals.items():
            for place, command in (
                (places[self.things[thing]], f"take {thing} from {self.things[thing]}"),
                (places[goal], f"{'insert' if places[goal].is_container else 'put'} {thing}"),
            ):
                commands += [f"go {direction}" for direction in self._route(room, place.room)]
                room = place.room
                if self.closed and place.is_container and place.name not in opened:
                    opened.add(place.name)
                    commands.append(f"open {place.name}")
                commands.append(command)
            commands[-1] += f" {'into' if places[goal].is_container else 'on'} {goal}"
        return commands

    def _route(self, start: str, end: str) -> list[str]:
        """The directions of a shortest way between two rooms."""
        ways: dict[str, list[str]] = {start: []}
        queue = deque([start])
        while end not in ways:
            room = queue.popleft()
            for direction, neighbour in self.exits[room].items():
                if neighbour not in ways:
                    ways[neighbour] = [*ways[room], direction]
                    queue.append(neighbour)
        return ways[end]


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
    return World(exits, places, things, goals, difficulty.closed)


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
