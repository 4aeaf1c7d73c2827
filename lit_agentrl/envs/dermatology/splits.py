"""Which image is in which split: none in two, nor two images of one lesion, and every label in its share of each."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest

from lit_agentrl.envs.dermatology.samples import Sample
from lit_agentrl.envs.seeded import SPLITS
from lit_agentrl.types import Split

RANK: Mapping[Split, int] = {"train": 0, "val": 1, "test": 2}
"""A lesion that a layout has in two splits stays in the higher one: what is evaluated is never trained on."""


@dataclass(frozen=True, slots=True)
class Record:
    """A sample, and what decides its split."""

    sample: Sample
    groups: tuple[str, ...] = ()
    """What it shares with others that must be in the same split: its lesion, its patient."""
    split: Split | None = None
    """The layout's own split; None where there is none."""


@dataclass(frozen=True, slots=True)
class Division:
    """The samples of every split, in the order of their use."""

    samples: Mapping[Split, Sequence[Sample]]
    num_leaking: int
    """Images left out of a split because their lesion or patient is in a higher one."""
    num_over_cap: int
    """Images left out because their label has enough."""


def divide(
    records: Sequence[Record],
    *,
    val_share: float,
    test_share: float,
    caps: Mapping[Split, int | None],
    seed: int,
) -> Division:
    """Split what has no split, and choose and order what is used.

    Where no record is of val, or of test, it takes its share of every label's train images: the groups whose hash with
    the seed comes first, so an image that is added later moves few others; at least one group of every label that has
    three. Each split keeps at most its cap of every label. The order takes the labels in turns, each in the order of
    hashes: any first so many samples are as balanced as the split allows.
    """
    group_of = _connected(records)
    own = {record.split for record in records}
    highest: dict[str, Split] = {}
    for record in records:
        split, group = record.split or "train", group_of[record.sample.id]
        highest[group] = max(split, highest.get(group, split), key=RANK.__getitem__)
    kept = [record for record in records if (record.split or "train") == highest[group_of[record.sample.id]]]
    train = [record for record in kept if highest[group_of[record.sample.id]] == "train"]
    shares: dict[Split, float] = {
        "test": 0.0 if "test" in own else test_share,
        "val": 0.0 if "val" in own else val_share,
    }
    placed = highest | _held_out(train, group_of, shares, seed)
    found: dict[Split, list[Sample]] = {split: [] for split in SPLITS}
    for record in kept:
        split = placed[group_of[record.sample.id]]
        found[split].append(replace(record.sample, split=split))
    chosen = {split: in_turns(found[split], caps[split], seed) for split in SPLITS}
    return Division(chosen, len(records) - len(kept), len(kept) - sum(map(len, chosen.values())))


def in_turns(samples: Iterable[Sample], cap: int | None, seed: int) -> list[Sample]:
    """At most `cap` samples of every label, the labels in turns, each in an order that the seed and its ids decide."""
    by_label: dict[str, list[Sample]] = defaultdict(list)
    for sample in sorted(samples, key=lambda sample: (place(seed, sample.id), sample.id)):
        by_label[sample.label].append(sample)
    turns = zip_longest(*(by_label[label][:cap] for label in sorted(by_label)))
    return [sample for sample in chain.from_iterable(turns) if sample is not None]


def place(seed: int, key: str) -> int:
    """64 bits that depend on seed and key alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:8])


def _held_out(
    train: Sequence[Record], group_of: Mapping[str, str], shares: Mapping[Split, float], seed: int
) -> dict[str, Split]:
    """The groups that leave the train split, and where they go."""
    members: dict[str, list[str]] = defaultdict(list)
    label_of: dict[str, str] = {}
    for record in train:
        group = group_of[record.sample.id]
        members[group].append(record.sample.id)
        label_of.setdefault(group, record.sample.label)  # a lesion with two labels counts as its first
    placed: dict[str, Split] = {}
    for label in sorted(set(label_of.values())):
        groups = sorted((g for g in label_of if label_of[g] == label), key=lambda group: (place(seed, group), group))
        num_images = sum(len(members[group]) for group in groups)
        is_scarce = len(groups) < 3  # too few for one of each split: rather trained on than not
        for split, share in shares.items():
            quota = round(share * num_images) if is_scarce else max(1, round(share * num_images)) * (share > 0)
            while quota > 0 and len(groups) > 1:
                group = groups.pop(0)
                placed[group] = split
                quota -= len(members[group])
    return placed


def _connected(records: Sequence[Record]) -> dict[str, str]:
    """The group of every sample: samples that share a lesion or a patient, directly or through others, have one."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    keys = {record.sample.id: record.groups or (f"image {record.sample.id}",) for record in records}
    for first, *others in keys.values():
        for other in others:
            low, high = sorted((root(first), root(other)))
            parent[high] = low
    return {id: root(groups[0]) for id, groups in keys.items()}
