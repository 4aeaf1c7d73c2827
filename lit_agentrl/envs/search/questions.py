"""Questions and their answers, from the layouts that the field's files have."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_agentrl.envs.search.records import Record, read_records
from lit_agentrl.errors import UserError


@dataclass(frozen=True, slots=True)
class Question:
    """Something to find out."""

    id: str
    """Unique within its source."""
    source: str
    """Where it is from, such as "hotpotqa"."""
    text: str
    answers: tuple[str, ...]
    """The answer in every spelling that counts; at least one."""
    type: str = ""
    """What sort of question it is within its source, such as "bridge"."""
    titles: tuple[str, ...] = ()
    """The pages that the answer takes, where that is known."""

    @property
    def key(self) -> str:
        """Source and id: unique among all questions."""
        return f"{self.source}/{self.id}"

    @property
    def kind(self) -> str:
        """Source and type, by which success is reported apart."""
        return f"{self.source}/{self.type}" if self.type else self.source


def read_questions(paths: Iterable[Path]) -> list[Question]:
    """The questions of the files, in order.

    Raises:
        UserError: A file is broken or empty, a record has no question or no answer, or one id comes twice.
    """
    seen: dict[str, str] = {}
    found: list[Question] = []
    for path in paths:
        empty = True
        for place, record in read_records(path):
            empty, question, where = False, parse_record(record, path, place), f"{path}, {place}"
            if question.key in seen:
                raise UserError(
                    f"{where}: the id {question.key!r} was already given to {seen[question.key]}. Every question of a "
                    "source needs an id of its own; without an `id` field, its place is taken."
                )
            seen[question.key] = where
            found.append(question)
        if empty:
            raise UserError(f"{path} holds no question.")
    return found


def parse_record(record: Record, path: Path, place: str) -> Question:
    """The question of a record of the file at `path`.

    Raises:
        UserError: It has no question or no answer.
    """
    metadata = record.get("metadata")
    more = metadata if isinstance(metadata, Mapping) else {}
    source = _text(record.get("data_source")) or path.stem
    id = _text(record.get("id")) or _text(record.get("_id")) or f"{path.stem}-{place.rpartition(' ')[2]}"
    text, answers = _question(record), _answers(record)
    for name, missing, fields in (
        ("question", not text, "`question`, or `prompt` with a message that ends in `Question: ...`"),
        ("answer", not answers, "`golden_answers`, `answer`, or `reward_model` with `ground_truth.target`"),
    ):
        if missing:
            raise UserError(
                f"{path}, {place}: there is no {name}. It is looked for in {fields}; the record has "
                f"{', '.join(sorted(map(str, record))) or 'no fields'}."
            )
    type = _text(record.get("type")) or _text(more.get("type"))
    facts = record.get("supporting_titles") or record.get("supporting_facts") or more.get("supporting_facts")
    return Question(id, source, text, answers, type, _titles(facts))


def _question(record: Record) -> str:
    """The question itself; of a processed file without it, what the last user message asks."""
    if text := _text(record.get("question")):
        return text
    prompt = record.get("prompt")
    contents = [m["content"] for m in prompt if isinstance(m, Mapping) and isinstance(m.get("content"), str)] if (
        isinstance(prompt, Sequence) and not isinstance(prompt, str)
    ) else []  # fmt: skip
    return contents[-1].rpartition("Question:")[2].strip() if contents and "Question:" in contents[-1] else ""


def _answers(record: Record) -> tuple[str, ...]:
    """Every spelling of the answer, without repetition."""
    found = record.get("golden_answers")
    if found is None:
        found = record.get("answer")
    if found is None:
        found = _inner(_inner(record.get("reward_model"), "ground_truth"), "target")
    given = found if isinstance(found, list | tuple) else [found]
    return tuple(dict.fromkeys(text for item in given if (text := _text(item))))


def _titles(facts: object) -> tuple[str, ...]:
    """Titles, from a list of them, from pairs of title and sentence, or from columns as Hugging Face keeps pairs."""
    if isinstance(facts, Mapping):
        facts = facts.get("title")
    if not isinstance(facts, list | tuple):
        return ()
    names = (fact[0] if isinstance(fact, list | tuple) and fact else fact for fact in facts)
    return tuple(dict.fromkeys(text for name in names if isinstance(name, str) and (text := _text(name))))


def _inner(value: object, key: str) -> object:
    return value.get(key) if isinstance(value, Mapping) else None


def _text(value: object) -> str:
    """A value as text; empty for what is none. Truth values, as StrategyQA's answers are, become yes and no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and math.isnan(value):  # how tables mark what is missing
        return ""
    return str(value).strip() if isinstance(value, str | int | float) else ""
