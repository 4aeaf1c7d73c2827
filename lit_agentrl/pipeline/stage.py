"""A stage: one command with its options, the folder of its run, what it reads and what it leaves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_agentrl.errors import UserError
from lit_agentrl.files import write_text
from lit_agentrl.pipeline.forms import FIT, Form


@dataclass(slots=True, frozen=True)
class Stage:
    """One command, and the folder of its run."""

    name: str
    command: str
    configs: tuple[Path, ...]
    options: dict[str, Any]
    """By their dotted names."""
    run: Path
    elsewhere: str = "give the pipeline another root=FOLDER"
    """What to do, beside deleting the folder, when it holds a run with other options."""
    may_change: bool = True
    """Whether an unfinished run may go on with other options than it was started with."""
    form: Form = FIT
    export: Path | None = None
    """What it is there for: a file or folder that later stages read."""
    outputs: Mapping[str, Path] = field(default_factory=dict)
    """More that it leaves, by name."""
    inputs: tuple[str, ...] = ()
    """Files and folders that it reads, beside those that its options name."""

    def arguments(self, resume: bool = True) -> list[str]:
        """What follows `lit-agentrl`, resuming where a checkpoint is there."""
        form, words = self.form, [self.command]
        words += [str(self.export)] if form.output == "OUTPUT" else []
        words += [word for config in self.configs for word in ("--config", str(config))]
        words += [form.run, str(self.run)] if form.run else []
        words += [form.output, str(self.export)] if form.output.startswith("--") else []
        words += [f"{form.output}{self.export}"] if form.output.endswith("=") else []
        for key, value in self.options.items():
            words += form.words(key, value)
        return words + (["--ckpt_path", str(self.checkpoint)] if resume and self.is_resumable() else [])

    @property
    def checkpoint(self) -> Path:
        """Where a run that was cut short goes on from."""
        return self.run / "checkpoints" / "last.ckpt"

    def is_resumable(self) -> bool:
        """Whether there is something to go on from."""
        return self.form.resumes and self.checkpoint.exists()

    def leaves(self) -> dict[str, Path]:
        """Everything it leaves for others, by name."""
        export = {} if self.export is None else {"export": self.export}
        return export | dict(self.outputs)

    @property
    def marker(self) -> Path:
        """Says which options the run has, what it read, and whether it is finished."""
        return self.run / "stage.json"

    def marked(self) -> dict[str, Any] | None:
        """What the marker says; None where the stage never ran.

        Raises:
            UserError: It cannot be read.
        """
        if not self.marker.is_file():
            return None
        try:
            written = json.loads(self.marker.read_text(encoding="utf-8"))
        except ValueError:
            written = None
        if not isinstance(written, dict):
            raise UserError(f"stage {self.name!r}: {self.marker} cannot be read. Delete {self.run} to run it anew.")
        return written

    def fingerprint(self) -> str:
        """A hash of what the stage does: command, configuration texts, options."""
        texts = [config.read_text(encoding="utf-8") for config in self.configs]
        what = json.dumps([self.command, *texts, self.options], sort_keys=True)
        return hashlib.sha256(what.encode()).hexdigest()

    def is_finished(self) -> bool:
        """Whether it ran to its end with just these options.

        Raises:
            UserError: It did, but with others; or it is to go on with others and must not.
        """
        written = self.marked()
        if written is None:
            return False
        if (other := self.mismatch(written)) and (written.get("finished", True) or not self.may_change):
            raise UserError(
                f"stage {self.name!r}: {self.run} {other}. Delete that folder to run the stage anew, or "
                f"{self.elsewhere}."
            )
        return bool(written.get("finished", True))

    def mismatch(self, written: Mapping[str, Any]) -> str:
        """What is other than a marker says, of the options; empty where they are the same."""
        if written.get("fingerprint") == self.fingerprint():
            return ""
        kind = "a finished" if written.get("finished", True) else "an unfinished"
        changed = _differences(written.get("arguments"), self.arguments(resume=False))
        return f"holds {kind} run with other options{changed}"

    def mark(self, finished: bool, **more: Any) -> None:
        """Note the options; `finished` once the command has ended well; `more` as it is."""
        what = {"fingerprint": self.fingerprint(), "arguments": self.arguments(resume=False), "finished": finished}
        write_text(self.marker, json.dumps(what | more))


def _differences(then: object, now: Sequence[str]) -> str:
    """What the command had and has not any more, in brackets; empty where that is not known."""
    if not isinstance(then, list):
        return ""
    before, after = _named(then), _named(now)
    changed = [key for key in before | after if before.get(key) != after.get(key)]
    if not changed:
        return " (the text of a configuration file was another)"
    return " (" + "; ".join(f"{k}: {before.get(k, 'none')} then, {after.get(k, 'none')} now" for k in changed) + ")"


def _named(words: Sequence[str]) -> dict[str, str]:
    """The words of a command by the option before them."""
    found: dict[str, str] = {}
    key = "command"
    for word in words:
        key = word if word.startswith("--") else key
        found[key] = f"{found.get(key, '')} {'' if word == key else word}".strip()
    return found
