"""Engines that do not sample from the policy they were synced with, each in its own way."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from lit_agentrl import distributed
from lit_agentrl.models.scoring import PaddedModel
from lit_agentrl.rollouts.hf import HFEngine
from lit_agentrl.types import Completion, Fingerprint, SamplingParams


class Bare(HFEngine):
    """The adapter never reaches it."""

    def sync(self, policy: nn.Module) -> None:
        lm = copy.deepcopy(policy.lm).unload()
        super().sync(lm)


class Unadapted(HFEngine):
    """Every weight that it samples with is the policy's own tensor; those of the adapter are missing."""

    def sync(self, policy: nn.Module) -> None:
        same = {id(tensor): tensor for tensor in policy.lm.parameters()}
        super().sync(copy.deepcopy(policy.lm, same).unload())


class Foreign(HFEngine):
    """It shares the policy's module as far as anybody asks, and says itself that it samples from other weights."""

    def fingerprint(self) -> Fingerprint | None:
        found = super().fingerprint()
        return found and Fingerprint(found.count, found.total, found.squares * (1 + 1e-6))


class Rounded(HFEngine):
    """It rounds the weights before it samples from them, and tells the fingerprint of what it was given."""

    @property
    def weights_dtype(self) -> torch.dtype | None:
        return torch.bfloat16


class Stale(HFEngine):
    """It samples from the weights of the sync before."""

    def __init__(self) -> None:
        super().__init__()
        self._next: nn.Module | None = None

    def sync(self, policy: nn.Module) -> None:
        latest = copy.deepcopy(policy)
        super().sync(self._next or latest)
        self._next = latest


class Perturbed(HFEngine):
    """One weight is off by a thousandth."""

    def sync(self, policy: nn.Module) -> None:
        lm = copy.deepcopy(policy.lm)
        with torch.no_grad():
            next(lm.parameters()).view(-1)[5] += 1e-3
        super().sync(lm)


class Hot(HFEngine):
    """It samples at another temperature than it is asked for."""

    def generate(
        self, contexts: list[list[int]], params: SamplingParams, seeds: Sequence[int] | None = None, images=None
    ) -> list[Completion]:
        return super().generate(contexts, replace(params, temperature=0.7 * params.temperature), seeds, images)


class Shifted(HFEngine):
    """It loses the first token of a context, so all positions are off by one."""

    def generate(
        self, contexts: list[list[int]], params: SamplingParams, seeds: Sequence[int] | None = None, images=None
    ) -> list[Completion]:
        return super().generate([context[1:] for context in contexts], params, seeds, images)


class Silent(HFEngine):
    """It cannot tell what it holds."""

    def fingerprint(self) -> Fingerprint | None:
        return None


class Broken(Silent):
    """Its log-probabilities are no numbers."""

    def generate(
        self, contexts: list[list[int]], params: SamplingParams, seeds: Sequence[int] | None = None, images=None
    ) -> list[Completion]:
        given = super().generate(contexts, params, seeds, images)
        return [replace(completion, logprobs=[float("nan")] * len(completion.token_ids)) for completion in given]


class Short(Silent):
    """It forgets a log-probability."""

    def generate(
        self, contexts: list[list[int]], params: SamplingParams, seeds: Sequence[int] | None = None, images=None
    ) -> list[Completion]:
        given = super().generate(contexts, params, seeds, images)
        return [replace(completion, logprobs=completion.logprobs[1:]) for completion in given]


class WrongOnOneRank(HFEngine):
    """The second rank's engine has other weights."""

    def sync(self, policy: nn.Module) -> None:
        if distributed.world()[0] == 0:
            super().sync(policy)
            return
        other = copy.deepcopy(policy)
        assert isinstance(other, PaddedModel)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.1)
        super().sync(other)
