"""Anchors: which steps of a group were taken in the same state (GiGPO, arXiv 2505.10978, Eq. 6). Pure functions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from difflib import SequenceMatcher
from typing import Any, Literal

import numpy as np

from lit_agentrl.errors import UserError
from lit_agentrl.rollouts.replies import decision
from lit_agentrl.types import Trajectory

AnchorKind = Literal["text", "state", "text_history"]
Order = Literal["canonical", "batch"]


def anchor_keys(trajectory: Trajectory, kind: AnchorKind = "text", history: int = 2) -> list[Hashable]:
    """What each step of the trajectory is compared by, [K].

    Args:
        trajectory: An episode.
        kind: `text` is the observation before the action, the paper's anchor: it does not tell apart states that look
            alike. `state` is the environment's own id of its state (`Step.anchor`), hidden parts included.
            `text_history` is the text and the last `history` pairs of observation and action.
        history: Pairs of `text_history`.

    Raises:
        UserError: `state` is asked for, and the environment gave none.
    """
    steps = trajectory.steps
    if kind == "state":
        if any(step.anchor is None for step in steps):
            raise UserError(
                "anchor: state needs an environment whose `anchor` tells its states apart; this one gives None. "
                "Use anchor: text or text_history."
            )
        return [typed(step.anchor) for step in steps]
    texts = [step.state or step.observation for step in steps]
    if kind == "text":
        return list(texts)
    pairs = list(zip(texts, (decision(step.action) for step in steps), strict=True))
    return [(texts[t], *pairs[max(0, t - history) : t]) for t in range(len(steps))]


def numbered(keys: Iterable[Hashable]) -> list[int]:
    """An integer for each key, the same for equal keys, in the order of their first appearance."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def typed(value: Any) -> Hashable:
    """A hashable, equal for equal values of one type alone: 1, 1.0 and True are three states, as are [1] and (1,).

    Containers are taken apart, arrays keep shape and dtype, numpy's scalars are Python's, and NaN equals itself.

    Raises:
        UserError: Something in it can be neither hashed nor taken apart.
    """
    name = type(value).__qualname__
    match value:
        case np.ndarray():
            content = typed(value.tolist()) if value.dtype.hasobject else value.tobytes()
            return name, value.shape, value.dtype.str, content
        case np.generic():
            return typed(value.item())
        case tuple() | list():
            return name, *map(typed, value)
        case set() | frozenset():
            return name, frozenset(map(typed, value))
        case dict():
            return name, frozenset((typed(key), typed(item)) for key, item in value.items())
        case float() if math.isnan(value):
            return name, "nan"
    try:
        hash(value)
    except TypeError:
        raise UserError(
            f"An environment's anchor holds a {name}, which cannot be hashed. Give strings, numbers, tuples, lists, "
            "sets, dicts or numpy arrays of such."
        ) from None
    return name, value


def group_similar(
    texts: Sequence[str],
    groups: Sequence[int],
    threshold: float,
    autojunk: bool = False,
    *,
    order: Order = "canonical",
) -> list[int]:
    """The cluster of each text, [B]: within its group, texts about as long as alike belong together. Greedy.

    A text joins the first cluster whose first member, its representative, it resembles:
    `difflib.SequenceMatcher(None, text, representative).ratio() >= threshold`, i.e. at least this share of the
    characters of both lies in matching blocks (Ratcliff-Obershelp; the paper's App. calls it the longest matching
    subsequence). Otherwise it opens a cluster. Being alike is not transitive, so the order matters:

    Args:
        texts: [B].
        groups: [B]; texts of different groups never meet.
        threshold: Above 0, at most 1.
        autojunk: difflib's heuristic, on in the authors' code: in texts of 200 characters or more the frequent ones
            match nothing, so that boards which differ in one move come out as unlike (0.47 instead of 0.99).
        order: `canonical` goes from the most frequent text of a group to the rarest, ties by the alphabet, so the
            clusters do not depend on the order of the rows. `batch` goes by the rows, as the authors' code does.

    Raises:
        ValueError: The threshold is out of range, or the lengths differ.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} must be above 0 and at most 1.")
    clusters: dict[tuple[int, str], tuple[int, int]] = {}
    for group, members in _by_group(texts, groups).items():
        matchers: list[SequenceMatcher[str]] = []
        for text in members if order == "batch" else sorted(members, key=lambda t: (-members[t], t)):
            place = _first_alike(text, matchers, threshold)
            if place == len(matchers):
                matchers.append(SequenceMatcher(None, "", text, autojunk))
            clusters[group, text] = group, place
    return numbered(clusters[group, text] for group, text in zip(groups, texts, strict=True))


def _by_group(texts: Sequence[str], groups: Sequence[int]) -> dict[int, Counter[str]]:
    """How often each group has each text; texts in the order of their first appearance."""
    counts: dict[int, Counter[str]] = {}
    for text, group in zip(texts, groups, strict=True):
        counts.setdefault(group, Counter())[text] += 1
    return counts


def _first_alike(text: str, representatives: Sequence[SequenceMatcher[str]], threshold: float) -> int:
    """The place of the first representative that the text resembles; their number if there is none."""
    for place, matcher in enumerate(representatives):
        matcher.set_seq1(text)
        # Two upper bounds of the ratio, from lengths and from letter counts, spare most of the comparisons.
        if matcher.real_quick_ratio() < threshold or matcher.quick_ratio() < threshold:
            continue
        if matcher.ratio() >= threshold:
            return place
    return len(representatives)
