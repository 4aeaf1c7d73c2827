"""On a GPU: shared prefixes give the padded numbers, the engine what `generate` does, and whole runs end and resume."""

from __future__ import annotations

import copy
import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lit_agentrl.cli import main
from lit_agentrl.models import PackedTree, PaddedModel, PrefixGroupedModel
from lit_agentrl.rollouts.hf import HFEngine
from lit_agentrl.types import SamplingParams
from prefix_cases import Batch
from runs import ECHO, checkpoint, options
from scoring_twins import Scored, grouped, padded, scores_and_gradients
from tiny import build_tiny_lm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and torch finds none")

WIDE = {"initializer_range": 0.2}  # of the weights: attention decides the next token
GREEDY = SamplingParams(temperature=0, max_new_tokens=24)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A random model of each family, by its name."""
    root = tmp_path_factory.mktemp("cuda")
    return {family: build_tiny_lm(root / family, family, **WIDE) for family in ("llama", "qwen3")}


def load(folder: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> PreTrainedModel:
    lm: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    return lm.eval().cuda()


def rows_of_a_tree() -> Batch:
    """Two prompts of 150 tokens, 3 + 2 branches of each, two of them branching again: several blocks of attention."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(4, 260, (7, 260), generator=generator)
    rows[:4, :150], rows[4:, :150] = rows[0, :150], rows[4, :150]
    rows[1, :200], rows[5, :251] = rows[0, :200], rows[4, :251]
    lengths = torch.tensor([260, 251, 203, 170, 260, 255, 180])
    targets = (torch.arange(260) >= 140).expand(7, -1) & (torch.arange(260) < lengths[:, None])
    return rows.cuda(), lengths.cuda(), targets.cuda()


