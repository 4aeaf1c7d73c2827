"""The packed prefix tree against a trie of dictionaries."""

import time

import pytest
import torch
from torch import Tensor

from lit_agentrl.models import PackedTree, plan_packs
from prefix_cases import SHAPES


def random_rows(seed: int) -> tuple[Tensor, Tensor]:
    """Rows over so small a vocabulary that they share prefixes by chance; some are empty."""
    generator = torch.Generator().manual_seed(seed)
    num_rows, longest = (int(torch.randint(1, high, (), generator=generator)) for high in (9, 13))
    token_ids = torch.randint(-2, 3, (num_rows, longest), generator=generator)
    lengths = torch.randint(0, longest + 1, (num_rows,), generator=generator)
    lengths[0] = longest
    return token_ids, lengths


def prefixes(token_ids: Tensor, lengths: Tensor) -> list[list[tuple[int, ...]]]:
    """For every row, all its non-empty prefixes."""
    rows = [row[:length].tolist() for row, length in zip(token_ids, lengths.tolist(), strict=True)]
    return [[tuple(row[: t + 1]) for t in range(len(row))] for row in rows]


@pytest.mark.parametrize("seed", range(40))
def test_tree_is_the_trie_of_the_rows(seed: int) -> None:
    token_ids, lengths = random_rows(seed)
    tree = PackedTree.build(token_ids, lengths)
    rows = prefixes(token_ids, lengths)
    prefix_at = {int(tree.index[b, t]): prefix for b, row in enumerate(rows) for t, prefix in enumerate(row)}

    assert len(tree) == len(prefix_at) == len({prefix for row in rows for prefix in row})
    assert sorted(prefix_at) == list(range(len(tree)))
    assert tree.num_row_tokens == int(lengths.sum())
    assert tree.depth == int(lengths.max())
    for k, prefix in prefix_at.items():
        assert tree.tokens[k] == prefix[-1]
        assert tree.positions[k] == len(prefix) - 1
        assert prefix_at.get(int(tree.parent[k]), ()) == prefix[:-1]
        below = {q for q, other in prefix_at.items() if other[: len(prefix)] == prefix}
        assert below == set(range(k, int(tree.end[k])))
    for b, length in enumerate(lengths.tolist()):
        assert (tree.index[b, length:] == 0).all()


@pytest.mark.parametrize("seed", range(40))
def test_nodes_are_the_maximal_unbranched_runs(seed: int) -> None:
    tree = PackedTree.build(*random_rows(seed))
    assert tree.nodes[:, 1].tolist() == [*tree.nodes[1:, 0].tolist(), len(tree)]
    children = torch.bincount(tree.parent[tree.parent >= 0], minlength=len(tree))
    for start, stop, end in tree.nodes.tolist():
        assert tree.parent[start + 1 : stop].tolist() == list(range(start, stop - 1))
        assert (tree.end[start:stop] == end).all()
        assert children[start : stop - 1].eq(1).all()
        assert children[stop - 1] != 1 or tree.parent[stop] != stop - 1


def test_prefix_of_another_row_adds_nothing() -> None:
    token_ids = torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0], [5, 6, 7, 8], [5, 6, 7, 9]])
    tree = PackedTree.build(token_ids, torch.tensor([4, 2, 4, 4]))
    assert tree.tokens.tolist() == [5, 6, 7, 8, 9]
    assert tree.end.tolist() == [5, 5, 5, 4, 5]
    assert tree.parent.tolist() == [-1, 0, 1, 2, 2]
    assert tree.index.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0], [0, 1, 2, 3], [0, 1, 2, 4]]
    assert tree.nodes.tolist() == [[0, 3, 5], [3, 4, 4], [4, 5, 5]]
    assert tree.reuse == 14 / 5


def test_keys_keep_equal_tokens_apart() -> None:
    """Two prompts with one placeholder each, for different images."""
    token_ids = torch.tensor([[1, 9, 2], [1, 9, 2], [1, 9, 3]])
    keys = torch.tensor([[1, -70, 2], [1, -71, 2], [1, -70, 3]])
    lengths = torch.tensor([3, 3, 3])
    assert len(PackedTree.build(token_ids, lengths)) == 4
    tree = PackedTree.build(token_ids, lengths, keys)
    assert len(tree) == 6
    assert torch.equal(tree.tokens[tree.index], token_ids)
    assert tree.index[0, 1] == tree.index[2, 1] != tree.index[1, 1]


