"""Weights for tokens that another sampler drew than the policy that learns from them, and how far the two differ.

Legend: B rows, L row length. d = old_logp - sampler_logp, where old is the trainer's policy before its update.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from lit_agentrl._checks import check_same_shape

if TYPE_CHECKING:
    from torch import Tensor

Importance = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

# exp overflows float32 at 88 and inf * 0 is NaN; exp(20) = 5e8 is beyond every clip, so nothing is lost in front of it.
MAX_LOG_RATIO = 20.0


def bounded(log_ratio: Tensor) -> Tensor:
    """The log-ratio within what exp can take; outside, the gradient is 0."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def truncated_importance(
    old_logp: Tensor,
    sampler_logp: Tensor,
    cap: float,
    mask: Tensor | None = None,
    *,
    kind: Importance = "token_truncate",
) -> Tensor:
    """Weight of a token that another sampler drew, [B, L], no gradient. Multiply the loss per token by it.

    - `token_truncate`: min(exp(d), cap) (truncated importance sampling, TIS).
    - `token_mask`: exp(d), and 0 above the cap: the token does not learn, but still counts in the loss's denominator.
    - `sequence_truncate`, `sequence_mask`: the same of the row's exp(sum of d over its tokens). Unbiased up to the cap,
      at a variance that grows with the length; a token's weight alone leaves the contexts as the sampler chose them.

    With a mask the weight is 0 off it, and rows are what is on it.

    Raises:
        ValueError: If shapes differ, the cap is not positive or the kind is unknown.
    """
    if not cap > 0:
        raise ValueError(f"cap={cap} must be positive: it is the largest weight of a token.")
    weight = _raw_weight(old_logp, sampler_logp, mask, kind)
    return torch.where(weight > cap, 0.0, weight) if kind.endswith("_mask") else weight.clamp(max=cap)


def mismatch_metrics(
    old_logp: Tensor,
    sampler_logp: Tensor,
    mask: Tensor,
    cap: float | None,
    *,
    kind: Importance = "token_truncate",
    weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """How far the sampler is from the trainer's policy: sums over the masked tokens, each a scalar, and one maximum.

    `kl`: -d, whose mean over what the sampler drew estimates KL(sampler || trainer), of either sign; `kl_k3`:
    exp(d) - 1 - d, the same without negative values. `weight_mean`: what `truncated_importance` gives (exp(d) without a
    cap). `clipped_fraction`: 1 where the cap holds it back. `max_logp_gap`: the largest |d|; NaN where one is. With
    `weights` a token counts its weight in all but the maximum.

    Raises:
        ValueError: If shapes differ, the cap is not positive or the kind is unknown.
    """
    check_same_shape(old_logp=old_logp, sampler_logp=sampler_logp, mask=mask)
    mask = mask.bool()
    difference = torch.where(mask, (old_logp - sampler_logp).detach(), 0.0)
    counts = mask.to(difference.dtype) if weights is None else torch.where(mask, weights, 0.0)
    raw = _raw_weight(old_logp, sampler_logp, mask, kind)
    applied = raw if cap is None else truncated_importance(old_logp, sampler_logp, cap, mask, kind=kind)
    is_held_back = torch.zeros_like(raw) if cap is None else (raw > cap).to(raw.dtype)
    return {
        "kl": -(difference * counts).sum(),
        "kl_k3": ((torch.expm1(bounded(difference)) - difference) * counts).sum(),
        "weight_mean": (applied * counts).sum(),
        "clipped_fraction": (is_held_back * counts).sum(),
        "max_logp_gap": difference.abs().max() if difference.numel() else difference.sum(),
    }


def _raw_weight(old_logp: Tensor, sampler_logp: Tensor, mask: Tensor | None, kind: Importance) -> Tensor:
    """exp(d) of each token, or of its whole row; 0 off the mask."""
    if kind not in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
        raise ValueError(f"kind={kind!r} must be token_truncate, token_mask, sequence_truncate or sequence_mask.")
    mask = torch.ones_like(old_logp, dtype=torch.bool) if mask is None else mask.bool()
    check_same_shape(old_logp=old_logp, sampler_logp=sampler_logp, mask=mask)
    difference = torch.where(mask, (old_logp - sampler_logp).detach(), 0.0)
    if kind.startswith("sequence"):
        difference = difference.sum(-1, keepdim=True).expand_as(difference)
    return torch.where(mask, bounded(difference).exp(), 0.0)
