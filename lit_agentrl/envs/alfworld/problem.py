"""A sampled game as the files that ALFWorld reads."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence

from lit_agentrl.envs.alfworld.files import MADE_BY
from lit_agentrl.envs.alfworld.floor_plans import Tables
from lit_agentrl.envs.alfworld.sampling import Sample

MAKER = "lit-agentrl make-alfworld-games"
NOTICE = "ALFWorld-format game, placements sampled: not one of the ALFWorld benchmark"
# Ids hold what PDDL names must not; ALFWorld turns them back by these words.
_MANGLED = {"|": "_bar_", "+": "_plus_", "-": "_minus_", ".": "_dot_", ",": "_comma_"}
_OF_THINGS = ("cleanable", "heatable", "coolable", "sliceable", "toggleable", "isReceptacleObject")


def task_sentence(sample: Sample, tables: Tables, rng: random.Random) -> str:
    """The task in words, by one of ALFWorld's templates."""
    template: str = rng.choice(tables.goals[sample.task]["templates"])
    goal = sample.goal.lower()
    return template.format(obj=sample.target.lower(), recep=goal, toggle=goal)


def problem_text(sample: Sample, tables: Tables) -> str:
    """The start and the goal in PDDL."""
    goal = tables.goals[sample.task]["pddl"].format(obj=sample.target, recep=sample.goal, toggle=sample.goal)
    goal = goal.strip().replace("#", "-")  # it closes the problem's parenthesis, too
    objects, facts = "\n        ".join(_objects(sample)), "\n        ".join(_facts(sample, tables))
    return f"""
(define (problem plan_made_{sample.plan.number})
(:domain alfred)
(:objects
        {objects}
        )
(:init
        {facts}
        )
{goal}
"""


def game_file(sample: Sample, tables: Tables, problem: str, sentence: str, walkthrough: Sequence[str]) -> str:
    """The content of `game.tw-pddl`."""
    content = {
        MADE_BY: MAKER,
        "notice": NOTICE,
        "pddl_domain": tables.domain,
        "grammar": tables.grammar.replace("UNKNOWN GOAL", sentence),
        "pddl_problem": problem,
        "solvable": True,
        "walkthrough": list(walkthrough),
    }
    return json.dumps(content)


def trajectory_file(sample: Sample, sentence: str) -> str:
    """The content of `traj_data.json`, without which ALFWorld's own loader passes a game over."""
    is_lamp = sample.task == "look_at_obj_in_light"
    content = {
        MADE_BY: MAKER,
        "notice": NOTICE,
        "task_type": sample.task,
        "scene": {"scene_num": sample.plan.number, "floor_plan": f"FloorPlan{sample.plan.number}"},
        "pddl_params": {
            "object_target": sample.target,
            "parent_target": "" if is_lamp else sample.goal,
            "toggle_target": sample.goal if is_lamp else "",
            "mrecep_target": "",
            "object_sliced": False,
        },
        "turk_annotations": {"anns": [{"task_desc": sentence, "high_descs": []}]},
    }
    return json.dumps(content)


def _objects(sample: Sample) -> Iterator[str]:
    receptacles, things = sample.plan.receptacles, sample.things
    yield "agent1 - agent"
    yield from (f"{_mangled(thing.id)} - object" for thing in things)
    yield from (f"{_mangled(receptacle.id)} - receptacle" for receptacle in receptacles)
    yield from (f"{kind}Type - otype" for kind in sorted({thing.kind for thing in things}))
    yield from (f"{kind}Type - rtype" for kind in sorted(sample.plan.kinds))
    locations = {sample.start} | {receptacle.location for receptacle in receptacles}
    yield from (f"{_mangled(location)} - location" for location in sorted(locations))


def _facts(sample: Sample, tables: Tables) -> Iterator[str]:
    yield f"(atLocation agent1 {_mangled(sample.start)})"
    for receptacle in sample.plan.receptacles:
        name = _mangled(receptacle.id)
        yield f"(receptacleType {name} {receptacle.kind}Type)"
        yield f"(receptacleAtLocation {name} {_mangled(receptacle.location)})"
        if receptacle.kind in tables.properties["openable"]:
            yield f"(openable {name})"
    kinds = sorted({thing.kind for thing in sample.things})
    for place in sorted(sample.plan.kinds):
        yield from (f"(canContain {place}Type {kind}Type)" for kind in kinds if kind in tables.holds[place])
    for thing in sample.things:
        name = _mangled(thing.id)
        yield f"(objectType {name} {thing.kind}Type)"
        yield f"(inReceptacle {name} {_mangled(thing.place.id)})"
        yield f"(objectAtLocation {name} {_mangled(thing.place.location)})"
        if thing.kind != "DeskLamp":
            yield f"(pickupable {name})"
        yield from (f"({prop} {name})" for prop in _OF_THINGS if thing.kind in tables.properties[prop])


def _mangled(name: str) -> str:
    for character, word in _MANGLED.items():
        name = name.replace(character, word)
    return name