def test_unique_targets_point_back_to_every_row() -> None:
    token_ids, lengths, targets = SHAPES["tree"]()
    targets[:, 0] = False
    tree = PackedTree.build(token_ids, lengths)
    edges, inverse = tree.unique_targets(targets)
    assert edges.tolist() == sorted(set(tree.index[targets].tolist()))
    assert torch.equal(edges[inverse], tree.index[targets])
    assert len(edges) == (2 + 4 + 8) * 4 < int(targets.sum())


def test_masks_of_the_paper_give_the_same_tree() -> None:
    prompts = torch.tensor([[0, 4, 5], [6, 7, 8]])
    prompt_mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    completions = torch.tensor([[1, 0], [2, 3], [1, 2]])
    completion_mask = torch.tensor([[1, 0], [1, 1], [1, 1]])
    tree = PackedTree.from_ungrouped_masks(prompts, prompt_mask, completions, completion_mask, [2, 1])
    rows = torch.tensor([[4, 5, 1, 0, 0], [4, 5, 2, 3, 0], [6, 7, 8, 1, 2]])
    assert tree.tokens.tolist() == PackedTree.build(rows, torch.tensor([3, 4, 5])).tokens.tolist()
    with pytest.raises(ValueError, match="group_sizes"):
        PackedTree.from_ungrouped_masks(prompts, prompt_mask, completions, completion_mask, [2, 2])


@pytest.mark.parametrize("seed", range(20))
def test_packs_hold_every_row_once_within_the_budget(seed: int) -> None:
    token_ids, lengths = random_rows(seed)
    for budget in (1, 7, 20, 10**6):
        packs = plan_packs(token_ids, lengths, budget)
        assert sorted(b for pack in packs for b in pack) == list(range(len(lengths)))
        for pack in packs:
            if lengths[pack].sum() > 0 and len(pack) > 1:
                assert len(PackedTree.build(token_ids[pack], lengths[pack])) <= budget
    assert len(packs) == 1


def test_packs_cut_between_families_first() -> None:
    token_ids = torch.tensor([[1, 2, 3, 4], [9, 9, 9, 9], [1, 2, 3, 5], [9, 9, 9, 8]])
    assert plan_packs(token_ids, torch.tensor([4, 4, 4, 4]), budget=5) == [[0, 2], [3, 1]]


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([0, 0], "not all be 0"), ([3, 1], "lie in"), ([-1, 2], "lie in"), ([2], "expected")],
)
def test_wrong_lengths_are_refused(lengths: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedTree.build(torch.zeros(2, 2, dtype=torch.long), torch.tensor(lengths))


def test_wrong_keys_and_budgets_are_refused() -> None:
    rows, lengths = torch.zeros(2, 2, dtype=torch.long), torch.tensor([2, 2])
    with pytest.raises(ValueError, match="keys"):
        PackedTree.build(rows, lengths, rows[:1])
    with pytest.raises(ValueError, match="budget"):
        plan_packs(rows, lengths, 0)


def test_packing_time_is_linear_in_the_row_tokens() -> None:
    """16 episodes of 12 turns: 1.1 million row tokens. On an idle core it takes 3 ms; the bound leaves room."""
    generator = torch.Generator().manual_seed(0)
    episodes = torch.randint(30000, (16, 9216), generator=generator)
    episodes[:, :2048] = episodes[0, :2048]
    token_ids = episodes.repeat_interleave(12, 0)
    lengths = (2048 + 128 + 640 * torch.arange(12)).clamp(max=9216).repeat(16)

    def seconds() -> float:
        start = time.process_time()
        tree = PackedTree.build(token_ids, lengths)
        assert tree.num_row_tokens > 1_090_000
        return time.process_time() - start

    assert min(seconds() for _ in range(5)) < 0.060
