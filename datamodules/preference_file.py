"""Preference files: JSONL of pairs, in TRL's conversational or plain format, with images by path and content."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from lit_agentrl.errors import UserError
from lit_agentrl.images import ImageRef, image_ref

FIELDS = ("prompt", "chosen", "rejected")
EXAMPLE = (
    '{"prompt": [{"role": "user", "content": ...}], "chosen": [{"role": "assistant", "content": ...}], "rejected": '
    "[...]}, or all three as plain texts"
)


@dataclass(frozen=True, slots=True)
class Preference:
    """One pair of answers to one prompt."""

    place: str
    """Where it stands, `file:line`, for messages."""
    system: str
    turns: tuple[str, ...]
    """What was said by the user and the assistant in turns, the user first and last."""
    chosen: str
    rejected: str
    images: tuple[ImageRef, ...] = ()
    """What the first turn shows."""


def read_preferences(path: Path) -> list[Preference]:
    """The pairs of a JSONL file, one a line that is not blank.

    Raises:
        UserError: There is no such file or no pair in it, or a line is none; the text says which and why.
    """
    if not path.is_file():
        raise UserError(f"No preference file {str(path)!r}. Give a JSONL file with one pair a line: {EXAMPLE}.")
    with path.open(encoding="utf-8") as lines:
        pairs = [_parse(line, f"{path}:{number}", path) for number, line in enumerate(lines, 1) if line.strip()]
    if not pairs:
        raise UserError(f"{path} holds no pair. If it was mined, see what the filters left out.")
    return pairs


def _parse(line: str, place: str, path: Path) -> Preference:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON ({error}). A cut last line means that its writer was killed.") from None
    if not isinstance(record, dict):
        raise UserError(f"{place}: a pair is an object, {EXAMPLE}.")
    missing = [name for name in FIELDS if name not in record]
    if missing:
        raise UserError(f"{place}: the field {missing[0]!r} is missing; a pair has {', '.join(FIELDS)}: {EXAMPLE}.")
    prompt = _messages(record["prompt"], "user", f"{place}: prompt")
    chosen, rejected = (_answer(record[name], f"{place}: {name}") for name in ("chosen", "rejected"))
    if chosen.strip() == rejected.strip():
        raise UserError(f"{place}: chosen and rejected are the same answer, {_short(chosen)}: nothing is preferred.")
    system = prompt.pop(0).text if prompt[0].role == "system" else ""
    roles = [message.role for message in prompt]
    if roles != ["user", "assistant"] * (len(prompt) // 2) + ["user"]:
        raise UserError(
            f"{place}: the prompt's roles {roles} must be user and assistant in turns, ending with user, after an "
            "optional system message."
        )
    images = _images(record.get("images") or [], place, path.parent)
    if any(message.num_images for message in prompt[1:]):
        raise UserError(f"{place}: images must be in the first user message.")
    if prompt[0].num_images not in (None, len(images)):
        raise UserError(f"{place}: the prompt shows {prompt[0].num_images} images, but `images` holds {len(images)}.")
    return Preference(place, system, tuple(message.text for message in prompt), chosen, rejected, images)


@dataclass(frozen=True, slots=True)
class _Message:
    role: str
    text: str
    num_images: int | None
    """The images among its parts; None where it is a plain text."""


def _answer(value: Any, what: str) -> str:
    messages = _messages(value, "assistant", what)
    if [(m.role, m.num_images or 0) for m in messages] != [("assistant", 0)]:
        raise UserError(f"{what} must be one assistant message of text, not {[m.role for m in messages]}.")
    if not messages[0].text.strip():
        raise UserError(f"{what} is empty: an answer needs a word.")
    return messages[0].text


def _messages(value: Any, role: str, what: str) -> list[_Message]:
    """The messages of a prompt or an answer; a plain text is one of `role`."""
    if isinstance(value, str):
        return [_Message(role, value, None)]
    if not isinstance(value, list) or not value:
        raise UserError(f"{what} must be a text or a list of messages, not {_short(value)}.")
    messages = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise UserError(f"{what}: {_short(message)} is no message; one has `role` and `content`.")
        messages.append(_Message(message["role"], *_text(message["content"], what)))
    return messages


def _text(content: Any, what: str) -> tuple[str, int | None]:
    """The text of a message, and how many images its parts show."""
    if isinstance(content, str):
        return content, None
    if not isinstance(content, list) or not all(isinstance(part, dict) and "type" in part for part in content):
        raise UserError(f"{what}: `content` must be a text or a list of parts with a `type`, not {_short(content)}.")
    types = [part["type"] for part in content]
    num_images = types.count("image")
    texts = [part.get("text") for part in content[num_images:]]
    if types != ["image"] * num_images + ["text"] * len(texts) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{what}: parts of types {types}; allowed are images, then texts.")
    return "".join(str(text) for text in texts), num_images


def _images(value: Any, place: str, folder: Path) -> tuple[ImageRef, ...]:
    if not isinstance(value, list):
        raise UserError(f"{place}: `images` must be a list, not {_short(value)}.")
    return tuple(_image(image, place, folder) for image in value)


def _image(value: Any, place: str, folder: Path) -> ImageRef:
    given = {"path": value} if isinstance(value, str) else value
    if not isinstance(given, dict) or not isinstance(given.get("path"), str):
        raise UserError(f"{place}: {_short(value)} is no image; one is a path, or {{'path': ..., 'sha256': ...}}.")
    file = folder / given["path"]  # an absolute path stays itself
    if not file.is_file():
        raise UserError(f"{place}: there is no image {str(file)!r}. Relative paths start at the preference file.")
    stat = file.stat()
    try:
        image = _reference(file, stat.st_size, stat.st_mtime_ns)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    if given.get("sha256") not in (None, image.sha256):
        raise UserError(
            f"{place}: {file} has the SHA-256 {image.sha256}, not {given['sha256']}: it is not the image that the pair "
            "is about. Bring the image back, or mine the pairs anew."
        )
    return image


@lru_cache(maxsize=4096)
def _reference(file: Path, size: int, changed: int) -> ImageRef:
    """A file as it is now: pairs share images, and each is hashed once."""
    return image_ref(file)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
