"""Whether a reply has the form that the prompt asks for: thoughts, then an answer, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lit_agentrl.envs.dermatology.labels import plain

MALFORMED = -0.5


@dataclass(frozen=True)
class Form:
    """`<think>...</think><answer>...</answer>`, and the headings that the thoughts should have.

    Args:
        think_tag: What thoughts stand in.
        answer_tag: What the answer stands in.
        headings: What the thoughts should name, such as "colour"; empty where the prompt asks for none.
    """

    think_tag: str = "think"
    answer_tag: str = "answer"
    headings: Sequence[str] = ()

    def is_exact(self, reply: str) -> bool:
        """Whether both blocks are there once, in order, filled, with white space alone around and between them."""
        parts = self._parts(reply)
        return parts is not None and bool(parts[0].strip()) and not parts[1].strip() and bool(parts[2].strip())

    def score(self, reply: str) -> float:
        """At most 1: 0.5 for the two blocks, 0.2 for nothing between them, 0.3 for the headings; -0.5 if malformed.

        Headings count by share, as in the authors' published code; where none are asked for, the 0.3 are for thoughts
        that are not empty. There the prompt, which holds the tags, was judged too: here only the reply is.
        """
        parts = self._parts(reply)
        if parts is None:
            return MALFORMED
        thoughts, between, _ = parts
        return 0.5 + 0.2 * (not between.strip()) + 0.3 * self._headings_found(thoughts)

    def _parts(self, reply: str) -> tuple[str, str, str] | None:
        """Thoughts, what stands between, and answer; None unless the reply is made of the two blocks, each once."""
        think, answer = re.escape(self.think_tag), re.escape(self.answer_tag)
        pieces = re.split(f"(</?(?:{think}|{answer})>)", reply)
        wanted = [f"<{self.think_tag}>", f"</{self.think_tag}>", f"<{self.answer_tag}>", f"</{self.answer_tag}>"]
        if pieces[1::2] != wanted or (pieces[0] + pieces[-1]).strip():
            return None
        return pieces[2], pieces[4], pieces[6]

    def _headings_found(self, thoughts: str) -> float:
        if not self.headings:
            return float(bool(thoughts.strip()))
        words = f" {plain(thoughts)} "
        return sum(f" {plain(heading)} " in words for heading in self.headings) / len(self.headings)
