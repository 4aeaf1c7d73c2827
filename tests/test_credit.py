"""Tokens that n leaves share count 1, 1 / n or 1 / sqrt(n) in each leaf's row, above and below the fraction bar."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from lit_agentrl.losses import aggregate, clipped_surrogate, surrogate_metrics
from lit_agentrl.models.prefix_tree import PackedTree
from lit_agentrl.models.reference import Reference
from lit_agentrl.rows import Row, assemble, collate, to_rows
from lit_agentrl.types import Step, StopReason, Trajectory, TrajectoryGroup
from tree_parts import (
    BROAD,
    DEEP,
    UNEVEN,
    batches_of,
    exact_lm,
    flat,
    forest,
    gradient,
    method,
    nodes,
    path_logprobs,
    row_of,
)

CREDITS = ["sum", "mean", "sqrt"]
KINDS = ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant"]
POWERS = {"sum": 0.0, "mean": 1.0, "sqrt": 0.5}


@pytest.fixture(scope="module")
def lm():
    return exact_lm()


def weights_of(group, credit, keep=None):
    """The weights of each row's action tokens, with advantages of 1."""
    values = [[1.0] * len(leaf.steps) for leaf in group.trajectories]
    (rows,) = to_rows([group], [values], keep, credit)
    return [[w for w, sampled in zip(row.weights, row.action_mask, strict=True) if sampled] for row in rows]


def pair() -> TrajectoryGroup:
    """Two leaves that share a first step of 2 tokens and end with 1 and 3 of their own; and a chain of 1 token."""
    head = Step([1], [2, 3], [-1.0, -1.0])
    tails = [Step([1, 2, 3, 9], [4], [-1.0]), Step([1, 2, 3, 9], [5, 6, 7], [-1.0] * 3)]
    leaves = [Trajectory([head, tail]) for tail in tails]
    return TrajectoryGroup("task", [*leaves, Trajectory([Step([1], [8], [-1.0])], tree_id=1)])


# --- rows ---


def test_weights_by_hand():
    """A step of two leaves counts 1/2 or 0.7071 in each; context counts nothing; with `sum` there are no weights."""
    assert weights_of(pair(), "mean") == [[0.5, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0, 1.0], [1.0]]
    half = math.sqrt(0.5)
    assert weights_of(pair(), "sqrt") == [pytest.approx(row) for row in ([half] * 2 + [1], [half] * 2 + [1] * 3, [1])]
    assert [row.weights for row in to_rows([pair()], [[[1.0] * 2, [1.0] * 2, [1.0]]])[0]] == [[], [], []]
    (row, *_) = to_rows([pair()], [[[1.0] * 2, [1.0] * 2, [1.0]]], credit="mean")[0]
    assert row.weights == [0, 0.5, 0.5, 0, 1.0]


def test_only_trained_leaves_are_counted():
    """A leaf that failed or is refused shares nothing with the others."""
    broken = pair()
    broken.trajectories[1].stop_reason = StopReason.ENV_ERROR
    assert weights_of(broken, "mean") == [[1.0, 1.0, 1.0], [1.0]]
    longest = pair().trajectories[1].steps[1].action_ids
    refused = weights_of(pair(), "mean", lambda leaf, advantages: leaf.steps[-1].action_ids != longest)
    assert refused == [[1.0, 1.0, 1.0], [1.0]]


def test_equal_steps_that_were_sampled_apart_share_nothing():
    """Two draws with the same tokens are two samples: identity counts, not equality."""
    twice = [Trajectory([Step([1], [2, 3], [-1.0, -1.0])]) for _ in range(2)]
    assert weights_of(TrajectoryGroup("task", twice), "mean") == [[1.0, 1.0]] * 2


def test_rebuilt_prompts_share_rows():
    """Where every step is a row, a shared step is the same row twice, and each copy counts half."""
    group = pair()
    for leaf in group.trajectories[:2]:
        leaf.steps[1].context_ids = [1, 9]
    assert weights_of(group, "mean") == [[0.5, 0.5], [1.0], [0.5, 0.5], [1.0] * 3, [1.0]]


