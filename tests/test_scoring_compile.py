"""Compiled layers give the numbers of uncompiled ones, and are compiled for once, whatever the trees look like."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo import config as dynamo
from torch._dynamo.utils import counters
from torch.library import opcheck
from transformers import AutoModelForCausalLM

from lit_agentrl.errors import UserError
from lit_agentrl.methods import SFTModule
from lit_agentrl.models import PackedTree, PaddedModel
from lit_agentrl.models.activations import recompute_activations
from lit_agentrl.models.compiled import MAX_GRAPHS, compile_layers
from lit_agentrl.models.export import export
from lit_agentrl.models.lm_parts import decoder_of
from lit_agentrl.models.policy import load_tokenizer
from prefix_cases import CONFIGS, SHAPES, build_lm
from scoring_twins import assert_same, grouped, lora, padded, scores_and_gradients


@pytest.fixture(autouse=True)
def nothing_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with dynamo.patch(recompile_limit=dynamo.recompile_limit):
        yield
    torch._dynamo.reset()


def num_graphs() -> int:
    assert not counters["graph_break"]
    return int(counters["stats"]["unique_graphs"])


def forwards(lm: nn.Module, backend: str) -> list[PaddedModel]:
    return [padded(lm), grouped(lm, backend)]


@pytest.mark.parametrize(
    ("name", "backend", "layer_kinds"), [("llama", "tree_merge", 1), ("llama", "dense", 1), ("gemma3", "dense", 2)]
)
def test_sharing_on_and_off_equal_uncompiled_layers_and_every_tree_takes_the_same_graphs(
    name: str, backend: str, layer_kinds: int
) -> None:
    """One graph for every kind of layer, padded and packed: none for another length, number of rows, or depth."""
    plain = build_lm(CONFIGS[name]())
    lm = copy.deepcopy(plain)
    compile_layers(lm, backend="eager")  # all of torch.compile but the code it ends with
    for shape in SHAPES:
        expected = scores_and_gradients(padded(plain), shape)
        for model in forwards(lm, backend):
            assert_same(scores_and_gradients(model, shape), expected, values=1e-12, gradients=1e-6)
    assert 2 <= num_graphs() <= 2 * layer_kinds


@pytest.mark.slow
def test_a_training_step_with_everything_stays_below_the_limit_of_graphs() -> None:
    """Old and reference log-probabilities, adapters, replayed layers: beyond the limit a layer runs uncompiled."""
    plain = lora(build_lm(CONFIGS["qwen3"]()), target_modules="all-linear").eval()
    lm = copy.deepcopy(plain)
    recompute_activations(lm.get_base_model())
    compile_layers(lm, backend="eager")
    seen = []
    for shape in ("tree", "multi_turn", "ragged"):
        token_ids, lengths, targets = SHAPES[shape]()
        expected = scores_and_gradients(padded(plain), shape)
        for model in forwards(lm, "tree_merge"):
            with torch.no_grad(), lm.disable_adapter():
                reference = model(token_ids, lengths, targets=targets).logprobs
                with plain.disable_adapter():
                    of_plain = padded(plain)(token_ids, lengths, targets=targets).logprobs
            torch.testing.assert_close(reference, of_plain, rtol=0, atol=1e-12)
            assert_same(scores_and_gradients(model, shape), expected, values=1e-12, gradients=1e-6)
        seen.append(num_graphs())
    assert seen[1] == seen[-1]  # in the first batch sizes are equal by chance, and PyTorch takes them for the same one
    assert seen[-1] <= 12 < MAX_GRAPHS == dynamo.recompile_limit


def test_generation_from_a_cache_is_not_compiled() -> None:
    lm = build_lm(CONFIGS["llama"]()).eval()
    token_ids = SHAPES["group"]()[0]
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": 96}
    expected = lm.generate(token_ids[:2], **options)
    compile_layers(lm, backend="eager")
    assert torch.equal(lm.generate(token_ids[:2], **options), expected)
    assert num_graphs() == 0


def test_names_of_weights_stay_and_copies_are_their_own() -> None:
    lm = build_lm(CONFIGS["llama"]())
    names = list(lm.state_dict())
    compile_layers(lm, backend="eager")
    assert list(lm.state_dict()) == names == [name for name, _ in lm.named_parameters()]
    scores_and_gradients(grouped(lm), "tree")
    assert list(lm.state_dict()) == names
    other = copy.deepcopy(lm)
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(2)
        other.model.layers[0].mlp.down_proj.weight.zero_()
    one, two = (padded(model)(*SHAPES["tree"]()[:2]).logprobs for model in (lm, other))
    assert (one - two).abs().max() > 0.01


def test_a_model_without_known_layers_is_refused() -> None:
    lm = build_lm(CONFIGS["llama"]())
    decoder_of(lm).layers = nn.ModuleList()
    with pytest.raises(UserError, match="set compile to false"):
        compile_layers(lm)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_merge_keeps_the_rules_of_operators(dtype: torch.dtype) -> None:
    """Shapes and strides as announced, nothing aliased or changed, and gradients under tracing."""
    tree = PackedTree.build(*SHAPES["tree"]()[:2])
    query, key, value = (
        torch.randn(1, len(tree), h, 8, dtype=dtype).transpose(1, 2).requires_grad_() for h in (6, 2, 2)
    )
    opcheck(torch.ops.lit_agentrl.tree_merge, (query, key, value, tree.nodes, 0.3, None, None))


@pytest.mark.slow
def test_the_option_of_a_module_trains_and_exports_as_ever(tiny_lm: str, tmp_path: Path) -> None:
    """Compiled to machine code: gradients, checkpoints and exports are those of the uncompiled module."""
    token_ids, lengths, targets = SHAPES["multi_turn"]()
    gradients, states = [], []
    for compiled in (False, True):
        module = SFTModule(tiny_lm, share_prefix=True, compile=compiled)
        module.configure_model()
        assert isinstance(module.policy, PaddedModel)
        scores = module.policy(token_ids, lengths, targets=targets)
        scores.logprobs.sum().backward()
        gradients.append({name: p.grad for name, p in module.named_parameters()})
        states.append(module.state_dict())
    assert num_graphs() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)  # names too
    export(module.policy.lm, load_tokenizer(tiny_lm), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found = padded(loaded)(token_ids, lengths, targets=targets).logprobs
    torch.testing.assert_close(found, scores.logprobs, rtol=0, atol=1e-5)
