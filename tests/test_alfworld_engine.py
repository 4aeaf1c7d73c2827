"""ALFWorld's rules and texts: a world known by heart, and TextWorld's engine as a twin on real and made games."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from alfworld_parts import REAL, START, needs_real, tiny, twin
from lit_agentrl.envs.alfworld.files import GAME, read_game
from lit_agentrl.envs.alfworld.game import ALFWorldGame
from lit_agentrl.envs.alfworld.grammar import GrammarError, read_grammar, read_symbols
from lit_agentrl.envs.alfworld.maker import Counts, make_games
from lit_agentrl.envs.alfworld.narrator import display_names
from lit_agentrl.envs.alfworld.pddl import PddlError, read_domain, read_problem
from lit_agentrl.envs.alfworld.planner import Planner, commands_of, plan, wins


def play(game: ALFWorldGame, *commands: str):
    """The state after the commands, and what the last one was answered."""
    state, said = game.start, ""
    for command in commands:
        move = game.moves(state)[command]
        state = game.apply(state, move)
        said = game.feedback(state, move)
    return state, said


def test_intro_lists_in_the_order_of_ids():
    assert tiny().intro() == "You see a chest 1, and a desk 1.\nYour task is to: do it."
    assert tiny().task == "do it."


def test_moves_are_what_the_rules_allow():
    game = tiny()
    assert list(game.moves(game.start)) == ["go to chest 1", "go to desk 1"]
    at_chest, said = play(game, "go to chest 1")
    assert said == "You go. It is shut."
    # Going where one stands would change nothing but `seen`: it is on offer, as that is an effect of its own.
    assert list(game.moves(at_chest)) == ["go to chest 1", "go to desk 1", "open chest 1"]
    opened, said = play(game, "go to chest 1", "open chest 1")
    assert said == "In it: cup 2, and cup 1."
    assert list(game.moves(opened)) == ["go to chest 1", "go to desk 1", "shut chest 1", "take cup 1", "take cup 2"]
    holding, said = play(game, "go to chest 1", "open chest 1", "take cup 2")
    assert said == "In it: cup 1."
    assert list(game.moves(holding)) == ["go to chest 1", "go to desk 1", "put cup 2 on chest 1", "shut chest 1"]


def test_what_restores_its_own_condition_is_no_move():
    """The planner drops such actions: without `seen`, one cannot go to where one stands."""
    import alfworld_parts as parts

    domain = parts.DOMAIN.replace("(seen ?b) ", "")
    problem = f"(define (problem p) (:objects {parts.OBJECTS}) (:init {START}) (:goal (at me here)))"
    game = ALFWorldGame(domain, parts.GRAMMAR, problem)
    state, _ = play(game, "go to chest 1")
    assert list(game.moves(state)) == ["go to desk 1", "open chest 1"]


def test_a_state_is_a_value():
    game = tiny()
    before = game.start.all
    after, _ = play(game, "go to desk 1", "take lamp 1")
    assert game.start.all == before
    assert ("holds", "me", "lamp_bar_1") in after.all
    assert ("in", "lamp_bar_1", "desk_bar_1") not in after.all


def test_conditional_effects_look_at_the_state_before():
    game = tiny()
    way = ["go to desk 1", "take lamp 1"]
    lit = [("lit", "lamp_bar_1") in play(game, *way, *["press lamp 1"] * n)[0].all for n in range(4)]
    assert lit == [False, True, False, True]


def test_a_comma_in_a_type_makes_a_type_without_members():
    """ALFWorld's rules have one: it is why things can be examined in hand only."""
    state, _ = play(tiny(), "go to desk 1")
    assert "ask lamp 1" not in tiny().moves(state)


def test_texts_remember_what_was_taken_back():
    game = tiny()
    assert play(game, "go to desk 1")[1] == "You go. On it: lamp 1."
    assert play(game, "go to desk 1", "take lamp 1")[1] == "On it: nothing, once lamp 1."
    # The lamp is what `t` stands for already, so it cannot be an `x` as well: TextWorld's rule.
    assert play(game, "go to desk 1", "take lamp 1", "put lamp 1 on desk 1")[1] == "On it: nothing."


@pytest.mark.parametrize(
    ("goal", "commands"),
    [
        ("(in cup_bar_1 desk_bar_1)", 5),  # go, open, take, go, put
        ("(and (in cup_bar_1 desk_bar_1) (in cup_bar_2 desk_bar_1))", 9),  # one hand: go, take, go, put once more
        ("(exists (?t - lamp) (lit ?t))", 3),
        ("(exists (?t ?s - thing) (and (not (= ?t ?s)) (holds me ?t) (in ?s desk_bar_1) (open chest_bar_1)))", 3),
        ("(or (in cup_bar_1 desk_bar_1) (holds me lamp_bar_1))", 2),
        ("(at me middle)", 0),
    ],
)
def test_plans_win_with_the_fewest_moves_here(goal, commands):
    game = tiny(goal)
    moves = plan(game)
    assert moves is not None
    assert len(moves) == commands
    assert wins(game, commands_of(game, moves))


@pytest.mark.parametrize("goal", ["(in cup_bar_1 cup_bar_2)", "(lit cup_bar_1)", "(lid desk_bar_1)"])
def test_what_cannot_be_won_has_no_plan(goal):
    assert plan(tiny(goal)) is None


def test_wins_asks_for_the_win_at_the_end():
    game = tiny("(holds me lamp_bar_1)")
    assert wins(game, ["go to desk 1", "take lamp 1"])
    assert not wins(game, ["go to desk 1"])
    assert not wins(game, ["take lamp 1"])
    assert not wins(game, ["go to desk 1", "take lamp 1", "go to chest 1"])


