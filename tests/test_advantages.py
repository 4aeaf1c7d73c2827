"""Laws of the advantages: hand-computed numbers, and slow twins written with plain loops."""

from __future__ import annotations

import math
import random
import statistics
from collections import defaultdict

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from lit_agentrl.advantages import (
    GiGPOAdvantages,
    binary,
    binary_advantages,
    discounted_returns,
    gigpo_advantages,
    leave_one_out,
    spread,
    standardize,
    successes,
    total_rewards,
    tree_advantages,
    tree_ids,
)
from lit_agentrl.types import Step, Trajectory, TrajectoryGroup


def f64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def ids(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


# --- standardize ---


def test_standardize_by_hand() -> None:
    """1, 2, 3 have mean 2 and unbiased std 1; 0, 10 have mean 5 and std sqrt(50)."""
    result = standardize(f64(1, 0, 2, 10, 3), ids(7, -4, 7, -4, 7), eps=0.0)
    assert_close(result, f64(-1, -5 / math.sqrt(50), 0, 5 / math.sqrt(50), 1))


def test_eps_is_added_to_the_std() -> None:
    """(1 - 2) / (1 + 0.5), not / sqrt(1 + 0.5)."""
    assert_close(standardize(f64(1, 2, 3), eps=0.5), f64(-2 / 3, 0, 2 / 3))


def test_population_std() -> None:
    """With ddof=0 a binary reward with success share p gets sqrt((1 - p) / p) and -sqrt(p / (1 - p))."""
    result = standardize(f64(1, 0, 0, 0), ddof=0, eps=0.0)
    assert_close(result, f64(math.sqrt(3), *[-math.sqrt(1 / 3)] * 3))


def test_scale_none_only_centres() -> None:
    """Dr. GRPO: x - mean."""
    assert_close(standardize(f64(1, 2, 6), scale="none"), f64(-2, -1, 3))


def test_batch_std_divides_by_the_std_of_all_values() -> None:
    """Centred in the group, scaled by the std over the batch, [1, 3, 5, 7]: sqrt(20 / 3)."""
    result = standardize(f64(1, 3, 5, 7), ids(0, 0, 1, 1), scale="batch_std", eps=0.0)
    assert_close(result, f64(-1, 1, -1, 1) / math.sqrt(20 / 3))


@pytest.mark.parametrize("scale", ["std", "none", "batch_std"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, 0.8, 1e-12, 12345.678])
def test_equal_values_give_exactly_zero(scale: str, dtype: torch.dtype, value: float) -> None:
    """Three times 0.1 has a mean next to 0.1 in floating point; the noise must not be divided by eps."""
    values = torch.tensor([value] * 3 + [value] * 7 + [5.0, -5.0], dtype=dtype)
    result = standardize(values, ids(*[0] * 3, *[1] * 7, 2, 2), scale=scale)
    assert torch.equal(result[:10], torch.zeros(10, dtype=dtype))
    assert result[10] > 0


def test_tenths_would_not_be_zero_by_arithmetic() -> None:
    """The case above bites: in float64 the mean of three 0.1 is not 0.1."""
    assert (0.1 + 0.1 + 0.1) / 3 != 0.1
    assert torch.equal(leave_one_out(f64(0.1, 0.1, 0.1)), f64(0, 0, 0))


@pytest.mark.parametrize("scale", ["std", "none", "batch_std"])
def test_singletons(scale: str) -> None:
    """A group of one gets exactly 0, or its raw value on request."""
    values, groups = f64(3, 1, 2), ids(0, 1, 1)
    assert standardize(values, groups, scale=scale)[0] == 0
    assert standardize(values, groups, scale=scale, singleton="raw")[0] == 3
    assert torch.equal(
        standardize(values, groups, scale=scale)[1:], standardize(values, groups, scale=scale, singleton="raw")[1:]
    )


def test_raw_is_for_singletons_only() -> None:
    """Two equal values are a zero-variance group, not a singleton."""
    assert torch.equal(standardize(f64(3, 3), singleton="raw"), f64(0, 0))


def test_standardize_equals_its_slow_twin() -> None:
    """`statistics.mean` and `stdev` per group, on random groups."""
    rng = random.Random(0)
    for _ in range(20):
        groups = [rng.randrange(4) for _ in range(17)]
        values = [rng.choice([0.0, 1.0, rng.gauss(0, 3)]) for _ in groups]
        members = defaultdict(list)
        for group, value in zip(groups, values, strict=True):
            members[group].append(value)
        expected = [
            (value - statistics.mean(members[group])) / (statistics.stdev(members[group]) + 1e-6)
            if len(set(members[group])) > 1
            else 0.0
            for group, value in zip(groups, values, strict=True)
        ]
        assert_close(standardize(f64(*values), ids(*groups)), f64(*expected))


def test_none_is_one_group() -> None:
    """No ids: all values are compared."""
    values = f64(1, 4, 9)
    assert torch.equal(standardize(values), standardize(values, ids(5, 5, 5)))


def test_no_rows_give_no_rows() -> None:
    """An empty batch is not an error."""
    empty, none = torch.empty(0), torch.empty(0, dtype=torch.int64)
    assert standardize(empty, none, scale="batch_std").shape == (0,)
    assert discounted_returns(empty, none, none, gamma=0.9).shape == (0,)


# --- leave one out, binary ---


def test_leave_one_out_by_hand() -> None:
    """1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2; a group of one has no others and gets 0."""
    assert_close(leave_one_out(f64(1, 9, 2, 6), ids(0, 1, 0, 0)), f64(-3, 0, -1.5, 4.5))


def test_leave_one_out_is_a_scaled_dr_grpo() -> None:
    """n / (n - 1) times x - mean, here with n = 4."""
    values = f64(0.3, 1.7, -2, 0.1)
    assert_close(leave_one_out(values), 4 / 3 * standardize(values, scale="none"))


def test_an_all_wrong_group_learns_from_the_sign_alone() -> None:
    """Every centred estimator is 0 on it; the sign pushes it down by `negative`."""
    rewards = torch.zeros(4)
    for dead in (standardize(rewards), standardize(rewards, scale="none"), leave_one_out(rewards)):
        assert torch.equal(dead, torch.zeros(4))
    assert torch.equal(binary(rewards.bool(), negative=0.5), torch.full((4,), -0.5))


def test_binary_by_hand() -> None:
    """+positive where correct, else -negative; in the caller's precision."""
    assert torch.equal(binary(torch.tensor([True, False])), torch.tensor([1.0, -1.0]))
    assert torch.equal(binary(f64(1, 0), positive=0.3, negative=0.7), f64(0.3, -0.7))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("sign", [-0.5, -0.5, 2.0, 2.0]),
        ("threshold", [-0.5, 0.0, 2.0, 2.0]),
        ("above_mean", [-0.5, -0.5, 0.0, 2.0]),
        ("correct_only", [0.0, 0.0, 2.0, 2.0]),
    ],
)
def test_binary_modes_by_hand(mode: str, expected: list[float]) -> None:
    """Rewards 0, 1, 2, 5 with mean 2 and threshold 1: each mode places its ties elsewhere."""
    result = binary_advantages(f64(0, 1, 2, 5), mode=mode, positive=2.0, negative=0.5, threshold=1.0)
    assert torch.equal(result, f64(*expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_above_mean_calls_rounding_a_tie(dtype: torch.dtype) -> None:
    """0.2 is the mean of 0.1, 0.2, 0.3 although (0.1 + 0.2 + 0.3) / 3 > 0.2 in float64; groups do not mix."""
    rewards = torch.tensor([0.1, 0.2, 0.3, -0.3, 0.1, 0.2, 0.0, 0.8, 0.8, 0.8], dtype=dtype)
    result = binary_advantages(rewards, ids(0, 0, 0, 1, 1, 1, 1, 2, 2, 2), mode="above_mean")
    assert result.tolist() == [-1, 0, 1, -1, 1, 1, 0, 0, 0, 0]


def test_threshold_is_compared_in_the_rewards_precision() -> None:
    """float32 0.1 is the threshold 0.1, not above it, although it is as a float64."""
    assert binary_advantages(torch.tensor([0.1]), mode="threshold", threshold=0.1).item() == 0


def test_binary_refuses_rewards() -> None:
    """A reward of 7 is not a truth value; a negative size would flip the sign."""
    with pytest.raises(ValueError, match="binary_advantages"):
        binary(f64(7, -1))
    with pytest.raises(ValueError, match="negative=-1"):
        binary(torch.tensor([True]), negative=-1)


# --- trees ---


def test_tree_advantages_by_hand() -> None:
    """Tree 0 pays 1, 0 and tree 1 pays 1, 1; prompt mean 3/4, prompt std 1/2."""
    result = tree_advantages(f64(1, 0, 1, 1), ids(0, 0, 1, 1), ids(0, 0, 0, 0), eps=0.0)
    half = 1 / math.sqrt(2)
    assert_close(result, f64(0.5 + half, -1.5 - half, 0.5, 0.5))


def test_uniform_but_different_trees_learn_from_the_prompt() -> None:
    """The intra-tree term is 0, the inter-tree term carries the signal."""
    rewards, trees, prompts = f64(1, 1, 0, 0), ids(0, 0, 1, 1), ids(0, 0, 0, 0)
    assert torch.equal(tree_advantages(rewards, trees, prompts, inter_weight=0.0), torch.zeros(4).double())
    assert_close(tree_advantages(rewards, trees, prompts), standardize(rewards))


def test_a_single_tree_counts_twice() -> None:
    """With M = 1 both terms are the same."""
    rewards = f64(1, 0, 0.5)
    assert_close(tree_advantages(rewards, ids(4, 4, 4), ids(0, 0, 0)), 2 * standardize(rewards))


def test_trees_of_different_prompts_never_meet() -> None:
    """Both prompts call their tree 0: two trees."""
    rewards = f64(1, 0, 7, 3)
    shared = tree_advantages(rewards, ids(0, 0, 0, 0), ids(0, 0, 1, 1))
    assert_close(shared, tree_advantages(rewards, ids(0, 0, 1, 1), ids(0, 0, 1, 1)))
    assert_close(shared, 2 * f64(0.5, -0.5, 2, -2) / (f64(*[0.5**0.5] * 2, *[8**0.5] * 2) + 1e-6))


def test_tree_weights_and_single_leaves() -> None:
    """0.25 intra + 2 inter; a tree of one leaf has no intra term, with raw its reward."""
    rewards, trees, prompts = f64(1, 0, 5), ids(0, 0, 1), ids(0, 0, 0)
    inter = standardize(rewards, scale="none")
    zero = tree_advantages(rewards, trees, prompts, intra_weight=0.25, inter_weight=2.0, scale="none")
    assert_close(zero, 2 * inter + 0.25 * f64(0.5, -0.5, 0))
    raw = tree_advantages(rewards, trees, prompts, intra_weight=0.25, inter_weight=2.0, scale="none", singleton="raw")
    assert_close(raw, 2 * inter + 0.25 * f64(0.5, -0.5, 5))


def test_seven_equal_leaves_are_exactly_zero() -> None:
    """Paper's N = 6: the float32 mean of seven 0.8 is one ulp off, which the reference turns into -0.16."""
    rewards = torch.full((14,), 0.8)
    result = tree_advantages(rewards, ids(*[0] * 7, *[1] * 7), ids(*[0] * 14))
    assert torch.equal(result, torch.zeros(14))


# --- steps ---


def test_discounted_returns_by_hand() -> None:
    """1 + 0.5 (2 + 0.5 * 4) = 3, whatever order the rows are in; a gap in the times is one step."""
    result = discounted_returns(f64(4, 10, 1, 2), ids(0, 1, 0, 0), ids(9, 0, 0, 1), gamma=0.5)
    assert_close(result, f64(4, 10, 3, 4))


def test_discounted_returns_equal_the_backward_loop() -> None:
    """Trajectories of 1 to 40 steps, shuffled, against R = r + gamma R."""
    rng = random.Random(1)
    for gamma in (0.0, 0.95, 1.0):
        rows = [(i, t, rng.gauss(0, 1)) for i in range(6) for t in range(rng.choice([1, 2, 3, 8, 40]))]
        expected, running = {}, defaultdict(float)
        for i, t, reward in reversed(rows):
            running[i] = expected[i, t] = reward + gamma * running[i]
        rng.shuffle(rows)
        owners, times, rewards = zip(*rows, strict=True)
        owners = tuple(owners)
        assert_close(
            discounted_returns(f64(*rewards), ids(*owners), ids(*times), gamma=gamma),
            f64(*[expected[i, t] for i, t, _ in zip(owners, times, rewards, strict=True)]),
        )


def test_a_repeated_time_is_refused() -> None:
    """Two steps at one time have no order."""
    with pytest.raises(ValueError, match="same time"):
        discounted_returns(f64(1, 2), ids(0, 0), ids(3, 3), gamma=0.9)


def hand_batch() -> dict[str, Tensor]:
    """One group: trajectory 0 = states a b a (a loop) and wins 10 at the end; trajectory 1 = a, c and loses."""
    return {
        "episode_rewards": f64(10, 10, 10, 0, 0),
        "step_rewards": f64(0, 0, 10, 0, 0),
        "groups": ids(0, 0, 0, 0, 0),
        "trajectories": ids(0, 0, 0, 1, 1),
        "times": ids(0, 1, 2, 0, 1),
        "anchors": ids(0, 1, 0, 0, 2),
    }


def test_gigpo_by_hand() -> None:
    """Returns at gamma 0.5: 2.5, 5, 10, 0, 0. State a holds 2.5, 10, 0 (mean 25/6); b and c are visited once."""
    result = gigpo_advantages(**hand_batch(), gamma=0.5, step_weight=2.0, scale="none")
    assert_close(result.episode, f64(5, 5, 5, -5, -5))
    assert_close(result.step, f64(2.5 - 25 / 6, 0, 10 - 25 / 6, -25 / 6, 0))
    assert_close(result.total, result.episode + 2.0 * result.step)


def test_gigpo_std_by_hand() -> None:
    """Scores 10, 0 over trajectories have std sqrt(50); over rows 10, 10, 10, 0, 0 mean 6 and std sqrt(30)."""
    batch = hand_batch()
    by_trajectory = gigpo_advantages(**batch, eps=0.0)
    by_row = gigpo_advantages(**batch, eps=0.0, baseline="row")
    assert_close(by_trajectory.episode, f64(5, 5, 5, -5, -5) / math.sqrt(50))
    assert_close(by_row.episode, f64(4, 4, 4, -6, -6) / math.sqrt(30))
    assert_close(by_row.step, by_trajectory.step)


def test_gigpo_of_an_all_equal_group() -> None:
    """All lose: both levels are exactly 0. All win: only the episode level is; shorter ways back still count."""
    batch = hand_batch()
    lose = gigpo_advantages(**batch | {"episode_rewards": torch.zeros(5), "step_rewards": torch.zeros(5)})
    assert torch.equal(lose.total, torch.zeros(5))
    win = gigpo_advantages(**batch | {"episode_rewards": torch.full((5,), 10.0), "step_rewards": f64(0, 0, 10, 0, 10)})
    assert torch.equal(win.episode, torch.zeros(5).double())
    assert win.step[2] > 0 > win.step[0]  # the same state, late and early in the loop


def test_steps_of_different_groups_never_meet() -> None:
    """Two tasks with the same anchors and trajectory ids give what each gives alone."""
    first = hand_batch()
    second = first | {"episode_rewards": f64(3, 3, 3, 4, 4), "step_rewards": f64(1, 1, 1, 4, 0)}
    both = {name: torch.cat([first[name], second[name]]) for name in first}
    both["groups"] = ids(*[8] * 5, *[2] * 5)
    together = gigpo_advantages(**both)
    assert_close(together.total[:5], gigpo_advantages(**first).total)
    assert_close(together.total[5:], gigpo_advantages(**second).total)


def test_penalties_are_paid_by_their_own_step() -> None:
    """An invalid action at time 1 costs that row alone, at both levels; the step before keeps its return."""
    batch = hand_batch() | {"anchors": ids(0, 0, 0, 0, 0)}
    result = gigpo_advantages(**batch, gamma=1.0, scale="none", baseline="row", penalties=f64(0, 0.5, 0, 0, 0))
    assert_close(result.episode, f64(10, 9.5, 10, 0, 0) - 29.5 / 5)
    assert_close(result.step, f64(10, 9.5, 10, 0, 0) - 29.5 / 5)


def test_penalties_leave_every_trajectory_the_same_weight() -> None:
    """Baseline per trajectory: mean of (10, 9.4, 10) is 9.8 and of (0, 0) is 0, so the group's mean is 4.9."""
    result = gigpo_advantages(**hand_batch(), scale="none", penalties=f64(0, 0.6, 0, 0, 0))
    assert_close(result.episode, f64(10, 9.4, 10, 0, 0) - 4.9)


def test_penalties_alone_stay_of_ordinary_size() -> None:
    """All lose and each trajectory has one invalid action: equal trajectories, yet no row is divided by eps."""
    batch = hand_batch() | {"episode_rewards": f64(0, 0, 0, 0, 0), "trajectories": ids(0, 0, 1, 1, 1)}
    batch |= {"groups": ids(0, 0, 0, 0, 0), "times": ids(0, 1, 0, 1, 2)}
    result = gigpo_advantages(**batch, penalties=f64(0.2, 0, 0.3, 0, 0))
    assert result.episode[0] < 0 < result.episode[1]
    assert result.episode.abs().max() < 10


def test_equal_in_the_callers_precision_is_equal() -> None:
    """In float32 0.4 - 0.1 = 0.1 + 0.2 = 0.3; the float64 digits behind them must not be divided by eps."""
    result = gigpo_advantages(
        episode_rewards=torch.tensor([0.4, 0.3, 0.3]),
        step_rewards=torch.tensor([0.1, 0.2, 0.3]),
        groups=ids(0, 1, 0),
        trajectories=ids(0, 1, 2),
        times=ids(0, 0, 0),
        anchors=ids(0, 0, 1),
        penalties=torch.tensor([0.1, 0.0, 0.0]),
    )
    assert torch.equal(result.episode, torch.zeros(3))
    result = gigpo_advantages(
        episode_rewards=torch.tensor([0.3, 0.3, 0.3]),
        step_rewards=torch.tensor([0.1, 0.2, 0.3]),
        groups=ids(0, 0, 0),
        trajectories=ids(0, 0, 1),
        times=ids(0, 1, 0),
        anchors=ids(0, 1, 0),
        gamma=1.0,
    )
    assert torch.equal(result.step, torch.zeros(3))


@pytest.mark.parametrize(("baseline", "expected"), [("trajectory", [4.0, 4.0]), ("row", [0.0, 0.0])])
def test_a_lone_trajectory(baseline: str, expected: list[float]) -> None:
    """Per trajectory it is a singleton (raw keeps the score, as in the reference), per row a group of two equals."""
    batch = {"episode_rewards": f64(4, 4), "step_rewards": f64(0, 4), "groups": ids(0, 0)}
    batch |= {"trajectories": ids(0, 0), "times": ids(0, 1), "anchors": ids(0, 1)}
    assert torch.equal(gigpo_advantages(**batch, baseline=baseline, singleton="raw").episode, f64(*expected))
    assert torch.equal(gigpo_advantages(**batch, baseline=baseline).episode, f64(0, 0))


def test_a_lone_row() -> None:
    """Raw keeps the episode score of a one-row group; the step term is 0 all the same."""
    one = {"episode_rewards": f64(10), "step_rewards": f64(10), "groups": ids(0)}
    result = gigpo_advantages(
        **one, trajectories=ids(0), times=ids(0), anchors=ids(0), baseline="row", singleton="raw", penalties=f64(0.5)
    )
    assert (result.episode.item(), result.step.item(), result.total.item()) == (9.5, 0.0, 9.5)


def random_batch(seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Three tasks, 1 to 4 trajectories of 1 to 7 steps over five states, rows shuffled; and penalties."""
    rng = random.Random(seed)
    rows = []
    for group in range(3):
        for trajectory in range(rng.randint(1, 4)):
            episode, steps = rng.choice([0.0, 0.0, 10.0]), rng.randint(1, 7)
            for t in range(steps):
                reward = episode if t == steps - 1 else rng.choice([0.0, -0.1])
                penalty = rng.choice([0.0, 0.0, 0.1])
                rows.append((episode, reward, group, 10 * group + trajectory, t, rng.randrange(5), penalty))
    rng.shuffle(rows)
    *columns, penalties = map(list, zip(*rows, strict=True))
    names = ("episode_rewards", "step_rewards", "groups", "trajectories", "times", "anchors")
    dtypes = (torch.float64, torch.float64, *[torch.int64] * 4)
    batch = {n: torch.tensor(c, dtype=d) for n, c, d in zip(names, columns, dtypes, strict=True)}
    return batch, torch.tensor(penalties, dtype=torch.float64)


def slow_gigpo(batch: dict[str, Tensor], penalties: Tensor, gamma: float, *, divide: bool, baseline: str) -> list[list]:
    """Loops, dicts and lists: episode and step advantages of each row."""
    columns = {name: values.tolist() for name, values in batch.items()}
    fine, num_rows = penalties.tolist(), len(penalties)
    score = [columns["episode_rewards"][i] - fine[i] for i in range(num_rows)]
    returns = []
    for i in range(num_rows):
        later = [
            gamma ** (columns["times"][j] - columns["times"][i]) * columns["step_rewards"][j]
            for j in range(num_rows)
            if columns["trajectories"][j] == columns["trajectories"][i] and columns["times"][j] >= columns["times"][i]
        ]
        returns.append(sum(later) - fine[i])

    def relative(values: list[float], keys: list, units: list) -> list[float]:
        result = []
        for value, key in zip(values, keys, strict=True):
            members = defaultdict(list)
            for other, other_key, unit in zip(values, keys, units, strict=True):
                if other_key == key:
                    members[unit].append(other)
            everyone = [x for unit in members.values() for x in unit]
            if len(members) == 1 or max(everyone) - min(everyone) < 1e-12:
                result.append(0.0)
                continue
            mean = statistics.mean(statistics.mean(unit) for unit in members.values())
            squares = sum(statistics.mean((x - mean) ** 2 for x in unit) for unit in members.values())
            std = math.sqrt(squares / (len(members) - 1))
            result.append((value - mean) / (std + 1e-6) if divide else value - mean)
        return result

    rows = list(range(num_rows))
    episode = relative(score, columns["groups"], columns["trajectories"] if baseline == "trajectory" else rows)
    step = relative(returns, list(zip(columns["groups"], columns["anchors"], strict=True)), rows)
    return [episode, step]


@pytest.mark.parametrize("baseline", ["trajectory", "row"])
@pytest.mark.parametrize("scale", ["std", "none"])
def test_gigpo_equals_its_slow_twin(baseline: str, scale: str) -> None:
    """Random batches with loops, singletons, unequal lengths and penalties."""
    for seed in range(8):
        batch, penalties = random_batch(seed)
        episode, step = slow_gigpo(batch, penalties, 0.9, divide=scale == "std", baseline=baseline)
        result = gigpo_advantages(
            **batch, gamma=0.9, step_weight=0.7, scale=scale, baseline=baseline, penalties=penalties
        )
        assert_close(result.episode, f64(*episode))
        assert_close(result.step, f64(*step))
        assert_close(result.total, f64(*episode) + 0.7 * f64(*step))


class CountedOperations(TorchDispatchMode):
    """Counts the tensor operations that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **(kwargs or {}))


def test_gigpo_has_no_loop_over_rows() -> None:
    """16 times the groups, the same operations (benchmarks/gigpo_advantages.py times them)."""
    numbers = []
    for num_rows in (240, 3840):
        row, rewards = torch.arange(num_rows), torch.rand(num_rows, generator=torch.Generator().manual_seed(0))
        with CountedOperations() as operations:
            gigpo_advantages(rewards, rewards, row // 240, row // 30, row % 30, row * 7919 % 50)
        numbers.append(operations.number)
    assert numbers[0] == numbers[1] > 0


# --- laws of all ---


def estimators(batch: dict[str, Tensor], penalties: Tensor) -> dict[str, Tensor]:
    """Every estimator on one batch."""
    rewards, groups, trees = batch["step_rewards"], batch["groups"], batch["trajectories"]
    gigpo: GiGPOAdvantages = gigpo_advantages(**batch, penalties=penalties)
    return {
        "standardize": standardize(rewards, groups),
        "batch_std": standardize(rewards, groups, scale="batch_std"),
        "leave_one_out": leave_one_out(rewards, groups),
        "binary": binary(rewards > 0).to(rewards.dtype),
        "above_mean": binary_advantages(rewards, groups, mode="above_mean"),
        "tree": tree_advantages(rewards, trees, groups),
        "returns": discounted_returns(rewards, trees, batch["times"], gamma=0.95),
        "episode": gigpo.episode,
        "step": gigpo.step,
        "total": gigpo.total,
    }


def test_the_order_of_the_rows_changes_nothing() -> None:
    """Permuting the rows permutes the result; renaming the ids leaves it."""
    for seed in range(5):
        batch, penalties = random_batch(seed)
        order = torch.randperm(len(penalties), generator=torch.Generator().manual_seed(seed))
        shuffled = {name: values[order] for name, values in batch.items()}
        for name in ("groups", "trajectories", "anchors"):
            shuffled[name] = 1000 - 3 * shuffled[name]
        before, after = estimators(batch, penalties), estimators(shuffled, penalties[order])
        for name, values in before.items():
            assert_close(after[name], values[order], rtol=1e-12, atol=1e-12, msg=name)


def test_the_order_of_the_rows_changes_no_bit() -> None:
    """Sums are taken in sorted order, so even the last bit of a float64 result is the same."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(200, generator=generator, dtype=torch.float64)
    groups = torch.randint(5, (200,), generator=generator)
    for scale in ("std", "none", "batch_std"):
        for _ in range(5):
            order = torch.randperm(200, generator=generator)
            shuffled = standardize(values[order], groups[order], scale=scale)
            assert torch.equal(shuffled, standardize(values, groups, scale=scale)[order])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_dtype_is_kept(dtype: torch.dtype) -> None:
    """What comes in is what goes out, within its precision of the float64 result."""
    batch, penalties = random_batch(3)
    exact = estimators(batch, penalties)
    for name in ("episode_rewards", "step_rewards"):
        batch[name] = batch[name].to(dtype)
    for name, values in estimators(batch, penalties.to(dtype)).items():
        assert values.dtype == dtype
        assert_close(values.double(), exact[name], rtol=20 * torch.finfo(dtype).eps, atol=20 * torch.finfo(dtype).eps)


def test_integers_and_bools_become_floats() -> None:
    """Counts and flags are rewards too."""
    assert_close(standardize(ids(1, 2, 3)), torch.tensor([-1.0, 0.0, 1.0]))
    assert leave_one_out(torch.tensor([True, False])).tolist() == [1.0, -1.0]


def test_no_gradient_passes() -> None:
    """Advantages are constants of the loss."""
    assert not standardize(torch.rand(3, requires_grad=True)).requires_grad


def test_bad_input_is_refused_by_name() -> None:
    """Shapes, ids and numbers: the message names the argument."""
    three = f64(1, 2, 3)
    for bad, message in (
        (lambda: standardize(three, ids(0, 1)), "groups must have shape"),
        (lambda: standardize(three, f64(0, 0, 1)), "groups must be integer ids"),
        (lambda: standardize(three, three > 1), "groups must be integer ids"),
        (lambda: standardize(f64(1, math.nan, 3)), "values holds NaN"),
        (lambda: leave_one_out(f64(1, math.inf)), "values holds NaN"),
        (lambda: standardize(torch.zeros(2, 2)), "values must be 1-D"),
        (lambda: standardize(three, scale="variance"), "scale='variance'"),
        (lambda: standardize(three, singleton="one"), "singleton='one'"),
        (lambda: standardize(three, ddof=2), "ddof=2"),
        (lambda: standardize(three, eps=-1.0), "eps=-1"),
        (lambda: binary_advantages(three, mode="best"), "mode='best'"),
        (lambda: binary_advantages(three, ids(0), mode="sign"), "groups must have shape"),
        (lambda: tree_advantages(three, ids(0, 0), ids(0, 0, 0)), "trees must have shape"),
        (lambda: tree_advantages(three, ids(0, 0, 0), three), "prompts must be integer ids"),
        (lambda: discounted_returns(three, ids(0, 0, 0), ids(0, 1), gamma=0.9), "times must have shape"),
        (lambda: discounted_returns(three, ids(0, 0, 0), ids(0, 1, 2), gamma=1.1), "gamma=1.1"),
        (lambda: gigpo_advantages(**hand_batch(), baseline="step"), "baseline='step'"),
        (lambda: gigpo_advantages(**hand_batch(), penalties=three), "penalties must have shape"),
        (lambda: gigpo_advantages(**hand_batch() | {"step_rewards": three}), "step_rewards must have shape"),
        (lambda: gigpo_advantages(**hand_batch() | {"anchors": f64(0, 0, 0, 0, 0)}), "anchors must be integer"),
        (lambda: gigpo_advantages(**hand_batch(), penalties=f64(0, 0, math.nan, 0, 0)), "penalties holds NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()


# --- groups of trajectories ---


def group_of(*rewards: float, success: bool | None = None) -> TrajectoryGroup:
    """Trajectories of 1, 2, 3, ... steps, in trees 0, 0, 1, 1, 2, ..."""
    step = Step(context_ids=[1], action_ids=[2], logprobs=[0.0])
    return TrajectoryGroup(
        "task",
        [
            Trajectory(steps=[step] * (i + 1), total_reward=reward, tree_id=i // 2, success=success)
            for i, reward in enumerate(rewards)
        ],
    )


def test_a_method_is_a_line_on_a_group() -> None:
    """GRPO on a group: the standardized total reward on every step of each trajectory."""
    advantages = spread(standardize(total_rewards(group_of(1, 2, 3)), eps=0.0), group_of(1, 2, 3))
    assert advantages == [[-1.0], [0.0, 0.0], [1.0, 1.0, 1.0]]


def test_what_is_read_from_a_group() -> None:
    """Rewards in float64, trees as integers, successes as bools."""
    group = group_of(0.1, 0.2, 0.3, success=True)
    assert torch.equal(total_rewards(group), f64(0.1, 0.2, 0.3))
    assert torch.equal(tree_ids(group), ids(0, 0, 1))
    assert torch.equal(successes(group), torch.tensor([True, True, True]))


def test_an_unknown_success_is_not_a_failure() -> None:
    """None must not be trained as False."""
    with pytest.raises(ValueError, match="success=None"):
        successes(group_of(1, 0))


def test_spread_needs_one_finite_advantage_each() -> None:
    """Neither too few nor NaN."""
    for advantages in (f64(1), f64(1, math.nan)):
        with pytest.raises(ValueError, match="advantages"):
            spread(advantages, group_of(1, 0))
