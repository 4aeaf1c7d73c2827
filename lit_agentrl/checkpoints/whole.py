"""Whether a checkpoint is whole, found out without loading it, and which one to go on from where it is not."""

from __future__ import annotations

import json
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from lit_agentrl.files import write_text

MANIFEST = "manifest.json"
"""The names, sizes and checksums of a folder's files, written last: a folder without it was never finished."""
META = "meta.pt"
"""What Lightning keeps beside the shards."""
READ_WHOLE = 2 * 2**30
"""Bytes up to which every byte of a checkpoint is checked (a second or two); above, its structure and length alone."""


def is_folder(path: Path) -> bool:
    """Whether a checkpoint is a folder of shards."""
    return path.is_dir()


def write_manifest(folder: Path) -> None:
    """Say which files belong to a sharded checkpoint, how long they are and, where they are small, what is in them."""
    files = [file for file in sorted(folder.iterdir()) if file.name != MANIFEST]
    sizes = {file.name: file.stat().st_size for file in files}
    sums = {file.name: _checksum(file) for file in files} if sum(sizes.values()) <= READ_WHOLE else {}
    write_text(folder / MANIFEST, json.dumps({"bytes": sizes, "crc32": sums}, indent=1) + "\n")


def damage(path: Path, *, thorough: bool = True) -> str:
    """What is wrong with a checkpoint; empty where nothing is.

    Args:
        path: A file, or a folder of shards.
        thorough: Also read all of a checkpoint of less than `READ_WHOLE`.
    """
    try:
        if not path.exists():
            return "it does not exist"
        return _folder_damage(path, thorough) if is_folder(path) else _file_damage(path, thorough)
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"


def num_iterations(path: Path) -> int | None:
    """How many iterations a whole checkpoint holds, without reading its weights; None where it does not say."""
    try:
        source = path / META if is_folder(path) else path
        checkpoint: dict[str, Any] = torch.load(source, map_location="cpu", mmap=True, weights_only=True)
        return int(checkpoint["epoch"]) + 1
    except (OSError, RuntimeError, pickle.UnpicklingError, KeyError, TypeError, ValueError):
        return None


def newest_whole(folder: Path, *, but: Path | None = None) -> Path | None:
    """The newest checkpoint of `folder` that is whole, none of those that are the same as `but`."""
    found = [path for path in folder.glob("*.ckpt") if but is None or not _is_same(path, but)]
    # in the order that they were written; of one iteration's two names the one that tells the number
    for path in sorted(found, key=lambda path: (_written(path), path.stem != "last"), reverse=True):
        if not damage(path):
            return path
    return None


def _file_damage(path: Path, thorough: bool = True) -> str:
    size = path.stat().st_size
    if size == 0:
        return "it is empty"
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return "it is no file that torch.save wrote"
    try:
        with zipfile.ZipFile(path) as archive:
            if thorough and size <= READ_WHOLE and (broken := archive.testzip()) is not None:
                return f"its part {broken} is damaged"
            if not archive.namelist():
                return "it holds nothing"
    except zipfile.BadZipFile:
        return f"it is cut off: {size} bytes without the end that torch.save writes"
    return ""


def _folder_damage(folder: Path, thorough: bool) -> str:
    manifest = folder / MANIFEST
    if not manifest.is_file():
        # one that Lightning alone wrote has no manifest; without META it was not finished either
        return "" if (folder / META).is_file() else f"it was not finished: {META} is missing"
    try:
        listed: dict[str, dict[str, int]] = json.loads(manifest.read_bytes())
        sizes, sums = listed["bytes"], listed["crc32"]
    except (ValueError, KeyError, TypeError):
        return f"its {MANIFEST} is damaged"
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            return f"its file {name} is missing"
        if (found := file.stat().st_size) != size:
            return f"its file {name} has {found} bytes instead of {size}"
        if thorough and name in sums and _checksum(file) != sums[name]:
            return f"its file {name} is not what was written"
    return _file_damage(folder / META, thorough)


def _checksum(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            found = zlib.crc32(block, found)
    return found


def _is_same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def _written(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0  # a link to nothing
