"""LLaVA-style conversations: `{"image": ..., "conversations": [{"from": "human", "value": ...}, ...]}`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lit_agentrl.envs.dermatology.labels import CODES, DISEASES, label_name, name_table, plain
from lit_agentrl.envs.dermatology.parser import AnswerParser
from lit_agentrl.envs.dermatology.samples import Sample
from lit_agentrl.envs.dermatology.selection import Selection
from lit_agentrl.envs.dermatology.source import FileSource, Listing
from lit_agentrl.envs.dermatology.splits import Record
from lit_agentrl.errors import UserError

PLACEHOLDER = "<image>"
"""Where LLaVA's texts have the image. It is taken out: images stand before the text of their turn."""
ROLES: Mapping[str, str] = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Dialogue:
    """One record."""

    id: str
    image: str | None
    """As the file writes it; None for a conversation without one."""
    label: str
    """What the field `label` says; empty where there is none."""
    system: str
    turns: tuple[tuple[str, str], ...]
    """Questions and answers, at least one pair."""


def read_dialogues(path: Path) -> list[Dialogue]:
    """All records of a JSON array or of JSON lines.

    Raises:
        UserError: The file is missing, empty or broken, a record is not as it should be, or an id comes twice.
    """
    found: dict[str, Dialogue] = {}
    for place, record in _records(path):
        dialogue = _dialogue(record, f"{path}, {place}", place.rpartition(" ")[2])
        if dialogue.id in found:
            raise UserError(f"{path}, {place}: the id {dialogue.id!r} came before. Every record needs its own.")
        found[dialogue.id] = dialogue
    if not found:
        raise UserError(f"{path} holds no conversation.")
    return list(found.values())


class LlavaImages(FileSource):
    """The images and the first questions of a LLaVA-style file.

    A record's disease is its field `label`, else the one that its answers name, where they name one; records of no
    known disease are left out and counted. All records of one image are in one split.

    Args:
        path: The `.json` or `.jsonl` file.
        image_root: What the records' image paths are relative to; None for the file's folder.
        select: Which images are used, and in which split. Without `labels`, HAM10000's count.

    Raises:
        UserError: The file is missing or not as it should be.
    """

    codes = CODES

    def __init__(
        self,
        path: str,
        image_root: str | None = None,
        select: Selection = Selection(),  # noqa: B008  # frozen
    ) -> None:
        super().__init__(select)
        self._path = Path(path).expanduser()
        self._root = self._path.parent if image_root is None else Path(image_root).expanduser()

    @property
    def where(self) -> str:
        """The loader and its file."""
        return f"{type(self).__name__} ({self._path})"

    def listing(self) -> Listing:
        """Every record with an image and a disease, with its first question and answer."""
        parser = AnswerParser(self.select.labels or DISEASES, strict=False)
        names = name_table(self.select.names, self.codes)
        records: list[Record] = []
        missing: list[str] = []
        unknown = without = 0
        for dialogue in read_dialogues(self._path):
            label = label_name(dialogue.label, names) if plain(dialogue.label) else _named(parser, dialogue)
            if dialogue.image is None:
                without += 1
            elif not (self._root / dialogue.image).is_file():
                missing.append(dialogue.image)
            elif not label:
                unknown += 1
            else:
                question, answer = dialogue.turns[0]
                sample = Sample(dialogue.id, self._root / dialogue.image, label, question, answer)
                records.append(Record(sample, (f"file {dialogue.image}",)))
        return Listing(records, missing, notes={"without an image": without, "of no known disease": unknown})


def _named(parser: AnswerParser, dialogue: Dialogue) -> str:
    """The one disease that the answers name; empty where they name none, or several."""
    named = {label for _, answer in dialogue.turns if (label := parser(answer))}
    return named.pop() if len(named) == 1 else ""


def _records(path: Path) -> Iterator[tuple[str, object]]:
    """The objects of the file, each with its place; entries and lines count from 1."""
    if not path.is_file():
        raise UserError(f"{path} is not there. Give a .json or .jsonl file of conversations.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8 ({error}).") from error
    place = "the file"
    try:
        if text.lstrip().startswith("["):
            yield from ((f"entry {number}", item) for number, item in enumerate(json.loads(text), start=1))
            return
        for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand in a text
            place = f"line {number}"
            if line.strip():
                yield place, json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}, {place}: not JSON ({error}). It must be an array, or one object a line.") from None


def _dialogue(record: object, where: str, number: str) -> Dialogue:
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise UserError(f"{where}: not a conversation; expected {{'image': ..., 'conversations': [...]}}.")
    messages = [_message(item, where) for item in record["conversations"]]
    system = messages.pop(0)[1] if messages and messages[0][0] == "system" else ""
    roles = [role for role, _ in messages]
    if not messages or roles != ["user", "assistant"] * (len(messages) // 2):
        raise UserError(f"{where}: the turns are from {roles}; human and gpt must take turns, ending with gpt.")
    texts = [text for _, text in messages]
    if empty := [number for number, text in enumerate(texts[1::2], start=1) if not text]:
        raise UserError(f"{where}: answer {empty[0]} is empty.")
    image = record.get("image")
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    if image is not None and (not isinstance(image, str) or not image):
        raise UserError(f"{where}: image={str(image)[:80]!r} must be one path.")
    label = record.get("label", "")
    id = record.get("id", number)
    return Dialogue(str(id), image, str(label or ""), system, tuple(zip(texts[::2], texts[1::2], strict=True)))


def _message(item: object, where: str) -> tuple[str, str]:
    if not isinstance(item, dict) or not isinstance(item.get("from"), str) or not isinstance(item.get("value"), str):
        raise UserError(f"{where}: a turn must be {{'from': 'human' or 'gpt', 'value': text}}, found {str(item)[:80]}.")
    role = ROLES.get(item["from"], item["from"])
    return role, item["value"].replace(PLACEHOLDER, "").strip()
