"""LoRA and QLoRA under every method: what is trained, saved, resumed, compared with, and exported."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_agentrl.cli import main
from lit_agentrl.models.export import export
from lit_agentrl.models.policy import Lora, load_policy, load_tokenizer
from lit_agentrl.models.quantized import keep_gradients
from preference_parts import echo_pairs, write_pairs
from runs import ROOT, metrics

METHODS = ("grpopp", "tree_grpo", "gigpo", "sft", "dpo")
NEEDS_BITS = pytest.mark.skipif(
    find_spec("bitsandbytes") is None or find_spec("accelerate") is None,
    reason="QLoRA needs the extra qlora: bitsandbytes and accelerate",
)
ADAPTERS = ("lora", pytest.param("qlora", marks=NEEDS_BITS))
LORA = Lora(r=8, alpha=16)
Fits = Callable[[str, str], Path]


def options(method: str, adapter: str, lm: str, run: Path, pairs: Path) -> list[str]:
    """Two iterations of the smallest run of each method; where there is a reference, it is the adapter switched off."""
    name = {"sft": "textworld_warmup"}.get(method, f"{method}_echo")
    small = {
        "trainer.max_epochs": "2",
        "trainer.default_root_dir": str(run),
        "trainer.accelerator": "cpu",
        "checkpoint.save_top_k": "-1",
        "model.pretrained": lm,
        "model.lora.r": str(LORA.r),
        "model.lora.alpha": str(LORA.alpha),
        "model.optimizer.lr": "1e-2",
    }
    if adapter == "qlora":
        small["model.quantize"] = "nf4"
    if method == "dpo":
        small |= {"data.path": str(pairs), "data.batch_size": "8", "model.reference.mode": "adapter_off"}
    elif method == "sft":
        small |= {"data.source.environment": "EchoSuite", "data.source.num_tasks": "3", "data.batch_size": "3"}
    else:
        small |= {"data.num_prompts": "2", "evaluation.num_tasks": "2", "transcripts.show": "0"}
        small |= {"model.kl_coef": "0.1", "model.reference.mode": "adapter_off"}
        small["data.rewards"] = '[{"function": "runs.mean_token"}]'
    config = str(ROOT / "configs" / "experiment" / f"{name}.yaml")
    return ["fit", "--config", config, *(w for k, v in small.items() for w in (f"--{k}", v))]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "preferences.jsonl", echo_pairs())


@pytest.fixture(scope="module")
def fits(tiny_lm: str, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Fits:
    """Runs by method and adapter, each made when it is first asked for."""
    root = tmp_path_factory.mktemp("adapters")

    @cache
    def made(method: str, adapter: str) -> Path:
        run = root / f"{method}-{adapter}"
        main(options(method, adapter, tiny_lm, run, pairs))
        return run

    return made


def loaded(path: Path) -> dict[str, Any]:
    return dict(torch.load(path, weights_only=True))


def policy_of(run: Path, lm: str, adapter: str) -> PeftModel:
    """The base under the adapter of a run's last checkpoint."""
    policy = load_policy(lm, lora=LORA, quantize="nf4" if adapter == "qlora" else "none")
    assert isinstance(policy, PeftModel)
    state = loaded(run / "checkpoints" / "last.ckpt")["state_dict"]
    own = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert {name.removeprefix("policy.lm.") for name in state} == own.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[f"policy.lm.{name}"])
    return policy


