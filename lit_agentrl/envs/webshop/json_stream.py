"""Large JSON files, one value at a time: the full catalogue has 1.1 million products in a single array."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from lit_agentrl.errors import UserError

CHUNK = 1 << 20
"""Characters read at a time."""
LONGEST_VALUE = 64 << 20
"""Characters that one product may have; more means that a quote or a bracket is missing."""
LONGEST_TAIL = 16
"""Characters before the window's end that may look wrong because the window cuts them: `tru`, `\\u00`, `-3.`."""

_SPACE = re.compile(r"\s*")
_DECODER = json.JSONDecoder()


def array_items(path: Path) -> Iterator[object]:
    """The values of the array that the file holds; memory is bounded by the longest of them.

    Raises:
        UserError: The file is no JSON array, or breaks off; the text names the line.
    """
    with path.open(encoding="utf-8-sig") as file:
        stream = _Stream(path, file)
        stream.take("[")
        if stream.peek() != "]":
            yield stream.value()
            while stream.take(",", "]") == ",":
                yield stream.value()
        else:
            stream.take("]")
        stream.end()


def object_items(path: Path) -> Iterator[tuple[str, object]]:
    """The keys and values of the object that the file holds, as `array_items` reads arrays."""
    with path.open(encoding="utf-8-sig") as file:
        stream = _Stream(path, file)
        stream.take("{")
        if stream.peek() != "}":
            yield stream.pair()
            while stream.take(",", "}") == ",":
                yield stream.pair()
        else:
            stream.take("}")
        stream.end()


def lines(path: Path) -> Iterator[object]:
    """The values of a JSON-lines file; empty lines are passed over."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise corrupt(path, number, str(error)) from error


def corrupt(path: Path, line: int, reason: str) -> UserError:
    """The error for a file that cannot be read on."""
    return UserError(
        f"{path}, line {line}: not the JSON it should be ({reason}). Was the download cut? Fetch it again."
    )


class _Stream:
    """A window on the file: what is decoded is forgotten."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self.path, self.file = path, file
        self.text, self.at, self.line = "", 0, 1

    def peek(self) -> str:
        """The next character that is no white space; empty at the end of the file."""
        while True:
            match = _SPACE.match(self.text, self.at)
            assert match is not None
            self.at = match.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def take(self, *expected: str) -> str:
        """Step over one of the expected characters."""
        found = self.peek()
        if found not in expected:
            wanted = " or ".join(map(repr, expected))
            raise corrupt(
                self.path, self._line_at(self.at), f"{wanted} expected, found {found or 'the end of the file'!r}"
            )
        self.at += 1
        return found

    def pair(self) -> tuple[str, object]:
        """A key, its colon and its value."""
        key = self.value()
        if not isinstance(key, str):
            raise corrupt(self.path, self._line_at(self.at), f"a key must be text, found {key!r}")
        self.take(":")
        return key, self.value()

    def value(self) -> object:
        """The next value, read to its end."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except RecursionError as error:
                raise corrupt(self.path, self._line_at(self.at), "nested too deeply") from error
            except json.JSONDecodeError as error:
                line = self._line_at(error.pos)
                if not self._is_cut(error) or not self._more():
                    raise corrupt(self.path, line, error.msg) from error
                continue
            if isinstance(value, int | float) and len(self.text) - end < LONGEST_TAIL and self._more():
                continue  # "-3" may be the beginning of "-3.5e2"
            self.at = end
            decoded: object = value
            return decoded

    def end(self) -> None:
        """Refuse anything after the end."""
        if rest := self.peek():
            raise corrupt(self.path, self._line_at(self.at), f"the end of the file expected, found {rest!r}")

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether more text may mend the error: it lies at the window's end, or in a string that goes beyond it."""
        at_the_end = error.pos >= len(self.text) - LONGEST_TAIL or error.msg.startswith("Unterminated string")
        return at_the_end and len(self.text) - self.at < LONGEST_VALUE

    def _more(self) -> bool:
        """Move the window on; False at the end of the file, where nothing moves."""
        try:
            chunk = self.file.read(CHUNK)
        except UnicodeDecodeError as error:
            raise corrupt(self.path, self._line_at(len(self.text)), str(error)) from error
        if chunk:
            self.line = self._line_at(self.at)
            self.text, self.at = self.text[self.at :] + chunk, 0
        return bool(chunk)

    def _line_at(self, position: int) -> int:
        return self.line + self.text.count("\n", 0, position)
