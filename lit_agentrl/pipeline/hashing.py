"""The content of files and folders as a hash."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from lit_agentrl.cache import REMEMBERED_BYTES, SETTLED_SECONDS, cache_dir, content_digest
from lit_agentrl.files import TEMPORARY_SUFFIX, write_text

IGNORED = {".DS_Store", "__pycache__"}


def content_hash(path: str | Path) -> str | None:
    """SHA-256 of a file's bytes, or of a folder's relative names and bytes; None where there is nothing.

    Times, owners and modes do not count; links count as what they lead to. Files and folders of more than 16 MB are
    read again only when a size or a time in them has changed.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return content_digest(place)
    if not place.is_dir():
        return None
    files = dict(sorted(_files(place, set())))
    if sum(stat.st_size for stat in files.values()) < REMEMBERED_BYTES:
        return _of_folder(place, files)
    note = cache_dir() / "digests" / f"folder-{_signature(place, files)}"
    if note.is_file():
        return note.read_text()
    newest = max(max(stat.st_mtime, stat.st_ctime) for stat in files.values())
    found = _of_folder(place, files)
    if time.time() - newest > SETTLED_SECONDS:
        with contextlib.suppress(OSError):  # a cache that can only be read
            write_text(note, found)
    return found


def short(digest: str | None) -> str:
    """The beginning of a hash, for people."""
    return "nothing" if digest is None else digest[:12]


def _of_folder(folder: Path, files: dict[str, os.stat_result]) -> str:
    whole = hashlib.sha256()
    for name in files:
        whole.update(f"{name}\0{content_digest(folder / name)}\n".encode("utf-8", "surrogateescape"))
    return whole.hexdigest()


def _signature(folder: Path, files: dict[str, os.stat_result]) -> str:
    """A hash of all that shows, without reading, that a file was changed."""
    whole = hashlib.sha256(str(folder.resolve()).encode("utf-8", "surrogateescape"))
    for name, s in files.items():
        line = f"{name}\0{s.st_dev} {s.st_ino} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}\n"
        whole.update(line.encode("utf-8", "surrogateescape"))
    return whole.hexdigest()[:32]


def _files(folder: Path, above: set[str], prefix: str = "") -> Iterator[tuple[str, os.stat_result]]:
    """The relative names of all files, through links but in no circles."""
    real = os.path.realpath(folder)
    if real in above:
        return
    for entry in os.scandir(folder):
        if entry.name in IGNORED or entry.name.endswith(TEMPORARY_SUFFIX):
            continue
        if entry.is_dir():
            yield from _files(folder / entry.name, above | {real}, f"{prefix}{entry.name}/")
        elif entry.is_file():
            yield f"{prefix}{entry.name}", entry.stat()
