"""An image encoder and a language model joined into one `LlavaForConditionalGeneration`, with its processor."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from lit_agentrl.vlm.dinov2 import PATCH
from lit_agentrl.vlm.template import IMAGE, with_images

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, with which DINOv2 was trained."""
UNSAID = -30.0
"""The logit of the placeholder: the most likely words have 10 to 25."""


def join(
    encoder: PreTrainedModel,
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    image_size: int,
    layers: list[int],
    generator: torch.Generator,
) -> LlavaForConditionalGeneration:
    """The joined model in `eval()` mode, its projector drawn from `generator`; the tokenizer gets what images need.

    Args:
        encoder: gives the patches, and one class token in front of them, which is dropped.
        lm: the language model; it gets one embedding more.
        tokenizer: its tokenizer. Changed in place: the placeholder and a chat template that writes it.
        image_size: pixels of an image's side.
        layers: the hidden states of the encoder that a patch's features are made of, side by side.
        generator: for the projector.
    """
    tokenizer.chat_template = with_images(str(tokenizer.chat_template))
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    silent = _unsaid_row(lm, tokenizer)
    lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    placeholder = cast(int, tokenizer.convert_tokens_to_ids(IMAGE))
    config = LlavaConfig(
        vision_config=encoder.config,
        text_config=lm.config,
        image_token_index=placeholder,
        image_seq_length=(image_size // PATCH) ** 2,
        vision_feature_layer=layers,
        vision_feature_select_strategy="default",
        tie_word_embeddings=lm.config.tie_word_embeddings,
    )
    with torch.random.fork_rng(devices=[]):  # its own draws are overwritten below, and must not move the caller's
        vlm = LlavaForConditionalGeneration(config)
    vlm.model.vision_tower.load_state_dict(encoder.state_dict())
    vlm.model.language_model.load_state_dict(lm.model.state_dict())
    vlm.lm_head.load_state_dict(lm.lm_head.state_dict())
    vlm.tie_weights()
    with torch.no_grad():
        vlm.lm_head.weight[placeholder] = silent
        _draw(vlm.model.multi_modal_projector, generator)
    vlm.generation_config = lm.generation_config
    vlm.eval()  # type: ignore[no-untyped-call]  # upstream's
    return vlm


def processor(tokenizer: PreTrainedTokenizerBase, image_size: int) -> LlavaProcessor:
    """What turns images and text into the joined model's inputs: any image is squashed to a square.

    It works without torchvision.
    """
    square = {"height": image_size, "width": image_size}
    images = CLIPImageProcessorPil(  # saved as `CLIPImageProcessor`, the class of either backend
        size=square,
        crop_size=square,  # nothing is cropped; LlavaProcessor counts an image's tokens by it
        do_center_crop=False,
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
    )
    return LlavaProcessor(  # type: ignore[no-untyped-call]  # upstream's
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which the strategy drops again
        chat_template=tokenizer.chat_template,
        image_token=IMAGE,
    )


@torch.no_grad()
def _unsaid_row(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """[D], an output embedding that points away from all hidden states: a policy may read the placeholder, not say it.

    As an input it is never looked up, since image features take its place.
    """
    ids = tokenizer("The picture shows a brown and a black spot.\nWhat do you see?", return_tensors="pt").input_ids
    hidden: Tensor = lm.base_model(input_ids=ids).last_hidden_state[0].mean(0)
    return hidden * (UNSAID / hidden.square().sum())


def _draw(projector: nn.Module, generator: torch.Generator) -> None:
    """Draw the projector's weights: variance 1 / inputs, biases zero."""
    for layer in projector.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.normal_(0.0, layer.in_features**-0.5, generator=generator)
            layer.bias.zero_()
