"""Stop strings: sees, token by token, when the text of an action holds one of some texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_agentrl.rollouts.engine import check_stop

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

_HALF = "\ufffd"
"""What bytes that are no whole character are decoded to."""


class StopStrings:
    """Texts that end an action. Nothing is cut: the token that completes one of them is the action's last.

    A token is decoded alone once, and its text remembered. Only one whose text could be the end of a stop string has
    the last few tokens decoded with it: what most tokens cost is a look into a dictionary.

    Args:
        texts: The strings, one or more.
        tokenizer: Turns tokens into text, without special tokens: what an environment reads.

    Raises:
        UserError: A text cannot be a stop string.
    """

    def __init__(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        check_stop(texts)
        self.texts = tuple(texts)
        self._tokenizer = tokenizer
        # A token with text holds a byte of it or more. One token beyond: decoders drop a space at the very start.
        self._num_tokens = max(len(text.encode()) for text in texts) + 1
        self._ends = {text[-1] for text in texts} | {_HALF}
        # A token's own text lacks the space that some decoders put before it.
        self._ends_with_space = any(text.endswith(" ") for text in texts)
        self._pieces: dict[int, str] = {}

    def is_complete(self, token_ids: Sequence[int]) -> bool:
        """Whether an action's text holds one of the strings, where it did not before the last of its tokens."""
        if self._ends.isdisjoint(self._piece(token_ids[-1])) and not self._ends_with_space:
            return False
        text = self._decode(token_ids[self._tail_start(token_ids) :])
        return any(stop in text for stop in self.texts)

    def _tail_start(self, token_ids: Sequence[int]) -> int:
        """Where the tokens begin that a string which ends in the last token can lie in."""
        start, missing = len(token_ids), self._num_tokens
        while start > 0 and (missing > 0 or _HALF in self._piece(token_ids[start])):  # never amid a character
            start -= 1
            missing -= self._piece(token_ids[start]) != ""
        return start

    def _piece(self, token: int) -> str:
        """The text of a token by itself."""
        if token not in self._pieces:
            self._pieces[token] = self._decode([token])
        return self._pieces[token]

    def _decode(self, token_ids: Sequence[int]) -> str:
        ids = list(token_ids)
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
