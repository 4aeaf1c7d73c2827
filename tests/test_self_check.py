"""The start-up check: it passes right models, leaves no trace, and finds what would be wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import transformers as tf
from torch import Tensor
from transformers.models.mistral import modeling_mistral

from lit_agentrl.errors import UserError
from lit_agentrl.models import (
    PackedTree,
    PaddedModel,
    PrefixGroupedModel,
    self_check,
    tree_attention,
    verify_prefix_sharing,
)
from prefix_cases import CONFIGS, SHAPES, build_lm


@pytest.mark.parametrize("name", CONFIGS)
def test_the_check_passes_right_models_and_leaves_no_trace(name: str) -> None:
    lm = build_lm(CONFIGS[name](), torch.float32)
    next(lm.children()).eval()
    modes = [module.training for module in lm.modules()]
    before, generator_state = lm.config.to_dict(), torch.get_rng_state()
    model = PrefixGroupedModel(lm, min_reuse=0)
    assert verify_prefix_sharing(model) < 1e-5
    token_ids, lengths, targets = SHAPES["tree"]()
    model(token_ids, lengths, targets=targets)
    assert model.refusal == ""
    assert [module.training for module in lm.modules()] == modes
    assert lm.config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), generator_state)


@pytest.mark.parametrize("seed", range(8))
def test_experts_chosen_by_rounding_are_no_mistake(seed: int) -> None:
    """In bfloat16 a token may go to another expert, a nat away; here that happens for about every second seed."""
    lm = build_lm(CONFIGS["qwen3_moe"](), torch.bfloat16)
    with torch.no_grad():
        embeddings = lm.get_input_embeddings().weight
        embeddings.copy_(embeddings[torch.randperm(len(embeddings), generator=torch.Generator().manual_seed(seed))])
    model = PrefixGroupedModel(lm, backend="tree_merge")
    model.run_check()
    assert model.refusal == ""


def test_unknown_scaling_of_logits_is_refused() -> None:
    """A model that does to its logits what no option of its configuration says."""

    class Louder(tf.LlamaForCausalLM):
        def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.5
            return output

    lm = Louder(CONFIGS["llama"]()).double()
    token_ids, lengths, _ = SHAPES["tree"]()
    with pytest.raises(UserError, match="Louder"):
        PaddedModel(lm)(token_ids, lengths)


# --- sliding windows ------------------------------------------------------------------------------------------------

WINDOWED = ("mistral", "gemma2", "gemma3", "gpt_oss")
WRONG_MASKS: dict[str, Callable[[PackedTree, int | None], Tensor]] = {
    "one token too many": lambda tree, window: right_mask(tree, None if window is None else window + 1),
    "one token too few": lambda tree, window: right_mask(tree, None if window is None else window - 1),
    "no window": lambda tree, window: right_mask(tree, None),
    "packed places for positions": lambda tree, window: right_mask(tree, None) & near_in_the_pack(len(tree), window),
}
right_mask = tree_attention.visible


def near_in_the_pack(size: int, window: int | None) -> Tensor:
    place = torch.arange(size)
    return place[:, None] - place[None] < (size if window is None else window)


def windowed(name: str, window: int, dtype: torch.dtype = torch.float32) -> tf.PreTrainedModel:
    config = CONFIGS[name]()
    config.sliding_window = window
    return build_lm(config, dtype)


@pytest.mark.parametrize("window", [9, 40, 4096, 131072])
@pytest.mark.parametrize("name", WINDOWED)
def test_windows_of_any_length_pass_and_stay_as_they_are(name: str, window: int) -> None:
    """One shorter than the check's rows, and those that only rows of thousands of tokens would reach past."""
    lm = windowed(name, window)
    model = PrefixGroupedModel(lm, min_reuse=0)
    before = lm.config.to_dict(), [vars(module).get("sliding_window") for module in lm.modules()]
    assert verify_prefix_sharing(model) < 1e-5
    model.run_check()
    assert model.refusal == ""
    assert (lm.config.to_dict(), [vars(module).get("sliding_window") for module in lm.modules()]) == before


