"""The policy-identity canary: whether an engine samples from the very policy that will learn from its rollouts."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import torch

from lit_agentrl import distributed
from lit_agentrl.errors import UserError
from lit_agentrl.models.fingerprint import distance, policy_fingerprint
from lit_agentrl.models.shards import device_of, reshard
from lit_agentrl.rollouts.engine import rollout_seed
from lit_agentrl.rows import Row, collate
from lit_agentrl.types import Completion, Observation, SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

    from lit_agentrl.models.scoring import PaddedModel
    from lit_agentrl.rollouts.chat import Chat
    from lit_agentrl.types import Engine, TrainBatch

log = logging.getLogger(__name__)

PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Count from one to ten in words.",
    "Which is larger, 7 or 12, and why?",
)

# Mean |difference| of log-probabilities in nats, and the relative distance of weights. SmolLM2-135M-Instruct, HFEngine
# against the padded forward (docs/off_policy.md has the table).
TIGHT_LOGP, WIDE_LOGP = 3e-4, 0.15
TIGHT_WEIGHTS, WIDE_WEIGHTS = 1e-7, 1e-5


@dataclass(frozen=True)
class Trainee:
    """The trainer's side of the comparison."""

    policy: PaddedModel
    score: Callable[[TrainBatch], Tensor]
    """Log-probabilities [B, L], on the CPU, as training computes them. Of a sharded policy every rank calls it."""
    precision: Callable[[], AbstractContextManager[object]]
    """What the trainer's arithmetic runs in."""


@dataclass(frozen=True)
class Gaps:
    """How far the engine is from the trainer, over all ranks."""

    logp: float
    """Mean |difference| of the log-probabilities of the canary's tokens, nats; infinite where one is not a number."""
    max_logp: float
    """The largest."""
    num_tokens: int
    weights: float | None
    """Relative distance by the fingerprints; None where the engine or the policy cannot tell."""


@dataclass(frozen=True)
class Canary:
    """Compares engine and trainer after a sync, and stops the run where they differ, before anything is trained.

    The engine answers a few fixed prompts; its log-probabilities of these answers must be the trainer's own, and the
    fingerprint of its weights, where it can tell one, the policy's. That finds adapters that never reached the engine,
    weights of an earlier version, dropout, wrong position ids and wrong temperatures.

    Args:
        num_prompts: Prompts of a check, on every rank.
        max_new_tokens: Tokens of an answer.
        tolerance: Largest mean difference of log-probabilities, in nats; None is 3e-4 where both sides compute in 32
            bits or more, 0.15 in 16 bits. The fingerprints' tolerances are 1e-7 and 1e-5.
        every: Check every so many syncs, the first included.
    """

    num_prompts: int = 2
    max_new_tokens: int = 8
    tolerance: float | None = None
    every: int = 1

    def __post_init__(self) -> None:
        for name in ("num_prompts", "max_new_tokens", "every"):
            if getattr(self, name) < 1:
                raise UserError(f"canary: {name}={getattr(self, name)} must be at least 1. To turn it off, set null.")
        if self.tolerance is not None and not 0 < self.tolerance < math.inf:
            raise UserError(f"canary: tolerance={self.tolerance} must be a positive number of nats, or null.")

    def is_due(self, engine: Engine) -> bool:
        """Whether the engine's last sync is one of those that are checked."""
        return (engine.version - 1) % self.every == 0

    def check(self, engine: Engine, trainee: Trainee, chat: Chat, sampling: SamplingParams) -> dict[str, float]:
        """What is logged of the comparison. Every rank calls it.

        Args:
            engine: Just synced.
            trainee: What it was synced with.
            chat: Writes the prompts.
            sampling: How training samples; the temperature is what counts.

        Raises:
            UserError: They differ by more than the tolerance, on any rank.
        """
        with trainee.precision():
            is_wide = _is_wide(engine, trainee.policy)
        gaps = self._measure(engine, trainee, chat, sampling)
        allowed = self.tolerance or (WIDE_LOGP if is_wide else TIGHT_LOGP)
        allowed_weights = WIDE_WEIGHTS if is_wide else TIGHT_WEIGHTS
        wrong = []
        if not gaps.logp <= allowed:
            wrong.append(
                f"its log-probabilities of {gaps.num_tokens} tokens differ from the trainer's by {gaps.logp:.2g} nats "
                f"on average (at most {gaps.max_logp:.2g}; {allowed:g} are allowed)"
            )
        if gaps.weights is not None and not gaps.weights <= allowed_weights:
            wrong.append(
                f"the fingerprint of its weights is {gaps.weights:.2g} away from the policy's ({allowed_weights:g} is "
                "allowed)"
            )
        if wrong:
            raise UserError(_complaint(engine, wrong, weights_differ=len(wrong) == 2 or gaps.logp <= allowed))
        found = {"canary/logp_gap": gaps.logp}
        if gaps.weights is None:
            _say_unchecked(type(engine).__name__)
            return found
        return found | {"canary/fingerprint_gap": gaps.weights}

    def _measure(self, engine: Engine, trainee: Trainee, chat: Chat, sampling: SamplingParams) -> Gaps:
        differences = self._differences(engine, trainee, chat, sampling)
        weights = _weights_gap(engine, trainee.policy)
        largest = float(differences.max()) if len(differences) else 0.0
        total, count, untold = distributed.reduce_floats(
            [float(differences.sum()), float(len(differences)), float(weights is None)]
        )
        largest, apart = distributed.reduce_floats([largest, weights or 0.0], "max")
        return Gaps(total / max(1.0, count), largest, int(count), None if untold else apart)

    def _differences(self, engine: Engine, trainee: Trainee, chat: Chat, sampling: SamplingParams) -> Tensor:
        """|engine - trainer| of every token of the answers, [N] float64; infinite where one is not a number."""
        contexts = [chat.opening(Observation(PROMPTS[i % len(PROMPTS)])) for i in range(self.num_prompts)]
        plain = SamplingParams(temperature=sampling.temperature, max_new_tokens=self.max_new_tokens)
        plain = replace(plain, stop_token_ids=(*sampling.stop_token_ids, chat.end_of_turn_id()))
        seeds = [rollout_seed(0, 0, "canary", i, distributed.share()[0]) for i in range(self.num_prompts)]

        def answer() -> list[Completion]:
            with trainee.precision():
                return engine.generate(contexts, plain, seeds)

        completions = distributed.from_leader(answer)  # what a team scores together has to be the same
        rows = []
        for context, completion in zip(contexts, completions, strict=True):
            if len(completion.logprobs) != len(completion.token_ids):
                raise UserError(
                    f"{type(engine).__name__} gave {len(completion.logprobs)} log-probabilities for "
                    f"{len(completion.token_ids)} tokens: an engine has to report that of every token it samples."
                )
            rows.append(Row())
            rows[-1].extend(context)
            rows[-1].extend(completion.token_ids, completion.logprobs)
        batch = collate(rows, sum(row.num_action_tokens for row in rows), len(rows), sampling.temperature, chat.reader)
        engines = batch.old_logprobs.double()
        found = (engines - trainee.score(batch).double()).abs()[batch.action_mask]
        return torch.where(found.isfinite(), found, math.inf)


