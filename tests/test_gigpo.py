"""GiGPO as a method: numbers by hand, parity with the authors' code, what is logged, and whole runs."""

import math
import random

import pytest
import torch

from lit_agentrl.advantages import standardize
from lit_agentrl.datamodules import RolloutDataModule
from lit_agentrl.datamodules.collector import Order
from lit_agentrl.datamodules.signal import without_failures
from lit_agentrl.envs import EchoSuite
from lit_agentrl.errors import UserError
from lit_agentrl.methods import GiGPOModule
from lit_agentrl.rows import to_rows
from lit_agentrl.types import Step, StopReason, Trajectory, TrajectoryGroup
from runs import ROOT, checkpoint, main, metrics, options, run_alone

GIGPO = str(ROOT / "configs" / "experiment" / "gigpo_echo.yaml")


def module(**options) -> GiGPOModule:
    return GiGPOModule(pretrained="not loaded", **options)


def play(states: str, *rewards: float, invalid: tuple[int, ...] = (), total: float | None = None) -> Trajectory:
    """An episode through one-letter states; rewards fill up from the left with 0."""
    paid = [0.0] * (len(states) - len(rewards)) + list(rewards)
    steps = [
        Step([1] * (t + 1), [7, 8], [-0.1, -0.2], reward=r, state=s, anchor=s, valid=t not in invalid)
        for t, (s, r) in enumerate(zip(states, paid, strict=True))
    ]
    return Trajectory(steps, total_reward=sum(paid) if total is None else total)


def group(*trajectories: Trajectory) -> TrajectoryGroup:
    return TrajectoryGroup("task", list(trajectories))


def close(result: list[list[float]], expected: list[list[float]], tolerance: float = 1e-6) -> None:
    assert [len(row) for row in result] == [len(row) for row in expected]
    for row, numbers in zip(result, expected, strict=True):
        assert row == pytest.approx(numbers, abs=tolerance)


WIN_AND_LOSS = group(play("aba", 10.0), play("ac"))

# --- the paper ---


def test_the_defaults_are_the_papers():
    """Scores 10, 0 over trajectories: 5 / sqrt(50) each way. At gamma 0.95 state a holds 9.025, 10 and 0."""
    deviations = [9.025 - 19.025 / 3, 10 - 19.025 / 3, -19.025 / 3]
    std = math.sqrt(sum(d * d for d in deviations) / 2)
    episode = 5 / math.sqrt(50)
    first, third, other = (episode + deviations[0] / std, episode + deviations[1] / std, -episode + deviations[2] / std)
    close(module().advantages(WIN_AND_LOSS), [[first, episode, third], [other, -episode]], 1e-5)


def test_without_the_std_by_hand():
    """Gamma 0.5, weight 2: returns 2.5, 5, 10 and 0, 0; state a has mean 25/6."""
    result = module(gamma=0.5, step_weight=2.0, scale="none").advantages(WIN_AND_LOSS)
    close(result, [[5 + 5 - 25 / 3, 5, 5 + 20 - 25 / 3], [-5 - 25 / 3, -5]])


def test_without_the_step_level_it_is_grpo():
    result = module(step_weight=0.0).advantages(group(play("ab", 1.0), play("c"), play("ade", 0.5)))
    values = standardize(torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)).tolist()
    close(result, [[values[0]] * 2, [values[1]], [values[2]] * 3])


def test_all_win_still_compares_ways():
    """Equal scores: no episode level. The short way through a has the higher return there, and only a was met twice."""
    result = module(scale="none").advantages(group(play("a", 1.0), play("ab", 1.0)))
    close(result, [[0.025], [-0.025, 0.0]])


def test_all_equal_is_exactly_zero():
    result = module().advantages(group(play("ab"), play("ab"), play("ab")))
    assert result == [[0.0, 0.0]] * 3


def test_one_batch_is_its_groups():
    """Groups meet neither by state nor by score."""
    others = [WIN_AND_LOSS, group(play("ab", 3.0), play("cb", 1.0), play("a"))]
    method = module()
    assert method.batch_advantages(others) == [method.advantages(one) for one in others]