def totals(groups, credit, updates=1):
    rows = to_rows(groups, [[[1.0] * len(t.steps) for t in g.trajectories] for g in groups], credit=credit)
    batches, _ = assemble(
        [[row for group in rows[i::updates] for row in group] for i in range(updates)],
        1000,
        lambda counts, how: counts,
        shared=False,
        sum_weights=lambda weights: weights,
    )
    return [(batch.token_denominator, batch.row_denominator) for batch in batches]


def test_denominators_by_hand():
    """With `mean` the tokens are those that were sampled: 2 + 1 + 3 + 1. Rows count 2/3, 4/5 and 1."""
    assert totals([pair()], "mean") == [pytest.approx((7.0, 2 / 3 + 4 / 5 + 1))]
    root = math.sqrt(0.5)
    rows = (2 * root + 1) / 3 + (2 * root + 3) / 5 + 1
    assert totals([pair()], "sqrt") == [pytest.approx((4 * root + 5, rows))]
    assert totals([pair()], "sum") == [(9.0, 3.0)]


def test_every_optimiser_step_has_denominators_of_its_own():
    chain = TrajectoryGroup("other", [Trajectory([Step([1], [2, 3], [-1.0] * 2)])])
    assert totals([pair(), chain, pair()], "mean", updates=2) == [
        pytest.approx((14.0, 2 * (2 / 3 + 4 / 5 + 1))),
        pytest.approx((2.0, 1.0)),
    ]


def test_denominators_span_the_ranks():
    """What other ranks' rows weigh is in them, and both sums are asked for in one call."""
    asked = []

    def sum_weights(weights):
        asked.append(weights)
        return [weight + 10 for weight in weights]

    rows = to_rows([pair()], [[[1.0] * 2, [1.0] * 2, [1.0]]], credit="mean")[0]
    batches, _ = assemble([rows], 8, lambda counts, how: counts, shared=False, sum_weights=sum_weights)
    assert len(batches) > 1
    assert len(asked) == 1
    assert {batch.token_denominator for batch in batches} == {17.0}
    assert all(batch.row_denominator == pytest.approx(12 + 2 / 3 - 0.2) for batch in batches)


def test_a_step_without_rows_has_a_batch_without_loss():
    """A rank whose leaves were all refused still takes part, with weights of the others in the denominators."""
    (batch,), _ = assemble([[]], 8, lambda counts, how: counts, shared=False, sum_weights=lambda w: [5.0, 2.0])
    assert batch.weights is None
    assert (batch.token_denominator, batch.row_denominator) == (5.0, 2.0)
    assert not batch.action_mask.any()


def test_without_weights_the_counts_are_integers():
    batch = collate([Row([1, 2], [False, True], [0.0, -1.0], [0.0, 1.0])], 7, 3)
    assert batch.weights is None
    assert (batch.token_denominator, batch.row_denominator) == (7, 3)


# --- losses ---

LOSS = torch.tensor([[9.0, 1.0, 2.0, 3.0], [9.0, 4.0, 5.0, 0.0]], dtype=torch.float64)
MASK = torch.tensor([[False, True, True, True], [False, True, True, False]])
WEIGHTS = torch.tensor([[7.0, 0.5, 1.0, 1.0], [7.0, 0.5, 1.0, 7.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("token_mean", (0.5 + 2 + 3 + 2 + 5) / 4),
        ("seq_mean_token_mean", (5.5 / 3 + 7 / 2) / (2.5 / 3 + 1.5 / 2)),
        ("seq_mean_token_sum", 12.5 / (2.5 / 3 + 1.5 / 2)),
        ("constant", 12.5 / (2.5 / 3 + 1.5 / 2) / 10),
    ],
)
def test_weighted_means_by_hand(kind, expected):
    """Weights off the mask reach nothing."""
    assert float(aggregate(LOSS, MASK, kind, max_length=10, weights=WEIGHTS)) == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_one_change_no_bit(kind):
    values = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    mask = values > -0.5
    ones = torch.ones_like(values)
    plain = aggregate(values, mask, kind, max_length=9)
    assert torch.equal(aggregate(values, mask, kind, max_length=9, weights=ones), plain)


def test_a_weighted_mean_of_ones_is_one():
    ones = torch.ones_like(LOSS)
    for kind in ("token_mean", "seq_mean_token_mean"):
        assert float(aggregate(ones, MASK, kind, weights=WEIGHTS)) == pytest.approx(1)


def test_nothing_to_weigh_is_zero():
    for weights, mask in ((WEIGHTS, MASK & False), (WEIGHTS * 0, MASK)):
        assert float(aggregate(LOSS, mask, "token_mean", weights=weights)) == 0
        assert float(aggregate(LOSS, mask, "seq_mean_token_mean", weights=weights)) == 0


def test_metrics_are_weighted_like_the_loss():
    """Ratios 2, 1, 1 and 2, 1 with the weights above: 4 tokens count, 1 of them outside the clip."""
    logp = torch.where(WEIGHTS == 0.5, math.log(2), 0.0).double()
    found = surrogate_metrics(logp, torch.zeros_like(logp), MASK, weights=WEIGHTS)
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {"ratio": 2 + 3, "clip_fraction": 1, "approx_kl": 2 - 1 - math.log(2), "num_tokens": 4}
    )


