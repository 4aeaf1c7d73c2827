"""What stands for an image in a prompt, family by family, as the family's own processor in transformers writes it.

The chat template writes one placeholder an image. The processor puts the image's text in its place: the feature token
once per feature, and whatever the model was trained to see around it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from lit_agentrl.errors import UserError
from lit_agentrl.models.vision_families import family_of

TextOf = Callable[["Markup", int, Mapping[str, Any]], str]


@dataclass(frozen=True)
class Markup:
    """The tokens that one model's prompts write for images."""

    placeholder: str
    """What the chat template writes for an image."""
    feature: str
    """The token whose embeddings the features replace."""
    end: str = ""
    """What closes the features of an image, where that is the processor's to write."""


def markup_of(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Markup:
    """The tokens that stand for images in the prompts of a model with this configuration.

    Raises:
        UserError: The family is not known, or the tokenizer lacks one of its tokens.
    """
    family_of(config)
    options: Any = config  # its attributes are the family's own
    feature = _token(tokenizer, options.image_token_id)
    if config.model_type == "gemma3":
        return Markup(_token(tokenizer, options.boi_token_index), feature, _token(tokenizer, options.eoi_token_index))
    return Markup(feature, feature)


def image_text(config: PreTrainedConfig, markup: Markup, count: int, processed: Mapping[str, Any]) -> str:
    """What stands for one image of `count` features.

    Args:
        config: The model's configuration.
        markup: Its tokens for images.
        count: The features of the image.
        processed: What the image processor gave for the image, with what it says of its tiles.
    """
    return _TEXTS.get(config.model_type, _plain)(markup, count, processed)


def _plain(markup: Markup, count: int, processed: Mapping[str, Any]) -> str:
    """Qwen-VL and LLaVA: nothing but features; what goes around is the template's."""
    return markup.feature * count


def _tiled(markup: Markup, count: int, processed: Mapping[str, Any]) -> str:
    """Idefics3 and SmolVLM: rows of tiles, each with its place, then the whole image in the size of a tile."""
    rows, columns = int(processed["rows"][0][0]), int(processed["cols"][0][0])
    features = markup.feature * (count // (rows * columns + 1))
    edge = "<fake_token_around_image>"
    tiles = "".join(
        "".join(f"{edge}<row_{row + 1}_col_{column + 1}>{features}" for column in range(columns)) + "\n"
        for row in range(rows)
    )
    return f"{tiles}{chr(10) if tiles else ''}{edge}<global-img>{features}{edge}"


def _cropped(markup: Markup, count: int, processed: Mapping[str, Any]) -> str:
    """Gemma 3: the image between its begin and end, and where pan-and-scan is on, crops of it."""
    crops = int(processed["num_crops"][0])
    one = f"\n\n{markup.placeholder}{markup.feature * (count // (crops + 1))}{markup.end}\n\n"
    if not crops:
        return one
    return f"Here is the original image {one} and here are some crops to help you see better " + " ".join([one] * crops)


_TEXTS: dict[str, TextOf] = {"idefics3": _tiled, "smolvlm": _tiled, "gemma3": _cropped}


def _token(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """The text of a special token, which has to read back as that token."""
    text = tokenizer.convert_ids_to_tokens(int(token_id)) if 0 <= int(token_id) < len(tokenizer) else None
    if not isinstance(text, str) or tokenizer.encode(text, add_special_tokens=False) != [token_id]:
        raise UserError(
            f"The tokenizer {tokenizer.name_or_path} has no special token {token_id}, which the model's configuration "
            f"names for images{f' (it reads {text!r})' if text else ''}. Use the tokenizer that the model was saved "
            "with."
        )
    return text
