"""Question files: Parquet, JSON lines and JSON arrays, one record at a time, each with the place it stands at."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

from lit_agentrl.envs.webshop.json_stream import array_items, corrupt
from lit_agentrl.errors import UserError, missing_extra

Record = Mapping[str, object]

COLUMNS = (
    "id", "_id", "question", "answer", "golden_answers", "data_source", "type", "metadata", "supporting_facts",
    "supporting_titles", "prompt", "reward_model",
)  # fmt: skip
"""What is read of a Parquet file: other columns, such as HotpotQA's paragraphs, are passed over."""
SUFFIXES = (".parquet", ".jsonl", ".json")


def read_records(path: Path) -> Iterator[tuple[str, Record]]:
    """The records of a file, each with its place, such as "line 3"; lines, entries and rows count from 1.

    Raises:
        UserError: The file is missing, of another kind or broken, or a package is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: a question file ends in {', '.join(SUFFIXES)}, not in {path.suffix!r}.")
    if not path.is_file():
        raise UserError(f"{path} is not there. Give the path of a question file ({', '.join(SUFFIXES)}).")
    read = {".parquet": _rows, ".jsonl": _lines, ".json": _entries}[path.suffix]
    for place, item in read(path):
        if not isinstance(item, dict):
            raise UserError(f"{path}, {place}: a question must be an object with named fields, found {str(item)[:80]}.")
        yield place, item


def _lines(path: Path) -> Iterator[tuple[str, object]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise corrupt(path, number, str(error)) from error


def _entries(path: Path) -> Iterator[tuple[str, object]]:
    for number, item in enumerate(array_items(path), start=1):
        yield f"entry {number}", item


def _rows(path: Path) -> Iterator[tuple[str, object]]:
    if find_spec("pyarrow") is None:
        raise missing_extra("pyarrow", "parquet", f"Reading {path.name}")
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in COLUMNS]
            for batch in file.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path}, after row {number}: not the Parquet file it should be ({error}). Was the download cut? "
            "Fetch it again."
        ) from error
