"""Rows with images: every unique picture encoded once, and the numbers those of each row alone."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex
from transformers.integrations import flex_attention as hf_flex

from lit_agentrl.errors import UserError
from lit_agentrl.models import (
    PackedTree,
    PaddedModel,
    TokenScores,
    VisionInputs,
    plan_packs,
    verify_prefix_sharing,
)
from lit_agentrl.models.lm_parts import base_lm, decoder_of
from lit_agentrl.models.vision_forward import VisionForward
from scoring_twins import Scored, assert_same, grouped, loss_of, padded
from tiny_vlm import CONFIGS, IMAGE, SHAPES, UNIQUE, Rows, build_vlm, picture, rows_of, text

TILED = ("smolvlm", "idefics3")  # a large picture becomes several tiles
GRIDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
flex_for_training = flex.flex_attention


@cache
def model_of(name: str, dtype: torch.dtype = torch.float64) -> tf.PreTrainedModel:
    """Made once for the whole file: no test changes it."""
    return build_vlm(name, dtype)


def gradients_of(lm: nn.Module) -> dict[str, Tensor]:
    """None where all is 0: of what sees nothing, rows of text give no gradient or one of zeros."""
    return {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None and p.grad.any()}


def scored(model: PaddedModel, rows: Rows, temperature: float = 0.8) -> Scored:
    model.zero_grad(set_to_none=True)
    vision = rows.vision(base_lm(model.lm).config)
    scores = model(
        rows.token_ids, rows.lengths, targets=rows.targets, temperature=temperature, entropy=True, vision=vision
    )
    loss_of(scores, rows.targets, int(rows.targets.sum())).backward()
    return scores, gradients_of(model.lm)


def own_logits(vlm: tf.PreTrainedModel, rows: Rows, b: int) -> Tensor:
    """[n, V]: the logits of row b alone by the model's own forward, from pixels to head."""
    row = rows.token_ids[b : b + 1, : int(rows.lengths[b])]
    inputs: dict[str, Tensor] = {}
    for name in rows.images[b][0] if rows.images[b] else ():
        along = 1 if vlm.config.model_type in TILED else 0
        inputs[name] = torch.cat([image[name] for image in rows.images[b]], along)
    if vlm.config.model_type in GRIDS:
        inputs["mm_token_type_ids"] = (row == IMAGE).int()
    if vlm.config.model_type == "gemma3":
        inputs["token_type_ids"] = (row == IMAGE).long()
    logits: Tensor = vlm(input_ids=row, **inputs, use_cache=False).logits[0]
    return logits


def own_scores(vlm: tf.PreTrainedModel, rows: Rows, temperature: float = 0.8) -> Scored:
    """The slow obvious twin of `scored`: every row alone, full logits, log-softmax."""
    vlm.zero_grad(set_to_none=True)
    logp, entropy = (torch.zeros(rows.token_ids.shape, dtype=vlm.dtype) for _ in range(2))
    for b in range(len(rows.token_ids)):
        log_p = (own_logits(vlm, rows, b) / temperature).log_softmax(-1)[:-1]
        length = len(log_p) + 1
        logp[b, 1:length] = log_p.gather(1, rows.token_ids[b, 1:length, None])[:, 0]
        entropy[b, 1:length] = -(log_p.exp() * log_p).sum(-1)
    scores = TokenScores(logp * rows.targets, entropy * rows.targets)
    loss_of(scores, rows.targets, int(rows.targets.sum())).backward()
    return scores, gradients_of(vlm)


@contextmanager
def encoded_by(vlm: nn.Module) -> Iterator[list[int]]:
    """How many pictures (tiles) the vision tower is given, call by call."""
    counts: list[int] = []
    (tower,) = {
        module
        for name, module in vlm.named_modules()
        if name.split(".")[-1] in ("visual", "vision_model", "vision_tower")
    }

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pixels = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
        counts.append(len(kwargs["grid_thw"]) if "grid_thw" in kwargs else len(pixels))

    handle = tower.register_forward_pre_hook(count, with_kwargs=True)
    yield counts
    handle.remove()


