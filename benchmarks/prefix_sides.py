"""Ways to compute a policy's loss and gradient on a batch, for the shared-prefix benchmarks.

Every one of them runs the decoder, then the head on target tokens only (`token_logprobs`), and gives log-probabilities
[B, L] to one and the same loss; the head's part is not what is compared.

Legend: B rows, L row length, T packed tokens, N targets, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from prefix_batches import Batch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lit_agentrl.losses import clipped_surrogate
from lit_agentrl.models import PackedTree, PaddedModel, PrefixGroupedModel, token_logprobs
from lit_agentrl.models.lm_parts import decoder_of, head_of

Scorer = Callable[[Batch], Tensor]
"""A batch to its log-probabilities [B, L]."""

PREFIX_GROUPER = "benchmark_prefix_grouper"
"""The name that the package's attention is registered under in transformers."""


def random_qwen3(config: Qwen3Config, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
    """The model of `config` with random weights, the same on every call."""
    torch.manual_seed(0)
    with torch.device(device):
        lm: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return lm.eval()


def loss_and_gradients(scorer: Scorer, parts: list[Batch], whole: Batch) -> Tensor:
    """One backward a part, with the weights that the whole batch gives a token. Log-probabilities [B, L] of `whole`."""
    num_targets = int(whole.targets.sum())
    found = []
    for part in parts:
        of_part = scorer(part)
        drift, advantages = part.drift.to(of_part), part.advantages.to(of_part)[:, None].expand_as(of_part)
        loss = clipped_surrogate(of_part, of_part.detach() + drift, advantages)
        (loss * part.targets).sum().div(num_targets).backward()
        found.append(of_part.detach())
    logprobs = torch.zeros(whole.token_ids.shape, dtype=torch.float64)
    for part, of_part in zip(parts, found, strict=True):  # afterwards: a copy would make the host wait for the GPU
        logprobs[part.rows.cpu(), : of_part.shape[1]] = of_part.double().cpu()
    return logprobs


def padded(lm: nn.Module) -> Scorer:
    """The plain forward."""
    model = PaddedModel(lm, check=False)
    return lambda batch: model(batch.token_ids, batch.lengths, targets=batch.targets).logprobs


def shared(lm: nn.Module, backend: Any = "auto", gate: bool = False) -> Scorer:
    """Shared prefixes; with the gate, only where they pay."""
    model = PrefixGroupedModel(lm, backend, min_reuse=None if gate else 1.0, check=False)
    return lambda batch: model(batch.token_ids, batch.lengths, targets=batch.targets).logprobs


def unshared_packing(lm: nn.Module, backend: Any = "tree_merge") -> Scorer:
    """All rows behind one another in one sequence, without padding, each attending to itself alone.

    Our own packing under keys that no two tokens share: what a variable-length kernel computes, one causal flash call a
    row.
    """
    model = PrefixGroupedModel(lm, backend, check=False)

    def score(batch: Batch) -> Tensor:
        keys = torch.arange(batch.token_ids.numel()).view(batch.token_ids.shape)
        packed = PackedTree.build(batch.token_ids, batch.lengths, keys)
        edges, inverse = packed.unique_targets(batch.targets)
        hidden = model.hidden_states(packed, backend)[packed.parent[edges]]
        return _in_rows(batch, _at_head(lm, hidden, packed.tokens[edges])[inverse])

    return score


def packs_of(batch: Batch, budget: int) -> list[Batch]:
    """Rows as they come, as many at a time as hold `budget` tokens; a longer row on its own."""
    packs: list[list[int]] = []
    used = budget
    for row, length in enumerate(batch.lengths.tolist()):
        if used + length > budget:
            packs.append([])
            used = 0
        packs[-1].append(row)
        used += length
    return [batch.select(rows) for rows in packs]


def prefix_grouper(lm: nn.Module) -> Scorer:
    """The published package (PyPI `prefix-grouper`): its own grouping, ungrouping and splitting of one group.

    It knows one shared prefix; below, trees and turns are computed for every row again. Its attention takes a mask of
    padding and leaves causality to FlashAttention 2, so on CPU it is given SDPA with that meaning (`_sdpa_for_groups`).
    """
    from prefix_grouper import PrefixGrouper

    ALL_ATTENTION_FUNCTIONS.register(PREFIX_GROUPER, _grouped_attention)
    decoder = decoder_of(lm)

    def score(batch: Batch) -> Tensor:
        prefix = batch.prefix_length
        own = (batch.lengths - prefix).tolist()
        grouper = PrefixGrouper([[prefix, *own]])
        mask = torch.arange(max(own))[None] < torch.tensor(own)[:, None]
        suffixes = slice(prefix, prefix + max(own))
        place = torch.arange(batch.token_ids.shape[1])[None]
        ids, positions = (
            grouper.concat_input(values[:1, :prefix], torch.ones(1, prefix), values[:, suffixes], mask)
            for values in (batch.token_ids, place.expand_as(batch.token_ids))
        )
        before = decoder.config._attn_implementation
        decoder.config._attn_implementation = PREFIX_GROUPER
        try:
            hidden = decoder(
                input_ids=ids,
                position_ids=positions,
                use_cache=False,
                prefix_grouper=grouper,
                attend=_sdpa_for_groups(decoder.dtype),
            ).last_hidden_state
        finally:
            decoder.config._attn_implementation = before
        _, _, split, _ = grouper.split_output(hidden, include_prefix_last=1)
        targets = batch.targets[:, suffixes]
        return _in_rows(batch, _at_head(lm, split[:, :-1][targets], batch.token_ids[batch.targets]))

    return score


def _grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    prefix_grouper: Any = None,
    attend: Any = None,
    **_: object,
) -> tuple[Tensor, None]:
    return prefix_grouper.forward(attend, query, key, value, scale=scaling), None


