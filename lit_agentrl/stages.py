"""Commands that run one after another, each in a process of its own (fresh memory, fresh process group).

A finished one is skipped, an interrupted one resumes from its last checkpoint, a failed one leaves the command that
reproduces it. Pipelines and comparisons are lists of them.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from lit_agentrl.errors import UserError
from lit_agentrl.files import write_text


@dataclass(slots=True, frozen=True)
class Stage:
    """One command, and the folder of its run."""

    name: str
    command: str
    configs: tuple[Path, ...]
    options: dict[str, Any]
    """By their dotted names."""
    run: Path
    elsewhere: str = "give the pipeline another root=FOLDER"
    """What to do, beside deleting the folder, when it holds a run with other options."""
    may_change: bool = True
    """Whether an unfinished run may go on with other options than it was started with."""

    def arguments(self, resume: bool = True) -> list[str]:
        """What follows `lit-agentrl`, resuming where a checkpoint is there."""
        configs = [word for config in self.configs for word in ("--config", str(config))]
        words = [self.command, *configs, "--trainer.default_root_dir", str(self.run)]
        for key, value in self.options.items():
            words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
        last = self.run / "checkpoints" / "last.ckpt"
        return words + (["--ckpt_path", str(last)] if resume and self.command == "fit" and last.exists() else [])

    @property
    def marker(self) -> Path:
        """Says which options the run has, and whether it is finished."""
        return self.run / "stage.json"

    def fingerprint(self) -> str:
        """A hash of what the stage does: command, configuration texts, options."""
        what = json.dumps(
            [self.command, *(config.read_text() for config in self.configs), self.options], sort_keys=True
        )
        return hashlib.sha256(what.encode()).hexdigest()

    def is_finished(self) -> bool:
        """Whether it ran to its end with just these options.

        Raises:
            UserError: It did, but with others; or it is to go on with others and must not.
        """
        if not self.marker.is_file():
            return False
        written = json.loads(self.marker.read_text())
        is_finished = bool(written.get("finished", True))
        if written.get("fingerprint") != self.fingerprint() and (is_finished or not self.may_change):
            raise UserError(
                f"stage {self.name!r}: {self.run} holds {'a finished' if is_finished else 'an unfinished'} run with "
                f"other options. Delete that folder to run the stage anew, or {self.elsewhere}."
            )
        return is_finished

    def mark(self, finished: bool) -> None:
        """Note the options; `finished` once the command has ended well."""
        what = {"fingerprint": self.fingerprint(), "arguments": self.arguments(resume=False), "finished": finished}
        write_text(self.marker, json.dumps(what))


def run_all(stages: Sequence[Stage], after: Callable[[Stage], None] = lambda stage: None) -> None:
    """Run what is not finished, in order; `after` is called with each finished stage, skipped ones included.

    Raises:
        UserError: A folder holds a run with other options; seen before anything runs.
        SystemExit: A command failed, or Ctrl-C.
    """
    finished = [stage.is_finished() for stage in stages]
    for number, (stage, is_finished) in enumerate(zip(stages, finished, strict=True), 1):
        place = f"[{number}/{len(stages)}] {stage.name}"
        if is_finished:
            print(f"{place}: finished already, in {stage.run}", flush=True)
        else:
            _run(stage, place)
        after(stage)


def _run(stage: Stage, place: str) -> None:
    words = stage.arguments()
    print(f"{place}: lit-agentrl {shlex.join(words)}", flush=True)
    stage.mark(finished=False)
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
    stage.mark(finished=True)


def dotted(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options by their dotted names, however deep the file nests them.

    Raises:
        UserError: A text would not arrive as one: the command line reads options as YAML.
    """
    flat: dict[str, Any] = {}
    for key, value in options.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        if isinstance(value, str) and isinstance(_read(value), dict | list):
            raise UserError(
                f"option {prefix}{key}: the command line would take the text {value!r} for {_read(value)!r}. Write it "
                "into a configuration file of its own and name that under `config`."
            )
    return flat


def _read(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def parse_overrides(overrides: Sequence[str], path: Path, allowed: Sequence[str] = ()) -> DictConfig:
    """`key=value` words as a tree to merge into the file at `path`.

    Raises:
        UserError: A word is none, or its key is neither in the file nor in `allowed`.
    """
    known = OmegaConf.load(path)
    keys = sorted({*map(str, known), *allowed})
    for item in overrides:
        key, equals, _ = item.partition("=")
        if not equals or key.split(".")[0] not in keys:
            raise UserError(f"{item!r}: overrides are key=value with a key of {path} ({', '.join(keys)}).")
    return OmegaConf.from_dotlist(list(overrides))


def config_files(given: str | Sequence[str], beside: Path, owner: str) -> tuple[Path, ...]:
    """The configuration files that `owner` names, relative to the file `beside`.

    Raises:
        UserError: One is not there.
    """
    names = [given] if isinstance(given, str) else list(given)
    for name in names:
        if not (beside.parent / name).is_file():
            raise UserError(f"{beside}: {owner} names the config {name!r}, but {beside.parent / name} is not there.")
    return tuple(beside.parent / name for name in names)
