"""The numbers of a comparison, by hand; and that 95 % intervals hold the truth 95 times in 100."""

import numpy as np
import pytest

from lit_agentrl.report.curves import Curve, common_range, cost_of, mean_curve
from lit_agentrl.report.intervals import Estimate, Spread, bootstrap, estimate, t_quantile


def curve(spent, *values):
    """A curve whose evaluations have one number a task."""
    return Curve(np.array(spent, dtype=float), np.array(values, dtype=float).reshape(len(spent), -1))


def test_a_curve_read_off_by_hand():
    """0 at nothing, 0.4 at 100, 0.2 at 200: halfway up it is 0.2; the area to 150 is 20 + 17.5."""
    one = curve([0, 100, 200], 0.0, 0.4, 0.2)
    assert one.at(50) == pytest.approx(0.2)
    assert one.at(100) == pytest.approx(0.4)
    assert one.at(150) == pytest.approx(0.3)
    assert one.at(200) == pytest.approx(0.2)
    assert one.average(0, 150) == pytest.approx(37.5 / 150)
    assert one.average(50, 100) == pytest.approx(0.3)
    assert one.until(150).spent.tolist() == [0, 100, 150]
    assert one.until(150).means == pytest.approx([0, 0.4, 0.3])
    assert one.until(100).spent.tolist() == [0, 100]


def test_tasks_are_interpolated_one_by_one_and_agree_with_the_mean():
    one = curve([0, 10], [0, 1, 0], [1, 1, 0])
    assert one.at(5) == pytest.approx([0.5, 1, 0])
    assert one.means == pytest.approx([1 / 3, 2 / 3])
    assert one.average(0, 10) == pytest.approx([0.5, 1, 0])


def test_the_mean_of_runs_lies_where_all_have_values():
    """Runs to 100 and to 80: the mean is read at 0, 50 and 80; by 50 they have 0.5 and 0.25."""
    runs = [curve([0, 50, 100], 0, 0.5, 0.5), curve([0, 80], 0, 0.4)]
    mean = mean_curve(runs)
    assert common_range(runs) == (0, 80)
    assert mean.spent.tolist() == [0, 50, 80]
    assert mean.means == pytest.approx([0, 0.375, 0.45])


def test_what_a_level_costs():
    one = curve([0, 100, 200, 300], 0.1, 0.5, 0.3, 0.9)
    assert cost_of(one, 0.3) == pytest.approx(50)
    assert cost_of(one, 0.6) == pytest.approx(250)
    assert cost_of(one, 0.05) == 0
    assert cost_of(one, 0.91) is None
    assert cost_of(one, 0.9) == pytest.approx(300)


