"""Old runs are moved aside, so that a stage can run again and nothing is lost."""

from __future__ import annotations

from pathlib import Path

from lit_agentrl.pipeline.stage import Stage


def to_move(stage: Stage) -> list[tuple[Path, Path]]:
    """What a stage has left, and where each goes: beside its place, as `NAME.old-1` or the first number that is free.

    What lies in the run folder goes with it. What lies elsewhere is moved only where this stage has run.
    """
    if not stage.run.exists():
        return []
    places = [stage.run]
    if stage.marker.is_file():
        inside = stage.run.absolute()
        places += [place for place in stage.leaves().values() if inside not in place.absolute().parents]
    return [(place, _free(place)) for place in places if place.exists()]


def move(stage: Stage) -> None:
    """Move it, saying where."""
    for place, free in reversed(to_move(stage)):  # the marker last: a kill in between leaves it saying what is there
        _move(stage, place, free)


def move_half_done(stage: Stage) -> None:
    """Move what an attempt that did not end left, where the command would stumble over it; the run folder stays."""
    if stage.marked() is None or not stage.form.output or stage.form.continues:
        return
    for place in stage.leaves().values():
        if place.exists():
            _move(stage, place, _free(place))


def _move(stage: Stage, place: Path, free: Path) -> None:
    place.rename(free)
    print(f"{stage.name}: {place} is now {free}", flush=True)


def _free(place: Path) -> Path:
    number = 1
    while (free := place.with_name(f"{place.name}.old-{number}")).exists():
        number += 1
    return free
