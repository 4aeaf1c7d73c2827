"""Tree rollouts: leaves, shared steps, turns, tool calls and costs by hand; laws against chains; what is refused."""

import copy
import pickle

import numpy as np
import pytest
import torch

from lit_agentrl.errors import UserError
from lit_agentrl.models.policy import load_tokenizer
from lit_agentrl.models.prefix_tree import PackedTree
from lit_agentrl.rollouts.budget import Budget
from lit_agentrl.rollouts.chain import ChainRollout
from lit_agentrl.rollouts.chat import Chat
from lit_agentrl.rollouts.engine import rollout_seed
from lit_agentrl.rollouts.expansion import Entropy, PerDepth, Uniform, ValueVariance, WithoutReplacement
from lit_agentrl.rollouts.forest import Node
from lit_agentrl.rollouts.hf import HFEngine
from lit_agentrl.rollouts.tokens import TokenView
from lit_agentrl.rollouts.tree import TreeRollout
from lit_agentrl.rows import collate, to_rows, trajectory_rows
from lit_agentrl.types import Ledger, SamplingParams, Step, StopReason, Trajectory
from trail_parts import CHAT, Fickle, Forgetful, Picks, SavedTrail, Script, Trail, roll, said

KINDS = pytest.mark.parametrize("kind", [SavedTrail, Trail], ids=["snapshots", "replays"])


# --- scripted policies ---


@KINDS
def test_branches_start_after_the_chosen_steps(kind):
    """A chain of three steps; one branch after its first step, one after its second."""
    picks = Picks([1, 2])
    engine = Script(["search", "search", "wrong", "right search", "right"])
    (group,) = roll(TreeRollout(max_steps=4, trees=1, expansion=picks), engine, kind=kind)

    assert said(group) == ["search search wrong", "search right", "search search search right"]
    first, second, third = group.trajectories
    assert first.steps[0] is second.steps[0] is third.steps[0]
    assert first.steps[1] is third.steps[1]
    assert [t.total_reward for t in group.trajectories] == [0, 0, 0]  # scored later, from what the steps were paid
    assert [sum(s.reward for s in t.steps) for t in group.trajectories] == [0, 1, 1]
    assert [t.success for t in group.trajectories] == [False, True, True]
    assert [t.metrics["tool_calls"] for t in group.trajectories] == [2, 1, 3]
    assert {t.tree_id for t in group.trajectories} == {0}
    assert [node.depth for node in picks.offered[0]] == [0, 1, 2]  # the last step is a leaf: no candidate

    costs = [t.cost for t in group.trajectories]
    assert [c.generated_tokens for c in costs] == [7 + 7 + 6, 6, 7 + 6]
    if kind is SavedTrail:
        assert [(c.tool_calls, c.env_steps, c.replayed_steps) for c in costs] == [(2, 3, 0), (0, 1, 0), (1, 2, 0)]
    else:  # the actions before the branch are carried out again
        assert [(c.tool_calls, c.env_steps, c.replayed_steps) for c in costs] == [(2, 3, 0), (1, 2, 1), (3, 4, 2)]
    assert group.cost.generated_tokens == sum(c.generated_tokens for c in costs)


@KINDS
def test_the_contexts_of_a_branch_are_those_of_the_chain_it_left(kind):
    """What a branch sees is what the chain saw at that place: prompt, its actions, the answers to them."""
    engine = Script(["search", "search", "wrong", "right right"])
    (group,) = roll(TreeRollout(max_steps=4, trees=1, expansion=Picks([2, 1])), engine, kind=kind)
    chain, late, early = group.trajectories
    assert engine.contexts[3] == [list(chain.steps[2].context_ids), list(chain.steps[1].context_ids)]
    assert late.steps[2].context_ids == chain.steps[2].context_ids
    assert early.steps[1].context_ids == chain.steps[1].context_ids
    text = CHAT.tokenizer.decode(engine.contexts[3][0])
    assert text == (
        "<|im_start|>system\nSearch, then answer.<|im_end|>\n<|im_start|>user\nFind it.<|im_end|>\n"
        "<|im_start|>assistant\nsearch<|im_end|>\n<|im_start|>user\nclue 1<|im_end|>\n"
        "<|im_start|>assistant\nsearch<|im_end|>\n<|im_start|>user\nclue 2<|im_end|>\n<|im_start|>assistant\n"
    )


