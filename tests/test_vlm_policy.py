"""Vision-language policies: which parts are trained, adapters on chosen parts, export and everything that reloads."""

from __future__ import annotations

import json
import logging
import shutil
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from lit_agentrl.errors import UserError
from lit_agentrl.methods.sft import SFTModule
from lit_agentrl.models import export as export_module
from lit_agentrl.models.export import export
from lit_agentrl.models.image_reader import load_image_reader
from lit_agentrl.models.lm_parts import base_lm
from lit_agentrl.models.policy import Lora, Vision, load_policy, load_tokenizer, max_context
from lit_agentrl.models.quantized import quantization_options
from lit_agentrl.models.reference import Reference
from lit_agentrl.models.scoring import PaddedModel, PrefixGroupedModel
from lit_agentrl.rollouts.chat import Chat
from lit_agentrl.types import Observation, TrainBatch
from vlm_folders import FAMILIES, build_vlm_folder, own_processor

SOME = ("qwen3_vl", "idefics3", "llava_dino")
LOGGER = "lit_agentrl.models.export"
CONNECTORS = {
    "qwen2_5_vl": ("model.visual.merger.",),
    "qwen3_vl": ("model.visual.merger.", "model.visual.deepstack_merger_list."),
    "smolvlm": ("model.connector.",),
    "idefics3": ("model.connector.",),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders by family, each built when it is first asked for."""
    root = tmp_path_factory.mktemp("vlms")
    return cache(lambda name: build_vlm_folder(root / name, name))


def part(name: str, weight: str) -> str:
    """The part of a weight, by the names that transformers gives modules."""
    weight = weight.removeprefix("base_model.model.")
    if weight.startswith(CONNECTORS.get(name, ("model.multi_modal_projector.",))):
        return "connector"
    return "language" if weight.startswith(("model.language_model.", "model.text_model.", "lm_head.")) else "tower"


def trained(name: str, lm: torch.nn.Module) -> dict[str, set[str]]:
    """Of every part, what is trained: "whole", "lora", or nothing."""
    found: dict[str, set[str]] = {"language": set(), "connector": set(), "tower": set()}
    for weight, parameter in lm.named_parameters():
        if parameter.requires_grad:
            found[part(name, weight)].add("lora" if "lora_" in weight else "whole")
    return found


def shown(folder: str, lm: torch.nn.Module) -> tuple[Tensor, Tensor, Any]:
    """Two rows with two pictures, as a policy on this folder would get them."""
    reader = load_image_reader(folder)
    assert reader is not None
    images = [np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8) for seed in range(2)]
    row = Chat(load_tokenizer(folder), reader=reader).opening(Observation("Which?", images=tuple(images)))
    token_ids = torch.tensor([[*row, 50, 60, 70], [*row, 50, 61, 71]])
    lengths = torch.full((2,), token_ids.shape[1])
    return token_ids, lengths, reader.inputs([images, images], token_ids, lengths)


@torch.no_grad()
def logprobs(folder: str, lm: torch.nn.Module) -> Tensor:
    token_ids, lengths, vision = shown(folder, lm)
    return PaddedModel(lm)(token_ids, lengths, vision=vision).logprobs


def disturb(lm: torch.nn.Module) -> None:
    """Move every trained weight, so that what is not saved would be missed."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


# --- which parts are trained ------------------------------------------------------------------------------------------

WHOLE, ADAPTER, NOTHING = {"whole"}, {"lora"}, set[str]()


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize(
    ("vision", "lora", "language", "connector", "tower"),
    [
        (None, None, WHOLE, WHOLE, NOTHING),
        (None, Lora(r=2), ADAPTER, NOTHING, NOTHING),
        (Vision(tower="trained"), None, WHOLE, WHOLE, WHOLE),
        (Vision(connector="frozen"), None, WHOLE, NOTHING, NOTHING),
        (Vision(language="frozen", connector="trained"), None, NOTHING, WHOLE, NOTHING),  # an alignment stage
        (Vision(connector="trained"), Lora(r=2), ADAPTER, WHOLE, NOTHING),
        (Vision(tower="lora", connector="lora"), Lora(r=2), ADAPTER, ADAPTER, ADAPTER),
        (Vision(tower="lora", language="frozen"), Lora(r=2), NOTHING, NOTHING, ADAPTER),
        (Vision(tower="trained", connector="lora"), Lora(r=2), ADAPTER, ADAPTER, WHOLE),
    ],
)
def test_parts(name, folders, vision, lora, language, connector, tower):
    lm = load_policy(folders(name), vision=vision, lora=lora)
    assert trained(name, lm) == {"language": language, "connector": connector, "tower": tower}
    for weight, parameter in lm.named_parameters():  # all of a part, not some of it
        if "lora_" not in weight:
            wanted = {"language": language, "connector": connector, "tower": tower}[part(name, weight)]
            assert parameter.requires_grad == (wanted == WHOLE)


@pytest.mark.parametrize("name", SOME)
def test_adapters_are_where_they_were_asked_for(name, folders):
    """Every linear layer of the decoder but the head; by name, only those of the chosen parts."""
    lm = load_policy(folders(name), lora=Lora(r=2))
    adapted = {weight.split(".lora_")[0] for weight, _ in lm.named_parameters() if "lora_" in weight}
    assert len(adapted) == 2 * 7
    assert all(".layers." in weight for weight in adapted)
    some = load_policy(folders(name), lora=Lora(r=2, targets=["q_proj", "v_proj"]))
    layers = {weight.split(".lora_")[0] for weight, _ in some.named_parameters() if "lora_" in weight}
    assert layers == {layer for layer in adapted if layer.endswith(("q_proj", "v_proj"))}


def test_targets_of_a_part_without_adapter_are_answered_with_what_there_is(folders):
    with pytest.raises(UserError, match=r"\['qkv'\] match nothing in language, .*'tower': \[.*'qkv'"):
        load_policy(folders("qwen3_vl"), lora=Lora(targets=["qkv"]))
    lm = load_policy(folders("qwen3_vl"), lora=Lora(r=2, targets=["qkv"]), vision=Vision(tower="lora"))
    assert trained("qwen3_vl", lm) == {"language": NOTHING, "connector": NOTHING, "tower": ADAPTER}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tower": "thawed"}, "tower='thawed' must be one of frozen, trained, lora"),
        ({"language": "lora"}, "language='lora' must be one of trained, frozen"),
        ({"language": "frozen"}, "everything is frozen"),
    ],
)
def test_choices_that_train_nothing_or_are_unknown(options, message):
    with pytest.raises(UserError, match=message):
        Vision(**options)