def logprobs(lm: Any) -> Tensor:
    """Of some tokens."""
    ids = torch.arange(4, 44).view(2, 20)
    with torch.no_grad():
        found: Tensor = lm(input_ids=ids).logits.float().log_softmax(-1)
    return found


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("method", METHODS)
def test_the_adapter_alone_is_trained_and_saved(method: str, adapter: str, fits: Fits) -> None:
    """A and B of seven layers in two blocks, in float32, and the optimiser's two states of each; B began at 0."""
    saved = loaded(fits(method, adapter) / "checkpoints" / "last.ckpt")
    state = saved["state_dict"]
    assert len(state) == 2 * 7 * 2
    assert all(".lora_A." in name or ".lora_B." in name for name in state)
    widths = {"q": (64, 64), "k": (64, 32), "v": (64, 32), "o": (64, 64), "mlp": (64, 128)}
    size = 2 * 8 * (sum(a + b for name, (a, b) in widths.items() if name != "mlp") + 3 * sum(widths["mlp"]))
    assert sum(value.numel() for value in state.values()) == size
    moments = [m for each in saved["optimizer_states"][0]["state"].values() for m in each.values() if m.numel() > 1]
    assert sum(moment.numel() for moment in moments) == 2 * size
    assert max(float(value.abs().max()) for name, value in state.items() if "lora_B" in name) > 1e-3
    reference = saved.get("reference") or {}
    assert not reference.get("weights"), "the adapter switched off needs no copy"


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("method", METHODS)
def test_it_resumes_from_the_adapter_alone(
    method: str, adapter: str, fits: Fits, tiny_lm: str, pairs: Path, tmp_path: Path
) -> None:
    """One iteration, then another in a new folder: bit by bit the two that ran through."""
    first = fits(method, adapter) / "checkpoints" / "iteration_000000.ckpt"
    main([*options(method, adapter, tiny_lm, tmp_path, pairs), "--ckpt_path", str(first)])
    expected = loaded(fits(method, adapter) / "checkpoints" / "last.ckpt")["state_dict"]
    found = loaded(tmp_path / "checkpoints" / "last.ckpt")["state_dict"]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value)
    begun = loaded(first)["state_dict"]
    assert any(not torch.equal(begun[name], value) for name, value in expected.items())


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("method", ["grpopp", "tree_grpo", "gigpo"])
def test_the_reference_is_the_model_without_the_adapter(method: str, adapter: str, fits: Fits) -> None:
    """A fresh adapter changes nothing, so the first iteration's divergence is 0; later it is not."""
    divergences = [float(row["train/kl"]) for row in metrics(fits(method, adapter)) if row.get("train/kl")]
    assert divergences[0] == pytest.approx(0, abs=1e-6)
    assert divergences[-1] > 1e-6


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_copy_and_the_switch_are_the_same_reference(
    adapter: str, fits: Fits, tiny_lm: str, pairs: Path, tmp_path: Path
) -> None:
    """Both are the pretrained model, where training began with a fresh adapter."""
    main([*options("grpopp", adapter, tiny_lm, tmp_path, pairs), "--model.reference.mode", "frozen"])
    expected = loaded(fits("grpopp", adapter) / "checkpoints" / "last.ckpt")["state_dict"]
    saved = loaded(tmp_path / "checkpoints" / "last.ckpt")
    assert len(saved["reference"]["weights"]) == len(expected)
    for name, value in saved["state_dict"].items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_merged_export_is_the_policy_for_plain_transformers(method: str, fits: Fits, tiny_lm: str) -> None:
    """Rounding of the merged weights alone: 1e-5 nats in float32."""
    run = fits(method, "lora")
    merged = AutoModelForCausalLM.from_pretrained(run / "export")
    expected = logprobs(policy_of(run, tiny_lm, "lora"))
    torch.testing.assert_close(logprobs(merged), expected, rtol=0, atol=1e-5)
    assert (expected - logprobs(AutoModelForCausalLM.from_pretrained(tiny_lm))).abs().max() > 1e-3
    assert AutoTokenizer.from_pretrained(run / "export").chat_template


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_export_is_the_policy_for_plain_peft(method: str, fits: Fits, tiny_lm: str, tmp_path: Path) -> None:
    """The same products in the same order: equal bit by bit."""
    policy = policy_of(fits(method, "lora"), tiny_lm, "lora")
    export(policy, load_tokenizer(tiny_lm), tmp_path / "adapter", merge=False)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_lm), str(tmp_path / "adapter"))
    assert torch.equal(logprobs(again.eval()), logprobs(policy))


@NEEDS_BITS
@pytest.mark.parametrize("method", METHODS)
def test_a_4_bit_run_exports_its_adapter(method: str, fits: Fits, tiny_lm: str, tmp_path: Path) -> None:
    """Plain transformers and peft give the policy's log-probabilities on the same bits, 1e-5 nats; merged onto the full
    weights it is another model, by no more than the bits had cost."""
    run = fits(method, "qlora")
    assert (run / "export" / "adapter_config.json").is_file()
    policy = policy_of(run, tiny_lm, "qlora")
    expected = logprobs(policy)
    bits: Any = policy.get_base_model().config.quantization_config
    base = AutoModelForCausalLM.from_pretrained(tiny_lm, quantization_config=bits, dtype=torch.float32)
    keep_gradients(base)  # on a CPU with AVX512-BF16 bitsandbytes would compute in bfloat16: 3e-3 nats off here
    cost = (logprobs(base) - logprobs(AutoModelForCausalLM.from_pretrained(tiny_lm))).abs().max()
    again = PeftModel.from_pretrained(base, str(run / "export"))
    torch.testing.assert_close(logprobs(again.eval()), expected, rtol=0, atol=1e-5)
    whole = load_policy(str(run / "export"))
    export(whole, load_tokenizer(tiny_lm), tmp_path / "merged")
    merged = logprobs(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged, logprobs(whole), rtol=0, atol=1e-5)
    assert (merged - expected).abs().max() < 10 * cost


@NEEDS_BITS
def test_states_of_8_bits_are_saved_and_resumed(fits: Fits, tiny_lm: str, pairs: Path, tmp_path: Path) -> None:
    """bitsandbytes' AdamW, by its class path: one byte for each of two states of a large weight, after a resume too."""
    eight = ["--model.optimizer", "bitsandbytes.optim.AdamW8bit", "--model.optimizer.lr", "1e-2"]
    eight += ["--model.lora", "null", "--model.kl_coef", "0"]
    whole, part = tmp_path / "whole", tmp_path / "part"
    main([*options("grpopp", "lora", tiny_lm, whole, pairs), *eight])
    first = whole / "checkpoints" / "iteration_000000.ckpt"
    main([*options("grpopp", "lora", tiny_lm, part, pairs), *eight, "--ckpt_path", str(first)])
    saved = loaded(whole / "checkpoints" / "last.ckpt")
    states = [
        leaf for leaf in tree_leaves(saved["optimizer_states"]) if isinstance(leaf, Tensor) and leaf.numel() > 4096
    ]
    assert len(states) >= 2
    assert {state.dtype for state in states if state.numel() > 16384} == {torch.uint8}
    found = loaded(part / "checkpoints" / "last.ckpt")["state_dict"]
    for name, value in saved["state_dict"].items():
        assert torch.equal(found[name], value)