def test_plans_and_keys_are_the_same_in_every_process():
    """Sets of texts are gone through in another order in each."""
    program = (
        "from alfworld_parts import tiny; from lit_agentrl.envs.alfworld.planner import commands_of, plan;"
        "game = tiny('(exists (?t ?s - thing) (and (not (= ?t ?s)) (in ?t desk_bar_1) (in ?s chest_bar_1)))');"
        "print(commands_of(game, plan(game)), game.key(game.start))"
    )
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    said = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(said) == 1


def test_keys_are_equal_for_equal_states():
    game = tiny()
    start = game.key(game.start)
    there = game.key(play(game, "go to chest 1")[0])
    assert there != start
    # `seen` is read by nothing, and `not_in` by texts only: neither tells states apart.
    assert game.key(play(game, "go to desk 1", "go to chest 1")[0]) == there
    assert game.key(play(game, "go to chest 1", "open chest 1", "shut chest 1")[0]) == there
    one = play(game, "go to desk 1", "take lamp 1", "put lamp 1 on desk 1", "go to chest 1")[0]
    assert game.key(one) == there
    assert game.key(play(game, "go to chest 1", "open chest 1")[0]) != there
    assert tiny("(at me here)").key(game.start) != start


def test_display_names_count_backwards_and_basins_are_parts():
    names = display_names(["mug_bar_b", "mug_bar_a", "sink_bar_x_bar_sinkbasin", "agent1"])
    assert names == {
        "mug_bar_a": "mug 2",
        "mug_bar_b": "mug 1",
        "sink_bar_x_bar_sinkbasin": "sinkbasin 1",
        "agent1": "agent1",
    }


@pytest.mark.parametrize("text", ["{__import__('os').getcwd()}", "{o.__class__}", "{1 or 2}", "{o.name()}"])
def test_expressions_are_not_run(text):
    """TextWorld hands them to `eval`."""
    with pytest.raises(GrammarError, match="not supported"):
        read_symbols(text)


def test_grammars_that_are_none_are_refused():
    with pytest.raises(GrammarError, match="character 0"):
        read_grammar("hello")
    with pytest.raises(GrammarError, match="not JSON"):
        read_grammar('grammar :: """{"a": """;')
    with pytest.raises(GrammarError, match="rhs"):
        read_grammar('grammar :: """{"a": [{}]}""";')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(define (problem", "not one closed"),
        ("hello", "not one closed"),
        ("(define (:goal (forall (?x) (p ?x))))", "forall"),
    ],
)
def test_problems_that_are_none_are_refused(text, message):
    with pytest.raises(PddlError, match=message):
        read_problem(text)


def test_rules_are_read_once():
    import alfworld_parts as parts

    assert read_domain(parts.DOMAIN) is read_domain(parts.DOMAIN)


def random_commands(path: Path, steps: int, seed: int) -> list[str]:
    """A random play, kinds of commands alike often (most are ways to go), with a command that does not exist."""
    text = read_game(path)
    game = ALFWorldGame(text.domain, text.grammar, text.problem)
    rng, state, commands = random.Random(seed), game.start, []
    for step in range(steps):
        moves = game.moves(state)
        kind = rng.choice(sorted({command.split()[0] for command in moves}))
        command = rng.choice([c for c in moves if c.split()[0] == kind]) if step % 8 != 7 else "fly to the moon"
        commands.append(command)
        state = game.apply(state, moves[command]) if command in moves else state
    return commands


def seen_here(path: Path, commands: list[str]) -> list[list[object]]:
    """What this engine shows, offers and decides at every step."""
    text = read_game(path)
    game = ALFWorldGame(text.domain, text.grammar, text.problem)
    state = game.start
    seen: list[list[object]] = [[game.intro(), list(game.moves(state)), game.is_won(state)]]
    for command in commands:
        move = game.moves(state).get(command)
        state = game.apply(state, move) if move else state
        said = game.feedback(state, move) if move else "Nothing happens."
        seen.append([said, list(game.moves(state)), game.is_won(state)])
    return seen


def real_game(kind: str, index: int) -> Path:
    return sorted(REAL.glob(f"*/{kind}*/*/{GAME}"))[index]


@needs_real
def test_equals_textworld_on_a_real_game():
    path = real_game("pick_heat", 0)
    commands = random_commands(path, steps=40, seed=0)
    assert seen_here(path, commands) == twin(path, commands)


@needs_real
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pick_and", "pick_clean", "pick_cool", "pick_two", "look"])
def test_equals_textworld_on_real_games_of_every_type(kind):
    path = real_game(kind, -1)
    commands = random_commands(path, steps=60, seed=1)
    assert seen_here(path, commands) == twin(path, commands)


def test_equals_textworld_on_a_made_game(tmp_path):
    """Random play first, then the way to the win."""
    pytest.importorskip("alfworld", reason="needs the alfworld extra: pip install 'lit-agentrl[alfworld]'")
    make_games(tmp_path, Counts(num_train=5, num_valid_seen=0, num_valid_unseen=0, seed=5))
    (path,) = tmp_path.glob(f"train/pick_cool*/*/{GAME}")
    text = read_game(path)
    game = ALFWorldGame(text.domain, text.grammar, text.problem)
    commands = random_commands(path, steps=25, seed=2)
    state = play(game, *[command for command in commands if command != "fly to the moon"])[0]
    moves = Planner(game).plan(state)
    assert moves
    for move in moves:
        commands.append(game.command(state, move))
        state = game.apply(state, move)
    seen = seen_here(path, commands)
    assert seen == twin(path, commands)
    assert [step[2] for step in seen[-2:]] == [False, True]
