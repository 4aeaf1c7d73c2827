"""Preference pairs: the prompt that a chosen and a rejected answer share is computed once, and DPO does not notice."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lit_agentrl.losses import dpo_loss
from lit_agentrl.models import PackedTree, PaddedModel
from lit_agentrl.models.reference import Reference
from prefix_cases import CONFIGS, Batch, build_lm, pairs
from scoring_twins import grouped, lora, padded

ROWS = {"answers apart": pairs(), "answers that begin alike": pairs(alike=3), "one prompt": pairs(num_prompts=1)}
CASES = [("llama", "tree_merge"), ("qwen3", "dense"), ("gemma3", "dense"), ("gemma2", "dense")]


def sequence_logprobs(model: PaddedModel, rows: Batch) -> Tensor:
    """[2N], log p(answer | prompt) of every row."""
    token_ids, lengths, targets = rows
    return model(token_ids, lengths, targets=targets).logprobs.sum(1)


def loss_and_gradients(
    model: PaddedModel, rows: Batch, reference: Reference, kind: str
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """DPO's loss per pair [N], the reference's sequence log-probabilities [2N], and the gradients of the mean loss."""
    model.zero_grad(set_to_none=True)
    with reference.using(model.lm):
        of_reference = sequence_logprobs(model, rows)
    assert not of_reference.requires_grad
    logratio = sequence_logprobs(model, rows) - of_reference
    loss = dpo_loss(logratio[0::2], logratio[1::2], beta=0.3, kind=kind)  # type: ignore[arg-type]
    loss.mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.lm.named_parameters() if p.grad is not None}
    return loss.detach(), of_reference, gradients


def compare(lm: nn.Module, backend: str, rows: Batch, reference: Reference, kind: str) -> Tensor:
    """The reference's log-probabilities, once both forwards agree on everything."""
    expected = loss_and_gradients(padded(lm), rows, reference, kind)
    found = loss_and_gradients(grouped(lm, backend), rows, reference, kind)
    values = 1e-5 if backend == "dense" and "gemma2" in lm.config.model_type else 1e-11  # eager's softmax is float32
    torch.testing.assert_close(found[:2], expected[:2], rtol=0, atol=values)
    largest = max(float(gradient.abs().max()) for gradient in expected[2].values())
    assert largest > 1e-3
    torch.testing.assert_close(found[2], expected[2], rtol=0, atol=1e-6 * max(1.0, largest))  # IPO reaches 28
    return found[1]


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "apo_zero", "dpop"])
@pytest.mark.parametrize(("name", "backend"), CASES)
def test_loss_and_gradients_equal_the_padded_ones(name: str, backend: str, kind: str, rows: Batch) -> None:
    """Adapters are trained; the reference is the model with them off, which is the model without them."""
    plain = build_lm(CONFIGS[name]())
    lm = lora(copy.deepcopy(plain), target_modules="all-linear")
    reference = Reference("adapter_off")
    reference.attach(lm)
    of_reference = compare(lm, backend, rows, reference, kind)
    with torch.no_grad():
        torch.testing.assert_close(of_reference, sequence_logprobs(padded(plain), rows), rtol=0, atol=1e-5)
        assert (sequence_logprobs(padded(lm), rows) - of_reference).abs().max() > 0.1


def test_whole_weights_against_a_frozen_copy() -> None:
    lm = build_lm(CONFIGS["qwen2"]())
    reference = Reference("frozen")
    reference.attach(lm)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(1.05)
    compare(lm, "tree_merge", pairs(), reference, "sigmoid")


@pytest.mark.parametrize(("alike", "num_unique"), [(0, 3 * 10 + 5 + 5 + 6 + 8 + 7 + 11), (3, 3 * 10 + 42 - 3 * 3)])
def test_a_pair_costs_its_prompt_and_both_answers(alike: int, num_unique: int) -> None:
    """Three prompts of 10 tokens with answers of 5 and 5, 6 and 8, 7 and 11; what answers begin with counts once."""
    token_ids, lengths, _ = pairs(alike=alike)
    tree = PackedTree.build(token_ids, lengths)
    assert len(tree) == num_unique
    assert tree.num_row_tokens == 2 * 3 * 10 + 42
