"""Whether a checkpoint is whole, found out without loading it, and which one to go on from where it is not."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from lit_agentrl.files import write_text

MANIFEST = "manifest.json"
"""The names and sizes of a folder's files, written last: a folder without it was never finished."""
META = "meta.pt"
"""What Lightning keeps beside the shards."""
READ_WHOLE = 2 * 2**30
"""Bytes up to which every byte of a file is checked (a second or two); above, its structure and length alone."""


def is_folder(path: Path) -> bool:
    """Whether a checkpoint is a folder of shards."""
    return path.is_dir()


def write_manifest(folder: Path) -> None:
    """Say which files belong to a sharded checkpoint, and how long they are."""
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.name != MANIFEST}
    write_text(folder / MANIFEST, json.dumps(sizes, indent=1) + "\n")


def damage(path: Path) -> str:
    """What is wrong with a checkpoint; empty where nothing is."""
    try:
        if not path.exists():
            return "it does not exist"
        return _folder_damage(path) if is_folder(path) else _file_damage(path)
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"


def newest_whole(folder: Path, *, but: Path | None = None) -> Path | None:
    """The newest checkpoint of `folder` that is whole, none of those that are the same as `but`."""
    found = [path for path in folder.glob("*.ckpt") if but is None or not _is_same(path, but)]
    # in the order that they were written; of one iteration's two names the one that tells the number
    for path in sorted(found, key=lambda path: (_written(path), path.stem != "last"), reverse=True):
        if not damage(path):
            return path
    return None


def _file_damage(path: Path) -> str:
    size = path.stat().st_size
    if size == 0:
        return "it is empty"
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return "it is no file that torch.save wrote"
    try:
        with zipfile.ZipFile(path) as archive:
            if size <= READ_WHOLE and (broken := archive.testzip()) is not None:
                return f"its part {broken} is damaged"
            if not archive.namelist():
                return "it holds nothing"
    except zipfile.BadZipFile:
        return f"it is cut off: {size} bytes without the end that torch.save writes"
    return ""


def _folder_damage(folder: Path) -> str:
    manifest = folder / MANIFEST
    if not manifest.is_file():
        # one that Lightning alone wrote has no manifest; without META it was not finished either
        return "" if (folder / META).is_file() else f"it was not finished: {META} is missing"
    sizes: dict[str, int] = json.loads(manifest.read_text())
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            return f"its file {name} is missing"
        if (found := file.stat().st_size) != size:
            return f"its file {name} has {found} bytes instead of {size}"
    return _file_damage(folder / META)


def _is_same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def _written(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0  # a link to nothing
