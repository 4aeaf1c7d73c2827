"""Text from outside, made fit to be shown: it can neither end its block, nor speak for the policy or the chat."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from lit_agentrl.envs.search.parse import INFORMATION
from lit_agentrl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Anything between angle brackets: our own tags in any spelling, and the control tokens of chat templates, such as
# <|im_end|>, </s> or <end_of_turn>, which a tokenizer finds in plain text too. [INST] and its like are Mistral's.
_TAG = re.compile(r"<(?=[^<>]{1,200}>)")
_CONTROL = re.compile(r"\[(?=/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\])")


def neutralise(text: str) -> str:
    """The text with the opening bracket of everything that reads as a tag replaced by one that only looks like it.

    `</information>` becomes `‹/information>`. The length stays the same. A bracket that nothing closes within 200
    characters, as in `a < b`, stays.
    """
    return _CONTROL.sub("⟦", _TAG.sub("‹", text))


def information(text: str) -> str:
    """The block that shows neutralised text, laid out as Search-R1 does."""
    return f"\n\n<{INFORMATION}>{text}</{INFORMATION}>\n\n"


@dataclass(frozen=True)
class Limit:
    """How much of a text is shown.

    Args:
        chars: Characters; None for any number.
        tokens: Tokens; None for any number.
        tokenizer: The model whose tokenizer counts them, as `pretrained` names it.

    Raises:
        UserError: A number is under 1, there is no limit at all, or of tokens and tokenizer only one is given.
    """

    chars: int | None
    tokens: int | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        for name, count in (("characters", self.chars), ("tokens", self.tokens)):
            if count is not None and count < 1:
                raise UserError(f"An observation limit of {count} {name} shows nothing: it must be 1 or more.")
        if self.chars is None and self.tokens is None:
            raise UserError("Observations have no limit: give max_observation_chars or max_observation_tokens.")
        if (self.tokens is None) != (self.tokenizer is None):
            raise UserError(
                f"max_observation_tokens={self.tokens} and tokenizer={self.tokenizer!r} belong together: give both, or "
                "limit characters with max_observation_chars."
            )
        if self.tokenizer is not None:
            _loaded(self.tokenizer)

    def cut(self, text: str) -> str:
        """As much of the beginning as fits."""
        kept = text if self.chars is None else text[: self.chars]
        if self.tokens is None or self.tokenizer is None:
            return kept
        offsets = _offsets(self.tokenizer, kept)
        # Where the first token begins that is too many: a character of several tokens is kept whole or not at all.
        return kept if len(offsets) <= self.tokens else kept[: offsets[self.tokens][0]]


def _offsets(tokenizer: str, text: str) -> list[tuple[int, int]]:
    """Where every token of the text begins and ends."""
    # The tokenizer itself, not its wrapper: that one sets limits as it encodes, so threads may not share it.
    encoding = _loaded(tokenizer).backend_tokenizer.encode(text, add_special_tokens=False)
    return list(encoding.offsets)


@lru_cache
def _loaded(tokenizer: str) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    from lit_agentrl.models.policy import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    if not isinstance(loaded, PreTrainedTokenizerFast):
        raise UserError(f"tokenizer={tokenizer!r} has no fast version: limit characters with max_observation_chars.")
    loaded.backend_tokenizer.no_truncation()  # its file may ask for both
    loaded.backend_tokenizer.no_padding()
    return loaded
