r"""Search-R1's corpora: a JSON object a line, `{"id": "7", "contents": "\"Title\"\nText"}`.

The published ones hold millions of passages (wiki-18: 21 million, 14 GB), so a corpus is read as a stream once, and
passages are then read from the file by their offset.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from io import BufferedReader
from pathlib import Path

import numpy as np

from lit_agentrl.cache import built_once
from lit_agentrl.errors import UserError
from lit_agentrl.retrieval.base import Passage, RetrievalError, shortened
from lit_agentrl.retrieval.keys import KeyTable, hashed

FORMAT = 1
"""Part of the table's name: raise it when what is written changes."""
LAYOUT = 'one object a line, {"id": "7", "contents": "\\"Title\\"\\nText"}'


@dataclass(frozen=True, slots=True)
class Record:
    """A line of a corpus."""

    id: str
    contents: str
    offset: int
    """Where the line begins, in bytes."""


def read_corpus(path: Path) -> Iterator[Record]:
    """The passages of the file in order, one line in memory at a time; empty lines are passed over.

    Raises:
        UserError: The file is missing or holds nothing, or a line is not as it should be; the text names the line.
    """
    offset = found = 0
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                id, contents = parse_line(line, f"{path}, line {number}")
                yield Record(id, contents, offset)
                found += 1
            offset += len(line)
    if not found:
        raise UserError(f"{path} holds no passage. A corpus is {LAYOUT}.")


def parse_line(line: bytes, where: str) -> tuple[str, str]:
    """The id and the contents of a line of a corpus."""
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: no JSON ({error}). A corpus is {LAYOUT}. Was the file cut?") from error
    if not isinstance(item, dict):
        raise UserError(f"{where}: no JSON object but {type(item).__name__}. A corpus is {LAYOUT}.")
    id, contents = item.get("id"), item.get("contents")
    if not isinstance(contents, str):
        keys = shortened(", ".join(item))
        raise UserError(f"{where}: there is no text under `contents`, the keys are {keys}. A corpus is {LAYOUT}.")
    if isinstance(id, bool) or not isinstance(id, str | int) or id == "":
        given = shortened(str(id))
        raise UserError(f"{where}: `id` should be text or a whole number, not {given}. A corpus is {LAYOUT}.")
    return str(id), contents


def passage(id: str, contents: str, score: float | None = None) -> Passage:
    """The passage of these contents: the first line, without the quotes around it, is its title."""
    title, _, text = contents.partition("\n")
    title = title.strip()
    if len(title) > 1 and title[0] == title[-1] == '"':
        title = title[1:-1]
    return Passage(id, title, text, score)


class Corpus:
    """The passages of a corpus by row and by id. Threads and forked processes may share it; nothing in it changes.

    Args:
        path: The corpus.
        digest: The hash of its contents.
        folder: Where the table of its offsets and ids is kept; it is written if it is not there.

    Raises:
        UserError: The file is not in the layout, or has an id twice.
    """

    def __init__(self, path: Path, digest: str, folder: Path) -> None:
        table = built_once(folder / f"corpus-v{FORMAT}-{digest[:20]}", partial(_write_table, path))
        self._path = path
        self._keys = KeyTable(table, "ids")
        self._offsets = np.load(table / "offsets.npy", mmap_mode="r")
        self._file = _opened(path)

    def __len__(self) -> int:
        """The number of passages."""
        return len(self._keys)

    def passage(self, row: int, score: float | None = None) -> Passage:
        """The passage in this row of the file, counted without empty lines.

        Raises:
            RetrievalError: The file was changed since it was opened.
        """
        begin, end = int(self._offsets[row]), int(self._offsets[row + 1])
        line = os.pread(self._file.fileno(), end - begin, begin)  # leaves no position behind, so threads may share it
        try:
            id, contents = parse_line(line, str(self._path))
        except UserError:
            id, contents = "", ""
        if hashed(id) != int(self._keys.hashes[row]):
            raise RetrievalError(f"{self._path} was changed while it was searched: start again, to index it anew.")
        return passage(id, contents, score)

    def find(self, id: str) -> Passage | None:
        """The passage of this id, if there is one."""
        found = (self.passage(row) for row in self._keys.rows(id))
        return next((passage for passage in found if passage.id == id), None)


def _write_table(path: Path, folder: Path) -> None:
    offsets, hashes = array("q"), array("Q")
    for record in read_corpus(path):
        offsets.append(record.offset)
        hashes.append(hashed(record.id))
    for rows in KeyTable.write(hashes, folder, "ids"):
        _refuse_repeated(path, {offsets[row] for row in rows})
    offsets.append(path.stat().st_size)
    np.save(folder / "offsets.npy", np.frombuffer(offsets, dtype=np.int64))


def _refuse_repeated(path: Path, offsets: set[int]) -> None:
    """Raise if two of the records at these offsets have one id, and not only one hash."""
    seen: dict[str, int] = {}
    offset = 0
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if offset in offsets:
                id, _ = parse_line(line, f"{path}, line {number}")
                if id in seen:
                    raise UserError(
                        f"{path}, line {number}: the id {shortened(str(id))} was already given to line {seen[id]}. "
                        "Every passage needs an id of its own."
                    )
                seen[id] = number
            offset += len(line)


def check_corpus(corpus: str) -> Path:
    """The path of a corpus whose first passage can be read: what costs nothing to find out.

    Raises:
        UserError: It cannot.
    """
    path = Path(corpus).expanduser().absolute()
    next(read_corpus(path))
    return path


def _opened(path: Path) -> BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"corpus={str(path)!r} cannot be read ({error.strerror}). A corpus is {LAYOUT}.") from error
