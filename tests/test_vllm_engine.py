"""`VLLMEngine` with the real vLLM on CPU, against `HFEngine` and plain forwards; and what it refuses without one."""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_agentrl import vllm_worker
from lit_agentrl.errors import UserError
from lit_agentrl.models.policy import Lora, load_policy, load_tokenizer
from lit_agentrl.rollouts import VLLMEngine
from lit_agentrl.rollouts.stop_strings import StopStrings
from lit_agentrl.rollouts.vllm.start import start
from lit_agentrl.rollouts.vllm.weights import WeightsFolder
from tiny import build_tiny_lm
from vllm_parts import CONTEXTS, SHAPE, run_case


@pytest.fixture(scope="module", params=["tied", "untied"])
def found(request: pytest.FixtureRequest, vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the real engine shows of a tiny model; of one whose head is its embedding, and of one with its own."""
    folder = build_tiny_lm(tmp_path_factory.mktemp("lm") / "lm", tie_word_embeddings=request.param == "tied", **SHAPE)
    return run_case(vllm_python, "full", folder) | {"is_tied": request.param == "tied", "folder": folder}


def ids(completions: list[dict[str, Any]]) -> list[list[int]]:
    return [completion["token_ids"] for completion in completions]


@pytest.mark.slow
def test_greedy_actions_are_hfengines(found):
    """Tokens, ends and log-probabilities: with stop tokens, with stop strings, and after the weights have changed."""
    for case in ("greedy", "stop_token", "stop_string", "changed"):
        ours, twins = found[case]
        assert ids(ours) == ids(twins), case
        assert [each["finish"] for each in ours] == [each["finish"] for each in twins], case
        for mine, twin in zip(ours, twins, strict=True):
            assert mine["logprobs"] == pytest.approx(twin["logprobs"], abs=1e-5), case  # measured: 1e-6
    assert any(len(tokens) < 16 for tokens in ids(found["stop_token"][0]))
    assert any(len(tokens) < 16 for tokens in ids(found["stop_string"][0]))
    assert ids(found["greedy"][0]) != ids(found["changed"][0])


@pytest.mark.slow
def test_log_probabilities_are_at_the_sampling_temperature(found):
    assert all(difference < 1e-5 for difference in found["differences"].values()), found[
        "differences"
    ]  # measured: 5e-7


@pytest.mark.slow
def test_a_seed_fixes_an_action_whatever_it_is_batched_with(found):
    one, again, other = map(ids, found["sampled"])
    assert one == again
    assert all(mine != yours for mine, yours in zip(one, other, strict=True))
    assert ids(found["alone"]) == one[1:2]


@pytest.mark.slow
def test_more_context_than_a_step_computes(found):
    """16,000 tokens of contexts, seeded: vLLM on CPU dies where one of them is computed in parts."""
    sampled, worst, stops = found["many"]
    tokens = ids(sampled)
    assert len(tokens) == 40
    # which of them draw a stop token differs between processors: they end with it, and all others are whole
    ends = [next((n for n, token in enumerate(each, 1) if token in stops), 4) for each in tokens]
    assert [len(each) for each in tokens] == ends
    assert ends.count(4) > 30
    assert [each["finish"] == "stop" for each in sampled] == [each[-1] in stops for each in tokens]
    assert worst < 1e-5


@pytest.mark.slow
def test_stop_strings_cut_what_would_have_come_without_them(found):
    """The same seeds without stop strings give the same tokens on: each action ends where its text first has one."""
    free, ended = found["cut"]
    finder = StopStrings((*"abcdefghijklm", "é", "th"), load_tokenizer(found["folder"]))
    num_cut = 0
    for whole, cut in zip(ids(free), ended, strict=True):
        right = next((n for n in range(1, len(whole) + 1) if finder.is_complete(whole[:n])), len(whole))
        assert cut["token_ids"] == whole[:right]
        num_cut += right < len(whole)
        assert len(cut["logprobs"]) == right
    assert num_cut > 2


@pytest.mark.slow
def test_prefixes_are_cached_until_the_weights_change(found):
    first, again, changed = found["greedy"][0], found["again"], found["changed"][0]
    assert [each["num_cached"] for each in first] == [0, 64, 0, 0]  # whole blocks of 32 of the 80 that two share
    assert [each["num_cached"] for each in again] == [64, 64, 0, 32]
    assert [each["num_cached"] for each in changed] == [0, 64, 0, 0]
    for each, context in zip(again, CONTEXTS, strict=True):
        assert each["num_cached"] + each["num_prefilled"] == len(context)


@pytest.mark.slow
def test_the_fingerprint_is_the_policys(found):
    for name in ("fingerprint", "changed_fingerprint"):
        told, right = found[name]
        assert told["count"] == right[0]  # the vocabulary of 300 is padded to 320 in vLLM
        assert told["total"] == pytest.approx(right[1], abs=1e-9)
        assert told["squares"] == pytest.approx(right[2], rel=1e-12)
    assert found["fingerprint"][0] != found["changed_fingerprint"][0]
    assert found["version"] == 2
    assert found["dtype"] == "torch.float32"
    assert found["left"] is False  # no files after close()


@pytest.mark.slow
def test_vllms_own_reload_leaves_a_tied_head_behind(found):
    """Why the worker packs heads again: if this fails, vLLM has been mended."""
    if found["is_tied"]:
        assert "multiplies by other weights than it has" in found["stock_reload"]
    else:
        assert found["stock_reload"]["count"] == found["fingerprint"][0]["count"]


@pytest.mark.slow
def test_an_adapter_goes_alone(vllm_python, tmp_path):
    shown = run_case(vllm_python, "adapter", build_tiny_lm(tmp_path / "lm", tie_word_embeddings=False, **SHAPE))
    for ours, twins in shown["runs"]:
        assert ids(ours) == ids(twins)
        for mine, twin in zip(ours, twins, strict=True):
            assert mine["logprobs"] == pytest.approx(twin["logprobs"], abs=1e-4)
    assert len({str(ids(ours)) for ours, _ in shown["runs"]}) == 3
    assert shown["fingerprint"] is None


@pytest.mark.slow
def test_a_vllm_that_hangs_is_ended_at_the_deadline(vllm_python, tmp_path):
    shown = run_case(vllm_python, "hang", build_tiny_lm(tmp_path / "lm", tie_word_embeddings=False, **SHAPE))
    assert shown["keeps_seed"]
    assert len(shown["first"]) == 4
    assert shown["num_processes"] >= 1
    assert "did not answer within timeout=3 seconds, and was ended" in shown["error"]
    assert shown["seconds"] < 60
    loose, gathered = shown["sockets"]
    assert loose == 0
    assert gathered > 0
    assert shown["left"] == []


def test_without_vllm_the_error_names_the_extra(tiny_lm):
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vllm is installed here")
    engine = VLLMEngine()
    engine.use_tokenizer(load_tokenizer(tiny_lm))
    with pytest.raises(UserError, match=r"needs the package `vllm`.*lit-agentrl\[vllm\]"):
        engine.sync(load_policy(tiny_lm))
    place = engine.weights._path
    engine.close()
    assert place is not None
    assert not place.exists()


@pytest.mark.parametrize(
    "options",
    [{"memory": 0.0}, {"memory": 1.0}, {"timeout": 0}, {"max_length": 0}, {"tensor_parallel": 0}, {"sync": "half"}],
)
def test_what_cannot_be_is_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        VLLMEngine(**options)


def test_policies_that_cannot_go_are_refused(tiny_lm):
    engine = VLLMEngine(sync="adapter")
    engine.use_tokenizer(load_tokenizer(tiny_lm))
    with pytest.raises(UserError, match="needs a policy with a LoRA adapter"):
        engine.sync(load_policy(tiny_lm))
    lm = load_policy(tiny_lm, lora=Lora(r=4))
    next(p for name, p in lm.named_parameters() if "norm" in name).requires_grad_(True)
    with pytest.raises(UserError, match="weights beside the adapter are trained too"):
        engine.sync(lm)
    with pytest.raises(UserError, match="needs a transformers or PEFT model"):
        engine.sync(torch.nn.Linear(2, 2))


def test_ranks_do_not_share_a_process_with_vllm(monkeypatch, tmp_path):
    from lit_agentrl.rollouts.vllm import start as module

    monkeypatch.setattr(module, "require_vllm", lambda: None)
    monkeypatch.setattr(module.distributed, "world", lambda: (0, 2))
    for settings, said in (
        (module.Settings(isolated=False), "isolated=False"),
        (module.Settings(tensor_parallel=2), "2 ranks"),
    ):
        with pytest.raises(UserError, match=said):
            start(tmp_path, settings, torch.float32, positions=512, lora_rank=None)


def test_vllms_sockets_go_when_the_process_does():
    code = (
        "import os; from lit_agentrl.rollouts.vllm.start import Settings, _environment\n"
        "with _environment(Settings(), False):\n"
        "    place = os.environ.get('VLLM_RPC_BASE_PATH', 'none'); print(place, os.path.isdir(place))\n"
        "assert 'VLLM_RPC_BASE_PATH' not in os.environ"
    )
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_RPC_BASE_PATH"}
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        (long := Path(short) / ("x" * 60)).mkdir()  # no socket fits in there
        for parent, is_set in ((Path(short), True), (long, False)):
            told = environment | {"TMPDIR": str(parent), "PYTHONPATH": str(Path(__file__).parent.parent)}
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=told)
            place, was_there = done.stdout.split()
            assert (Path(place).parent == parent, was_there) == (is_set, str(is_set))
            assert [file for file in parent.iterdir() if file != long] == []


def test_a_folder_without_room_is_named(tiny_lm, tmp_path):
    (tmp_path / "file").write_text("")
    weights = WeightsFolder(str(tmp_path / "file"), "VLLMEngine")
    with pytest.raises(UserError, match=r"cannot be written to .*file.*Give a folder"):
        weights.write(load_policy(tiny_lm), load_tokenizer(tiny_lm), "full")


def test_the_worker_needs_torch_alone():
    """A server's Python has neither Lightning nor peft."""
    code = (
        "import sys, lit_agentrl.vllm_worker; "
        "assert not {'lightning', 'peft', 'transformers', 'jsonargparse'} & set(sys.modules), sorted(sys.modules)"
    )
    root = str(Path(__file__).parent.parent)
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": root})


class Packed(torch.nn.Module):
    """A layer as vLLM's CPU kernels leave it: a matrix that is only multiplied by."""

    def __init__(self, matrix: torch.Tensor, *, keeps: bool, width: bool = True) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(matrix.clone() if keeps else torch.empty(0, dtype=matrix.dtype))
        if width:
            self.input_size_per_partition = matrix.shape[1]
        self.cpu_linear = lambda x, weight, bias: x @ matrix.T


def test_moments_read_packed_matrices():
    torch.manual_seed(0)
    wide, head = torch.randn(7, 1100), torch.randn(64, 5)
    model = torch.nn.Module()
    model.packed, model.head, model.norm = Packed(wide, keeps=False), Packed(head, keeps=True), torch.nn.LayerNorm(3)
    model.tied = torch.nn.Module()
    model.tied.weight = model.head.weight
    model.head.num_org_embeddings_per_partition = 60  # the rest pads
    numbers = torch.cat([wide.flatten(), head[:60].flatten(), torch.ones(3), torch.zeros(3)]).double()
    told = vllm_worker.moments(model)
    assert told["count"] == len(numbers)
    assert told["total"] == pytest.approx(float(numbers.sum()), abs=1e-9)
    assert told["squares"] == pytest.approx(float(numbers.square().sum()), rel=1e-12)
    with torch.no_grad():
        model.head.weight[3, 3] += 1
    with pytest.raises(vllm_worker.StalePackingError, match="head multiplies by other weights"):
        vllm_worker.moments(model)


def test_moments_say_what_they_cannot_read():
    model = torch.nn.Module()
    model.odd = Packed(torch.ones(2, 2), keeps=False, width=False)
    with pytest.raises(vllm_worker.UnreadableWeightError, match="odd"):
        vllm_worker.moments(model)
    model.odd = torch.nn.Module()
    model.odd.weight = torch.nn.Parameter(torch.empty(0))
    with pytest.raises(vllm_worker.UnreadableWeightError, match="odd"):
        vllm_worker.moments(model)
