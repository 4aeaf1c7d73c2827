"""The file that mining leaves, and the one that it goes on from when it was stopped."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_agentrl.errors import UserError
from lit_agentrl.files import append_line, write_text

Record = dict[str, Any]
"""One line of a preference file."""


@dataclass(slots=True)
class Chunk:
    """What a few tasks gave."""

    records: list[Record] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    """Pairs that were left out, by reason; `tasks` and `candidates`."""


class PairStore:
    """Keeps what was mined so far beside the file to come, and writes that one whole.

    Args:
        output: The preference file.
        fingerprint: A hash of all that decides the pairs: what was begun with another one is not gone on with.
    """

    def __init__(self, output: Path, fingerprint: str) -> None:
        self.output, self.fingerprint = output, fingerprint
        self.part = output.with_name(output.name + ".part")
        self.summary = output.with_name(output.stem + ".summary.json")

    def finished(self) -> bool:
        """Whether the file is there, mined with just these options.

        Raises:
            UserError: It is, but mined with others, or by hand.
        """
        if not self.output.exists():
            return False
        try:
            same = json.loads(self.summary.read_text(encoding="utf-8")).get("fingerprint") == self.fingerprint
        except (OSError, ValueError, AttributeError):
            same = False
        if not same:
            raise UserError(
                f"{self.output} is there already, and was not mined with these options. Delete it, or write elsewhere "
                "with --mine.output FILE."
            )
        return True

    def chunks(self) -> dict[int, Chunk]:
        """What an earlier run mined before it was stopped, by number.

        Raises:
            UserError: It was run with other options.
        """
        if not self.part.exists():
            append_line(self.part, json.dumps({"fingerprint": self.fingerprint}))
            return {}
        found: dict[int, Chunk] = {}
        header, *lines = self.part.read_text(encoding="utf-8").split("\n")  # not splitlines: a reply may hold U+2028
        if _parsed(header).get("fingerprint") != self.fingerprint:
            raise UserError(
                f"{self.part} was begun with other options. Delete it to mine anew, or write elsewhere with "
                "--mine.output FILE."
            )
        for line in lines:
            if "chunk" in (chunk := _parsed(line)):  # else a kill cut the line
                found[int(chunk["chunk"])] = Chunk(chunk["records"], Counter(chunk["counts"]))
        return found

    def add(self, number: int, chunk: Chunk) -> None:
        """Keep a chunk, durably."""
        line = {"chunk": number, "records": chunk.records, "counts": chunk.counts}
        append_line(self.part, json.dumps(line, ensure_ascii=False))

    def finish(self, records: list[Record], summary: Mapping[str, Any]) -> None:
        """Write the file, whole or not at all, with its summary, and drop what was kept on the way."""
        write_text(self.summary, json.dumps({"fingerprint": self.fingerprint, **summary}, indent=2) + "\n")
        write_text(self.output, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        self.discard()

    def discard(self) -> None:
        """Drop what was kept on the way."""
        self.part.unlink(missing_ok=True)


def _parsed(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
