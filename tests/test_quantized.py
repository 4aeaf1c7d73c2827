"""QLoRA by the real bitsandbytes, where it is installed: what is in 4 bits, and gradients as of the values held."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vlm_folders
from lit_agentrl.models.export import export
from lit_agentrl.models.policy import Lora, Vision, load_policy, load_tokenizer
from lit_agentrl.models.scoring import PaddedModel
from test_vlm_policy import disturb, logprobs, part, shown, trained

bnb = pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny LLaVA whose layers are as wide as a block of 64 weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vlm_folders._TEXT, "hidden_size", 64)
        patch.setitem(vlm_folders._TEXT, "intermediate_size", 128)
        return vlm_folders.build_vlm_folder(tmp_path_factory.mktemp("vlm"), "llava_dino")


def test_the_language_model_s_layers_alone_have_4_bits(folder: str) -> None:
    lm = load_policy(folder, lora=Lora(r=2), quantize="nf4")
    parts = {part("llava_dino", name) for name, module in lm.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert parts == {"language"}
    assert type(lm.get_base_model().lm_head) is torch.nn.Linear
    assert trained("llava_dino", lm) == {"language": {"lora"}, "connector": set(), "tower": set()}


def test_gradients_are_those_of_the_values_that_the_bits_stand_for(folder: str) -> None:
    """The slow twin holds them in full. In `eval()`, where bitsandbytes may pack them without a backward pass."""
    options = {"lora": Lora(r=2), "vision": Vision(connector="trained")}
    lm, twin = load_policy(folder, quantize="nf4", **options), load_policy(folder, **options)
    disturb(lm)
    own = dict(twin.named_parameters())
    with torch.no_grad():
        for name, module in lm.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                weight = module.weight
                own[f"{name}.weight"].copy_(bnb.functional.dequantize_4bit(weight.data, weight.quant_state))
        for name, parameter in lm.named_parameters():
            if parameter.requires_grad:
                own[name].copy_(parameter)
    token_ids, lengths, vision = shown(folder, lm)
    for policy in (lm, twin):
        with torch.no_grad():
            PaddedModel(policy)(token_ids, lengths, vision=vision)  # a rollout comes first
        PaddedModel(policy)(token_ids, lengths, vision=vision).logprobs.sum().backward()
    gradients = {name: p.grad for name, p in lm.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * 14 + 4
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, own[name].grad, rtol=1e-4, atol=1e-4)


def test_an_export_is_its_adapter_and_loads_on_the_same_bits(folder: str, tmp_path: Path) -> None:
    lm = load_policy(folder, lora=Lora(r=2), quantize="nf4")
    disturb(lm)
    expected = logprobs(folder, lm)
    export(lm, load_tokenizer(folder), tmp_path / "out", merge=True)
    again = load_policy(str(tmp_path / "out"), quantize="nf4")
    torch.testing.assert_close(logprobs(folder, again), expected, rtol=0, atol=1e-5)
