"""The settings under which a step must be the same, and the options that each of them stands for."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from lit_agentrl.doctor.contract.facts import Facts

Options = dict[str, Any]
"""A subcommand's configuration as plain values."""
Strategy = Literal["single", "ddp", "fsdp2"]
STRATEGIES: dict[Strategy, Any] = {
    "single": "auto",
    "ddp": "ddp",
    "fsdp2": {"class_path": "lit_agentrl.strategies.FSDP2Strategy", "init_args": {}},
}
PLAIN: Options = {"share_prefix": False, "gradient_checkpointing": False, "compile": False}
"""What every setting starts from: padded rows, activations kept, eager layers."""


@dataclass(frozen=True)
class Setting:
    """How the step is computed; what is trained is the same in all of them."""

    name: str
    strategy: Strategy = "single"
    ranks: int = 1
    is_split: bool = False
    """Micro-batches as small as the longest row allows, not all rows in as few as `data.max_tokens` allows."""
    is_shared: bool = False
    """Rows packed into one sequence, prefixes that they share encoded once."""
    is_recomputed: bool = False
    """Gradient checkpointing."""
    is_as_configured: bool = False
    """`model.share_prefix`, `gradient_checkpointing` and `compile` as the user has them."""
    is_exact: bool = False
    """In float32, whatever the user computes in."""

    @property
    def num_changes(self) -> int:
        """Against the baseline; a strategy and its ranks are one."""
        return (self.strategy != "single") + self.is_split + self.is_shared + self.is_recomputed + self.is_as_configured


BASELINE = Setting("1 process, padded")
IN_FLOAT32 = Setting("in float32", is_exact=True)
"""How far a step of 16 bits is from this one is how far it rounds."""
SETTINGS = (
    Setting("split", is_split=True),
    Setting("packed and shared", is_shared=True),
    Setting("packed, shared, split", is_shared=True, is_split=True),
    Setting("checkpointing", is_recomputed=True),
    Setting("as configured", is_as_configured=True),
    Setting("DDP, 1 rank", "ddp"),
    Setting("DDP, 2 ranks", "ddp", 2),
    Setting("DDP, 2 ranks, all of it", "ddp", 2, is_split=True, is_shared=True, is_recomputed=True),
    Setting("FSDP2, 1 rank", "fsdp2"),
    Setting("FSDP2, 2 ranks", "fsdp2", 2),
    Setting("FSDP2, 2 ranks, all of it", "fsdp2", 2, is_split=True, is_shared=True, is_recomputed=True),
)


def options_of(setting: Setting, base: Options, baseline: Facts | None = None) -> Options:
    """The options of one run.

    Args:
        setting: What to run.
        base: The options that all runs share.
        baseline: What the first run found: a split needs to know the longest row.
    """
    options = copy.deepcopy(base)
    model, data = options["model"]["init_args"], options["data"]["init_args"]
    if not setting.is_as_configured:
        model.update({name: value for name, value in PLAIN.items() if name in model})
        model.update({"share_prefix": True} if setting.is_shared else {})
        model.update({"gradient_checkpointing": True} if setting.is_recomputed else {})
    options["trainer"].update(strategy=copy.deepcopy(STRATEGIES[setting.strategy]), devices=setting.ranks)
    if setting.is_exact:
        options["trainer"]["precision"] = "32-true"
        model["dtype"] = "float32"
    if setting.is_split and baseline is not None and "max_tokens" in data:
        sampled = (data.get("sampling") or {}).get("max_new_tokens", 0)
        data["max_length"] = max(baseline.longest, sampled + 1)  # room for an action is asked for, replayed or not
        data["max_tokens"] = max(baseline.largest_unit, data["max_length"])
    return options


def is_plain(base: Options) -> bool:
    """Whether the user's own options are those of the baseline, so that `as configured` would repeat it."""
    model = base["model"]["init_args"]
    return all(model.get(name, value) == value for name, value in PLAIN.items())
