"""Training a policy that sees: laws that hold for every family, on tiny random models."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.testing import assert_close

from lit_agentrl.envs import SokobanSuite
from lit_agentrl.methods import GiGPOModule, TreeGRPOModule
from lit_agentrl.models.policy import Lora, Vision
from lit_agentrl.models.reference import Reference
from lit_agentrl.models.vision import VisionInputs
from lit_agentrl.rollouts import ChainRollout, HistoryWindow, TreeRollout
from lit_agentrl.types import StopReason, TrainBatch
from runs import checkpoint, run_alone
from test_resume import same
from vlm_fits import SGD, Fit, Slides, SlidesEnvironment, drift, fit, noise, num_unique
from vlm_folders import TRAINABLE, build_vlm_folder

Fits = Callable[[str, str], Fit]

TIGHT: dict[str, Any] = {"lora": Lora(r=4), "dtype": "float64", "optimizer": SGD}
WHOLE: dict[str, Any] = {"vision": Vision(tower="trained"), "kl_coef": 0.1, "reference": Reference("sync", 1)}
"""Every weight, and a reference that is a copy of them all."""
KINDS: dict[str, dict[str, Any]] = {
    "shared": {**TIGHT, "share_prefix": True},
    "padded": {**TIGHT, "share_prefix": False},
    "whole": {**WHOLE, "epochs": 2},
    "half": {**WHOLE, "epochs": 1},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Folders by family, each built when it is first asked for."""
    root = tmp_path_factory.mktemp("vlms")
    return cache(lambda name: build_vlm_folder(root / name, name))


