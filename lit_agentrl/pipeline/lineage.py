"""From the final result back to the data: which stage made what, of what."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lit_agentrl.errors import UserError
from lit_agentrl.pipeline import record
from lit_agentrl.pipeline.hashing import content_hash, short
from lit_agentrl.pipeline.record import FileRecord, StageRecord
from lit_agentrl.pipeline.stage import Stage


@dataclass(slots=True, frozen=True)
class Link:
    """A file or folder of the chain."""

    depth: int
    """Steps back from the final result, which is 0."""
    path: str
    sha256: str | None
    """Its content when it was made or, for what was given, read."""
    maker: StageRecord | None
    """The stage that left it; None where it was given."""
    is_repeated: bool = False
    """Whether the maker's own inputs stand further up already."""

    def condition(self) -> str:
        """Whether it still is what it was: empty, or what happened to it. Reads the file."""
        now = content_hash(self.path)
        if now is None:
            return "gone"
        return "" if now == self.sha256 else f"changed since, now {short(now)}"


def gather(file: Path, root: Path, stages: Sequence[Stage]) -> None:
    """Write `<root>/lineage.json`: the records of all stages that have one."""
    found = {stage.name: _read(stage.run / record.FILE_NAME) for stage in stages}
    there = {name: made for name, made in found.items() if made is not None}
    record.write(root / record.FILE_NAME, {"pipeline": str(file), "root": str(root), "stages": there})


def lineage(root: str | Path, stage: str | None = None) -> list[Link]:
    """The chain from what a stage left back to what was given, every file before those it was made of.

    Args:
        root: The folder of a pipeline's runs.
        stage: Where to begin; by default the last stage that left an export, else the last.

    Raises:
        UserError: The folder has no lineage, or no such stage.
    """
    written = _read(Path(root) / record.FILE_NAME)
    stages = cast("dict[str, StageRecord]", (written or {}).get("stages") or {})
    if not stages:
        raise UserError(f"{root} has no {record.FILE_NAME} with a finished stage: run the pipeline first.")
    if stage is not None and stage not in stages:
        raise UserError(f"{root}: stage {stage!r} is none of the finished stages {', '.join(stages)}.")
    exporting = [name for name, made in stages.items() if any(left["name"] == "export" for left in made["outputs"])]
    begin = stages[stage or (exporting or list(stages))[-1]]
    nothing: FileRecord = {"path": begin["run"], "sha256": content_hash(begin["run"])}
    return list(_walk(begin["outputs"][0] if begin["outputs"] else nothing, begin, stages, 0, set()))


def _walk(
    file: FileRecord, maker: StageRecord | None, stages: dict[str, StageRecord], depth: int, seen: set[str]
) -> Iterator[Link]:
    is_repeated = maker is not None and maker["stage"] in seen
    yield Link(depth, file["path"], file["sha256"], maker, is_repeated)
    if maker is None or is_repeated:
        return
    seen.add(maker["stage"])
    for item in maker["inputs"]:
        yield from _walk(item, stages.get(item["made_by"] or ""), stages, depth + 1, seen)


def render(chain: Sequence[Link]) -> Iterator[str]:
    """The chain as lines, each file under what was made of it."""
    for link in chain:
        condition = link.condition()
        made = "given" if link.maker is None else _made(link.maker)
        again = " (see above)" if link.is_repeated else ""
        warning = f"  ! {condition}" if condition else ""
        arrow = f"{'   ' * link.depth}<- " if link.depth else ""
        yield f"{arrow}{link.path}  {short(link.sha256)}  {made}{again}{warning}"


def _made(maker: StageRecord) -> str:
    seed = "" if maker["seed"] is None else f", seed {maker['seed']}"
    when = "" if maker["ended"] is None else f", {maker['ended']}"
    version = maker["versions"].get("lit-agentrl", "?")
    return f"{maker['stage']}: {maker['command']}{seed}{when}, lit-agentrl {version}"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return loaded if isinstance(loaded, dict) else None
