"""Preference pairs: two answers to one prompt, in the very token layout that rollouts use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import lightning as L
import numpy as np
from torch.utils.data import DataLoader, IterableDataset

from lit_agentrl import distributed
from lit_agentrl.datamodules.batches import finished_epochs
from lit_agentrl.datamodules.pairs import Pair, collate_pairs, corrupted, empty_pair, plan_pairs
from lit_agentrl.datamodules.preference_file import Preference, read_preferences
from lit_agentrl.errors import UserError
from lit_agentrl.models.image_reader import Resize, load_image_reader
from lit_agentrl.models.policy import load_tokenizer
from lit_agentrl.rollouts.chat import Chat, ChatMode
from lit_agentrl.rows import Row
from lit_agentrl.types import Observation, PreferenceBatch, TrainBatch


@runtime_checkable
class PreferenceModule(Protocol):
    """What the datamodule needs of the module that it serves."""

    @property
    def shares_prefixes(self) -> bool:
        """Whether micro-batches are planned by unique tokens."""
        ...

    @property
    def corrupts_images(self) -> bool:
        """Whether every pair gets a third row: the chosen answer under a corrupted image."""
        ...

    @property
    def caches_reference(self) -> bool:
        """Whether batches come with what the reference says of their rows."""
        ...

    def reference_sums(self, batches: Iterable[PreferenceBatch]) -> list[list[float]]:
        """The reference's log-probability of every row of some batches."""
        ...


@dataclass(slots=True)
class _Step:
    """This rank's share of an optimiser step."""

    pairs: list[int]
    """All pairs of the step, on all ranks."""
    plan: list[list[int]]
    """Of each micro-batch on this rank, which pairs; empty where only the peers still have some."""


