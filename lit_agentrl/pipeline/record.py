"""What is written down of a finished stage: what it read, what it left, with what, when, and how well it did."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypedDict

import yaml

from lit_agentrl import __version__
from lit_agentrl.files import write_text
from lit_agentrl.pipeline.hashing import content_hash
from lit_agentrl.pipeline.inputs import Input
from lit_agentrl.pipeline.stage import Stage

FILE_NAME = "lineage.json"
RESOLVED = "resolved.yaml"
EVALUATIONS = "evaluation.jsonl"
PACKAGES = ("torch", "transformers", "lightning", "peft")


class FileRecord(TypedDict):
    """A file or folder by its content."""

    path: str
    sha256: str | None


class InputRecord(FileRecord):
    """One that was read."""

    made_by: str | None
    """The stage that left it; None where it was given."""


class OutputRecord(FileRecord):
    """One that was left."""

    name: str


class StageRecord(TypedDict):
    """A stage that ended well."""

    stage: str
    command: str
    arguments: list[str]
    run: str
    configs: list[FileRecord]
    resolved: FileRecord | None
    """The whole configuration, defaults included; None for commands that are not Lightning's."""
    inputs: list[InputRecord]
    outputs: list[OutputRecord]
    metrics: dict[str, Any] | None
    """The run's last evaluation; None where it made none."""
    seed: int | None
    started: str | None
    """When it began: of a resumed run, its first attempt. None where that is not known."""
    ended: str | None
    attempts: int
    versions: dict[str, str]
    note: str


def now() -> str:
    """The time, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def hashed(inputs: Sequence[Input]) -> dict[str, str | None]:
    """The content of each input, by its path."""
    return {item.path: content_hash(item.path) for item in inputs}


def describe(
    stage: Stage, inputs: Sequence[Input], hashes: Mapping[str, str | None], times: Mapping[str, Any], note: str = ""
) -> StageRecord:
    """The record of a stage that has just ended.

    Args:
        stage: The stage.
        inputs: What it read.
        hashes: Their content when it read them; what is missing here is left out.
        times: `started`, `ended` and `attempts`, where they are known.
        note: What to know before believing the record.
    """
    resolved = stage.run / RESOLVED
    return {
        "stage": stage.name,
        "command": stage.command,
        "arguments": stage.arguments(resume=False),
        "run": str(stage.run),
        "configs": [{"path": str(config), "sha256": content_hash(config)} for config in stage.configs],
        "resolved": {"path": str(resolved), "sha256": content_hash(resolved)} if resolved.is_file() else None,
        "inputs": [
            {"path": item.path, "sha256": hashes[item.path], "made_by": item.stage}
            for item in inputs
            if item.path in hashes
        ],
        "outputs": [
            {"name": name, "path": str(path), "sha256": content_hash(path)}
            for name, path in stage.leaves().items()
            if path.exists()
        ],
        "metrics": _last_evaluation(stage.run),
        "seed": _seed(stage, resolved),
        "started": times.get("started"),
        "ended": times.get("ended"),
        "attempts": int(times.get("attempts", 1)),
        "versions": versions(),
        "note": note,
    }


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as JSON, whole or not at all."""
    write_text(path, json.dumps(record, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Of this package, Python, and the libraries that results depend on."""
    found = {"lit-agentrl": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def text_hash(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def _last_evaluation(run: Path) -> dict[str, Any] | None:
    if not (run / EVALUATIONS).is_file():
        return None
    from lit_agentrl.callbacks.evaluation import read_evaluations  # imports torch

    records = read_evaluations(run)
    return dict(records[-1]) if records else None


def _seed(stage: Stage, resolved: Path) -> int | None:
    """`seed_everything` as it was resolved, or an option of that meaning."""
    options = dict(stage.options)
    if resolved.is_file():
        options = yaml.safe_load(resolved.read_text(encoding="utf-8")) | options
    for key in ("seed_everything", "seed"):
        if isinstance(options.get(key), int) and not isinstance(options[key], bool):
            return int(options[key])
    return None
