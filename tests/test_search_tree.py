"""Search agents as trees, from the scripted word to the row: leaves, masks, turns, tool calls and rewards by hand."""

from collections.abc import Sequence

import pytest

from lit_agentrl.advantages import spread, total_rewards, tree_advantages, tree_ids
from lit_agentrl.envs import SearchSuite
from lit_agentrl.envs.pool import EnvironmentPool
from lit_agentrl.envs.search.prompts import correction
from lit_agentrl.rewards import Reward, score
from lit_agentrl.rollouts.base import Prompt, RolloutContext
from lit_agentrl.rollouts.chat import Chat
from lit_agentrl.rollouts.tree import TreeRollout
from lit_agentrl.rows import to_rows
from lit_agentrl.types import Completion, SamplingParams, StopReason
from search_parts import Library, think, write_questions
from tiny import byte_tokenizer
from trail_parts import Picks

CHAT = Chat(byte_tokenizer(), "inline")
ENGINE_QUERY = think("search", "Analytical Engine")
BABBAGE, FAIL = think("search", "Charles Babbage"), think("search", "fail")
RIGHT, WRONG, RAMBLE = think("answer", "London"), think("answer", "Paris"), "<think> hm </think> I wonder."


class Replies:
    """Says what is written, one list a call."""

    def __init__(self, *calls: Sequence[str]) -> None:
        self.calls, self.contexts = list(calls), []

    def generate(self, contexts, params, seeds=None):
        replies = self.calls[len(self.contexts)]
        self.contexts.append(contexts)
        assert len(replies) == len(contexts)
        ids = [CHAT.action_ids(reply) for reply in replies]
        return [Completion(i, [-0.5] * len(i), "stop", 0, len(c)) for i, c in zip(ids, contexts, strict=True)]


@pytest.fixture
def play(tmp_path):
    """The group of one question, scored."""
    suite = SearchSuite(
        write_questions(tmp_path), Library(), val_share=0.0, test_share=0.0, max_turns=2, top_k=1, prompt="{question}"
    )

    def run(strategy, *calls):
        engine = Replies(*calls)
        sampling = SamplingParams(max_new_tokens=200)
        context = RolloutContext(engine, CHAT, EnvironmentPool(4, 5.0), suite.make, sampling, 4000)
        (group,) = strategy.collect([Prompt("train-library/q0", 0)], strategy.group_size(None), context)
        score([group], [Reward()])
        return group, engine

    return run


def test_a_forest_of_a_question(play):
    """A wrong chain of two searches; a branch after the first that answers rightly, and one after the second."""
    strategy = TreeRollout(max_steps=3, trees=1, expansion=Picks([1, 2]))
    group, engine = play(strategy, [ENGINE_QUERY], [BABBAGE], [WRONG], [RIGHT, RIGHT])
    assert [len(t.steps) for t in group.trajectories] == [3, 2, 3]
    assert [t.total_reward for t in group.trajectories] == [0.0, 1.0, 1.0]
    assert [t.metrics["tool_calls"] for t in group.trajectories] == [2, 1, 2]
    assert [t.cost.tool_calls for t in group.trajectories] == [2, 0, 0]
    assert [t.metrics["gold_recall"] for t in group.trajectories] == [1.0, 0.5, 1.0]

    advantages = tree_advantages(total_rewards(group), tree_ids(group), tree_ids(group))
    (rows,) = to_rows([group], [spread(advantages, group)])
    assert len(rows) == 3  # inline: an episode is one answer, so one row
    texts = [CHAT.tokenizer.decode(row.token_ids) for row in rows]
    found = '\n\n<information>Doc 1(Title: "Analytical Engine") The Analytical Engine was designed by Charles Babbage.'
    opening = (
        "<|im_start|>user\nWhere was the designer of the Analytical Engine born?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert texts[1] == f"{opening}{ENGINE_QUERY}{found}</information>\n\n{RIGHT}"
    sampled = [[t for t, m in zip(row.token_ids, row.action_mask, strict=True) if m] for row in rows]
    assert [CHAT.tokenizer.decode(ids) for ids in sampled] == [
        ENGINE_QUERY + BABBAGE + WRONG,
        ENGINE_QUERY + RIGHT,
        ENGINE_QUERY + BABBAGE + RIGHT,
    ]
    assert engine.contexts[3] == [list(t.steps[-1].context_ids) for t in group.trajectories[1:]]
    # R = 0, 1, 1: deviations -2/3, 1/3, 1/3, unbiased std sqrt(1/3), and one tree counts twice
    assert advantages.tolist() == pytest.approx([-2.3094, 1.1547, 1.1547], abs=1e-4)


def test_invalid_actions_failures_and_the_last_turn(play):
    """The correction and the failure are observations; the answer turn that searches again ends without an answer."""
    strategy = TreeRollout(max_steps=3, trees=1, expansion=Picks([1, 2]))
    group, _ = play(strategy, [RAMBLE], [FAIL], [BABBAGE], [RIGHT, RIGHT])
    chain, early, late = group.trajectories
    assert [t.stop_reason for t in group.trajectories] == [StopReason.DONE] * 3
    assert [s.valid for s in chain.steps] == [False, True, False]
    assert chain.steps[1].observation == correction(("search",))
    assert "timed out" in chain.steps[2].observation
    assert chain.metrics["answered"] == 0
    assert [t.metrics["search_failures"] for t in group.trajectories] == [1, 0, 1]
    # Eq. 13: no answer in bad form; right answers in bad form, since the first turn had no action
    assert [t.total_reward for t in group.trajectories] == pytest.approx([-0.2, 0.8, 0.8])
    assert late.steps[1] is chain.steps[1]
    assert early.steps[0] is chain.steps[0]


def test_direct_answers_share_nothing(play):
    """T = 1: the root is all there is to expand, and every leaf is paid for whole."""
    group, _ = play(TreeRollout(max_steps=3, trees=2, expansions=1), [RIGHT, WRONG], [RIGHT, RIGHT])
    assert [t.tree_id for t in group.trajectories] == [0, 0, 1, 1]
    assert len({id(t.steps[0]) for t in group.trajectories}) == 4
    assert group.cost.generated_tokens == sum(len(s.action_ids) for t in group.trajectories for s in t.steps)
    assert group.cost.tool_calls == 0
