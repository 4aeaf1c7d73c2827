"""A household world in TextWorld's logic: its facts, the actions its rules allow, and the words for both.

TextWorld has no type hints and takes a second to import, so its values are `Any` here and imported on use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lit_agentrl.envs.household import Place, World
from lit_agentrl.envs.household_plan import blocked_at_start


class TextWorldGame:
    """The starting state of a game and everything that does not change while it is played. Safe to share by threads.

    Args:
        world: What to play.
        commands: The kinds of commands to allow.
    """

    def __init__(self, world: World, commands: Sequence[str]) -> None:
        from textworld.generator.data import KnowledgeBase
        from textworld.generator.game import Event
        from textworld.logic import Proposition, State, Variable

        # Loaded once by TextWorld itself. The ids are the same in every game (o_0, o_1, ...), as TextWorld's rules keep
        # each action they ever instantiated: with the names as ids those would pile up with the number of games.
        knowledge = KnowledgeBase.default()
        self.world = world
        self._rules = [rule for name, rule in knowledge.rules.items() if name.split("/")[0] in commands]
        self._constants = knowledge.types.constants_mapping
        kinds = {
            **dict.fromkeys(world.exits, "r"),
            **{place.name: "c" if place.is_container else "s" for place in world.places},
            **dict.fromkeys(world.things, "o"),
            **{door.name: "d" for door in world.doors},
            **{door.key: "k" for door in world.doors if door.key},
        }
        variables = {"P": Variable("P", "P")}
        for name, kind in kinds.items():
            number = sum(variable.type == kind for variable in variables.values())
            variables[name] = Variable(f"{kind}_{number}", kind)
        self.names = {variable.name: name for name, variable in variables.items()} | {"I": "I"}

        def fact(name: str, *arguments: str) -> Any:
            return Proposition(name, [variables[argument] for argument in arguments])

        self.start = State(knowledge.logic, [fact(*words) for words in initial_facts(world)])
        places = {place.name: place for place in world.places}
        self._goal = Event(conditions=[fact(_inside(places[goal]), thing, goal) for thing, goal in world.goals.items()])

    def actions(self, state: Any) -> dict[str, Any]:
        """What may be done in `state`, by command, sorted."""
        actions = state.all_applicable_actions(self._rules, self._constants)
        return dict(sorted((action.format_command(self.names), action) for action in actions))

    def is_won(self, state: Any) -> bool:
        """Whether every wanted thing is where it belongs."""
        return bool(self._goal.is_triggering(state))

    def progress(self, state: Any) -> float:
        """How much of the quest is done, in [0, 1]: a wanted thing in hand counts half, one where it belongs whole."""
        where, goals = self.locations(state), self.world.goals
        return sum(1.0 if where[t] == goal else 0.5 if where[t] == "I" else 0.0 for t, goal in goals.items()) / len(
            goals
        )

    def describe(self, state: Any) -> str:
        """What the player sees and carries."""
        where = self.locations(state)
        room = where["P"]
        sentences = [f"You are in the {room}."]
        sentences += [self._contents(state, place) for place in self.world.places if place.room == room]
        if exits := self.world.exits[room]:
            ways = [f"{direction} to {self._way(state, room, neighbour)}" for direction, neighbour in exits.items()]
            sentences.append(f"Exits: {', '.join(ways)}.")
        for label, container in (("On the floor", room), ("You carry", "I")):
            if things := [thing for thing in self.world.things if where[thing] == container]:
                sentences.append(f"{label}: {', '.join(things)}.")
        return " ".join(sentences)

    def feedback(self, action: Any) -> str:
        """What the player is told to have done."""
        return f"You {action.format_command({id: f'the {name}' for id, name in self.names.items()})}."

    def news(self, state: Any, action: Any) -> str:
        """What came into sight when `action` led to `state`."""
        kind, _, name = action.format_command(self.names).partition(" ")
        if kind == "go":
            return self.describe(state)
        return "".join(
            self._contents(state, place) for place in self.world.places if (kind, name) == ("open", place.name)
        )

    def _way(self, state: Any, room: str, neighbour: str) -> str:
        """The neighbour, and the state of the door that is between."""
        door = self.world.door(room, neighbour)
        return f"{neighbour} ({door.name}, {self.blocked(state).get(door.name, 'open')})" if door else neighbour

    def _contents(self, state: Any, place: Place) -> str:
        if place.name in self.blocked(state):
            return f"The {place.name} is closed."
        where = self.locations(state)
        things = [thing for thing in self.world.things if where[thing] == place.name]
        return f"{str(place).capitalize()}: {', '.join(things) or 'nothing'}."

    def blocked(self, state: Any) -> dict[str, str]:
        """What is `closed` or `locked`, by name."""
        return {self.names[f.arguments[0].name]: f.name for f in state.facts if f.name in ("closed", "locked")}

    def locations(self, state: Any) -> dict[str, str]:
        """The room, place or inventory ("I") that the player, the places and the things are in."""
        pairs = (fact.arguments for fact in state.facts if fact.name in ("at", "in", "on"))
        return {self.names[inner.name]: self.names[outer.name] for inner, outer in pairs}


def initial_facts(world: World) -> Iterator[tuple[str, ...]]:
    """The facts that hold at the start: TextWorld's predicate, then names."""
    yield "at", "P", world.start
    for room, exits in world.exits.items():
        for direction, neighbour in exits.items():
            yield f"{direction}_of", neighbour, room
            door = world.door(room, neighbour)
            yield ("link", room, door.name, neighbour) if door else ("free", room, neighbour)
    blocked = blocked_at_start(world)
    for place in world.places:
        yield "at", place.name, place.room
        if place.is_container:
            yield blocked.get(place.name, "open"), place.name
    for door in world.doors:
        yield blocked[door.name], door.name
        if door.key:
            yield "match", door.key, door.name
    places = {place.name: place for place in world.places}
    for thing, name in world.things.items():
        yield _inside(places[name]), thing, name


def _inside(place: Place) -> str:
    return "in" if place.is_container else "on"
