"""`lit-agentrl pipeline`: chains stages from one OmegaConf file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lit_agentrl.errors import UserError
from lit_agentrl.pipeline import aside
from lit_agentrl.pipeline.check import check, check_handed_on
from lit_agentrl.pipeline.file import load
from lit_agentrl.pipeline.inputs import Input, find_inputs
from lit_agentrl.pipeline.lineage import lineage, render
from lit_agentrl.pipeline.lock import only_one
from lit_agentrl.pipeline.plan import State, dependents, look, refuse_stale
from lit_agentrl.pipeline.process import stopped
from lit_agentrl.pipeline.run import run_plan
from lit_agentrl.pipeline.stage import Stage
from lit_agentrl.report.spec import Spec, read_spec


def main(args: list[str]) -> None:
    """Run `lit-agentrl pipeline FILE [--dry-run | --lineage] [--from STAGE] [--rerun STAGE] [key=value ...]`."""
    given = _parser().parse_intermixed_args(args)
    path = Path(given.file)
    config, stages = load(path, given.overrides)
    names, root = [stage.name for stage in stages], Path(str(config.root))
    for name in (*given.rerun, *given.from_stage):
        if name not in names:
            raise UserError(f"stage {name!r} is none of the stages of {path}: {', '.join(names)}.")
    if given.lineage:
        print(*render(lineage(root)), sep="\n")
        return
    inputs = find_inputs(stages)
    whole: Any = OmegaConf.to_container(config, resolve=True)
    spec = read_spec(whole["report"], names) if whole.get("report") else None
    if spec and spec.export and spec.export not in _exports(stages):
        raise UserError(f"{path}: report.export names the stage {spec.export!r}, which exports nothing.")
    again = {*given.rerun}.union(*(dependents(name, inputs) for name in given.from_stage))
    if given.dry_run:
        _dry_run(stages, inputs, again)
        return
    try:
        with only_one(root) as lock:
            _run(stages, inputs, again, path, root, lock)
            if spec:
                _report(spec, stages, root)
    except KeyboardInterrupt:
        stopped(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lit-agentrl pipeline", description="Run a chain of stages from one YAML file."
    )
    parser.add_argument("file", help="a pipeline file, e.g. configs/pipeline/quickstart.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="values that replace the file's, e.g. root=runs/x"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the plan, run nothing")
    parser.add_argument("--lineage", action="store_true", help="print what the final result was made of, back to data")
    parser.add_argument(
        "--from",
        dest="from_stage",
        metavar="STAGE",
        action="append",
        default=[],
        help="run this stage again, and all that depends on it; the old runs are moved aside",
    )
    parser.add_argument(
        "--rerun", metavar="STAGE", action="append", default=[], help="run this stage again; its old run is moved aside"
    )
    return parser


def _report(spec: Spec, stages: list[Stage], root: Path) -> None:
    from lit_agentrl.report import summary  # imports torch

    summary.show(spec, {stage.name: stage.run for stage in stages}, root, _exports(stages))


def _exports(stages: list[Stage]) -> dict[str, Path]:
    return {stage.name: stage.export for stage in stages if stage.export is not None}


def _dry_run(stages: list[Stage], inputs: dict[str, tuple[Input, ...]], again: set[str]) -> None:
    """Check every stage, and print the plan."""
    entries = look(stages, inputs, again)
    _check(stages, inputs)
    for entry in entries:
        print(*entry.lines(), sep="\n")
        for place, free in aside.to_move(entry.stage) if entry.stage.name in again else []:
            print(f"    aside    {place} becomes {free}")


def _run(
    stages: list[Stage], inputs: dict[str, tuple[Input, ...]], again: set[str], path: Path, root: Path, lock: int
) -> None:
    """Check all that is to run, then run it."""
    entries = look(stages, inputs, again)
    refuse_stale(entries)
    resolved = _check([entry.stage for entry in entries if entry.state is not State.FINISHED], inputs)
    for stage in stages:
        if stage.name in again:
            aside.move(stage)
    run_plan(entries, resolved, path, root, lock)


def _check(stages: list[Stage], inputs: dict[str, tuple[Input, ...]]) -> dict[str, str]:
    """The whole configuration of every stage that has one, by name."""
    resolved = {stage.name: text for stage in stages if (text := check(stage))}
    used = {item.path for items in inputs.values() for item in items if item.stage}
    check_handed_on(stages, resolved, used)
    return resolved
