"""The scripts that wait for a GPU run on a CPU, so that they cannot fail there for want of a file or a name."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import gpu_offline
import gpu_recipes
from gpu_policy import build

from lit_agentrl.datamodules.conversation import JSONLConversations
from lit_agentrl.datamodules.preference_file import read_preferences


def test_offline_rows_are_as_many_as_the_script_says_and_differ(tmp_path: Path) -> None:
    """A step of SFT is 32 conversations, one of DPO 16 pairs; all of a file have the same length, none is another's."""
    talks = list(JSONLConversations(str(gpu_offline.write_conversations(tmp_path / "a", 200, 40))).conversations())
    pairs = read_preferences(gpu_offline.write_pairs(tmp_path / "b", 200, 40))
    assert (len(talks), len(pairs)) == (32, 16)
    assert len({turns[0][0].text for turns in talks}) == 32
    assert {len(turns[0][1]) for turns in talks} == {40}
    assert all(len(pair.chosen) == len(pair.rejected) == 40 for pair in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("name", gpu_recipes.NAMES)
def test_every_recipe_runs_with_and_without_sharing(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe = next(path for path in gpu_recipes.RECIPES if path.stem == name)
    args = argparse.Namespace(device="cpu", quick=True, iterations=3, seconds=600)
    lm = build(tmp_path / "lm", "0.6b", True, torch.float32)
    from transformers import AutoConfig

    runs = {side: gpu_recipes.run(recipe, side, lm, args, []) for side in gpu_recipes.SIDES}
    lines = gpu_recipes.table(runs, AutoConfig.from_pretrained(lm))
    assert len(lines) == 5
    on, off = runs.values()
    assert len(on.metrics) == len(off.metrics) == 1
    assert on.works[0]["unique"][0] < on.works[0]["padded"][0]
    assert on.seconds("step") >= on.seconds("update") > 0
    json.dumps(on.works)
