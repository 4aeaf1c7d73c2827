"""The method of CONTRIBUTING.md is a method: its block runs, learns, and gives the numbers it says."""

import json
import re
from pathlib import Path

import pytest

from lit_agentrl.types import Step, Trajectory, TrajectoryGroup
from runs import checkpoint, fit

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The block, as a module that can be imported."""
    (block,) = re.findall(r"```python\n(.*?class RLOOModule.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    folder = tmp_path_factory.mktemp("example")
    (folder / "rloo_example.py").write_text(block)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield __import__("rloo_example")


def test_its_advantages(example):
    """Rewards 1, 0, 0: each against the mean of the other two."""
    steps = [Step([1], [2], [0.0]), Step([1, 2, 3], [4], [0.0])]
    group = TrajectoryGroup("p", [Trajectory(list(steps), total_reward=r) for r in (1.0, 0.0, 0.0)])
    module = example.RLOOModule(pretrained="unused")
    assert module.advantages(group) == [[1.0, 1.0], [-0.5, -0.5], [-0.5, -0.5]]


def test_it_trains_from_the_command_line(example, tiny_lm, tmp_path):
    """By its import path, with no change to the package."""
    plain = {"pretrained": tiny_lm, "lora": {"r": 4, "alpha": 8}, "loss": "reinforce"}
    state = fit(
        tiny_lm, tmp_path, f'--model={{"class_path": "rloo_example.RLOOModule", "init_args": {json.dumps(plain)}}}'
    )
    assert state["global_step"] == 2
    assert any(bool(value.any()) for name, value in checkpoint(tmp_path)["state_dict"].items() if "lora_B" in name)
