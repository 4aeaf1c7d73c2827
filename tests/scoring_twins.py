"""The grouped forward and its twin, the padded one: scores and gradients of both on the same rows."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from lit_agentrl.models import PaddedModel, PrefixGroupedModel, TokenScores
from prefix_cases import SHAPES, Batch

Scored = tuple[TokenScores, dict[str, Tensor]]


def grouped(lm: nn.Module, backend: str = "auto") -> PrefixGroupedModel:
    """Always through the tree, and without the start-up check, which has tests of its own."""
    model = PrefixGroupedModel(lm, backend=backend, min_reuse=0, check=False)  # type: ignore[arg-type]
    assert not model.refusal
    return model


def padded(lm: nn.Module) -> PaddedModel:
    return PaddedModel(lm, check=False)


def loss_of(scores: TokenScores, targets: Tensor, num_targets: int) -> Tensor:
    """A clipped surrogate with an advantage per row, and an entropy bonus per token: every token's gradient differs."""
    generator = torch.Generator().manual_seed(0)
    advantage = torch.randn(len(targets), 1, generator=generator, dtype=scores.logprobs.dtype)
    bonus = torch.randn(targets.shape, generator=generator, dtype=scores.logprobs.dtype)
    ratio = (scores.logprobs - scores.logprobs.detach()).exp()
    advantage, bonus = advantage.to(targets.device), bonus.to(targets.device)
    per_token = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    if scores.entropy is not None:
        per_token = per_token + bonus * scores.entropy
    return (per_token * targets).sum() / num_targets


def scores_and_gradients(
    model: PaddedModel, rows: str | Batch, *, entropy: bool = True, temperature: float = 0.8
) -> Scored:
    """Scores of a batch, or of a shape by its name, and the gradient of `loss_of` for every parameter that has one."""
    token_ids, lengths, targets = SHAPES[rows]() if isinstance(rows, str) else rows
    model.zero_grad(set_to_none=True)
    scores = model(token_ids, lengths, targets=targets, temperature=temperature, entropy=entropy)
    loss_of(scores, targets, int(targets.sum())).backward()
    return scores, {name: p.grad.clone() for name, p in model.lm.named_parameters() if p.grad is not None}


def assert_same(found: Scored, expected: Scored, values: float, gradients: float) -> None:
    """Values within `values`, gradients of parameters within `gradients`, both absolute."""
    torch.testing.assert_close(found[0].logprobs, expected[0].logprobs, rtol=0, atol=values)
    torch.testing.assert_close(found[0].entropy, expected[0].entropy, rtol=0, atol=values)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=gradients)
    assert max(float(gradient.abs().max()) for gradient in found[1].values()) > 0.01  # or there is nothing to compare


def lora(lm: nn.Module, **options: object) -> PeftModel:
    """A LoRA model whose adapters do something."""
    model = get_peft_model(lm, LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model.double()
