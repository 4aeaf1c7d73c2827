"""Laws of every engine in this process: whatever it shares, batches and forgets, the tokens are the model's."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from engine_parts import (
    GREEDY,
    SAMPLED,
    build,
    engine_of,
    full_logprobs,
    paged,
    random_contexts,
    reference,
    tokens_of,
)
from lit_agentrl.errors import UserError
from lit_agentrl.models import PaddedModel
from lit_agentrl.rollouts import ContinuousBatchingEngine
from lit_agentrl.rollouts.engine import NonFiniteLogitsError, rollout_seed
from lit_agentrl.rollouts.hf import HFEngine
from lit_agentrl.types import SamplingParams

Synced = Callable[..., HFEngine | ContinuousBatchingEngine]
"""Makes an engine of a model, synced with it."""

ENGINES: dict[str, Synced] = {"HFEngine": engine_of, "ContinuousBatchingEngine": paged}
every_engine = pytest.mark.parametrize("synced", ENGINES.values(), ids=ENGINES)
pytestmark = [
    pytest.mark.usefixtures("no_thread_is_left"),
    pytest.mark.filterwarnings("ignore:HFEngine cannot share"),  # mamba's states
]


# --- the tokens are the model's ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 0.0])
@pytest.mark.parametrize(
    ("synced", "family", "atol"),
    [
        (engine_of, "llama", 1e-5),
        (engine_of, "mistral-sliding", 1e-5),
        (engine_of, "gemma2-softcap", 1e-5),
        (engine_of, "mamba", 1e-5),
        (paged, "llama", 2e-5),
    ],
)
def test_logprobs_are_those_of_a_plain_forward(synced: Synced, family: str, atol: float, temperature: float) -> None:
    """At the sampling temperature, at 1 for greedy, over the whole vocabulary though only 5 tokens may be drawn."""
    lm = build(family)
    contexts = random_contexts(30, 7, 30)
    params = SamplingParams(temperature=temperature, max_new_tokens=20, top_k=5, top_p=0.9)
    for context, completion in zip(contexts, synced(lm).generate(contexts, params), strict=True):
        expected = full_logprobs(lm, context, completion.token_ids, temperature or 1.0)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=atol, rtol=0)


@pytest.mark.parametrize(("synced", "family"), [(engine_of, "llama"), (engine_of, "qwen2-sliding"), (paged, "llama")])
def test_lora_adapter_is_active(synced: Synced, family: str) -> None:
    lm, (context,) = build(family), random_contexts(20)
    plain = reference(lm, context, 12)
    adapted = get_peft_model(lm, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    engine = synced(adapted)
    greedy, sampled = (tokens_of(engine.generate([context] * 2, params, seeds=[1, 2])) for params in (GREEDY, SAMPLED))
    assert greedy == [reference(adapted, context, 12)] * 2
    assert greedy[0] != plain
    assert sampled == tokens_of(engine_of(adapted).generate([context] * 2, SAMPLED, seeds=[1, 2]))


@every_engine
def test_trajectory_does_not_depend_on_its_batch(synced: Synced) -> None:
    """Alone, in a batch, in another order, on top of other retained rows: the seed decides."""
    lm = build()
    contexts = random_contexts(20, 9, 33) * 3
    seeds = [rollout_seed(0, 1, "prompt", index, 0) for index in range(9)]
    together = tokens_of(synced(lm).generate(contexts, SAMPLED, seeds))
    assert len(set(map(tuple, together))) == 9
    engine = synced(lm)
    alone = [
        engine.generate([context], SAMPLED, [seed])[0].token_ids for context, seed in zip(contexts, seeds, strict=True)
    ]
    backwards = synced(lm).generate(contexts[::-1], SAMPLED, seeds[::-1])
    assert together == alone == tokens_of(backwards)[::-1]


@every_engine
def test_calls_without_seeds_differ_and_repeat(synced: Synced) -> None:
    def two_calls(seed: int) -> list[list[int]]:
        engine = synced(lm, seed=seed)
        return [tokens for _ in range(2) for tokens in tokens_of(engine.generate(contexts, SAMPLED))]

    lm, contexts = build(), random_contexts(10) * 2
    first = two_calls(0)
    assert len(set(map(tuple, first))) == 4
    assert first == two_calls(0) != two_calls(1)


# --- where actions end ------------------------------------------------------------------------------------------------


@every_engine
def test_stop_tokens_end_an_action_and_stay_in_it(synced: Synced) -> None:
    """The call's, or the engine's."""
    lm, (context,) = build(), random_contexts(20)
    engine = synced(lm)
    free = engine.generate([context], SAMPLED, seeds=[0])[0]
    stop = free.token_ids[4]
    length = free.token_ids.index(stop) + 1
    params = SamplingParams(temperature=0.9, max_new_tokens=12, stop_token_ids=(stop,))
    for completion in (
        engine.generate([context], params, seeds=[0])[0],
        synced(lm, stop_token_ids=[stop]).generate([context], SAMPLED, seeds=[0])[0],
    ):
        assert (completion.token_ids, completion.finish) == (free.token_ids[:length], "stop")
        assert len(completion.logprobs) == length


@every_engine
def test_stop_ids_come_from_the_model_unless_given(synced: Synced) -> None:
    """One or several of its generation configuration, or else its configuration's, as they are at the call."""
    lm, (context,) = build(), random_contexts(21)
    answer = reference(lm, context, 12)
    assert answer.index(answer[3]) == 3
    engine = synced(lm, stop_token_ids=None)
    for generation, model, length in (
        (answer[3], None, 4),
        ([answer[1], answer[3]], None, 2),
        (None, None, 12),
        (None, answer[0], 1),
    ):
        lm.generation_config.eos_token_id, lm.config.eos_token_id = generation, model
        completion = engine.generate([context], GREEDY)[0]
        assert completion.token_ids == answer[:length]
        assert completion.finish == ("length" if length == 12 else "stop")


