"""What Tree-GRPO's paper claims of its gradient, on gradients of a real model in float64, and what is exactly true.

The paper (arXiv 2509.21240, 3.3 and App. C) relates the intra-tree term to step-level DPO. `docs/tree_grpo.md` says the
claim in words.
"""

import math

import pytest
import torch
from torch.testing import assert_close

from lit_agentrl.advantages import standardize
from lit_agentrl.losses import dpo_loss
from lit_agentrl.types import Step, Trajectory, TrajectoryGroup
from tree_parts import (
    BROAD,
    CHAINS,
    DEEP,
    PROMPT,
    SHAPES,
    UNEVEN,
    Node,
    batches_of,
    exact_lm,
    forest,
    gradient,
    gradient_of,
    method,
    nodes,
    path_logprobs,
    row_of,
)

INTRA = {"intra_weight": 1.0, "inter_weight": 0.0}
TOTAL = {"aggregation": "seq_mean_token_sum"}  # the sum over tokens: log p of the whole path


@pytest.fixture(scope="module")
def lm():
    return exact_lm()


def close(found, expected, tolerance=1e-10):
    """Equal up to the rounding of float64; and not both nothing."""
    assert expected.abs().max() > 1e-4
    assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def path_gradients(lm, group):
    """g_i = grad log p(path i), each from a forward of its own."""
    return [gradient_of(lm, torch.cat(path_logprobs(lm, leaf)).sum()) for leaf in group.trajectories]


# --- the identity of pairs: exact, for any tree, without an assumption ---


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", ["none", "std"])
def test_the_intra_tree_gradient_is_a_sum_over_pairs(lm, shape, scale):
    """sum_i (R_i - mean) g_i = 1/n sum over winners w and losers l of g_w - g_l; with the std a pair weighs 1/std."""
    group = forest(SHAPES[shape])
    module = method(lm, scale=scale, **INTRA, **TOTAL)
    (batch,) = batches_of(module, [group], on_policy=True)
    n, rewards = len(group.trajectories), [leaf.total_reward for leaf in group.trajectories]
    g = path_gradients(lm, group)
    pairs = sum(g[w] - g[loser] for w in range(n) for loser in range(n) if rewards[w] == 1 and rewards[loser] == 0)
    std = torch.tensor(rewards, dtype=torch.float64).std() + 1e-6 if scale == "std" else 1.0
    close(-n * gradient(module, [batch]), pairs / (n * std))


def test_graded_rewards_are_pairs_weighted_by_their_difference(lm):
    """sum_i (R_i - mean) g_i = 1/n sum over i < j of (R_i - R_j)(g_i - g_j)."""
    group = forest(UNEVEN)
    for number, leaf in enumerate(group.trajectories):
        leaf.total_reward = [0.3, 0.9, 0.1, 0.55, 0.0][number]
    module = method(lm, scale="none", **INTRA, **TOTAL)
    (batch,) = batches_of(module, [group], on_policy=True)
    g, r = path_gradients(lm, group), [leaf.total_reward for leaf in group.trajectories]
    pairs = sum((r[i] - r[j]) * (g[i] - g[j]) for j in range(5) for i in range(j)) / 5
    close(-5 * gradient(module, [batch]), pairs)


@pytest.mark.parametrize("shape", ["uneven", "broad", "deep"])
def test_what_a_pair_has_in_common_cancels(lm, shape):
    """g_w - g_l is the gradient of what comes after the node where w and l part: preference at a step."""
    leaves = forest(SHAPES[shape]).trajectories
    for w, winner in enumerate(leaves):
        for loser in leaves[:w]:
            common = sum(a is b for a, b in zip(winner.steps, loser.steps, strict=False))
            assert common >= 1
            logp = [path_logprobs(lm, leaf) for leaf in (winner, loser)]
            whole, after = (
                gradient_of(lm, torch.cat(logp[0][k:]).sum() - torch.cat(logp[1][k:]).sum()) for k in (0, common)
            )
            close(whole, after)


# --- step-level DPO (Proposition 3.1 / C.1) ---