def test_options_that_do_not_fit_the_model(folders, tiny_lm):
    with pytest.raises(UserError, match="no adapter to train"):
        load_policy(folders("llava"), vision=Vision(tower="lora"))
    with pytest.raises(UserError, match="is a model of text"):
        load_policy(tiny_lm, vision=Vision(tower="trained"))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_policy_samples_as_it_trains(name, folders):
    """In eval mode, no dropout anywhere in its configuration or modules, its weights those of the folder."""
    lm = load_policy(folders(name), attention="eager")
    assert not any(module.training for module in lm.modules())
    rates = [v for c in (lm.config.text_config, lm.config.vision_config) for k, v in c.to_dict().items() if "drop" in k]
    assert not any(rate for rate in rates if isinstance(rate, float))
    assert max_context(lm) == 512
    plain = tf.AutoModelForImageTextToText.from_pretrained(folders(name)).state_dict()
    assert all(torch.equal(plain[weight], value) for weight, value in lm.state_dict().items())


def test_a_tower_s_dropout_is_removed_too(tmp_path):
    folder = build_vlm_folder(tmp_path, "llava_dino")
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"] |= {"hidden_dropout_prob": 0.5, "drop_path_rate": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    lm = load_policy(folder).train()
    assert torch.equal(logprobs(folder, lm), logprobs(folder, lm))


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_pixels_fit_weights_of_any_type(name, folders, dtype):
    exact = logprobs(folders(name), load_policy(folders(name)))
    found = logprobs(folders(name), load_policy(folders(name), dtype=dtype))
    assert (found - exact).abs().max() < (0.5 if dtype == "bfloat16" else 1e-4)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_dino"])