@every_engine
def test_the_last_position_can_be_used(synced: Synced) -> None:
    assert len(synced(build()).generate([[3] * 180], SAMPLED)[0].token_ids) == 12


# --- weights ----------------------------------------------------------------------------------------------------------


class Policy(nn.Module):
    """A wrapper as the training modules have one."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm


@every_engine
def test_sync_brings_new_weights_and_forgets_the_old_keys(synced: Synced) -> None:
    lm, (context,) = build(), random_contexts(50)
    engine = synced(Policy(lm))
    first = engine.version
    before = engine.generate([context], GREEDY)[0]
    assert engine.shares_weights
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)), alpha=0.2)
    engine.sync(Policy(lm))
    after = engine.generate([context], GREEDY)[0]
    assert after.num_cached == 0
    assert after.token_ids == reference(lm, context, 12) != before.token_ids
    other = build(seed=1)
    engine.sync(other)
    assert engine.version == first + 2
    assert engine.generate([context], GREEDY)[0].token_ids == reference(other, context, 12)


@every_engine
def test_own_weights_stay_while_the_policy_trains_on(synced: Synced) -> None:
    lm, (context,) = build(), random_contexts(20)
    policy = PaddedModel(lm)
    engine = synced(policy, own_weights=True)
    assert not engine.shares_weights
    before = reference(lm, context, 12)
    with torch.no_grad():
        lm.lm_head.weight.add_(torch.randn(lm.lm_head.weight.shape, generator=torch.Generator().manual_seed(5)))
    assert engine.generate([context], GREEDY)[0].token_ids == before != reference(lm, context, 12)
    engine.sync(policy)
    assert engine.generate([context], GREEDY)[0].token_ids == reference(lm, context, 12)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "lit_agentrl_grouped"])
@pytest.mark.parametrize(
    ("synced", "error"), [(engine_of, ZeroDivisionError), (paged, RuntimeError)], ids=list(ENGINES)
)
def test_model_and_random_state_are_left_as_they_were(
    synced: Synced, error: type[Exception], attention: str, fails: bool
) -> None:
    """Training flags of every module, attention, random numbers; gradients flow, and the model can be copied."""
    lm = build().train()
    lm.set_attn_implementation(attention)
    lm.model.layers[1].eval()
    flags = [module.training for module in lm.modules()]
    names = set(lm.__dict__)
    engine = synced(lm)
    state = torch.get_rng_state()
    if fails:
        failing = lm.model.layers[2].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(error, match="division by zero"):
            engine.generate([[3, 4]], SAMPLED)
        failing.remove()
    else:
        engine.generate([[3, 4]], SAMPLED)
    assert [module.training for module in lm.modules()] == flags
    assert lm.config._attn_implementation == attention
    assert torch.equal(torch.get_rng_state(), state)
    assert set(lm.__dict__) == names
    assert torch.is_grad_enabled()
    copy.deepcopy(lm)  # a loop's locks could not be
    lm.set_attn_implementation("sdpa")
    lm(input_ids=torch.tensor([[3, 4]])).logits.sum().backward()
    assert lm.lm_head.weight.grad is not None
    assert engine.generate([[3, 4]], GREEDY)[0].token_ids == reference(lm.eval(), [3, 4], 12)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("synced", "family", "sequence"), [(engine_of, "llama", "1"), (engine_of, "mamba", "1"), (paged, "llama", r"\d")]
)
def test_logits_that_are_not_finite_are_an_error(synced: Synced, family: str, sequence: str) -> None:
    lm = build(family)
    engine = synced(lm)
    with torch.no_grad():
        lm.get_input_embeddings().weight[7] = float("nan")
    assert engine.generate([[5, 6]], SamplingParams(temperature=0, max_new_tokens=1))
    where = f"weights of sync {engine.version}; sequence {sequence}, new token 0"
    with pytest.raises(NonFiniteLogitsError, match=where):
        engine.generate([[5, 6], [7, 5, 6]], SAMPLED)


@every_engine
@pytest.mark.parametrize(
    ("contexts", "params", "message"),
    [
        ([[3], []], SAMPLED, "Context 1 of 2 is empty"),
        ([[3] * 181], SAMPLED, "181 tokens and max_new_tokens=12, together 193, but the model has only 192"),
        ([[3, 97]], SAMPLED, "token id 97, but the model has 97"),
        ([[3]], SamplingParams(max_new_tokens=0), "max_new_tokens=0"),
        ([[3]], SamplingParams(temperature=-1.0), r"temperature=-1\.0"),
        ([[3]], SamplingParams(top_p=0.0), r"top_p=0\.0"),
        ([[3]], SamplingParams(top_k=-1), "top_k=-1"),
        ([[3]], SamplingParams(stop=("a",), max_new_tokens=8), "use_tokenizer"),
    ],
)
def test_impossible_requests_are_refused(
    synced: Synced, contexts: list[list[int]], params: SamplingParams, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        synced(build()).generate(contexts, params)


@every_engine
def test_engine_needs_a_model_and_one_seed_each(synced: Synced) -> None:
    engine = synced(build())
    kind = type(engine)
    with pytest.raises(UserError, match=f"{kind.__name__}.*call sync"):
        kind().generate([[3]], SAMPLED)
    with pytest.raises(UserError, match="PEFT model"):
        kind().sync(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="1 seeds for 2 contexts"):
        engine.generate([[3], [4]], SAMPLED, seeds=[1])
    assert engine.generate([], SAMPLED) == []
