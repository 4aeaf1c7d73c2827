"""Micro-batches of whole pairs under a token budget: the rows of a pair share their prompt and stay together."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
from torch import Tensor

from lit_agentrl.errors import UserError
from lit_agentrl.images import Image, ImageReader, ImageRef, content_key
from lit_agentrl.models.prefix_tree import PackedTree
from lit_agentrl.models.scoring import MIN_REUSE
from lit_agentrl.rows import Row, collate
from lit_agentrl.types import PreferenceBatch, TrainBatch

Pair = list[Row]
"""The rows of a pair in their order: chosen, rejected, and a third where one is asked for."""

EMPTY = Row([0, 0], [False, False], [0.0, 0.0], [0.0, 0.0])
"""Two tokens and no loss: a row that only fills its place."""


def plan_pairs(
    pairs: Sequence[Pair], max_tokens: int, *, shared: bool, image_token_id: int | None = None
) -> list[list[int]]:
    """Which pairs each micro-batch holds; every one is in exactly one of them.

    Args:
        pairs: Those of one optimiser step on this rank.
        max_tokens: Unique tokens that a micro-batch may hold where prefixes are shared, padded ones otherwise.
        shared: Whether the forward encodes shared prefixes once.
        image_token_id: What stands for images: equal runs of it are equal prefixes only where rows show equal images.

    Raises:
        UserError: A pair alone is beyond the budget.
    """
    if not pairs:
        return []
    batch = collate([row for pair in pairs for row in pair], 0, 0)
    size = len(pairs[0])
    if not shared:
        longest = [max(len(row.token_ids) for row in pair) for pair in pairs]
        return _padded_plan(list(range(len(pairs))), longest, size, max_tokens)
    keys = _keys(batch.token_ids, [row for pair in pairs for row in pair], image_token_id)
    plan = []
    for pack in _packs(keys, batch.lengths, size, max_tokens):
        plan += _within_budget(pack, batch, keys, size, max_tokens)
    return plan


def _keys(token_ids: Tensor, rows: Sequence[Row], image_token_id: int | None) -> Tensor:
    """[B, L], which tokens are equal. Images are known by all that a row shows: no pixel is read to plan."""
    keys = token_ids.clone()
    for b, row in enumerate(rows):
        if row.images:
            shown = hashlib.sha256("".join(map(content_key, row.images)).encode()).digest()
            keys[b, token_ids[b] == image_token_id] = -1 - (int.from_bytes(shown[:8]) >> 1)
    return keys


def _padded_plan(chosen: Sequence[int], longest: Sequence[int], size: int, max_tokens: int) -> list[list[int]]:
    """Pairs of like lengths together: the least padding."""
    plan: list[list[int]] = [[]]
    for i in sorted(chosen, key=lambda i: (longest[i], i)):
        if size * longest[i] > max_tokens:
            raise _too_long(size * longest[i], max_tokens)
        if plan[-1] and (len(plan[-1]) + 1) * size * longest[i] > max_tokens:
            plan.append([])
        plan[-1].append(i)
    return plan


def _packs(keys: Tensor, lengths: Tensor, size: int, max_tokens: int) -> list[list[int]]:
    """Neighbours in the order of their first rows, as many as fit: those with equal prompts come together."""
    rows = [row[:length] for row, length in zip(keys.cpu(), lengths.tolist(), strict=True)]
    order = sorted(range(len(rows) // size), key=lambda i: (rows[i * size].tolist(), i))
    packs: list[list[int]] = []
    used, previous = 0, keys.new_empty(0)
    for i in order:
        first, *others = rows[i * size : (i + 1) * size]
        alone = len(first) + sum(len(row) - _common(row, first) for row in others)
        if alone > max_tokens:
            raise _too_long(alone, max_tokens)
        # At most: what the other rows have in common with those of the pair before is not looked for.
        more = alone - _common(first, previous)
        if packs and used + more <= max_tokens:
            packs[-1].append(i)
            used += more
        else:
            packs.append([i])
            used = alone
        previous = first
    return packs


def _within_budget(pack: list[int], batch: TrainBatch, keys: Tensor, size: int, max_tokens: int) -> list[list[int]]:
    """The pack itself, or, where its rows share too little to be shared and would be padded, smaller parts of it."""
    rows = [i * size + k for i in pack for k in range(size)]
    lengths = batch.lengths[rows]
    if int(lengths.max()) * len(rows) <= max_tokens:
        return [pack]
    if PackedTree.build(batch.token_ids[rows], lengths, keys[rows]).reuse >= MIN_REUSE:
        return [pack]
    longest = batch.lengths.view(-1, size).max(-1).values.tolist()
    return _padded_plan(pack, longest, size, max_tokens)


def collate_pairs(
    pairs: Sequence[Pair], step: Sequence[Pair], num_updates: int = 1, reader: ImageReader | None = None
) -> PreferenceBatch:
    """The rows of some pairs of an optimiser step; `step` holds those of all its micro-batches and ranks."""
    rows = [row for pair in step for row in pair if row.num_action_tokens]
    num_tokens = sum(row.num_action_tokens for row in rows)
    batch = collate([row for pair in pairs for row in pair], num_tokens, len(rows), reader=reader)
    batch.num_updates = num_updates
    shared = {field.name: getattr(batch, field.name) for field in fields(TrainBatch)}
    return PreferenceBatch(**shared, rows_per_pair=len(pairs[0]), num_pairs=len(step))


def _common(one: Tensor, other: Tensor) -> int:
    """How many tokens two rows begin with alike."""
    overlap = min(len(one), len(other))
    differs = (one[:overlap] != other[:overlap]).nonzero()
    return int(differs[0]) if len(differs) else overlap


def _too_long(tokens: int, max_tokens: int) -> UserError:
    return UserError(
        f"max_tokens={max_tokens} is below the {tokens} tokens of the longest pair. Raise --data.max_tokens, or lower "
        "--data.max_length."
    )


def corrupted(row: Row, generator: np.random.Generator, area: tuple[float, float]) -> Row:
    """The row with a random part of every image in its place; empty where it shows none.

    Each part is scaled back to the whole's size, so that the tokens stay the same. As `RandomResizedCrop`: the area is
    uniform between the two shares, the logarithm of width over height between log(3/4) and log(4/3). Changed: both are
    relative to the image, as its size is not known here.
    """
    if not row.images:
        return EMPTY
    return replace(row, images=tuple(_part(image, generator, area) for image in row.images))


def _part(image: Image, generator: np.random.Generator, area: tuple[float, float]) -> ImageRef:
    assert isinstance(image, ImageRef), "preference files name images by path"
    share, ratio = generator.uniform(*area), math.exp(generator.uniform(-1, 1) * math.log(4 / 3))
    width, height = min(1.0, math.sqrt(share * ratio)), min(1.0, math.sqrt(share / ratio))
    left, top = generator.uniform(0, 1 - width), generator.uniform(0, 1 - height)
    return replace(image, crop=(left, top, min(1.0, left + width), min(1.0, top + height)))


def empty_pair(size: int) -> Pair:
    """What a rank trains on while its peers still have pairs."""
    return [EMPTY] * size
