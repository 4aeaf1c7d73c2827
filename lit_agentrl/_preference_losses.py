"""Losses on pairs of answers, [N], from numbers of each. Public through `lit_agentrl.losses`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch.nn.functional import logsigmoid

from lit_agentrl._checks import check_same_shape

if TYPE_CHECKING:
    from torch import Tensor

DPOLoss = Literal["sigmoid", "robust", "hinge", "ipo", "bco_pair", "apo_zero", "dpop"]


def dpo_loss(
    chosen_logratio: Tensor,
    rejected_logratio: Tensor,
    *,
    beta: float = 0.1,
    kind: DPOLoss = "sigmoid",
    label_smoothing: float = 0.0,
    dpop_weight: float = 5.0,
) -> Tensor:
    """Preference loss per pair, [N], from w = log pi/ref of the chosen and l of the rejected; h = beta (w - l).

    With e = label_smoothing and S the sigmoid:

    - `sigmoid`: -(1 - e) log S(h) - e log S(-h) (DPO, arXiv 2305.18290, Eq. 7; e > 0 is conservative DPO).
    - `robust`: (-(1 - e) log S(h) + e log S(-h)) / (1 - 2 e) (arXiv 2403.00409): unbiased if labels flip with rate e.
    - `hinge`: max(0, 1 - h) (SLiC, arXiv 2305.10425, on log-ratios).
    - `ipo`: (w - l - 1 / (2 beta))^2 (arXiv 2310.12036, Eq. 17); its authors average w and l over tokens.
    - `bco_pair`: -log S(beta w) - log S(-beta l) (arXiv 2404.04656, without the running shift).
    - `apo_zero`: 1 - S(beta w) + S(beta l) (arXiv 2408.06266): the chosen up, the rejected down, each by itself.
    - `dpop`: -log S(h - beta dpop_weight max(0, -w)) (arXiv 2402.13228): the chosen must not fall below the reference.

    Length-normalised DPO is `sigmoid` on log-ratios averaged over tokens, with a larger beta (5 or so). mDPO's image
    term is `sigmoid` with the chosen answer under the corrupted image as the rejected one; for its anchor see
    `anchor_loss`.

    Raises:
        ValueError: If shapes differ, beta is not positive, the smoothing is not in [0, 0.5) or not used by the kind, or
            the kind is unknown.
    """
    check_same_shape(chosen_logratio=chosen_logratio, rejected_logratio=rejected_logratio)
    _check_positive("beta", beta)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 0.5): at 0.5 a label says nothing.")
    if label_smoothing and kind not in ("sigmoid", "robust"):
        raise ValueError(f"kind={kind!r} does not use label_smoothing={label_smoothing}; sigmoid and robust do.")
    h = beta * (chosen_logratio - rejected_logratio)
    match kind:
        case "sigmoid":
            return -(1 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h)
        case "robust":
            flipped = -(1 - label_smoothing) * logsigmoid(h) + label_smoothing * logsigmoid(-h)
            return flipped / (1 - 2 * label_smoothing)
        case "hinge":
            return (1 - h).clamp(min=0)
        case "ipo":
            return (chosen_logratio - rejected_logratio - 1 / (2 * beta)).square()
        case "bco_pair":
            return -logsigmoid(beta * chosen_logratio) - logsigmoid(-beta * rejected_logratio)
        case "apo_zero":
            return 1 - (beta * chosen_logratio).sigmoid() + (beta * rejected_logratio).sigmoid()
        case "dpop":
            return -logsigmoid(h - beta * dpop_weight * (-chosen_logratio).clamp(min=0))
        case _:
            raise ValueError(f"kind={kind!r} must be sigmoid, robust, hinge, ipo, bco_pair, apo_zero or dpop.")


def anchor_loss(logratio: Tensor, *, beta: float = 0.1, delta: float = 0.0) -> Tensor:
    """The anchor of mDPO, [N]: -log S(beta logratio - delta), a chosen answer's reward above delta (arXiv 2406.11839).

    Raises:
        ValueError: If beta is not positive.
    """
    _check_positive("beta", beta)
    return -logsigmoid(beta * logratio - delta)


def simpo_loss(chosen_logp: Tensor, rejected_logp: Tensor, *, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """SimPO, [N]: -log S(beta (c - r) - gamma) from log-probabilities averaged over tokens (arXiv 2405.14734, Eq. 6).

    It needs no reference. Its authors take beta from 2 to 10, and gamma about half of it.

    Raises:
        ValueError: If shapes differ, beta is not positive or gamma is negative.
    """
    check_same_shape(chosen_logp=chosen_logp, rejected_logp=rejected_logp)
    _check_positive("beta", beta)
    if gamma < 0:
        raise ValueError(f"gamma={gamma} must not be negative: it is the margin that a pair should reach.")
    return -logsigmoid(beta * (chosen_logp - rejected_logp) - gamma)


def odds_ratio_loss(chosen_logp: Tensor, rejected_logp: Tensor) -> Tensor:
    """ORPO's term, [N]: -log S(log odds(c) - log odds(r)), odds(x) = e^x / (1 - e^x) (arXiv 2403.07691, Eq. 6).

    From log-probabilities averaged over tokens, without a reference. ORPO itself adds it, at a weight of 0.1 or so, to
    the negative log-likelihood of the chosen answer.

    Raises:
        ValueError: If shapes differ.
    """
    check_same_shape(chosen_logp=chosen_logp, rejected_logp=rejected_logp)
    return -logsigmoid(_log_odds(chosen_logp) - _log_odds(rejected_logp))


def _log_odds(logp: Tensor) -> Tensor:
    """Of a probability e^logp. At 1 the odds are infinite: 1 - 1e-6 is as certain as they get."""
    logp = logp.clamp(max=-1e-6)
    return logp - (-logp.expm1()).log()


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}={value} must be positive.")