def pair(lm, p_win):
    """Log-probabilities of two continuations of one node, and the gradient D of their difference.

    Assumption C.1 made explicit: the node has exactly two continuations, so p is the model's, normalised over the two.
    A constant on one logit sets p_win, and has no gradient.
    """
    winner, loser = forest(Node(2, [Node(3, 1.0), Node(2, 0.0)])).trajectories
    logits = torch.stack([path_logprobs(lm, leaf)[-1].sum() for leaf in (winner, loser)])
    shift = math.log(p_win / (1 - p_win)) - (logits[0] - logits[1]).detach()
    logp = torch.log_softmax(torch.stack([logits[0] + shift, logits[1]]), 0)
    return logp, gradient_of(lm, logits[0] - logits[1])


def leaves_of(num_wins, num_leaves):
    """One tree whose leaves are the two continuations, as often as their probabilities say."""
    step = Step(PROMPT, [5], [-1.0])
    rewards = [1.0] * num_wins + [0.0] * (num_leaves - num_wins)
    return TrajectoryGroup("prompt", [Trajectory([step], total_reward=r) for r in rewards])


@pytest.mark.parametrize("num_wins", [1, 2, 3])
def test_intra_tree_and_step_dpo_point_the_same_way(lm, num_wins):
    """Both are w D: step DPO with w = p_loss (beta = 1), the intra-tree term with w = p_win p_loss.

    So grad J_DPO = grad J_intra / p_win, and grad J_intra = grad p_win. With the population's std w is
    sqrt(p_win p_loss). Four leaves drawn as often as p says make the sample mean the expectation.
    """
    p_win = num_wins / 4
    (win, loss), direction = pair(lm, p_win)
    group = leaves_of(num_wins, 4)
    values = torch.tensor(method(scale="none", **INTRA).advantages(group), dtype=torch.float64)[:, 0]
    assert values.tolist() == pytest.approx([1 - p_win] * num_wins + [-p_win] * (4 - num_wins))

    def policy_gradient(values):
        return gradient_of(lm, (values * torch.stack([win] * num_wins + [loss] * (4 - num_wins))).mean())

    intra = policy_gradient(values)
    dpo = gradient_of(lm, -dpo_loss(win, loss, beta=1.0).mean())
    close(dpo, (1 - p_win) * direction)
    close(intra, p_win * (1 - p_win) * direction)
    close(dpo, intra / p_win)
    close(intra, gradient_of(lm, win.exp()))
    rewards = torch.tensor([leaf.total_reward for leaf in group.trajectories], dtype=torch.float64)
    close(policy_gradient(standardize(rewards, ddof=0, eps=0.0)), math.sqrt(p_win * (1 - p_win)) * direction)
    # What training does by default: the sample's std, which is sqrt(4 / 3) times the population's, and eps.
    trained = torch.tensor(method(**INTRA).advantages(group), dtype=torch.float64)[:, 0]
    close(policy_gradient(trained), math.sqrt(0.75 * p_win * (1 - p_win)) * direction, 1e-5)


def test_only_the_direction_is_shared(lm):
    """The weights differ: rare wins weigh most in DPO and nearly nothing in the intra-tree term; beta changes one."""
    (win, loss), direction = pair(lm, 0.01)
    close(gradient_of(lm, -dpo_loss(win, loss, beta=1.0).mean()), 0.99 * direction)
    close(gradient_of(lm, win.exp()), 0.0099 * direction)
    odds = math.log(0.01 / 0.99)
    close(gradient_of(lm, -dpo_loss(win, loss, beta=2.0).mean()), 2 / (1 + math.exp(2 * odds)) * direction)


def test_without_the_assumption_the_directions_part(lm):
    """A language model has more continuations than two: then p_loss is not 1 - p_win, and grad p_win is not w D."""
    winner, loser = forest(Node(2, [Node(3, 1.0), Node(2, 0.0)])).trajectories
    win, loss = (path_logprobs(lm, leaf)[-1].sum() for leaf in (winner, loser))
    cosine = torch.cosine_similarity(gradient_of(lm, win.exp()), gradient_of(lm, win - loss), dim=0)
    assert 0.1 < cosine < 0.99


# --- credit of nodes ---


def pushes(module, group, batch):
    """The objective's derivative by the log-probability of every token of every node, summed over the node's leaves."""
    (loss, _) = module.objective(batch)
    loss.backward()
    found = {}
    for key, (step, leaves) in nodes(group).items():
        at = slice(len(step.context_ids), len(step.context_ids) + len(step.action_ids))
        rows = [row_of(batch, group.trajectories[leaf]) for leaf in leaves]
        found[key] = -sum(module.logprobs.grad[row, at] for row in rows)
    return found