def _weights_gap(engine: Engine, policy: PaddedModel) -> float | None:
    """By the fingerprints; None where one side cannot tell. The policy's is collective where it is sharded.

    An engine that samples from the policy's own module is compared with itself: its gap is 0, or infinite where a
    weight is not a number.
    """
    theirs = engine.fingerprint()
    if not max(distributed.reduce_integers([int(theirs is not None)], "max")):
        return None
    if theirs is not None and theirs.of is policy.lm and engine.weights_dtype is None:
        return distance(theirs, theirs)
    reshard(policy)  # the log-probabilities left the root's weights gathered, in the type it computes in
    ours = policy_fingerprint(policy.lm, engine.weights_dtype)
    return None if theirs is None or ours is None else distance(ours, theirs)


@cache
def _say_unchecked(name: str) -> None:
    """Once for every kind of engine."""
    log.info(
        "Canary: %s or the policy has no fingerprint of its weights, so log-probabilities alone are compared.", name
    )


def _is_wide(engine: Engine, policy: PaddedModel) -> bool:
    """Whether one side rounds to 16 bits, or to TF32."""
    device = device_of(policy).type
    if torch.is_autocast_enabled(device):
        return True
    if device == "cuda" and torch.get_float32_matmul_precision() != "highest":
        return True
    types = {parameter.dtype for parameter in policy.parameters()} | {engine.weights_dtype, policy.compute_dtype}
    return bool(types & {torch.bfloat16, torch.float16})


def _complaint(engine: Engine, wrong: list[str], *, weights_differ: bool) -> str:
    causes = (
        "an adapter that was not merged or not loaded, weights of an earlier sync (a server that did not reload), or "
        "another base model"
        if weights_differ
        else "an adapter or weights that did not reach it, another temperature than it was asked for, wrong position "
        "ids, dropout, or other kernels than the trainer's in 16 bits"
    )
    return (
        f"{type(engine).__name__} does not sample from the policy after its sync {engine.version}: "
        f"{'; '.join(wrong)}. Likely causes: {causes}. The run stops before it trains on rollouts of another policy. "
        "Check what the engine loads in its sync; --data.canary.tolerance NATS changes the limit, and --data.canary "
        "null turns the check off."
    )
