"""What a pipeline would do: the state of every stage, and why."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from lit_agentrl.errors import UserError
from lit_agentrl.pipeline.hashing import content_hash, short
from lit_agentrl.pipeline.inputs import Input
from lit_agentrl.pipeline.stage import Stage


class State(StrEnum):
    """How far a stage is."""

    FINISHED = "finished"
    STALE = "stale"
    INTERRUPTED = "interrupted"
    TO_DO = "to do"


@dataclass(slots=True)
class Entry:
    """A stage, and what is to happen with it."""

    stage: Stage
    inputs: tuple[Input, ...]
    state: State
    reason: str = ""
    """Why it is stale."""

    def lines(self) -> Iterator[str]:
        """The command as one can type it, and what it reads and leaves."""
        words = self.stage.arguments(resume=self.state is State.INTERRUPTED)
        yield f"{self.stage.name}: lit-agentrl {shlex.join(words)}"
        yield f"    state    {self.state}{f': {self.reason}' if self.reason else ''}"
        for item in self.inputs:
            yield f"    reads    {item.path} ({f'from {item.stage}' if item.stage else 'given'})"
        for name, path in self.stage.leaves().items():
            yield f"    leaves   {path} ({name})"


def look(stages: Sequence[Stage], inputs: Mapping[str, tuple[Input, ...]], again: Collection[str] = ()) -> list[Entry]:
    """The state of every stage, before anything runs.

    What an unfinished stage leaves is not compared: whether those after it are stale is seen when it is there.

    Args:
        stages: In order.
        inputs: What each reads.
        again: The names of those that are to run again, whatever their state.

    Raises:
        UserError: A stage is to run, and what it reads is gone although its maker is finished.
    """
    entries: list[Entry] = []
    finished: set[str] = set()
    for stage in stages:
        settled = [item for item in inputs[stage.name] if item.stage is None or item.stage in finished]
        state = (State.TO_DO, "again") if stage.name in again else state_of(stage, settled)
        entries.append(Entry(stage, inputs[stage.name], *state))
        if entries[-1].state is State.FINISHED:
            finished.add(stage.name)
        elif entries[-1].state is not State.STALE:
            check_there(stage, settled)
    return entries


def state_of(stage: Stage, inputs: Sequence[Input]) -> tuple[State, str]:
    """How far the stage is, and why it is stale: other options, or an input of another content than it ran with."""
    written = stage.marked()
    if written is None:
        return (State.INTERRUPTED if stage.is_resumable() else State.TO_DO), ""
    is_finished = bool(written.get("finished", True))
    if is_finished and (other := stage.mismatch(written)):
        return State.STALE, f"{stage.run} {other}"
    if not is_finished and not stage.is_resumable():
        return State.INTERRUPTED, ""  # it begins anew, so what it read before does not matter
    changed = changes(written.get("inputs"), inputs)
    if changed:
        return State.STALE, f"{'; '.join(changed)} since it {'ran' if is_finished else 'began'}"
    return (State.FINISHED if is_finished else State.INTERRUPTED), ""


def changes(recorded: Any, inputs: Sequence[Input]) -> list[str]:
    """Which inputs are not what they were; empty where nothing was recorded (by a version that did not).

    What is gone has not changed. An input that was found among options counts only where it was there at that time: a
    cache that the stage filled is none.
    """
    if not isinstance(recorded, Mapping):
        return []
    found = []
    for item in inputs:
        now = content_hash(item.path)
        then = recorded.get(item.path)
        origin = f" (from stage {item.stage!r})" if item.stage else ""
        if then is None and item.is_listed:
            found.append(f"its input {item.path}{origin} is new")
        elif then is not None and now is not None and then != now:
            found.append(f"its input {item.path}{origin} changed from {short(then)} to {short(now)}")
    return found


def check_there(stage: Stage, inputs: Sequence[Input]) -> None:
    """See that what a stage is about to read is there.

    Raises:
        UserError: It is not.
    """
    for item in inputs:
        if Path(item.path).expanduser().exists():
            continue
        todo = f"`--from {item.stage}` runs that stage again" if item.stage else "put it back"
        raise UserError(
            f"stage {stage.name!r}: its input {item.path} is not there"
            + (f", although stage {item.stage!r}, which should leave it, is finished" if item.stage else "")
            + f"; {todo}."
        )


def refuse_stale(entries: Sequence[Entry]) -> None:
    """Stop before a stage that is stale is taken for a finished one.

    Raises:
        UserError: There is one; the text says of each what changed and what to do.
    """
    stale = [entry for entry in entries if entry.state is State.STALE]
    if not stale:
        return
    lines = [f"stage {entry.stage.name!r} is stale: {entry.reason}" for entry in stale]
    name = stale[0].stage.name
    raise UserError(
        "\n".join(lines) + f"\n`--from {name}` runs {name!r} and all that depends on it again, `--rerun {name}` that "
        "stage alone; old runs are moved aside. Or delete its folder, or give the pipeline another root=FOLDER."
    )


def dependents(name: str, inputs: Mapping[str, tuple[Input, ...]]) -> set[str]:
    """The stage and all that read, directly or not, what it leaves."""
    found = {name}
    for stage, items in inputs.items():  # in order, so that one pass is enough
        if any(item.stage in found for item in items):
            found.add(stage)
    return found
