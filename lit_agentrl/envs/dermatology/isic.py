"""HAM10000 and ISIC: a csv file with the diagnoses, and folders of images named after its ids."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from lit_agentrl.envs.dermatology.labels import CODES, DISEASES
from lit_agentrl.envs.dermatology.selection import Selection
from lit_agentrl.envs.dermatology.source import FileSource, Listing, file_record
from lit_agentrl.envs.dermatology.splits import Record
from lit_agentrl.envs.dermatology.tables import (
    SUFFIXES,
    Paths,
    Table,
    as_paths,
    coded_columns,
    image_files,
    one_hot,
    read_table,
)
from lit_agentrl.envs.seeded import SPLITS
from lit_agentrl.errors import UserError
from lit_agentrl.types import Split

log = logging.getLogger(__name__)

GROUPS = ("lesion_id", "patient_id")
"""Two images that share one of these are in the same split."""


class ISIC(FileSource):
    """Images of the ISIC archive and challenges.

    The diagnosis is a column (`diagnosis`, `dx`, or `label_column`), or one of several columns is 1, as in
    `image,MEL,NV,BCC,AKIEC,BKL,DF,VASC`. The csv may be separated by commas, semicolons or tabs.

    Args:
        metadata: The csv file or files of the train split, and of those without files of their own.
        images: The folder or folders that hold the images, at any depth.
        val_metadata: Files of the val split; None takes a share of `metadata`.
        test_metadata: Files of the test split; None takes a share of `metadata`.
        groups: A csv file that says which images show one lesion, or one patient, where `metadata` does not.
        id_column: Names the image; None looks for `image`, `image_id`, `isic_id`, `image_name`.
        label_column: Holds the diagnosis; None looks for `diagnosis`, `dx`, then for one column a label.
        select: Which images are used, and in which split.

    Raises:
        UserError: A file is missing or not as it should be.
    """

    codes = CODES
    id_columns: ClassVar[Sequence[str]] = ("image", "image_id", "isic_id", "image_name")
    label_columns: ClassVar[Sequence[str]] = ("diagnosis", "dx")

    def __init__(
        self,
        metadata: Paths,
        images: Paths,
        val_metadata: Paths | None = None,
        test_metadata: Paths | None = None,
        groups: Paths | None = None,
        id_column: str | None = None,
        label_column: str | None = None,
        select: Selection = Selection(),  # noqa: B008  # frozen
    ) -> None:
        super().__init__(select)
        self._files: Mapping[Split, Sequence[Path]] = {
            "train": as_paths(metadata), "val": as_paths(val_metadata), "test": as_paths(test_metadata)
        }  # fmt: skip
        self._images, self._groups = as_paths(images), as_paths(groups)
        self._id_columns = self.id_columns if id_column is None else (id_column,)
        self._label_columns = self.label_columns if label_column is None else (label_column,)
        self._is_label_given = label_column is not None
        if not self._files["train"] or not self._images:
            raise UserError(f"{self.where} needs at least one csv file (`metadata`) and one folder (`images`).")

    @property
    def where(self) -> str:
        """The loader, and its first file."""
        return f"{type(self).__name__} ({self._files['train'][0]})"

    def listing(self) -> Listing:
        """The rows of all files that an image is there for."""
        tables = {split: [read_table(path) for path in self._files[split]] for split in SPLITS}
        lesions = self._lesions()
        files = image_files(self._images)
        has_splits = any(tables[split] for split in SPLITS if split != "train")
        records: list[Record] = []
        missing: list[str] = []
        for split in SPLITS:
            for table in tables[split]:
                for id, label, groups in self._rows(table):
                    if id not in files:
                        missing.append(id)
                        continue
                    own = split if has_splits else None
                    records.append(file_record(files[id], id, label, (*groups, *lesions.get(id, ())), own))
        if records and not any(record.groups for record in records):
            log.warning(
                "%s: nothing says which images show one lesion (%s): two of one may be in two splits. Give `groups`.",
                self.where,
                ", ".join(GROUPS),
            )
        return Listing(records, missing)

    def _rows(self, table: Table) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        """Id, label and groups of every row."""
        id_column = table.column(self._id_columns, "the image's id")
        label_column = table.optional(self._label_columns)
        coded = [] if label_column or self._is_label_given else coded_columns(table.columns, self._names)
        if label_column is None and len(coded) < 2:
            table.column(self._label_columns, f"the diagnosis, nor columns such as {', '.join(map(str.upper, CODES))}")
        group_columns = [name for wanted in GROUPS if (name := table.optional([wanted]))]
        for number, row in enumerate(table.rows):
            id = image_id(row[id_column])
            if not id:
                raise UserError(f"{table.place(number)}: the column {id_column!r} is empty.")
            label = row[label_column] if label_column else one_hot(row, coded, table.place(number))
            yield id, label, tuple(f"{name.casefold()} {row[name]}" for name in group_columns if row[name])

    def _lesions(self) -> dict[str, tuple[str, ...]]:
        """What the files of groups say of each image."""
        found: dict[str, tuple[str, ...]] = {}
        for table in map(read_table, self._groups):
            id_column = table.column(self._id_columns, "the image's id")
            table.column(GROUPS, "the lesion")
            columns = [name for wanted in GROUPS if (name := table.optional([wanted]))]
            for row in table.rows:
                groups = tuple(f"{name.casefold()} {row[name]}" for name in columns if row[name])
                found[image_id(row[id_column])] = groups
        return found


class HAM10000(ISIC):
    """HAM10000: `HAM10000_metadata.csv`, and the images in one folder or two.

    Its seven classes are the standard labels. All images of one lesion are in one split.

    Args:
        metadata: The csv file: `lesion_id`, `image_id`, `dx`, ...
        images: The folder or folders that hold the images, such as `HAM10000_images_part_1` and `_part_2`.
        test_metadata: The csv file of the test split; None takes a share of `metadata`.
        select: Which images are used, and in which split.

    Raises:
        UserError: A file is missing or not as it should be.
    """

    standard_labels = DISEASES
    id_columns = ("image_id",)
    label_columns = ("dx",)

    def __init__(
        self,
        metadata: Paths,
        images: Paths,
        test_metadata: Paths | None = None,
        select: Selection = Selection(),  # noqa: B008  # frozen
    ) -> None:
        super().__init__(metadata, images, test_metadata=test_metadata, label_column="dx", select=select)

    def _rows(self, table: Table) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        table.column(("lesion_id",), "the lesion, without which two images of one could be in two splits")
        return super()._rows(table)


def image_id(value: str) -> str:
    """The name of an image without folder and suffix."""
    name = value.replace("\\", "/").rpartition("/")[2].strip()
    return name[: name.rindex(".")] if name.lower().endswith(SUFFIXES) else name
