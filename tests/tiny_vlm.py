"""Tiny random vision-language models, pixels made by hand, and batches whose rows show images in every way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import transformers as tf
from torch import Tensor

from lit_agentrl.models import VisionInputs

VOCABULARY = 97
IMAGE, VIDEO, START, END = 90, 91, 92, 93  # special tokens
ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1000.0}
PATCH = 4

_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
_PATCHES = {"patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 2}
_SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": PATCH,
}

CONFIGS: dict[str, Callable[[], tf.PreTrainedConfig]] = {
    "qwen2_vl": lambda: tf.Qwen2VLConfig(
        text_config=_TEXT | {"rope_parameters": ROPE},
        vision_config=_PATCHES | {"depth": 2, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
        **_QWEN,
    ),
    "qwen2_5_vl": lambda: tf.Qwen2_5_VLConfig(
        text_config=_TEXT | {"rope_parameters": ROPE},
        vision_config=_PATCHES
        | {
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 32,
            "window_size": 16,  # pixels: two by two merged patches, so that windows are smaller than the images
            "fullatt_block_indexes": [1],
        },
        **_QWEN,
    ),
    "qwen3_vl": lambda: tf.Qwen3VLConfig(
        text_config=_TEXT | {"head_dim": 8, "rope_parameters": ROPE | {"mrope_interleaved": True}},
        vision_config=_PATCHES
        | {
            "depth": 3,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 32,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0, 1],
        },
        **_QWEN,
    ),
    "smolvlm": lambda: tf.SmolVLMConfig(
        text_config=_TEXT | {"model_type": "llama"}, vision_config=_SIGLIP, image_token_id=IMAGE, scale_factor=2
    ),
    "idefics3": lambda: tf.Idefics3Config(
        text_config=_TEXT | {"model_type": "llama"}, vision_config=_SIGLIP, image_token_id=IMAGE, scale_factor=2
    ),
    "llava": lambda: tf.LlavaConfig(
        text_config=_TEXT | {"model_type": "llama"},
        vision_config=_SIGLIP | {"model_type": "clip_vision_model", "projection_dim": 16, "image_size": 8},
        image_token_index=IMAGE,
    ),
    "llava_dinov2": lambda: tf.LlavaConfig(
        text_config=_TEXT | {"model_type": "llama"},
        vision_config={"model_type": "dinov2", "image_size": 8, "patch_size": PATCH, "mlp_ratio": 2}
        | {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        image_token_index=IMAGE,
    ),
}
BIDIRECTIONAL: dict[str, Callable[[], tf.PreTrainedConfig]] = {
    "gemma3": lambda: tf.Gemma3Config(
        text_config=_TEXT | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 200},
        vision_config=_SIGLIP,
        image_token_id=IMAGE,
        mm_tokens_per_image=4,
    ),
    "paligemma": lambda: tf.PaliGemmaConfig(
        text_config=_TEXT | {"model_type": "gemma", "head_dim": 8},
        vision_config=_SIGLIP | {"projection_dim": 32},
        image_token_id=IMAGE,
        projection_dim=32,
    ),
}


ONE_SIZE = ("llava", "llava_dinov2", "gemma3", "paligemma")
"""Families all of whose pictures fill equally many placeholders."""


def build_vlm(name: str, dtype: torch.dtype = torch.float64) -> tf.PreTrainedModel:
    """A model with weights far from zero, in the vision tower too, so that mistakes show."""
    torch.manual_seed(0)
    vlm = tf.AutoModelForImageTextToText.from_config((CONFIGS | BIDIRECTIONAL)[name](), dtype=dtype)
    with torch.no_grad():
        for parameter in vlm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return vlm.train()


def picture(name: str, seed: int, size: tuple[int, int] = (4, 4), tiles: int = 1) -> dict[str, Tensor]:
    """What the image processor of a family makes of one picture: `size` patches high and wide, or so many tiles."""
    generator = torch.Generator().manual_seed(100 + seed)
    if name.startswith("qwen"):
        height, width = size
        values = torch.randn(height * width, 3 * 2 * PATCH * PATCH, generator=generator, dtype=torch.float64)
        return {"pixel_values": values, "image_grid_thw": torch.tensor([[1, height, width]])}
    edge = 8 if name.startswith("llava") else 16
    values = torch.randn(tiles, 3, edge, edge, generator=generator, dtype=torch.float64)
    if name in ONE_SIZE:
        return {"pixel_values": values}
    mask = torch.ones(1, tiles, edge, edge, dtype=torch.long)
    mask[:, 0, :, edge - seed % 2 * PATCH :] = 0  # pictures with an odd seed are padded on the right
    return {"pixel_values": values[None], "pixel_attention_mask": mask}


@dataclass
class Rows:
    """Rows of text (token ids) and pictures, with what is trained on."""

    token_ids: Tensor
    lengths: Tensor
    targets: Tensor
    images: list[list[dict[str, Tensor]]]

    def vision(self, config: tf.PreTrainedConfig) -> VisionInputs:
        """The images as a forward takes them."""
        return VisionInputs.from_rows(config, self.images, self.token_ids, self.lengths)

    @property
    def num_shown(self) -> int:
        """Images over all rows, repeated ones included."""
        return sum(map(len, self.images))


Piece = list[int] | dict[str, Tensor]


def rows_of(name: str, rows: Sequence[Sequence[Piece]], prompts: Sequence[int]) -> Rows:
    """Rows of pieces, text or pictures; the first `prompts[b]` pieces of a row are not trained on."""
    config = (CONFIGS | BIDIRECTIONAL)[name]()
    flat, wanted, images = [], [], []
    for row, num_prompt in zip(rows, prompts, strict=True):
        tokens: list[int] = []
        trained: list[bool] = []
        for k, piece in enumerate(row):
            ids = piece if isinstance(piece, list) else placeholders(config, piece)
            tokens += ids
            trained += [k >= num_prompt and isinstance(piece, list)] * len(ids)
        flat.append(torch.tensor(tokens))
        wanted.append(torch.tensor(trained))
        images.append([piece for piece in row if isinstance(piece, dict)])
    pad = torch.nn.utils.rnn.pad_sequence
    lengths = torch.tensor([len(row) for row in flat])
    return Rows(pad(flat, batch_first=True), lengths, pad(wanted, batch_first=True), images)


def placeholders(config: tf.PreTrainedConfig, image: dict[str, Tensor]) -> list[int]:
    """The tokens around and in place of one picture; every tile between tokens of its own."""
    if "image_grid_thw" in image:
        return [START, *[IMAGE] * (len(image["pixel_values"]) // 4), END]
    tiles = image["pixel_values"].flatten(0, -4)
    return [START, *[token for tile in range(len(tiles)) for token in (*[IMAGE] * 4, 80 + tile)], END]


def text(seed: int, count: int) -> list[int]:
    """Random words."""
    return torch.randint(3, 80, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def group(name: str) -> Rows:
    """One prompt with one image, four completions of different lengths."""
    prompt = [text(1, 4), picture(name, 0), text(2, 3)]
    return rows_of(name, [[*prompt, text(10 + k, 2 + 2 * k)] for k in range(4)], [3] * 4)


def two_pictures(name: str) -> Rows:
    """Two groups whose prompts read alike and differ in the picture alone."""
    prompts = [[text(1, 4), picture(name, seed), text(2, 3)] for seed in (0, 2)]
    return rows_of(name, [[*prompt, text(10 + k, 4)] for prompt in prompts for k in range(2)], [3] * 4)


def two_questions(name: str) -> Rows:
    """Two groups that ask different questions about the same picture, and a row of text beside them."""
    prompts = [[text(seed, 3), picture(name, 1), text(5, 2)] for seed in (1, 2)]
    rows = [[*prompt, text(10 + k, 4)] for prompt in prompts for k in range(2)]
    return rows_of(name, [*rows, [text(3, 5), text(4, 6)]], [3] * 4 + [1])


def several(name: str) -> Rows:
    """Several pictures a row, of different sizes (tiles) where the family has them, one of them twice."""
    large = {} if name in ONE_SIZE else {"size": (6, 4), "tiles": 2}
    one, two = picture(name, 0), picture(name, 3, **large)
    prompt = [text(1, 2), one, text(2, 1), two, text(3, 2)]
    swapped = [text(1, 2), two, text(2, 1), one]
    rows = [[*prompt, text(10, 5)], [*prompt, text(11, 3), one, text(12, 4)], [*swapped, text(9, 4)]]
    return rows_of(name, rows, [5, 5, 4])


def multi_turn(name: str) -> Rows:
    """Two episodes from one prompt; each turn is a row, and the environment answers with a picture."""
    rows: list[list[Piece]] = []
    prompts = []
    for episode in range(2):
        history: list[Piece] = [text(1, 4), picture(name, 0)]
        for turn in range(3):
            action = text(20 + 10 * episode + turn, 3)
            rows.append([*history, action])
            prompts.append(len(history))
            history = [*history, action, picture(name, 1 + turn), text(50 + turn, 2)]
    return rows_of(name, rows, prompts)


def duplicates(name: str) -> Rows:
    """The same row twice, trained on different parts, and a branch of it."""
    row = [text(1, 4), picture(name, 0), text(2, 3), text(10, 4), text(11, 4)]
    return rows_of(name, [row, row, [*row[:4], text(12, 5)]], [3, 4, 3])


SHAPES: dict[str, Callable[[str], Rows]] = {
    "group": group,
    "two_pictures": two_pictures,
    "two_questions": two_questions,
    "several": several,
    "multi_turn": multi_turn,
    "duplicates": duplicates,
}
UNIQUE = {"group": 1, "two_pictures": 2, "two_questions": 1, "several": 2, "multi_turn": 3, "duplicates": 1}
"""The pictures that a forward has to encode."""