def test_direct_answers_leave_only_the_root_to_expand():
    """Three independent episodes of one step, that share nothing but the prompt."""
    picks = Picks([0, 0])
    engine = Script(["wrong", "right wrong"])
    (group,) = roll(TreeRollout(max_steps=4, trees=1, expansion=picks), engine)
    assert said(group) == ["wrong", "right", "wrong"]
    assert len({id(step) for t in group.trajectories for step in t.steps}) == 3
    assert len(picks.offered[0]) == 1
    assert len(set(engine.seeds)) == 3


def test_the_root_can_be_expanded_twice():
    """Each is a whole episode of its own, in an environment of its own."""
    engine = Script(["search", "wrong", "search right", "right"])
    (group,) = roll(TreeRollout(max_steps=4, trees=1, expansion=Picks([0, 0])), engine)
    assert said(group) == ["search wrong", "search right", "right"]
    assert len({id(t.steps[0]) for t in group.trajectories}) == 3
    assert [t.metrics["tool_calls"] for t in group.trajectories] == [1, 1, 0]
    assert [t.cost.tool_calls for t in group.trajectories] == [1, 1, 0]


def test_invalid_actions_are_nodes_like_others():
    """The correction is an observation, so it is masked, and the step before it can be expanded."""
    engine = Script(["hm", "right", "right wrong"])
    (group,) = roll(TreeRollout(max_steps=4, trees=1, expansion=Picks([1, 0])), engine)
    assert said(group) == ["hm right", "hm right", "wrong"]
    assert [s.valid for s in group.trajectories[1].steps] == [False, True]
    (row,) = trajectory_rows(group.trajectories[1], [1.0, 1.0])
    sampled = CHAT.tokenizer.decode([t for t, m in zip(row.token_ids, row.action_mask, strict=True) if m])
    assert sampled == "hm<|im_end|>right<|im_end|>"


def test_every_pick_at_the_last_depth_plays_one_more_step():
    """The reference crashes where all chosen nodes stand before the last action (its batch has nothing to search)."""
    engine = Script(["search search", "hm hm", "right wrong hm right"])
    groups = roll(TreeRollout(max_steps=2, trees=1, expansion=Picks([1, 1], [1, 1])), engine, ["a", "b"])
    assert [said(group) for group in groups] == [
        ["search hm", "search right", "search wrong"],
        ["search hm", "search hm", "search right"],
    ]
    limit, done = StopReason.MAX_STEPS, StopReason.DONE
    assert [[t.stop_reason for t in g.trajectories] for g in groups] == [[limit, done, done], [limit, limit, done]]


def test_a_limit_of_one_step_leaves_the_root_only():
    picks = Picks([0, 0])
    (group,) = roll(TreeRollout(max_steps=1, trees=1, expansion=picks), Script(["search", "search right"]))
    assert said(group) == ["search", "search", "right"]
    assert len(picks.offered[0]) == 1


def test_later_rounds_may_leave_from_earlier_branches():
    """Two rounds of one branch: the second begins inside the first's."""
    picks = Picks([1], [2])
    engine = Script(["search", "wrong", "search", "right", "wrong"])
    (group,) = roll(TreeRollout(max_steps=4, trees=1, expansions=1, rounds=2, expansion=picks), engine)
    assert said(group) == ["search wrong", "search search right", "search search wrong"]
    assert group.trajectories[1].steps[1] is group.trajectories[2].steps[1]
    assert [[n.depth for n in nodes] for nodes in picks.offered] == [[0, 1], [0, 1, 2]]


def test_trees_of_a_prompt_share_nothing_but_it():
    engine = Script(["search search", "right wrong", "right right"])
    (group,) = roll(TreeRollout(max_steps=3, trees=2, expansions=1, expansion=Picks([1], [1])), engine)
    assert [t.tree_id for t in group.trajectories] == [0, 0, 1, 1]
    assert group.trajectories[0].steps[0] is group.trajectories[1].steps[0]
    assert group.trajectories[0].steps[0] is not group.trajectories[2].steps[0]
    numbers = {rollout_seed(0, 0, 0, member, turn) for member, turn in [(0, 0), (2, 0), (0, 1), (2, 1), (1, 1), (3, 1)]}
    assert set(engine.seeds) == numbers