@pytest.fixture(scope="module")
def fits(folders: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Fits:
    """Fits by family and kind, each run when it is first asked for."""
    root = tmp_path_factory.mktemp("fits")
    return cache(lambda name, kind: fit(folders(name), root / name / kind, **KINDS[kind]))


def batches(made: Fit) -> list[TrainBatch]:
    """What the last iteration trained on."""
    return made.data._batches


def assert_same_update(one: Fit, other: Fit) -> None:
    """Whatever was shared, the same weights, which did move."""
    assert_close(one.weights(), other.weights(), rtol=0, atol=1e-6)
    assert max(float((value - one.before[name]).abs().max()) for name, value in one.weights().items()) > 0.05


# --- one turn ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINABLE)
@pytest.mark.parametrize("kind", ["shared", "whole"])
def test_what_was_sampled_is_what_is_trained(name, kind, fits):
    """Before the first step the ratio of every token is 1, with an adapter and with every weight."""
    assert 0 < fits(name, kind).drift < 1e-5


@pytest.mark.parametrize("name", TRAINABLE)
def test_other_pictures_would_be_seen(name, folders, tmp_path):
    """The law above can fail: with the pictures of two groups exchanged, the ratios are others."""
    made = fit(folders(name), tmp_path, **KINDS["padded"])
    (batch,) = batches(made)
    made.lm.load_state_dict(made.before, strict=False)
    assert drift(made.module, batch) < 1e-5
    vision = batch.vision
    assert isinstance(vision, VisionInputs)
    assert sorted(vision.shown) == [[0]] * 3 + [[1]] * 3
    vision.shown = [[1 - image] for (image,) in vision.shown]
    assert drift(made.module, batch) > 1e-3


@pytest.mark.parametrize("name", TRAINABLE)
def test_groups_in_the_same_words_are_told_apart_by_their_pictures(name, fits):
    """Equal tokens, different prefixes: only the words before the picture are shared by the two groups."""
    made = fits(name, "shared")
    (batch,) = batches(made)
    first, second = (group.trajectories[0].steps[0] for group in made.data.groups)
    assert list(first.context_ids) == list(second.context_ids)
    (prompt,) = {len(step.context_ids) for group in made.data.groups for t in group.trajectories for step in t.steps}
    assert isinstance(batch.vision, VisionInputs)
    words = list(first.context_ids).index(batch.vision.image_token_id)
    assert num_unique(batch) > 2 * prompt - words  # two prompts, and some of the six answers
    assert num_unique(batch) <= 2 * prompt - words + 6 * 4


@pytest.mark.parametrize("name", TRAINABLE)
def test_shared_prefixes_change_the_cost_and_not_the_weights(name, fits):
    shared, padded = fits(name, "shared"), fits(name, "padded")
    assert_same_update(shared, padded)
    (batch,) = batches(padded)
    assert padded.num_encoded == batch.token_ids.numel()
    assert shared.num_encoded == num_unique(batches(shared)[0]) < padded.num_encoded / 2


@pytest.mark.parametrize("name", TRAINABLE)
def test_what_is_trained_gets_gradients_and_nothing_else_moves(name, fits):
    """An adapter on the language model alone, or every weight, the vision tower's too."""
    adapter, whole = fits(name, "shared"), fits(name, "whole")
    assert adapter.gradients.keys() == {"language"}
    assert whole.gradients.keys() == {"language", "connector", "tower"}
    assert min(*adapter.gradients.values(), *whole.gradients.values()) > 1e-4
    after = adapter.weights(only_trained=False)
    assert all(same(after[name], value) for name, value in adapter.before.items() if "lora_" not in name)


@pytest.mark.parametrize("name", TRAINABLE)
def test_resume_equals_uninterrupted_bit_by_bit(name, fits, folders):
    whole, half = fits(name, "whole"), fits(name, "half")
    run = half.run
    fit(folders(name), run, epochs=2, resume=True, **WHOLE)
    first, second = checkpoint(whole.run), checkpoint(run)
    assert first["epoch"] == second["epoch"] == 1
    for key in ("state_dict", "optimizer_states", "reference"):
        assert first[key]
        assert same(first[key], second[key])
    assert not same(first["state_dict"], first["reference"])


@pytest.mark.parametrize("name", TRAINABLE)
def test_checkpoints_hold_weights_and_no_pictures(name, fits):
    """Every tensor has a weight's shape, or is a counter; neither an image nor its pixels are among the bytes."""
    made = fits(name, "whole")
    file = made.run / "checkpoints" / "last.ckpt"
    shapes = {tuple(parameter.shape) for parameter in made.lm.parameters()}
    loaded = torch.load(file, weights_only=True)
    for state in loaded["RolloutDataModule"].pop("ranks"):
        state.pop("random")  # of the generators: no weights, and nothing seen
    kept = [t for t in tensors(loaded) if t.ndim]
    assert {tuple(t.shape) for t in kept} <= shapes
    num_weights = sum(parameter.numel() for parameter in made.lm.parameters())
    assert sum(t.numel() for t in kept) <= 4 * num_weights  # themselves, two moments, the reference
    written = file.read_bytes()
    weight = max(made.weights().values(), key=torch.numel)
    assert weight.numpy().tobytes()[:200] in written  # what is in it is found
    (batch,) = batches(made)
    assert isinstance(batch.vision, VisionInputs)
    shown = [pixels.numpy().tobytes() for values in batch.vision.pixels.values() for pixels in values]
    shown += [noise((task,)).tobytes() for task in Slides().tasks("train")]
    assert not any(some[:200] in written for some in shown if len(some) >= 200)


def tensors(value: object) -> list[torch.Tensor]:
    """All of them, through dicts and lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
    return [tensor for each in inner for tensor in tensors(each)]


# --- a picture at every turn ------------------------------------------------------------------------------------------

TURNS = 3
MANY = ("qwen2_5_vl", "qwen3_vl", "smolvlm", "llava_dino")
"""Of families that are alike here, one."""
TREES = {"rollout": TreeRollout(TURNS, trees=2, expansions=1, rounds=1, cut_actions="continue"), "group_size": None}
REBUILT = {"rollout": ChainRollout(TURNS, cut_actions="continue"), "chat": "rebuild", "memory": HistoryWindow()}


@pytest.mark.parametrize("name", MANY)
def test_trees_whose_every_turn_shows_a_picture(name, folders, tmp_path):
    """Turns are appended: a row shows the pictures of its path, a branch those of its trunk and then its own."""
    shared, padded = (
        fit(
            folders(name),
            tmp_path / str(share),
            method=TreeGRPOModule,
            suite=Slides(TURNS),
            data=TREES,
            share_prefix=share,
            **TIGHT,
        )
        for share in (True, False)
    )
    assert 0 < shared.drift < 1e-5
    assert_same_update(shared, padded)
    assert shared.num_encoded == sum(map(num_unique, batches(shared))) < padded.num_encoded / 1.5
    leaves = [leaf for group in shared.data.groups for leaf in group.trajectories]
    assert all([len(step.images) for step in leaf.steps] == [1, 2, 3] for leaf in leaves)
    pairs = list(zip(leaves[::2], leaves[1::2], strict=True))  # of every tree its trunk and its branch
    assert len(pairs) == 4
    for trunk, branch in pairs:
        alike = [one.action == other.action for one, other in zip(trunk.steps, branch.steps, strict=True)]
        num_alike = [*alike, False].index(False)
        shown = [[pixels.tobytes() for pixels in leaf.steps[-1].images] for leaf in (trunk, branch)]
        common = min(TURNS, 1 + num_alike)
        assert shown[0][:common] == shown[1][:common]
        assert not set(shown[0][common:]) & set(shown[1][common:])
    assert any(trunk.steps[0] is branch.steps[0] for trunk, branch in pairs)


@pytest.mark.parametrize("name", MANY)
def test_rebuilt_prompts_show_the_present_picture_alone(name, folders, tmp_path):
    """GiGPO: a row a step, a picture a row."""
    shared, padded = (
        fit(
            folders(name),
            tmp_path / str(share),
            method=GiGPOModule,
            suite=Slides(TURNS),
            data=REBUILT,
            share_prefix=share,
            **TIGHT,
        )
        for share in (True, False)
    )
    assert 0 < shared.drift < 1e-5
    assert_same_update(shared, padded)
    shown = [row for batch in batches(shared) for row in batch.vision.shown]
    assert [len(row) for row in shown] == [1] * (2 * 3 * TURNS)
    steps = [step for group in shared.data.groups for t in group.trajectories for step in t.steps]
    assert len({step.images[0].tobytes() for step in steps}) == 2 + 2 * 3 * (TURNS - 1)
    assert "Steps taken: 2" in steps[2].prompt


class TornSlides(Slides):
    """Whose second picture is a file that is gone, in one task of two."""

    def make(self, task: str) -> SlidesEnvironment:
        environment = super().make(task)
        if int(task[-1]) % 2:
            environment.missing_at = 1
        return environment


@pytest.mark.parametrize("data", [TREES, REBUILT], ids=["trees", "rebuilt"])
def test_a_picture_that_is_gone_later_fails_the_episode_there(data, folders, tmp_path):
    """What was played until then is not trained either; the other prompt is."""
    made = fit(folders("llava"), tmp_path, suite=TornSlides(TURNS), data={**data, "num_prompts": 6}, **TIGHT)
    groups = {group.prompt_id: group.trajectories for group in made.data.groups}
    assert len(groups) == 6
    for task, trajectories in groups.items():
        is_torn = int(task[-1]) % 2 == 1
        assert {t.stop_reason for t in trajectories} == {StopReason.ENV_ERROR if is_torn else StopReason.DONE}
        assert {len(t.steps) for t in trajectories} == {1 if is_torn else TURNS}
        assert all(("There is no image file /gone/away.png" in t.error) == is_torn for t in trajectories)
    shown = sum(len(batch.vision.shown) for batch in batches(made) if batch.vision is not None)
    assert shown == sum(len(groups[task]) for task in groups if int(task[-1]) % 2 == 0) * (
        TURNS if data is REBUILT else 1
    )


def test_trees_of_a_real_game(folders, tmp_path):
    """Sokoban as pictures: 40 x 40 pixels a turn, under rules of 400 tokens."""
    folder = Path(build_vlm_folder(tmp_path / "vlm", "qwen2_5_vl"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 2048  # rotary: no weight depends on it
    (folder / "config.json").write_text(json.dumps(config))
    game = SokobanSuite(size=5, min_moves=2, max_moves=5, observation="image", scale=1)
    data = {**TREES, "max_length": 1500, "max_tokens": 8000}
    made = fit(str(folder), tmp_path / "run", method=TreeGRPOModule, suite=game, data=data, **TIGHT)
    assert 0 < made.drift < 1e-5
    leaf = made.data.groups[0].trajectories[0]
    assert [pixels.shape for pixels in leaf.steps[-1].images] == [(40, 40, 3)] * TURNS
    assert leaf.cost.env_steps == TURNS
    assert made.num_encoded == sum(map(num_unique, batches(made)))


# --- ranks ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_vl", "llava_dino"])
def test_two_gloo_ranks_train_as_one(name, folders, tmp_path):
    """Three prompts, so that one rank has less to do, and several micro-batches with pictures of their own."""
    config = {
        "model": {
            "class_path": "GRPOPlusPlusModule",
            "init_args": {
                "pretrained": folders(name),
                "vision": {"tower": "trained"},
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}},
            },
        },
        "data": {
            "class_path": "RolloutDataModule",
            "init_args": {
                "environment": {"class_path": "vlm_fits.Slides"},
                "rollout": {"class_path": "ChainRollout", "init_args": {"max_steps": 1, "cut_actions": "continue"}},
                "rewards": [{"function": "runs.mean_token"}],
                "sampling": {"max_new_tokens": 4},
                **{"num_prompts": 3, "group_size": 3, "max_length": 120, "max_tokens": 150, "num_passes": 2},
            },
        },
        "trainer": {"max_epochs": 2, "accelerator": "cpu"},
        "evaluation": {"num_tasks": 2},
        "transcripts": {"show": 0},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    found = []
    for run, strategy in (("one", ()), ("two", ("--trainer.strategy", "ddp", "--trainer.devices", "2"))):
        words = ["fit", "--config", str(tmp_path / "config.yaml"), "--trainer.default_root_dir", str(tmp_path / run)]
        code, output = run_alone([*words, *strategy])
        assert code == 0, output
        found.append(checkpoint(tmp_path / run))
    assert_close(found[1]["state_dict"], found[0]["state_dict"], rtol=1e-3, atol=1e-5)
    totals = [each["RolloutDataModule"]["totals"] for each in found]
    generated, seen = zip(
        *((of["generated_tokens"], of["prefilled_tokens"] + of["cached_tokens"]) for of in totals), strict=True
    )
    assert len(set(generated)) == len(set(seen)) == 1, totals  # what a rank has cached, another has to compute
    before = torch.load(tmp_path / "one" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert {name.split(".")[3] for name in before} >= {"visual"} or any("vision_tower" in name for name in before)
