"""Two ranks are one: the same trajectories, the same weights."""

import json

import pytest
import torch

from runs import COUNTED, checkpoint, options, run_alone

TWO = ("--trainer.strategy", "ddp", "--trainer.devices", "2")
MORE = ("--data.num_prompts", "3", "--data.max_tokens", "256", "--data.num_passes", "2")


def actions(run):
    """What every trajectory of the first iteration said, by prompt, whichever rank wrote it."""
    said = {}
    for path in sorted((run / "transcripts").glob("iteration_000000*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            said[record["prompt_id"], record["trajectory"]] = [step["action"] for step in record["steps"]]
    return said


@pytest.mark.slow
@pytest.mark.parametrize("advantage", ["grpo", "batch_std"])
def test_two_gloo_ranks_train_as_one(tiny_lm, tmp_path, advantage):
    """An odd number of prompts, so that one rank has less to do than the other, and several micro-batches."""
    one, two = tmp_path / "one", tmp_path / "two"
    for run, strategy in ((one, ()), (two, TWO)):
        code, output = run_alone(options(tiny_lm, run, *MORE, *COUNTED, *strategy, "--model.advantage", advantage))
        assert code == 0, output
    assert actions(one) == actions(two)
    assert len(actions(two)) == 12
    first, second = checkpoint(one)["state_dict"], checkpoint(two)["state_dict"]
    assert first.keys() == second.keys()
    moved = max(float(value.abs().max()) for name, value in first.items() if "lora_B" in name)
    assert moved > 1e-3  # B starts at zero: the runs did train
    spent = [checkpoint(run)["RolloutDataModule"]["totals"] for run in (one, two)]
    assert spent[0]["generated_tokens"] > 0
    assert spent[0]["tool_calls"] > 0
    for name in ("generated_tokens", "tool_calls", "env_steps"):
        assert spent[0][name] == spent[1][name]
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=1e-5)
