"""The folder that is made: its files' bytes, and putting them in place whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from lit_agentrl.envs.search.facts.passages import Passage
from lit_agentrl.envs.search.facts.questions import Question
from lit_agentrl.errors import UserError
from lit_agentrl.files import sync_folder, write_text

MAKER = "lit-agentrl make-facts-qa"
MANIFEST = "manifest.json"


def corpus_lines(passages: Iterable[Passage]) -> str:
    """The corpus in Search-R1's layout: `id` and `contents`, which is the title in quotes, then the text."""
    return _lines({"id": passage.id, "contents": passage.contents} for passage in passages)


def question_lines(questions: Iterable[Question], passages: Mapping[str, Passage]) -> str:
    """Questions in Search-R1's layout, with what else is known of them."""
    return _lines(
        {
            "id": f"facts-{hashlib.sha256(question.text.encode()).hexdigest()[:12]}",
            "question": question.text,
            "golden_answers": list(question.answers),
            "type": question.kind,
            "data_source": "facts",
            "supporting_titles": [passages[gold].title for gold in question.gold],
            "gold_ids": list(question.gold),
            "template": question.template,
            "entities": list(question.entities),
        }
        for question in questions
    )


def _lines(objects: Iterable[Mapping[str, object]]) -> str:
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in objects)


def digest(text: str) -> str:
    """SHA-256 of a file with this text."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def check_free(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that is somebody else's, before any work.

    Raises:
        UserError: It is a file, or holds what this command did not make.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: give a new folder.")
    if any(folder.iterdir()) and not _is_ours(folder):
        more = " --overwrite replaces only folders that it made." if overwrite else ""
        raise UserError(f"{folder} is not empty, and {MAKER} did not make it: give a new folder.{more}")


def put(folder: Path, files: Mapping[str, str], overwrite: bool) -> bool:
    """Put the files in place as a whole; gives False where they are there already, byte for byte.

    All is written beside the folder and renamed, so that a kill leaves the old folder, the new one, or none (then the
    old one lies beside it as `NAME.old`).

    Raises:
        UserError: The folder holds other files, and overwriting was not asked for.
    """
    check_free(folder, overwrite)
    there = folder.exists() and any(folder.iterdir())
    if there and all(_has(folder / name, text) for name, text in files.items()):
        return False
    if there and not overwrite:
        raise UserError(
            f"{folder} holds a corpus of other options or packages (see its {MANIFEST}): give a new folder, or add "
            "--overwrite to replace it."
        )
    fresh, old = (folder.with_name(f"{folder.name}.{end}") for end in (f"tmp-{os.getpid()}", "old"))
    try:
        for name, text in files.items():
            write_text(fresh / name, text)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        fresh.rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return True


def _is_ours(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("maker") == MAKER


def _has(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes() == text.encode("utf-8")