def test_rows_of_a_tree_begin_alike_and_differ_after_the_branch():
    """One row a leaf; packed as a prefix tree every shared token is there once."""
    engine = Script(["search", "search", "wrong", "right right"])
    (group,) = roll(TreeRollout(max_steps=4, trees=1, expansion=Picks([1, 2])), engine)
    (rows,) = to_rows([group], [[[float(i)] * len(t.steps) for i, t in enumerate(group.trajectories)]])
    assert len(rows) == 3
    batch = collate(rows, 1, 1)
    own = [len("right") + 1 + 1] * 2  # each branch adds its answer and its end; its first letter differs from `s`, `w`
    assert len(PackedTree.build(batch.token_ids, batch.lengths)) == len(rows[0].token_ids) + sum(own) - 2
    shared = len(group.trajectories[0].steps[1].context_ids)
    assert rows[0].token_ids[:shared] == rows[1].token_ids[:shared] == rows[2].token_ids[:shared]
    assert rows[1].advantages[shared - 1] == 0  # the observation before the branch carries no loss
    assert [r.num_action_tokens for r in rows] == [7 + 7 + 6, 7 + 6, 7 + 7 + 6]


# --- keeping leaves, failures ---


def test_keeping_fewer_leaves_drops_trajectories_and_keeps_their_cost():
    script = ["search search", "wrong wrong", "right wrong right right", "right"]
    every = TreeRollout(max_steps=3, trees=2, expansion=Picks([1, 0], [1, 1]))
    (whole,) = roll(every, Script(["search search", "wrong wrong", "right wrong right right"]))
    some = TreeRollout(max_steps=3, trees=2, keep_leaves=2, expansion=Picks([1, 0], [1, 1]))
    (kept,) = roll(some, Script(script))
    assert [t.tree_id for t in kept.trajectories] == [0, 0, 1, 1]
    assert set(said(kept)) <= set(said(whole))
    for name in ("generated_tokens", "tool_calls", "env_steps", "prefilled_tokens"):
        assert getattr(kept.cost, name) == getattr(whole.cost, name)
    assert kept.dropped_cost.generated_tokens > 0
    again = TreeRollout(max_steps=3, trees=2, keep_leaves=2, expansion=Picks([1, 0], [1, 1]))
    assert said(roll(again, Script(script))[0]) == said(kept)


def test_a_failed_start_still_gives_every_trajectory_its_place():
    """Nothing can be expanded but the root, which fails again: all are counted, none is trained, others play on."""
    engine = Script(["wrong", "right right"])
    tree = TreeRollout(max_steps=3, trees=1, expansion=Picks([0, 0], [0, 0]))
    broken, fine = roll(tree, engine, ["broken", "fine"])
    assert [t.stop_reason for t in broken.trajectories] == [StopReason.ENV_ERROR] * 3
    assert said(fine) == ["wrong", "right", "right"]


def test_failed_trajectories_are_kept_beside_the_chosen_leaves():
    tree = TreeRollout(max_steps=3, trees=1, keep_leaves=1, expansion=Picks([1, 1]))
    (group,) = roll(tree, Script(["search", "wrong"]), kind=Forgetful)
    assert [t.stop_reason.is_failure for t in group.trajectories] == [False, True, True]


@pytest.mark.parametrize("kind", [Forgetful, Fickle])
def test_a_place_that_is_not_reached_again_fails_the_branch(kind):
    """Neither a wrong restore nor another answer in the replay may train on a context that was never seen."""
    (group,) = roll(TreeRollout(max_steps=3, trees=1, expansion=Picks([1, 1])), Script(["search", "wrong"]), kind=kind)
    assert [t.stop_reason for t in group.trajectories][1:] == [StopReason.ENV_ERROR] * 2
    assert "going back to step 1" in group.trajectories[1].error


# --- laws, with a real model ---


@pytest.fixture(scope="module")
def lm(tiny_lm):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_lm, dtype=torch.float32).eval()


