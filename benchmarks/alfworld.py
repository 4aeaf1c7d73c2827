"""What playing ALFWorld costs: milliseconds to read a game, to start an episode, for a step, and for a winning plan.

    ALFWORLD_DATA=FOLDER python benchmarks/alfworld.py [--split train]

CPU time, one thread, means over all games of the split. Steps are those of the plans.
"""

from __future__ import annotations

import argparse
import sys
import time
from statistics import mean

from lit_agentrl.envs import ALFWorldSuite
from lit_agentrl.errors import UserError


def main() -> None:
    """Play every game once, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="the folder of the games; by default $ALFWORLD_DATA")
    parser.add_argument("--split", default="train", choices=["train", "val", "test"])
    parsed = parser.parse_args()
    try:
        suite = ALFWorldSuite(parsed.data)
    except UserError as error:  # 2 is what `make bench` takes for "cannot run here"
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    tasks = list(suite.tasks(parsed.split))
    times: dict[str, list[float]] = {
        "read and start": [],
        "start, already read": [],
        "step": [],
        "plan and its play": [],
    }
    for task in tasks:
        for what in ("read and start", "start, already read"):
            began = time.process_time()
            environment = suite.make(task)
            environment.reset()
            times[what].append(time.process_time() - began)
        began = time.process_time()
        turns = suite.walkthrough(task, held_out=True)
        times["plan and its play"].append(time.process_time() - began)
        began = time.process_time()
        for _, reply in turns:
            environment.step(reply)
        times["step"].append((time.process_time() - began) / len(turns))
        assert environment.success, task
    print(f"{len(tasks)} games of {parsed.split}, all won\n\n| | ms |\n|---|---|")
    for what, seconds in times.items():
        print(f"| {what} | {1000 * mean(seconds):.2f} |")


if __name__ == "__main__":
    main()
