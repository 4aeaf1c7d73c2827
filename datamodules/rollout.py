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
from lit_agentrl.datamodules.collector import Collection, Order, Prefetch, Rounds, Seat
from lit_agentrl.datamodules.module import RolloutModule
from lit_agentrl.datamodules.prompts import PromptCursor
from lit_agentrl.datamodules.rank_state import check_suite, rank_states, restore_random, restore_suite
from lit_agentrl.datamodules.rollout_checks import check_fit, check_options, warn_of_kernels
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
from lit_agentrl.rewards import Reward, score
from lit_agentrl.rollouts.base import Prompt, RolloutContext, RolloutStrategy
from lit_agentrl.rollouts.budget import Budget
from lit_agentrl.rollouts.canary import Canary, Trainee
from lit_agentrl.rollouts.chain import ChainRollout
from lit_agentrl.rollouts.chat import Chat, ChatMode
from lit_agentrl.rollouts.hf import HFEngine
from lit_agentrl.rollouts.memory import Memory
from lit_agentrl.rows import Row, assemble, split_updates, to_rows
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
        staleness: 0 samples from the policy that learns; 1 collects an iteration's rollouts in the background while the
            one before is trained, with the weights from before that. Needs an engine with weights of its own.
        canary: Checks after every sync that the engine samples from the policy; None does not.
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
        staleness: int = 0,
        canary: Canary | None = Canary(),  # noqa: B008  # frozen
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
        self.staleness, self.canary = staleness, canary
        self.host = self._process_host(workers)
        """The worker processes, where environments run in such."""
        check_options(self)
        self.groups: list[TrajectoryGroup] = []
        """All that the last iteration collected on this rank, what dynamic sampling left out included."""
        self.iteration_metrics: dict[str, float] = {}
        self.totals = Ledger()
        """What all rollouts of the run cost so far, on all ranks; evaluations are not counted."""
        self.total_seconds = 0.0
        """Seconds of the run's iterations: collecting and preparing, and updates, which `UpdateClock` adds."""
        self._batches: list[TrainBatch] = []
        self._collected = -1
        self._position = 0  # the first prompt of the next iteration, the ones collected ahead not counted
        self._ahead: Prefetch | None = None
        self._canary_metrics: dict[str, float] = {}
        self._resumed: list[dict[str, Any]] = []  # every rank's state in the checkpoint, until the next collection
        self._ready: tuple[PreTrainedTokenizerBase, Chat, EnvironmentPool] | None = None
        self._reader: ImageReader | None = None

    def stop_strings(self, sampling: SamplingParams) -> tuple[str, ...]:
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
        if stage == "fit":
            reload: int = self.trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]  # a connector's
            module = self._module()
            check_fit(self, group_relative=module.group_relative, num_ranks=distributed.share()[1], reload=reload)
            check_suite(self.environment, in_processes=self.host is not None, is_ahead=self.staleness > 0)
            warn_of_kernels(self, module.old_logprobs)
        if self.host:
            self.host.start()
        self._parts()

    def _module(self) -> RolloutModule:
        assert self.trainer is not None
        return cast(RolloutModule, self.trainer.lightning_module)

    def train_dataloader(self) -> DataLoader[TrainBatch]:
        """Collect the iteration's rollouts once, and serve its micro-batches."""
        assert self.trainer is not None
        # Lightning asks twice for the first epoch after a resume: collect once per iteration.
        iteration = finished_epochs(self.trainer)
        if self._is_last(iteration - 1):
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
        """Collect, have it valued, and cut it into batches. Ranks meet in here, and only in here."""
        assert self.trainer is not None
        module = self._module()
        began = time.perf_counter()
        collection = self._collected_for(iteration)
        self.groups = collection.groups
        if iteration == 0:
            self._refuse_all_failed()
        if self.staleness and not self._is_last(iteration):
            self._collect_ahead(iteration + 1, is_synced=collection.order.staleness == 0)
        collected = time.perf_counter()
        healthy = [without_failures(group) for group in collection.trained]
        advantages = module.batch_advantages(healthy)
        valued = time.perf_counter()
        rows = to_rows(healthy, advantages, module.trains_on, module.credit)
        self._assemble(rows)
        module.prepare(self._batches)
        # The slowest rank's seconds: the others wait for it.
        seconds = {
            "time/collect": collected - began,
            "time/rollouts": collection.seconds,
            "time/advantages": valued - collected,
            "time/prepare": time.perf_counter() - valued,
        }
        seconds = dict(zip(seconds, distributed.reduce_floats(list(seconds.values()), "max"), strict=True))
        self.total_seconds += sum(seconds.values()) - seconds["time/rollouts"]  # waiting for them is in time/collect
        self.iteration_metrics = self._measured(collection, rows) | seconds

    def _assemble(self, rows: list[list[Row]]) -> None:
        """The iteration's batches from its rows."""
        assert self.trainer is not None
        module = self._module()
        self._batches, per_step = assemble(
            split_updates(rows, self.num_updates) * self.num_passes,
            self.max_tokens,
            distributed.reduce_integers,
            shared=module.shares_prefixes,
            temperature=self.sampling.temperature,
            sum_weights=None if module.credit == "sum" else distributed.reduce_floats,
            reader=self._reader,
        )
        for batch in self._batches:
            batch.sampler_differs = bool(self.staleness) or not self.engine.shares_weights
        self.trainer.accumulate_grad_batches = per_step

    def _measured(self, collection: Collection, rows: list[list[Row]]) -> dict[str, float]:
        """The iteration's numbers over all ranks but its seconds; adds its cost to the run's."""
        metrics = iteration_metrics(collection.groups, rows, self.rewards, collection.rounds, self._num_leaked())
        cost = iteration_cost(collection.groups)
        self.totals += cost
        metrics |= budget_metrics(cost, self.totals) | environment_metrics(collection.groups)
        metrics |= reduced_means(self._module().advantage_sums) | self._canary_metrics
        return metrics | {"rollout/staleness": float(collection.order.staleness)}

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

    def _collected_for(self, iteration: int) -> Collection:
        """The iteration's rollouts: those collected ahead, or new ones; moves the prompt cursor on all ranks."""
        if self._ahead is not None and self._ahead.order.iteration == iteration:
            collection, self._ahead = self._ahead.result(), None
        else:
            self._sync()
            self._refuse_shared_weights()
            collection = self._collect(Order(iteration, self._position, num_trained=iteration))
        self._position += distributed.reduce_integers([collection.rounds], "max")[0] * self.num_prompts
        return collection

    def _collect_ahead(self, iteration: int, *, is_synced: bool) -> None:
        """Start to collect an iteration's rollouts with the weights that the one before will train."""
        assert self.trainer is not None
        if not is_synced:
            self._sync()
        order = Order(iteration, self._position, num_trained=iteration - 1)
        self._ahead = Prefetch(
            order,
            lambda seat: self._collect(order, seat),
            self.engine,
            self.trainer.precision_plugin,
            self.trainer.strategy.root_device,
        )

    def _is_last(self, iteration: int) -> bool:
        assert self.trainer is not None
        return iteration + 1 >= (self.trainer.max_epochs or 0) > 0

    def _refuse_shared_weights(self) -> None:
        if self.staleness and distributed.team_size() > 1:
            raise UserError(
                f"staleness={self.staleness} with tensor parallelism: ranks of a team wait for one another's rollouts. "
                "Set --data.staleness 0, or tensor_parallel_size 1."
            )
        if self.staleness and self.engine.shares_weights:
            raise UserError(
                f"staleness={self.staleness}: {type(self.engine).__name__} samples from the very weights that are "
                "trained meanwhile. Give it a copy (--data.engine HFEngine --data.engine.own_weights true), use an "
                "engine with weights of its own (VLLMEngine, VLLMServer), or set --data.staleness 0."
            )

    def _collect(self, order: Order, seat: Seat | None = None) -> Collection:
        """This rank's rollouts of an iteration. No rank waits for another in here: it may run in a thread."""

        def play(prompts: Sequence[Prompt]) -> list[TrajectoryGroup]:
            return self._roll_out(prompts, self.group_size, self.sampling, order.iteration, seat=seat)

        cursor = PromptCursor(self.environment.tasks("train"), self.seed)
        rounds = Rounds(cursor, self.num_prompts, self.max_rounds, *distributed.share())
        return rounds.collect(order, play, self._has_signal)

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
        *,
        wrap: Wrap | None = None,
        seat: Seat | None = None,
    ) -> list[TrajectoryGroup]:
        assert self.trainer is not None
        seat = seat or Seat(self.engine, self.trainer.precision_plugin.forward_context)
        _, chat, pool = self._parts()
        # Not every model's configuration names the token that its chat template ends a turn with.
        sampling = replace(
            sampling,
            stop_token_ids=(*sampling.stop_token_ids, chat.end_of_turn_id()),
            stop=self.stop_strings(sampling),
        )
        context = RolloutContext(
            seat.engine,
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
        strategy = self.rollout.evaluation() if iteration == EVALUATION else self.rollout

        def play() -> list[TrajectoryGroup]:
            with seat.arithmetic():
                groups = strategy.collect(prompts, group_size, context)
            score(groups, self.rewards)
            for group in groups:
                group.kind = self.environment.kind(group.prompt_id)
            return groups

        # ranks that train on the same rows could sample, or be answered, differently
        return distributed.from_leader(play)

    def _sync(self) -> None:
        """Give the engine the policy's weights, and make sure that it samples from them."""
        assert self.trainer is not None
        module = self._module()
        policy = module.policy
        assert policy is not None
        limit = max_context(policy.lm)  # type: ignore[arg-type]
        if limit is not None and self.max_length > limit:
            raise UserError(
                f"max_length={self.max_length} is beyond the model's {limit} positions. Lower --data.max_length."
            )
        if self._ahead is not None:
            self._ahead.wait()  # all of an iteration's rollouts are of one policy
        self.engine.sync(policy)
        if self.canary is not None and self.canary.is_due(self.engine):
            chat, arithmetic = self._parts()[1], self.trainer.precision_plugin.forward_context
            trainee = Trainee(policy, module.logprobs_of, arithmetic)
            self._canary_metrics = self.canary.check(self.engine, trainee, chat, self.sampling)

    def evaluate(
        self, split: Split, *, num_tasks: int | None, group_size: int, sampling: SamplingParams
    ) -> list[TrajectoryGroup]:
        """Roll out on the first tasks of a split; every rank plays its share and gets all groups, in task order."""
        tasks = list(self.environment.tasks(split))[:num_tasks]
        if not tasks:
            raise UserError(f"The {split} split has no tasks to evaluate on: check the environment's options.")
        rank, size = distributed.share()
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
        return self._roll_out(prompts, group_size or self.group_size, self.sampling, OUTSIDE, wrap=wrap)

    def on_exception(self, exception: BaseException) -> None:
        """Stop what is being collected, so that the process can end."""
        self._stop()

    def teardown(self, stage: str) -> None:
        """Stop what is being collected, end the worker processes and what the engine holds: a stage starts its own."""
        self._stop()
        self.engine.close()
        if self.host:
            self.host.close()

    def _stop(self) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.stop()

    def val_dataloader(self) -> list[int]:
        """Nothing in a fit (the Evaluation callback decides when); one step for `validate`, which it hooks into."""
        assert self.trainer is not None
        return [] if self.trainer.state.fn == "fit" else [0]

    def test_dataloader(self) -> list[int]:
        """One step for `test`, which the Evaluation callback hooks into."""
        return [0]

    def state_dict(self) -> dict[str, Any]:
        """The prompt cursor, what was spent, and what each rank has of its own. Called by all ranks, as Lightning does.

        Sampling needs no state, its randomness is keyed by numbers. Rollouts collected ahead are not in it: a resumed
        run collects them anew, with the weights that it has.
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