class PreferenceDataModule(L.LightningDataModule):
    """Serves pairs of answers as training rows; an epoch is one shuffled pass.

    Args:
        path: A JSONL file of pairs (see docs/preferences.md), as `lit-agentrl mine-preferences` writes it.
        tokenizer: What the policy was loaded from (linked from `model.pretrained`).
        batch_size: Pairs of an optimiser step, over all ranks.
        max_length: Pairs with a longer row are left out, and counted.
        max_tokens: Token budget of a micro-batch: unique tokens where prefixes are shared, else padded ones.
        seed: Of the order.
        chat: How the turns of a prompt follow one another: as in the rollouts that the pairs come from. With `rebuild`
            a prompt is one turn.
        resize: How images are resized before the model's own processor: as in those rollouts.
        crop: Least and most share of an image that is left where the module's loss wants it corrupted (mDPO): another
            part in every epoch, or, where the module computes its reference once, the same.
    """

    def __init__(
        self,
        path: str,
        tokenizer: str,
        batch_size: int = 16,
        max_length: int = 1024,
        max_tokens: int = 8192,
        seed: int = 0,
        chat: ChatMode = "append",
        resize: Resize | None = None,
        crop: tuple[float, float] = (0.01, 0.2),
    ) -> None:
        super().__init__()
        if not 0 < crop[0] <= crop[1] <= 1:
            raise UserError(f"crop={list(crop)}: give the least and the most share of an image, above 0 and up to 1.")
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: must be at least 1.")
        if max_tokens < max_length:
            raise UserError(f"max_tokens={max_tokens} is below max_length={max_length}: raise it, or lower max_length.")
        self.preferences = read_preferences(Path(path))
        self.path, self.pretrained, self.chat_mode, self.crop = path, tokenizer, chat, crop
        self.batch_size, self.max_length, self.max_tokens, self.seed = batch_size, max_length, max_tokens, seed
        self.tokenizer = load_tokenizer(tokenizer)
        self._reader = load_image_reader(tokenizer, resize)
        self.pairs: list[Pair] = []
        self.iteration_metrics: dict[str, float] = {}
        self._reference: list[list[float]] | None = None

    def setup(self, stage: str) -> None:
        """Tokenise every pair, once."""
        if self.pairs or stage != "fit":
            return
        chat = Chat(self.tokenizer, self.chat_mode, self._reader)
        everything = [_rows(chat, preference) for preference in self.preferences]
        self.pairs = [pair for pair in everything if max(len(row.token_ids) for row in pair) <= self.max_length]
        self.iteration_metrics = {
            "pairs": float(len(self.pairs)),
            "too_long": float(len(everything) - len(self.pairs)),
            "with_images": float(sum(bool(pair[0].images) for pair in self.pairs)),
        }
        if not self.pairs:
            raise UserError(
                f"None of the {len(everything)} pairs fits max_length={self.max_length}. Raise it (--data)."
            )

    def train_dataloader(self) -> DataLoader[TrainBatch]:
        """This epoch's micro-batches; the order depends on the epoch's number alone, so a resumed run sees the same."""
        assert self.trainer is not None
        module = self._module()
        epoch = finished_epochs(self.trainer)
        self._corrupt(module, epoch)
        if module.caches_reference and self._reference is None:
            self._reference = self._reference_of_all(module)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.pairs)).tolist()
        steps = [
            self._step(order[i : i + self.batch_size], module.shares_prefixes)
            for i in range(0, len(order), self.batch_size)
        ]
        # Lightning accumulates a fixed number, and a rank that runs out of batches would leave its peers waiting.
        per_step = max(1, *distributed.reduce_integers([len(step.plan) for step in steps], "max"))
        for step in steps:
            step.plan += [[] for _ in range(per_step - len(step.plan))]
        self.trainer.accumulate_grad_batches = per_step
        return DataLoader(_Batches(self, steps), batch_size=None)

    def _module(self) -> PreferenceModule:
        assert self.trainer is not None
        module = self.trainer.lightning_module
        if not isinstance(module, PreferenceModule):
            raise UserError(
                f"PreferenceDataModule serves pairs, {type(module).__name__} trains on none: use DPOModule."
            )
        return module

    def _corrupt(self, module: PreferenceModule, epoch: int) -> None:
        """Give every pair its third row, where the module wants one; its draws depend on seed, epoch and pair alone."""
        if not module.corrupts_images:
            return
        if not self.iteration_metrics["with_images"]:
            raise UserError(f"{self.path} has no images, so there are none to corrupt: leave the `image` term out.")
        number = 0 if module.caches_reference else epoch
        for i, pair in enumerate(self.pairs):
            pair[2:] = [corrupted(pair[0], np.random.default_rng([self.seed, number, i]), self.crop)]

    def _step(self, chosen: Sequence[int], shared: bool) -> _Step:
        rank, size = distributed.share()
        mine = list(chosen[rank::size])
        image_token_id = None if self._reader is None else self._reader.image_token_id
        pairs = [self.pairs[i] for i in mine]
        plan = plan_pairs(pairs, self.max_tokens, shared=shared, image_token_id=image_token_id)
        return _Step(list(chosen), [[mine[i] for i in part] for part in plan])

    def batch(self, chosen: Sequence[int], step: Sequence[int], num_updates: int) -> PreferenceBatch:
        """The micro-batch of some pairs of an optimiser step."""
        pairs = [self.pairs[i] for i in chosen] or [empty_pair(len(self.pairs[0]))]
        batch = collate_pairs(pairs, [self.pairs[i] for i in step], num_updates, self._reader)
        if self._reference is not None:
            sums = [self._reference[i] for i in chosen] or [[0.0] * batch.rows_per_pair]
            batch.reference_sums = [value for pair in sums for value in pair]
        return batch

    def _reference_of_all(self, module: PreferenceModule) -> list[list[float]]:
        """The reference's log-probabilities of every pair's rows; ranks share the work.

        Planned in the file's order, whatever the epoch: a resumed run gets the same numbers, bit by bit.
        """
        everything = list(range(len(self.pairs)))
        plan = self._step(everything, module.shares_prefixes).plan
        batches = (self.batch(part, everything, 1) for part in plan)  # one at a time: images are many, and large
        rows_per_pair = len(self.pairs[0])
        mine: dict[int, list[float]] = {}
        for part, sums in zip(plan, module.reference_sums(batches), strict=True):
            for k, i in enumerate(part):
                mine[i] = sums[k * rows_per_pair : (k + 1) * rows_per_pair]
        found = {i: sums for share in distributed.gather(mine) for i, sums in share.items()}
        return [found[i] for i in everything]


class _Batches(IterableDataset[TrainBatch]):
    """An epoch's micro-batches, each made when it is asked for: images are many, and large."""

    def __init__(self, data: PreferenceDataModule, steps: Sequence[_Step]) -> None:
        self.data, self.steps = data, steps

    def __iter__(self) -> Iterator[TrainBatch]:
        """In order."""
        for step in self.steps:
            for chosen in step.plan:
                yield self.data.batch(chosen, step.pairs, len(self.steps))

    def __len__(self) -> int:
        """How many."""
        return sum(len(step.plan) for step in self.steps)


def _rows(chat: Chat, preference: Preference) -> Pair:
    """Chosen and rejected after the same prompt.

    Raises:
        UserError: The chat's mode cannot write the prompt, or both answers are the same tokens.
    """
    if len(preference.turns) > 1 and chat.mode == "rebuild":
        raise UserError(f"{preference.place}: a prompt of several turns needs --data.chat append, or inline.")
    first = Observation(preference.turns[0], preference.system, images=preference.images)
    context = chat.opening(first)
    for answer, turn in zip(preference.turns[1::2], preference.turns[2::2], strict=True):
        context = chat.next_context(context, chat.action_ids(answer), Observation(turn))
    pair = []
    for answer in (preference.chosen, preference.rejected):
        ids = chat.action_ids(answer)
        row = Row(images=preference.images)
        row.extend(context)
        row.extend(ids, [0.0] * len(ids))
        pair.append(row)
    if pair[0].token_ids == pair[1].token_ids:
        raise UserError(f"{preference.place}: chosen and rejected are the same tokens: nothing is preferred.")
    return pair
