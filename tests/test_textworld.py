"""TextWorld games: disjoint splits, honest wins, what is offered and said, anchors, snapshots, threads."""

import os
import random
import subprocess
import sys
import threading

import pytest

from lit_agentrl.envs import textworld as module
from lit_agentrl.envs.household import OPPOSITE, Difficulty, Door, Place, World, goal_split, sample_world
from lit_agentrl.envs.household_plan import Planner, winning_plan
from lit_agentrl.envs.pool import EnvironmentPool
from lit_agentrl.envs.textworld import TextWorldSuite
from lit_agentrl.envs.textworld_engine import TextWorldGame
from lit_agentrl.envs.textworld_episode import TextWorldEnvironment
from lit_agentrl.errors import UserError
from lit_agentrl.types import RestorableEnvironment

pytest.importorskip("textworld", reason="needs the textworld extra: pip install 'lit-agentrl[textworld]'")

SPLITS = ("train", "val", "test")
LEVELS = {"medium": (3, 1, 0, 6, 8), "hard": (4, 2, 1, 9, 12)}  # rooms, doors, locked doors, commands
HARD = {"num_rooms": 4, "num_places": 6, "num_deliveries": 3, "num_distractors": 4, "closed": True}


@pytest.fixture(scope="module")
def suite() -> TextWorldSuite:
    return TextWorldSuite(num_train=200, num_val=60, num_test=60)


@pytest.fixture(scope="module")
def hard() -> TextWorldSuite:
    return TextWorldSuite(num_train=40, num_val=20, num_test=20, **HARD)


@pytest.fixture(scope="module", params=LEVELS)
def leveled(request) -> tuple[str, TextWorldSuite]:
    return request.param, TextWorldSuite(num_train=40, num_val=20, num_test=20, level=request.param)


def play(suite: TextWorldSuite, task: str, seed: int, steps: int) -> list[str]:
    """All that a random policy sees, and the anchors."""
    rng, environment = random.Random(seed), suite.make(task)
    seen = [environment.reset().text]
    for _ in range(steps):
        observation, reward, done = environment.step(rng.choice(environment.commands))
        seen += [observation.text, str(reward), environment.anchor]
        if done:
            break
    return seen


@pytest.mark.parametrize("name", ["suite", "hard"])
def test_no_game_and_no_goal_is_in_two_splits(name, request):
    suite = request.getfixturevalue(name)
    tasks = [task for split in SPLITS for task in suite.tasks(split)]
    assert len(set(tasks)) == len({suite.digest(task) for task in tasks}) == len(tasks)
    goals = {split: {goal for t in suite.tasks(split) for goal in suite._world(t).goals.items()} for split in SPLITS}
    assert all(len(goals[split]) > 20 for split in SPLITS)
    assert not goals["train"] & (goals["val"] | goals["test"])
    assert not goals["val"] & goals["test"]


def test_every_word_is_trained_on():
    """Held-out goals are new pairs of known words: each thing and each place has training pairs."""
    for thing in module.THINGS:
        assert {goal_split(thing, place) for place in module.SUPPORTERS + module.CONTAINERS} == set(SPLITS)
    for place in module.SUPPORTERS + module.CONTAINERS:
        assert {goal_split(thing, place) for thing in module.THINGS} == set(SPLITS)


def test_a_game_that_is_also_in_another_split_is_refused(monkeypatch):
    world = sample_world(0, "train", Difficulty(1, 3, 1, 2, False))
    monkeypatch.setattr(module, "sample_world", lambda seed, split, difficulty: world)
    with pytest.raises(UserError, match="'val' is also in split 'train'"):
        TextWorldSuite(num_train=1, num_val=1, num_test=0)


