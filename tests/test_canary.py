"""An engine that does not sample from the policy stops the run before it is trained on; one that does, never."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from canary_parts import (
    Bare,
    Broken,
    Foreign,
    Hot,
    Perturbed,
    Rounded,
    Shifted,
    Short,
    Silent,
    Stale,
    Unadapted,
)
from lit_agentrl.errors import UserError
from lit_agentrl.models import PaddedModel, PrefixGroupedModel, fingerprint
from lit_agentrl.models.fingerprint import merged_weights
from lit_agentrl.models.policy import Lora, load_policy, load_tokenizer
from lit_agentrl.rollouts.canary import TIGHT_LOGP, Canary, Trainee
from lit_agentrl.rollouts.chat import Chat
from lit_agentrl.rollouts.hf import HFEngine
from lit_agentrl.types import Engine, SamplingParams
from runs import checkpoint, main, metrics, options, run_alone
from tiny import build_tiny_lm

Precision = Callable[[], contextlib.AbstractContextManager[object]]
AUTOCAST: Precision = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose distributions are not flat, so that a wrong temperature shows; qwen2's embeddings are tied."""
    made = tmp_path_factory.mktemp(request.param) / "lm"
    build_tiny_lm(made, request.param, tie_word_embeddings=request.param == "qwen2", initializer_range=0.2)
    return str(made)


def made(folder: str, precision: Precision = contextlib.nullcontext, **loading: object) -> tuple[Trainee, Chat]:
    """The trainer's side, and what writes the prompts."""
    torch.manual_seed(0)
    policy = PrefixGroupedModel(load_policy(folder, **loading))

    def score(batch: object) -> torch.Tensor:
        options = {"targets": batch.action_mask, "temperature": batch.temperature}
        with torch.no_grad(), precision():
            return policy(batch.token_ids, batch.lengths, **options).logprobs.float()

    return Trainee(policy, score, precision), Chat(load_tokenizer(folder))


def update(policy: PaddedModel, lr: float = 1e-4) -> None:
    """One step of AdamW on random tokens."""
    weights = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr)
    ids = torch.randint(5, 250, (2, 20), generator=torch.Generator().manual_seed(1))
    policy(ids, torch.tensor([20, 20])).logprobs.sum().backward()
    optimizer.step()


def check(
    engine: Engine, trainee: Trainee, chat: Chat, canary: Canary | None = None, **sampling: float
) -> dict[str, float]:
    return (canary or Canary()).check(engine, trainee, chat, SamplingParams(**sampling))


@pytest.mark.parametrize("own_weights", [False, True])
@pytest.mark.parametrize(
    ("precision", "loading"),
    [
        (contextlib.nullcontext, {}),
        (contextlib.nullcontext, {"lora": Lora(r=4)}),
        (contextlib.nullcontext, {"dtype": "float64"}),
        (AUTOCAST, {"lora": Lora(r=4)}),
        (contextlib.nullcontext, {"dtype": "bfloat16", "lora": Lora(r=4)}),
    ],
    ids=["float32", "lora", "float64", "bf16-mixed", "bf16-true"],
)
def test_a_right_engine_passes(
    folder: str, precision: Precision, loading: dict[str, object], own_weights: bool
) -> None:
    """After every one of three updates, at two temperatures."""
    trainee, chat = made(folder, precision, **loading)
    engine = HFEngine(own_weights=own_weights)
    for temperature in (1.0, 0.6, 1.0):
        engine.sync(trainee.policy)
        found = check(engine, trainee, chat, temperature=temperature)
        assert found["canary/fingerprint_gap"] == 0
        if precision is not AUTOCAST and loading.get("dtype") != "bfloat16":
            assert found["canary/logp_gap"] < TIGHT_LOGP / 10
        update(trainee.policy)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (Bare, "fingerprint"),
        (Unadapted, "fingerprint"),
        (Foreign, "fingerprint"),
        (Stale, "fingerprint"),
        (Hot, "another temperature"),
        (Shifted, "position"),
        (Broken, "inf nats"),
    ],
)
def test_a_wrong_engine_is_caught(folder: str, engine: type[Engine], message: str, dtype: str) -> None:
    """Adapter missing and weights stale by one update of a usual learning rate: the fingerprint sees both."""
    trainee, chat = made(folder, lora=Lora(r=4), dtype=dtype)
    wrong = engine()
    wrong.sync(trainee.policy)
    update(trainee.policy)
    wrong.sync(trainee.policy)
    with pytest.raises(UserError, match=message) as raised:
        check(wrong, trainee, chat)
    assert engine.__name__ in str(raised.value)
    assert "sync 2" in str(raised.value)


