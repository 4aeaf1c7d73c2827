"""A version of the weights, as it is handed to a server and asked for there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lit_agentrl.models.fingerprint import distance
from lit_agentrl.rollouts.vllm.errors import EngineError
from lit_agentrl.rollouts.vllm.http import CallError
from lit_agentrl.rollouts.vllm.start import roomy_rank
from lit_agentrl.rollouts.vllm.weights import adapter_fingerprint
from lit_agentrl.types import Fingerprint

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lit_agentrl.rollouts.vllm.endpoint import Endpoint

SAME_WEIGHTS = 1e-9
"""Relative distance: the same numbers, added up in another order."""
_BASE_IS_GONE = (
    "no longer has the weights that it was started with, which adapters belong on: a run with sync=full has handed it "
    "others. Start it anew"
)


@dataclass(frozen=True)
class WholeModel:
    """A model in a folder, an adapter merged."""

    version: str
    folder: Path

    def give(self, endpoint: Endpoint, seconds: float) -> None:
        """Have a server sample from it; loading may take so long.

        Raises:
            CallError: It does not take the weights.
            EngineError: It says that it did, and has others.
        """
        endpoint.call_workers("lit_load", str(self.folder), self.version, timeout=seconds)
        endpoint.model = endpoint.served_models()[0]
        endpoint.reset_prefix_cache(seconds)
        self.check(endpoint)

    def check(self, endpoint: Endpoint) -> None:
        """Refuse a server with other weights.

        Raises:
            EngineError: It says that it has others.
            CallError: It does not say.
        """
        found = str(endpoint.call_workers("lit_state").get("version"))
        if found != self.version:
            raise EngineError(
                f"{endpoint} has stale weights: version {self.version} was handed over, it samples from "
                f"{found or 'what it was started with'}. It was started anew, or somebody else hands weights to it"
            )


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in a folder, which goes on what the server was started with."""

    version: str
    """"run.number", the name that requests ask for."""
    folder: Path
    rank: int
    scales: Mapping[str, float]
    """alpha / r of every layer that it adapts."""
    _fingerprints: dict[str, Fingerprint] = field(default_factory=dict)
    """By the type that a server holds it in."""

    def __post_init__(self) -> None:
        roomy_rank(self.rank)  # refuses what no server has room for

    def give(self, endpoint: Endpoint, seconds: float) -> None:
        """Have a server sample from it and forget the run's earlier ones; loading may take so long.

        Raises:
            CallError: It has no room for adapters, or does not take this one.
            EngineError: It says that it did, and does not hold it.
        """
        if endpoint.lora_rank < self.rank:
            room = f"of rank {endpoint.lora_rank} at most" if endpoint.lora_rank else "of none"
            raise CallError(
                f"the adapter is of rank {self.rank}, and it was started with room for adapters {room}. Start it with "
                f"`lit-agentrl serve-vllm MODEL --lora_rank {roomy_rank(self.rank)}`"
            )
        endpoint.unload_adapters(f"{self.version.partition('.')[0]}.")
        endpoint.load_adapter(self.version, str(self.folder), seconds)
        endpoint.model = self.version
        endpoint.reset_prefix_cache(seconds)
        self.check(endpoint)

    def check(self, endpoint: Endpoint) -> None:
        """Refuse a server whose workers do not hold its numbers, on the weights that they were started with.

        Raises:
            EngineError: They say that they do not.
            CallError: They do not say.
        """
        right = self._fingerprint(endpoint.dtype)
        for worker in endpoint.ask_workers("lit_adapters"):
            held, is_changed = _read(worker)
            if is_changed:
                raise EngineError(f"{endpoint} {_BASE_IS_GONE}")
            if not any(distance(right, each) < SAME_WEIGHTS for each in held):
                raise EngineError(
                    f"{endpoint} has stale weights: adapter {self.version} was handed over, and none of the "
                    f"{len(held)} that it holds has its numbers. It was started anew, or something between keeps the "
                    "adapters from it"
                )

    def _fingerprint(self, dtype: str) -> Fingerprint:
        if dtype not in self._fingerprints:
            held_in = getattr(torch, dtype, None)
            if not isinstance(held_in, torch.dtype):
                raise CallError(f"it holds its weights in {dtype}, which torch does not know")
            self._fingerprints[dtype] = adapter_fingerprint(self.folder, self.scales, held_in)
        return self._fingerprints[dtype]


def _read(worker: Mapping[str, Any]) -> tuple[list[Fingerprint], bool]:
    try:
        return [Fingerprint(**moments) for moments in worker["adapters"]], bool(worker["is_changed"])
    except (TypeError, KeyError) as error:
        raise CallError(f"its worker told of its adapters {str(worker)[:200]}") from error
