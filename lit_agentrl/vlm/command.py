"""`lit-agentrl make-vlm`: a small vision-language model from packaged parts, made once on this machine."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import asdict, fields
from pathlib import Path

from safetensors import SafetensorError

from lit_agentrl.cache import built_once
from lit_agentrl.errors import UserError
from lit_agentrl.vlm.build import FACTS, build, check_packages
from lit_agentrl.vlm.card import PROVENANCE
from lit_agentrl.vlm.recipe import NAME, Recipe

SPACE = 700 << 20
"""Bytes of a build."""


def main(options: list[str]) -> None:
    """`lit-agentrl make-vlm [OUTPUT] [--seed 0 ...]`.

    Raises:
        SystemExit: With 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser("lit-agentrl make-vlm", description=__doc__)
    parser.add_argument(
        "output", type=Path, nargs="?", metavar="OUTPUT", help="a new folder for a copy (default: the cache alone)"
    )
    for option in fields(Recipe):
        text = f"{option.metadata['help']} (default: {option.default})"
        parser.add_argument(f"--{option.name}", type=int, default=option.default, help=text)
    given = vars(parser.parse_args(options))
    output = given.pop("output")
    recipe = Recipe(**given)
    try:
        folder = make(recipe, output.expanduser().absolute() if output else None)
    except KeyboardInterrupt:
        print("interrupted: nothing half-made was left; the same command starts anew.", file=sys.stderr)
        raise SystemExit(130) from None
    print(f"Made of:\n{PROVENANCE}\nLimits and measured numbers: {folder / 'MODEL_CARD.md'}")
    print(f"{folder}\nUse it as `pretrained: {NAME if folder == Recipe().folder else folder}`.")


def make(recipe: Recipe, output: Path | None = None) -> Path:
    """The folder of a build. It is made once, into the cache; `output` becomes a copy of it.

    Args:
        recipe: What to make.
        output: An absolute path where nothing is yet, or a copy of this build.

    Raises:
        UserError: A package is missing, or a folder is taken, cannot be written to, or has too little space.
    """
    cached, folder = recipe.folder, output or recipe.folder
    if output is not None and not _is_build(output, recipe):
        _check_free(output)
    elif folder.exists():
        print(f"{folder} was made before.")
        return folder
    try:
        if not cached.exists():
            check_packages()
            _check_space(cached)
            built_once(cached, lambda temporary: build(recipe, temporary, _say))
        if output is not None:
            _check_space(output)
            _copy(cached, output)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder} could not be written: {error}. Nothing half-made was left there; free {SPACE >> 20} MiB or give "
            "another OUTPUT or cache ($LIT_AGENTRL_CACHE), and run it again."
        ) from error
    return folder


def _copy(cached: Path, output: Path) -> None:
    """Copy a build to a place of the user's, whole or not at all."""

    def fill(temporary: Path) -> None:
        shutil.copytree(cached, temporary, dirs_exist_ok=True)

    built_once(output, fill)
    output.with_name(output.name + ".lock").unlink(missing_ok=True)  # tidy where people look


def _is_build(folder: Path, recipe: Recipe) -> bool:
    """Whether the folder holds a build of this recipe."""
    try:
        return bool(json.loads((folder / FACTS).read_text())["recipe"] == asdict(recipe))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_free(folder: Path) -> None:
    if folder.exists():
        raise UserError(
            f"{folder} exists and is no build of this recipe: nothing was written. Give a new folder, or delete that."
        )
    ancestor = next(parent for parent in folder.parents if parent.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
        raise UserError(f"{ancestor} is no folder that can be written to. Give another OUTPUT.")


def _check_space(folder: Path) -> None:
    ancestor = next(parent for parent in folder.parents if parent.exists())
    free = shutil.disk_usage(ancestor).free
    if free < SPACE:
        raise UserError(
            f"{ancestor} has {free >> 20} MiB left, and the model takes {SPACE >> 20}. Free some, or give another "
            "OUTPUT or cache ($LIT_AGENTRL_CACHE)."
        )


def _say(line: str) -> None:
    print(line, flush=True)
