"""Whether commands understand their options, found before anything runs."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import yaml

from lit_agentrl.errors import UserError
from lit_agentrl.pipeline.stage import Stage


def check(stage: Stage) -> str:
    """The stage's whole configuration as YAML, defaults included; empty for commands that are not Lightning's.

    Raises:
        UserError: The command does not exist or does not understand an option.
    """
    if stage.form.is_lightning:
        return parsed(f"stage {stage.name!r}", stage)
    _check_own(stage)
    return ""


def parsed(owner: str, stage: Stage) -> str:
    """What a Lightning command would run with; nothing is instantiated.

    Raises:
        UserError: An option is wrong; the text begins with `owner`.
    """
    from lit_agentrl.lightning_cli import run  # imports torch and transformers

    written, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(written), contextlib.redirect_stderr(errors):
            run([*stage.arguments(resume=False), "--print_config"])
    except SystemExit as end:
        if end.code:
            text = errors.getvalue().partition("\nAll options with their values")[0]
            raise UserError(f"{owner}: {text.strip().removeprefix('error: ')}") from None
    text = written.getvalue()
    config: dict[str, Any] = yaml.safe_load(text)
    for key in ("model", "data"):
        if not config.get(key):
            raise UserError(f"{owner}: {stage.command} needs `{key}`, which neither `config` nor `options` set.")
    return text


def check_handed_on(stages: Sequence[Stage], resolved: dict[str, str], used: set[str]) -> None:
    """See that a fit whose export is used makes one, and there.

    Args:
        stages: In order.
        resolved: Their configurations, by name.
        used: The exports that other stages read.

    Raises:
        UserError: It does not.
    """
    for stage in stages:
        if stage.command != "fit" or stage.name not in resolved or str(stage.export) not in used:
            continue
        given = yaml.safe_load(resolved[stage.name])["export"]
        folder = stage.run / given["folder"]
        if not given["at_end"] or folder.absolute() != (stage.export or stage.run).absolute():
            raise UserError(
                f"stage {stage.name!r}: a later stage reads {stage.export}, but with export.at_end="
                f"{given['at_end']} and export.folder={given['folder']} it "
                + (f"writes {folder}." if given["at_end"] else "writes none.")
            )


def _check_own(stage: Stage) -> None:
    """See that the command's help knows each option; options with dots are the command's own affair."""
    text = _help(stage.command, stage.name)
    known = set(re.findall(r"--[\w-]+", text))
    for key in [*stage.options, *(["config"] if stage.configs else [])]:
        if "." not in key and stage.form.options != "pairs" and f"--{key}" not in known:
            raise UserError(
                f"stage {stage.name!r}: {stage.command} has no option {key}. It has "
                f"{', '.join(sorted(name.removeprefix('--') for name in known - {'--help'}))}."
            )


def _help(command: str, name: str) -> str:
    code, text, errors = _ask(command, os.getcwd())
    if code:
        raise UserError(f"stage {name!r}: {errors.strip().removeprefix('error: ')}")
    return text


@lru_cache
def _ask(command: str, folder: str) -> tuple[int, str, str]:
    """Exit code and output of a command's help, in a process of its own as the stage will be; `folder` is the key."""
    words = [sys.executable, "-m", "lit_agentrl", command, "--help"]
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False, cwd=folder)
    return done.returncode, done.stdout, done.stderr