def _sdpa_for_groups(dtype: torch.dtype) -> Callable[..., Tensor]:
    """Attention with a mask [b, keys] of real keys, causal from the bottom right, as FlashAttention 2 reads it.

    The 4-D mask of a forward is made once and kept for all its layers; without padding and with as many queries as keys
    none is needed.
    """
    masks: dict[tuple[int, ...], Tensor] = {}

    def attend(query: Tensor, key: Tensor, value: Tensor, real: Tensor, scale: float | None = None) -> Tensor:
        num_queries, num_keys = query.shape[2], key.shape[2]
        options: dict[str, Any] = {"scale": scale, "enable_gqa": True}
        if num_queries == num_keys and len(real) == 1:  # the one group's prefix, which has no padding
            options["is_causal"] = True
        else:
            shape = (len(real), num_queries, num_keys)
            if shape not in masks:
                causal = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
                hidden = ~(causal & real.bool()[:, None, None])
                masks[shape] = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
            options["attn_mask"] = masks[shape]
        return F.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2)

    return attend


def _at_head(lm: nn.Module, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities [N] of `tokens` [N], predicted from `hidden` [N, D]."""
    head = head_of(lm)
    assert head is not None
    return token_logprobs(hidden, head, tokens)[0]


def _in_rows(batch: Batch, logprobs: Tensor) -> Tensor:
    """[B, L] of the targets' log-probabilities [N], 0 elsewhere."""
    return logprobs.new_zeros(batch.targets.shape).masked_scatter(batch.targets, logprobs)


@dataclass(frozen=True)
class Side:
    """One way to compute a batch: how the rows are divided, and what scores a part."""

    scorer: Callable[[nn.Module], Scorer]
    parts: Callable[[Batch], list[Batch]]


def side(name: str, size: int) -> Side:
    """The side called `name`.

    Args:
        name: padded, unshared, prefix-grouper, or a way to share: shared, tree_merge, dense, gated.
        size: rows of a micro-batch (padded, gated), or tokens of a pack (unshared); 0 is all at once.
    """
    in_micro_batches = (lambda batch: batch.micro_batches(size)) if size else (lambda batch: [batch])
    in_packs = (lambda batch: packs_of(batch, size)) if size else (lambda batch: [batch])
    sides = {
        "padded": Side(padded, in_micro_batches),
        "unshared": Side(unshared_packing, in_packs),
        "prefix-grouper": Side(prefix_grouper, lambda batch: [batch]),
        "shared": Side(shared, lambda batch: [batch]),
        "tree_merge": Side(lambda lm: shared(lm, "tree_merge"), lambda batch: [batch]),
        "dense": Side(lambda lm: shared(lm, "dense"), lambda batch: [batch]),
        "flex": Side(lambda lm: shared(lm, "flex"), lambda batch: [batch]),
        "gated": Side(lambda lm: shared(lm, gate=True), in_micro_batches),
    }
    return sides[name]