def play(lm, tiny_lm, strategy, tasks=("it", "that"), kind=SavedTrail, cached=65_536, chat="append", **more):
    engine = HFEngine(max_cached_tokens=cached)
    engine.sync(lm)
    tokenizer = load_tokenizer(tiny_lm)
    sampling = SamplingParams(max_new_tokens=5, stop_token_ids=(tokenizer.eos_token_id,))
    more = {"chat": Chat(tokenizer, chat), "sampling": sampling, **more}
    return roll(strategy, engine, tasks, kind, **more)


def tokens(groups):
    return [[[(list(s.context_ids), s.action_ids) for s in t.steps] for t in g.trajectories] for g in groups]


def test_trees_without_rounds_are_chains(lm, tiny_lm):
    tree = TreeRollout(max_steps=3, trees=4, rounds=0, cut_actions="continue")
    chain = ChainRollout(max_steps=3, cut_actions="continue")
    assert tokens(play(lm, tiny_lm, tree)) == tokens(play(lm, tiny_lm, chain, group_size=4))


@pytest.mark.parametrize("chat", ["append", "rebuild"])
def test_snapshots_and_replays_give_the_same_trees(lm, tiny_lm, chat):
    tree = TreeRollout(max_steps=4, trees=2, expansions=2, rounds=2, cut_actions="continue")
    saved, replayed = (play(lm, tiny_lm, tree, kind=kind, chat=chat) for kind in (SavedTrail, Trail))
    assert tokens(saved) == tokens(replayed)
    assert sum(g.cost.replayed_steps for g in saved) == 0 < sum(g.cost.replayed_steps for g in replayed)


def test_a_tree_is_the_same_whatever_is_collected_beside_it_and_with_or_without_cached_keys(lm, tiny_lm):
    tree = TreeRollout(max_steps=4, trees=2, expansions=2, rounds=2, cut_actions="continue")
    both = play(lm, tiny_lm, tree)
    assert tokens(play(lm, tiny_lm, tree, tasks=("it",))) == tokens(both)[:1]
    fresh = play(lm, tiny_lm, tree, cached=0)
    assert tokens(fresh) == tokens(both)
    spent, spent_fresh = (sum((g.cost for g in groups), Ledger()) for groups in (both, fresh))
    assert spent.prefilled_tokens < spent_fresh.prefilled_tokens
    total = spent.prefilled_tokens + spent.cached_tokens
    assert total == spent_fresh.prefilled_tokens + spent_fresh.cached_tokens == context_tokens(both)


def test_a_branch_prefills_only_what_its_tree_has_not_computed(lm, tiny_lm):
    """The fork of the keys and values: nothing of the shared prefix is computed anew, but its last token."""
    tree = TreeRollout(max_steps=4, trees=1, expansions=2, rounds=1, expansion=Picks([2, 3]), cut_actions="continue")
    (group,) = play(lm, tiny_lm, tree, tasks=("it",))
    chain, late, later = group.trajectories
    for branch, fork in ((late, 2), (later, 3)):
        prefix = len(branch.steps[fork].context_ids)
        assert list(branch.steps[fork].context_ids) == list(chain.steps[fork].context_ids)
        assert branch.cost.cached_tokens >= prefix - 1


def context_tokens(groups):
    """Context tokens of all actions that were sampled, each once."""
    steps = {id(s): s for g in groups for t in g.trajectories for s in t.steps}
    return sum(len(s.context_ids) for s in steps.values())


def test_steps_of_a_branch_are_views_of_one_list(lm, tiny_lm):
    """Memory grows with the length of a branch, not times its depth; groups travel between processes."""
    (group,) = play(lm, tiny_lm, TreeRollout(max_steps=4, trees=1, cut_actions="continue"), tasks=("it",))
    for trajectory in group.trajectories:
        contexts = [step.context_ids for step in trajectory.steps]
        assert all(isinstance(c, TokenView) for c in contexts)
        assert len({id(c._tokens) for c in contexts}) <= 2  # the shared part's, and its own
    again = pickle.loads(pickle.dumps(group))
    assert tokens([again]) == tokens([group])


# --- budgets ---


