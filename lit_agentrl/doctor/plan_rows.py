"""Rows that fill a micro-batch: what is planned for before anything was collected, or more of what was."""

from __future__ import annotations

from dataclasses import replace

import torch

from lit_agentrl.doctor.rows import packed_plan, padded_plan, reuse_of, select
from lit_agentrl.images import RowImages
from lit_agentrl.models.vision import MAX_CONTENT_ID, VisionInputs
from lit_agentrl.types import TrainBatch


def made_rows(
    max_tokens: int, length: int, prompt: int, group_size: int, *, shared: bool, vocabulary: int
) -> TrainBatch:
    """Groups of the longest rows, as many as a micro-batch holds: one prompt each, and answers that differ.

    Args:
        max_tokens: Of the micro-batch: unique tokens, or padded ones.
        length: Of a row.
        prompt: Tokens of it that the group shares.
        group_size: Rows of a group.
        shared: Which of the two are counted.
        vocabulary: Tokens there are.
    """
    answer = length - prompt
    tokens_of_group = prompt + group_size * answer if shared else group_size * length
    num_rows = max(1, max_tokens // length)
    if shared:
        whole, rest = divmod(max_tokens, tokens_of_group)
        num_rows = max(1, whole * group_size + max(0, rest - prompt) // max(1, answer))
    group = torch.arange(num_rows) // group_size
    place = torch.arange(length)
    token_ids = (group[:, None] + place) % vocabulary
    token_ids[:, prompt:] = (token_ids[:, prompt:] + 1 + torch.arange(num_rows)[:, None]) % vocabulary
    mask = (place >= prompt).expand(num_rows, -1).clone()
    return _batch(token_ids, mask)


def filled(batch: TrainBatch, max_tokens: int, *, shared: bool, vocabulary: int) -> TrainBatch:
    """One micro-batch of `max_tokens`: rows like those of `batch`, again and again with other tokens and other images.

    The images of every copy of a row are of the same size, but count as different ones.
    """
    counted = reuse_of([batch])
    size = counted.unique_tokens if shared else counted.padded_tokens
    copies = max(1, -(-max_tokens // size))
    token_ids = torch.cat([_other_words(batch, shift, vocabulary) for shift in range(copies)])
    tiled = _batch(token_ids, batch.action_mask.repeat(copies, 1), batch.lengths.repeat(copies))
    tiled = replace(tiled, temperature=batch.temperature, vision=_other_images(batch.vision, copies))
    plan = packed_plan(tiled, max_tokens) if shared else padded_plan(tiled, max_tokens)
    largest = max(plan, key=len)
    chosen = select(tiled, largest)
    longest = int(chosen.lengths.max())
    made = _batch(chosen.token_ids[:, :longest], chosen.action_mask[:, :longest], chosen.lengths)
    return replace(made, temperature=chosen.temperature, vision=chosen.vision)


def _other_words(batch: TrainBatch, shift: int, vocabulary: int) -> torch.Tensor:
    """[B, L], every token so many further in the vocabulary; placeholders stay, and no other token becomes one."""
    moved = (batch.token_ids + shift) % vocabulary
    if not isinstance(batch.vision, VisionInputs):
        return moved
    placeholder = batch.vision.image_token_id
    moved[moved == placeholder] = (placeholder + 1) % vocabulary
    return moved.where(batch.token_ids != placeholder, batch.token_ids)


def _other_images(vision: RowImages | None, copies: int) -> VisionInputs | None:
    """As many copies of the images, shown by as many copies of the rows."""
    if not isinstance(vision, VisionInputs):
        return None
    count = len(vision.content_ids)
    return replace(
        vision,
        pixels={name: values * copies for name, values in vision.pixels.items()},
        content_ids=[(key + k) % MAX_CONTENT_ID for k in range(copies) for key in vision.content_ids],
        num_tokens=vision.num_tokens * copies,
        shown=[[image + k * count for image in row] for k in range(copies) for row in vision.shown],
    )


def _batch(token_ids: torch.Tensor, mask: torch.Tensor, lengths: torch.Tensor | None = None) -> TrainBatch:
    zeros = torch.zeros(token_ids.shape)
    lengths = torch.full((len(token_ids),), token_ids.shape[1]) if lengths is None else lengths
    return TrainBatch(token_ids, lengths, mask, zeros, zeros, int(mask.sum()))