def num_encoded(name: str, shape: str) -> int:
    """The unique pictures of a shape; one of them is cut into two tiles where the family does that."""
    return UNIQUE[shape] + (shape == "several" and name in TILED)


# --- the same numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_grouped_equals_padded_equals_each_row_alone(name: str, shape: str) -> None:
    """In float64, gradients of vision tower and connector included; both forwards encode every unique picture once."""
    vlm, rows = model_of(name), SHAPES[shape](name)
    expected = own_scores(vlm, rows)
    tower = {n for n, _ in vlm.named_parameters() if "visual" in n or "vision" in n}
    assert tower & expected[1].keys()
    for model in (padded(vlm), grouped(vlm, "dense"), grouped(vlm, "tree_merge")):
        with encoded_by(vlm) as counts:
            found = scored(model, rows)
        assert_same(found, expected, values=1e-12, gradients=1e-6)
        assert max(float(expected[1][n].abs().max()) for n in tower & expected[1].keys()) > 0.01
        assert counts == [num_encoded(name, shape)]


@pytest.mark.parametrize("name", CONFIGS)
def test_float32(name: str) -> None:
    vlm, rows = model_of(name, torch.float32), SHAPES["multi_turn"](name)
    expected = own_scores(vlm, rows)
    for model in (padded(vlm), grouped(vlm)):
        assert_same(scored(model, rows), expected, values=1e-5, gradients=1e-5)


def test_flex_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose packs end in unused tokens. Its arithmetic has a backward on CPU; only a guard forbids it."""

    def uncompiled(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **options: object) -> Tensor:
        return flex_for_training(query, key, value, **options)  # type: ignore[arg-type,return-value]

    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(hf_flex, "compile_friendly_flex_attention", uncompiled)
    vlm, rows = model_of("qwen3_vl"), SHAPES["several"]("qwen3_vl")
    assert_same(scored(grouped(vlm, "flex"), rows), scored(padded(vlm), rows), values=1e-12, gradients=1e-6)


PROCESSORS = {
    "qwen2_vl": (tf.Qwen2VLImageProcessorPil, {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 2048}}),
    "smolvlm": (tf.SmolVLMImageProcessorPil, {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}),
    "llava": (tf.CLIPImageProcessorPil, {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_images_come_as_image_processors_return_them(name: str) -> None:
    """A real picture through a real processor, handed over as it is."""
    pil = pytest.importorskip("PIL.Image")
    process, options = PROCESSORS[name]
    noise = torch.randint(256, (40, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = process(**options)(pil.fromarray(noise.numpy()), return_tensors="pt")
    rows = rows_of(name, [[text(1, 3), dict(image), text(2 + k, 5)] for k in range(3)], [2] * 3)
    rows.images = [[image]] * 3
    vlm = model_of(name)
    assert_same(scored(grouped(vlm), rows), own_scores(vlm, rows), values=1e-12, gradients=1e-6)


@pytest.mark.parametrize("name", GRIDS)
def test_positions_of_the_pack_would_be_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison has teeth: with the place in the row as position, as for text, the numbers move."""
    vlm, rows = model_of(name), SHAPES["several"](name)
    right = scored(grouped(vlm), rows)[0].logprobs
    count = torch.arange(rows.token_ids.shape[1]).expand(3, *rows.token_ids.shape)
    monkeypatch.setattr(VisionForward, "_grid_positions", lambda *args: count)
    assert (scored(grouped(vlm), rows)[0].logprobs - right).abs().max() > 0.01