def test_the_order_of_trajectories_changes_nothing():
    rng = random.Random(0)
    plays = [play("".join(rng.choice("abc") for _ in range(rng.randint(1, 6))), rng.random()) for _ in range(6)]
    order = [3, 5, 0, 2, 4, 1]
    for options_ in ({}, {"baseline": "row", "scale": "none"}, {"similarity": 0.5}, {"anchor": "text_history"}):
        straight = module(**options_).advantages(group(*plays))
        shuffled = module(**options_).advantages(group(*[plays[i] for i in order]))
        assert shuffled == [straight[i] for i in order]


def test_failed_trajectories_are_out():
    """What the environment broke is in no mean: the group is compared as if it had never been played."""
    broken = play("aa", 99.0)
    broken.stop_reason = StopReason.ENV_ERROR
    with_it = without_failures(group(*WIN_AND_LOSS.trajectories, broken))
    assert module().advantages(with_it) == module().advantages(WIN_AND_LOSS)


def test_nothing_to_compare():
    """No groups, a group whose episodes never began, and a lone trajectory."""
    assert module().batch_advantages([]) == []
    assert module().advantages(group(Trajectory([]), Trajectory([]))) == [[], []]
    assert module().advantages(group(play("ab", 1.0))) == [[0.0, 0.0]]


# --- what is paid ---


def test_what_the_environment_did_not_pay_comes_last():
    """A total of 4 where the environment paid 1 + 2: the last step gets the missing 1 at the step level too."""
    earner, idler = play("ab", 1.0, 2.0, total=4.0), play("ab")
    result = module(gamma=0.5, scale="none").advantages(group(earner, idler))
    # R of the earner: 1 + 0.5 * 3 = 2.5 and 3; the means of a and b are half of them.
    close(result, [[2 + 1.25, 2 + 1.5], [-2 - 1.25, -2 - 1.5]])


def test_outcome_pays_the_last_step_alone():
    earner, idler = play("ab", 1.0, 2.0, total=4.0), play("ab")
    result = module(gamma=0.5, scale="none", step_rewards="outcome").advantages(group(earner, idler))
    close(result, [[2 + 1.0, 2 + 2.0], [-2 - 1.0, -2 - 2.0]])


def test_a_local_penalty_is_the_steps_own():
    """Step 2 of the winner was invalid: its score and return are 0.5 less, the first step's return is not."""
    result = module(scale="none", gamma=1.0, invalid_penalty=0.5).advantages(
        group(play("ab", 2.0, invalid=(1,)), play("ab"))
    )
    # Mean score over trajectories: ((2 + 1.5) / 2 + 0) / 2 = 0.875.
    close(result, [[1.125 + 1.0, 0.625 + 0.75], [-0.875 - 1.0, -0.875 - 0.75]])


def test_a_discounted_penalty_is_everyones():
    """It is a part of r_2: the return of step 1 is 0.5 * 1.5, and the whole episode scores 1.5."""
    result = module(scale="none", gamma=0.5, invalid_penalty=0.5, penalty="discounted").advantages(
        group(play("ab", 2.0, invalid=(1,)), play("ab"))
    )
    close(result, [[0.75 + 0.375, 0.75 + 0.75], [-0.75 - 0.375, -0.75 - 0.75]])


def test_unknown_validity_costs_nothing():
    unknown = play("ab", 2.0)
    for step in unknown.steps:
        step.valid = None
    assert module().advantages(group(unknown, play("ab"))) == module().advantages(group(play("ab", 2.0), play("ab")))


# --- states ---


def test_the_state_key_sees_what_the_text_hides():
    """Both read "Nothing happens."; by state they are two places, and no one compares them."""
    first, second = play("aN", 10.0), play("bN")
    first.steps[1].anchor, second.steps[1].anchor = ("kitchen", "mug"), ("bath", "")
    close(module(scale="none").advantages(group(first, second)), [[5, 10], [-5, -10]])
    close(module(scale="none", anchor="state").advantages(group(first, second)), [[5, 5], [-5, -5]])


