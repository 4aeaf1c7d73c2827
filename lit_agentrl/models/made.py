"""Models that the command line makes on this machine, by name: where they lie once they are made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lit_agentrl.cache import cache_dir
from lit_agentrl.errors import UserError


@dataclass(frozen=True)
class MadeModel:
    """A model that is made once, into the cache."""

    folder: str
    """Below the cache; another recipe has another one."""
    command: str
    takes: str
    """How long, for people."""


MADE = {
    "smollm2-dinov2": MadeModel("vlm/smollm2-dinov2-r1", "lit-agentrl make-vlm", "about 12 minutes on two cores"),
}


def made_folder(name: str) -> Path:
    """Where the model of this name lies.

    Raises:
        UserError: It was not made yet.
    """
    model = MADE[name]
    folder = cache_dir() / model.folder
    if not folder.is_dir():
        raise UserError(
            f"The model {name!r} has to be made first, which takes {model.takes}: {model.command} "
            f"(it is then found in {folder})"
        )
    return folder
