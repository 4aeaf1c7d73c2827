"""Scaling on paper: the page says what the script prints, the script what the measurements say."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen2Config, Qwen3Config

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import scaling_model
from prefix_batches import Work, group, tree_work
from prefix_gpu import qwen3
from scaling_fit import fit
from scaling_model import Iteration, Task
from scaling_points import (
    CONTINUOUS_BATCHING,
    ENGINE,
    MEMORIES,
    PREFIX,
    PREPARE,
    RECIPES,
    ROLLOUTS,
    UPDATES,
)
from scaling_shapes import MEASURED, SHAPES, Shape

ROOT = Path(__file__).parent.parent
PARAMETERS = fit()
SMALL, LARGE = SHAPES[0], SHAPES[2]


def test_the_page_is_what_the_script_prints() -> None:
    page = scaling_model.PAGE.read_text()
    assert scaling_model.filled(page) == page
    assert {name for _, name, _ in scaling_model.MARK.findall(page)} == set(scaling_model.tables())
    broken = page.replace("| Qwen2.5-7B | 8 |", "| Qwen2.5-7B | 9 |", 1)
    assert scaling_model.filled(broken) == page != broken


def test_measurements_stand_in_the_files_they_are_said_to_be_from() -> None:
    """A benchmark that is run anew changes its file: then the points have to change, and the fit with them."""
    quotes = [(each.source, quote) for each in [*UPDATES, *ROLLOUTS] for quote in each.quotes]
    quotes += [(PREFIX, quote) for each in MEMORIES for quote in each.quotes]
    quotes += [(RECIPES, quote) for quote in PREPARE[2]] + [(ENGINE, quote) for quote in CONTINUOUS_BATCHING[1]]
    missing = [(source, quote) for source, quote in quotes if quote not in (ROOT / source).read_text()]
    assert not missing


def test_recomputed_operations_are_those_that_the_recipes_reported() -> None:
    """155.5 TFLOP/s of the padded sides: rows, pairs and head counted again from the table's tokens."""
    for point in UPDATES:
        if point.source == RECIPES and point.attention == "flash":
            assert sum(point.flops) / point.seconds / 1e12 == pytest.approx(155.5, rel=2e-3)


def test_updates_and_memory_are_fitted_within_ten_percent() -> None:
    """What docs/scaling.md claims, both ways: rollouts are not."""
    for update in UPDATES:
        assert PARAMETERS.update(update) == pytest.approx(update.seconds, rel=0.10), update.name
    for memory in MEMORIES:
        assert PARAMETERS.memory(memory) == pytest.approx(memory.gib, rel=0.05), memory.name
    worst = max(abs(PARAMETERS.rollout(each) / each.seconds - 1) for each in ROLLOUTS)
    assert 0.10 < worst < 0.30


def config_of(shape: Shape) -> PreTrainedConfig:
    kind = Qwen2Config if shape.has_bias else Qwen3Config
    return kind(
        hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size, vocab_size=shape.vocab_size,
        num_hidden_layers=shape.num_hidden_layers, num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads, head_dim=shape.head_dim, tie_word_embeddings=shape.is_tied,
    )  # fmt: skip


@pytest.mark.parametrize("shape", [MEASURED, *SHAPES], ids=lambda shape: shape.name)
def test_weights_are_as_many_as_transformers_builds(shape: Shape) -> None:
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config_of(shape))
    assert sum(parameter.numel() for parameter in lm.parameters()) == shape.num_weights


def test_published_sizes() -> None:
    """Model cards: 7.61, 8.2, 32.5 and 32.8 billion; Qwen2.5-7B keeps 57 kB a token, as `HFEngine` says."""
    assert [shape.num_weights / 1e9 for shape in SHAPES] == pytest.approx([7.61, 8.19, 32.76, 32.76], abs=0.01)
    assert SMALL.kv_bytes == 57_344


def test_operations_are_those_of_the_gpu_benchmarks() -> None:
    work = Work(1000, 400_000, 300)
    assert sum(MEASURED.forward_flops(work)) == work.flops(qwen3("0.6b"))


@pytest.mark.parametrize("is_shared", [True, False])
def test_tokens_and_pairs_of_a_group_are_those_of_its_tree(is_shared: bool) -> None:
    """3 rows of 5 + 2 x (2 + 1) tokens, counted by the prefix tree, or one row at a time."""
    task = Task(group=3, prompt=5, turns=2, new=2, observation=1)
    found = task.work(2, is_shared)
    one = tree_work(group(3, 5, 6, 50)) if is_shared else tree_work(group(1, 5, 6, 50))
    times = 2 if is_shared else 6
    assert (found.tokens, found.pairs) == (times * one.tokens, times * one.pairs)
    assert found.targets == 2 * 3 * 4


def test_hand_computed_numbers_of_7b_on_8_gpus() -> None:
    """8 bytes of each of 7.6156e9 weights, 7/8 of them at 360 GB/s; 16 bytes of states, an eighth on each GPU."""
    each = Iteration(SMALL, 8, PARAMETERS)
    assert each.communicating_once == pytest.approx(8 * 7.6156e9 * 7 / 8 / 360e9, rel=1e-4)
    assert each.states == pytest.approx(2 * 7.6156e9, rel=1e-4)
    assert each.groups == 8
    assert Iteration(SMALL, 64, PARAMETERS, Task(prompts=48)).groups == 1
    assert each.checkpoint == pytest.approx(91.4e9, rel=1e-3)
    host, gpu = each.decode_step()
    assert host == pytest.approx(28 * PARAMETERS.decode)
    assert gpu == pytest.approx((2 * 7.6156e9 + 57_344 * 64 * (1024 + 2560) / 2) / (0.8 * 3.35e12), rel=1e-4)


def test_more_gpus_shrink_the_update_and_not_the_rollout() -> None:
    """The claim of the page's first point: of eight times the GPUs the update takes all, the rollout little."""
    eight, many = Iteration(SMALL, 8, PARAMETERS), Iteration(SMALL, 64, PARAMETERS)
    assert 7 < eight.update() / many.update() <= 8
    assert 1 < eight.rollout() / many.rollout() < 1.25
    whole = [each.rollout() + each.update() + each.syncing + each.preparing for each in (eight, many)]
    assert whole[0] / whole[1] == pytest.approx(1.7, abs=0.05)
    sizes = [Iteration(SMALL, num, PARAMETERS) for num in (1, 2, 4, 8, 16, 32, 64)]
    assert all(few.states > more.states for few, more in pairwise(sizes))
    assert sizes[0].communicating_once == 0


def test_32b_does_not_fit_beside_its_copy() -> None:
    limit = 0.9 * scaling_model.Assumed.memory
    assert all(Iteration(LARGE, num, PARAMETERS).memory > limit for num in scaling_model.GPUS)
    assert Iteration(LARGE, 8, PARAMETERS).memory_apart > limit > Iteration(LARGE, 64, PARAMETERS).memory_apart
    assert Iteration(SMALL, 8, PARAMETERS).memory < limit


def test_counted_collectives_are_the_models_but_for_the_root() -> None:
    """On two CPU ranks: 13 gathers a micro-batch where the model says 14, and 4 MiB of the embedding less."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in scaling_model.cpu_table()[2:]]
    assert [int(row[0]) for row in rows] == [1, 4]
    for micro, gathered, said, scattered, said_scattered in rows:
        counts = [[int(part) for part in cell.replace("(", "").split()[:2]] for cell in (gathered, said)]
        assert counts[0] == [13 * int(micro), 112 * int(micro)]
        assert counts[1] == [14 * int(micro), 116 * int(micro)]
        assert scattered == said_scattered
