"""The rollout datamodule: one Lightning epoch is one iteration, collected when the train dataloader is asked for."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal, cast

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lit_agentrl import distributed
from lit_agentrl.datamodules.batches import Batches, finished_epochs
from lit_agentrl.datamodules.module import RolloutModule
from lit_agentrl.datamodules.prompts import PromptCursor
from lit_agentrl.datamodules.rank_state import check_suite, rank_states, restore_random, restore_suite
from lit_agentrl.datamodules.signal import has_signal, without_failures
from lit_agentrl.datamodules.statistics import (
    budget_metrics,
    environment_metrics,
    iteration_cost,
    iteration_metrics,
    reduced_means,
)
from lit_agentrl.envs.pool import EnvironmentPool
from lit_agentrl.envs.process import ProcessHost
from lit_agentrl.errors import UserError
from lit_agentrl.images import ImageReader
from lit_agentrl.models.image_reader import Resize, load_image_reader
from lit_agentrl.models.policy import load_tokenizer, max_context
from lit_agentrl.rewards import Reward, check_rewards, score
from lit_agentrl.rollouts.base import Prompt, RolloutContext, RolloutStrategy
from lit_agentrl.rollouts.budget import Budget
from lit_agentrl.rollouts.chain import ChainRollout
from lit_agentrl.rollouts.chat import Chat, ChatMode
from lit_agentrl.rollouts.engine import check_stop
from lit_agentrl.rollouts.hf import HFEngine
from lit_agentrl.rollouts.memory import Memory
from lit_agentrl.rows import assemble, split_updates, to_rows
from lit_agentrl.types import (
    Engine,
    Environment,
    EnvironmentSuite,
    Ledger,
    SamplingParams,
    Split,
    TrainBatch,
    TrajectoryGroup,
)

log = logging.getLogger(__name__)

Wrap = Callable[[str, Environment], Environment]
"""Makes of a task's environment another one."""


