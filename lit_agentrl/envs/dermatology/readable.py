"""Which image files of a layout can be read: found at the start, not in the middle of training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lit_agentrl.errors import ImageError
from lit_agentrl.images import decode, image_ref

WORKERS = 8
"""Pillow lets go of the interpreter while it decodes."""


def unreadable(files: Iterable[Path]) -> Mapping[Path, str]:
    """The files that cannot be decoded, each with what is wrong with it, in the order given."""
    paths = list(dict.fromkeys(files))
    with ThreadPoolExecutor(WORKERS) as pool:
        return {path: fault for path, fault in zip(paths, pool.map(_fault, paths), strict=True) if fault}


def _fault(path: Path) -> str:
    """What is wrong with a file; empty where it can be decoded."""
    try:
        decode(image_ref(path))
    except ImageError as error:
        return str(error)
    return ""
