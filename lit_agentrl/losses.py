"""Losses: pure functions of log-probabilities, to be minimised.

Legend: B rows, L row length; a row is one sequence. logp, old_logp, advantage and mask share one shape, [B, L] or any
other whose last dimension is the sequence. r = exp(logp - old_logp), A = advantage. A mask is True where a token counts
(in another dtype: where it is not 0).

Off the mask anything may stand, NaN and infinity included, without reaching a loss or a gradient. On the mask a NaN
stays a NaN in the loss, so that it is seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from lit_agentrl._checks import check_same_shape
from lit_agentrl._importance import MAX_LOG_RATIO, Importance, bounded, mismatch_metrics, truncated_importance
from lit_agentrl._preference_losses import DPOLoss, anchor_loss, dpo_loss, odds_ratio_loss, simpo_loss

if TYPE_CHECKING:
    from torch import Tensor

PolicyLoss = Literal["ppo", "gspo", "gspo_token", "cispo", "reinforce"]
KLEstimate = Literal["k1", "k2", "k3", "k3+"]
Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant"]

__all__ = [
    "MAX_LOG_RATIO",
    "Aggregation",
    "DPOLoss",
    "Importance",
    "KLEstimate",
    "PolicyLoss",
    "aggregate",
    "anchor_loss",
    "clipped_surrogate",
    "dpo_loss",
    "kl_estimate",
    "mismatch_metrics",
    "odds_ratio_loss",
    "policy_loss",
    "simpo_loss",
    "surrogate_metrics",
    "truncated_importance",
]


# --- policy ---


def clipped_surrogate(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Tensor:
    """Negative clipped objective per token, [B, L]: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) (PPO, Eq. 7).

    Args:
        logp: [B, L] under the policy that is trained.
        old_logp: [B, L] under the policy that sampled.
        advantage: [B, L].
        clip_low: The ratio counts down to 1 - clip_low.
        clip_high: The ratio counts up to 1 + clip_high; 0.28 is DAPO's clip-higher (arXiv 2503.14476).
        dual_clip: Bounds the loss of a token with A < 0 by dual_clip |A| (arXiv 1912.09729; 3 is usual).

    Raises:
        ValueError: If shapes differ or a clip is out of its range.
    """
    check_same_shape(logp=logp, old_logp=old_logp, advantage=advantage)
    ratio = bounded(_gradient_where_finite(logp - old_logp, advantage)).exp()
    return _clip(ratio, advantage, clip_low, clip_high, dual_clip)


def policy_loss(
    kind: PolicyLoss,
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    cispo_max: float = 5.0,
) -> Tensor:
    """Policy loss per token, [B, L], 0 off the mask; `aggregate` reduces it. sg[] stops the gradient.

    - `ppo`: `clipped_surrogate`.
    - `gspo`: the same with one ratio per row, s = exp(mean over the row's tokens of logp - old_logp) (arXiv 2507.18071,
      Eq. 5-7). Its clips are far smaller, 3e-4 and 4e-4 in the paper; aggregate with `seq_mean_token_mean`.
    - `gspo_token`: the value of s with the gradient of the token, sg[s] exp(logp - sg[logp]) (Eq. 13-14).
    - `cispo`: -sg[min(r, cispo_max)] A logp, so clipped tokens still learn (arXiv 2506.13585, Eq. 4-5). `cispo_max` is
      the bound itself, not 1 + epsilon, and there is no lower one.
    - `reinforce`: -A logp, without a ratio.

    Args:
        kind: Which loss.
        logp: [B, L] under the policy that is trained.
        old_logp: [B, L] under the policy that sampled.
        advantage: [B, L].
        mask: [B, L], True on the tokens that the policy sampled.
        clip_low: As in `clipped_surrogate`; ppo, gspo and gspo_token.
        clip_high: As in `clipped_surrogate`; ppo, gspo and gspo_token.
        dual_clip: As in `clipped_surrogate`; ppo, gspo and gspo_token.
        cispo_max: The largest weight of a token; cispo only.

    Raises:
        ValueError: If shapes differ, a clip is out of its range or the kind is unknown.
    """
    check_same_shape(logp=logp, old_logp=old_logp, advantage=advantage, mask=mask)
    mask = mask.bool()
    # Masked before exp: 0 * inf in the backward pass would be NaN, and no later mask can take that back.
    logp, old_logp, advantage = (torch.where(mask, each, 0.0) for each in (logp, old_logp, advantage))
    log_ratio = logp - old_logp
    match kind:
        case "ppo":
            loss = _clip(bounded(log_ratio).exp(), advantage, clip_low, clip_high, dual_clip)
        case "gspo" | "gspo_token":
            ratio = bounded(sequence_mean(log_ratio, mask)).exp()
            if kind == "gspo_token":
                ratio = ratio.detach() * (logp - logp.detach()).exp()
            loss = _clip(ratio, advantage, clip_low, clip_high, dual_clip)
        case "cispo":
            if not cispo_max > 0:
                raise ValueError(f"cispo_max={cispo_max} must be positive: it is the largest weight of a token.")
            loss = -bounded(log_ratio).exp().clamp(max=cispo_max).detach() * advantage * logp
        case "reinforce":
            loss = -advantage * logp
        case _:
            raise ValueError(f"kind={kind!r} must be ppo, gspo, gspo_token, cispo or reinforce.")
    return torch.where(mask, loss, 0.0)


def sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Each row's mean over its masked tokens, on every token of the row, [B, L]: GSPO's ratio in logarithms."""
    mean = torch.where(mask, values, 0.0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return mean.expand_as(values)


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: KLEstimate = "k3") -> Tensor:
    """Estimate of KL(policy || reference) per sampled token, [B, L], from d = logp - ref_logp.

    k1 = d; k2 = d^2 / 2; k3 = exp(-d) + d - 1, never negative; k3+ = the value of k3 with the gradient of k2, which is
    d times that of logp: on-policy its mean is the gradient of the KL, that of k1 is 0 and that of k3 is biased
    (Schulman, "Approximating KL divergence", 2020, for k1 to k3).

    Raises:
        ValueError: If shapes differ or the kind is unknown.
    """
    check_same_shape(logp=logp, ref_logp=ref_logp)
    difference = _gradient_where_finite(logp - ref_logp)
    if kind == "k1":
        return difference
    k2 = difference.square() / 2
    if kind == "k2":
        return k2
    within = bounded(difference)
    k3 = torch.expm1(-within) + within  # exp(-d) - 1 would round to below -d near 0: a negative estimate
    if kind == "k3":
        return k3
    if kind == "k3+":
        return k2 - k2.detach() + k3.detach()
    raise ValueError(f"kind={kind!r} must be k1, k2, k3 or k3+.")


