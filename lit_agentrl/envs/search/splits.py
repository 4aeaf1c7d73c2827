"""Which question is in which split: by file, or by a hash of its id."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lit_agentrl.envs.search.questions import Question, read_questions
from lit_agentrl.errors import UserError
from lit_agentrl.types import Split

log = logging.getLogger(__name__)

Paths = str | list[str]
Table = Mapping[Split, Mapping[str, Question]]
"""The questions of every split by task id, in the order of their files."""


@dataclass(frozen=True)
class QuestionFiles:
    """Where questions are read from.

    A split has the files given for it. Without, it takes its share of the train files: which questions, a hash of
    source and id decides, so it depends neither on the other questions nor on their order.

    Args:
        train: Files of the train split, and of those without files of their own.
        val: Files of the val split.
        test: Files of the test split.
        val_share: Share of the train files for val.
        test_share: Share of the train files for test.

    Raises:
        UserError: No file is given, or a share is out of range.
    """

    train: tuple[str, ...]
    val: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    val_share: float = 0.1
    test_share: float = 0.1

    def __post_init__(self) -> None:
        if not self.train:
            raise UserError("questions is empty: name at least one question file.")
        for name, share in (("val_share", self.val_share), ("test_share", self.test_share)):
            if not 0 <= share < 1:
                raise UserError(f"{name}={share} must be at least 0 and below 1.")
        if self.val_share + self.test_share >= 1:
            raise UserError(f"val_share={self.val_share} and test_share={self.test_share} leave nothing for training.")

    @property
    def stamp(self) -> tuple[int, ...]:
        """When each file was last written; 0 for one that is not there."""
        paths = [Path(name).expanduser() for name in (*self.train, *self.val, *self.test)]
        return tuple(path.stat().st_mtime_ns if path.is_file() else 0 for path in paths)


def as_paths(paths: Paths | None) -> tuple[str, ...]:
    """One path or several as a tuple."""
    if paths is None:
        return ()
    return (paths,) if isinstance(paths, str) else tuple(paths)


def position(key: str) -> float:
    """A number in [0, 1) that only depends on the key."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64


@lru_cache(maxsize=8)
def question_table(files: QuestionFiles, stamp: tuple[int, ...]) -> Table:
    """Every question by split and task id: one table for all suites of a process whose files bear the same stamp.

    Raises:
        UserError: See `read_questions`.
    """

    def read(names: Sequence[str]) -> list[Question]:
        return read_questions([Path(name).expanduser() for name in names])

    val_share = 0.0 if files.val else files.val_share
    test_share = 0.0 if files.test else files.test_share
    found: dict[Split, list[Question]] = {"train": [], "val": read(files.val), "test": read(files.test)}
    for question in read(files.train):
        place = position(question.key)
        split: Split = "test" if place < test_share else "val" if place < test_share + val_share else "train"
        found[split].append(question)
    _report(found)
    return {split: {f"{split}-{q.key}": q for q in questions} for split, questions in found.items()}


def _report(found: Mapping[Split, Sequence[Question]]) -> None:
    """Say how many questions there are, and how many held-out ones are trained on word for word."""
    trained = {_plain(question.text) for question in found["train"]}
    repeated = {s: sum(_plain(q.text) in trained for q in found[s]) for s in found if s != "train"}
    log.info(
        "questions: %s; also asked in train: %s",
        ", ".join(f"{len(questions)} {split}" for split, questions in found.items()),
        ", ".join(f"{count} of {split}" for split, count in repeated.items()),
    )


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
