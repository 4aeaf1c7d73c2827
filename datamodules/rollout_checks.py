"""What can be said about a rollout datamodule's options before anything is loaded."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from lit_agentrl.errors import UserError
from lit_agentrl.rewards import check_rewards
from lit_agentrl.rollouts.engine import check_stop
from lit_agentrl.rollouts.vllm.base import SyncedEngine

if TYPE_CHECKING:
    from lit_agentrl.datamodules.rollout import RolloutDataModule

log = logging.getLogger(__name__)

POSITIVE = ("num_prompts", "group_size", "max_length", "max_tokens", "num_updates", "num_passes", "max_rounds")


def check_options(data: RolloutDataModule) -> None:
    """Refuse options that cannot be right, and warn of those that are seldom meant.

    Raises:
        UserError: An option is out of its range or contradicts another.
    """
    check_rewards(data.rewards)
    for name in POSITIVE:
        if getattr(data, name) < 1:
            raise UserError(f"{name}={getattr(data, name)}: must be at least 1.")
    if data.num_updates > data.num_prompts:
        raise UserError(
            f"num_updates={data.num_updates} needs at least as many prompts, but num_prompts={data.num_prompts}: a "
            "group is never torn between two optimiser steps."
        )
    if data.staleness not in (0, 1):
        raise UserError(
            f"staleness={data.staleness}: allowed are 0 (rollouts of the policy that learns from them) and 1 "
            "(collected while the iteration before is trained)."
        )
    _check_sampling(data)
    _check_chat(data)
    _check_lengths(data)


def check_fit(data: RolloutDataModule, *, group_relative: bool, num_ranks: int, reload: int) -> None:
    """Refuse what a fit cannot train with.

    Args:
        data: The datamodule.
        group_relative: Whether the method compares trajectories of a group.
        num_ranks: Of the trainer.
        reload: Epochs after which the trainer asks for batches again.

    Raises:
        UserError: Rollouts would not be collected anew, a group or a rank would have too few, or there are no tasks.
    """
    if reload != 1:
        raise UserError(
            "Rollouts are collected anew for every epoch: set --trainer.reload_dataloaders_every_n_epochs to 1 "
            f"(it is {reload})."
        )
    if group_relative and data.group_size < 2:
        raise UserError(
            f"group_size={data.group_size}: a group-relative advantage needs at least 2 trajectories per prompt. "
            "Raise --data.group_size, or use an advantage with a fixed reference (binary: sign)."
        )
    if data.num_prompts < num_ranks * data.num_updates:
        raise UserError(
            f"num_prompts={data.num_prompts} is too few for {num_ranks} ranks x num_updates="
            f"{data.num_updates}: every rank needs a prompt for every optimiser step."
        )
    if not data.environment.tasks("train"):
        raise UserError("The train split has no tasks: check the environment's options.")


def warn_of_kernels(data: RolloutDataModule, old_logprobs: str) -> None:
    """Say what it means to train on the log-probabilities of an engine whose arithmetic is not the trainer's."""
    if old_logprobs == "sampler" and isinstance(data.engine, SyncedEngine):
        log.warning(
            "model.old_logprobs=sampler with %s, whose kernels are not the trainer's: the ratio of the first update is "
            "off from 1 by their difference. Set it to auto or recompute.",
            type(data.engine).__name__,
        )


def _check_sampling(data: RolloutDataModule) -> None:
    sampling = data.sampling
    if sampling.temperature <= 0:
        raise UserError(
            f"sampling.temperature={sampling.temperature}: training needs a temperature above 0, or all "
            "trajectories of a group are the same."
        )
    if sampling.top_p < 1 or sampling.top_k > 0:
        log.warning(
            "sampling.top_p=%s, top_k=%s: actions are drawn from a truncated distribution, but log-probabilities "
            "are those of the whole one, so the policy gradient is off by the difference. Prefer a temperature.",
            sampling.top_p,
            sampling.top_k,
        )
    if data.budget is not None:
        data.budget.check_action(sampling.max_new_tokens)
    check_stop(data.stop_strings(sampling))


def _check_chat(data: RolloutDataModule) -> None:
    if data.chat_mode == "inline" and not (data.stop_strings(data.sampling) or data.sampling.stop_token_ids):
        log.warning(
            "chat='inline', but neither the environment nor sampling.stop or sampling.stop_token_ids names what "
            "interrupts an answer: where the end of turn alone does, observations are user turns, as in append."
        )
    if data.memory is not None and data.chat_mode != "rebuild":
        raise UserError(
            f"memory with chat={data.chat_mode!r}: turns that are appended hold the history already. Set "
            "--data.chat to rebuild, or --data.memory to null."
        )


def _check_lengths(data: RolloutDataModule) -> None:
    if data.sampling.max_new_tokens >= data.max_length:
        raise UserError(
            f"max_length={data.max_length} leaves no room for a prompt beside sampling.max_new_tokens="
            f"{data.sampling.max_new_tokens}. Raise --data.max_length."
        )
    if data.max_tokens < data.max_length:
        raise UserError(
            f"max_tokens={data.max_tokens} is below max_length={data.max_length}: the longest row would not fit a "
            "micro-batch. Raise --data.max_tokens or lower --data.max_length."
        )
