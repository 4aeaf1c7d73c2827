"""Runs a plan: what is finished is skipped, what it read and left is written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lit_agentrl.errors import UserError
from lit_agentrl.files import write_text
from lit_agentrl.pipeline import aside, record
from lit_agentrl.pipeline.inputs import Input
from lit_agentrl.pipeline.lineage import gather
from lit_agentrl.pipeline.plan import Entry, State, check_there, refuse_stale, state_of
from lit_agentrl.pipeline.process import run_one
from lit_agentrl.pipeline.stage import Stage

BEFORE = "finished by a version that recorded no inputs; hashes are those found later"


def run_plan(entries: Sequence[Entry], resolved: Mapping[str, str], file: Path, root: Path, lock: int) -> None:
    """Run every stage that is not finished, in order.

    Args:
        entries: The plan; no stage of it is stale.
        resolved: The configurations of the stages that are to run, by name.
        file: The pipeline file.
        root: Where `lineage.json` goes.
        lock: The descriptor that stages keep open.

    Raises:
        UserError: What a stage before it left makes a finished stage stale; a stage left less than it names.
        SystemExit: A stage failed or was interrupted.
    """
    for number, entry in enumerate(entries, 1):
        stage, place = entry.stage, f"[{number}/{len(entries)}] {entry.stage.name}"
        entry.state, entry.reason = state_of(stage, entry.inputs)
        refuse_stale([entry])
        if entry.state is State.FINISHED:
            print(f"{place}: finished already, in {stage.run}", flush=True)
            _take_over(stage, entry.inputs)
        else:
            check_there(stage, entry.inputs)
            _run(stage, entry.inputs, resolved.get(stage.name, ""), place, lock)
        gather(file, root, [entry.stage for entry in entries])


def _run(stage: Stage, inputs: Sequence[Input], resolved: str, place: str, lock: int) -> None:
    """Run one and write its record; a kill at any moment leaves a stage that is not finished."""
    written = stage.marked() or {}
    is_again = not written.get("finished", True)
    times = {
        "started": (written.get("started") if is_again and stage.is_resumable() else None) or record.now(),
        "attempts": int(written.get("attempts", 1)) + 1 if is_again else 1,
    }
    hashes = record.hashed(inputs)
    aside.move_half_done(stage)
    if resolved:
        write_text(stage.run / record.RESOLVED, resolved)
    stage.mark(finished=False, inputs=hashes, **times)
    run_one(stage, place, (lock,))
    _check_left(stage)
    hashes = _unchanged(stage, inputs, hashes)
    times["ended"] = record.now()
    record.write(stage.run / record.FILE_NAME, record.describe(stage, inputs, hashes, times))
    stage.mark(finished=True, inputs=hashes, **times)


def _check_left(stage: Stage) -> None:
    """See that the stage left what it names; the export of a fit is asked for by those that read it."""
    left = dict(stage.outputs) if stage.form.output == "" else stage.leaves()
    missing = [f"{name}: {path}" for name, path in left.items() if not path.exists()]
    if missing:
        raise UserError(
            f"stage {stage.name!r} ended well, but did not leave {', '.join(missing)}. Correct `outputs` in the "
            "pipeline file, or the stage's options."
        )


def _unchanged(stage: Stage, inputs: Sequence[Input], hashes: Mapping[str, str | None]) -> dict[str, str | None]:
    """The inputs by what was read, without options that name what the stage itself writes to, such as a cache."""
    after, kept = record.hashed(inputs), dict(hashes)
    for item in inputs:
        if after[item.path] == hashes[item.path]:
            continue
        if item.is_listed or item.stage:
            print(f"{stage.name}: its input {item.path} changed while it ran; it will be stale the next time.")
        else:
            print(f"{stage.name}: {item.path} changed while it ran, so it is not counted among the inputs.")
            del kept[item.path]
    return kept


def _take_over(stage: Stage, inputs: Sequence[Input]) -> None:
    """Write down what an earlier version did not, so that later changes are seen."""
    written = stage.marked() or {}
    if "inputs" in written and (stage.run / record.FILE_NAME).is_file():
        return
    hashes = written.get("inputs") or record.hashed([item for item in inputs if Path(item.path).exists()])
    note = "" if "inputs" in written else BEFORE
    record.write(stage.run / record.FILE_NAME, record.describe(stage, inputs, hashes, written, note))
    if note:
        print(f"{stage.name}: {note}", flush=True)
        stage.mark(finished=True, inputs=hashes)
