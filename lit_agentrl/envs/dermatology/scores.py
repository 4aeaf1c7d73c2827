"""How well diseases are recognised: accuracy, macro scores, votes, and what they are worth. Pure functions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lit_agentrl.intervals import bootstrap_statistic, wilson_interval

Integers = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]
SCORES = ("macro_precision", "macro_recall", "macro_f1")


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the episodes of one task answered."""

    label: str
    """The right one."""
    answers: tuple[str | None, ...]
    """Of every episode, in order, at least one; None for an answer that names no label."""

    @property
    def vote(self) -> str | None:
        """The commonest answer; of equally common ones the first. An unparsable answer votes as one more class."""
        return Counter(self.answers).most_common(1)[0][0]  # equal counts come in the order in which they were met


def recognition_summary(
    predictions: Sequence[Prediction], labels: Sequence[str], *, is_voted: bool = False
) -> dict[str, float]:
    """The numbers of an evaluation over tasks; NaN where nothing supports one.

    `accuracy` and the macro scores are of the first episode of every task (the only one, where decoding is greedy),
    `vote_accuracy` and `vote_macro_f1` of the commonest answer of all its episodes. An answer that names no label is
    wrong and a class of its own, which no mean counts. Macro means are over the labels that the tasks have, so they
    have the same terms whatever is answered; a label that is never answered has precision 0. Intervals are 95 %, over
    tasks: Wilson's for accuracies, a bootstrap for F1.
    """
    index = {label: number for number, label in enumerate(labels)}
    right = np.array([index[p.label] for p in predictions], dtype=np.int64)
    first = np.array([index.get(p.answers[0] or "", len(labels)) for p in predictions], dtype=np.int64)
    found = (
        _accuracy(right, first, "") | _macro(right, first, len(labels)) | _f1_interval(right, first, len(labels), "")
    )
    answers = [answer for p in predictions for answer in p.answers]
    found["unparsable"] = answers.count(None) / len(answers) if answers else math.nan
    for label, number in index.items():
        of_label = first[right == number]
        found[f"recall/{label.replace(' ', '_')}"] = float(np.mean(of_label == number)) if of_label.size else math.nan
    if is_voted:
        votes = np.array([index.get(p.vote or "", len(labels)) for p in predictions], dtype=np.int64)
        found |= _accuracy(right, votes, "vote_")
        found["vote_macro_f1"] = _macro(right, votes, len(labels))["macro_f1"]
        found |= _f1_interval(right, votes, len(labels), "vote_")
    return found | {"num_recognised": float(len(predictions))}


def macro_scores(right: Integers, answered: Integers, num_labels: int) -> tuple[float, float, float]:
    """Macro precision, recall and F1 over the labels in `right` [N]; `num_labels` stands for an unparsable answer."""
    import torch
    from torchmetrics.functional.classification import multiclass_f1_score, multiclass_precision, multiclass_recall

    if right.size == 0:
        return math.nan, math.nan, math.nan
    present = torch.from_numpy(np.unique(right))
    target, guess = torch.from_numpy(right), torch.from_numpy(answered)
    precision, recall, f1 = (
        score(guess, target, num_classes=num_labels + 1, average="none")[present].double().mean().item()
        for score in (multiclass_precision, multiclass_recall, multiclass_f1_score)
    )
    return precision, recall, f1


def macro_f1s(right: Integers, answered: Integers, num_labels: int) -> Floats:
    """Macro F1 of every row of tasks [draws, N], as `macro_scores` has it.

    Of a label, F1 = 2 hits / (its tasks + its answers).
    """
    draws = len(right)
    offset = (num_labels + 1) * np.arange(draws)[:, None]

    def counts(values: Integers) -> Integers:
        return np.bincount(values.ravel(), minlength=draws * (num_labels + 1)).reshape(draws, -1)[:, :num_labels]

    hits = counts(np.where(right == answered, right, num_labels) + offset)
    tasks, answers = counts(right + offset), counts(answered + offset)
    scores = np.divide(2.0 * hits, tasks + answers, out=np.zeros(hits.shape), where=tasks + answers > 0)
    means: Floats = (scores * (tasks > 0)).sum(axis=1) / (tasks > 0).sum(axis=1)
    return means


def _macro(right: Integers, answered: Integers, num_labels: int) -> dict[str, float]:
    return dict(zip(SCORES, macro_scores(right, answered, num_labels), strict=True))


def _accuracy(right: Integers, answered: Integers, prefix: str) -> dict[str, float]:
    hits, total = int((right == answered).sum()), len(right)
    low, high = wilson_interval(hits, total)
    names = (f"{prefix}accuracy", f"{prefix}accuracy_low", f"{prefix}accuracy_high")
    return dict(zip(names, (hits / total if total else math.nan, low, high), strict=True))


def _f1_interval(right: Integers, answered: Integers, num_labels: int, prefix: str) -> dict[str, float]:
    """The interval of macro F1; where all answers are right, or all wrong, no draw differs and accuracy's stands in."""
    hits = int((right == answered).sum())
    if hits in (0, len(right)):
        low, high = wilson_interval(hits, len(right))
    else:
        low, high = bootstrap_statistic(lambda picks: macro_f1s(right[picks], answered[picks], num_labels), len(right))
    return {f"{prefix}macro_f1_low": low, f"{prefix}macro_f1_high": high}