# --- training ---


def everything(lm, credit, kind="token_mean", *, shared=False):
    """All terms of the loss at once: clipping, dual clip, KL and entropy."""
    return method(
        lm,
        shared=shared,
        credit=credit,
        aggregation=kind,
        max_length=16,
        dual_clip=1.3,
        kl_coef=0.3,
        reference=Reference("frozen"),
        entropy_coef=0.2,
    )


def with_reference(batches):
    """The batches with made-up log-probabilities of a reference, the same for the same token."""
    return [
        replace(batch, reference_logprobs=(batch.old_logprobs - 0.3 + (batch.token_ids % 5) / 10) * batch.action_mask)
        for batch in batches
    ]


def close(found, expected, tolerance=1e-10):
    """Equal up to the rounding of float64; and not both nothing."""
    assert expected.abs().max() > 1e-4
    assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_one_shared_token_by_hand():
    """Ratio 1.3 under advantages 1 and -1: the first is clipped, the second pushes down with all of its ratio.

    The net advantage is 0 and would push nothing. What a token's leaves want does not add up before clipping.
    """
    logp = torch.full((2, 1), math.log(1.3), dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    clipped_surrogate(logp, torch.zeros_like(advantages), advantages).sum().backward()
    assert logp.grad.flatten().tolist() == pytest.approx([0.0, 1.3])


@pytest.mark.parametrize("credit", CREDITS)
def test_unique_tokens_learn_what_their_leaves_do(lm, credit):
    """Clipping is per token and leaf: the twin goes through unique tokens and, at each, through the leaves below it.

    Its coefficient of d log p is -w r A where r A is not clipped, summed over leaves. Both forwards agree with it, and
    the sum of advantages in place of the leaves' own does not.
    """
    group = forest(UNEVEN, DEEP, BROAD)
    padded, shared = (method(lm, credit=credit, shared=s) for s in (False, True))
    (batch,) = batches_of(padded, [group])
    values = torch.tensor([steps[0] for steps in padded.advantages(group)], dtype=torch.float64)
    paths = [path_logprobs(lm, leaf) for leaf in group.trajectories]
    terms, netted, mixed, num_clipped, num_tokens = [], [], 0, 0, 0
    for step, leaves in nodes(group).values():
        k = next(k for k, each in enumerate(group.trajectories[leaves[0]].steps) if each is step)
        logp = paths[leaves[0]][k]
        old = torch.tensor(step.logprobs, dtype=torch.float64)
        ratio, weight = (logp - old).exp().detach(), len(leaves) ** -POWERS[credit]
        pushed, net = torch.zeros_like(ratio), values[leaves].sum()
        for leaf in leaves:
            active = ratio < 1.2 if values[leaf] > 0 else ratio > 0.8
            pushed += weight * ratio * values[leaf] * active
            num_clipped, num_tokens = num_clipped + int((~active).sum()), num_tokens + len(ratio)
        mixed += bool((values[leaves] > 0).any() and (values[leaves] < 0).any())
        terms.append((pushed * logp).sum())
        netted.append((weight * ratio * net * (ratio < 1.2 if net > 0 else ratio > 0.8) * logp).sum())
    assert mixed >= 5
    assert 0.15 < num_clipped / num_tokens < 0.85
    expected, wrong = (
        flat(torch.autograd.grad(-sum(each) / batch.token_denominator, list(lm.parameters()), retain_graph=True))
        for each in (terms, netted)
    )
    close(gradient(padded, [batch]), expected)
    close(gradient(shared, [batch]), expected)
    assert (wrong - expected).norm() > 0.1 * expected.norm()
    tree = PackedTree.build(batch.token_ids, batch.lengths)
    assert len(tree) < 0.6 * int(batch.lengths.sum())  # there was something to share


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("kind", KINDS)
def test_sharing_prefixes_changes_no_gradient(lm, credit, kind):
    """With KL, entropy, clipping and dual clip, for every credit and every mean."""
    groups = [forest(UNEVEN, BROAD), forest(DEEP, seed=1, prompt=[1, 9])]
    padded, shared = (everything(lm, credit, kind, shared=s) for s in (False, True))
    batches = with_reference(batches_of(padded, groups))
    close(gradient(shared, batches), gradient(padded, batches))


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_add_up(lm, credit, kind):
    """Trees may be torn between micro-batches: the denominators are the optimiser step's."""
    groups = [forest(UNEVEN, BROAD), forest(DEEP, seed=1, prompt=[1, 9])]
    module = everything(lm, credit, kind)
    whole, parts = (with_reference(batches_of(module, groups, max_tokens)) for max_tokens in (100_000, 40))
    assert len(whole) == 1
    assert len(parts) > 4
    close(gradient(module, parts), gradient(module, whole))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chat", ["append", "rebuild"])
def test_copies_that_count_their_share_are_one(lm, kind, chat):
    """The law of `mean`: a leaf that is there three times is there once, in loss and gradient. `sum` breaks it."""
    once = forest(BROAD)
    once.trajectories = [once.trajectories[0], forest(DEEP, seed=1, prompt=[1, 9]).trajectories[3]]
    if chat == "rebuild":
        for leaf in once.trajectories:
            for step in leaf.steps[1:]:
                step.context_ids = step.context_ids[1:]
    thrice = TrajectoryGroup("prompt", [*once.trajectories[:1] * 3, once.trajectories[1]])
    found = {}
    for credit in ("mean", "sum"):
        module = everything(lm, credit, kind)
        module.advantages = lambda group: [
            [1.0 if leaf is once.trajectories[0] else -0.5] * len(leaf.steps) for leaf in group.trajectories
        ]
        found[credit] = [gradient(module, with_reference(batches_of(module, [group]))) for group in (thrice, once)]
    close(*found["mean"])
    assert (found["sum"][0] - found["sum"][1]).norm() > 0.01 * found["sum"][1].norm()


@pytest.mark.parametrize("credit", ["mean", "sqrt"])
def test_logged_terms_are_those_of_the_loss(lm, credit):
    """Weighted like it: the loss is the surrogate + 0.3 KL - 0.2 entropy of what is logged."""
    group = forest(UNEVEN, DEEP)
    module = everything(lm, credit)
    (batch,) = with_reference(batches_of(module, [group]))
    loss, sums = module.objective(batch)
    bare = method(lm, credit=credit, dual_clip=1.3)
    surrogate, _ = bare.objective(replace(batch, reference_logprobs=None))
    kl, entropy = (sums[f"train/{name}"] / batch.token_denominator for name in ("kl", "entropy"))
    assert_close(loss, surrogate + 0.3 * kl - 0.2 * entropy)
    weights = batch.weights[batch.action_mask]
    assert weights.unique().numel() > 2
    ratios = (module.logprobs - batch.old_logprobs).exp()[batch.action_mask]
    assert_close(sums["train/ratio"], (weights * ratios).sum())


@pytest.mark.parametrize("drop", [False, True])
def test_leaves_without_signal_can_leave_the_count(drop):
    """`drop_zero_advantage`: a leaf that is not trained is not among the n of its steps."""
    head = Step([1], [2], [-1.0])
    rewards = (1.0, 0.0, 0.5)  # by scale none the last one's advantage is 0
    leaves = [Trajectory([head, Step([1, 2], [3 + i], [-1.0])], total_reward=r) for i, r in enumerate(rewards)]
    group = TrajectoryGroup("task", leaves)
    module = method(scale="none", credit="mean", drop_zero_advantage=drop)
    (batch,) = batches_of(module, [group])
    n = 2 if drop else 3
    assert batch.weights[row_of(batch, leaves[0])].tolist() == pytest.approx([0, 1 / n, 1])
    assert batch.token_denominator == pytest.approx(1 + n)
