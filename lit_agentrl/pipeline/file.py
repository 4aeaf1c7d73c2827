"""Reads a pipeline file: stages in order, each with what it exports for others to refer to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lit_agentrl.errors import UserError
from lit_agentrl.pipeline.forms import NO_STAGES, form_of
from lit_agentrl.pipeline.options import config_files, dotted, parse_overrides
from lit_agentrl.pipeline.stage import Stage

STAGE_KEYS = ("command", "config", "options", "inputs", "outputs", "run", "export")


def load(path: Path, overrides: list[str]) -> tuple[DictConfig, list[Stage]]:
    """Read a pipeline file; every stage knows its `run` folder, its `export` and its `outputs`.

    Raises:
        UserError: The file is missing or malformed, an override or a stage has an unknown key.
    """
    if not path.is_file():
        raise UserError(f"no pipeline file {str(path)!r}. There are some in configs/pipeline/.")
    try:
        config = OmegaConf.merge(OmegaConf.load(path), parse_overrides(overrides, path))
        if not isinstance(config, DictConfig) or not isinstance(config.get("stages"), DictConfig):
            raise UserError(f"{path}: `stages` must be a mapping of names to stages, in the order they run.")
        if not config.stages or not config.get("root"):
            raise UserError(f"{path}: `{'root' if config.stages else 'stages'}` is empty.")
        for name in config.stages:
            _complete(config, str(name), path)
        resolved: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {error}") from None
    stages = [_stage(name, entry, path) for name, entry in resolved["stages"].items()]
    _check_places(stages, path)
    return config, stages


def _complete(config: DictConfig, name: str, path: Path) -> None:
    """Check the stage's keys, and fill in where it runs and what it exports."""
    entry = config.stages[name]
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise UserError(f"{path}: stage {name!r} names a folder: letters, digits, and _ . + - are allowed.")
    if not isinstance(entry, DictConfig) or not entry.get("command"):
        raise UserError(f"{path}: stage {name!r} has no `command`.")
    unknown = sorted(set(map(str, entry)) - set(STAGE_KEYS))
    if unknown:
        raise UserError(f"{path}: stage {name!r} has unknown keys {unknown}; allowed are {', '.join(STAGE_KEYS)}.")
    command = str(entry.command)
    if command in NO_STAGES:
        raise UserError(f"{path}: stage {name!r}: {command} can be no stage, because {NO_STAGES[command]}.")
    entry.setdefault("run", f"{config.root}/{name}")
    for key in ("options", "outputs"):
        if not isinstance(entry.get(key) or OmegaConf.create({}), DictConfig):
            raise UserError(f"{path}: stage {name!r}: `{key}` must be a mapping; it is {entry[key]!r}.")
    outputs: Any = OmegaConf.to_container(entry.outputs, resolve=False) if entry.get("outputs") else {}
    # a dot means the node itself, which for an output is the mapping `outputs`; what is meant is the stage
    entry.outputs = {key: re.sub(r"\$\{\.(run|export)\}", r"${..\1}", str(value)) for key, value in outputs.items()}
    form = form_of(command)
    if form.export:
        is_it = form.output and len(entry.outputs) == 1 and "export}" not in str(entry.outputs)
        whole = f"${{.outputs.{next(iter(entry.outputs))}}}" if is_it else f"{entry.run}/{form.export}"
        entry.setdefault("export", whole)
    elif "export" in entry:
        raise UserError(f"{path}: stage {name!r}: {command} leaves no `export`. Name what it leaves under `outputs`.")


def _stage(name: str, entry: dict[str, Any], path: Path) -> Stage:
    command, inputs = str(entry["command"]), entry.get("inputs") or []
    inputs = [inputs] if isinstance(inputs, str) else list(inputs.values() if isinstance(inputs, dict) else inputs)
    return Stage(
        name,
        command,
        config_files(entry.get("config") or [], path, f"stage {name!r}"),
        dotted(entry.get("options") or {}),
        Path(entry["run"]),
        form=form_of(command),
        export=Path(entry["export"]) if "export" in entry else None,
        outputs={key: Path(value) for key, value in entry["outputs"].items()},
        inputs=tuple(map(str, inputs)),
    )


def _check_places(stages: list[Stage], path: Path) -> None:
    """Refuse folders that stages would fight over.

    Raises:
        UserError: Two stages have the same run or leave the same file, or a stage's export is its own run.
    """
    taken: dict[Path, str] = {}
    for stage in stages:
        leaves = {place.absolute() for place in stage.leaves().values()}
        for place in {stage.run.absolute()} | leaves:
            if place in taken:
                raise UserError(f"{path}: stages {taken[place]!r} and {stage.name!r} both write to {place}.")
            taken[place] = stage.name
        if stage.run.absolute() in leaves:
            raise UserError(f"{path}: stage {stage.name!r} leaves its whole run folder; name something inside it.")