def test_keys_of_different_types_do_not_meet():
    """1 == True in Python; the states are two."""
    first, second = play("a", 10.0), play("a")
    first.steps[0].anchor, second.steps[0].anchor = 1, True
    close(module(scale="none", anchor="state").advantages(group(first, second)), [[5], [-5]])


def test_similar_texts_are_one_state():
    first, second = play("x", 10.0), play("y")
    first.steps[0].state, second.steps[0].state = "shelf 1 holds a mug", "shelf 2 holds a mug"
    close(module(scale="none").advantages(group(first, second)), [[5], [-5]])
    close(module(scale="none", similarity=0.9).advantages(group(first, second)), [[10], [-10]])


# --- the authors' code: score and R minus the row's own penalty; statistics over rows; (x - mean) / (std + 1e-6) ---


def test_parity_of_a_win_with_a_loop_and_a_loss():
    """Rows 10, 10, 10, 0, 0: mean 6, std 5.477226. State a: 9.025, 10, 0, mean 6.341667, std 5.513638."""
    a_win, a_lose = 0.730297, -1.095445
    expected = [[a_win + 0.486672, a_win, a_win + 0.663506], [a_lose - 1.150178, a_lose]]
    close(module(preset="verl_agent").advantages(WIN_AND_LOSS), expected, 1e-4)


def test_parity_without_the_std():
    """`mean_norm`: 4 and -6, and 2.683333, 3.658333, -6.341667 in state a."""
    expected = [[4 + 2.683333, 4, 4 + 3.658333], [-6 - 6.341667, -6]]
    close(module(preset="verl_agent", scale="none").advantages(WIN_AND_LOSS), expected, 1e-4)


def test_parity_of_one_invalid_action_among_losers():
    """0, 0, 0 and -0.1 become 0.5, 0.5, 0.5 and -1.5 at both levels, as was measured there."""
    losers = group(play("a"), play("a"), play("a"), play("a", invalid=(0,)))
    close(module(preset="verl_agent").advantages(losers), [[1.0], [1.0], [1.0], [-3.0]], 1e-4)


def test_parity_of_a_penalty_after_discounting():
    """Rows 10, 9.9, 0, 0. Returns 9.5 and 10 - 0.1 = 9.9: the first step does not pay for the second."""
    result = module(preset="verl_agent").advantages(group(play("ab", 10.0, invalid=(1,)), play("ab")))
    close(result, [[0.874707 + 0.707107, 0.857300 + 0.707107], [-0.866003 - 0.707107] * 2], 1e-4)


def test_parity_of_lone_rows():
    """A group of one row keeps its raw score less its penalty, at the episode level; two rows of one episode get 0."""
    parity = module(preset="verl_agent")
    close(parity.advantages(group(play("a", 10.0))), [[10.0]], 1e-4)
    close(parity.advantages(group(play("a", 10.0, invalid=(0,)))), [[9.9]], 1e-4)
    close(parity.advantages(group(play("ab", 10.0))), [[0.0, 0.0]], 1e-4)


def test_parity_of_similarity_follows_the_rows():
    """The middle text takes in both its neighbours when it comes first, one of them otherwise."""
    near = ("abcdefghij", "abcdefghix", "abcdefghyx")

    def losses(*order: int) -> list[list[float]]:
        plays = [play("s", float(i)) for i in order]
        for one, i in zip(plays, order, strict=True):
            one.steps[0].state = near[i]
        return module(preset="verl_agent", scale="none", similarity=0.85).advantages(group(*plays))

    close(losses(1, 0, 2), [[0.0], [-2.0], [2.0]], 1e-4)  # all three: the step level doubles the episode's
    close(losses(0, 1, 2), [[-1.5], [0.5], [1.0]], 1e-4)  # 0 and 1 meet, 2 is alone


def test_the_preset_is_its_options():
    spelled = module(baseline="row", singleton="raw", penalty="local", anchor="text", autojunk=True)
    case = group(play("aba", 1.0, invalid=(1,)), play("ab"))
    assert module(preset="verl_agent", baseline="trajectory").advantages(case) == spelled.advantages(case)


# --- what is logged ---