def test_a_repeated_game_is_passed_over_and_too_few_are_refused(monkeypatch):
    few = Difficulty(1, 3, 1, 2, False)
    monkeypatch.setattr(module, "sample_world", lambda seed, split, difficulty: sample_world(seed % 3, "train", few))
    suite = TextWorldSuite(num_train=3, num_val=0, num_test=0)
    assert len({suite.digest(task) for task in suite.tasks("train")}) == 3
    with pytest.raises(UserError, match="num_train=4: only 3 different games"):
        TextWorldSuite(num_train=4, num_val=0, num_test=0)


def test_digest_tells_games_apart_by_content_not_by_listing_order():
    world = sample_world(5, "train", Difficulty(2, 3, 1, 2, False))
    same = World(world.exits, world.places[::-1], dict(reversed(world.things.items())), world.goals, world.closed)
    assert world.digest == same.digest
    thing, place = next((t, p.name) for t, old in world.things.items() for p in world.places if p.name != old)
    moved = World(world.exits, world.places, {**world.things, thing: place}, world.goals, world.closed)
    asked = World(world.exits, world.places, world.things, {thing: place}, world.closed)
    rooms = list(world.exits)
    turned = World({r: world.exits[r] for r in reversed(rooms)}, world.places, world.things, world.goals, world.closed)
    assert len({world.digest, moved.digest, asked.digest, turned.digest}) == 4


def test_a_split_does_not_depend_on_the_size_of_the_others(suite):
    small = TextWorldSuite(num_train=5, num_val=60, num_test=3)
    assert [small.digest(t) for t in small.tasks("val")] == [suite.digest(t) for t in suite.tasks("val")]
    assert [small.digest(t) for t in small.tasks("train")] == [suite.digest(t) for t in suite.tasks("train")[:5]]


