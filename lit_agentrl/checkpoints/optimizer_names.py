"""An optimiser's state by the names of weights, as shards need it, or by their number, as single files have it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def by_number(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimiser's state with names as `Optimizer.state_dict` has it: weights are numbered through its groups."""
    if not state:  # another rank than the one that gathers
        return {}
    numbers: dict[str, int] = {}
    groups = []
    for group in state["param_groups"]:
        for name in group["params"]:
            numbers[name] = len(numbers)
        groups.append({**group, "params": [numbers[name] for name in group["params"]]})
    return {"state": {numbers[name]: value for name, value in state["state"].items()}, "param_groups": groups}


def by_name(state: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """The inverse: `names` in the order of the optimiser's groups."""
    groups = [{**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[number]: value for number, value in state["state"].items()}, "param_groups": groups}
