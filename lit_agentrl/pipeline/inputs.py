"""What stages read: files that are given, and what earlier stages leave."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lit_agentrl.errors import UserError
from lit_agentrl.pipeline.stage import Stage

OWN = {"trainer.default_root_dir", "ckpt_path"}
"""Options of a configuration file that name the run's own folder, or that the pipeline sets."""


@dataclass(slots=True, frozen=True)
class Input:
    """A file or folder that a stage reads."""

    path: str
    stage: str | None
    """The earlier stage that leaves it; None where it was given."""
    is_listed: bool
    """Whether it stands under `inputs`; otherwise it was found among the options."""


def find_inputs(stages: Sequence[Stage]) -> dict[str, tuple[Input, ...]]:
    """The inputs of every stage, by its name.

    An option or a line of a configuration file is an input where its text has a slash and names a file or folder that
    is there, or one that an earlier stage leaves. What is listed under `inputs` is one in any case.

    Raises:
        UserError: One is made by a later stage or by the stage itself; a listed one is not there and not made.
    """
    return {stage.name: tuple(_of_stage(stage, stages[:number], stages)) for number, stage in enumerate(stages)}


def _of_stage(stage: Stage, earlier: Sequence[Stage], stages: Sequence[Stage]) -> Iterator[Input]:
    seen: set[str] = set()
    for text, is_listed in [*((path, True) for path in stage.inputs), *((path, False) for path in _texts(stage))]:
        if text in seen or not (is_listed or os.sep in text):
            continue
        seen.add(text)
        maker = maker_of(text, stages)
        if maker is stage and not is_listed:
            continue  # where it writes
        if maker is not None and maker not in earlier:
            when = "leaves itself" if maker is stage else f"stage {maker.name!r} leaves, which comes later"
            raise UserError(f"stage {stage.name!r} reads {text}, which {'it ' if maker is stage else ''}{when}.")
        if maker is not None:
            yield Input(text, maker.name, is_listed)
        elif _exists(text):
            yield Input(text, None, is_listed)
        elif is_listed:
            raise UserError(
                f"stage {stage.name!r}: its input {text} is not there, and no earlier stage leaves it. "
                + _left(earlier)
            )


def _left(earlier: Sequence[Stage]) -> str:
    left = [f"{stage.name}: {path}" for stage in earlier for path in stage.leaves().values()]
    return f"They leave {', '.join(left)}." if left else "There is no earlier stage that leaves anything."


def maker_of(text: str, stages: Sequence[Stage]) -> Stage | None:
    """The stage in whose run folder or among whose outputs a path lies; the innermost of several."""
    path, found = Path(os.path.abspath(text)), None
    depth = -1
    for stage in stages:
        for place in (stage.run, *stage.leaves().values()):
            whole = Path(os.path.abspath(place))
            if (path == whole or whole in path.parents) and len(whole.parts) > depth:
                found, depth = stage, len(whole.parts)
    return found


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # a text too long for a name, an unknown user, a null byte
        return False


def _texts(stage: Stage) -> Iterator[str]:
    """The texts among the options that hold: those of the stage before those of its configuration files."""
    options = {key.replace(".init_args", ""): value for key, value in stage.options.items()}
    for key, value in (_settings(stage.configs) | options).items():
        if key not in OWN or key in options:
            yield from _strings(value)


def _settings(configs: Sequence[Path]) -> dict[str, Any]:
    """What the files say together, by dotted names without `init_args`; what cannot be resolved stays as it is."""
    if not configs:
        return {}
    merged = OmegaConf.create({})
    try:
        for config in configs:
            loaded: DictConfig | ListConfig = OmegaConf.load(config)
            merged = OmegaConf.merge(merged, loaded)  # type: ignore[assignment]  # of mappings it is one
    except (OmegaConfBaseException, ValueError, OSError):
        return {}  # the command itself says what is wrong with it
    try:
        plain = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException:
        plain = OmegaConf.to_container(merged, resolve=False)
    return _flat(plain) if isinstance(plain, dict) else {}


def _flat(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = prefix if key == "init_args" else f"{prefix}.{key}".lstrip(".")
        flat |= _flat(value, name) if isinstance(value, dict) else {name: value}
    return flat


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
