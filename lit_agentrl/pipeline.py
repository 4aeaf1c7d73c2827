"""Chains stages from one OmegaConf file: each stage is a command one can type, and hands its export to the next.

Every stage runs in a process of its own (fresh memory, fresh process group). A finished stage is skipped, an
interrupted one resumes from its last checkpoint, a failed one leaves the command that reproduces it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lit_agentrl.errors import UserError
from lit_agentrl.files import write_text

_STAGE_KEYS = {"command", "config", "options", "run", "export"}


@dataclass(slots=True, frozen=True)
class Stage:
    """One command of the chain."""

    name: str
    command: str
    config: Path
    options: dict[str, Any]
    run: Path

    def arguments(self) -> list[str]:
        """What follows `lit-agentrl`, resuming where a checkpoint is there."""
        words = [self.command, "--config", str(self.config), "--trainer.default_root_dir", str(self.run)]
        for key, value in self.options.items():
            words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
        last = self.run / "checkpoints" / "last.ckpt"
        return words + (["--ckpt_path", str(last)] if self.command == "fit" and last.exists() else [])

    @property
    def marker(self) -> Path:
        """Written when the stage is finished."""
        return self.run / "stage.json"

    def fingerprint(self) -> str:
        """A hash of what the stage does: command, configuration text, options."""
        what = json.dumps([self.command, self.config.read_text(), self.options], sort_keys=True)
        return hashlib.sha256(what.encode()).hexdigest()

    def is_finished(self) -> bool:
        """Whether it ran to its end with just these options.

        Raises:
            UserError: It did, but with others.
        """
        if not self.marker.is_file():
            return False
        if json.loads(self.marker.read_text()).get("fingerprint") != self.fingerprint():
            raise UserError(
                f"stage {self.name!r}: {self.run} holds a finished run with other options. Delete that folder to run "
                "the stage anew, or give the pipeline another root=FOLDER."
            )
        return True


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
    for number, stage in enumerate(stages, 1):
        _run(stage, f"{number}/{len(stages)}")
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
        config = OmegaConf.merge(OmegaConf.load(path), _overrides(overrides, path))
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


def _overrides(overrides: list[str], path: Path) -> DictConfig:
    known = OmegaConf.load(path)
    for item in overrides:
        key, equals, _ = item.partition("=")
        if not equals or OmegaConf.select(known, key.split(".")[0]) is None:
            _fail(f"{item!r}: overrides are key=value with a key of {path} ({', '.join(map(str, known))}).")
    return OmegaConf.from_dotlist(overrides)


def _stage(name: str, entry: dict[str, Any], path: Path) -> Stage:
    config = path.parent / entry["config"]
    if not config.is_file():
        _fail(f"{path}: stage {name!r} names the config {entry['config']!r}, but {config} is not there.")
    if entry["command"] not in ("fit", "evaluate"):
        _fail(f"{path}: stage {name!r} has command {entry['command']!r}; allowed are fit and evaluate.")
    return Stage(name, entry["command"], config, _flat(entry.get("options") or {}), Path(entry["run"]))


def _flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options by their dotted names, however deep the file nests them."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _run(stage: Stage, place: str) -> None:
    if stage.is_finished():
        print(f"[{place}] {stage.name}: finished already, in {stage.run}")
        return
    words = stage.arguments()
    print(f"[{place}] {stage.name}: lit-agentrl {shlex.join(words)}", flush=True)
    process = subprocess.Popen([sys.executable, "-m", "lit_agentrl", *words])
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the terminal sent it to the stage as well, which is saving
        process.wait()
        print("Stopped. The same command continues where it was.", file=sys.stderr)
        raise SystemExit(130) from None
    if code:
        print(f"stage {stage.name!r} failed. Alone: lit-agentrl {shlex.join(words)}", file=sys.stderr)
        raise SystemExit(code if code > 0 else 128 - code)
    write_text(stage.marker, json.dumps({"fingerprint": stage.fingerprint(), "arguments": words}))


def _fail(text: str) -> Any:
    raise UserError(text)
