"""`lit-agentrl consolidate`: a folder of shards as the single file that every strategy resumes from."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from lit_agentrl.checkpoints.optimizer_names import by_number
from lit_agentrl.checkpoints.whole import META, damage, is_folder
from lit_agentrl.errors import UserError
from lit_agentrl.files import replace_atomically


def main(options: list[str]) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser("lit-agentrl consolidate", description=__doc__)
    parser.add_argument("folder", type=Path, help="the folder of shards, e.g. RUN/checkpoints/last.ckpt")
    parser.add_argument("output", type=Path, help="the file to write")
    given = parser.parse_args(options)
    consolidate(given.folder, given.output)
    print(f"{given.folder} is now also {given.output} ({given.output.stat().st_size / 2**20:.1f} MiB)")


def consolidate(folder: Path, output: Path) -> None:
    """Write what the shards of `folder` hold together to `output`; it is all in memory meanwhile.

    PyTorch reads shards with pickle, which can run code: take folders that you trust alone.

    Raises:
        UserError: The folder is no whole checkpoint, or the output is there already.
    """
    if not is_folder(folder):
        raise UserError(f"{folder} is no folder of shards" + ("; a file needs no change." if folder.exists() else "."))
    if reason := damage(folder):
        raise UserError(f"{folder} is damaged: {reason}.")
    if output.exists():
        raise UserError(f"{output} is there already: name another file.")
    state: dict[str, Any] = {}
    everything = _EmptyStateDictLoadPlanner()  # type: ignore[no-untyped-call]
    _load_state_dict(state, storage_reader=FileSystemReader(folder), planner=everything, no_dist=True)
    checkpoint: dict[str, Any] = torch.load(folder / META, map_location="cpu", weights_only=True)
    checkpoint["state_dict"] = state["state_dict"]
    names = sorted((name for name in state if name.startswith("optimizer_")), key=lambda name: int(name[10:]))
    checkpoint["optimizer_states"] = [by_number(state[name]) for name in names]
    replace_atomically(output, lambda file: torch.save(checkpoint, file))
