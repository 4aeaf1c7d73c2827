"""Folders of tiny vision-language models as users have them: weights, tokenizer, chat template, image processor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import transformers as tf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers.processing_utils import ProcessorMixin

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ IMAGE }}"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN = CHATML.replace("IMAGE", "'<|vision_start|><|image_pad|><|vision_end|>'")
LLAVA = CHATML.replace("IMAGE", "'<image>\n'")
# SmolVLM's and Idefics3's own
IDEFICS = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# Gemma 3's own, without its way to put a system prompt into the first user turn
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}{{ '<start_of_image>' }}{% elif item['type'] == 'text' %}"
    "{{ item['text'] | trim }}{% endif %}{% endfor %}{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

_QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_TILES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4))
_IDEFICS_TOKENS = ("<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>", *_TILES)
_GEMMA_TOKENS = ("<start_of_image>", "<end_of_image>", "<image_soft_token>", "<start_of_turn>", "<end_of_turn>")

_TEXT = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1000.0}
_PATCHES = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 2}
_TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass(frozen=True)
class Family:
    """How a tiny model of one family is made."""

    tokens: tuple[str, ...]
    """Its special tokens beside those of every tokenizer here."""
    template: str
    config: Callable[[Callable[[str], int]], tf.PreTrainedConfig]
    """From what gives a token's id."""
    image_processor: Callable[[], Any]
    processor: Callable[[Any, Any], Any]
    """The family's own processor, from image processor and tokenizer."""
    named: dict[str, str] = field(default_factory=dict)
    """Special tokens that the tokenizer has as attributes."""
    end: str = "<|im_end|>"


def _qwen(config: type, text: dict[str, Any], vision: dict[str, Any]) -> Callable[[Callable[[str], int]], Any]:
    return lambda id_of: config(
        text_config=_TEXT | text,
        vision_config=_PATCHES | vision,
        image_token_id=id_of("<|image_pad|>"),
        video_token_id=id_of("<|video_pad|>"),
        vision_start_token_id=id_of("<|vision_start|>"),
        vision_end_token_id=id_of("<|vision_end|>"),
    )


def _idefics(config: type) -> Callable[[Callable[[str], int]], Any]:
    return lambda id_of: config(
        text_config=_TEXT | {"model_type": "llama"},
        vision_config=_TOWER | {"image_size": 16, "patch_size": 4},
        image_token_id=id_of("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
    )


def _llava(vision: dict[str, Any], strategy: str = "default") -> Callable[[Callable[[str], int]], Any]:
    return lambda id_of: tf.LlavaConfig(
        text_config=_TEXT | {"model_type": "llama"},
        vision_config=_TOWER | vision,
        image_token_index=id_of("<image>"),
        vision_feature_select_strategy=strategy,
        vision_feature_layer=-1,
    )


_QWEN_IMAGES: dict[str, Any] = {
    "patch_size": 4,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 64, "longest_edge": 1024},
}
_QWEN_VISION = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32}
_CLIP = {"model_type": "clip_vision_model", "projection_dim": 16, "image_size": 16, "patch_size": 4}
_DINO = {"model_type": "dinov2", "image_size": 70, "patch_size": 14, "mlp_ratio": 2}
_IDEFICS_IMAGES: dict[str, Any] = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}


def _qwen_images() -> Any:
    return tf.Qwen2VLImageProcessorPil(**_QWEN_IMAGES)


def _square(side: int) -> Callable[[], Any]:
    crop = {"height": side, "width": side}
    return lambda: tf.CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=crop)


def _llava_processor(patch: int, strategy: str = "default") -> Callable[[Any, Any], Any]:
    return lambda images, tokenizer: tf.LlavaProcessor(
        images, tokenizer, patch_size=patch, vision_feature_select_strategy=strategy, num_additional_image_tokens=1
    )


def _smolvlm_processor(images: Any, tokenizer: Any) -> Any:
    with mock.patch("transformers.models.smolvlm.processing_smolvlm.num2words", print):  # wanted for videos
        return tf.SmolVLMProcessor(images, tokenizer, SimpleNamespace(num_frames=1, fps=1), image_seq_len=4)


FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family(
        _QWEN_TOKENS,
        QWEN,
        _qwen(tf.Qwen2VLConfig, {"rope_parameters": _ROPE}, {"depth": 2, "embed_dim": 16, "hidden_size": 32}),
        _qwen_images,
        lambda images, tokenizer: tf.Qwen2VLProcessor(images, tokenizer, None),
    ),
    "qwen2_5_vl": Family(
        _QWEN_TOKENS,
        QWEN,
        _qwen(
            tf.Qwen2_5_VLConfig,
            {"rope_parameters": _ROPE},
            _QWEN_VISION | {"window_size": 16, "fullatt_block_indexes": [1]},
        ),
        _qwen_images,
        lambda images, tokenizer: tf.Qwen2_5_VLProcessor(images, tokenizer, None),
    ),
    "qwen3_vl": Family(
        _QWEN_TOKENS,
        QWEN,
        _qwen(
            tf.Qwen3VLConfig,
            {"head_dim": 8, "rope_parameters": _ROPE | {"mrope_interleaved": True}},
            _QWEN_VISION | {"num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1]},
        ),
        _qwen_images,
        lambda images, tokenizer: tf.Qwen3VLProcessor(images, tokenizer, None),
    ),
    "smolvlm": Family(
        _IDEFICS_TOKENS,
        IDEFICS,
        _idefics(tf.SmolVLMConfig),
        lambda: tf.SmolVLMImageProcessorPil(**_IDEFICS_IMAGES),
        _smolvlm_processor,
        end="<end_of_utterance>",
    ),
    "idefics3": Family(
        _IDEFICS_TOKENS,
        IDEFICS,
        _idefics(tf.Idefics3Config),
        lambda: tf.Idefics3ImageProcessorPil(**_IDEFICS_IMAGES),
        lambda images, tokenizer: tf.Idefics3Processor(images, tokenizer, image_seq_len=4),
        end="<end_of_utterance>",
    ),
    "llava": Family(("<image>",), LLAVA, _llava(_CLIP), _square(16), _llava_processor(4)),
    "llava_full": Family(("<image>",), LLAVA, _llava(_CLIP, "full"), _square(16), _llava_processor(4, "full")),
    # trained at 5 x 5 patches, shown 4 x 4: its position encodings are interpolated
    "llava_dino": Family(("<image>",), LLAVA, _llava(_DINO), _square(56), _llava_processor(14)),
    "gemma3": Family(
        _GEMMA_TOKENS,
        GEMMA,
        lambda id_of: tf.Gemma3Config(
            text_config=_TEXT | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 512},
            vision_config=_TOWER | {"image_size": 16, "patch_size": 4},
            image_token_id=id_of("<image_soft_token>"),
            boi_token_index=id_of("<start_of_image>"),
            eoi_token_index=id_of("<end_of_image>"),
            mm_tokens_per_image=4,
        ),
        lambda: tf.Gemma3ImageProcessorPil(size={"height": 16, "width": 16}, do_convert_rgb=True),
        lambda images, tokenizer: tf.Gemma3Processor(images, tokenizer, image_seq_length=4),
        named={"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        end="<end_of_turn>",
    ),
}
TRAINABLE = ("qwen2_5_vl", "qwen3_vl", "smolvlm", "idefics3", "llava", "llava_dino")


def vlm_tokenizer(name: str) -> tf.PreTrainedTokenizerFast:
    """One token a byte and one for two line breaks, as real ones have, with the family's special tokens."""
    family = FAMILIES[name]
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>", *family.tokens]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet, "ĊĊ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token=family.end,
        pad_token="<|im_end|>",
        unk_token="<unk>",
        chat_template=family.template,
        clean_up_tokenization_spaces=False,
        **({"extra_special_tokens": family.named} if family.named else {}),
    )


def vlm_config(name: str) -> tf.PreTrainedConfig:
    """The configuration of the family's tiny model."""
    return FAMILIES[name].config(vlm_tokenizer(name).convert_tokens_to_ids)


def own_processor(name: str) -> Any:
    """The family's own processor, with what it wants for videos left out."""
    tokenizer = vlm_tokenizer(name)
    with mock.patch.object(ProcessorMixin, "check_argument_for_proper_class"):
        processor = FAMILIES[name].processor(FAMILIES[name].image_processor(), tokenizer)
    processor.chat_template = tokenizer.chat_template
    return processor


def build_vlm_folder(folder: str | Path, name: str, seed: int = 0) -> str:
    """A Hugging Face folder with a random model of the family, its tokenizer and its image processor."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vlm = tf.AutoModelForImageTextToText.from_config(vlm_config(name), dtype=torch.float32)
        with torch.no_grad():
            for parameter in vlm.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)  # far from zero, so that mistakes show
    vlm.save_pretrained(folder)
    vlm_tokenizer(name).save_pretrained(folder)
    FAMILIES[name].image_processor().save_pretrained(folder)
    return str(folder)