def test_games_depend_on_the_seed_alone():
    """Two processes with different string hashes see the same texts and anchors."""
    code = (
        "import random\nfrom lit_agentrl.envs.textworld import TextWorldSuite\n"
        f"suite = TextWorldSuite(num_train=3, num_val=1, num_test=1, **{HARD})\n"
        "for task in suite.tasks('train'):\n"
        "    environment, rng = suite.make(task), random.Random(0)\n"
        "    print(environment.reset())\n"
        "    for _ in range(20):\n"
        "        print(environment.step(rng.choice(environment.commands)), environment.anchor)\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) > 1000


@pytest.mark.parametrize("name", ["suite", "hard"])
@pytest.mark.parametrize("split", SPLITS)
def test_walkthrough_wins_with_the_last_command_only(name, split, request):
    suite = request.getfixturevalue(name)
    for task in suite.tasks(split):
        environment = suite.make(task)
        observation, rewards, done = environment.reset(), [], False
        turns = suite.walkthrough(task, held_out=True)
        for expected, command in turns:
            assert not done
            assert environment.success is False
            assert command in environment.commands
            assert observation == expected
            observation, reward, done = environment.step(command)
            assert observation.valid is True
            rewards.append(reward)
        assert (rewards, done, environment.success) == ([0.0] * (len(turns) - 1) + [1.0], True, True)
        assert len(turns) <= suite.max_steps


def test_walkthrough_of_a_held_out_game_must_be_asked_for(suite):
    with pytest.raises(UserError, match="'test-0' is held out"):
        suite.walkthrough("test-0")


def test_the_default_task_is_small_and_not_won_by_chance():
    """Two commands, few offered, a short prompt; the numbers of the docstring hold."""
    suite = TextWorldSuite()
    assert suite.max_steps == 3
    tasks = suite.tasks("train")
    assert (len(tasks), len(suite.tasks("val")), len(suite.tasks("test"))) == (512, 64, 128)
    assert {len(suite.walkthrough(task)) for task in tasks} == {2}
    for task in tasks:
        (first, take), (second, put) = suite.walkthrough(task)
        assert (first.text.count("\n") - 2, second.text.count("\n") - 1) == (4, 7)  # commands offered
        assert len(first.text) < 280
        assert len(first.system) < 60
        assert max(len(take), len(put)) < 35
    rng, wins, episodes = random.Random(0), 0, 2000
    for _ in range(episodes):
        environment = suite.make(rng.choice(tasks))
        environment.reset()
        wins += any(environment.step(rng.choice(environment.commands))[2] for _ in range(suite.max_steps))
    assert 0.04 < wins / episodes < 0.08


def test_what_is_said_of_an_episode():
    """One game, word for word."""
    suite = TextWorldSuite(num_train=1, num_val=0, num_test=0, num_places=2, num_distractors=1)
    environment = suite.make("train-0")
    world = suite._world("train-0")
    (thing, goal), (other, _) = (
        next(iter(world.goals.items())),
        next(item for item in world.things.items() if item[0] not in world.goals),
    )
    assert environment.reset().text.splitlines()[0] == f"Task: {world.task}."
    start = world.things[thing]
    observation, reward, done = environment.step(f"take {thing} from {start}")
    assert observation.text.startswith(f"You take the {thing} from the {start}.\nCommands:\n")
    assert observation.system == ""
    assert (reward, done) == (0.0, False)
    offered = {"insert" if p.is_container else "put": p for p in world.places}
    assert {f"{verb} {thing} {'into' if verb == 'insert' else 'on'} {p.name}" for verb, p in offered.items()} <= set(
        environment.commands
    )
    assert f"take {other} from {world.things[other]}" in environment.commands
    last = next(c for c in environment.commands if c.startswith(("put", "insert")) and c.endswith(f" {goal}"))
    observation, reward, done = environment.step(last)
    assert observation.text.endswith(f"the {goal}. You win.")
    assert (reward, done) == (1.0, True)


@pytest.mark.parametrize(
    "reply",
    ["{}", " {} \n", "{}.", '"{}"', "`{}`", "> {}", "\n\n{}\nThen I will see.", "“{}”"],
)
def test_replies_that_mean_a_command(suite, reply):
    environment = suite.make("train-0")
    environment.reset()
    command = environment.commands[1]
    before = environment.anchor
    assert environment.step(reply.format(command.capitalize()))[0].valid is True
    assert environment.anchor != before


@pytest.mark.parametrize("reply", ["", "\n \n", "look", "inventory", "I will {}", "{} {}", "drop it\n{}"])
def test_replies_that_are_no_command_change_nothing(suite, reply):
    environment = suite.make("train-0")
    environment.reset()
    anchor, commands = environment.anchor, environment.commands
    observation, reward, done = environment.step(reply.format(commands[0], commands[0]))
    assert observation.text.startswith("That is not one of the commands.\nCommands:\n" + commands[0])
    assert (reward, done, environment.success) == (0.0, False, False)
    assert (environment.anchor, environment.commands) == (anchor, commands)
    assert observation.valid is False


def test_a_tagged_reply():
    """The same game in the other format: the block counts, what is thought does not, a bare command is none."""
    suite = TextWorldSuite(num_train=2, num_val=0, num_test=0, action_format="tagged")
    environment = suite.make("train-0")
    assert "<action>" in environment.reset().system
    first, other = environment.commands[:2]
    assert environment.step(first)[0].valid is False
    assert environment.step(f"<think>I could <action>{other}</action></think><action>{first.upper()}.</action>")[
        0
    ].valid
    assert first not in environment.commands
    for task in suite.tasks("train"):
        environment = suite.make(task)
        environment.reset()
        assert [environment.step(reply)[1] for _, reply in suite.walkthrough(task)] == [0.0, 1.0]


def test_anchors_are_equal_for_equal_states_only(hard):
    """Over random play, two anchors of a game are equal exactly if the engine's facts are; games share none."""
    facts_of: dict[str, set] = {}
    for task in hard.tasks("train")[:6]:
        for seed in range(4):
            rng, environment = random.Random(seed), hard.make(task)
            environment.reset()
            for _ in range(15):
                facts = frozenset({task} | {str(fact) for fact in environment._state.facts})
                facts_of.setdefault(environment.anchor, set()).add(facts)
                environment.step(rng.choice(environment.commands))
    assert all(len(states) == 1 for states in facts_of.values())
    assert len({state for states in facts_of.values() for state in states}) == len(facts_of) > 50


def test_going_back_gives_the_same_anchor(suite):
    environment = suite.make("train-0")
    environment.reset()
    before, take = environment.anchor, environment.commands[0]
    environment.step(take)
    held = environment.anchor
    thing, place = take.removeprefix("take ").split(" from ")
    environment.step(next(c for c in environment.commands if c.split()[1] == thing and c.split()[3] == place))
    assert environment.anchor == before != held


def test_snapshot_and_restore(hard):
    environment = hard.make("train-0")
    assert isinstance(environment, RestorableEnvironment)
    environment.reset()
    walkthrough = [command for _, command in hard.walkthrough("train-0")]
    for command in walkthrough[:3]:
        environment.step(command)
    saved, anchor, commands = environment.snapshot(), environment.anchor, environment.commands
    for seed in range(3):  # more than once: playing on must not touch the snapshot
        rng = random.Random(seed)
        for _ in range(5):
            environment.step(rng.choice(environment.commands))
        environment.step("nonsense")
        environment.restore(saved)
        assert (environment.anchor, environment.commands) == (anchor, commands)
    other = hard.make("train-0")
    other.reset()
    other.restore(saved)
    assert [other.step(command)[1] for command in walkthrough[3:]][-1] == 1.0


def test_sixteen_threads_see_what_one_sees(hard):
    """Games are made and played at the same time, and many threads share each."""
    jobs = [(task, seed) for seed in range(8) for task in hard.tasks("train")[:6]]
    expected = [play(hard, task, seed, steps=8) for task, seed in jobs]
    fresh = TextWorldSuite(num_train=40, num_val=20, num_test=20, **HARD)
    barrier = threading.Barrier(16)

    def job(number: int, task: str, seed: int) -> list[str]:
        if number < 16:
            barrier.wait(10)  # all sixteen start at once, on games that no thread has made yet
        return play(fresh, task, seed, steps=8)

    pool = EnvironmentPool(num_workers=16, deadline_seconds=60)
    assert pool.call([lambda n=n, j=j: job(n, *j) for n, j in enumerate(jobs)]) == expected


def test_episodes_of_a_game_do_not_touch_each_other(suite):
    one, two = suite.make("train-0"), suite.make("train-0")
    first = one.reset()
    one.step(one.commands[0])
    assert two.reset() == first
    assert suite.make("train-0").reset() == first


def test_closed_containers_hide_what_is_in_them(hard):
    hidden = 0
    for task in hard.tasks("train"):
        world, environment = hard._world(task), hard.make(task)
        scene = environment.reset().text.split("\n", 1)[1]
        for place in world.places:
            if place.room == world.start and place.is_container:
                assert f"The {place.name} is closed." in scene
                assert f"open {place.name}" in environment.commands
                inside = [thing for thing, where in world.things.items() if where == place.name]
                hidden += len(inside)
                assert not any(f"take {thing}" in scene for thing in inside)
                opened = environment.step(f"open {place.name}")[0].text
                assert f"In the {place.name}: {', '.join(inside) or 'nothing'}." in opened
    assert hidden > 10


def test_restate_says_task_and_scene_at_every_step():
    suite = TextWorldSuite(num_train=3, num_val=0, num_test=0, restate=True, **HARD)
    for task in suite.tasks("train"):
        carried = 0
        for observation, _ in suite.walkthrough(task):
            assert f"Task: {suite._world(task).task}.\nYou are in the " in observation.text
            assert observation.text.count("You are in") == 1
            carried += "You carry: " in observation.text
        assert carried > 2


@pytest.mark.parametrize("restate", [False, True])
def test_the_parts_of_an_observation_are_its_text(restate):
    """Task, state and commands, each said once in the text; the state names neither of the others."""
    suite = TextWorldSuite(num_train=3, num_val=0, num_test=0, level="hard", restate=restate)
    for task in suite.tasks("train"):
        for number, (observation, command) in enumerate(suite.walkthrough(task)):
            commands = "\n".join(["Commands:", *observation.actions])
            says_task = restate or number == 0
            assert observation.text.replace(f"Task: {observation.task}\n", "") == f"{observation.state}\n{commands}"
            assert (f"Task: {observation.task}\n" in observation.text) is says_task
            assert observation.task.startswith(f"{suite._world(task).task}. The ")
            assert command in observation.actions
            assert observation.valid is (True if number else None)


def test_levels_are_what_they_say(leveled):
    """Rooms, doors, locks and the length of the plan; and the easy level is the default."""
    level, suite = leveled
    num_rooms, num_doors, num_locked, shortest, longest = LEVELS[level]
    assert suite.max_steps == (3 * longest + 1) // 2
    for split in SPLITS:
        for task in suite.tasks(split):
            world = suite._world(task)
            locked = [door for door in world.doors if door.key]
            assert (len(world.exits), len(world.doors), len(locked)) == (num_rooms, num_doors, num_locked)
            turns = suite.walkthrough(task, held_out=True)
            assert shortest <= len(turns) <= longest
            assert max(len(command.split()) for _, command in turns) <= 6
    easy, default = TextWorldSuite(num_train=3, level="easy"), TextWorldSuite(num_train=3)
    assert [easy.digest(t) for t in easy.tasks("train")] == [default.digest(t) for t in default.tasks("train")]


def test_options_override_the_level():
    suite = TextWorldSuite(num_train=5, num_val=0, num_test=0, level="hard", num_rooms=3, directions=False)
    for task in suite.tasks("train"):
        world = suite._world(task)
        assert len(world.exits) == 3
        assert suite.make(task).reset().task == f"{world.task}."


def test_the_directions_are_true(leveled):
    _, suite = leveled
    for task in suite.tasks("train"):
        world = suite._world(task)
        room = {place.name: place.room for place in world.places}
        for thing, goal in world.goals.items():
            sentence = f"The {thing} is in the {room[world.things[thing]]}, the {goal} in the {room[goal]}."
            assert sentence in suite.make(task).reset().task


def hallway() -> World:
    """Three rooms in a row; the last door is locked, and its key lies in a closed box behind the first one."""
    kitchen, box, shelf = place("table", "kitchen"), place("box", "hall"), place("shelf", "attic")
    exits = {
        "kitchen": {"east": "hall"},
        "hall": {"west": "kitchen", "east": "attic"},
        "attic": {"west": "hall"},
    }
    doors = (Door("red door", ("kitchen", "hall")), Door("blue door", ("hall", "attic"), "blue key"))
    things = {"cup": "shelf", "blue key": "box"}
    return World(exits, (kitchen, box, shelf), things, {"cup": "table"}, True, doors)


def place(name: str, room: str):
    return Place(name, room, name == "box")


def test_a_locked_door_word_for_word():
    """The key is fetched, the door unlocked, opened, passed; what is said of doors changes with them."""
    environment = TextWorldEnvironment(TextWorldGame(hallway(), module.COMMANDS))
    assert environment.reset().state == (
        "You are in the kitchen. On the table: nothing. Exits: east to hall (red door, closed)."
    )
    said = {}
    plan = winning_plan(hallway())
    assert plan == [
        "open red door",
        "go east",
        "open box",
        "take blue key from box",
        "unlock blue door with blue key",
        "open blue door",
        "go east",
        "take cup from shelf",
        "go west",
        "go west",
        "put cup on table",
    ]
    for command in plan:
        assert command in environment.commands
        if command in ("unlock blue door with blue key", "open blue door"):
            assert "go east" not in environment.commands
        said[command] = environment.step(command)[0].state
    assert environment.success
    assert said["go east"].startswith("You go east. You are in the attic. On the shelf: cup. Exits: west to hall")
    assert said["take blue key from box"] == "You take the blue key from the box."
    assert said["go west"].endswith("Exits: east to hall (red door, open). You carry: cup, blue key.")


def test_every_key_can_be_had_before_its_door():
    """Whatever the worlds: playing the plan needs no key that is behind its own door."""
    difficulty = Difficulty(6, 6, 1, 2, True, num_doors=5, num_locked=5)
    for seed in range(100):
        world = sample_world(seed, "train", difficulty)
        environment = TextWorldEnvironment(TextWorldGame(world, module.COMMANDS))
        environment.reset()
        for command in winning_plan(world):
            assert command in environment.commands
            environment.step(command)
        assert environment.success


def test_a_plan_wins_from_wherever_a_random_player_went(leveled):
    """Nothing that is offered leads to a state from which the game cannot be won."""
    _, suite = leveled
    for seed, task in enumerate(suite.tasks("train")):
        rng, environment, world = random.Random(seed), suite.make(task), suite._world(task)
        environment.reset()
        if any(environment.step(rng.choice(environment.commands))[2] for _ in range(15)):
            continue
        game, state = environment._game, environment._state
        where = game.locations(state)
        for command in Planner(world, where["P"], where, game.blocked(state)).plan():
            assert environment.step(command)[0].valid
        assert environment.success


def test_a_half_good_player_wins_some_of_the_medium_games():
    """What the documentation says: following the plan in 3 of 10 steps, else at random, wins about a quarter."""
    suite = TextWorldSuite(num_train=100, num_val=0, num_test=0, level="medium")
    rng, wins = random.Random(0), {0.7: 0, 1.0: 0}
    for noise in wins:
        for task in suite.tasks("train"):
            environment = suite.make(task)
            environment.reset()
            wins[noise] += any(environment.step(noisy(environment, noise, rng))[2] for _ in range(suite.max_steps))
    assert 10 <= wins[0.7] <= 40
    assert wins[1.0] <= 10


def noisy(environment, noise: float, rng: random.Random) -> str:
    """Any offered command with the probability `noise`, else the plan's."""
    if rng.random() < noise:
        return rng.choice(environment.commands)
    game, state = environment._game, environment._state
    where = game.locations(state)
    return Planner(game.world, where["P"], where, game.blocked(state)).plan()[0]


def test_extra_commands_are_offered_and_obeyed():
    suite = TextWorldSuite(
        num_train=1, num_val=0, num_test=0, commands=[*module.COMMANDS, *module.EXTRA_COMMANDS], restate=True
    )
    environment = suite.make("train-0")
    environment.reset()
    thing = environment.commands[-1].split()[1]
    environment.step(environment.commands[-1])
    observation, _, _ = environment.step(f"drop {thing}")
    assert f"On the floor: {thing}." in observation.text
    assert f"take {thing}" in environment.commands


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_rooms": 0}, "num_rooms=0"),
        ({"num_places": 1}, "num_places=1"),
        ({"num_deliveries": 9}, "num_deliveries=9"),
        ({"num_distractors": 40}, "num_distractors=40"),
        ({"num_val": -1}, "num_val=-1"),
        ({"num_doors": 1}, "num_doors=1 is out of range: allowed are 0 to 0"),
        ({"num_rooms": 3, "num_doors": 1, "num_locked": 2}, "num_locked=2 is out of range: allowed are 0 to 1"),
        ({"min_commands": 3, "max_commands": 2}, "min_commands=3"),
        ({"num_train": 5, "min_commands": 3}, "num_train=5: only 0 different games were found; .* min_commands=3"),
        ({"level": "nightmare"}, "allowed are easy, medium, hard"),
        ({"action_format": "json"}, "action_format='json'"),
        ({"commands": ["take", "put", "insert", "open", "go"], "level": "hard"}, "unlock"),
        ({"commands": ["take", "put"]}, "insert"),
        ({"commands": ["take", "put", "insert"], "closed": True}, "open"),
        ({"commands": ["take", "put", "insert", "fly"]}, "fly"),
    ],
)
def test_refuses_options_that_can_not_work(options, message):
    with pytest.raises(UserError, match=message):
        TextWorldSuite(**options)


