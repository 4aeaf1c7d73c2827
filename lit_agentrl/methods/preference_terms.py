"""The terms that a preference objective is a weighted sum of: what each compares, and whether it needs a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_agentrl.errors import UserError
from lit_agentrl.losses import anchor_loss, dpo_loss, odds_ratio_loss, simpo_loss

REFERENCE_FREE = ("nll", "simpo", "orpo")
ON_SUMS = ("sigmoid", "robust", "hinge", "bco_pair", "apo_zero", "dpop")
ON_IMAGES = ("image",)
TERMS = (*ON_SUMS, "sigmoid_norm", "ipo", *REFERENCE_FREE, *ON_IMAGES, "anchor")
SMOOTHED = ("sigmoid", "sigmoid_norm", "robust")


@dataclass(slots=True)
class PairScores:
    """What the policy and its reference say about N pairs of K answers.

    Chosen, rejected and, with K = 3, the chosen one under a corrupted image.
    """

    logp: Tensor
    """[N, K], each answer's log-probability: summed over its tokens."""
    reference: Tensor | None
    """[N, K], the same under the reference policy; None where no term asks for it."""
    lengths: Tensor
    """[N, K], each answer's tokens; 0 for a row that only fills a place."""

    @property
    def is_pair(self) -> Tensor:
        """[N] bool: not a pair that only keeps ranks in step."""
        return self.lengths[:, 0] > 0

    @property
    def logratio(self) -> Tensor:
        """[N, K], log policy / reference."""
        assert self.reference is not None
        return self.logp - self.reference

    def mean(self, sums: Tensor) -> Tensor:
        """[N, K], sums over an answer's tokens as means over them."""
        return sums / self.lengths.clamp(min=1)


@dataclass(slots=True, frozen=True)
class TermOptions:
    """The constants of the terms; see `DPOModule`."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    dpop_weight: float = 5.0
    ipo: Literal["mean", "sum"] = "mean"
    norm_beta: float = 5.0
    simpo_beta: float = 2.0
    simpo_gamma: float = 1.0
    delta: float = 0.0


def check_terms(losses: dict[str, float], options: TermOptions) -> None:
    """Refuse what cannot be trained.

    Raises:
        UserError: No term, an unknown one, a weight or a constant out of range, or one that no term uses.
    """
    unknown = sorted(set(losses) - set(TERMS))
    if unknown or not losses:
        raise UserError(f"losses={losses}: give weights of one or more of {', '.join(TERMS)}.")
    wrong = {name: weight for name, weight in losses.items() if not 0 < weight < float("inf")}
    if wrong:
        raise UserError(f"losses={losses}: weights must be above 0; leave a term out instead of {wrong}.")
    for name in ("beta", "norm_beta", "simpo_beta"):
        if not getattr(options, name) > 0:
            raise UserError(f"{name}={getattr(options, name)} must be above 0.")
    if options.simpo_gamma < 0 or options.dpop_weight < 0:
        raise UserError(f"simpo_gamma={options.simpo_gamma}, dpop_weight={options.dpop_weight}: must not be below 0.")
    if not 0 <= options.label_smoothing < 0.5:
        raise UserError(f"label_smoothing={options.label_smoothing} must be in [0, 0.5): the share of flipped labels.")
    if options.label_smoothing and not set(losses) & set(SMOOTHED):
        raise UserError(
            f"label_smoothing={options.label_smoothing}, but no term of losses={losses} uses it: "
            f"{', '.join(SMOOTHED)} do."
        )


def term(name: str, scores: PairScores, options: TermOptions) -> Tensor:
    """One term for each pair, [N]; 0 where a pair lacks what it compares."""
    value = _term(name, scores, options)
    counts = scores.is_pair & (scores.lengths[:, -1] > 0) if name in ON_IMAGES else scores.is_pair
    return torch.where(counts, value, 0.0)


def _term(name: str, scores: PairScores, options: TermOptions) -> Tensor:
    if name in REFERENCE_FREE:
        chosen, rejected = scores.mean(scores.logp)[:, :2].unbind(-1)
        if name == "nll":
            return -chosen
        if name == "orpo":
            return odds_ratio_loss(chosen, rejected)
        return simpo_loss(chosen, rejected, beta=options.simpo_beta, gamma=options.simpo_gamma)
    sums = scores.logratio
    if name == "anchor":
        return anchor_loss(sums[:, 0], beta=options.beta, delta=options.delta)
    if name == "image":
        return dpo_loss(sums[:, 0], sums[:, 2], beta=options.beta)
    smoothing = options.label_smoothing if name in SMOOTHED else 0.0
    if name == "sigmoid_norm":
        chosen, rejected = scores.mean(sums)[:, :2].unbind(-1)
        return dpo_loss(chosen, rejected, beta=options.norm_beta, label_smoothing=smoothing)
    values = scores.mean(sums) if name == "ipo" and options.ipo == "mean" else sums
    chosen, rejected = values[:, :2].unbind(-1)
    return dpo_loss(
        chosen,
        rejected,
        beta=options.beta,
        kind=name,  # type: ignore[arg-type]  # one of ON_SUMS, or ipo
        label_smoothing=smoothing,
        dpop_weight=options.dpop_weight,
    )