def test_placeholders_must_not_be_told_apart_by_token_id(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, rows = model_of("qwen2_vl"), SHAPES["two_pictures"]("qwen2_vl")
    right = scored(grouped(vlm), rows)[0].logprobs
    monkeypatch.setattr(VisionInputs, "keys", lambda self, token_ids, lengths: token_ids)
    assert (scored(grouped(vlm), rows)[0].logprobs - right).abs().max() > 0.01


@pytest.mark.parametrize("name", CONFIGS)
def test_what_stands_in_the_padding_does_not_matter(name: str) -> None:
    """Placeholders neither, which the model would want features for."""
    vlm, rows = model_of(name), SHAPES["group"](name)
    vision = rows.vision(vlm.config)
    place = torch.arange(rows.token_ids.shape[1])
    garbage = torch.where(place < rows.lengths[:, None], rows.token_ids, IMAGE)
    wider = nn.functional.pad(garbage, (0, 3), value=IMAGE)
    for model in (padded(vlm), grouped(vlm)):
        expected = model(rows.token_ids, rows.lengths, vision=vision).logprobs
        found = model(wider, rows.lengths, vision=vision).logprobs
        torch.testing.assert_close(found, nn.functional.pad(expected, (0, 3)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["qwen3_vl", "smolvlm"])
def test_a_row_without_tokens_changes_nothing(name: str) -> None:
    vlm, rows = model_of(name), SHAPES["group"](name)
    expected = scored(grouped(vlm), rows)[0].logprobs
    rows.token_ids = torch.cat([rows.token_ids, torch.full_like(rows.token_ids[:1], IMAGE)])
    rows.lengths, rows.images = torch.cat([rows.lengths, torch.tensor([0])]), [*rows.images, []]
    rows.targets = torch.cat([rows.targets, torch.zeros_like(rows.targets[:1])])
    for model in (padded(vlm), grouped(vlm)):
        found = scored(model, rows)[0].logprobs
        torch.testing.assert_close(found[:-1], expected, rtol=0, atol=1e-12)
        assert not found[-1].any()


@pytest.mark.parametrize("name", ["qwen3_vl", "smolvlm"])
def test_rows_of_text_are_scored_without_a_vision_tower(name: str) -> None:
    """Vision inputs that show nothing are none at all."""
    vlm = model_of(name)
    rows = rows_of(name, [[text(1, 6), text(k, 5)] for k in range(2, 5)], [1] * 3)
    with encoded_by(vlm) as counts:
        assert_same(scored(grouped(vlm), rows), own_scores(vlm, rows), values=1e-12, gradients=1e-6)
    assert counts == []


# --- what surrounds a training step ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("backend", ["tree_merge", "dense"])
def test_gradient_checkpointing_replays_images_and_tree(backend: str, use_reentrant: bool) -> None:
    vlm, rows = copy.deepcopy(model_of("qwen3_vl")), SHAPES["several"]("qwen3_vl")
    expected = own_scores(vlm, rows)
    vlm.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert vlm.model.visual.gradient_checkpointing
    for model in (padded(vlm), grouped(vlm, backend)):
        with encoded_by(vlm) as counts:
            assert_same(scored(model, rows), expected, values=1e-12, gradients=1e-6)
        assert counts == [2]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_lora_on_decoder_and_vision_tower() -> None:
    vlm = copy.deepcopy(model_of("qwen3_vl"))
    lm = get_peft_model(vlm, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "qkv", "linear_fc1"]))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    rows = SHAPES["multi_turn"]("qwen3_vl")
    lm = lm.double()
    expected = scored(padded(lm), rows)
    assert any("visual" in name for name in expected[1])
    assert all("lora_" in name for name in expected[1])
    assert_same(scored(grouped(lm), rows), expected, values=1e-12, gradients=1e-6)
    assert (expected[0].logprobs - scored(padded(model_of("qwen3_vl")), rows)[0].logprobs).abs().max() > 0.01


@pytest.mark.parametrize("name", CONFIGS)
def test_only_the_text_decoder_attends_as_a_tree(name: str) -> None:
    vlm = model_of(name)
    vision = vlm.config.vision_config
    seen: list[tuple[str, str]] = []
    handle = decoder_of(vlm).register_forward_pre_hook(
        lambda *args: seen.append((decoder_of(vlm).config._attn_implementation, vision._attn_implementation))
    )
    scored(grouped(vlm, "tree_merge"), SHAPES["group"](name))
    handle.remove()
    assert seen == [("prefix_tree_merge", "sdpa")]
    assert decoder_of(vlm).config._attn_implementation == vision._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", CONFIGS)
def test_start_up_checks_pass(name: str) -> None:
    model = grouped(model_of(name))
    model.run_check()
    assert model.refusal == ""
    assert verify_prefix_sharing(model) < 1e-6


