import itertools
import math

import pytest

from callback_parts import group, step, trajectory
from lit_agentrl.callbacks.metrics import evaluation_metrics, pass_at_k
from lit_agentrl.intervals import bootstrap_interval, wilson_interval
from lit_agentrl.types import StopReason, TrajectoryGroup


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 1), (4, 1, 2), (5, 2, 3), (6, 5, 2), (6, 6, 6), (3, 0, 3)])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n, c, k):
    samples = [index < c for index in range(n)]
    subsets = [any(subset) for subset in itertools.combinations(samples, k)]
    assert pass_at_k(n, c, k) == pytest.approx(sum(subsets) / len(subsets))


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 5, 1), (4, 1, 0)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match=f"n={n}, c={c}, k={k}"):
        pass_at_k(n, c, k)


def test_wilson_interval_solves_its_own_equation():
    """The ends are shares p that the observed share x is 1.96 standard errors away from: (x - p)^2 = z^2 p(1-p)/n."""
    for end in wilson_interval(23, 100):
        assert (0.23 - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / 100, rel=1e-5)


def test_wilson_interval_has_a_width_where_nothing_or_everything_succeeded():
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert wilson_interval(10, 10) == pytest.approx((1 - 0.27753, 1.0), abs=1e-5)
    assert all(math.isnan(end) for end in wilson_interval(0, 0))


def test_bootstrap_interval_is_fixed_and_as_wide_as_the_normal_one():
    shares = [0.0, 0.25, 0.5, 1.0] * 25
    low, high = bootstrap_interval(shares)
    assert (low, high) == bootstrap_interval(shares)
    standard_error = 0.369755 / 10  # sqrt of the variance 0.13671875, over the root of 100 tasks
    assert high - low == pytest.approx(2 * 1.96 * standard_error, rel=0.06)
    assert low < 0.4375 < high


def test_bootstrap_of_tasks_that_agree_is_not_certain():
    assert bootstrap_interval([0.0] * 10) == wilson_interval(0, 10)
    assert bootstrap_interval([1.0] * 10) == wilson_interval(10, 10)


def test_single_episodes_by_hand():
    groups = [group(True), group(False), group(False), group(False)]
    groups[1].trajectories[0].stop_reason = StopReason.LENGTH
    groups[2].trajectories[0].steps = [step(), step(action="go")]
    metrics = evaluation_metrics(groups)
    assert metrics["success"] == 0.25
    assert (metrics["success_low"], metrics["success_high"]) == wilson_interval(1, 4)
    assert metrics["reward/mean"] == metrics["reward/solved"] == 0.25
    assert metrics["length/steps"] == 1.25
    assert metrics["length/action_tokens"] == pytest.approx((4 * len("take key") + len("go")) / 5)
    assert metrics["truncated"] == 0.25
    assert not any(key.startswith(("pass_at", "avg_at")) for key in metrics)


def test_failed_episodes_are_counted_and_change_nothing_else():
    broken = trajectory(False, StopReason.ENV_ERROR, error="boom")
    groups = [group(True, False), group(True, True)]
    clean = evaluation_metrics(groups, 2)
    groups[0].trajectories.append(broken)
    groups.append(TrajectoryGroup("broken", [broken, broken]))
    assert evaluation_metrics(groups, 2) == clean | {"failed": 3.0}
    assert clean["failed"] == 0.0
    assert (clean["num_tasks"], clean["num_episodes"]) == (2.0, 4.0)


def test_groups_give_the_mean_over_tasks_and_pass_at_powers_of_two():
    groups = [group(True, False, False, False, False), group(False, False, False, False, False)]
    metrics = evaluation_metrics(groups, 5)
    assert metrics["success"] == metrics["avg_at_5"] == pytest.approx(0.1)
    assert [key for key in metrics if key.startswith("pass_at")] == ["pass_at_2", "pass_at_4", "pass_at_5"]
    assert metrics["pass_at_2"] == pytest.approx(0.5 * 2 / 5)
    assert metrics["pass_at_5"] == pytest.approx(0.5)


def test_kinds_of_tasks_are_told_apart():
    """Two lost and one won of one kind, one won of the other; a group without a kind counts in the total alone."""
    groups = [group(False), group(False), group(True), group(True), group(True)]
    for found, kind in zip(groups, ["heat", "heat", "heat", "cool", ""], strict=True):
        found.kind = kind
    metrics = evaluation_metrics(groups)
    assert metrics["success"] == pytest.approx(3 / 5)
    assert metrics["success/heat"] == pytest.approx(1 / 3)
    assert (metrics["success_low/heat"], metrics["success_high/heat"]) == pytest.approx(wilson_interval(1, 3))
    assert metrics["success/cool"] == 1.0
    assert [metrics[f"num_tasks/{kind}"] for kind in ("heat", "cool")] == [3, 1]
    assert sum(key.startswith("success/") for key in metrics) == 2


def test_an_environments_own_numbers_are_means_over_the_episodes_that_have_them():
    episodes = [trajectory(metrics={"score": 0.25}), trajectory(metrics={"score": 0.75}), trajectory()]
    failed = trajectory(stop=StopReason.ENV_ERROR, metrics={"score": 9.0})
    metrics = evaluation_metrics([TrajectoryGroup("task", [*episodes, failed])])
    assert metrics["environment/score"] == 0.5


def test_valid_actions_are_a_share_of_those_that_were_judged():
    episode = trajectory(steps=[step(valid=True), step(valid=False), step(valid=True), step()])
    assert evaluation_metrics([TrajectoryGroup("task", [episode])])["valid_actions"] == pytest.approx(2 / 3)
    assert math.isnan(evaluation_metrics([group(True)])["valid_actions"])


def test_the_same_keys_whatever_happened():
    """A logger's columns, and the keys that ranks agree on, must not depend on luck."""
    unlucky = [TrajectoryGroup("x", [trajectory(None, StopReason.ENV_TIMEOUT)] * 3)]
    metrics = evaluation_metrics(unlucky, 3)
    assert metrics.keys() == evaluation_metrics([group(True, True, False)], 3).keys()
    assert math.isnan(metrics["success"])
    assert math.isnan(metrics["pass_at_3"])
    assert metrics["num_episodes"] == 0


def test_unknown_outcomes_are_not_failures_of_the_policy():
    metrics = evaluation_metrics([group(None), group(None)])
    assert math.isnan(metrics["success"])
    assert metrics["num_episodes"] == 2
