"""Tree attention: the masks against walking up the tree, and the merged flash calls against masked attention."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig

from lit_agentrl.models import PackedTree
from lit_agentrl.models.lm_parts import decoder_of
from lit_agentrl.models.tree_attention import (
    TREE_MERGE,
    attention_implementation,
    block_mask,
    dense_mask,
    padded_to,
    refusing_mask,
    visible,
)
from lit_agentrl.models.tree_merge import tree_merge
from prefix_cases import SHAPES, WINDOW, build_lm


def tree_of(shape: str) -> PackedTree:
    token_ids, lengths, _ = SHAPES[shape]()
    return PackedTree.build(token_ids, lengths)


def by_walking_up(tree: PackedTree, window: int | None) -> Tensor:
    """[T, T], set by following `parent` from every token, `window` tokens far."""
    mask = torch.zeros(len(tree), len(tree), dtype=torch.bool)
    for query in range(len(tree)):
        key, steps = query, 0
        while key >= 0 and (window is None or steps < window):
            mask[query, key] = True
            key, steps = int(tree.parent[key]), steps + 1
    return mask


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [None, WINDOW, 1])
def test_tokens_see_their_ancestors_within_the_window(shape: str, window: int | None) -> None:
    tree = tree_of(shape)
    expected = by_walking_up(tree, window)
    assert torch.equal(visible(tree, window), expected)
    assert torch.equal(dense_mask(tree, window)[0, 0], expected)
    added = dense_mask(tree, window, torch.float32)[0, 0]
    assert torch.equal(added == 0, expected)
    assert (added[~expected] == torch.finfo(torch.float32).min).all()


@pytest.mark.parametrize("window", [None, WINDOW])
def test_block_mask_holds_the_same_rule(window: int | None) -> None:
    tree = tree_of("tree")
    padded = padded_to(tree, 128)
    mask = block_mask(padded, window)
    assert mask.shape == (1, 1, 128, 128)
    place = torch.arange(128)
    rule = mask.mask_mod(torch.tensor(0), torch.tensor(0), place[:, None], place[None])
    assert torch.equal(rule[: len(tree), : len(tree)], visible(tree, window))
    unused = rule[len(tree) :]
    assert torch.equal(unused, torch.eye(128, dtype=torch.bool)[len(tree) :])


@pytest.mark.parametrize("window", [None, 1, 100, 300, 5000])
def test_blocks_are_those_that_looking_at_all_pairs_finds(window: int | None) -> None:
    """Without a window exactly; with one, no block that is seen is left out and none that hides is taken as full."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 90, (5, 700), generator=generator)
    rows[:, :300], rows[2:, :500], rows[4, :650] = rows[0, :300], rows[2, :500], rows[3, :650]
    tree = padded_to(PackedTree.build(rows, torch.tensor([700, 640, 700, 513, 699])), 128)
    mask, size = block_mask(tree, window), len(tree)
    seen = visible(tree, window).view(size // 128, 128, size // 128, 128).permute(0, 2, 1, 3).flatten(2)
    partial, full = (
        blocks_of(mask.kv_num_blocks, mask.kv_indices),
        blocks_of(mask.full_kv_num_blocks, mask.full_kv_indices),
    )
    assert not (partial & full).any()
    assert (partial | full)[seen.any(2)].all()
    assert seen.all(2)[full].all()
    if window is None:
        assert torch.equal(partial | full, seen.any(2))
        assert torch.equal(full, seen.all(2))
    else:
        assert 0 < int((partial | full).sum()) < (size // 128) ** 2 // 2 + size // 128
    by_key = blocks_of(mask.q_num_blocks, mask.q_indices) | blocks_of(mask.full_q_num_blocks, mask.full_q_indices)
    assert torch.equal(by_key, (partial | full).T)


def blocks_of(num_blocks: Tensor | None, indices: Tensor | None) -> Tensor:
    """[n, n] bool, from how many blocks each row has and which."""
    assert num_blocks is not None
    assert indices is not None
    found = torch.zeros(indices.shape[2:], dtype=torch.bool)
    for row, count in enumerate(num_blocks[0, 0].tolist()):
        found[row, indices[0, 0, row, :count].long()] = True
    return found


def test_a_block_mask_needs_a_padded_tree() -> None:
    with pytest.raises(ValueError, match="no multiple of 128"):
        block_mask(tree_of("tree"))


def test_padding_to_a_multiple_that_fits_changes_nothing() -> None:
    tree = tree_of("group")
    assert padded_to(tree, len(tree)) is tree


def inputs(tree: PackedTree, dtype: torch.dtype, query_heads: int = 6, key_heads: int = 2) -> list[Tensor]:
    """Query, key and value [1, heads, T, 8], laid out in memory as a transformers layer makes them."""
    generator = torch.Generator().manual_seed(0)
    made = [
        torch.randn(1, len(tree), h, 8, generator=generator, dtype=dtype) for h in (query_heads, key_heads, key_heads)
    ]
    return [tensor.transpose(1, 2).requires_grad_() for tensor in made]


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """The slow obvious twin, [1, T, H, D]."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (4, 1)])
def test_merged_flash_calls_equal_masked_attention(shape: str, heads: tuple[int, int]) -> None:
    tree = tree_of(shape)
    tensors = inputs(tree, torch.float64, *heads)
    out, _ = tree_merge(nn.Module(), *tensors, None, scaling=0.5, prefix_tree=tree)
    expected = masked_attention(*tensors, by_walking_up(tree, None), 0.5)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)
    upstream = torch.randn_like(out)
    gradients = torch.autograd.grad(out, tensors, upstream)
    expected_gradients = torch.autograd.grad(expected, tensors, upstream)
    torch.testing.assert_close(gradients, expected_gradients, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 4.0), (torch.bfloat16, 2.0)])
def test_merging_loses_no_more_than_masked_attention_does(dtype: torch.dtype, factor: float) -> None:
    """In low precision, both are equally far from the exact result."""
    tree = tree_of("multi_turn")
    tensors = inputs(tree, dtype)
    exact = masked_attention(*(x.double() for x in tensors), by_walking_up(tree, None), None)
    plain = masked_attention(*tensors, by_walking_up(tree, None), None)
    merged, _ = tree_merge(nn.Module(), *tensors, None, prefix_tree=tree)
    upstream = torch.randn(merged.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact_gradients = torch.autograd.grad(exact, tensors, upstream)

    def distances(out: Tensor) -> list[float]:
        gradients = torch.autograd.grad(out, tensors, upstream.to(dtype))
        pairs = [(out, exact), *zip(gradients, exact_gradients, strict=True)]
        return [(a.double() - b.double()).detach().norm().item() for a, b in pairs]

    assert all(a <= factor * b for a, b in zip(distances(merged), distances(plain), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(6)}, "s_aux"),
        ({"dropout": 0.1}, "dropout"),
        ({"sliding_window": WINDOW}, "sliding window of 9"),
        ({"prefix_tree": None}, "without its tree"),
    ],
)
def test_merging_refuses_what_it_cannot_do(options: dict[str, object], message: str) -> None:
    tree = tree_of("tree")
    with pytest.raises(NotImplementedError, match=message):
        tree_merge(nn.Module(), *inputs(tree, torch.float32), None, **({"prefix_tree": tree} | options))


def test_merging_refuses_value_heads_of_another_size() -> None:
    tree = tree_of("tree")
    query, key, value = inputs(tree, torch.float32)
    with pytest.raises(NotImplementedError, match="different sizes"):
        tree_merge(nn.Module(), query, key, value[..., :4], None, prefix_tree=tree)


def test_window_longer_than_the_rows_is_no_window() -> None:
    tree = tree_of("tree")
    tensors = inputs(tree, torch.float32)
    windowed, _ = tree_merge(nn.Module(), *tensors, None, sliding_window=tree.depth, prefix_tree=tree)
    plain, _ = tree_merge(nn.Module(), *tensors, None, prefix_tree=tree)
    assert torch.equal(windowed, plain)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_tree_in_another_attention_is_an_error_not_a_sequence(implementation: str) -> None:
    tree = tree_of("tree")
    lm = build_lm(LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    with attention_implementation(decoder_of(lm), implementation), pytest.raises(RuntimeError, match="size"):
        decoder_of(lm)(input_ids=tree.tokens[None], position_ids=tree.positions[None], attention_mask=refusing_mask())


def test_switching_attention_ends_with_the_context_even_after_an_error() -> None:
    lm = build_lm(LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    lm.gradient_checkpointing_enable()
    before = [vars(module).get("_gradient_checkpointing_func") for module in lm.modules()]

    def fail_inside() -> None:
        with attention_implementation(decoder_of(lm), TREE_MERGE):
            assert lm.config._attn_implementation == TREE_MERGE
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert lm.config._attn_implementation == "sdpa"
    assert [vars(module).get("_gradient_checkpointing_func") for module in lm.modules()] == before
    assert any(before)
