"""The content of files and folders as a hash."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from lit_agentrl.cache import content_digest
from lit_agentrl.files import TEMPORARY_SUFFIX

IGNORED = {".DS_Store", "__pycache__"}


def content_hash(path: str | Path) -> str | None:
    """SHA-256 of a file's bytes, or of a folder's relative names and bytes; None where there is nothing.

    Times, owners and modes do not count; links count as what they lead to. Files of more than 16 MB are read again only
    when their size or time has changed.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return content_digest(place)
    if not place.is_dir():
        return None
    whole = hashlib.sha256()
    for name in sorted(_names(place, set())):
        whole.update(f"{name}\0{content_digest(place / name)}\n".encode("utf-8", "surrogateescape"))
    return whole.hexdigest()


def short(digest: str | None) -> str:
    """The beginning of a hash, for people."""
    return "nothing" if digest is None else digest[:12]


def _names(folder: Path, above: set[str], prefix: str = "") -> Iterator[str]:
    """The relative names of all files, through links but in no circles."""
    real = os.path.realpath(folder)
    if real in above:
        return
    for entry in os.scandir(folder):
        if entry.name in IGNORED or entry.name.endswith(TEMPORARY_SUFFIX):
            continue
        if entry.is_dir():
            yield from _names(folder / entry.name, above | {real}, f"{prefix}{entry.name}/")
        elif entry.is_file():
            yield f"{prefix}{entry.name}"