def test_unknown_task(suite):
    with pytest.raises(UserError, match="'train-999'"):
        suite.make("train-999")


def test_missing_textworld_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "textworld", None)
    with pytest.raises(UserError, match=r"lit-agentrl\[textworld\]"):
        TextWorldSuite()


def test_importing_the_suite_does_not_import_textworld():
    code = "import sys, lit_agentrl.envs.textworld; sys.exit('textworld' in sys.modules or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["suite", "hard"])
def test_worlds_meet_the_constraints_of_textworld(name, request):
    from textworld.generator.maker import get_failing_constraints

    suite = request.getfixturevalue(name)
    for task in suite.tasks("train")[:20]:
        assert get_failing_constraints(TextWorldGame(suite._world(task), module.COMMANDS).start) == []


@pytest.mark.slow
def test_the_compiled_game_agrees(tmp_path):
    """TextWorld's own Inform 7 game of the same world offers the same commands at each step and is won by the same."""
    import textworld

    world = sample_world(3, "train", Difficulty(3, 5, 2, 3, True, num_doors=2, num_locked=1))
    infos = textworld.EnvInfos(admissible_commands=True, won=True)
    compiled = textworld.start(make_with_textworld(world).compile(str(tmp_path / "game.z8")), request_infos=infos)
    game, rng = TextWorldGame(world, module.COMMANDS), random.Random(0)
    for commands in ([None] * 40, winning_plan(world)):  # None: any command
        environment, state = TextWorldEnvironment(game), compiled.reset()
        environment.reset()
        for command in commands:
            offered = sorted(c for c in state.admissible_commands if c.split()[0] in module.COMMANDS)
            assert environment.commands == offered
            chosen = command or rng.choice(offered)
            state, _, done = compiled.step(chosen)
            assert environment.step(chosen)[2] == done == state.won
            if done:
                break
    assert done
    compiled.close()