@pytest.mark.parametrize("wrong", WRONG_MASKS)
@pytest.mark.parametrize(("window", "dtype"), [(9, torch.float32), (131072, torch.float32), (131072, torch.bfloat16)])
@pytest.mark.parametrize("name", WINDOWED)
def test_a_wrong_window_is_found(
    name: str, window: int, dtype: torch.dtype, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree_attention, "visible", lambda tree, window=None: WRONG_MASKS[wrong](tree, window))
    model = PrefixGroupedModel(windowed(name, window, dtype), min_reuse=0)
    model.run_check()
    assert "start-up check" in model.refusal


def stubborn(window: int, monkeypatch: pytest.MonkeyPatch) -> tf.PreTrainedModel:
    """A Mistral whose own masks keep their window, whatever its configuration says by then."""
    made = modeling_mistral.create_sliding_window_causal_mask

    def keep_window(config: tf.PreTrainedConfig, **inputs: object) -> Tensor | None:
        own = copy.deepcopy(config)
        own.sliding_window = window
        mask: Tensor | None = made(config=own, **inputs)
        return mask

    monkeypatch.setattr(modeling_mistral, "create_sliding_window_causal_mask", keep_window)
    return windowed("mistral", window)


def test_a_window_that_cannot_be_shortened_is_reached_by_long_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = PrefixGroupedModel(stubborn(300, monkeypatch), min_reuse=0)
    assert 0 < verify_prefix_sharing(model) < 1e-5
    monkeypatch.setattr(tree_attention, "visible", lambda tree, window=None: right_mask(tree, None))
    assert verify_prefix_sharing(model) > 1e-3


def test_a_window_out_of_reach_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model = PrefixGroupedModel(stubborn(100_000, monkeypatch), min_reuse=0)
    assert verify_prefix_sharing(model) < 1e-5
    assert "did not reach past its sliding window of 100000 tokens" in caplog.text


def test_a_merge_asked_for_by_name_is_not_refused_for_a_window_that_rows_never_reach() -> None:
    model = PrefixGroupedModel(windowed("mistral", 4096), backend="tree_merge")
    model.run_check()
    assert model.refusal == ""


def test_whatever_a_model_raises_at_a_tree_it_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    """GPT-2 asks a mask for its dimensions, which FlexAttention's has not."""
    token_ids, lengths, _ = SHAPES["tree"]()
    lm = build_lm(CONFIGS["gpt2"](), torch.float32)
    logprobs = PrefixGroupedModel(lm, backend="flex")(token_ids, lengths).logprobs
    assert "failed with AttributeError" in caplog.text
    assert torch.equal(logprobs, PaddedModel(lm)(token_ids, lengths).logprobs)


@pytest.mark.parametrize(
    ("dtype", "moved", "rounding", "refused"),
    [
        (torch.bfloat16, 0.30, 0.29, False),  # a real 135M model: no further than its own rounding
        (torch.bfloat16, 0.30, 0.01, True),
        (torch.bfloat16, 0.15, 0.00, False),
        (torch.float32, 0.01, 0.29, True),  # float32 has no such excuse
    ],
)
def test_sixteen_bit_models_are_measured_by_their_own_rounding(monkeypatch, dtype, moved, rounding, refused):
    model = PrefixGroupedModel(build_lm(CONFIGS["llama"](), dtype), check=False)
    monkeypatch.setattr(self_check, "verify_prefix_sharing", lambda model: moved)
    monkeypatch.setattr(self_check, "_rounding", lambda model: rounding)
    assert bool(self_check.why_sharing_is_wrong(model)) is refused


def test_rounding_is_what_is_left_between_two_right_attentions():
    """Nothing in float64 (but for what eager attention casts), something in bfloat16."""
    exact, coarse = (
        self_check._rounding(PrefixGroupedModel(build_lm(CONFIGS["llama"](), dtype), check=False))
        for dtype in (torch.float64, torch.bfloat16)
    )
    assert exact < 1e-5 < 1e-3 < coarse < 0.2
