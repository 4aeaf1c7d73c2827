"""How right an answer is: exact match and F1 over words, as SQuAD and HotpotQA score them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WHOLE_OR_NOTHING = {"yes", "no", "noanswer"}


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation, articles and surplus white space, in this order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Iterable[str]) -> float:
    """1 where the prediction is one of the answers once both are normalised, else 0."""
    found = normalise(prediction)
    return float(any(found == normalise(answer) for answer in answers))


def token_f1(prediction: str, answers: Iterable[str]) -> float:
    """The highest F1 of the prediction's words with those of an answer, in [0, 1].

    "yes", "no" and "noanswer" match as a whole or not at all, on either side (HotpotQA).
    """
    found = normalise(prediction)
    return max((_f1(found, normalise(answer)) for answer in answers), default=0.0)


def _f1(prediction: str, answer: str) -> float:
    if prediction == answer:
        return 1.0
    if {prediction, answer} & _WHOLE_OR_NOTHING:
        return 0.0
    found, wanted = prediction.split(), answer.split()
    common = (Counter(found) & Counter(wanted)).total()
    return 2 * common / (len(found) + len(wanted)) if common else 0.0
