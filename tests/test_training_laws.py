"""What must not change the weights of a run: micro-batches, prefix sharing, where old log-probabilities come from."""

import pytest
import torch

from lit_agentrl.datamodules.signal import has_signal
from lit_agentrl.types import StopReason, Trajectory, TrajectoryGroup
from runs import checkpoint, fit, metrics


def weights(run):
    return checkpoint(run)["state_dict"]


@pytest.fixture(scope="module")
def plain(tiny_lm, tmp_path_factory):
    """The run that the others are compared with: everything in one micro-batch, nothing shared."""
    folder = tmp_path_factory.mktemp("plain")
    fit(tiny_lm, folder, "--data.max_tokens=100000", "--model.share_prefix=false")
    return folder


@pytest.mark.parametrize(
    "more",
    [
        ("--data.max_tokens=256", "--model.share_prefix=false"),
        ("--data.max_tokens=100000",),
        ("--data.max_tokens=256",),
        ("--model.old_logprobs=recompute",),
        ("--model.gradient_checkpointing=true",),
    ],
    ids=["micro-batches", "shared", "shared-micro-batches", "recomputed", "checkpointing"],
)
def test_the_same_weights(tiny_lm, tmp_path, plain, more):
    """Token-mean over the optimiser step: no split, no sharing and no recomputation changes what is learnt."""
    fit(tiny_lm, tmp_path, *more)
    for name, value in weights(plain).items():
        # Adam divides by the root of the second moment, which magnifies the rounding of near-zero gradients.
        torch.testing.assert_close(weights(tmp_path)[name], value, rtol=5e-3, atol=5e-5)
    moved = max(float(v.abs().max()) for k, v in weights(plain).items() if "lora_B" in k)
    assert moved > 5e-3


def test_a_wrong_denominator_would_be_seen(tiny_lm, tmp_path, plain):
    """The law above can fail: another aggregation gives other weights."""
    fit(tiny_lm, tmp_path, "--model.aggregation=seq_mean_token_sum", "--trainer.gradient_clip_val=1e-4")
    values = weights(tmp_path)
    assert any((value - values[name]).abs().max() > 1e-4 for name, value in weights(plain).items())


def test_zero_advantage_rows_leave_loss_and_denominator(tiny_lm, tmp_path):
    """A reward that is the same for all gives no rows, no update, and is counted."""
    fit(
        tiny_lm,
        tmp_path,
        '--data.rewards=[{"function": "lit_agentrl.rewards.solved"}]',
        "--model.drop_zero_advantage=true",
    )
    rows = [row for row in metrics(tmp_path) if row.get("reward/mean")]
    assert [float(row["rows"]) for row in rows] == [0.0, 0.0]
    assert [float(row["skipped_updates"]) for row in rows] == [1.0, 1.0]
    assert [float(row["zero_signal"]) for row in rows] == [1.0, 1.0]
    assert not any(bool(v.any()) for k, v in weights(tmp_path).items() if "lora_B" in k)


def test_binary_learns_where_a_group_relative_advantage_is_dead(tiny_lm, tmp_path):
    """All wrong: GRPO has no signal, GRPO++'s sign advantage pushes down (must-pass 1 of the reconstruction)."""
    fit(tiny_lm, tmp_path, '--data.rewards=[{"function": "lit_agentrl.rewards.solved"}]', "--model.advantage=binary")
    assert any(bool(v.any()) for k, v in weights(tmp_path).items() if "lora_B" in k)


def test_dynamic_sampling_tries_new_prompts_up_to_the_cap(tiny_lm, tmp_path):
    """Without any signal all rounds are used, every round takes new prompts, and the step is skipped."""
    state = fit(
        tiny_lm,
        tmp_path,
        '--data.rewards=[{"function": "lit_agentrl.rewards.solved"}]',
        "--data.max_rounds=3",
        "--data.signal=success",
    )
    rows = [row for row in metrics(tmp_path) if row.get("rounds")]
    assert [float(row["rounds"]) for row in rows] == [3.0, 3.0]
    assert state["RolloutDataModule"] == {"position": 2 * 3 * 2}


def test_signal_is_judged_without_failed_trajectories():
    def group(*rewards: float) -> TrajectoryGroup:
        return TrajectoryGroup("p", [Trajectory([], total_reward=r, success=r > 0.5) for r in rewards])

    assert has_signal(group(0.0, 0.2), "reward")
    assert not has_signal(group(0.0, 0.2), "success")
    assert not has_signal(group(1.0, 1.0), "reward")
    broken = group(0.0, 1.0)
    broken.trajectories[1].stop_reason = StopReason.ENV_ERROR
    assert not has_signal(broken, "reward")


@pytest.mark.parametrize(("mode", "extra"), [("adapter_off", ""), ("frozen", ""), ("ema", ', "decay": 0.9')])
def test_kl_pulls_towards_the_reference(tiny_lm, tmp_path, mode, extra):
    """A heavy KL term keeps the policy nearer to its reference than none, and is logged."""
    far, near = tmp_path / "far", tmp_path / "near"
    common = ("--trainer.max_epochs=4", "--data.num_passes=4", "--model.optimizer.lr=3e-3")
    fit(tiny_lm, far, *common)
    fit(tiny_lm, near, *common, "--model.kl_coef=20", f'--model.reference={{"mode": "{mode}"{extra}}}')
    last = [row for row in metrics(near) if row.get("train/kl")][-1]
    assert float(last["train/kl"]) >= 0

    def distance(run):
        return sum(float(v.square().sum()) for k, v in weights(run).items() if "lora_B" in k)

    assert distance(near) < distance(far)
