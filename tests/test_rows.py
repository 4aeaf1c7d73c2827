"""Rows hold every token once, loss lies on sampled tokens only, and denominators span the whole optimiser step."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lit_agentrl.errors import UserError
from lit_agentrl.rows import Row, assemble, collate, plan_micro_batches, split_updates, to_rows, trajectory_rows
from lit_agentrl.types import Step, StopReason, Trajectory, TrajectoryGroup


def alone(values: list[int], how: str) -> list[int]:
    """One rank."""
    return values


def appended() -> Trajectory:
    """Two turns: context 1 2, action 3 4, environment 5 6, action 7."""
    return Trajectory([Step([1, 2], [3, 4], [-0.1, -0.2]), Step([1, 2, 3, 4, 5, 6], [7], [-0.3])])


def row(length: int) -> Row:
    return Row(list(range(length)), [i > 0 for i in range(length)], [0.0] * length, [1.0] * length)


def test_appended_turns_make_one_row():
    """Environment tokens lie between the actions and carry neither mask nor advantage."""
    (made,) = trajectory_rows(appended(), [0.5, -1.0])
    assert made.token_ids == [1, 2, 3, 4, 5, 6, 7]
    assert made.action_mask == [False, False, True, True, False, False, True]
    assert made.logprobs == [0, 0, -0.1, -0.2, 0, 0, -0.3]
    assert made.advantages == [0, 0, 0.5, 0.5, 0, 0, -1.0]


def test_rebuilt_contexts_make_a_row_each():
    trajectory = Trajectory([Step([1, 2], [3], [-1.0]), Step([1, 9], [4], [-2.0])])
    rows = trajectory_rows(trajectory, [1.0, 2.0])
    assert [r.token_ids for r in rows] == [[1, 2, 3], [1, 9, 4]]


def test_failed_and_refused_trajectories_give_no_rows():
    """A trajectory that the environment broke is never trained."""
    failed = appended()
    failed.stop_reason = StopReason.ENV_ERROR
    group = TrajectoryGroup("p", [appended(), failed, appended()])
    values = [[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
    assert len(to_rows([group], [values])[0]) == 2
    assert len(to_rows([group], [values], lambda t, a: any(a))[0]) == 1


def test_updates_never_tear_a_group():
    groups = [[row(3), row(4)], [row(5)], [row(6), row(7)]]
    updates = split_updates(groups, 2)
    assert [[len(r.token_ids) for r in u] for u in updates] == [[3, 4, 6, 7], [5]]


@pytest.mark.parametrize("shared", [True, False])
def test_micro_batches_keep_the_budget_and_every_row(shared):
    generator = torch.Generator().manual_seed(0)
    rows = [row(int(n)) for n in torch.randint(2, 30, (40,), generator=generator)]
    plan = plan_micro_batches(rows, 64, shared=shared)
    assert sorted(i for part in plan for i in part) == list(range(40))
    for part in plan:
        lengths = [len(rows[i].token_ids) for i in part]
        # These rows are prefixes of one another, so the unique tokens are those of the longest.
        assert (max(lengths) if shared else max(lengths) * len(lengths)) <= 64


def test_rows_that_share_too_little_keep_the_budget_when_padded():
    """A pack of unlike rows is computed in full, so it may not hold more padded tokens than the budget."""
    rows = [Row([i * 100 + k for k in range(10)], [True] * 10, [0.0] * 10, [0.0] * 10) for i in range(5)] + [row(40)]
    plan = plan_micro_batches(rows, 60, shared=True)
    assert sorted(i for part in plan for i in part) == list(range(6))
    assert all(max(len(rows[i].token_ids) for i in part) * len(part) <= 60 for part in plan)


def test_a_row_beyond_the_budget_is_refused_with_both_numbers():
    with pytest.raises(UserError, match=r"max_tokens=8 .*longest row \(9 tokens\)"):
        plan_micro_batches([row(9)], 8, shared=True)


def test_assemble_pads_to_equal_counts_with_batches_that_carry_no_loss():
    """Two optimiser steps of 3 and 1 micro-batches become 3 and 3; the denominators are those of the real rows."""
    updates = [[row(10), row(10), row(10)], [row(4)]]
    batches, per_step = assemble(updates, 10, alone, shared=False)
    assert per_step == 3
    assert len(batches) == 6
    assert [b.num_action_tokens for b in batches] == [27] * 3 + [3] * 3
    assert [b.num_rows for b in batches] == [3] * 3 + [1] * 3
    assert sum(int(b.action_mask.sum()) for b in batches) == 30
    assert not batches[4].action_mask.any()


def test_counts_follow_the_fullest_rank():
    """A rank with fewer micro-batches than its peers fills up to their number."""
    batches, per_step = assemble(
        [[row(4)]], 10, lambda v, how: [5] if how == "max" else [v[0] + 100, v[1] + 10], shared=False
    )
    assert per_step == len(batches) == 5
    assert batches[0].num_action_tokens == 103
    assert batches[0].num_rows == 11


def test_nothing_to_train_still_gives_a_batch():
    """An iteration whose rows were all filtered has one batch without loss: Lightning needs something to run."""
    batches, per_step = assemble([[]], 10, alone, shared=True)
    assert per_step == 1
    assert not batches[0].action_mask.any()
    assert batches[0].num_action_tokens == 0


def test_collate_pads_right():
    batch = collate([row(2), row(4)], 4, 2, temperature=0.7)
    assert batch.token_ids.tolist() == [[0, 1, 0, 0], [0, 1, 2, 3]]
    assert batch.lengths.tolist() == [2, 4]
    assert batch.action_mask.tolist() == [[False, True, False, False], [False, True, True, True]]
    assert batch.temperature == 0.7


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("lengths", [[[4, 4, 9], [5]], [[9, 9, 9], []], [[4], [9, 3, 3, 8], []], [[], [], [7]]])
def test_ranks_step_together_and_their_shares_make_the_whole(lengths: list[list[int]], shared: bool):
    """Uneven rows, and ranks without any: as many micro-batches everywhere, each row once, one denominator."""
    barrier, said = threading.Barrier(len(lengths)), [[] for _ in lengths]

    def assembled(rank: int):
        def reduce(values: list[int], how: str) -> list[int]:
            said[rank] = values
            barrier.wait(10)
            found = [sum(each) if how == "sum" else max(each) for each in zip(*said, strict=True)]
            barrier.wait(10)
            return found

        return assemble([[row(length) for length in lengths[rank]]], 10, reduce, shared=shared)

    with ThreadPoolExecutor(len(lengths)) as pool:
        ranks = list(pool.map(assembled, range(len(lengths))))
    assert len({per_step for _, per_step in ranks}) == 1
    assert {len(batches) for batches, _ in ranks} == {ranks[0][1]}
    everything = [batch for batches, _ in ranks for batch in batches]
    total = sum(length - 1 for of_rank in lengths for length in of_rank)
    assert {batch.num_action_tokens for batch in everything} == {total}
    assert sum(int(batch.action_mask.sum()) for batch in everything) == total
    assert {batch.num_rows for batch in everything} == {sum(map(len, lengths))}
