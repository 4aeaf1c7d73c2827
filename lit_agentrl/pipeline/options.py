"""What the YAML of a pipeline or a comparison says, as options and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from lit_agentrl.errors import UserError


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
