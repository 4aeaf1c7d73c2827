"""The same few rows for every setting: rollouts are recorded once and replayed, files and sources are cut."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lit_agentrl.datamodules.conversation import ConversationSource
from lit_agentrl.doctor.contract.settings import Options
from lit_agentrl.errors import UserError
from lit_agentrl.rollouts.base import Prompt, RolloutContext, RolloutStrategy
from lit_agentrl.rollouts.chain import ChainRollout
from lit_agentrl.types import Conversation, TrajectoryGroup

MAX_GROUP = 4
"""Trajectories of a prompt, where a rollout leaves the choice."""


class Replay(RolloutStrategy):
    """Plays each prompt once and keeps its trajectories; a later run gets them back, on whichever rank.

    What a step is paid is drawn at random, N(0, 1), by prompt and step: an untrained policy often earns the same with
    all trajectories, and then no gradient would tell settings apart.

    Args:
        rollout: What plays.
        folder: Of the recorded groups, one file a prompt. Written and read by runs of one contract alone, in a folder
            that only its user can enter: what is unpickled here is what was pickled here.
        is_recording: Whether to play and keep, or to replay.
    """

    def __init__(self, rollout: RolloutStrategy, folder: str, is_recording: bool) -> None:
        self.rollout, self.folder, self.is_recording = rollout, Path(folder), is_recording

    def group_size(self, asked: int | None) -> int:
        """What the rollout says."""
        return self.rollout.group_size(asked)

    def collect(self, prompts: Sequence[Prompt], group_size: int, context: RolloutContext) -> list[TrajectoryGroup]:
        """One group per prompt."""
        if not self.is_recording:
            return [self._read(prompt) for prompt in prompts]
        groups = self.rollout.collect(prompts, group_size, context)
        for prompt, group in zip(prompts, groups, strict=True):
            pay_at_random(group, prompt.number)
            self._path(prompt).write_bytes(pickle.dumps(group))
        return groups

    def _path(self, prompt: Prompt) -> Path:
        return self.folder / f"{prompt.number}.pickle"

    def _read(self, prompt: Prompt) -> TrajectoryGroup:
        path = self._path(prompt)
        if not path.is_file():
            raise UserError(f"Prompt {prompt.number} was not played by the contract's first run: rows depend on ranks.")
        group: TrajectoryGroup = pickle.loads(path.read_bytes())
        return group


def pay_at_random(group: TrajectoryGroup, seed: int) -> None:
    """Give every step of a group a reward, N(0, 1); a step that trajectories share gets one."""
    draw = np.random.default_rng([seed, 7])
    paid: set[int] = set()
    for step in (step for trajectory in group.trajectories for step in trajectory.steps):
        if id(step) not in paid:
            paid.add(id(step))
            step.reward = float(draw.standard_normal())


class FirstConversations(ConversationSource):
    """The first conversations of a source.

    Args:
        source: Where they come from.
        count: How many.
    """

    def __init__(self, source: ConversationSource, count: int) -> None:
        self.source, self.count = source, count

    def conversations(self) -> Iterable[Conversation]:
        """In the source's order."""
        return list(islice(self.source.conversations(), self.count))


def cut(options: Options, count: int, folder: Path) -> Options:
    """Leave `count` prompts, conversations or pairs for one optimiser step, in place.

    Args:
        options: What all runs share; `replaying` turns the first run's options into those of the others.
        count: How many.
        folder: An own one, for what has to be kept.
    """
    data = options["data"]["init_args"]
    if "rollout" in data:
        _cut_rollouts(data, count, folder)
    elif "source" in data:
        wrapped = {"source": data["source"], "count": count}
        data["source"] = {"class_path": f"{__name__}.FirstConversations", "init_args": wrapped}
    elif _class_name(options["data"]) == "PreferenceDataModule":
        data["path"] = str(first_pairs(Path(data["path"]), count, folder / "pairs.jsonl"))
    if "batch_size" in data:
        data["batch_size"] = count
    return options


def replaying(options: Options) -> Options:
    """The options with recorded rollouts in the place of played ones; in place."""
    rollout = options["data"]["init_args"].get("rollout")
    if rollout is not None:
        rollout["init_args"]["is_recording"] = False
    return options


def _cut_rollouts(data: Options, count: int, folder: Path) -> None:
    played = data["rollout"] or {"class_path": f"{ChainRollout.__module__}.ChainRollout", "init_args": {}}
    if _class_name(played) == "ChainRollout":  # a tree's shape says how many trajectories it has
        data["group_size"] = min(data["group_size"] or MAX_GROUP, MAX_GROUP)
    kept = folder / "rollouts"
    kept.mkdir()
    wrapped = {"rollout": played, "folder": str(kept), "is_recording": True}
    data["rollout"] = {"class_path": f"{__name__}.Replay", "init_args": wrapped}
    data["rewards"] = None  # the return, which is drawn
    data["num_prompts"] = count


def first_pairs(source: Path, count: int, target: Path) -> Path:
    """A copy of a preference file's first pairs, images by their absolute paths."""
    if not source.is_file():
        raise UserError(f"No preference file {str(source)!r}.")
    with source.open(encoding="utf-8") as lines:
        chosen = list(islice((line for line in lines if line.strip()), count))
    target.write_text("".join(_relocated(line, source.absolute().parent) for line in chosen), encoding="utf-8")
    return target


def _class_name(given: Options) -> str:
    name: str = given["class_path"].rpartition(".")[2]
    return name


def _relocated(line: str, folder: Path) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return line  # the datamodule says what is wrong with it
    if isinstance(record, dict) and isinstance(record.get("images"), list):
        record["images"] = [_absolute(image, folder) for image in record["images"]]
    return json.dumps(record) + "\n"


def _absolute(image: Any, folder: Path) -> Any:
    if isinstance(image, str):
        return str(folder / image)
    if isinstance(image, dict) and isinstance(image.get("path"), str):
        return image | {"path": str(folder / image["path"])}
    return image
