"""What the loaders share: which labels count, how splits are made, what is refused, and what is said about the rest."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from lit_agentrl.envs.dermatology.labels import DISEASES, label_name, name_table, plain
from lit_agentrl.envs.dermatology.readable import unreadable
from lit_agentrl.envs.dermatology.samples import ImageSource, Sample
from lit_agentrl.envs.dermatology.selection import Selection
from lit_agentrl.envs.dermatology.splits import Division, Record, divide
from lit_agentrl.envs.seeded import SPLITS
from lit_agentrl.errors import UserError
from lit_agentrl.types import Split

log = logging.getLogger(__name__)

NAMED = 3
"""How many of the things that are wrong a message names."""


@dataclass(frozen=True)
class Listing:
    """What a layout holds."""

    records: Sequence[Record]
    """With labels as the dataset writes them."""
    missing: Sequence[str] = ()
    """Images that are listed and not there."""
    classes: Sequence[str] = ()
    """Labels that the layout names itself, such as its folders, whether or not there is an image of them."""
    notes: Mapping[str, int] = field(default_factory=dict)
    """What else was left out, and how often."""


class FileSource(ImageSource):
    """Images of a layout on disk. A loader says how to list it.

    Args:
        select: Which images are used, and in which split.
    """

    codes: ClassVar[Mapping[str, str]] = {}
    """What the dataset's labels are called where the user says nothing else."""
    standard_labels: ClassVar[Sequence[str] | None] = None
    """The names that count where the user says nothing; None for all that are found."""

    def __init__(self, select: Selection) -> None:
        self.select = select
        self._names = name_table(select.names, self.codes)

    def __getstate__(self) -> dict[str, object]:
        """Without what was read: a suite is pickled into worker processes, which read it for themselves."""
        return {key: value for key, value in vars(self).items() if not key.startswith("_found")}

    @abstractmethod
    def listing(self) -> Listing:
        """Everything that the layout holds.

        Raises:
            UserError: A file is missing or not as it should be.
        """

    @property
    def where(self) -> str:
        """What errors call the layout."""
        return type(self).__name__

    @property
    def labels(self) -> Sequence[str]:
        """The names of the diseases."""
        return self._found[0]

    def samples(self, split: Split) -> Sequence[Sample]:
        """The samples of a split; any first so many are as balanced over labels as the split allows."""
        return self._found[1].samples[split]

    @cached_property
    def _found(self) -> tuple[Sequence[str], Division]:
        listing = self.listing()
        named = [
            replace(record, sample=replace(record.sample, label=label_name(record.sample.label, self._names)))
            for record in listing.records
        ]
        self._refuse_duplicates(named)
        labels = self._labels([*(label_name(name, self._names) for name in listing.classes), *_labels_of(named)])
        records = [record for record in named if record.sample.label in labels]
        others = Counter(record.sample.label for record in named if record.sample.label not in labels)
        self._check(labels, records, others, listing.missing)
        kept, num_broken = self._readable(labels, records, listing.missing)
        select = self.select
        division = divide(
            kept,
            val_share=select.val_share,
            test_share=select.test_share,
            caps={
                split: select.max_per_class if split == "train" else select.max_held_out_per_class for split in SPLITS
            },
            seed=select.seed,
        )
        self._report(labels, division, others, num_broken, listing)
        return labels, division

    def _labels(self, found: Sequence[str]) -> list[str]:
        """Those that count: the user's, else the dataset's, else all that were found, HAM10000's first."""
        if self.select.labels is not None:
            return [plain(label) for label in self.select.labels]
        if self.standard_labels is not None:
            return list(self.standard_labels)
        every = set(found) - {""}
        return [label for label in DISEASES if label in every] + sorted(every - set(DISEASES))

    def _refuse_duplicates(self, records: Sequence[Record]) -> None:
        counts = Counter(record.sample.id for record in records)
        if repeated := [id for id, count in counts.items() if count > 1]:
            raise UserError(
                f"{self.where}: {len(repeated)} ids are given to more than one image: {_some(repeated)}. Every image "
                "needs an id of its own, over all splits."
            )

    def _check(
        self, labels: Sequence[str], records: Sequence[Record], others: Mapping[str, int], missing: Sequence[str]
    ) -> None:
        if others and self.select.other_labels == "refuse":
            raise UserError(
                f"{self.where}: there are images of labels that are not among {', '.join(labels)}: "
                f"{_counted(others)}. Name them in `labels`, say what they are called in `names`, or leave them out "
                "with other_labels=drop."
            )
        if not records:
            raise UserError(
                f"{self.where}: no images are left: {len(missing)} are listed and not there"
                + (f" ({_some(missing)})" if missing else "")
                + f", {sum(others.values())} are of other labels. Check the paths and `labels`."
            )
        present = set(_labels_of(records))
        if empty := [label for label in labels if label not in present]:
            raise UserError(
                f"{self.where}: there is no image of {', '.join(empty)}. A class that is never right would only lower "
                f"the macro scores: give its images, or name in `labels` what there is: {', '.join(sorted(present))}."
            )
        if len(labels) < 2:
            raise UserError(f"{self.where}: all images are of {labels[0]!r}; recognition needs at least two labels.")

    def _readable(
        self, labels: Sequence[str], records: Sequence[Record], missing: Sequence[str]
    ) -> tuple[Sequence[Record], int]:
        """The records without those of broken files, where these are to be looked for, and how many that left out."""
        if self.select.unreadable == "fail":
            return records, 0
        broken = unreadable(record.sample.image for record in records if isinstance(record.sample.image, Path))
        if not broken:
            return records, 0
        what = f"{len(broken)} of {len(records)} images cannot be read: {_some([str(path) for path in broken])}"
        kept = [record for record in records if not _is_among(record.sample.image, broken)]
        if self.select.unreadable == "refuse" or not kept:
            raise UserError(
                f"{self.where}: {what}. {next(iter(broken.values()))} With unreadable=drop such images are left out."
            )
        log.warning("%s: %s. They are left out.", self.where, what)
        self._check(labels, kept, {}, missing)
        return kept, len(broken)

    def _report(
        self,
        labels: Sequence[str],
        division: Division,
        others: Mapping[str, int],
        num_broken: int,
        listing: Listing,
    ) -> None:
        left_out = {
            "of other labels": sum(others.values()),
            "that cannot be read": num_broken,
            "beyond the cap of their label": division.num_over_cap,
            **listing.notes,
        }
        log.info(
            "%s: %s images of %d labels%s",
            self.where,
            ", ".join(f"{len(samples)} {split}" for split, samples in division.samples.items()),
            len(labels),
            "".join(f"; left out: {count} {why}" for why, count in left_out.items() if count),
        )
        if listing.missing:
            log.warning(
                "%s: %d listed images are not there: %s", self.where, len(listing.missing), _some(listing.missing)
            )
        if division.num_leaking:
            log.warning(
                "%s: %d images are left out because their lesion or patient is held out in another split",
                self.where,
                division.num_leaking,
            )
        for split, samples in division.samples.items():
            present = {sample.label for sample in samples}
            if samples and (empty := [label for label in labels if label not in present]):
                log.warning("%s: the %s split has no image of %s", self.where, split, ", ".join(empty))


def file_record(path: Path, id: str, label: str, groups: Sequence[str] = (), split: Split | None = None) -> Record:
    """The record of an image file."""
    return Record(Sample(id, path, label), tuple(groups), split)


def _is_among(image: object, files: Container[Path]) -> bool:
    return isinstance(image, Path) and image in files  # arrays have no hash


def _labels_of(records: Sequence[Record]) -> list[str]:
    return [record.sample.label for record in records]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (" ..." if len(names) > NAMED else "")


def _counted(counts: Mapping[str, int]) -> str:
    some = [f"{name or 'without a label'} ({count})" for name, count in sorted(counts.items())]
    return ", ".join(some[:10]) + (" ..." if len(some) > 10 else "")