def test_students_quantiles():
    """Published tables."""
    for degrees, value in ((1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (30, 2.0423), (1000, 1.9623)):
        assert t_quantile(degrees) == pytest.approx(value, abs=2e-3 if degrees == 1 else 2e-4)


def test_two_seeds_by_hand():
    """0.2 and 0.4: one of two is drawn, so means are 0.2 or 0.4 and the error 0.1, as s / sqrt(2) is; t(1) = 12.706."""
    found = estimate(np.array([[0.2], [0.4]]))
    assert found.value == pytest.approx(0.3)
    assert found.high - found.low == pytest.approx(2 * 12.706 * 0.1, rel=1e-2)
    assert not found.is_decided


def test_seeds_alone_give_students_interval():
    """The bootstrap of n - 1 has the unbiased variance: mean +- t s / sqrt(n), up to the noise of the draws."""
    values = np.array([[0.1], [0.25], [0.3], [0.55]])
    expected = float(values.std(ddof=1) / 2)
    spread = bootstrap(values, np.random.default_rng(1), 50_000)
    assert spread.variance**0.5 == pytest.approx(expected, rel=0.01)
    assert spread.tasks == pytest.approx(0, abs=1e-20)
    found = estimate(values)
    assert found.low == pytest.approx(0.3 - 3.182 * expected, abs=0.02)


def test_what_does_not_vary_has_no_interval():
    assert estimate(np.full((3, 4), 0.1 + 0.2)) == Estimate(pytest.approx(0.3))
    assert estimate(np.array([[0.7]])) == Estimate(0.7)
    assert not Estimate(0.7).is_decided
    assert Estimate(0.7, 0.1, 1.3).is_decided
    assert Estimate(-0.7, -1.3, -0.1).is_decided
    assert not Estimate(0.7, -0.1, 1.5).is_decided


def test_one_seed_speaks_of_tasks_only():
    """50 tasks of 0 and 50 of 1: 0.5 +- 1.984 x 0.5 / sqrt(99)."""
    found = estimate(np.repeat([0.0, 1.0], 50)[None])
    assert found.high - found.value == pytest.approx(1.984 * 0.5 / np.sqrt(99), rel=0.03)


def test_the_same_numbers_give_the_same_interval():
    values = np.random.default_rng(0).random((3, 20))
    assert estimate(values) == estimate(values.copy())
    assert estimate(values) != estimate(values, seed=1)


def coverage(num_seeds, num_tasks, seed_sd, task_sd, noise_sd, repeats=300):
    """How often the interval of a difference holds the true one, 0.1."""
    generator = np.random.default_rng(5)
    hits = 0
    for _ in range(repeats):
        seeds = generator.normal(0, seed_sd, (num_seeds, 1))
        tasks = generator.normal(0, task_sd, (1, num_tasks))
        found = estimate(0.1 + seeds + tasks + generator.normal(0, noise_sd, (num_seeds, num_tasks)))
        hits += found.low <= 0.1 <= found.high
    return hits / repeats


@pytest.mark.parametrize(
    "world",
    [
        (3, 1, 0.05, 0.0, 0.0),  # three seeds and nothing known of tasks
        (3, 100, 0.03, 0.2, 0.4),  # as in a real comparison: all three vary
        (5, 40, 0.05, 0.0, 0.3),  # seeds differ, tasks are noise
        (5, 40, 0.05, 0.3, 0.3),  # some tasks suit one arm, with every seed
        (1, 60, 0.0, 0.3, 0.3),  # one seed, of no effect
    ],
)
def test_intervals_hold_the_truth(world):
    """95 times in 100, within the 2.5 that are two standard errors of 300 repeats."""
    assert coverage(*world) == pytest.approx(0.95, abs=0.027)


def test_noise_of_episodes_counts_once():
    """Of pure noise the mean of 4 x 25 numbers varies by 1/100; drawing both counts it three times."""
    values = np.random.default_rng(2).normal(size=(4, 25))
    values = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    values += np.array([[1.0], [-1.0], [1.0], [-1.0]]) / 5 * 0.866  # seed means vary by noise alone: variance 1/25
    found = bootstrap(values, np.random.default_rng(3), 50_000)
    assert found.seeds == pytest.approx(0.01, rel=0.05)
    assert found.both > found.seeds + found.tasks
    assert Spread(4.0, 9.0, 15.0).variance == 11.0
    assert Spread(4.0, 9.0, 12.0).variance == 13.0
    assert Spread(4.0, 9.0, 30.0).variance == 9.0


def test_nesting_tasks_in_seeds_would_not_hold_it():
    """Why a draw of tasks is shared by all seeds: what suits one arm does so with every seed."""
    generator = np.random.default_rng(7)
    shared, nested, truth = [], [], []
    for _ in range(100):
        values = generator.normal(0, 0.5, (1, 30)) + generator.normal(0, 0.05, (5, 30))
        truth.append(values.mean())
        shared.append(bootstrap(values, generator, 400).variance ** 0.5)
        picks = generator.integers(0, 30, (400, 5, 30))
        nested.append(np.take_along_axis(np.broadcast_to(values, (400, 5, 30)), picks, 2).mean((1, 2)).std())
    assert np.mean(shared) == pytest.approx(np.std(truth), rel=0.2)
    assert np.mean(nested) < 0.6 * np.std(truth)