def test_a_weight_off_by_a_thousandth_is_caught(folder: str) -> None:
    trainee, chat = made(folder)
    engine = Perturbed()
    engine.sync(trainee.policy)
    with pytest.raises(UserError, match="fingerprint of its weights"):
        check(engine, trainee, chat)


@pytest.mark.parametrize("whose", ["policy", "engine"])
def test_a_frozen_weight_that_somebody_changes_is_caught(folder: str, whose: str) -> None:
    """Under an adapter nothing else should move between syncs: it is looked at all the same, at every check."""
    trainee, chat = made(folder, lora=Lora(r=4))
    engine = HFEngine(own_weights=True)
    engine.sync(trainee.policy)
    assert check(engine, trainee, chat)["canary/fingerprint_gap"] == 0
    update(trainee.policy)
    engine.sync(trainee.policy)
    lm = trainee.policy.lm if whose == "policy" else engine._lm
    assert lm is not None
    (norm,) = [p for name, p in lm.named_parameters() if name.endswith("model.norm.weight")]
    assert not norm.requires_grad
    with torch.no_grad():
        norm[3] += 1e-3
    with pytest.raises(UserError, match="fingerprint of its weights"):
        check(engine, trainee, chat)


def test_one_module_is_read_once_and_two_are_read_both(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainee, chat = made(folder, lora=Lora(r=4))
    read: list[object] = []
    monkeypatch.setattr(fingerprint, "merged_weights", lambda lm: read.append(lm) or merged_weights(lm))
    shared, own = HFEngine(), HFEngine(own_weights=True)
    for engine in (shared, own):
        engine.sync(trainee.policy)
        assert check(engine, trainee, chat)["canary/fingerprint_gap"] == 0
    lm = trainee.policy.lm
    assert [each is lm for each in read] == [True, False, True]
    assert read[1] is own._lm


def test_a_weight_that_is_no_number_is_caught_where_weights_are_shared(folder: str) -> None:
    """No log-probability depends on it."""
    trainee, chat = made(folder, lora=Lora(r=4))
    trainee.policy.lm.register_parameter("unused", torch.nn.Parameter(torch.full((3,), math.nan), requires_grad=False))
    engine = HFEngine()
    engine.sync(trainee.policy)
    with pytest.raises(UserError, match="fingerprint of its weights is inf away"):
        check(engine, trainee, chat)


def test_what_is_given_is_not_what_is_sampled_from_in_another_type(folder: str) -> None:
    trainee, chat = made(folder)
    engine = Rounded()
    engine.sync(trainee.policy)
    with pytest.raises(UserError, match="fingerprint of its weights"):
        check(engine, trainee, chat)


def test_the_log_probabilities_alone_catch_a_stale_engine_in_float32(folder: str) -> None:
    trainee, chat = made(folder, lora=Lora(r=4))

    class StaleAndSilent(Stale):
        fingerprint = Silent.fingerprint

    engine = StaleAndSilent()
    engine.sync(trainee.policy)
    for _ in range(10):
        update(trainee.policy, lr=1e-3)
    engine.sync(trainee.policy)
    with pytest.raises(UserError, match="log-probabilities of 16 tokens"):
        check(engine, trainee, chat)


def test_an_engine_that_cannot_tell_is_compared_by_log_probabilities(
    folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    trainee, chat = made(folder)
    engine = Silent()
    engine.sync(trainee.policy)
    with caplog.at_level(logging.INFO, "lit_agentrl"):
        found = [check(engine, trainee, chat) for _ in range(2)]
    assert [list(each) for each in found] == [["canary/logp_gap"]] * 2
    assert sum("log-probabilities alone" in record.message for record in caplog.records) <= 1  # once a process


def test_missing_log_probabilities_are_named(folder: str) -> None:
    trainee, chat = made(folder)
    engine = Short()
    engine.sync(trainee.policy)
    with pytest.raises(UserError, match="7 log-probabilities for 8 tokens"):
        check(engine, trainee, chat)


def test_the_tolerance_is_the_user_s(folder: str) -> None:
    trainee, chat = made(folder)
    engine = Hot()
    engine.sync(trainee.policy)
    gap = check(engine, trainee, chat, Canary(tolerance=100.0))["canary/logp_gap"]
    assert 0.01 < gap < 100
    with pytest.raises(UserError, match="are allowed"):
        check(engine, trainee, chat, Canary(tolerance=gap / 1.01))


def test_every_so_many_syncs(folder: str) -> None:
    trainee, _ = made(folder)
    engine, due = HFEngine(), []
    for _ in range(5):
        engine.sync(trainee.policy)
        due.append(Canary(every=2).is_due(engine))
    assert due == [True, False, True, False, True]


@pytest.mark.parametrize("wrong", [{"num_prompts": 0}, {"every": 0}, {"tolerance": 0.0}, {"tolerance": math.nan}])
def test_options_that_mean_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"canary: {next(iter(wrong))}="):
        Canary(**wrong)


def test_qlora_is_compared_by_log_probabilities(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder = build_tiny_lm(tmp_path / "lm", initializer_range=0.2)
    trainee, chat = made(folder, lora=Lora(r=4), quantize="nf4")
    engine = HFEngine()
    engine.sync(trainee.policy)
    assert engine.fingerprint() is None
    assert list(check(engine, trainee, chat)) == ["canary/logp_gap"]


# --- in a run ---


def test_a_wrong_engine_stops_the_run_before_it_trains(
    tiny_lm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Right at the first sync, where B is 0 and the adapter does nothing yet; then wrong, after the first update."""
    with pytest.raises(SystemExit) as ended:
        main(options(tiny_lm, tmp_path, "--data.engine", "canary_parts.Stale", "--evaluation.at_start", "false"))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "Stale does not sample from the policy after its sync 2" in said
    assert "--data.canary null" in said
    assert checkpoint(tmp_path)["epoch"] == 0  # the first iteration was sound


def test_it_can_be_turned_off_and_is_logged_otherwise(tiny_lm: str, tmp_path: Path) -> None:
    off = ("--data.engine", "canary_parts.Hot", "--data.canary", "null")
    main(options(tiny_lm, tmp_path / "off", *off, "--trainer.max_epochs", "1"))
    main(options(tiny_lm, tmp_path / "on", "--data.canary.every", "1", "--trainer.max_epochs", "1"))
    (quiet,), (logged,) = ([r for r in metrics(tmp_path / run) if r.get("reward/mean")] for run in ("off", "on"))
    assert "canary/logp_gap" not in quiet
    assert 0 <= float(logged["canary/logp_gap"]) < TIGHT_LOGP
    assert float(logged["canary/fingerprint_gap"]) == 0


@pytest.mark.slow
def test_one_wrong_rank_stops_both(tiny_lm: str, tmp_path: Path) -> None:
    """Neither waits for the other until a scheduler kills it."""
    ranks = ("--trainer.strategy", "ddp", "--trainer.devices", "2")
    code, output = run_alone(options(tiny_lm, tmp_path, *ranks, "--data.engine", "canary_parts.WrongOnOneRank"))
    assert code == 2, output
    assert output.count("does not sample from the policy") == 2