def test_no_prompt_goes_beyond_its_tokens(lm, tiny_lm):
    tree = TreeRollout(max_steps=4, trees=2, expansions=2, rounds=2, cut_actions="continue")
    free = play(lm, tiny_lm, tree)
    for cap in (5, 23, 60, 1000):
        groups = play(lm, tiny_lm, tree, budget=Budget(generated_tokens=cap))
        for group, unlimited in zip(groups, free, strict=True):
            assert group.cost.generated_tokens <= cap
            assert len(group.trajectories) + group.num_not_begun == 10
            if unlimited.cost.generated_tokens + 5 * 10 <= cap:
                assert tokens([group]) == tokens([unlimited])
    assert any(
        t.stop_reason is StopReason.BUDGET for g in play(lm, tiny_lm, tree, budget=Budget(60)) for t in g.trajectories
    )


def test_the_budget_ends_episodes_in_their_order_and_leaves_out_those_that_never_began():
    """26 tokens of at most 8 an action: three act, 7 each; 5 are left, so the second turn begins nothing."""
    engine = Script(["search search search"])
    (group,) = roll(ChainRollout(max_steps=4), engine, group_size=4, budget=Budget(generated_tokens=26))
    assert said(group) == ["search"] * 3
    assert {t.stop_reason for t in group.trajectories} == {StopReason.BUDGET}
    assert (group.num_not_begun, group.cost.generated_tokens) == (1, 21)


def test_tool_calls_are_capped_too():
    """Each action may be a call; the branches that no call is left for are not begun."""
    engine = Script(["search", "search", "right", "right"])
    tree = TreeRollout(max_steps=4, trees=1, expansion=Picks([1, 1]))
    (group,) = roll(tree, engine, budget=Budget(tool_calls=3))
    assert said(group) == ["search search right", "search right"]
    assert (group.num_not_begun, group.cost.tool_calls) == (1, 2)


def test_time_is_looked_at_between_actions():
    tree = TreeRollout(max_steps=4, trees=1)
    (group,) = roll(tree, Script([]), budget=Budget(seconds=1e-9))
    assert (group.trajectories, group.num_not_begun, group.cost.generated_tokens) == ([], 3, 0)


@pytest.mark.parametrize("options", [{"generated_tokens": 0}, {"tool_calls": -1}, {"seconds": 0.0}])
def test_budgets_that_allow_nothing_are_refused(options):
    with pytest.raises(UserError, match="above 0"):
        Budget(**options)


def test_a_budget_below_one_action_is_refused():
    with pytest.raises(UserError, match="not one action would fit"):
        Budget(generated_tokens=7).check_action(8)


# --- shapes ---


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"trees": 0}, "trees=0 must be at least 1"),
        ({"expansions": 0}, "expansions=0 must be at least 1"),
        ({"rounds": -1}, "rounds=-1 must be at least 0"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"keep_leaves": 0}, "Give 1 to 3"),
        ({"trees": 4, "expansions": 2, "rounds": 1, "keep_leaves": 4}, "has 3 leaves"),  # the reference's own default
        ({"cut_actions": "maybe"}, "cut_actions"),
    ],
)
def test_shapes_that_cannot_be_are_refused(options, text):
    with pytest.raises(UserError, match=text):
        TreeRollout(**options)


def test_the_group_is_what_the_trees_have():
    """M (N L + 1) of them, or M K; held-out tasks are played as chains of the same length."""
    assert TreeRollout(trees=2, expansions=6, rounds=1).group_size(None) == 14
    assert TreeRollout(trees=2, expansions=2, rounds=3, keep_leaves=4).group_size(8) == 8
    with pytest.raises(UserError, match="give 6 trajectories"):
        TreeRollout().group_size(8)
    held_out = TreeRollout(max_steps=7, cut_actions="continue").evaluation()
    assert isinstance(held_out, ChainRollout)
    assert (held_out.max_steps, held_out.cut_actions, held_out.group_size(1)) == (7, "continue", 1)


# --- expansions ---


def node(depth_parent=None, logprobs=(-1.0,), returns=()):
    """A node with one child step of these log-probabilities, and leaves with these returns."""
    made = Node(depth_parent, Step([0], [1], [-1.0]) if depth_parent else None)
    made.children = [Node(made, Step([0], [1] * len(logprobs), list(logprobs)))]
    made.trajectories = [Trajectory([Step([0], [1], [0.0], reward=r)]) for r in returns]
    if depth_parent:
        depth_parent.children.append(made)
    return made


