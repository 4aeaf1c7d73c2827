"""Trajectories as plain records: one JSON line each in a run folder, one table each in a terminal."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict

import numpy as np
from rich.table import Table
from rich.text import Text

from lit_agentrl.files import write_text
from lit_agentrl.images import Image, ImageRef
from lit_agentrl.types import Step, Trajectory, TrajectoryGroup


class ImageRecord(TypedDict):
    """An image that the policy saw, by name: its pixels are not written."""

    path: str
    """Empty for an image that is no file."""
    sha256: str
    """Of the file, or of the pixels [H, W, 3], their shape before them as text."""


class StepRecord(TypedDict):
    """One decision of the policy."""

    observation: str
    action: str
    valid: bool | None
    """Whether the environment could use the action; None where it does not say."""
    reward: float | None
    context_tokens: int
    action_tokens: int
    mean_logprob: float | None
    finish: str
    images: list[ImageRecord]
    """The images in the context, in order."""


class TrajectoryRecord(TypedDict):
    """One episode; a number that is not finite is None, because JSON has no word for it."""

    prompt_id: str
    trajectory: int
    tree_id: int
    steps: list[StepRecord]
    rewards: dict[str, float | None]
    total_reward: float | None
    success: bool | None
    stop_reason: str
    error: str
    metrics: dict[str, float | None]
    """The environment's own numbers."""
    mean_logprob: float | None
    cost: dict[str, float]
    """What this trajectory alone cost (`types.Ledger`); a branch of a tree pays from where it left the others."""


def trajectory_record(prompt_id: str, index: int, trajectory: Trajectory) -> TrajectoryRecord:
    """The record of the `index`-th trajectory of a group."""
    return {
        "prompt_id": prompt_id,
        "trajectory": index,
        "tree_id": trajectory.tree_id,
        "steps": [_step_record(step) for step in trajectory.steps],
        "rewards": {name: _finite(value) for name, value in trajectory.rewards.items()},
        "total_reward": _finite(trajectory.total_reward),
        "success": trajectory.success,
        "stop_reason": trajectory.stop_reason.value,
        "error": trajectory.error,
        "metrics": {name: _finite(value) for name, value in trajectory.metrics.items()},
        "mean_logprob": _mean_logprob(trajectory.steps),
        "cost": asdict(trajectory.cost),
    }


def group_records(groups: Iterable[TrajectoryGroup]) -> list[TrajectoryRecord]:
    """The records of every trajectory of `groups`, in order."""
    return [
        trajectory_record(group.prompt_id, index, trajectory)
        for group in groups
        for index, trajectory in enumerate(group.trajectories)
    ]


def write_records(path: Path, records: Iterable[Mapping[str, object]]) -> None:
    """Replace `path` atomically by one JSON line per record."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def sample_records(records: Sequence[TrajectoryRecord], num: int) -> list[TrajectoryRecord]:
    """`num` records spread evenly from the lowest to the highest total reward, both ends included."""
    ordered = sorted(
        records, key=lambda record: -math.inf if record["total_reward"] is None else record["total_reward"]
    )
    if num >= len(ordered):
        return ordered
    if num == 1:
        return ordered[-1:]
    return [ordered[round(place * (len(ordered) - 1) / (num - 1))] for place in range(num)]


def render_transcript(record: TrajectoryRecord, *, max_characters: int = 400) -> Table:
    """A table of the episode's steps, its outcome in the title and its reward components in the caption.

    Args:
        record: The episode.
        max_characters: Longer observations and actions lose their middle.
    """
    table = Table(title=_title(record), caption=_caption(record), show_lines=True, expand=True)
    table.add_column("step", justify="right", width=4)
    table.add_column("observation", ratio=3, overflow="fold")
    table.add_column("action", ratio=2, overflow="fold")
    table.add_column("reward", justify="right", width=7)
    table.add_column("tokens", justify="right", width=6)
    for number, step in enumerate(record["steps"], start=1):
        table.add_row(
            str(number),
            _plain(step["observation"], max_characters),
            _plain(step["action"], max_characters),
            _number(step["reward"]),
            f"{step['action_tokens']}{'+' if step['finish'] == 'length' else ''}",  # + marks an action that was cut
        )
    return table


def _step_record(step: Step) -> StepRecord:
    return {
        "observation": step.observation,
        "action": step.action,
        "valid": step.valid,
        "reward": _finite(step.reward),
        "context_tokens": len(step.context_ids),
        "action_tokens": len(step.action_ids),
        "mean_logprob": _mean_logprob([step]),
        "finish": step.finish,
        "images": [_image_record(image) for image in step.images],
    }


def _image_record(image: Image) -> ImageRecord:
    if isinstance(image, ImageRef):
        return {"path": image.path, "sha256": image.sha256}
    pixels = np.ascontiguousarray(image)
    return {"path": "", "sha256": hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).hexdigest()}


def _mean_logprob(steps: Iterable[Step]) -> float | None:
    """Mean log-probability of the action tokens; None without any."""
    logprobs = [logprob for step in steps for logprob in step.logprobs]
    return _finite(sum(logprobs) / len(logprobs)) if logprobs else None


def _finite(value: float) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _title(record: TrajectoryRecord) -> Text:
    outcome = {True: "solved", False: "not solved", None: "outcome unknown"}[record["success"]]
    title = f"{record['prompt_id']} #{record['trajectory']}: {outcome}, reward {_number(record['total_reward'])}"
    return _plain(f"{title}, ended by {record['stop_reason']}", 200)


def _caption(record: TrajectoryRecord) -> Text:
    parts = [f"{name} {_number(value)}" for name, value in record["rewards"].items()]
    if record["mean_logprob"] is not None:
        parts.append(f"mean logprob {record['mean_logprob']:.2f}")
    if record["error"]:
        parts.append(f"error: {record['error']}")
    return _plain(" | ".join(parts), 400)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _plain(text: str, max_characters: int) -> Text:
    """`text` shortened, as a `Text`: rich never reads it as markup. Control characters could drive the terminal."""
    if len(text) > max_characters:
        half = max_characters // 2
        text = f"{text[:half]} […] {text[-half:]}"
    return Text(
        "".join(letter if letter.isprintable() or letter in "\n\t" else "\N{REPLACEMENT CHARACTER}" for letter in text)
    )
