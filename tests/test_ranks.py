"""Two ranks are one: the same trajectories, the same weights."""

import json

import pytest
import torch

from rank_runs import run_ranks
from runs import COUNTED, checkpoint, fit, options, run_alone

STRATEGIES = {"ddp": "ddp", "fsdp2": '{"class_path": "FSDP2Strategy"}'}
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
@pytest.mark.parametrize(("strategy", "advantage"), [("ddp", "grpo"), ("ddp", "batch_std"), ("fsdp2", "batch_std")])
def test_two_gloo_ranks_train_as_one(tiny_lm, tmp_path, strategy, advantage):
    """An odd number of prompts, so that one rank has less to do than the other, and several micro-batches."""
    one, two = tmp_path / "one", tmp_path / "two"
    for run, ranks in ((one, ()), (two, ("--trainer.strategy", STRATEGIES[strategy], "--trainer.devices", "2"))):
        code, output = run_alone(options(tiny_lm, run, *MORE, *COUNTED, *ranks, "--model.advantage", advantage))
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


@pytest.mark.slow
def test_sharding_on_one_rank_changes_nothing(tiny_lm, tmp_path):
    """A GPU alone may have the strategy of many."""
    alone = fit(tiny_lm, tmp_path / "alone", *MORE)
    ranks = ("--trainer.strategy", STRATEGIES["fsdp2"], "--trainer.devices", "1")
    run_ranks([options(tiny_lm, tmp_path / "sharded", *MORE, *ranks)], size=1)  # groups of processes outlive a run
    for name, value in checkpoint(tmp_path / "sharded")["state_dict"].items():
        torch.testing.assert_close(value, alone["state_dict"][name], rtol=1e-3, atol=1e-5)
