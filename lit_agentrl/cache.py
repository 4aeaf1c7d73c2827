"""Where downloaded and converted files are kept between runs, and how they get there whole."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lit_agentrl.errors import UserError
from lit_agentrl.files import sync_folder, write_text

REMEMBERED_BYTES = 16 << 20
"""Larger files are not hashed anew by every process."""
SETTLED_SECONDS = 2.0
"""A file changed later than this ago may change again without its time of change showing it."""


def cache_dir() -> Path:
    """The folder for files that can be made again: $LIT_AGENTRL_CACHE, else lit-agentrl in $XDG_CACHE_HOME or ~/.cache.

    It is not created here. An empty variable counts as unset, as the XDG base directory specification asks.
    """
    if own := os.environ.get("LIT_AGENTRL_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "lit-agentrl"


@contextmanager
def one_process(lock: Path) -> Iterator[None]:
    """Let one process of the machine in at a time; the system frees the lock of a killed one."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def built_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, filled by `build` where it is not there yet; it is never seen half filled.

    One process of the machine builds while the others wait, in a folder beside it that is then renamed. What a killed
    build left behind is removed by the next.

    Raises:
        UserError: The folder around it cannot be written to; or whatever `build` raises.
    """
    if not folder.exists():
        lock = folder.with_name(folder.name + ".lock")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock.touch()
        except OSError as error:
            raise UserError(
                f"{folder.parent} cannot be written to ({error.strerror}). Set $LIT_AGENTRL_CACHE to a folder that can."
            ) from error
        with one_process(lock):
            if not folder.exists():  # another process may have built it while this one waited
                _build(folder, build)
    return folder


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    for left_over in folder.parent.glob(f".{folder.name}-*"):  # of a killed process: this one holds the lock
        shutil.rmtree(left_over, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        build(temporary)
        for path in filter(Path.is_file, temporary.rglob("*")):
            with path.open("rb") as file:
                os.fsync(file.fileno())  # or a power cut may keep the rename and lose the contents
        temporary.chmod(0o755)  # mkdtemp's 0700 would hide a shared cache from its other users
        os.rename(temporary, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def content_digest(path: Path) -> str:
    """The SHA-256 of a file, hexadecimal; that of a large one is remembered for as long as the file does not change."""
    stat = path.stat()
    if stat.st_size < REMEMBERED_BYTES:
        return _sha256(path)
    known = f"{path.resolve()}\n{stat.st_dev} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
    note = cache_dir() / "digests" / hashlib.sha256(known.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    if note.exists():
        return note.read_text()
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        with one_process(note.parent / "lock"):  # or all workers of a run would read the file at a time
            if not note.exists() and time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED_SECONDS:
                write_text(note, _sha256(path))
        return note.read_text() if note.exists() else _sha256(path)
    except PermissionError:  # a cache that can only be read
        return _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
