"""What an episode pays, once its answer and its form are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lit_agentrl.errors import UserError

ScoreKind = Literal["em", "f1"]
RewardKind = Literal["paper", "reference"]

PAPER_PENALTY = 0.2


@dataclass(frozen=True)
class Payment:
    """The reward at the end of an episode.

    "paper" is Eq. 13 of Tree-GRPO (arXiv 2509.21240): the score, less `format_penalty` where the form is invalid; no
    answer scores 0. "reference" is what the authors' code pays instead:

    | score | valid form | invalid form |
    |---|---|---|
    | em, right | 1 | 0.8 |
    | em, wrong | 0.2 | 0.1 |
    | f1 above 0 | F1 | F1 - 0.2, which may be negative |
    | f1 of 0 | 0.2 | 0 |
    | no answer | | 0 |

    There a wrong answer in the right form pays a fifth of a right one, and an F1 of 0.12 less than one of 0.

    Args:
        score: What counts, exact match or F1.
        reward: "paper" or "reference".
        format_penalty: What an invalid form costs ("paper").

    Raises:
        UserError: An option is unknown, or the penalty is negative or changed where it has no effect.
    """

    score: ScoreKind = "em"
    reward: RewardKind = "paper"
    format_penalty: float = PAPER_PENALTY

    def __post_init__(self) -> None:
        if self.score not in ("em", "f1"):
            raise UserError(f"score={self.score!r} is unknown; allowed are em and f1.")
        if self.reward not in ("paper", "reference"):
            raise UserError(f"reward={self.reward!r} is unknown; allowed are paper and reference.")
        if not 0 <= self.format_penalty < float("inf"):
            raise UserError(f"format_penalty={self.format_penalty} must be a number from 0 up: it is subtracted.")
        if self.reward == "reference" and self.format_penalty != PAPER_PENALTY:
            raise UserError(
                f"format_penalty={self.format_penalty} has no effect with reward='reference', which pays by a fixed "
                "table. Leave it out, or use reward='paper'."
            )

    def pay(self, em: float, f1: float, *, answered: bool, well_formed: bool) -> float:
        """The reward of an episode with these scores, 0 both where nothing was answered."""
        score = em if self.score == "em" else f1
        if self.reward == "paper":
            return score if well_formed else score - self.format_penalty
        if not answered:
            return 0.0
        if self.score == "em":
            return (1.0 if well_formed else 0.8) if em else (0.2 if well_formed else 0.1)
        if f1 == 0:
            return 0.2 if well_formed else 0.0
        return f1 if well_formed else f1 - 0.2