def test_gradient_checkpointing_changes_no_gradient(name, folders):
    """With a trained tower, whose layers are recomputed too; shared prefixes or not."""
    gradients = []
    for recompute in (False, True):
        lm = load_policy(folders(name), vision=Vision(tower="trained"), gradient_checkpointing=recompute)
        token_ids, lengths, vision = shown(folders(name), lm)
        for model in (PaddedModel(lm), PrefixGroupedModel(lm, min_reuse=1.0)):
            lm.zero_grad()
            model(token_ids, lengths, vision=vision).logprobs.sum().backward()
            gradients.append({k: p.grad.clone() for k, p in lm.named_parameters() if p.grad is not None})
    assert any(part(name, weight) == "tower" for weight in gradients[0])
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys()
        for weight, expected in gradients[0].items():
            torch.testing.assert_close(other[weight], expected, rtol=1e-3, atol=2e-4)


# --- tokenizer and export ---------------------------------------------------------------------------------------------


def test_the_template_of_a_processor_is_found(tmp_path):
    """Old folders keep it in chat_template.json or in processor_config.json, where no tokenizer looks."""
    folder = Path(build_vlm_folder(tmp_path, "llava"))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(str(folder))
    for file in ("chat_template.json", "processor_config.json"):
        (folder / file).write_text(json.dumps({"chat_template": template}))
        assert load_tokenizer(str(folder)).chat_template == template
        (folder / file).unlink()
    (folder / "chat_template.json").write_text("{'")
    with pytest.raises(UserError, match=r"chat_template.json is damaged"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("name", FAMILIES)
def test_an_exported_model_is_the_policy(name, folders, tmp_path):
    """Weights under the names that the folder had, and images read as before."""
    folder, out = folders(name), str(tmp_path / "out")
    lm = load_policy(folder, vision=Vision(tower="trained"))
    disturb(lm)
    expected = logprobs(folder, lm)
    export(lm, load_tokenizer(folder), out)
    assert load_file(f"{out}/model.safetensors").keys() == load_file(f"{folder}/model.safetensors").keys()
    assert torch.equal(logprobs(out, load_policy(out)), expected)
    assert (expected - logprobs(folder, load_policy(folder))).abs().max() > 1e-3


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("merge", [True, False])
def test_an_exported_adapter_is_the_policy(name, folders, tmp_path, merge):
    """With weights trained whole beside it; the adapter's folder trains on as it did."""
    folder, out = folders(name), str(tmp_path / "out")
    vision = Vision(tower="lora", connector="trained")
    lm = load_policy(folder, lora=Lora(r=2), vision=vision)
    disturb(lm)
    expected = logprobs(folder, lm)
    export(lm, load_tokenizer(folder), out, merge=merge)
    again = load_policy(out, vision=None if merge else vision)
    assert isinstance(again, PeftModel) != merge
    torch.testing.assert_close(logprobs(out, again), expected, rtol=0, atol=1e-4 if merge else 0)
    assert (expected - logprobs(folder, load_policy(folder))).abs().max() > 1e-3
    if not merge:
        assert trained(name, again) == trained(name, lm)


def test_an_adapter_s_trained_parts_must_fit(folders, tmp_path):
    lm = load_policy(folders("llava"), lora=Lora(r=2), vision=Vision(connector="trained"))
    export(lm, load_tokenizer(folders("llava")), tmp_path / "out", merge=False)
    file = tmp_path / "out" / "trained_parts.safetensors"
    assert {part("llava", name) for name in load_file(file)} == {"connector"}
    whole = file.read_bytes()
    file.write_bytes(whole[:50])
    with pytest.raises(UserError, match=r"trained_parts\.safetensors is damaged"):
        load_policy(str(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = folders("llava_dino")
    (tmp_path / "out" / "adapter_config.json").write_text(json.dumps(config))
    file.write_bytes(whole.replace(b"linear_1", b"linear_9"))
    with pytest.raises(UserError, match="does not belong to the adapter's base model"):
        load_policy(str(tmp_path / "out"))


def test_an_export_is_loaded_by_the_family_s_own_processor(tmp_path):
    """From a folder as processors write them, settings nested in processor_config.json."""
    folder, out = build_vlm_folder(tmp_path / "in", "llava"), tmp_path / "out"
    Path(folder, "preprocessor_config.json").unlink()
    own_processor("llava").save_pretrained(folder)
    assert not Path(folder, "preprocessor_config.json").exists()
    export(load_policy(folder), load_tokenizer(folder), out)
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}]
    loaded = tf.AutoProcessor.from_pretrained(out)
    assert isinstance(loaded, tf.LlavaProcessor)
    text = loaded.apply_chat_template(conversation, add_generation_prompt=True)
    theirs = loaded(text=text, images=[picture], return_tensors="pt")
    reader = load_image_reader(str(out))
    assert reader is not None
    ours = Chat(load_tokenizer(str(out)), reader=reader).opening(Observation("Hi", images=(picture,)))
    assert theirs["input_ids"][0].tolist() == ours
    assert torch.equal(theirs["pixel_values"], reader.read(picture).pixels["pixel_values"])


def test_an_export_without_processor_says_so(tmp_path, caplog):
    folder = build_vlm_folder(tmp_path / "in", "llava")
    lm, tokenizer = load_policy(folder), load_tokenizer(folder)
    shutil.rmtree(folder)  # the stage before was cleaned up meanwhile
    with caplog.at_level(logging.WARNING, LOGGER):
        export(lm, tokenizer, tmp_path / "out")
    assert "has no image processor's files" in caplog.text
    assert (tmp_path / "out" / "model.safetensors").is_file()


# --- QLoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_missing_bitsandbytes_names_the_extra(folders, tiny_lm):
    for folder in (folders("llava"), tiny_lm):
        with pytest.raises(UserError, match=r"quantize='nf4' needs the package `bitsandbytes`.*lit-agentrl\[qlora\]"):
            load_policy(folder, lora=Lora(r=2), quantize="nf4")


def test_4_bit_weights_want_an_adapter(tiny_lm):
    with pytest.raises(UserError, match=r"cannot be trained\. Set `lora`"):
        load_policy(tiny_lm, quantize="nf4")


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("qwen3_vl", ["lm_head", "model.visual"]),
        ("smolvlm", ["lm_head", "model.connector", "model.vision_model"]),
        ("llava_dino", ["lm_head", "model.multi_modal_projector", "model.vision_tower"]),
    ],
)
def test_what_sees_and_the_head_keep_their_bits(name, left, folders):
    config = tf.AutoConfig.from_pretrained(folders(name))
    options = quantization_options(config, "bfloat16", tf.AutoModelForImageTextToText)
    assert options.pop("llm_int8_skip_modules") == left
    assert options == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }


