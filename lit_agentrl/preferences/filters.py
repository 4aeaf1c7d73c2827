"""Which pairs are kept, and how many were left out for which reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher

from lit_agentrl.errors import UserError
from lit_agentrl.preferences.candidates import Candidate

UNDECODED = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)  # no slots: the command line reads defaults from `vars`
class Filters:
    """What a pair must have; the first that it lacks is what it is counted under.

    Args:
        min_gap: How much more the chosen answer must be worth.
        correct: Keep a pair only if its chosen answer is right, where that is known.
        max_similarity: Answers must be less alike than this: 2 M / T, M the characters that `difflib` matches of T in
            both.
        length_ratio: Least and most of the chosen answer's length over the rejected one's, in characters: a pair should
            not be won by length.

    Raises:
        UserError: A limit is out of its range.
    """

    min_gap: float = 0.3
    correct: bool = True
    max_similarity: float = 0.95
    length_ratio: tuple[float, float] = (0.5, 2.0)

    def __post_init__(self) -> None:
        low, high = self.length_ratio
        if not self.min_gap >= 0:
            raise UserError(f"filters.min_gap={self.min_gap} must be 0 or more.")
        if not 0 < self.max_similarity <= 1:
            raise UserError(f"filters.max_similarity={self.max_similarity} must be above 0 and at most 1.")
        if not 0 <= low <= 1 <= high:
            raise UserError(f"filters.length_ratio={list(self.length_ratio)}: give a least one up to 1, and a most.")

    def reason_against(self, candidate: Candidate) -> str:
        """Why a pair is left out; empty where it is kept."""
        chosen, rejected = candidate.chosen.strip(), candidate.rejected.strip()
        if not chosen or not rejected:
            return "empty"
        if UNDECODED in chosen + rejected:
            return "undecodable"
        if chosen == rejected:
            return "identical"
        if not candidate.gap >= self.min_gap or candidate.gap <= 0:  # not `<`: a NaN is no gap
            return "small_gap"
        if self.correct and candidate.is_correct is False:
            return "incorrect"
        if not self.length_ratio[0] <= len(chosen) / len(rejected) <= self.length_ratio[1]:
            return "length_ratio"
        return "similar" if is_similar(chosen, rejected, self.max_similarity) else ""


REASONS = ("empty", "undecodable", "identical", "small_gap", "incorrect", "length_ratio", "similar", "duplicate")


def is_similar(one: str, other: str, limit: float) -> bool:
    """Whether the similarity of two texts reaches the limit; upper bounds are tried first, as they take no time."""
    matcher = SequenceMatcher(None, one, other, autojunk=False)
    bounds = (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio)
    return all(bound() >= limit for bound in bounds)


def keep(candidates: Iterable[Candidate], filters: Filters) -> tuple[list[Candidate], Counter[str]]:
    """The pairs that pass, in order, and the others by reason.

    Of pairs that are the same in all words, the first is kept.
    """
    kept: list[Candidate] = []
    counts: Counter[str] = Counter()
    seen: set[tuple[str, str, str]] = set()
    for candidate in candidates:
        reason = filters.reason_against(candidate)
        words = str(candidate.prompt), candidate.chosen.strip(), candidate.rejected.strip()
        reason = reason or ("duplicate" if words in seen else "")
        if reason:
            counts[reason] += 1
            continue
        seen.add(words)
        kept.append(candidate)
    return kept, counts
