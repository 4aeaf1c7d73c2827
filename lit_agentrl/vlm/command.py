"""`lit-agentrl make-vlm`: a small vision-language model from packaged parts, made once on this machine."""

from __future__ import annotations

import argparse
import os
import shutil
from dataclasses import fields
from pathlib import Path

from safetensors import SafetensorError

from lit_agentrl.cache import built_once
from lit_agentrl.errors import UserError
from lit_agentrl.vlm.build import build, check_packages
from lit_agentrl.vlm.card import PROVENANCE
from lit_agentrl.vlm.recipe import NAME, Recipe

SPACE = 700 << 20
"""Bytes of a build."""


def main(options: list[str]) -> None:
    """`lit-agentrl make-vlm [OUTPUT] [--seed 0 ...]`."""
    parser = argparse.ArgumentParser("lit-agentrl make-vlm", description=__doc__)
    parser.add_argument("output", type=Path, nargs="?", metavar="OUTPUT", help="a new folder (default: in the cache)")
    for option in fields(Recipe):
        text = f"{option.metadata['help']} (default: {option.default})"
        parser.add_argument(f"--{option.name}", type=int, default=option.default, help=text)
    given = vars(parser.parse_args(options))
    output = given.pop("output")
    recipe = Recipe(**given)
    folder = make(recipe, output.expanduser().absolute() if output else None)
    print(f"Made of:\n{PROVENANCE}\nLimits and measured numbers: {folder / 'MODEL_CARD.md'}")
    print(f"{folder}\nUse it as `pretrained: {NAME if folder == Recipe().folder else folder}`.")


def make(recipe: Recipe, output: Path | None = None) -> Path:
    """The folder of a build; what is there already is not made again.

    Args:
        recipe: What to make.
        output: Where, rather than in the cache.

    Raises:
        UserError: A package is missing, or the folder is taken, cannot be written to, or has too little space.
    """
    folder = output or recipe.folder
    if folder == output:
        _check_free(folder)
    elif folder.exists():
        print(f"{folder} was made before.")
        return folder
    check_packages()
    _check_space(folder)
    try:
        built_once(folder, lambda temporary: build(recipe, temporary, _say))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder} could not be written: {error}. Nothing half-made was left there; give another folder, or free "
            f"{SPACE >> 20} MiB and run it again."
        ) from error
    if folder == output:
        folder.with_name(folder.name + ".lock").unlink(missing_ok=True)  # tidy where people look
    return folder


def _check_free(folder: Path) -> None:
    if folder.exists():
        raise UserError(f"{folder} exists: nothing was written. Give a new folder, or delete it first.")
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