def test_too_little_to_share_is_told_by_unique_tokens(caplog: pytest.LogCaptureFixture) -> None:
    """Two prompts that differ in the picture alone: told apart by token ids, half of them would be shared."""
    vlm = model_of("qwen2_vl")
    rows = rows_of("qwen2_vl", [[picture("qwen2_vl", k), text(1, 12), text(k, 2)] for k in range(2)], [2, 2])
    model = grouped(vlm)
    model.min_reuse = 1.2
    with caplog.at_level(logging.INFO):
        found = scored(model, rows)
    assert "Too little to share for tree_merge: 1.03 row tokens per unique token" in caplog.text  # 40 of 39
    assert_same(found, own_scores(vlm, rows), values=1e-12, gradients=1e-6)


def test_packs_add_up_to_the_whole_batch() -> None:
    vlm, rows = model_of("qwen2_5_vl"), SHAPES["multi_turn"]("qwen2_5_vl")
    vision = rows.vision(vlm.config)
    model = grouped(vlm)
    whole = model(rows.token_ids, rows.lengths, targets=rows.targets, vision=vision).logprobs
    weights = torch.randn(whole.shape, generator=torch.Generator().manual_seed(0), dtype=whole.dtype) / 18  # targets
    vlm.zero_grad()
    (whole * weights).sum().backward()
    expected = gradients_of(vlm)
    vlm.zero_grad()
    packs = plan_packs(rows.token_ids, rows.lengths, budget=45, keys=vision.keys(rows.token_ids, rows.lengths))
    assert len(packs) > 1
    for pack in packs:
        part = vision.rows(pack)
        logprobs = model(rows.token_ids[pack], rows.lengths[pack], targets=rows.targets[pack], vision=part).logprobs
        torch.testing.assert_close(logprobs, whole[pack], rtol=0, atol=1e-12)
        (logprobs * weights[pack]).sum().backward()
    torch.testing.assert_close(gradients_of(vlm), expected, rtol=0, atol=1e-6)


# --- models that are refused ----------------------------------------------------------------------------------------


def test_images_that_attend_in_both_directions_take_the_padded_path(caplog: pytest.LogCaptureFixture) -> None:
    """Gemma 3: the tokens of one image see one another. Its rows of text are shared."""
    vlm, rows = model_of("gemma3"), SHAPES["several"]("gemma3")
    model = grouped(vlm)
    trees: list[PackedTree] = []
    model.hidden_states, shared = lambda *args: trees.append(args[0]) or shared(*args), model.hidden_states
    for _ in range(2):
        assert_same(scored(model, rows), own_scores(vlm, rows), values=1e-12, gradients=1e-6)
    assert not trees
    assert caplog.text.count("off for Gemma3ForConditionalGeneration on rows with images") == 1
    words = rows_of("gemma3", [[text(1, 6), text(k, 5)] for k in range(2, 5)], [1] * 3)
    assert_same(scored(model, words), own_scores(vlm, words), values=1e-12, gradients=1e-6)
    assert [len(tree) for tree in trees] == [6 + 3 * 5]


def test_a_model_whose_text_attends_in_both_directions_is_refused() -> None:
    """PaliGemma's prompts do; its log-probabilities would know the tokens they are of."""
    vlm = model_of("paligemma")
    for make in (padded, grouped):
        with pytest.raises(UserError, match="attends in both directions"):
            make(vlm)


def test_unknown_families_are_refused() -> None:
    rows = SHAPES["group"]("paligemma")
    with pytest.raises(UserError, match=r"'paligemma': supported are qwen2_vl, .*llava"):
        rows.vision(model_of("paligemma").config)
    with pytest.raises(UserError, match="'llama'"):
        rows.vision(tf.LlamaConfig())


def test_a_transformers_that_takes_no_encoded_images_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, rows = model_of("qwen2_vl"), SHAPES["group"]("qwen2_vl")
    monkeypatch.setattr(type(vlm.model), "forward", lambda self, input_ids, pixel_values: None)
    with pytest.raises(UserError, match="does not take encoded images"):
        scored(grouped(vlm), rows)
