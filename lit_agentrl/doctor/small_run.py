"""A training run cut down to what the doctor needs: one small collection, no update, nothing written."""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace

TRAINER: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "callbacks": None,
    "profiler": None,
    "fast_dev_run": False,
    "overfit_batches": 0.0,
    "limit_train_batches": None,
    "max_epochs": 1,
    "min_epochs": None,
    "max_steps": -1,
    "min_steps": None,
    "max_time": None,
}
RANKS: dict[str, Any] = {"devices": 1, "num_nodes": 1, "strategy": "auto"}
"""One rank: rounding and reuse do not depend on how many there are."""
DATA: dict[str, Any] = {"num_updates": 1, "num_passes": 1, "max_rounds": 1}
MODEL: dict[str, Any] = {"drop_zero_advantage": False, "overlong": "train"}
"""An untrained policy often earns the same with all trajectories; without these there would be no row to look at."""


def shrink(config: Namespace, num_prompts: int, folder: str) -> list[str]:
    """Cut the configuration down in place, and give the changes to what is looked at, as "option: before -> after".

    An option that a data module or a module does not have is left alone.

    Args:
        config: Of the subcommand, with `trainer`, `data` and `model`.
        num_prompts: Most prompts to collect.
        folder: Takes the place of the run folder.
    """
    for name, value in (TRAINER | {"default_root_dir": folder}).items():
        config.trainer[name] = value
    data, model = config.data.init_args, config.model.init_args
    wanted = DATA | {"num_prompts": min(num_prompts, data.get("num_prompts", num_prompts))}
    ranks = [change for change in _override("trainer", config.trainer, RANKS) if ": auto ->" not in change]
    return [*ranks, *_override("data", data, wanted), *_override("model", model, MODEL)]


def _override(section: str, options: Namespace, wanted: dict[str, Any]) -> list[str]:
    changes = []
    for name, value in wanted.items():
        if name in options and options[name] != value:
            changes.append(f"{section}.{name}: {options[name]} -> {value}")
            options[name] = value
    return changes