def test_statistics_by_hand():
    """Two groups: states a (3 steps), b, c of the first; two all-equal episodes in state a of the second."""
    method = module(scale="none", gamma=1.0)
    empty = method.advantage_sums
    method.batch_advantages([WIN_AND_LOSS, group(play("a"), play("a"))])
    sums = method.advantage_sums
    assert sums["gigpo/episode_advantage"] == pytest.approx((5 * 3 - 5 * 2, 7))
    assert sums["gigpo/step_advantage"] == pytest.approx((0, 7))
    assert sums["gigpo/step_advantage_size"] == pytest.approx((10 / 3 + 10 / 3 + 20 / 3, 7))
    assert sums["gigpo/lone_steps"] == (2, 7)
    assert sums["gigpo/zero_signal"] == (1, 2)
    shares = {name: value for name, value in sums.items() if "anchors_of" in name}
    assert shares == {
        "gigpo/anchors_of_1": (2, 4),
        "gigpo/anchors_of_2_3": (2, 4),
        **{f"gigpo/anchors_of_{name}": (0, 4) for name in ("4_7", "8_15", "16_31", "32_up")},
    }
    assert list(sums) == list(empty)
    method.batch_advantages([])  # a rank without groups logs the same names
    assert method.advantage_sums == empty


def test_large_anchor_groups_have_their_bins():
    """3 + 4 + 15 + 16 + 40 steps in states a to e."""
    method = module()
    method.batch_advantages([group(play("a" * 3 + "b" * 4 + "c" * 15 + "d" * 16 + "e" * 40))])
    counts = {name.rpartition("of_")[2]: n for name, (n, _) in method.advantage_sums.items() if "anchors_of" in name}
    assert counts == {"1": 0, "2_3": 1, "4_7": 1, "8_15": 1, "16_31": 1, "32_up": 1}


# --- rows ---


@pytest.mark.parametrize("mode", ["rebuild", "append"])
def test_every_action_token_of_every_step_carries_its_advantage(mode):
    """Rebuilt prompts: a row a step. Appended turns: one row, each run of tokens with its own value, prompts with 0."""
    trajectory = play("abc", 1.0, 2.0, 3.0)
    context = [5]
    for t, step in enumerate(trajectory.steps):
        step.context_ids = [5, 10 + t] if mode == "rebuild" else list(context)
        context += [*step.action_ids, 9]
    values = [[0.5, -1.0, 2.0]]
    (rows,) = to_rows([group(trajectory)], [values])
    assert len(rows) == (3 if mode == "rebuild" else 1)
    spoken = [a for row in rows for a, mask in zip(row.advantages, row.action_mask, strict=True) if mask]
    silent = [a for row in rows for a, mask in zip(row.advantages, row.action_mask, strict=True) if not mask]
    assert spoken == [0.5, 0.5, -1.0, -1.0, 2.0, 2.0]
    assert not any(silent)


# --- dynamic sampling ---


def test_an_all_win_group_of_different_lengths_can_be_kept():
    """Reward and success see no signal in it, GiGPO does; in equal lengths through equal states it sees none either."""
    unequal, equal = group(play("a", 1.0), play("ab", 1.0)), group(play("ab", 1.0), play("ab", 1.0))
    for one in (*unequal.trajectories, *equal.trajectories):
        one.success = True
    data = RolloutDataModule(EchoSuite(), "no tokenizer", max_rounds=2, signal="advantage")
    method = module()
    data._module = lambda: method
    assert data._has_signal(unequal)
    assert not data._has_signal(equal)
    for signal in ("reward", "success"):
        data.signal = signal
        assert not data._has_signal(unequal)


class CountedData(RolloutDataModule):
    """Gives out made-up groups: prompts with an even number have no signal."""

    def _roll_out(self, prompts, group_size, sampling, iteration, **_):
        self.asked = [*getattr(self, "asked", []), [prompt.number for prompt in prompts]]
        return [TrajectoryGroup(prompt.task, [play("a", float(prompt.number % 2)), play("b")]) for prompt in prompts]


