"""How often does GiGPO's text anchor take different states for one? Random play, some of it with impossible actions.

Run (seconds for TextWorld): `python benchmarks/gigpo_aliasing.py [--suite SokobanSuite] [--options '{"size": 6}']`.
Every task is played 8 times, as a group is. An offered action is drawn at random, in 15 % of the steps a sentence that
is none. States are told apart by the environment's own key.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter, defaultdict
from collections.abc import Hashable

from lit_agentrl import envs
from lit_agentrl.anchors import AnchorKind, anchor_keys
from lit_agentrl.envs.actions import as_reply
from lit_agentrl.types import EnvironmentSuite, Step, Trajectory

IMPOSSIBLE = "juggle the moon"
KINDS: tuple[AnchorKind, ...] = ("text", "text_history", "state")


def main() -> None:
    """Play and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", default="TextWorldSuite", help="a class of lit_agentrl.envs")
    parser.add_argument("--options", type=json.loads, default={"level": "medium"}, help="its arguments, as JSON")
    parser.add_argument("--split", default="train")
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--episodes", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--bad", type=float, default=0.15, help="share of impossible actions")
    parsed = parser.parse_args()
    suite: EnvironmentSuite = getattr(envs, parsed.suite)(**parsed.options)
    rng = random.Random(0)
    groups = [
        [play(suite, task, parsed.steps, parsed.bad, rng) for _ in range(parsed.episodes)]
        for task in suite.tasks(parsed.split)[: parsed.tasks]
    ]
    num_steps = sum(len(trajectory.steps) for group in groups for trajectory in group)
    print(
        f"{parsed.suite} {parsed.options}: {len(groups)} tasks x {parsed.episodes} random episodes, {num_steps} steps,",
        f"{parsed.bad:.0%} of the actions impossible\n",
    )
    print("| anchor | groups | alone | largest | in a group of several states | text of the largest |")
    print("|---|---|---|---|---|---|")
    for kind in KINDS:
        print(row(kind, groups, num_steps))
    print(f"\n{commonest(groups)}")


def play(suite: EnvironmentSuite, task: str, max_steps: int, bad: float, rng: random.Random) -> Trajectory:
    """One random episode."""
    environment = suite.make(task)
    observation, steps = environment.reset(), []
    for _ in range(max_steps):
        action = IMPOSSIBLE if rng.random() < bad or not observation.actions else rng.choice(observation.actions)
        steps.append(
            Step([], [], [], state=observation.state or observation.text, anchor=environment.anchor, action=action)
        )
        observation, _, done = environment.step(as_reply(action, "plain"))
        if done:
            break
    environment.close()
    return Trajectory(steps)


def row(kind: AnchorKind, groups: list[list[Trajectory]], num_steps: int) -> str:
    """One kind of anchor: how many groups, how large, how many of the steps meet steps of another state there."""
    states: dict[Hashable, Counter[Hashable]] = defaultdict(Counter)
    texts: dict[Hashable, str] = {}
    for number, group in enumerate(groups):
        for trajectory in group:
            keys = zip(anchor_keys(trajectory, kind), anchor_keys(trajectory, "state"), trajectory.steps, strict=True)
            for key, state, step in keys:
                states[number, key][state] += 1
                texts[number, key] = step.state
    sizes = {key: sum(found.values()) for key, found in states.items()}
    mixed = sum(sizes[key] for key, found in states.items() if len(found) > 1)
    alone = sum(size == 1 for size in sizes.values())
    largest = max(sizes, key=lambda key: sizes[key])
    text = " ".join(texts[largest].split())[:40]
    return (
        f"| `{kind}` | {len(sizes)} | {alone} | {sizes[largest]} steps, {len(states[largest])} states | "
        f"{100 * mixed / num_steps:.1f} % of steps | {text} |"
    )


def commonest(groups: list[list[Trajectory]]) -> str:
    """The text seen most often: how many states it stands for in each task, and how the other texts fare."""
    states: dict[tuple[int, str], Counter[Hashable]] = defaultdict(Counter)
    for number, group in enumerate(groups):
        for trajectory in group:
            for state, step in zip(anchor_keys(trajectory, "state"), trajectory.steps, strict=True):
                states[number, step.state][state] += 1
    counts: Counter[str] = Counter()
    for (_, text), found in states.items():
        counts[text] += sum(found.values())
    top, num_top = counts.most_common(1)[0]
    per_task = [len(found) for (_, text), found in states.items() if text == top]
    others = [found for (_, text), found in states.items() if text != top]
    mixed = sum(sum(found.values()) for found in others if len(found) > 1)
    rest = sum(counts.values()) - num_top
    return (
        f"{top!r}: {num_top} steps ({num_top / sum(counts.values()):.0%}); in {len(per_task)} tasks it stands for "
        f"{min(per_task)} to {max(per_task)} states, {sum(per_task) / len(per_task):.0f} on average. Of the other "
        f"{rest} steps {mixed / rest:.0%} are in a group of several states."
    )


if __name__ == "__main__":
    main()
