"""Chains stages from one OmegaConf file: each stage is a command one can type, and hands its export to the next.

How a stage runs, is skipped, resumes and fails is in `stages.py`.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lit_agentrl.errors import UserError
from lit_agentrl.stages import Stage, config_files, dotted, parse_overrides, run_all

_STAGE_KEYS = {"command", "config", "options", "run", "export"}


def main(args: list[str]) -> None:
    """Run `lit-agentrl pipeline FILE [--dry-run] [key=value ...]`."""
    parser = argparse.ArgumentParser(
        prog="lit-agentrl pipeline", description="Run a chain of stages from one YAML file."
    )
    parser.add_argument("file", help="a pipeline file, e.g. configs/pipeline/quickstart.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="values that replace the file's, e.g. root=runs/x"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    parsed = parser.parse_intermixed_args(args)
    config, stages = load(Path(parsed.file), parsed.overrides)
    if parsed.dry_run:
        for stage in stages:
            print(f"{stage.name}: lit-agentrl {shlex.join(stage.arguments())}")
        return
    run_all(stages)
    if config.get("report"):
        from lit_agentrl.report import summary

        report = cast(dict[str, Any], OmegaConf.to_container(config.report, resolve=True))
        summary.show(report, {stage.name: stage.run for stage in stages})


def load(path: Path, overrides: list[str]) -> tuple[DictConfig, list[Stage]]:
    """Read a pipeline file; every stage knows its `run` folder and its `export`, for others to refer to.

    Raises:
        UserError: The file is missing or malformed, an override or a stage has an unknown key.
    """
    if not path.is_file():
        raise UserError(f"no pipeline file {str(path)!r}. There are some in configs/pipeline/.")
    try:
        config = OmegaConf.merge(OmegaConf.load(path), parse_overrides(overrides, path))
        assert isinstance(config, DictConfig)
        for name in config.get("stages") or _fail(f"{path}: `stages` is empty."):
            unknown = set(config.stages[name]) - _STAGE_KEYS
            if unknown:
                _fail(f"{path}: stage {name!r} has unknown keys {sorted(unknown)}; allowed are {sorted(_STAGE_KEYS)}.")
            config.stages[name].setdefault("run", f"{config.root}/{name}")
            config.stages[name].setdefault("export", f"{config.stages[name].run}/export")
        resolved: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {error}") from None
    return config, [_stage(name, entry, path) for name, entry in resolved["stages"].items()]


def _stage(name: str, entry: dict[str, Any], path: Path) -> Stage:
    configs = config_files(entry["config"], path, f"stage {name!r}")
    if entry["command"] not in ("fit", "evaluate"):
        _fail(f"{path}: stage {name!r} has command {entry['command']!r}; allowed are fit and evaluate.")
    return Stage(name, entry["command"], configs, dotted(entry.get("options") or {}), Path(entry["run"]))


def _fail(text: str) -> Any:
    raise UserError(text)
