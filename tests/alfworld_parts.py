"""What the tests of ALFWorld share: a game small enough to know by heart, the real games, and the twin engine."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from lit_agentrl.envs.alfworld.game import ALFWorldGame

REAL = Path(__file__).parent.parent.parent / "shared" / "data" / "alfworld"
needs_real = pytest.mark.skipif(
    not REAL.is_dir(), reason="needs real ALFWorld games in ../shared/data/alfworld beside the checkout"
)

DOMAIN = """
(define (domain tiny) ; two rooms' worth of rules
 (:types agent location box thing lamp - thing)
 (:action Go :parameters (?a - agent ?from - location ?to - location ?b - box)
  :precondition (and (at ?a ?from) (stands ?b ?to))
  :effect (and (not (at ?a ?from)) (at ?a ?to) (seen ?b) (increase (cost) 1)))
 (:action Open :parameters (?a - agent ?b - box)
  :precondition (and (lid ?b) (not (open ?b)) (exists (?l - location) (and (at ?a ?l) (stands ?b ?l))))
  :effect (open ?b))
 (:action Shut :parameters (?a - agent ?b - box)
  :precondition (and (open ?b) (exists (?l - location) (and (at ?a ?l) (stands ?b ?l))))
  :effect (not (open ?b)))
 (:action Take :parameters (?a - agent ?t - thing ?b - box)
  :precondition (and (in ?t ?b) (not (full ?a)) (or (not (lid ?b)) (open ?b))
                     (exists (?l - location) (and (at ?a ?l) (stands ?b ?l))))
  :effect (and (not (in ?t ?b)) (holds ?a ?t) (full ?a)))
 (:action Put :parameters (?a - agent ?t - thing ?b - box)
  :precondition (and (holds ?a ?t) (or (not (lid ?b)) (open ?b))
                     (exists (?l - location) (and (at ?a ?l) (stands ?b ?l))))
  :effect (and (in ?t ?b) (not (holds ?a ?t)) (not (full ?a))))
 (:action Press :parameters (?a - agent ?t - lamp)
  :precondition (holds ?a ?t)
  :effect (and (when (lit ?t) (not (lit ?t))) (when (not (lit ?t)) (lit ?t))))
 (:action Ask :parameters (?a - agent ?t - thing)
  :precondition (exists (?l - location, ?b - box) (and (at ?a ?l) (in ?t ?b)))
  :effect (asked ?t))
)
"""
GRAMMAR = '''
grammar :: """
{
  "intro": [{"rhs": "You see [{#named(b)# | stands(b:box, l:location)}].\\n#task#"}],
  "named(b)": [{"rhs": "{b.indefinite + ' ' + b.name}"}],
  "task": [{"rhs": "Your task is to: do it."}],
  "box": [{"condition": "lid(b:box) & open(b:box)", "rhs": "In it: [{x.name or x.id | in(x:thing, b:box)}]."},
          {"condition": "lid(b:box)", "rhs": "It is shut."},
          {"rhs": "On it: [{x.name | in(x:thing, b:box)}]#gone#."}],
  "gone": [{"condition": "not_in(t:thing, b:box)", "rhs": "{', once ' + t.name | not_in(t:thing, b:box)}"},
           {"rhs": ""}],
  "list_empty": [{"rhs": "nothing"}],
  "list_separator": [{"rhs": ", "}],
  "list_last_separator": [{"rhs": ", and "}]
}
""";
action Go { template :: "go to {b}"; feedback :: "You go. #box#"; }
action Open { template :: "open {b}"; feedback :: "#box#"; }
action Shut { template :: "shut {b}"; feedback :: "#box#"; }
action Take { template :: "take {t}"; feedback :: "#box#"; }
action Put { template :: "put {t} on {b}"; feedback :: "#box#"; }
action Press { template :: "press {t}"; feedback :: "Click."; }
action Ask { template :: "ask {t}"; feedback :: "Hm."; }
'''
START = """(at me middle) (stands desk_bar_1 here) (stands chest_bar_1 there) (lid chest_bar_1)
 (in cup_bar_1 chest_bar_1) (in cup_bar_2 chest_bar_1) (in lamp_bar_1 desk_bar_1)"""
OBJECTS = (
    "Me - agent middle here there - location desk_bar_1 chest_bar_1 - box cup_bar_1 cup_bar_2 - thing lamp_bar_1 - lamp"
)


def tiny(goal: str = "(in cup_bar_1 desk_bar_1)", start: str = START) -> ALFWorldGame:
    """A desk with a lamp, a chest with two cups, and somebody between them."""
    problem = f"(define (problem p) (:domain tiny) (:objects {OBJECTS}) (:init {start}) (:goal {goal})))"
    return ALFWorldGame(DOMAIN, GRAMMAR, problem)


def twin(path: Path, commands: list[str]) -> list[list[object]]:
    """What TextWorld's engine shows, offers and decides at every step of the game; skips where it is not installed."""
    if not all(map(find_spec, ("alfworld", "textworld", "fast_downward"))):
        pytest.skip("needs TextWorld's engine: pip install 'lit-agentrl[alfworld]'")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "alfworld_twin.py"), str(path)],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen: list[list[object]] = json.loads(done.stdout.splitlines()[-1])
    return seen