@pytest.mark.parametrize("credit", ["sum", "mean", "sqrt"])
def test_the_credit_of_a_node_is_its_formula(lm, credit):
    """W(v) = n_v [(mean_v - mean_T)/(std_T + eps) + (mean_v - mean_P)/(std_P + eps)]; / n_v or / sqrt(n_v)."""
    group = forest(UNEVEN, DEEP, BROAD)
    module = method(lm, credit=credit)
    (batch,) = batches_of(module, [group], on_policy=True)
    pushed = pushes(module, group, batch)
    rewards = torch.tensor([leaf.total_reward for leaf in group.trajectories], dtype=torch.float64)
    trees = torch.tensor([leaf.tree_id for leaf in group.trajectories])
    for key, (step, leaves) in nodes(group).items():
        n, mean = len(leaves), rewards[leaves].mean()
        tree = rewards[trees == trees[leaves[0]]]
        worth = (mean - tree.mean()) / (tree.std() + 1e-6) + (mean - rewards.mean()) / (rewards.std() + 1e-6)
        expected = worth * {"sum": n, "mean": 1, "sqrt": math.sqrt(n)}[credit] / batch.token_denominator
        assert_close(pushed[key], expected.expand(len(step.action_ids)), rtol=1e-10, atol=1e-15)
    sizes = {len(leaves) for _, leaves in nodes(group).values()}
    assert sizes == {1, 2, 3, 4, 5}


def prefix_gradient(lm, group, module):
    """What the tokens that a whole tree shares send into the weights."""
    (batch,) = batches_of(module, [group], on_policy=True)
    pushed = pushes(module, group, batch)
    leaf = group.trajectories[0]
    whole = [k for k, s in enumerate(leaf.steps) if len(nodes(group)[id(s)][1]) == len(group.trajectories)]
    assert whole
    logp = path_logprobs(lm, leaf)
    return gradient_of(lm, sum((logp[k] * pushed[id(leaf.steps[k])]).sum() for k in whole))


@pytest.mark.parametrize("shape", ["uneven", "broad", "deep"])
@pytest.mark.parametrize("credit", ["sum", "mean", "sqrt"])
def test_what_a_whole_tree_shares_gets_no_intra_credit_by_token_mean(lm, shape, credit):
    """Its leaves' advantages sum to 0: process credit begins at the first branching. Row means break that."""
    group = forest(SHAPES[shape])
    assert prefix_gradient(lm, group, method(lm, credit=credit, **INTRA)).abs().max() < 1e-14
    rows = method(lm, credit=credit, aggregation="seq_mean_token_mean", **INTRA)
    assert prefix_gradient(lm, group, rows).abs().max() > 1e-4


def test_the_inter_tree_term_does_credit_it(lm):
    """What all leaves of the better tree share is pushed up, by n_T (mean_T - mean_P) / (std_P + eps)."""
    group = forest(BROAD, Node(2, [Node(3, 1.0), Node(2, 0.0), Node(1, 0.0)]))
    module = method(lm, intra_weight=0.0)
    (batch,) = batches_of(module, [group], on_policy=True)
    root = group.trajectories[0].steps[0]
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 1, 0, 0], dtype=torch.float64)
    expected = 5 * (0.6 - 0.5) / (float(rewards.std()) + 1e-6) / batch.token_denominator
    assert pushes(module, group, batch)[id(root)].tolist() == pytest.approx([expected] * 2)


def test_off_policy_the_cancellation_ends(lm):
    """Where the ratio left 1, clipping treats leaves with opposite signs differently: nothing need cancel."""
    group = forest(BROAD)
    module = method(lm, **INTRA)
    (batch,) = batches_of(module, [group])
    pushed = pushes(module, group, batch)
    assert pushed[id(group.trajectories[0].steps[0])].abs().max() > 1e-3


def test_trees_of_chains_are_grpo_twice(lm):
    """Nothing shared, one tree: the gradient is twice that of the inter-tree term alone."""
    group = forest(CHAINS)
    both, inter = method(lm), method(lm, intra_weight=0.0)
    close(gradient(both, batches_of(both, [group])), 2 * gradient(inter, batches_of(inter, [group])))
