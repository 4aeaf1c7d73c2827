"""Writing to the run folder so that a kill at any moment leaves whole files behind."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lit_agentrl.errors import UserError

TEMPORARY_SUFFIX = ".tmp"


class DiskFullError(UserError, OSError):
    """There was no room for a file; the text names it, what is free and what to do."""


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """While `path` is written inside, the system's error for a full disk, which names no file, becomes `DiskFullError`.

    Clean up what was half written inside: what is free is looked up afterwards.
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise DiskFullError(f"{path} could not be written: {_what_is_free(path)}") from error


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a full disk or a spent quota is behind an error; torch and safetensors wrap what the system says."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if f"(os error {errno.ENOSPC})" in str(error):  # as Rust words it
            return True
        error = error.__cause__ or error.__context__
    return False


def _what_is_free(path: Path) -> str:
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    usage = shutil.disk_usage(folder)
    return (
        f"the disk is full, or your quota on it is spent. {usage.free / 2**20:.1f} MiB of "
        f"{usage.total / 2**20:.1f} MiB are free at {folder}. Make room there, or move the run's folder to a larger "
        "disk; then go on with the last checkpoint, which is whole."
    )


def replace_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then take its place: readers see the old file or the new one.

    The temporary file is in the same folder because a rename is atomic within one file system only.

    Raises:
        DiskFullError: There is no room for it; the old file is as it was.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())  # or a power cut may keep the rename and lose the contents
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace `path` atomically by UTF-8 text; lone surrogates, which some environments emit, become escapes."""
    replace_atomically(path, lambda file: file.write(text.encode("utf-8", errors="backslashreplace")))


def append_line(path: Path, line: str) -> None:
    """Append one line in a single write; a line that a kill cut in two stays alone on its own line."""
    with room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _append(path, line)


def _append(path: Path, line: str) -> None:
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = "\n" + line
        file.write((line + "\n").encode("utf-8", errors="backslashreplace"))
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable, where the system can sync a folder (POSIX)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
