"""Which checkpoint a command goes on from, said before anything is loaded."""

from __future__ import annotations

import sys
from pathlib import Path

from lit_agentrl.checkpoints.whole import damage, is_folder, newest_whole, num_iterations
from lit_agentrl.errors import UserError

SHARDING = ("FSDP2Strategy", "ModelParallelStrategy", "fsdp2")


def checked(path: Path, *, or_older: bool) -> Path:
    """`path`, where it is whole.

    Args:
        path: A checkpoint, a file or a folder of shards.
        or_older: Take the newest whole one of its folder in its place, and say so, where it is damaged.

    Raises:
        UserError: It is not there or damaged.
    """
    reason = damage(path)
    if not reason:
        return path
    older = newest_whole(path.parent, but=path)
    if not path.exists() and not path.is_symlink() and (older is None or not or_older):
        raise UserError(f"--ckpt_path {path}: no such file. A run's newest is in its folder at checkpoints/last.ckpt.")
    if older is None:
        raise UserError(f"--ckpt_path {path} is damaged: {reason}. No other in its folder is whole: start a new run.")
    if not or_older:
        raise UserError(f"--ckpt_path {path} is damaged: {reason}. The newest whole one is --ckpt_path {older}")
    number = num_iterations(older)
    print(
        f"{path} is damaged: {reason}. Going on from {older}"
        + (f" with iteration {number + 1}" if number else "")
        + "; what was trained after it is lost, and trained again.",
        file=sys.stderr,
        flush=True,
    )
    return older


def refuse_folder(path: Path, strategy: str) -> None:
    """Refuse a folder of shards where the strategy loads files alone.

    Raises:
        UserError: Says how to make a file of it.
    """
    if is_folder(path) and not any(name in strategy for name in SHARDING):
        raise UserError(
            f"--ckpt_path {path} is a folder of shards, which FSDP2Strategy alone resumes from. Make a file of it:\n"
            f"  lit-agentrl consolidate {path} {path.with_name(path.stem + '_whole.ckpt')}"
        )
