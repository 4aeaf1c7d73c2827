"""Which commands can be stages, and how each is told what it has to know: a table."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(slots=True, frozen=True)
class Form:
    """How a command is told where its output goes and what its options are."""

    output: str = "OUTPUT"
    """"OUTPUT": the first word after the command; "--name": an option; "name=": one word; empty: not told."""
    run: str = ""
    """The option for the run folder; empty where there is none."""
    options: Literal["words", "yaml", "pairs"] = "words"
    """`--key VALUE` with a list as several words, true as a bare switch, false and null left out; the same with JSON
    for whatever is no text; or `key=value`."""
    is_lightning: bool = False
    """Whether its configuration is Lightning's, which can be parsed without running anything."""
    export: str = "export"
    """What it leaves for other stages, in the run folder; empty where it leaves nothing."""
    resumes: bool = False
    """Whether it goes on from `<run>/checkpoints/last.ckpt`; others are run anew."""
    continues: bool = False
    """Whether, run anew, it takes up what it left half done; for others that is moved aside first."""

    def words(self, key: str, value: Any) -> list[str]:
        """An option as it is typed."""
        if self.options == "pairs":
            return [f"{key}={_text(value)}"]
        if self.options == "yaml":
            return [f"--{key}", _text(value)]
        if value is None or value is False:
            return []
        return [f"--{key}", *map(_text, value if isinstance(value, list) else [] if value is True else [value])]


_RUN = "--trainer.default_root_dir"
FIT = Form("", _RUN, "yaml", is_lightning=True, resumes=True)
_LOOK = Form("", _RUN, "yaml", is_lightning=True, export="")
FORMS = {
    "fit": FIT,
    "evaluate": _LOOK,
    "validate": _LOOK,
    "test": _LOOK,
    "mine-preferences": Form(
        "--mine.output", _RUN, "yaml", is_lightning=True, export="preferences.jsonl", continues=True
    ),
    "compare": Form("output=", options="pairs", continues=True),
    "make-alfworld-games": Form(continues=True),
}
"""Commands that differ from `Form()`, which is OUTPUT first and then `--key VALUE`: what every other command has."""
NO_STAGES = {
    "doctor": "it trains nothing and leaves nothing: run it by hand",
    "pipeline": "pipelines do not nest: put its stages into this file",
    "serve-retriever": "it never ends: start it by hand before the pipeline",
    "serve-vllm": "it never ends: start it by hand before the pipeline",
    "consolidate": "it changes the form of a checkpoint: run it by hand",
}
"""Commands that cannot be stages, and what to do."""


def form_of(command: str) -> Form:
    """How a command is told its options; whether there is such a command is not looked at here."""
    return FORMS.get(command, Form())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