def frequencies(policy, candidates, num=2, draws=4000):
    generator = np.random.default_rng(0)
    counts = np.zeros(len(candidates))
    for _ in range(draws):
        for chosen in policy.pick(candidates, num, generator):
            counts[next(i for i, c in enumerate(candidates) if c is chosen)] += 1
    return counts / counts.sum()


def test_uniform_draws_every_candidate_alike():
    root = node()
    candidates = [root, node(root), node(root)]
    assert frequencies(Uniform(), candidates) == pytest.approx([1 / 3] * 3, abs=0.02)


def test_per_depth_gives_every_depth_the_same_share():
    root = node()
    candidates = [root, node(root), node(root), node(root)]
    assert frequencies(PerDepth(), candidates) == pytest.approx([1 / 2, 1 / 6, 1 / 6, 1 / 6], abs=0.02)


def test_without_replacement_repeats_nothing_before_all_were_chosen():
    root = node()
    candidates = [root, node(root), node(root)]
    for seed in range(20):
        picked = WithoutReplacement().pick(candidates, 5, np.random.default_rng(seed))
        assert len({id(n) for n in picked[:3]}) == 3
        assert len({id(n) for n in picked[3:]}) == 2
    assert frequencies(WithoutReplacement(), candidates) == pytest.approx([1 / 3] * 3, abs=0.02)


def test_entropy_follows_the_surprise_of_the_next_step():
    root = node(logprobs=(-1.0, -3.0))  # 2 nats a token
    candidates = [root, node(root, logprobs=(-1.0, -1.0)), node(root, logprobs=(0.0,))]
    root.children = root.children[:1]
    assert [c.surprisal for c in candidates] == [2, 1, 0]
    assert frequencies(Entropy(), candidates) == pytest.approx([2 / 3, 1 / 3, 0], abs=0.02)
    assert frequencies(Entropy(power=2), candidates) == pytest.approx([4 / 5, 1 / 5, 0], abs=0.02)
    assert frequencies(Entropy(power=0), candidates) == pytest.approx([1 / 3] * 3, abs=0.02)


def test_value_variance_prefers_nodes_below_which_returns_differ():
    """Tree: returns 1, 1, 0, 0, variance 1/4. By hand: (1 + 1/4) / 5, (1/2 + 1/4) / 3 and (0 + 1/4) / 2."""
    root = node(returns=(1, 1, 0, 0))
    candidates = [root, node(root, returns=(1, 0)), node(root, returns=(1,))]
    weights = np.array([1.25 / 5, 0.75 / 3, 0.25 / 2])
    assert frequencies(ValueVariance(), candidates) == pytest.approx(weights / weights.sum(), abs=0.02)


def test_value_variance_is_uniform_while_nothing_differs(caplog):
    root = node(returns=(1, 1))
    assert frequencies(ValueVariance(), [root, node(root, returns=(1,))]) == pytest.approx([0.5, 0.5], abs=0.02)
    TreeRollout(expansion=ValueVariance(), rounds=1)
    assert "it is uniform" in caplog.text


def test_failed_episodes_have_no_return():
    root = node(returns=(1, 0))
    root.trajectories[0].stop_reason = StopReason.ENV_ERROR
    assert root.returns == [0]


def test_a_negative_power_is_refused():
    with pytest.raises(UserError, match="power"):
        Entropy(power=-1)


# --- views ---


def test_a_view_is_a_sequence_of_its_own_tokens():
    tokens_ = [1, 2, 3]
    view = TokenView(tokens_, 3)
    tokens_ += [4, 5]
    assert (len(view), list(view), view[-1], view[1:], view[:10]) == (3, [1, 2, 3], 3, [2, 3], [1, 2, 3])
    assert view == [1, 2, 3] == view
    assert view != [1, 2, 3, 4]
    assert view[::-1] == [3, 2, 1]
    assert [*view, 9] == [1, 2, 3, 9]
    assert copy.deepcopy(view) == view
    for index in (3, -4):
        with pytest.raises(IndexError):
            view[index]
