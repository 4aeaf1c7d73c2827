"""Where downloaded and converted files are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """The folder for files that can be made again: $LIT_AGENTRL_CACHE, else lit-agentrl in $XDG_CACHE_HOME or ~/.cache.

    It is not created here. An empty variable counts as unset, as the XDG base directory specification asks.
    """
    if own := os.environ.get("LIT_AGENTRL_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "lit-agentrl"