def surrogate_metrics(
    logp: Tensor,
    old_logp: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    *,
    weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """Sums over the masked tokens, each a scalar; over micro-batches and ranks, sum / num_tokens is the true mean.

    With `weights` a token counts its weight in all four.

    `ratio`: r. `clip_fraction`: 1 where r is outside [1 - clip_low, 1 + clip_high], whatever the sign of the advantage.
    `approx_kl`: k3 between the old policy and the new, r - 1 - log r. `num_tokens`: 1.

    Raises:
        ValueError: If shapes differ.
    """
    check_same_shape(logp=logp, old_logp=old_logp, mask=mask)
    mask = mask.bool()
    log_ratio = bounded(torch.where(mask, logp.detach() - old_logp.detach(), 0.0))
    ratio = log_ratio.exp()
    outside = (ratio < 1 - clip_low) | (ratio > 1 + clip_high)
    counts = mask if weights is None else _on_mask(weights, mask)
    return {
        "ratio": (ratio * counts).sum(),
        "clip_fraction": (outside * counts).sum().to(ratio.dtype),
        "approx_kl": ((torch.expm1(log_ratio) - log_ratio) * counts).sum(),
        "num_tokens": counts.sum().to(ratio.dtype),
    }


# --- reduction ---


def aggregate(
    loss: Tensor,
    mask: Tensor,
    kind: Aggregation,
    *,
    num_tokens: float | None = None,
    num_sequences: float | None = None,
    max_length: int | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """One number from a loss per token. T_i = masked tokens of row i.

    - `token_mean`: sum of all / num_tokens (DAPO, arXiv 2503.14476).
    - `seq_mean_token_mean`: sum over rows of (sum of the row / T_i) / num_sequences (GRPO, arXiv 2402.03300, Eq. 3).
    - `seq_mean_token_sum`: sum of all / num_sequences.
    - `constant`: sum of all / (num_sequences * max_length) (Dr. GRPO, arXiv 2503.20783).

    The counts make the sum over micro-batches and ranks equal one big batch: give those of the whole optimiser step. An
    empty mask gives 0.

    With `weights` w a token's loss is multiplied by its w, and what it is divided by counts in the same measure: a
    token as w, a row as the mean w of its tokens. So copies of a row that weigh 1 / n each are one row, whatever the
    kind, and a loss of 1 everywhere still has a mean of 1. T_i stays a number of tokens.

    Args:
        loss: [B, L].
        mask: [B, L], True on the tokens that count.
        kind: Which mean.
        num_tokens: Tokens that count, in the whole optimiser step; those of the mask by default. With weights, the sum
            of theirs.
        num_sequences: Rows with a token that counts, in the whole optimiser step; those of the mask by default. With
            weights, the sum of the rows' means.
        max_length: The constant token count of a row; `constant` only, which needs it: the padded length changes from
            batch to batch.
        weights: [B, L], 0 or more; None lets every token count 1.

    Raises:
        ValueError: If shapes differ, a count is negative, `constant` lacks `max_length` or the kind is unknown.
    """
    check_same_shape(loss=loss, mask=mask)
    if kind not in ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant"):
        raise ValueError(
            f"kind={kind!r} must be token_mean, seq_mean_token_mean, seq_mean_token_sum or constant (with max_length)."
        )
    for name, count in (("num_tokens", num_tokens), ("num_sequences", num_sequences)):
        if count is not None and count < 0:
            raise ValueError(f"{name}={count} is a count: 0 or more.")
    mask = mask.bool()
    loss = torch.where(mask, loss, 0.0)
    lengths = mask.sum(-1)
    tokens, rows = lengths.sum(), (lengths > 0).sum()
    if weights is not None:
        counts = _on_mask(weights, mask)
        loss = loss * counts
        tokens, rows = counts.sum(), (counts.sum(-1) / lengths.clamp(min=1)).sum()
    if kind == "token_mean":
        return loss.sum() / _denominator(num_tokens, tokens)
    sequences = _denominator(num_sequences, rows)
    if kind == "seq_mean_token_mean":
        return (loss.sum(-1) / lengths.clamp(min=1)).sum() / sequences
    if kind == "seq_mean_token_sum":
        return loss.sum() / sequences
    if max_length is None or max_length < 1:
        raise ValueError(f"kind='constant' divides by max_length tokens a row: give it, 1 or more, not {max_length}.")
    return loss.sum() / (sequences * max_length)


# --- parts ---


def _clip(ratio: Tensor, advantage: Tensor, low: float, high: float, dual: float | None) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A), and no more than dual |A| where A < 0."""
    if not (0 <= low <= 1 and high >= 0):
        raise ValueError(
            f"clip_low={low} must be in [0, 1] and clip_high={high} 0 or more: the ratio is clipped around 1."
        )
    if dual is not None and not dual > 1:
        raise ValueError(f"dual_clip={dual} must be above 1: it bounds the ratio of tokens with a negative advantage.")
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    if dual is None:
        return loss
    return torch.where(advantage < 0, torch.minimum(loss, -dual * advantage), loss)


def _gradient_where_finite(difference: Tensor, *factors: Tensor) -> Tensor:
    """The same values, without gradient where one is NaN or infinite: a mask comes later, and 0 * NaN is NaN."""
    finite = difference.isfinite()
    for factor in factors:
        finite = finite & factor.isfinite()
    return torch.where(finite, difference, difference.detach())


def _denominator(count: float | None, default: Tensor) -> Tensor | float:
    """The count to divide by; 1 for an empty mask, whose sum is 0."""
    return torch.where(default > 0, default, 1) if count is None else count or 1


def _on_mask(weights: Tensor, mask: Tensor) -> Tensor:
    """What each token counts, 0 off the mask."""
    check_same_shape(weights=weights, mask=mask)
    return torch.where(mask, weights, 0.0)
