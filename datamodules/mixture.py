"""Several sources of conversations, each with its share: correct traces among new data, against forgetting."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence

import numpy as np

from lit_agentrl.datamodules.conversation import ConversationSource
from lit_agentrl.errors import UserError
from lit_agentrl.types import Conversation

log = logging.getLogger(__name__)


class Mixture(ConversationSource):
    """All conversations of the first source, and of the others as many as give them their shares.

    Which ones, the seed decides. A source that has too few gives all of them again and again, as evenly as can be.

    Args:
        sources: Where the conversations come from.
        shares: Of each source in the whole; they sum to 1.
        seed: Of the choice.

    Raises:
        UserError: The shares do not fit the sources.

    Example:
        ```yaml
        source:
          class_path: Mixture
          init_args:
            sources:
              - {class_path: LlavaConversations, init_args: {path: talks.json}}
              - {class_path: CorrectTraces, init_args: {transcripts: runs/grpo, environment: ...}}
            shares: [0.85, 0.15]
        ```
    """

    def __init__(self, sources: Sequence[ConversationSource], shares: Sequence[float], seed: int = 0) -> None:
        if not sources or len(shares) != len(sources):
            raise UserError(f"Mixture of {len(sources)} sources with {len(shares)} shares: each source needs one.")
        if not all(0 < share <= 1 for share in shares) or not math.isclose(sum(shares), 1, abs_tol=1e-6):
            raise UserError(f"shares={list(shares)} must each be above 0 and sum to 1, not to {sum(shares):g}.")
        self.sources, self.shares, self.seed = list(sources), list(shares), seed

    def conversations(self) -> Iterable[Conversation]:
        """Those of the first source, then what is drawn of the others.

        Raises:
            UserError: A source has no conversation.
        """
        pools = [list(source.conversations()) for source in self.sources]
        if empty := [type(s).__name__ for s, pool in zip(self.sources, pools, strict=True) if not pool]:
            raise UserError(f"Mixture: {', '.join(empty)} gave no conversation to mix in.")
        found = list(pools[0])
        for number, (pool, share) in enumerate(zip(pools[1:], self.shares[1:], strict=True), start=1):
            wanted = round(len(pools[0]) * share / self.shares[0])
            found += [pool[place] for place in self._drawn(number, len(pool), wanted)]
            log.info("mixture: %d from %s, which has %d", wanted, type(self.sources[number]).__name__, len(pool))
        return found

    def _drawn(self, number: int, size: int, wanted: int) -> list[int]:
        """Which conversations of a pool are taken, each at most once more often than any other."""
        generator = np.random.default_rng([self.seed, number])
        rounds = [generator.permutation(size) for _ in range(-(-wanted // size))]
        return [int(place) for drawn in rounds for place in drawn][:wanted]
