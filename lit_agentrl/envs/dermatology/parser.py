"""From a policy's reply to the disease that it names. Only the reply is read: the prompt lists every name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import chain

from lit_agentrl.envs.dermatology.labels import SYNONYMS, plain
from lit_agentrl.errors import UserError

_DENIAL = re.compile(r"\b(?:not|no|non|without|excludes|excluding)(?: (?:a|an|the|any))?$")


class AnswerParser:
    """Reads which of the labels an answer names.

    The answer is what the last complete answer block outside closed thoughts holds. Upper and lower case, accents of
    form, punctuation and hyphens do not count. It names a label when it is the label or a synonym; else when the
    longest names in it, found as whole words and not denied ("not melanoma"), are all of one label. "Keratosis" alone
    names neither the actinic nor the seborrheic one, and an answer with two labels names none.

    Args:
        labels: What can be named.
        synonyms: Further words for a label, beside those of `labels.SYNONYMS`.
        think_tag: What thoughts stand in.
        answer_tag: What the answer stands in.
        strict: An answer needs its tag; otherwise all outside the thoughts counts where there is no answer block.

    Raises:
        UserError: There are fewer than two labels, two are alike, or a synonym is of no label or of two.
    """

    def __init__(
        self,
        labels: Sequence[str],
        synonyms: Mapping[str, Sequence[str]] | None = None,
        think_tag: str = "think",
        answer_tag: str = "answer",
        strict: bool = True,
    ) -> None:
        self.labels, self.strict = tuple(labels), strict
        self._names = _names(self.labels, synonyms or {})
        longest_first = sorted(self._names, key=lambda name: (-len(name), name))
        self._any_name = re.compile(rf"\b(?:{'|'.join(map(re.escape, longest_first))})\b")
        think, answer = re.escape(think_tag), re.escape(answer_tag)
        self._thoughts = re.compile(rf"<{think}>.*?</{think}>", re.DOTALL | re.IGNORECASE)
        # an opening tag inside the block begins a new one: "<answer>a<answer>b</answer>" answers b
        self._answer = re.compile(rf"<{answer}>((?:(?!<{answer}>).)*?)</{answer}>", re.DOTALL | re.IGNORECASE)

    def __call__(self, reply: str) -> str | None:
        """The label that a reply's answer names, or None."""
        text = self.answer(reply)
        return None if text is None else self.match(text)

    def answer(self, reply: str) -> str | None:
        """The text of the answer; None where there is none."""
        decision = self._thoughts.sub(" ", reply)
        blocks: list[str] = self._answer.findall(decision)
        if blocks:
            return blocks[-1].strip()
        return None if self.strict else decision.strip()

    def match(self, text: str) -> str | None:
        """The one label that a text names, or None."""
        words = plain(text)
        if words in self._names:
            return self._names[words]
        # at each place the longest name is taken, and what lies inside it is passed over
        found = self._any_name.finditer(words)
        named = {self._names[name[0]] for name in found if not _DENIAL.search(words[: name.start()].rstrip())}
        return named.pop() if len(named) == 1 else None


def _names(labels: Sequence[str], synonyms: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Every name, as `plain` text, and the label it means."""
    own = {plain(label): label for label in labels}
    if len(own) < 2 or len(own) < len(labels) or "" in own:
        raise UserError(f"labels={list(labels)}: at least two are needed, each with words that no other one has.")
    given = {plain(label): tuple(words) for label, words in synonyms.items()}
    if unknown := sorted(set(given) - set(own)):
        raise UserError(f"synonyms are given for {unknown}, which are not among the labels: {', '.join(own)}.")
    names = dict(own)
    standard = ((label, word, False) for label in own for word in SYNONYMS.get(label, ()))
    extra = ((label, word, True) for label, words in given.items() for word in words)
    for label, word, is_given in chain(extra, standard):  # a given one before the standard ones
        meaning = names.setdefault(plain(word), own[label])
        if is_given and meaning != own[label]:
            raise UserError(f"the synonym {word!r} of {label!r} already means {meaning!r}. Keep it with one of them.")
    names.pop("", None)
    return names