def make_with_textworld(world: World):
    """The world, made with TextWorld's own tool for hand-written games."""
    from textworld import GameMaker
    from textworld.generator.game import Event, Quest
    from textworld.logic import Proposition

    maker = GameMaker()
    rooms = {name: maker.new_room(name) for name in world.exits}
    doors = {}
    for room, exits in world.exits.items():
        for direction, neighbour in exits.items():
            if direction in ("north", "east"):  # each way once
                path = maker.connect(rooms[room].exits[direction], rooms[neighbour].exits[OPPOSITE[direction]])
                if door := world.door(room, neighbour):
                    doors[door.name] = maker.new_door(path, name=door.name)
                    doors[door.name].add_property("locked" if door.key else "closed")
    maker.set_player(rooms[world.start])
    places = {place.name: maker.new("c" if place.is_container else "s", place.name) for place in world.places}
    for place in world.places:
        if place.is_container:
            places[place.name].add_property("closed" if world.closed else "open")
        rooms[place.room].add(places[place.name])
    keys = {door.key: door.name for door in world.doors if door.key}
    things = {thing: maker.new("k" if thing in keys else "o", thing) for thing in world.things}
    for key, door in keys.items():
        maker.add_fact("match", things[key], doors[door])
    for thing, place in world.things.items():
        places[place].add(things[thing])
    conditions = [
        Proposition("in" if places[goal].type == "c" else "on", [things[thing].var, places[goal].var])
        for thing, goal in world.goals.items()
    ]
    maker.quests = [Quest([Event(conditions=conditions)])]
    return maker