class RolloutDataModule(L.LightningDataModule):
    """Rolls the policy out in an environment and serves the trajectories as training rows.

    Args:
        environment: The tasks, in splits, and how to start one.
        tokenizer: What the policy was loaded from (linked from `model.pretrained`).
        engine: Generates the actions; None is an `HFEngine`.
        rollout: How trajectories are gathered.
        rewards: The components of the total reward.
        sampling: How training actions are sampled.
        num_prompts: Prompts of an iteration, over all ranks.
        group_size: Trajectories of a prompt; by default 8, or what the rollout's trees have.
        max_length: Tokens an episode may hold, prompt and answers together.
        max_tokens: Token budget of a micro-batch: unique tokens where prefixes are shared, else padded ones.
        num_updates: Optimiser steps of an iteration; each takes its share of the prompts.
        num_passes: How often an iteration's rows are trained on.
        max_rounds: Dynamic sampling (DAPO): above 1, prompts whose trajectories all earn the same are replaced by new
            ones, in at most this many rounds.
        signal: What "earn the same" is judged by; `advantage` keeps a group in which any step's advantage is not 0,
            where a method tells steps apart (GiGPO).
        chat: `append` later turns to the context, `rebuild` the prompt at every step, or write what is observed
            `inline`, into the answer that a stop string interrupted.
        memory: Writes the prompts that are rebuilt; None shows the observation alone.
        budget: Hard cap on what the trajectories of a prompt may cost together; evaluation has none.
        num_workers: Threads, or processes, that step environments.
        workers: What they are; `auto` is processes for environments that ask for them (`needs_process`).
        step_deadline: Seconds an environment may take for one call before its episode fails.
        resize: How images are resized before the model's own processor; None leaves all to that.
        seed: Of prompts and sampling.
    """

    def __init__(
        self,
        environment: EnvironmentSuite,
        tokenizer: str,
        engine: Engine | None = None,
        rollout: RolloutStrategy | None = None,
        rewards: list[Reward] | None = None,
        sampling: SamplingParams = SamplingParams(),  # noqa: B008  # frozen
        num_prompts: int = 8,
        group_size: int | None = None,
        max_length: int = 1024,
        max_tokens: int = 8192,
        num_updates: int = 1,
        num_passes: int = 1,
        max_rounds: int = 1,
        signal: Literal["reward", "success", "advantage"] = "reward",
        chat: ChatMode = "append",
        memory: Memory | None = None,
        budget: Budget | None = None,
        num_workers: int = 8,
        workers: Literal["auto", "threads", "processes"] = "auto",
        step_deadline: float = 60.0,
        resize: Resize | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.environment, self.pretrained = environment, tokenizer
        self.engine: Engine = engine or HFEngine()
        self.rollout: RolloutStrategy = rollout or ChainRollout()
        self.rewards = rewards or [Reward()]
        self.sampling, self.num_prompts = sampling, num_prompts
        self.group_size = self.rollout.group_size(group_size)
        self.max_length, self.max_tokens = max_length, max_tokens
        self.num_updates, self.num_passes, self.max_rounds, self.signal = num_updates, num_passes, max_rounds, signal
        self.memory, self.budget, self.resize = memory, budget, resize
        self.chat_mode, self.num_workers, self.step_deadline, self.seed = chat, num_workers, step_deadline, seed
        self.host = self._process_host(workers)
        """The worker processes, where environments run in such."""
        self._check_arguments()
        self.groups: list[TrajectoryGroup] = []
        """All that the last iteration collected on this rank, what dynamic sampling left out included."""
        self.iteration_metrics: dict[str, float] = {}
        self.totals = Ledger()
        """What all rollouts of the run cost so far, on all ranks; evaluations are not counted."""
        self.total_seconds = 0.0
        """Seconds of the run's iterations: collecting and preparing, and updates, which `UpdateClock` adds."""
        self._batches: list[TrainBatch] = []
        self._collected = -1
        self._position = 0
        self._resumed: list[dict[str, Any]] = []  # every rank's state in the checkpoint, until the next collection
        self._ready: tuple[PreTrainedTokenizerBase, Chat, EnvironmentPool] | None = None
        self._reader: ImageReader | None = None

    def _check_arguments(self) -> None:
        check_rewards(self.rewards)
        positive = ("num_prompts", "group_size", "max_length", "max_tokens", "num_updates", "num_passes", "max_rounds")
        for name in positive:
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1.")
        if self.num_updates > self.num_prompts:
            raise UserError(
                f"num_updates={self.num_updates} needs at least as many prompts, but num_prompts={self.num_prompts}: a "
                "group is never torn between two optimiser steps."
            )
        if self.sampling.temperature <= 0:
            raise UserError(
                f"sampling.temperature={self.sampling.temperature}: training needs a temperature above 0, or all "
                "trajectories of a group are the same."
            )
        if self.sampling.top_p < 1 or self.sampling.top_k > 0:
            log.warning(
                "sampling.top_p=%s, top_k=%s: actions are drawn from a truncated distribution, but log-probabilities "
                "are those of the whole one, so the policy gradient is off by the difference. Prefer a temperature.",
                self.sampling.top_p,
                self.sampling.top_k,
            )
        if self.budget is not None:
            self.budget.check_action(self.sampling.max_new_tokens)
        check_stop(self._stop_strings(self.sampling))
        if self.chat_mode == "inline" and not (self._stop_strings(self.sampling) or self.sampling.stop_token_ids):
            log.warning(
                "chat='inline', but neither the environment nor sampling.stop or sampling.stop_token_ids names what "
                "interrupts an answer: where the end of turn alone does, observations are user turns, as in append."
            )
        if self.memory is not None and self.chat_mode != "rebuild":
            raise UserError(
                f"memory with chat={self.chat_mode!r}: turns that are appended hold the history already. Set "
                "--data.chat to rebuild, or --data.memory to null."
            )
        if self.sampling.max_new_tokens >= self.max_length:
            raise UserError(
                f"max_length={self.max_length} leaves no room for a prompt beside sampling.max_new_tokens="
                f"{self.sampling.max_new_tokens}. Raise --data.max_length."
            )
        if self.max_tokens < self.max_length:
            raise UserError(
                f"max_tokens={self.max_tokens} is below max_length={self.max_length}: the longest row would not fit a "
                "micro-batch. Raise --data.max_tokens or lower --data.max_length."
            )

    def _stop_strings(self, sampling: SamplingParams) -> tuple[str, ...]:
        """What the user and the environment want actions to end with."""
        return (*sampling.stop, *self.environment.stop_strings)

    def _process_host(self, workers: str) -> ProcessHost | None:
        if workers == "threads" or (workers == "auto" and not self.environment.needs_process):
            return None
        return ProcessHost(self.environment, self.num_workers, self.step_deadline)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer."""
        return self._parts()[0]

    def _parts(self) -> tuple[PreTrainedTokenizerBase, Chat, EnvironmentPool]:
        if self._ready is None:
            tokenizer = load_tokenizer(self.pretrained)
            self.engine.use_tokenizer(tokenizer)
            self._reader = load_image_reader(self.pretrained, self.resize)
            if self._reader is not None:
                self.engine.use_image_reader(self._reader)
            # A process keeps the deadline itself: the pool's threads only wait for it.
            pool = EnvironmentPool(self.num_workers, None if self.host else self.step_deadline)
            self._ready = tokenizer, Chat(tokenizer, self.chat_mode, self._reader), pool
        return self._ready

    def setup(self, stage: str) -> None:
        """Check what can be checked before the first rollout."""
        assert self.trainer is not None
        reload: int = self.trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]  # set by a connector
        if stage == "fit" and reload != 1:
            raise UserError(
                "Rollouts are collected anew for every epoch: set --trainer.reload_dataloaders_every_n_epochs to 1 "
                f"(it is {reload})."
            )
        if stage == "fit":
            self._check_fit()
            check_suite(self.environment, in_processes=self.host is not None)
        if self.host:
            self.host.start()
        self._parts()

    def _check_fit(self) -> None:
        assert self.trainer is not None
        if self._module().group_relative and self.group_size < 2:
            raise UserError(
                f"group_size={self.group_size}: a group-relative advantage needs at least 2 trajectories per prompt. "
                "Raise --data.group_size, or use an advantage with a fixed reference (binary: sign)."
            )
        if self.num_prompts < self.trainer.world_size * self.num_updates:
            raise UserError(
                f"num_prompts={self.num_prompts} is too few for {self.trainer.world_size} ranks x num_updates="
                f"{self.num_updates}: every rank needs a prompt for every optimiser step."
            )
        tasks = self.environment.tasks("train")
        if not tasks:
            raise UserError("The train split has no tasks: check the environment's options.")

    def _module(self) -> RolloutModule:
        assert self.trainer is not None
        return cast(RolloutModule, self.trainer.lightning_module)

    def train_dataloader(self) -> DataLoader[TrainBatch]:
        """Collect the iteration's rollouts once, and serve its micro-batches."""
        assert self.trainer is not None
        # Lightning asks twice for the first epoch after a resume: collect once per iteration.
        iteration = finished_epochs(self.trainer)
        if iteration >= (self.trainer.max_epochs or 0) > 0:
            return DataLoader(Batches([]), batch_size=None)  # a finished run was resumed: nothing will be trained
        if iteration != self._collected:
            resumed, self._resumed = self._resumed, []
            if resumed:  # here, where the saved run went on as well: what a start draws is not in the checkpoint
                restore_random(resumed, [self.seed, self._position])
            self._collect_iteration(iteration)
            self._collected = iteration
        # A generator of its own: an iterator draws a number, and Lightning makes fewer of them after a resume.
        return DataLoader(Batches(self._batches), batch_size=None, generator=torch.Generator())

    def _collect_iteration(self, iteration: int) -> None:
        assert self.trainer is not None
        module = self._module()
        began = time.perf_counter()
        self._sync()
        self.groups, trained, rounds = self._collect(iteration)
        if iteration == 0:
            self._refuse_all_failed()
        collected = time.perf_counter()
        healthy = [without_failures(group) for group in trained]
        advantages = module.batch_advantages(healthy)
        valued = time.perf_counter()
        rows = to_rows(healthy, advantages, module.trains_on, module.credit)
        updates = split_updates(rows, self.num_updates) * self.num_passes
        self._batches, per_step = assemble(
            updates,
            self.max_tokens,
            distributed.reduce_integers,
            shared=module.shares_prefixes,
            temperature=self.sampling.temperature,
            sum_weights=None if module.credit == "sum" else distributed.reduce_floats,
            reader=self._reader,
        )
        self.trainer.accumulate_grad_batches = per_step
        module.prepare(self._batches)
        seconds = [collected - began, valued - collected, time.perf_counter() - collected]
        metrics = iteration_metrics(self.groups, rows, self.rewards, rounds, self._num_leaked())
        # The slowest rank's seconds: the others wait for it.
        names = ("time/collect", "time/advantages", "time/prepare")
        metrics |= (slowest := dict(zip(names, distributed.reduce_floats(seconds, "max"), strict=True)))
        cost = iteration_cost(self.groups)
        self.totals += cost
        self.total_seconds += sum(slowest.values())
        metrics |= budget_metrics(cost, self.totals) | environment_metrics(self.groups)
        self.iteration_metrics = metrics | reduced_means(module.advantage_sums)

    def _refuse_all_failed(self) -> None:
        """Stop where the environment breaks every episode from the start: nothing would be trained, without an end."""
        trajectories = [trajectory for group in self.groups for trajectory in group.trajectories]
        errors = [trajectory.error for trajectory in trajectories if trajectory.stop_reason.is_failure]
        counts = [len(errors), len(trajectories) - len(errors)]
        num_failed, num_healthy = distributed.reduce_integers(counts, "sum")
        if num_failed and not num_healthy:
            raise UserError(
                f"All {num_failed} episodes of the first iteration failed, so there is nothing to train on. "
                + (f"The first one: {errors[0]}" if errors else "Other ranks say why.")
            )

    def _num_leaked(self) -> int:
        """Threads abandoned and processes replaced so far."""
        return self._parts()[2].num_leaked + (self.host.num_replaced if self.host else 0)

    def _collect(self, iteration: int) -> tuple[list[TrajectoryGroup], list[TrajectoryGroup], int]:
        """All groups of this rank, those to train on, and the rounds it took; moves the prompt cursor on all ranks."""
        rank, size = distributed.world()
        wanted = len(range(rank, self.num_prompts, size))
        cursor = PromptCursor(self.environment.tasks("train"), self.seed)
        groups: list[TrajectoryGroup] = []
        trained: list[TrajectoryGroup] = []
        rounds = 0
        while rounds < self.max_rounds and len(trained) < wanted:
            first = self._position + rounds * self.num_prompts + rank
            prompts = [cursor.at(first + i * size) for i in range(wanted - len(trained))]
            fresh = self._roll_out(prompts, self.group_size, self.sampling, iteration)
            groups += fresh
            trained += fresh if self.max_rounds == 1 else [group for group in fresh if self._has_signal(group)]
            rounds += 1
        self._position += distributed.reduce_integers([rounds], "max")[0] * self.num_prompts
        return groups, trained, rounds

    def _has_signal(self, group: TrajectoryGroup) -> bool:
        if self.signal == "advantage":
            return any(any(steps) for steps in self._module().advantages(without_failures(group)))
        return has_signal(group, self.signal)

    def _roll_out(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        sampling: SamplingParams,
        iteration: int,
        wrap: Wrap | None = None,
    ) -> list[TrajectoryGroup]:
        assert self.trainer is not None
        _, chat, pool = self._parts()
        # Not every model's configuration names the token that its chat template ends a turn with.
        sampling = replace(
            sampling,
            stop_token_ids=(*sampling.stop_token_ids, chat.end_of_turn_id()),
            stop=self._stop_strings(sampling),
        )
        context = RolloutContext(
            self.engine,
            chat,
            pool,
            _wrapped(self.host.make if self.host else self.environment.make, wrap),
            sampling,
            self.max_length,
            self.seed,
            iteration,
            None if iteration in (EVALUATION, OUTSIDE) else self.budget,
            self.memory,
        )
        with self.trainer.precision_plugin.forward_context():
            strategy = self.rollout.evaluation() if iteration == EVALUATION else self.rollout
            groups = strategy.collect(prompts, group_size, context)
        score(groups, self.rewards)
        for group in groups:
            group.kind = self.environment.kind(group.prompt_id)
        return groups

    def _sync(self) -> None:
        policy = self._module().policy
        assert policy is not None
        limit = max_context(policy.lm)  # type: ignore[arg-type]
        if limit is not None and self.max_length > limit:
            raise UserError(
                f"max_length={self.max_length} is beyond the model's {limit} positions. Lower --data.max_length."
            )
        self.engine.sync(policy)

    def evaluate(
        self, split: Split, *, num_tasks: int | None, group_size: int, sampling: SamplingParams
    ) -> list[TrajectoryGroup]:
        """Roll out on the first tasks of a split; every rank plays its share and gets all groups, in task order."""
        tasks = list(self.environment.tasks(split))[:num_tasks]
        if not tasks:
            raise UserError(f"The {split} split has no tasks to evaluate on: check the environment's options.")
        rank, size = distributed.world()
        self._sync()
        mine = [Prompt(tasks[i], i) for i in range(rank, len(tasks), size)]
        groups = self._roll_out(mine, group_size, sampling, EVALUATION)
        shares = distributed.gather(groups)
        return [shares[i % size][i // size] for i in range(len(tasks))]

    def play(
        self, prompts: Sequence[Prompt], group_size: int | None = None, wrap: Wrap | None = None
    ) -> list[TrajectoryGroup]:
        """Groups of some prompts, sampled as training does, for other uses than training: no budget counts them.

        Args:
            prompts: On this rank.
            group_size: Trajectories of a prompt; the training's by default.
            wrap: What to play in the place of every task's environment.
        """
        self._sync()
        return self._roll_out(prompts, group_size or self.group_size, self.sampling, OUTSIDE, wrap)

    def teardown(self, stage: str) -> None:
        """End the worker processes; another stage starts its own."""
        if self.host:
            self.host.close()

    def val_dataloader(self) -> list[int]:
        """Nothing in a fit (the Evaluation callback decides when); one step for `validate`, which it hooks into."""
        assert self.trainer is not None
        return [] if self.trainer.state.fn == "fit" else [0]

    def test_dataloader(self) -> list[int]:
        """One step for `test`, which the Evaluation callback hooks into."""
        return [0]

    def state_dict(self) -> dict[str, Any]:
        """The prompt cursor, what was spent, and what each rank has of its own.

        Sampling needs no state, its randomness is keyed by numbers. Called by all ranks, as Lightning does.
        """
        return {
            "position": self._position,
            "totals": asdict(self.totals),
            "total_seconds": self.total_seconds,
            "ranks": rank_states(self.environment),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the next prompts and the budget that is left."""
        self._position = int(state_dict["position"])
        self._resumed = state_dict.get("ranks", [])
        restore_suite(self.environment, self._resumed)
        if "totals" not in state_dict:
            log.warning("The checkpoint holds no ledger (it is of an older version): budgets count from here on.")
            return
        self.totals = Ledger(**state_dict["totals"])
        self.total_seconds = float(state_dict["total_seconds"])


def _wrapped(make: Callable[[str], Environment], wrap: Wrap | None) -> Callable[[str], Environment]:
    return make if wrap is None else lambda task: wrap(task, make(task))


EVALUATION = -1
"""The iteration number that keys evaluation rollouts: the same draws whenever the same policy is evaluated."""
OUTSIDE = -2
"""That of rollouts for other uses (`play`)."""
