"""Supervised conversations: rows whose loss lies on the answers, in the very token layout that rollouts use."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import lightning as L
import numpy as np
from torch.utils.data import DataLoader

from lit_agentrl import distributed
from lit_agentrl.datamodules.batches import Batches, finished_epochs
from lit_agentrl.errors import UserError
from lit_agentrl.models.image_reader import Resize, load_image_reader
from lit_agentrl.models.policy import load_tokenizer
from lit_agentrl.rollouts.chat import Chat, ChatMode
from lit_agentrl.rollouts.memory import Memory, next_prompt, shown_images
from lit_agentrl.rows import Row, assemble, trajectory_rows
from lit_agentrl.types import Conversation, Observation, Split, Step, TrainBatch, Trajectory, WalkthroughSuite


class ConversationSource(ABC):
    """Where conversations come from."""

    @abstractmethod
    def conversations(self) -> Iterable[Conversation]:
        """All of them, always in the same order."""


class Walkthroughs(ConversationSource):
    """The solutions of an environment's first tasks, as a warm-up that teaches the answer format.

    Args:
        environment: A suite with walkthroughs.
        num_tasks: How many tasks of the split; None is all.
        split: Never use the one you evaluate on.
    """

    def __init__(self, environment: WalkthroughSuite, num_tasks: int | None = None, split: Split = "train") -> None:
        self.environment, self.num_tasks, self.split = environment, num_tasks, split

    def conversations(self) -> Iterable[Conversation]:
        """One conversation per task."""
        return [self.environment.walkthrough(task) for task in self.environment.tasks(self.split)[: self.num_tasks]]


class JSONLConversations(ConversationSource):
    """Conversations from a JSONL file: one object a line, `{"messages": [{"role": ..., "content": ...}, ...]}`.

    Args:
        path: The file. Roles are an optional leading `system`, then `user` and `assistant` in turns.
    """

    def __init__(self, path: str) -> None:
        if not Path(path).is_file():
            raise UserError(f"No file {path!r}. Give a JSONL file with one {{'messages': [...]}} object a line.")
        self.path = Path(path)

    def conversations(self) -> Iterable[Conversation]:
        """One conversation per line that is not blank."""
        with self.path.open(encoding="utf-8") as lines:
            return [self._parse(line, number) for number, line in enumerate(lines, 1) if line.strip()]

    def _parse(self, line: str, number: int) -> Conversation:
        try:
            messages = [(str(m["role"]), str(m["content"])) for m in json.loads(line)["messages"]]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path}:{number}: not a conversation ({error!r}); expected {{'messages': [...]}}."
            ) from None
        system = messages.pop(0)[1] if messages and messages[0][0] == "system" else ""
        roles = [role for role, _ in messages]
        if not messages or roles != ["user", "assistant"] * (len(messages) // 2):
            raise UserError(
                f"{self.path}:{number}: roles {roles} must be user and assistant in turns, ending with an answer."
            )
        texts = [text for _, text in messages]
        return [(Observation(q, system), a) for q, a in zip(texts[::2], texts[1::2], strict=True)]


class ConversationDataModule(L.LightningDataModule):
    """Serves conversations as training rows; an epoch is one shuffled pass.

    Args:
        source: Where the conversations come from.
        tokenizer: What the policy was loaded from (linked from `model.pretrained`).
        batch_size: Conversations of an optimiser step, over all ranks.
        max_length: Longer conversations are left out, and counted.
        max_tokens: Token budget of a micro-batch.
        seed: Of the order.
        chat: `append` later turns to the context, `rebuild` the prompt at every turn, or write all `inline`, as one
            answer that no end of turn closes: as the rollouts to come.
        memory: Writes the prompts that are rebuilt; None shows the observation alone.
        resize: How images are resized before the model's own processor, as in the rollouts to come.
    """

    def __init__(
        self,
        source: ConversationSource,
        tokenizer: str,
        batch_size: int = 8,
        max_length: int = 1024,
        max_tokens: int = 8192,
        seed: int = 0,
        chat: ChatMode = "append",
        memory: Memory | None = None,
        resize: Resize | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: must be at least 1.")
        if max_tokens < max_length:
            raise UserError(f"max_tokens={max_tokens} is below max_length={max_length}: raise it, or lower max_length.")
        if memory is not None and chat != "rebuild":
            raise UserError(f"memory with chat={chat!r}: set --data.chat to rebuild, or --data.memory to null.")
        self.source, self.pretrained, self.chat_mode, self.memory = source, tokenizer, chat, memory
        self.batch_size, self.max_length, self.max_tokens, self.seed = batch_size, max_length, max_tokens, seed
        self.tokenizer = load_tokenizer(tokenizer)
        self._reader = load_image_reader(tokenizer, resize)
        self.rows: list[list[Row]] = []
        self.iteration_metrics: dict[str, float] = {}

    def setup(self, stage: str) -> None:
        """Tokenise every conversation, once."""
        if self.rows or stage != "fit":
            return
        chat = Chat(self.tokenizer, self.chat_mode, self._reader)
        everything = [
            trajectory_rows(*_as_trajectory(chat, self.memory, turns, self.max_length))
            for turns in self.source.conversations()
        ]
        self.rows = [rows for rows in everything if max(len(row.token_ids) for row in rows) <= self.max_length]
        self.iteration_metrics = {
            "conversations": float(len(self.rows)),
            "too_long": float(len(everything) - len(self.rows)),
        }
        if not self.rows:
            raise UserError(
                f"None of the {len(everything)} conversations fits max_length={self.max_length}. Raise it (--data)."
            )

    def train_dataloader(self) -> DataLoader[TrainBatch]:
        """This epoch's micro-batches; the order depends on the epoch's number alone, so a resumed run sees the same."""
        assert self.trainer is not None
        epoch = finished_epochs(self.trainer)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows)).tolist()
        rank, size = distributed.share()
        updates = [
            self._share(order[i : i + self.batch_size], rank, size) for i in range(0, len(order), self.batch_size)
        ]
        shared = bool(getattr(self.trainer.lightning_module, "shares_prefixes", False))
        batches, per_step = assemble(
            updates, self.max_tokens, distributed.reduce_integers, shared=shared, reader=self._reader
        )
        self.trainer.accumulate_grad_batches = per_step
        return DataLoader(Batches(batches), batch_size=None)

    def _share(self, chosen: Sequence[int], rank: int, size: int) -> list[Row]:
        return [row for i in chosen[rank::size] for row in self.rows[i]]


def _as_trajectory(
    chat: Chat, memory: Memory | None, turns: Conversation, max_length: int
) -> tuple[Trajectory, list[float]]:
    """A conversation as the trajectory of a policy that gave exactly these answers."""
    steps: list[Step] = []
    system = ""
    for observation, answer in turns:
        system = observation.system or system  # stated once, it holds for the episode, as in a rollout
        ids = chat.action_ids(answer)
        shown = replace(observation, system=system)
        prompt = next_prompt(chat, memory, steps, shown, max_length - len(ids))
        steps.append(
            Step(
                prompt.token_ids,
                ids,
                [0.0] * len(ids),
                observation=observation.text,
                state=observation.state or observation.text,
                action=answer,
                images=shown_images(chat, steps, observation),
            )
        )
    return Trajectory(steps), [0.0] * len(steps)
