"""Fits of tiny vision-language models in this process, by Lightning's trainer without the command line around it."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import nn

from lit_agentrl.callbacks import AtomicCheckpointIO, CollectionMetrics, IterationCheckpoint, NonFiniteGuard
from lit_agentrl.datamodules import RolloutDataModule
from lit_agentrl.images import Image, ImageRef
from lit_agentrl.methods import GRPOPlusPlusModule
from lit_agentrl.methods.base import PolicyModule
from lit_agentrl.models.lm_parts import base_lm, decoder_of
from lit_agentrl.models.vision import VisionInputs
from lit_agentrl.models.vision_parts import Parts
from lit_agentrl.rewards import Reward
from lit_agentrl.rollouts import ChainRollout
from lit_agentrl.types import EnvironmentSuite, Observation, SamplingParams, Split, TrainBatch
from runs import mean_token

SGD = partial(torch.optim.SGD, lr=0.5)
"""Weights that are linear in the gradient: Adam would magnify the rounding of gradients near zero."""


def noise(seed: object, height: int = 20, width: int = 20) -> np.ndarray:
    """A picture [height, width, 3] that depends on what `seed` reads as."""
    digest = hashlib.sha256(str(seed).encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:8]))
    return generator.integers(0, 256, (height, width, 3), dtype=np.uint8)


class Slides(EnvironmentSuite):
    """A picture a turn, drawn from the task and everything done so far; all tasks are in the same words."""

    def __init__(self, turns: int = 1) -> None:
        self.turns = turns

    def tasks(self, split: Split) -> Sequence[str]:
        return [f"{split}-{number}" for number in range(6)]

    def make(self, task: str) -> SlidesEnvironment:
        return SlidesEnvironment(task, self.turns)


class SlidesEnvironment:
    """One episode; a long action pays more than a short one."""

    def __init__(self, task: str, turns: int) -> None:
        self._done: tuple[str, ...] = (task,)
        self._turns = turns
        self.missing_at = -1
        """The turn whose picture is a file that is not there."""

    def reset(self) -> Observation:
        return self._observe("Be brief.")

    def step(self, action: str) -> tuple[Observation, float, bool]:
        self._done = (*self._done, action)
        return self._observe(), len(action) / 10, len(self._done) > self._turns

    @property
    def anchor(self) -> Hashable:
        return self._done

    @property
    def success(self) -> bool | None:
        return None

    def snapshot(self) -> object:
        return self._done

    def restore(self, snapshot: object) -> None:
        assert isinstance(snapshot, tuple)
        self._done = snapshot

    def close(self) -> None:
        pass

    def _observe(self, system: str = "") -> Observation:
        is_missing = len(self._done) - 1 == self.missing_at
        image: Image = ImageRef("/gone/away.png", "0" * 64) if is_missing else noise(self._done)
        return Observation("Next.", system, images=(image,))


@dataclass
class Fit(L.Callback):
    """What a fit was, and what was seen of it."""

    module: PolicyModule
    data: RolloutDataModule
    run: Path
    num_encoded: int = 0
    """Tokens that the decoder computed in training steps, padding included."""
    drift: float = 0.0
    """How far the ratio of any sampled token was from 1 before the first optimiser step."""
    gradients: dict[str, float] = field(default_factory=dict)
    """The largest gradient of each part at the first optimiser step; parts without any are missing."""
    before: dict[str, torch.Tensor] = field(default_factory=dict)
    """The weights that training began with."""

    def __hash__(self) -> int:
        return id(self)

    @property
    def lm(self) -> nn.Module:
        return self.module.policy.lm

    def weights(self, only_trained: bool = True) -> dict[str, torch.Tensor]:
        return {n: p.detach() for n, p in self.lm.named_parameters() if p.requires_grad or not only_trained}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.before = {name: value.clone() for name, value in self.weights(only_trained=False).items()}
        decoder_of(self.lm).register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, decoder: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            ids, embeddings = inputs.get("input_ids"), inputs.get("inputs_embeds")
            self.num_encoded += ids.numel() if embeddings is None else embeddings[..., 0].numel()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        if trainer.global_step:
            return
        parts = Parts(base_lm(self.lm))
        for name, parameter in self.lm.named_parameters():
            if parameter.grad is not None:
                part = parts.of(name.replace(".base_layer.", ".").removeprefix("base_model.model."))
                largest = float(parameter.grad.abs().max())
                self.gradients[part] = max(self.gradients.get(part, 0.0), largest)

    @torch.no_grad()
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: TrainBatch, _: int) -> None:
        if not trainer.global_step:
            self.drift = max(self.drift, drift(self.module, batch))


def drift(module: PolicyModule, batch: TrainBatch) -> float:
    """How far the ratio of any sampled token of a batch is from 1."""
    ratio = (module.score(batch).logprobs.detach() - batch.old_logprobs).exp()
    return float((ratio - 1)[batch.action_mask].abs().max())


def num_unique(batch: TrainBatch) -> int:
    """Different prefixes of the rows, an image's placeholder told apart by what it shows: counted the slow way."""
    vision = batch.vision
    assert isinstance(vision, VisionInputs)
    seen = set()
    for row, length, shown in zip(batch.token_ids.tolist(), batch.lengths.tolist(), vision.shown, strict=True):
        features = [vision.content_ids[image] for image in shown for _ in range(vision.num_tokens[image])][::-1]
        tokens = [(i, features.pop() if i == vision.image_token_id else 0) for i in row[:length]]
        assert not features
        seen |= {tuple(tokens[:end]) for end in range(1, length + 1)}
    return len(seen)


def fit(
    vlm: str,
    run: Path,
    *,
    method: type[PolicyModule] = GRPOPlusPlusModule,
    suite: EnvironmentSuite | None = None,
    data: dict[str, Any] | None = None,
    epochs: int = 1,
    resume: bool = False,
    **module: Any,
) -> Fit:
    """Some iterations of 2 prompts x 3 short answers."""
    L.seed_everything(0, verbose=False)
    options: dict[str, Any] = {
        "environment": suite or Slides(),
        "rollout": ChainRollout(max_steps=1, cut_actions="continue"),
        "rewards": [Reward(function=mean_token)],
        "sampling": SamplingParams(max_new_tokens=4, temperature=0.9),
        "num_prompts": 2,
        "group_size": 3,
        "max_length": 400,
        "max_tokens": 8000,
    }
    made = Fit(method(pretrained=vlm, **module), RolloutDataModule(tokenizer=vlm, **options | (data or {})), run)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=run,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        plugins=[AtomicCheckpointIO()],
        callbacks=[CollectionMetrics(), NonFiniteGuard(), IterationCheckpoint(save_top_k=0), made],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(made.module, made.data, ckpt_path=str(run / "checkpoints" / "last.ckpt") if resume else None)
    return made