def test_a_text_model_keeps_its_head(tiny_lm):
    config = tf.AutoConfig.from_pretrained(tiny_lm)
    assert quantization_options(config, "float32", tf.AutoModelForCausalLM)["llm_int8_skip_modules"] == ["lm_head"]


def test_a_4_bit_policy_is_exported_as_its_adapter(folders, tmp_path, caplog, monkeypatch):
    """Its export, loaded in full precision, can be merged."""
    folder, out = folders("llava"), tmp_path / "out"
    lm = load_policy(folder, lora=Lora(r=2))
    disturb(lm)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, LOGGER):
        patch.setattr(export_module, "is_quantized", lambda lm: True)
        export(lm, load_tokenizer(folder), out, merge=True)
    assert "the adapter alone is exported" in caplog.text
    assert not (out / "model.safetensors").exists()
    export(load_policy(str(out)), load_tokenizer(str(out)), tmp_path / "merged")
    torch.testing.assert_close(
        logprobs(folder, load_policy(str(tmp_path / "merged"))), logprobs(folder, lm), rtol=0, atol=1e-4
    )


# --- what surrounds training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["frozen", "sync", "ema"])
def test_a_reference_has_the_vision_weights_of_its_time(folders, mode):
    lm = load_policy(folders("llava_dino"), lora=Lora(r=2), vision=Vision(tower="trained", connector="lora"))
    reference = Reference(mode)
    reference.attach(lm)
    before = logprobs(folders("llava_dino"), lm)
    disturb(lm)
    after = logprobs(folders("llava_dino"), lm)
    assert (after - before).abs().max() > 1e-3
    with reference.using(lm):
        assert torch.equal(logprobs(folders("llava_dino"), lm), before)
    assert torch.equal(logprobs(folders("llava_dino"), lm), after)