def test_dynamic_sampling_asks_anew_for_what_is_missing():
    """Every try takes new prompts, as many as are missing: no surplus, and the last try is filtered like the first."""
    data = CountedData(EchoSuite(), "no tokenizer", num_prompts=4, max_rounds=3, seed=1)
    collection = data._collect(Order(0, 0, 0))
    assert data.asked == [[0, 1, 2, 3], [4, 5], [8]]
    assert collection.rounds == 3
    assert len(collection.groups) == 7  # all that was played is measured
    assert [group.trajectories[0].total_reward for group in collection.trained] == [1.0, 1.0, 1.0]


# --- options and runs ---


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gamma": 1.1}, "gamma=1.1"),
        ({"invalid_penalty": -0.1}, "invalid_penalty=-0.1"),
        ({"history": -1}, "history=-1"),
        ({"similarity": 0.0}, "similarity=0.0"),
        ({"similarity": 0.9, "anchor": "state"}, "anchor is 'state'"),
    ],
)
def test_wrong_options_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        module(**wrong)


def words(lm: str, run, *more: str) -> list[str]:
    """The command of `runs.options` on GiGPO's configuration."""
    given = options(lm, run, *more)
    return [GIGPO if word.endswith("grpopp_echo.yaml") else word for word in given]


def test_a_run_from_end_to_end(tiny_lm, tmp_path):
    """Steps are rows, all that is promised is logged, the weights move."""
    main(words(tiny_lm, tmp_path))
    rows = [row for row in metrics(tmp_path) if row.get("reward/mean")]
    assert len(rows) == 2
    for row in rows:
        assert float(row["rows"]) == 8 * float(row["length/steps"])
        assert float(row["time/advantages"]) > 0
        assert float(row["shortened_prompts"]) == 0
        assert 0 <= float(row["valid_actions"]) <= 1
        shares = [float(value) for name, value in row.items() if name.startswith("gigpo/anchors_of")]
        assert sum(shares) == pytest.approx(1.0)
        # The first request is the same for the 4 members of a group, and where all go on so is the second.
        assert float(row["gigpo/anchors_of_4_7"]) > 0
        assert float(row["gigpo/step_advantage_size"]) > 0
        assert abs(float(row["gigpo/step_advantage"])) < 1e-6
    assert any(value.any() for name, value in checkpoint(tmp_path)["state_dict"].items() if "lora_B" in name)


@pytest.mark.parametrize(
    "more", [("--data.chat=append", "--data.memory=null"), ("--model.aggregation=seq_mean_token_mean",)]
)
def test_appended_turns_and_row_means(tiny_lm, tmp_path, more):
    """One switch: an episode is one row; and rows may weigh the same whatever their length."""
    main(words(tiny_lm, tmp_path, *more))
    row = next(row for row in metrics(tmp_path) if row.get("rows"))
    assert float(row["rows"]) == (8 if "append" in more[0] else 8 * float(row["length/steps"]))


@pytest.mark.slow
def test_two_ranks_log_and_train_as_one(tiny_lm, tmp_path):
    """Groups sit on one rank each; three prompts, so one rank has twice the other's. SGD: one step is the gradient."""
    one, two = tmp_path / "one", tmp_path / "two"
    sgd = '--model.optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0}}'
    more = ("--data.num_prompts=3", "--data.max_tokens=512", "--trainer.max_epochs=1")
    for run, ranks in ((one, ()), (two, ("--trainer.strategy", "ddp", "--trainer.devices", "2"))):
        given = words(tiny_lm, run, *more, *ranks)
        at = given.index("--model.optimizer.lr")
        code, output = run_alone([*given[:at], sgd, *given[at + 2 :]])
        assert code == 0, output
    first, second = (next(row for row in metrics(run) if row.get("rows")) for run in (one, two))
    for name in first:
        if name.startswith("gigpo/"):
            assert float(second[name]) == pytest.approx(float(first[name]), abs=1e-6), name
    for name, value in checkpoint(one)["state_dict"].items():
        torch.testing.assert_close(checkpoint(two)["state_dict"][name], value, rtol=1e-4, atol=1e-6)
        assert "lora_B" not in name or value.abs().max() > 1e-4
