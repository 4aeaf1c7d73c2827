"""What a pair's policy was: names, content hashes, versions."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lit_agentrl import __version__
from lit_agentrl.models.pretrained import resolve

PACKAGES = ("torch", "transformers", "peft")


def policy_origin(pretrained: str, checkpoint: str | None) -> dict[str, Any]:
    """The policy by name and content; the hash of a model that the hub keeps is not known."""
    source = resolve(pretrained)
    folders = [Path(source.weights), *([source.adapter] if source.adapter else [])]
    files = [file for folder in folders if folder.is_dir() for file in sorted(folder.glob("*.safetensors"))]
    origin: dict[str, Any] = {"pretrained": pretrained, "sha256": _sha256(files) if files else None}
    if checkpoint is not None:
        origin["checkpoint"] = {"path": checkpoint, "sha256": _sha256([Path(checkpoint)])}
    return origin


def versions() -> dict[str, str]:
    """Of what decides which tokens are sampled."""
    return {"lit_agentrl": __version__} | {name: version(name) for name in PACKAGES}


def _sha256(files: list[Path]) -> str:
    """Of one file's bytes; of several files, of their hashes."""
    digests = []
    for file in files:
        with file.open("rb") as opened:
            digests.append(hashlib.file_digest(opened, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
