"""What the loaders read: tables of metadata, and where the images are."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_agentrl.envs.dermatology.labels import plain
from lit_agentrl.errors import UserError

log = logging.getLogger(__name__)

Paths = str | list[str]
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif")
"""What counts as an image file, in either case."""
DELIMITERS = ",;\t"


@dataclass(frozen=True)
class Table:
    """The rows of a csv file, by the names in its header."""

    path: Path
    columns: tuple[str, ...]
    rows: tuple[Mapping[str, str], ...]

    def column(self, wanted: Sequence[str], what: str) -> str:
        """The first of the wanted columns that is there, whatever its case.

        Raises:
            UserError: None is.
        """
        found = self.optional(wanted)
        if found is None:
            raise UserError(
                f"{self.path} has no column for {what}: looked for {', '.join(wanted)}; it has "
                f"{', '.join(self.columns)}."
            )
        return found

    def optional(self, wanted: Iterable[str]) -> str | None:
        """The first of the wanted columns that is there, or None."""
        own = {name.casefold(): name for name in reversed(self.columns)}
        return next((own[name.casefold()] for name in wanted if name.casefold() in own), None)

    def place(self, number: int) -> str:
        """How an error names the row of this number, counted from 0."""
        return f"{self.path}, row {number + 1}"


def read_table(path: Path) -> Table:
    """A csv file with a header, separated by commas, semicolons or tabs, in UTF-8 with or without a byte order mark.

    Raises:
        UserError: The file is missing, empty, not such a table, or two of its columns have one name.
    """
    if not path.is_file():
        raise UserError(f"{path} is not there. Give the path of the csv file with the images' metadata.")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            delimiter = max(DELIMITERS, key=header.count)
            columns = tuple(name.strip() for name in next(csv.reader([header], delimiter=delimiter), []))
            lines = [line for line in csv.reader(file, delimiter=delimiter, strict=True) if any(map(str.strip, line))]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a csv file in UTF-8 ({error}). Save it anew as one.") from error
    if len(set(columns)) < len(columns) or not any(columns):
        raise UserError(f"{path} needs a first line that names its columns, each once; it has {list(columns)}.")
    table = Table(path, columns, tuple(dict(zip(columns, map(str.strip, line), strict=False)) for line in lines))
    for number, line in enumerate(lines):
        if len(line) != len(columns):
            raise UserError(f"{table.place(number)}: {len(line)} fields, but the header names {len(columns)} columns.")
    return table


def image_files(folders: Sequence[Path]) -> dict[str, Path]:
    """Every image file below the folders by its name without suffix; of two of one name the first folder's counts.

    Raises:
        UserError: A folder is missing, or there is no image in any.
    """
    found: dict[str, Path] = {}
    repeated = 0
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not there. Give the folder, or the list of folders, that holds the images.")
        for path in images_below(folder):
            repeated += path.stem in found
            found.setdefault(path.stem, path)
    if not found:
        raise UserError(f"No images in {', '.join(map(str, folders))}: looked for {', '.join(SUFFIXES)} at any depth.")
    if repeated:
        log.warning("dermatology: %d image files have the name of another one and are passed over", repeated)
    return found


def images_below(folder: Path) -> list[Path]:
    """The image files at any depth, in order; hidden files and folders are passed over."""
    found: list[Path] = []
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        images = (name for name in sorted(files) if name.lower().endswith(SUFFIXES) and not name.startswith("."))
        found.extend(Path(root, name) for name in images)
    return found


def as_paths(paths: Paths | None) -> tuple[Path, ...]:
    """One path or several."""
    if paths is None:
        return ()
    return tuple(Path(path).expanduser() for path in ([paths] if isinstance(paths, str) else paths))


def one_hot(row: Mapping[str, str], columns: Sequence[str], place: str) -> str:
    """The column that holds 1 where all others hold 0.

    Raises:
        UserError: Another number of columns than one does, or a value is no number.
    """
    try:
        chosen = [name for name in columns if float(row[name] or 0) > 0.5]
    except ValueError as error:
        raise UserError(f"{place}: {error}. One of {', '.join(columns)} must be 1, the others 0.") from None
    if len(chosen) != 1:
        raise UserError(f"{place}: {chosen or 'none'} of {', '.join(columns)} are 1; it must be exactly one.")
    return chosen[0]


def coded_columns(columns: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """The columns that are named after a label."""
    return [name for name in columns if plain(name) in names]
