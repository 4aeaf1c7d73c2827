"""The second step of the alignment: projector and language model learn together to say what an image shows.

The language model is trained through a low-rank adapter, which is merged into it afterwards; the encoder stays as it
is, so its features were computed once. Only answers are learnt, and only for them are logits computed.

Legend: B sequences, L tokens of the longest, N images, P patches, D features, A answer tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

    from lit_agentrl.vlm.sequences import Sequence as Tokens

RANK, ALPHA = 32, 64
LEARNING_RATE, PROJECTOR_LEARNING_RATE = 1e-3, 3e-4
BATCH = 4
MAX_NORM = 1.0
REPORTS = 10


@dataclass(frozen=True)
class Material:
    """What is learnt from."""

    features: Tensor
    """[N, P, D]"""
    sequences: Sequence[Tokens]
    """N, one an image."""
    weights: Sequence[float]
    """N, how often each is to come, relative to the others."""


def align(
    vlm: LlavaForConditionalGeneration,
    material: Material,
    steps: int,
    generator: torch.Generator,
    say: Callable[[str], None],
) -> None:
    """Train `vlm` in place for so many updates, and merge what its language model learnt."""
    vlm.requires_grad_(False)
    projector = vlm.model.multi_modal_projector.requires_grad_(True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", bias="none")
        lm = get_peft_model(vlm.model.language_model, adapter)
    assert isinstance(lm, PeftModel)
    rates = [
        {"params": [value for value in lm.parameters() if value.requires_grad], "lr": LEARNING_RATE},
        {"params": list(projector.parameters()), "lr": PROJECTOR_LEARNING_RATE},
    ]
    optimizer = torch.optim.AdamW(rates, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [float(cast(float, group["lr"])) for group in rates], total_steps=steps + 1, pct_start=0.1
    )
    trained = [value for group in rates for value in cast("list[Tensor]", group["params"])]
    start, total = time.monotonic(), 0.0
    every = max(1, steps // REPORTS)
    for step, rows in enumerate(_batches(material, steps, generator), start=1):
        loss = answer_loss(vlm, lm, material.features[rows], [material.sequences[row] for row in rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        nn.utils.clip_grad_norm_(trained, MAX_NORM)
        optimizer.step()
        schedule.step()
        total += float(loss.detach())
        if step % every == 0:
            left = (time.monotonic() - start) / step * (steps - step)
            say(f"  update {step} of {steps}: loss {total / every:.3f}, about {left / 60:.1f} min left")
            total = 0.0
    vlm.model.language_model = lm.merge_and_unload()
    vlm.requires_grad_(True)


def answer_loss(vlm: LlavaForConditionalGeneration, lm: Any, features: Tensor, sequences: Sequence[Tokens]) -> Tensor:
    """Mean cross entropy of the answer tokens.

    Args:
        vlm: has the projector and the head.
        lm: its language model, or one around it.
        features: [B, P, D] of the images.
        sequences: B, one an image.
    """
    length = max(len(tokens.ids) for tokens in sequences)
    ids = torch.zeros(len(sequences), length, dtype=torch.int64)  # what stands behind a sequence is never looked at
    is_answer = torch.zeros(len(sequences), length, dtype=torch.bool)
    for row, tokens in enumerate(sequences):
        ids[row, : len(tokens.ids)] = torch.tensor(tokens.ids)
        is_answer[row, : len(tokens.ids)] = torch.tensor(tokens.is_answer)
    images = vlm.model.multi_modal_projector(features.float()).flatten(0, 1)
    embedded = vlm.get_input_embeddings()(ids)  # type: ignore[no-untyped-call]  # upstream's
    placeholder = (ids == vlm.config.image_token_id)[..., None]
    embedded = embedded.masked_scatter(placeholder, images)
    hidden = lm(inputs_embeds=embedded, use_cache=False).last_hidden_state
    return cross_entropy(vlm.lm_head(hidden[:, :-1][is_answer[:, 1:]]), ids[:, 1:][is_answer[:, 1:]])


def _batches(material: Material, steps: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Rows of `BATCH` images, with replacement by weight."""
    weights = torch.tensor(material.weights, dtype=torch.float64)
    for _ in range(steps):
        yield torch.multinomial(weights, BATCH, generator=generator).tolist()