def test_a_reference_without_adapter_must_have_all_that_is_trained_under_it(folders):
    beside = load_policy(folders("llava"), lora=Lora(r=2), vision=Vision(connector="trained"))
    with pytest.raises(UserError, match=r"would leave 4 trained weights .*multi_modal_projector"):
        Reference("adapter_off").attach(beside)
    under = load_policy(folders("llava"), lora=Lora(r=2), vision=Vision(connector="lora", tower="lora"))
    before = logprobs(folders("llava"), under)
    disturb(under)
    reference = Reference("adapter_off")
    reference.attach(under)
    with reference.using(under):
        assert torch.equal(logprobs(folders("llava"), under), before)


class OneBatch(L.LightningDataModule):
    """Two rows with images, again and again."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def train_dataloader(self) -> Any:
        lm = load_policy(self.folder)
        token_ids, lengths, vision = shown(self.folder, lm)
        mask = torch.zeros(token_ids.shape, dtype=torch.bool)
        mask[:, -3:] = True
        values = (torch.zeros(token_ids.shape), mask.float())  # old log-probabilities and advantages
        batch = TrainBatch(token_ids, lengths, mask, *values, num_action_tokens=6, num_rows=2, vision=vision)
        return torch.utils.data.DataLoader([batch], batch_size=None)


def fit(module: SFTModule, folder: str, root: Path, epochs: int, checkpoint: Path | None = None) -> L.Trainer:
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=root,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, OneBatch(folder), ckpt_path=checkpoint, weights_only=False)
    return trainer


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_module_trains_by_what_it_sees_and_its_checkpoint_holds_what_it_trains(folders, tmp_path):
    """Resumed after two of four epochs it is where it would have been; frozen parts are not in the checkpoint."""
    folder = folders("llava_dino")

    def module() -> SFTModule:
        L.seed_everything(0, verbose=False)
        vision = Vision(tower="trained", connector="lora")
        options = {"lora": Lora(r=2), "vision": vision, "optimizer": lambda p: torch.optim.Adam(p, 1e-2)}
        return SFTModule(pretrained=folder, **options)

    whole, half, resumed = module(), module(), module()
    fit(whole, folder, tmp_path, 4)
    fit(half, folder, tmp_path, 2).save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=False)["state_dict"]
    assert saved.keys() == {name for name, p in half.named_parameters() if p.requires_grad}
    assert any("vision_tower" in name and "lora_" not in name for name in saved)
    assert not any("lm_head" in name for name in saved)
    fit(resumed, folder, tmp_path, 4, tmp_path / "half.ckpt")
    assert whole.policy is not None
    assert resumed.policy is not None
    start = logprobs(folder, load_policy(folder))[:, -3:].sum()
    ends = [logprobs(folder, module.policy.lm)[:, -3:].sum() for module in (whole, resumed)]
    assert torch.equal(*ends)
    assert ends[0] > start + 1
    moved = {part("llava", name) for name, p in base_lm(whole.policy.lm).named_parameters() if p.grad is not None}
    assert moved == {"language", "connector", "tower"}


def test_what_a_module_sees_changes_its_score(folders):
    """`score` hands the images on: without them the rows could not be scored at all."""
    folder = folders("qwen2_5_vl")
    module = SFTModule(pretrained=folder, share_prefix=False)
    module.configure_model()
    (batch,) = OneBatch(folder).train_dataloader()
    with torch.no_grad():
        found = module.score(batch).logprobs
    assert torch.equal(found[:, -3:], logprobs(folder, load_policy(folder))[:, -3:])