def norm(values: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """Euclidean, of the difference, over all parameters."""
    return float(sum(float((values[name].double() - others[name].double()).square().sum()) for name in others)) ** 0.5


def distances(found: Scored, exact: Scored) -> tuple[float, float, float]:
    """Of log-probabilities, entropies and gradients."""
    assert found[0].entropy is not None
    assert exact[0].entropy is not None
    return (
        float((found[0].logprobs.double() - exact[0].logprobs).detach().norm()),
        float((found[0].entropy.double() - exact[0].entropy).detach().norm()),
        norm(found[1], exact[1]),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_grouped_is_no_further_from_float64_than_padded(
    folders: dict[str, str], family: str, dtype: torch.dtype
) -> None:
    """Log-probabilities, entropies and gradients, on every attention that a tree runs on here."""
    lm, batch = load(folders[family], dtype), rows_of_a_tree()
    exact = scores_and_gradients(padded(copy.deepcopy(lm).double()), batch)
    plain = distances(scores_and_gradients(padded(lm), batch), exact)
    for backend, attention in (("flex", "sdpa"), ("dense", "sdpa"), ("dense", "eager")):
        model = lm if attention == "sdpa" else load(folders[family], dtype, attention)
        shared = distances(scores_and_gradients(grouped(model, backend), batch), exact)
        for name, mine, theirs in zip(("logprobs", "entropies", "gradients"), shared, plain, strict=True):
            assert 0 < mine <= 2 * theirs, (backend, attention, name, mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_by_default_a_tree_runs_on_flex_attention(folders: dict[str, str], dtype: torch.dtype, autocast: bool) -> None:
    """The start-up check passes, and under autocast (bf16-mixed) numbers are as near to float64 as the padded ones."""
    lm, (rows, lengths, targets) = load(folders["qwen3"], dtype), rows_of_a_tree()
    shared, plain = PrefixGroupedModel(lm), PaddedModel(lm)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        found = shared(rows, lengths, targets=targets).logprobs
        found.sum().backward()  # type: ignore[no-untyped-call]
        expected = plain(rows, lengths, targets=targets).logprobs.detach()
    assert shared.refusal == ""
    assert shared.backend_for(PackedTree.build(rows, lengths)) == "flex"
    exact = padded(copy.deepcopy(lm).double())(rows, lengths, targets=targets).logprobs.detach()
    assert float((found.detach().double() - exact).norm()) <= 2 * float((expected.double() - exact).norm())


def test_many_sizes_of_trees_compile_few_graphs(folders: dict[str, str]) -> None:
    """Packs of 1 to 12 blocks: after the second size nothing is compiled again."""
    from torch._dynamo.utils import counters

    model = PrefixGroupedModel(load(folders["llama"], torch.bfloat16, "sdpa"), "flex", min_reuse=0, check=False)
    generator = torch.Generator().manual_seed(0)
    graphs = []
    for length in (300, 450, 100, 400, 350, 200, 500):
        rows = torch.randint(4, 260, (3, length), generator=generator)
        rows[:, : length // 2] = rows[0, : length // 2]
        model(rows.cuda(), torch.full((3,), length).cuda()).logprobs.sum().backward()
        graphs.append(int(counters["stats"]["unique_graphs"]))
    assert graphs[-1] == graphs[2], graphs


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_greedy_tokens_are_those_of_generate(folders: dict[str, str], family: str) -> None:
    """Prompts of different lengths and a shared beginning, in float32."""
    lm = load(folders[family])
    lm.generation_config.eos_token_id = None
    prompts = [[5 + (7 * i * i + shift) % 250 for i in range(length)] for shift, length in ((0, 60), (3, 17), (9, 90))]
    prompts += [[*prompts[0][:50], 9, 8, 7], prompts[0]]
    engine = HFEngine(stop_token_ids=[])
    engine.sync(lm)
    for prompt, completion in zip(prompts, engine.generate(prompts, GREEDY), strict=True):
        ids = torch.tensor([prompt], device="cuda")
        output = lm.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
        assert completion.token_ids == output[0, len(prompt) :].tolist()


def test_turns_that_reuse_their_prefix_sample_the_same(folders: dict[str, str]) -> None:
    """A second turn costs its new tokens alone, and gives what an engine that has seen nothing gives."""
    lm = load(folders["qwen3"])
    params = SamplingParams(temperature=1.0, max_new_tokens=16)
    contexts = [[5 + (11 * i) % 200 for i in range(70)]] * 4
    engine, fresh = HFEngine(stop_token_ids=[]), HFEngine(stop_token_ids=[], max_cached_tokens=0)
    engine.sync(lm)
    fresh.sync(lm)
    first = engine.generate(contexts, params, seeds=range(4))
    second = [[*context, *done.token_ids, 9, 8, 7] for context, done in zip(contexts, first, strict=True)]
    found, expected = (each.generate(second, params, seeds=range(4, 8)) for each in (engine, fresh))
    assert [done.token_ids for done in found] == [done.token_ids for done in expected]
    assert min(done.num_cached for done in found) >= 70 + 15
    ours, theirs = (torch.tensor([done.logprobs for done in each]) for each in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    rows = torch.tensor([[*context, *done.token_ids] for context, done in zip(second, found, strict=True)])
    scored = PaddedModel(lm)(rows.cuda(), torch.full((4,), rows.shape[1]).cuda()).logprobs[:, -16:]
    torch.testing.assert_close(ours, scored.detach().cpu(), rtol=0, atol=1e-4)  # what the trainer computes


def on_gpu(lm: str, run: Path, precision: str, *more: str) -> list[str]:
    given = ["--trainer.accelerator", "gpu", "--trainer.devices", "1", "--trainer.precision", precision]
    return options(lm, run, *given, "--evaluation.at_start", "false", "--evaluation.at_end", "false", *more)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_fit_trains_and_resumes(folders: dict[str, str], tmp_path: Path, precision: str) -> None:
    """Two iterations in one go and with a stop between: the same number of steps and nearly the same weights."""
    main(on_gpu(folders["qwen3"], tmp_path / "whole", precision))
    main(on_gpu(folders["qwen3"], tmp_path / "parts", precision, "--trainer.max_epochs", "1"))
    main(on_gpu(folders["qwen3"], tmp_path / "parts", precision, "--ckpt_path", "last"))
    whole, parts = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts")
    assert whole["global_step"] == parts["global_step"] == 2
    state: dict[str, torch.Tensor] = whole["state_dict"]
    assert all(weights.isfinite().all() for weights in state.values())
    size = norm(state, {name: torch.zeros(()) for name in state})
    assert norm(parts["state_dict"], state) <= 0.02 * size  # adding in another order may turn a tiny gradient's sign
    logged = logs(tmp_path / "whole")
    assert len(logged) == 2
    for row in logged:
        assert row["memory/peak_gpu_gib"] > 0
        assert row["train/ratio"] == pytest.approx(1.0, abs=1e-3 if precision == "32-true" else 0.05)


def logs(run: Path) -> list[dict[str, float]]:
    """The metrics of every iteration."""
    found: dict[str, dict[str, float]] = {}
    for row in csv.DictReader((run / "logs" / "version_0" / "metrics.csv").open()):
        found.setdefault(row["epoch"], {}).update({name: float(value) for name, value in row.items() if value})
    return [found[epoch] for epoch in sorted(found, key=int)]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_the_doctor_examines_a_gpu(folders: dict[str, str], tmp_path: Path, precision: str) -> None:
    """In float32 it finds nothing wrong; in 16 bits it may find the ratios noisy, and says so with exit code 1."""
    given = ["--model.pretrained", folders["qwen3"], "--trainer.default_root_dir", str(tmp_path), "--repeats", "1"]
    given += ["--trainer.accelerator", "gpu", "--trainer.devices", "1", "--trainer.precision", precision]
    code: Any = 0
    try:
        main(["doctor", "--config", ECHO, *given, "--seconds", "10", "--json", str(tmp_path / "doctor.json")])
    except SystemExit as stop:
        code = stop.code
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert found["device"] == "cuda:0"
    assert found["cost"]["padded"]["peak_bytes"] > 0
    assert code == 0 if precision == "32-true" else code in (0, 1)
